"""Compute attention over the cache, by the backends of the cards (``v2``, ``v1``, ``off``) or others."""

from qwenq.runtime.attention.backends import BACKENDS, attention_backend, available, of_row
from qwenq.runtime.attention.plain import Attention

__all__ = ["BACKENDS", "Attention", "attention_backend", "available", "of_row"]
