"""Stand-in for cupy_backends.cuda.libs.curand, which is compiled CUDA: NumPy's generators.

The numbers are not cuRAND's, on purpose: a test that needs cuRAND's very numbers is wrong.
"""

import types
from typing import Any

import numpy as np

from softcuda.memory import call, view

module: Any = types.ModuleType("cupy_backends.cuda.libs.curand")
module.__dict__.update(
    CURAND_RNG_PSEUDO_DEFAULT=100,
    CURAND_RNG_PSEUDO_XORWOW=101,
    CURAND_RNG_PSEUDO_MRG32K3A=121,
    CURAND_RNG_PSEUDO_MTGP32=141,
    CURAND_RNG_PSEUDO_MT19937=142,
    CURAND_RNG_PSEUDO_PHILOX4_32_10=161,
    CURAND_RNG_QUASI_DEFAULT=200,
    CURAND_ORDERING_PSEUDO_BEST=100,
)
_generators: dict[int, np.random.Generator] = {}


def create_generator(kind):
    """A handle of a new generator."""
    handle = len(_generators) + 1
    _generators[handle] = np.random.default_rng(0)
    return handle


def seed_generator(handle, seed):
    """Start the generator anew."""
    _generators[handle] = np.random.default_rng(seed)


def generator_of(dtype, draw):
    """A curandGenerate... function: fills n elements with draw(generator, n, *parameters)."""

    def generate(handle, address, n, *parameters):
        def run():
            view(address, n, dtype)[...] = draw(_generators[handle], n, *parameters)

        call("curand", run)

    return generate


def _nothing(*args):
    """Settings that mean nothing to NumPy's generators."""


module.createGenerator = create_generator
module.destroyGenerator = lambda handle: _generators.pop(handle, None)
module.setPseudoRandomGeneratorSeed = seed_generator
module.setGeneratorOffset = module.setGeneratorOrdering = module.setStream = _nothing
module.getVersion = lambda: 10400
module.generate = generator_of(np.uint32, lambda r, n: r.integers(0, 1 << 32, n, dtype=np.uint32))
module.generateUniform = generator_of(np.float32, lambda r, n: 1 - r.random(n, np.float32))
module.generateUniformDouble = generator_of(np.float64, lambda r, n: 1 - r.random(n))
module.generateNormal = generator_of(np.float32, lambda r, n, mean, std: r.normal(mean, std, n))
module.generateNormalDouble = generator_of(
    np.float64, lambda r, n, mean, std: r.normal(mean, std, n)
)
