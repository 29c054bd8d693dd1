"""The parts that do I/O, and the two compositions of them."""
