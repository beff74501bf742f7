"""The software device itself: that it counts, and that it sees each mistake it is there to see."""

import numpy as np
import pytest

pytestmark = pytest.mark.cuda


def test_launches_copies_and_allocations_are_counted(softcuda):
    import cupy as cp

    host = np.arange(1000, dtype=np.float32)
    cp.asarray(host)  # the pool has a block now
    cp.get_default_memory_pool().free_all_blocks()
    softcuda.reset()
    x = cp.asarray(host)
    y = x * 2 + x
    z = cp.empty_like(y)
    z.data.copy_from_device(y.data, y.nbytes)
    z.get()
    found = softcuda.stats()
    assert (found["launches"], found["h2d"], found["d2h"], found["d2d"]) == (2, 1, 1, 1)
    assert (found["h2d_bytes"], found["d2h_bytes"], found["d2d_bytes"]) == (4000, 4000, 4000)
    assert found["kernels"] == {
        "cupy_multiply__float32_float_float32": 1,
        "cupy_add__float32_float32_float32": 1,
    }
    assert found["mallocs"] == 3  # x, 2 x, y; z gets the memory of 2 x from the pool


def test_xp_runs_on_both(xp):
    x = xp.arange(6, dtype=np.float32).reshape(2, 3)
    assert float((x @ x.T).sum()) == 83
