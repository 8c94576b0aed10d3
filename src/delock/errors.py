"""The errors that Delock raises on purpose."""


class DelockError(Exception):
    """Base of every error below."""


class UsageError(DelockError, ValueError):
    """Bad input: says what was wrong in the user's words, and the remedy. The command line prints it as one line and exits with 2."""


class StageFailed(DelockError):
    """A stage raised, died or hung during a run. The message names the stage, the op and the batch, and shows the original traceback."""
