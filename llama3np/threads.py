"""One pool of threads for everything, and BLAS held at one thread beside it.

Two pools that take turns fight: a thread of the one spins, waiting for work, while the other's
should run. So the products of BLAS are cut into parts here, and its own pool is left out.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from threadpoolctl import ThreadpoolController

Queue = SimpleQueue[Callable[[int], Any] | None]

# ---- how many ---------------------------------------------------------------------------------


def available_cores() -> int:
    """The physical cores that this process may use.

    Two threads of one core share its arithmetic units and its path to memory, so a second one
    gains nothing. A container's share of processor time (cgroup v2) counts too.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if allowed is None:
        return os.cpu_count() or 1
    cores = {_siblings(cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota()))


def _siblings(cpu: int) -> str:
    """What identifies the core that a logical processor is on."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text().strip()
    except OSError:  # a kernel that does not tell: every processor counts as a core
        return str(cpu)


def _quota() -> int:
    """Whole processors of the control group's limit; very many if there is none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or "max"
        return 2**30


# ---- the pool ---------------------------------------------------------------------------------


_STARTING = threading.Lock()  # held by who starts the threads of a pool


class Pool:
    """Threads that help with a job: the caller works too, and waits for nobody who has not begun.

    So a job ends even if no helper gets a turn, and several threads may bring jobs at once.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self._queues: list[Queue] = []
        self._process = 0  # whose threads these are: a fork has none of them

    def __reduce__(self) -> Any:
        """A copy has as many threads, but its own."""
        return Pool, (self.threads,)

    def run(self, job: Callable[[int], Any]) -> None:
        """Call job(0) here and job(1), ..., job(threads - 1) elsewhere, as soon as they can.

        All in the caller's context, of which NumPy's treatment of overflows is a part.

        Returns when job(0) does: a job must know by itself when all of it is done, and a helper
        that comes too late must find nothing left to do. Jobs must not raise: of what one raises
        elsewhere the caller does not hear, threading.excepthook is told of it.
        """
        for queue in self._helpers():
            queue.put(_in_this_context(job))
        job(0)

    def map(self, task: Callable[[int, int], Any], count: int) -> None:
        """Call task(i, worker) for every i in range(count), each on the next free thread.

        No two calls at a time have the same worker, 0 <= worker < threads, of this map. Returns
        when all are done; raises the first error of a task.
        """
        if count <= 1 or self.threads == 1:
            for i in range(count):
                task(i, 0)
            return
        _Map(task, count).run(self)

    def _helpers(self) -> list[Queue]:
        if self._process != os.getpid():
            with _STARTING:
                if self._process != os.getpid():
                    self._start()
        return self._queues

    def _start(self) -> None:
        queues: list[Queue] = [SimpleQueue() for _ in range(1, self.threads)]
        for worker, queue in enumerate(queues, 1):
            name = f"llama3np-{worker}"
            threading.Thread(target=_serve, args=(queue, worker), name=name, daemon=True).start()
        weakref.finalize(self, _dismiss, queues)
        self._queues, self._process = queues, os.getpid()


def _in_this_context(job: Callable[[int], Any]) -> Callable[[int], Any]:
    context = copy_context()
    return lambda worker: context.run(job, worker)


def _serve(queue: Queue, worker: int) -> None:
    while (job := queue.get()) is not None:
        try:
            job(worker)
        except BaseException:  # reported as an unhandled one, which would end the thread
            told = (*sys.exc_info(), threading.current_thread())
            threading.excepthook(threading.ExceptHookArgs(told))
        del job  # what it holds on to need not live until the next one comes


def _dismiss(queues: list[Queue]) -> None:
    for queue in queues:
        queue.put(None)


class _Map:
    """The tasks of one map: who takes which, how many are left, what went wrong."""

    def __init__(self, task: Callable[[int, int], Any], count: int):
        self.task, self.count = task, count
        self.next = itertools.count()  # its next() is one step, so no two threads get the same
        self.finished = itertools.count(1)
        self.all_done = threading.Event()
        self.error: BaseException | None = None
        self.working: set[int] = set()  # workers that have begun, and not ended

    def run(self, pool: Pool) -> None:
        try:
            pool.run(self.work)
            self.all_done.wait()
        except BaseException as error:  # Ctrl-C: helpers may be at work in the caller's memory
            self.error = error  # so none begins another task, and the last one is waited for
            while self.working:
                time.sleep(0.001)
        if self.error is not None:
            raise self.error

    def work(self, worker: int) -> None:
        self.working.add(worker)
        try:
            while (i := next(self.next)) < self.count:
                self.do(i, worker)
        finally:
            self.working.discard(worker)

    def do(self, i: int, worker: int) -> None:
        try:
            if self.error is None:
                self.task(i, worker)
        except BaseException as error:  # the caller raises it
            self.error = error
        if next(self.finished) == self.count:
            self.all_done.set()


# ---- BLAS -------------------------------------------------------------------------------------


class _Blas:
    """BLAS at one thread while anyone needs it so; as it was when the last one has left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.users: set[object] = set()  # so that who was stopped on entering leaves nothing
        self._libraries: list[Any] | None = None
        self._before: list[int] = []

    @contextmanager
    def single(self) -> Iterator[None]:
        user = object()
        try:  # around the entry as well: Ctrl-C may come in the middle of it
            self._enter(user)
            yield
        finally:
            self._leave(user)

    def _enter(self, user: object) -> None:
        with self._lock:
            if not self.users:
                self._before = [library.get_num_threads() for library in self._found()]
            self.users.add(user)
            if len(self.users) == 1:
                for library in self._found():
                    _set_threads(library, 1)

    def _found(self) -> list[Any]:
        """All BLAS libraries that are loaded, searched for once: that takes milliseconds."""
        if self._libraries is None:
            self._libraries = ThreadpoolController().select(user_api="blas").lib_controllers
        return self._libraries

    def _leave(self, user: object) -> None:
        with self._lock:
            if user in self.users:
                self.users.remove(user)
                if not self.users:
                    self.restore()

    def restore(self) -> None:
        """Give BLAS the threads that it had, if that was noted yet."""
        for library, threads in zip(self._libraries or [], self._before, strict=False):
            _set_threads(library, threads)


def _set_threads(library: Any, threads: int) -> None:
    """Set a BLAS library's threads, whichever thread asks.

    From 3.8 on threadpoolctl's own method obeys the first thread that ever called it and ignores
    the others without a word; here the lock and the count of users keep the order.
    """
    getattr(library, "_real_set_num_threads", library.set_num_threads)(threads)


_BLAS = _Blas()


def _after_fork() -> None:
    """In a child there is the one thread that forked: nobody holds a lock, or needs BLAS single."""
    global _BLAS, _STARTING
    held, _BLAS, _STARTING = _BLAS, _Blas(), threading.Lock()
    if held.users:
        held.restore()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def single_threaded_blas() -> Any:
    """A context in which BLAS uses the calling thread alone, whoever calls it."""
    return _BLAS.single()
