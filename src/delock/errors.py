"""The errors that Delock raises on purpose."""


class DelockError(Exception):
    """Base of every error below."""


class UsageError(DelockError, ValueError):
    """Bad input: says what was wrong in the user's words, and the remedy. The command line prints it as one line and exits with 2."""


class StageFailed(DelockError):
    """A stage raised, died or hung during a run. The message names the stage, the op and the batch, and shows the original traceback."""


class NonFinite(UsageError):
    """A loss became infinite or NaN; says at which batch and stage."""


class PlanError(DelockError):
    """A plan that cannot be executed: the message shows its chart, and what waits for what."""


class LinkError(DelockError):
    """A message that should not have come: the two stages do not follow the same plan."""
