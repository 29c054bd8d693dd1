"""The cache: L1 in this process, Redis behind it, and what may be served from them."""
