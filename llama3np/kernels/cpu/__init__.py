"""Compiled kernels (numba, the extra `fast`): what the engine "numba" runs."""
