"""The algorithm, and the pipeline that streams layers through it."""
