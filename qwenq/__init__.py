"""qwenq: GPTQ quantisation of Qwen models, and the proof of what it cost and bought."""

__version__ = "0.1.0"
