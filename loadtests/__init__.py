"""Measures the service against ceilings of the same run: `python -m loadtests.bench`."""
