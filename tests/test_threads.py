"""The pool: in whose context its threads work, and what ends them."""

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


def test_a_job_that_raises_is_told_of_and_ends_no_thread(monkeypatch):
    pool, told, tried = Pool(3), [], threading.Semaphore(0)
    monkeypatch.setattr(threading, "excepthook", told.append)

    def job(worker):
        if worker:
            try:
                raise RuntimeError(f"worker {worker}")
            finally:
                tried.release()

    pool.run(job)
    assert tried.acquire(timeout=20)
    assert tried.acquire(timeout=20)
    each_once(pool, lambda: None)  # by all threads, so both have told
    assert sorted(str(args.exc_value) for args in told) == ["worker 1", "worker 2"]
    assert {args.thread.name for args in told} == {"llama3np-1", "llama3np-2"}
