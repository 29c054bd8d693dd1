"""What users would otherwise run, on the same vectors and queries."""
