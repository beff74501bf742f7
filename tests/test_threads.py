"""The pool: in whose context its threads work."""

import threading

import numpy as np
import pytest

from llama3np.threads import Pool


def each_once(pool, work):
    """Call work() on every thread of the pool, of which none is done before all have begun."""
    begun = threading.Barrier(pool.threads)

    def task(i, worker):
        begun.wait(20)
        work()

    pool.map(task, pool.threads)


@pytest.mark.filterwarnings("error")
def test_all_threads_treat_overflows_as_the_caller_does():
    def overflow():
        return np.full(2, np.finfo(np.float32).max) * np.float32(2)

    pool = Pool(3)
    with np.errstate(over="ignore"):
        each_once(pool, overflow)
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        each_once(pool, overflow)
    with pytest.raises(RuntimeWarning, match="overflow"):
        each_once(pool, overflow)
