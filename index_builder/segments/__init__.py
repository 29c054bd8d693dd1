"""Immutable index files: written once, verified, memory-mapped, merged."""
