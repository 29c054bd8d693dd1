"""The pure core: ids, ring, shard maps, filters, fan-out plans and the merge; no I/O, no clock, no chance."""
