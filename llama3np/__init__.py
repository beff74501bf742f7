"""Llama 3 in plain array operations: NumPy on the CPU, CuPy on CUDA."""
