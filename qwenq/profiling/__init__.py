"""Speed, memory, energy and the environment: each point in a process of its own, each figure a row."""
