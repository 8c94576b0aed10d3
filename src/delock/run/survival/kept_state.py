"""State that the optimizers of a checkpoint kept, by the names of weights, for the optimizers of other stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from delock.stage.learner import Learner

FEEDBACK = "ErrorFeedback", "changes"  # a class, and what of its state is as long as a stage's staleness
NEW = ("params", "param_names", "lr", "initial_lr")  # entries of a group that are the new optimizer's and its schedule's


@dataclass
class KeptState:
    """Holds it. kinds: the class whose state a weight has. groups: the group of a weight, and the options with which that was made."""

    states: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    groups: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = field(default_factory=dict)
    feedback: bool = False  # there is error feedback, whose changes are left out
    lost: bool = False  # there is state that cannot be told by names

    def add(self, learner: Mapping[str, Any], made: Mapping[str, Any] | None) -> None:
        """Adds that of a stage; `made`: what its optimizer was made with."""
        state, names = learner["optimizer"], learner["names"]
        if made is None:
            return
        if state.keys() != {"state", "param_groups"} or [len(own) for own in names] != [
            len(group["params"]) for group in state["param_groups"]
        ]:
            self.lost = True
            return
        held, feedback = dict(state["state"]), made["class"] == FEEDBACK[0]
        for own, group, options, kind in zip(names, state["param_groups"], made["groups"], made["kinds"], strict=True):
            for name, i in zip(own, group["params"], strict=True):
                if name is None:
                    continue
                self.kinds[name], self.groups[name] = kind, (group, options)
                if i in held:
                    one = held.pop(i)
                    self.states[name] = {key: value for key, value in one.items() if not (feedback and key == FEEDBACK[1])}
        self.feedback |= feedback
        self.lost |= bool(held)

    def without(self, prefix: str) -> KeptState:
        """Returns it without the weights whose names begin like that."""
        return replace(self, kinds={name: kind for name, kind in self.kinds.items() if not name.startswith(prefix)})

    def into(self, learner: Learner) -> None:
        """Hands it to a new learner, whose schedule has been advanced."""
        if learner.optimizer is None or learner.made is None:
            return
        kinds, options = learner.made["kinds"], learner.made["groups"]
        held = [[name for name in own if name and self.kinds.get(name) == kind] for own, kind in zip(learner.held(), kinds, strict=True)]
        beside = [
            _beside(group, made, *self.groups[own[0]]) if own else {}
            for own, group, made in zip(held, learner.optimizer.param_groups, options, strict=True)
        ]
        learner.adopt({name: self.states[name] for own in held for name in own if name in self.states}, beside)


def _beside(group: Mapping[str, Any], options: Mapping[str, Any], old: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of an old group that are state, as a count of steps: the new one lacks them, or the optimizer has changed them.

    options, made: those with which the new and the old group were made.
    """
    return {
        name: value
        for name, value in old.items()
        if name not in NEW and (name not in group or (name in made and value != made[name] and group[name] == options.get(name)))
    }
