"""What computes on CUDA devices, over CuPy. Importing a module of this package imports CuPy."""
