"""What a link complains of."""

from __future__ import annotations

from delock.errors import DelockError
from delock.links.message import Name


class LinkError(DelockError):
    """A message that should not have come: the two stages do not follow the same plan."""


def expect(got: Name, wanted: Name, source: int) -> None:
    """Raise LinkError unless the message that came is the one that the plan says."""
    if got != wanted:
        raise LinkError(f"stage {source} sent {_words(got)} where {_words(wanted)} was due: the stages do not follow the same plan")


def _words(name: Name) -> str:
    kind, batch, loss = name
    error = f"the error under loss {loss} of batch"
    what = {"h": "the activation of batch", "e": "evaluation batch", "d": error, "n": "the norms of update", "t": "the norm of update"}
    return f"{what[kind]} {batch}"
