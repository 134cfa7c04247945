"""Bring a quantised folder to people: which engines load it, its card, its upload."""
