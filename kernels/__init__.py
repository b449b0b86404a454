"""The Triton kernels, installed as `opsdl.kernels`."""
