"""Plan a quantised model: bytes, memory, speed bounds, and GPUs that can share it."""
