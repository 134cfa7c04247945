"""Kernels: linear layers over packed integers. ``table`` lists them, ``base`` says what each has to be."""
