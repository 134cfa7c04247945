"""Measuring a model: divergence from its base, and what that means."""
