"""What is told of a training on stderr: a live line on a terminal, a line now and then else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

EVERY_S = 10.0  # between lines into a pipe


@contextmanager
def unheard() -> Iterator[None]:
    """A block that tells on stderr, or tells nobody any more once the reader there has left."""
    try:
        yield
    except OSError:
        # What did not get out is tried again when Python ends, which would be its status then.
        with suppress(OSError, ValueError):  # ValueError: no file of the system
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def tell(text: str) -> None:
    """Print lines on stderr."""
    with unheard():
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Tells of steps, validations and samples; a context."""

    def __init__(self, start: int, steps: int):
        """start: steps done before; steps: of the whole training."""
        self.start, self.step, self.steps = start, start, steps
        self.val_loss: float | None = None
        self._began = self._told = 0.0
        self._said: set[str] = set()
        self._bar = _bar(start, steps) if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            with unheard():
                self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            with unheard():
                self._bar.stop()

    def stepped(self, step: int, loss: float, tokens_per_s: float, seconds: float) -> None:
        """Tell of a step that is done, and took so long."""
        now = time.perf_counter()
        if self.step == self.start:  # what came before it does not come again
            self._began = now - seconds
        self.step = step
        val = "" if self.val_loss is None else f", val loss {self.val_loss:.4f}"
        facts = f"loss {loss:.4f}{val}, {tokens_per_s:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._bar.tasks[0].id, completed=step, facts=facts)
            with unheard():
                self._bar.refresh()
        elif now - self._told >= EVERY_S or step == self.steps:
            self._told = now
            left = timedelta(seconds=round(self._left(now)))
            self.say(f"step {step} of {self.steps}: {facts}, {left} left")

    def _left(self, now: float) -> float:
        """Seconds to go, validations and all, at the speed so far."""
        done = max(1, self.step - self.start)
        return (now - self._began) / done * (self.steps - self.step)

    def validated(self, step: int, val_loss: float, lowest: bool) -> None:
        """Tell of a validation."""
        self.val_loss = val_loss
        self.say(f"step {step}: val loss {val_loss:.4f}" + (", the lowest" if lowest else ""))

    def say_once(self, text: str) -> None:
        """Print what was not said before."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def say(self, text: str) -> None:
        """Print lines, above the live line if there is one."""
        if self._bar is None:
            tell(text)
        else:
            with unheard():
                self._bar.console.print(text, markup=False, highlight=False, emoji=False)


def _bar(start: int, steps: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("training"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
        TimeRemainingColumn(),
    )
    bar = Bar(*columns, console=Console(stderr=True), auto_refresh=False)
    bar.add_task("", total=steps, completed=start, facts="")
    return bar
