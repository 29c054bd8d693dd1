"""The servers that the embedded service runs as its own children: Postgres and Valkey."""
