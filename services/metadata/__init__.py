"""The truth and the log: documents, vectors and collections in Postgres."""
