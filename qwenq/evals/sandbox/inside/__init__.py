"""What runs inside the sandbox. Standard library only, and nothing else of qwenq: nothing else is there."""
