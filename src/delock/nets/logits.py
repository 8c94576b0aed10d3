"""Takes the logits out of what a model returns, so that it can be trained and judged as one that returns them alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class OfLogits:
    """Calls a loss or a metric with the logits of the outputs: the outputs themselves, or what they call `logits`."""

    function: Callable[[Any, Any], Any]

    def __call__(self, outputs: Any, targets: Any) -> Any:
        return self.function(logits(outputs), targets)


def logits(outputs: Any) -> Any:
    """Returns the entry `logits` of a dict or of a model's output of transformers, and anything else as it is."""
    return outputs["logits"] if isinstance(outputs, Mapping) and "logits" in outputs else outputs
