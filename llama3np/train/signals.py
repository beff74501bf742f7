"""Ctrl-C and SIGTERM in a training: they stop it where nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class Stopped(BaseException):
    """A signal asked for the end; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Signals:
    """A context in which the first signal raises Stopped, but only within `pure` blocks.

    Those are the ones that change nothing, so that what they were about can be begun again:
    a gradient, an evaluation. A signal that comes at another time is raised by the next of them.
    The second signal does what it did before, at once. One that was ignored stays so: nohup and a
    script's `&` ask for it.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._pure = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for name in _NAMES:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, _: Any) -> None:
        self._restore()
        self.number = number
        if self._pure:
            self._pure = False
            raise Stopped(number)

    @contextmanager
    def pure(self) -> Iterator[None]:
        """A block that may be left at any point. Raises Stopped."""
        if self.number is not None:
            raise Stopped(self.number)
        self._pure = True
        try:
            yield
        finally:
            self._pure = False
