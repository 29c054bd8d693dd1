"""Builds what a search reads: segments, models and the jobs that make new generations."""
