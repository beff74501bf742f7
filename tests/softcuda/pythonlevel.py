"""What Python code sees of the device: cupy.cuda.runtime.X, and the device's properties."""

import ctypes
from typing import Any

C_TYPES: dict[str, Any] = {
    "int": ctypes.c_int,
    "intptr_t": ctypes.c_ssize_t,
    "size_t": ctypes.c_size_t,
    "unsigned int": ctypes.c_uint,
    "float": ctypes.c_float,
    "PyObject *": ctypes.py_object,
}


def expose(modules, replaced):
    """Give Python callers of the runtime and driver modules the functions that C callers got.

    modules: by the letter of each (letter, name, signature, address) in replaced.
    """
    for letter, name, signature, address in replaced:
        setattr(modules[letter], name, callable_of(name, signature, address))


def callable_of(name, signature, address):
    """A Python function of a C function with a Cython signature, such as `int (int, int skip)`."""
    result, _, parameters = signature.removesuffix(")").partition("(")
    result_type = ctypes.py_object if "*" in result else C_TYPES[result.strip()]
    types = [each.strip() for each in parameters.split(",")]
    own = [C_TYPES[each] for each in types if "__pyx" not in each and each != "void"]
    # Cython passes whether to skip a Python override, then a struct of optional arguments.
    extra = [ctypes.c_void_p] if "__pyx_opt_args" in parameters else []
    function = ctypes.PYFUNCTYPE(result_type, *own, ctypes.c_int, *extra)(address)

    def wrapper(*args):
        return function(*args[: len(own)], 0, *[None for _ in extra])

    wrapper.__name__ = name
    return wrapper


def device_properties(cc, extension):
    """What cudaGetDeviceProperties reports: sizes like an A100's, whatever the capability."""
    return {
        "name": b"softcuda",
        "totalGlobalMem": extension.memory(),
        "sharedMemPerBlock": 49152,
        "sharedMemPerBlockOptin": 166912,
        "regsPerBlock": 65536,
        "warpSize": 32,
        "maxThreadsPerBlock": 1024,
        "maxThreadsDim": (1024, 1024, 64),
        "maxGridSize": (2147483647, 65535, 65535),
        "clockRate": 1410000,
        "major": cc[0],
        "minor": cc[1],
        "multiProcessorCount": 108,
        "maxThreadsPerMultiProcessor": 2048,
        "l2CacheSize": 41943040,
        "pciBusID": 0,
        "pciDeviceID": 0,
        "pciDomainID": 0,
    }
