"""Measure speed, memory and energy of running a model, each point in a process of its own."""
