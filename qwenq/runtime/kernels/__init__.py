"""Hold the quantised linears and the Triton kernels."""
