"""A shard replica: a view of the log that answers searches from memory and mapped segments."""
