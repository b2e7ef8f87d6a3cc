"""Triton kernels of ``mirror_opt``, installed as ``mirror_opt.kernels``."""
