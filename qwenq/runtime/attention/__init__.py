"""Compute attention over the cache, by the backends of the cards (``v2``, ``v1``, ``off``) or others."""

from qwenq.runtime.attention.backends import BACKENDS, Availability, attention_backend, available, of_row
from qwenq.runtime.attention.plain import Attention, Off, Sdpa, attend

__all__ = [
    "BACKENDS",
    "Attention",
    "Availability",
    "Off",
    "Sdpa",
    "attend",
    "attention_backend",
    "available",
    "of_row",
]
