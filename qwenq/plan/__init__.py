"""Plan what a model will need, from its config alone: bytes, memory, tensor parallelism, speed."""
