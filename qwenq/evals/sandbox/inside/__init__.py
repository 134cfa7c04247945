"""Run inside the sandbox: standard library only, and nothing else of qwenq, as nothing else is visible."""
