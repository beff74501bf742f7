"""The exceptions that mean: what was given cannot be used."""


class InputError(ValueError):
    """A user's mistake or an unusable file, told in one sentence.

    The message names the file, the tensor or key, what was expected and what was found. The
    command prints it without a traceback and exits with status 2.
    """


class CheckpointError(InputError):
    """A file of a checkpoint that is broken, incomplete, hostile or not supported."""
