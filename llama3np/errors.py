"""What people are told: the exceptions that mean, what was given cannot be used; and warnings."""

from __future__ import annotations

import logging
from functools import cache


class InputError(ValueError):
    """A user's mistake or an unusable file, told in one sentence.

    The message names the file, the tensor or key, what was expected and what was found. The
    command prints it without a traceback and exits with status 2.
    """


class CheckpointError(InputError):
    """A file of a checkpoint that is broken, incomplete, hostile or not supported."""


@cache
def warn_once(words: str) -> None:
    """Say a thing in the log of the package, at its first time in this process."""
    logging.getLogger("llama3np").warning("llama3np: %s", words)
