"""Implement every hot operation once: one Python function, one torch implementation, one C implementation.

``cpu`` loads the C library of the best variant for this CPU, ``ops`` lists what runs each operation here and
why anything faster does not. Nothing outside this room asks for CPU features.
"""
