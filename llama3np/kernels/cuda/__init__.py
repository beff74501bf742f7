"""The fast path on CUDA: our own kernels through CuPy. Nothing here is imported without a device."""
