"""The benchmarks, one file each: prompts and patterns on top, then their protocols, as data."""
