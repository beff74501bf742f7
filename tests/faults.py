"""A disk that fails, or a process that dies, at the n-th thing that is asked of the system.

Counted are opening, each write, fsync, rename, truncate and removal, as training uses them.
"""

import contextlib
import errno
import os
from pathlib import Path

from llama3np.train import durable


class Killed(BaseException):
    """The process is dead: nothing that runs after this may change a file."""


class Disk:
    """Lets `until` calls pass, then fails one of them, or all from there on if it `kills`."""

    def __init__(self, until, kills=False):
        self.until, self.kills, self.calls, self.hit = until, kills, 0, None

    def ask(self, what):
        """Count a call; raise if it is the one."""
        self.calls += 1
        if self.kills and self.hit:
            raise Killed(what)
        if self.calls == self.until + 1:
            self.hit = what
            raise Killed(what) if self.kills else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class File:
    """A file whose writes are counted; one that fails has written half."""

    def __init__(self, file, disk):
        self._file, self._disk = file, disk

    def write(self, data):
        try:
            self._disk.ask("write")
        except BaseException:
            if self._disk.calls == self._disk.until + 1:
                self._file.write(bytes(data)[: len(data) // 2])
                self._file.flush()
            raise
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


@contextlib.contextmanager
def injected(until, kills=False):
    """Yield the Disk; `hit` says what failed, None if fewer calls were made."""
    disk, undo = Disk(until, kills), []

    def counted(owner, name, wrap=None):
        real = getattr(owner, name)

        def call(*args, **options):
            disk.ask(name)
            made = real(*args, **options)
            return File(made, disk) if wrap else made

        setattr(owner, name, call)
        undo.append((owner, name, real))

    for owner, name in ((os, "fsync"), (os, "replace"), (os, "truncate"), (Path, "unlink")):
        counted(owner, name)
    for name in ("open_new", "open_end"):
        counted(durable, name, wrap=True)
    try:
        yield disk
    finally:
        for owner, name, real in undo:
            setattr(owner, name, real)


def every(action, prepare, kills):
    """Run action(prepare()) with a fault at each of its calls in turn; yield what was hit."""
    until = 0
    while True:
        made = prepare()
        with injected(until, kills) as disk:
            error = None
            try:
                action(made)
            except BaseException as caught:
                error = caught
        if disk.hit is None:
            assert error is None
            return
        yield disk.hit, error, made
        until += 1
