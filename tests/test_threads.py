"""The pool: in whose context its threads work, and what ends them."""

import os
import signal
import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from llama3np import threads
from llama3np.threads import Pool, single_threaded_blas


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("lock", [lambda: threads._BLAS._lock, lambda: threads._STARTING])
def test_a_fork_waits_for_no_thread_that_it_does_not_have(lock):
    entered, leave = threading.Event(), threading.Event()

    def compute():
        with single_threaded_blas(), lock():
            entered.set()
            leave.wait(20)

    before = blas_threads()
    thread = threading.Thread(target=compute)
    thread.start()
    entered.wait(20)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        found = blas_threads()
        with single_threaded_blas():
            Pool(2).map(lambda i, worker: None, 4)
        os._exit(0 if found == before else 1)
    leave.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("when", ["get_num_threads", "set"])
def test_ctrl_c_on_entering_leaves_blas_as_it_was(monkeypatch, when):
    """Whether it comes before BLAS is held at one thread, or in the middle of that."""
    with single_threaded_blas():
        assert set(blas_threads()) == {1}  # and the libraries are found
    before, real = blas_threads(), threads._set_threads

    def interrupted(*args):
        if when == "set":
            real(*args)
        monkeypatch.undo()
        raise KeyboardInterrupt

    if when == "set":
        monkeypatch.setattr(threads, "_set_threads", interrupted)
    else:
        for library in threads._BLAS._libraries:
            monkeypatch.setattr(library, when, interrupted)
    with pytest.raises(KeyboardInterrupt), single_threaded_blas():
        pass
    assert blas_threads() == before
    with single_threaded_blas():
        assert set(blas_threads()) == {1}
    assert blas_threads() == before


def blas_threads():
    return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]
