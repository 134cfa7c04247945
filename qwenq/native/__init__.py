"""Machine code for this CPU, where llvmlite is installed: ``support`` says whether it can be made.

``gpu`` says the same of Triton's kernels.
"""
