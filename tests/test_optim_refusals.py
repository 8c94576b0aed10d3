"""Numbers that optimizers, factories and schedules do not take, and weights: each is refused when it is given, with one clear error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from delock.errors import UsageError
from delock.optim import SCSGD, ErrorFeedback, SCAdamW, Several
from delock.recipes import SGD, Adam, AdamW, NAdamW, PipeMare, Schedule, error_feedback, muon, scadamw, scsgd, soap

NAN = float("nan")


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"tau": -1}, "tau of an optimizer is a number from 0 on, not -1"),
    ({"tau": NAN}, "tau .* not nan"),
    ({"tau": "a"}, "tau .* not 'a'"),
    ({"tau": None}, "tau .* not None"),
    ({"r": -2}, "r of an optimizer"),
    ({"r": True}, "r of an optimizer .* not True"),
    ({"lr": -0.1}, "lr of an optimizer"),
    ({"lr": torch.tensor(NAN)}, "lr of an optimizer .* not nan"),
    ({"lr": torch.ones(2)}, "lr of an optimizer .* not tensor"),
    ({"weight_decay": "b"}, "weight_decay .* not 'b'"),
    ({"betas": (0.9, 1.0)}, r"lies in \[0, 1\), not at 1.0"),
    ({"betas": (2, 2)}, r"lies in \[0, 1\), not at 2"),
    ({"betas": (0.9, None)}, r"lies in \[0, 1\), not at None"),
    ({"betas": 0.9}, r"betas of an optimizer are two numbers in \[0, 1\), as \(0.9, 0.99\), not 0.9"),
    ({"betas": (0.9,)}, r"betas of an optimizer are two numbers.*not \(0.9,\)"),
    ({"betas": (0.9, 0.9, 0.9)}, "betas of an optimizer are two numbers"),
    ({"momentum": 1.5}, r"lies in \[0, 1\), not at 1.5"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=str)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    """For all weights, for a group, and for one that is added, which is not left behind."""
    kind, usual = (SCSGD, {"lr": 0.1, "tau": 1}) if "momentum" in options else (SCAdamW, {"tau": 1})
    optimizer = kind(weights(), **usual)  # type: ignore[arg-type]
    for wrong in (
        lambda: kind(weights(), **{**usual, **options}),
        lambda: kind([{"params": weights()}, {"params": weights(), **options}], **usual),
        lambda: optimizer.add_param_group({"params": weights(), **options}),
    ):
        with pytest.raises(UsageError, match=message):
            wrong()
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": weights()})
    assert len(optimizer.param_groups) == 2


def test_complex_weights_are_refused() -> None:
    odd = nn.Parameter(torch.ones(3, dtype=torch.cfloat))
    optimizer = SCAdamW(weights(), tau=1)
    for wrong in (lambda: SCAdamW([odd], tau=1), lambda: optimizer.add_param_group({"params": odd})):
        with pytest.raises(UsageError, match=r"SCAdamW takes real weights, and one of shape \(3,\) is complex: use torch.optim.AdamW"):
            wrong()
    assert len(optimizer.param_groups) == 1


FACTORIES: list[tuple[Callable[[], Any], str]] = [
    (partial(scadamw, r=-1), "r of an optimizer"),
    (partial(scadamw, betas=(0.9,)), "betas of an optimizer"),
    (partial(scsgd, 0.1, momentum=1.0), "a momentum or beta"),
    (partial(scsgd, 0.1, r=NAN), "r of an optimizer"),
    (partial(muon, momentum=2), r"a momentum or beta of an optimizer lies in \[0, 1\), not at 2"),
    (partial(muon, rest=-1), "rest of an optimizer"),
    (partial(soap, betas=0.9), "betas of an optimizer"),
    (partial(SGD, -1.0), "lr of an optimizer"),
    (partial(SGD, 0.1, 1.5), "a momentum or beta"),
    (partial(Adam, NAN), "lr of an optimizer"),
    (partial(AdamW, 0.1, -1), "weight_decay of an optimizer"),
    (partial(NAdamW, 0.1, betas=(0.9, "a")), "a momentum or beta"),
    (partial(PipeMare, -1), "annealing of PipeMare is a number of updates, at least 1, not -1"),
    (partial(PipeMare, 0), "annealing of PipeMare .* not 0"),
    (partial(PipeMare, None), "annealing of PipeMare .* not None"),
    (partial(PipeMare, 3, None), r"schedule of PipeMare is a Schedule, as Schedule\("),
    (partial(muon, adjust_lr_fn="foo"), "adjust_lr_fn of muon is original or match_rms_adamw, not 'foo'"),
    (partial(muon, matrices=3), r"matrices of muon is a function of \(name, weight\), not 3"),
    (partial(soap, precondition_frequency=0), "precondition_frequency of soap is a number of updates, at least 1, not 0"),
    (partial(soap, precondition_frequency=1.5), "precondition_frequency of soap .* not 1.5"),
    (partial(Schedule, "cosin", 10), "the shape of a Schedule is constant, cosine or steps, not 'cosin'"),
    (partial(Schedule, "cosine", -1), "updates of a Schedule is a number from 0 on, not -1"),
    (partial(Schedule, "cosine", 10, warmup=-2), "warmup of a Schedule"),
    (partial(Schedule, "cosine", 10, floor=-0.1), "floor of a Schedule is a number from 0 on"),
    (partial(Schedule, "cosine", 10, floor=1.5), r"floor of a Schedule is a share of the rate in \[0, 1\], not 1.5"),
    (partial(Schedule, "cosine", 10, floor=NAN), "floor of a Schedule"),
    (partial(Schedule, "constant", 10, floor=0.1), "a Schedule of the shape constant takes no floor, unlike cosine"),
    (partial(Schedule, "cosine", 10, milestones=(5,)), "a Schedule of the shape cosine takes no milestones, unlike steps"),
    (partial(Schedule, "steps", 10, milestones=5), "milestones of a Schedule are numbers of updates"),
    (partial(Schedule, "steps", 10, milestones=(5, -1)), "a milestone of a Schedule"),
    (partial(Schedule, "steps", 10, milestones=(5,), gamma=-1), "gamma of a Schedule"),
]


@pytest.mark.parametrize(("make", "message"), FACTORIES, ids=str)
def test_factories_check_when_they_are_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (muon, r"base of error_feedback is the class muon: give muon\(...\), not muon"),
        (torch.optim.SGD(weights(), lr=0.1), "base of error_feedback is a factory, as .*, and not an object of SGD"),
        (0.1, "base of error_feedback is a factory, as .*, and not an object of float"),
    ],
    ids=["class", "optimizer", "number"],
)
def test_error_feedback_around_no_factory(base: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        error_feedback(base)
    assert error_feedback(torch.optim.Adam).base is torch.optim.Adam


@pytest.mark.parametrize("factory", [AdamW(0.1), NAdamW(0.1), scadamw(), muon(), soap()], ids=lambda one: type(one).__name__)
def test_weights_without_names(factory: Callable[..., Any]) -> None:
    for given in (weights(), [{"params": weights()}]):
        with pytest.raises(UsageError, match=r"treats weights by their names: give its factory model.named_parameters\(\)"):
            factory(given)


def test_muon_is_given_a_vector() -> None:
    with pytest.raises(UsageError, match=r"Muon takes weights of two dimensions, and matrices of muon gives it 0.bias: leave that one out"):
        muon(matrices=lambda name, weight: True)([("0.weight", nn.Parameter(torch.ones(2, 2))), ("0.bias", nn.Parameter(torch.ones(2)))])


INNER: list[tuple[Any, str]] = [
    ([AdamW(0.1)], r"goes around optimizers that are made, as AdamW\(model.parameters\(\)\), not around \[AdamW\("),
    ([torch.optim.SGD], "goes around optimizers that are made"),
    ([torch.optim.LBFGS(weights())], "LBFGS computes the loss several times within one step, which .* cannot: use another optimizer"),
]


@pytest.mark.parametrize(("inner", "message"), INNER, ids=["factory", "class", "lbfgs"])
def test_what_an_optimizer_cannot_go_around(inner: list[Any], message: str) -> None:
    for make in (lambda: Several(inner), lambda: ErrorFeedback(*inner, tau=1)):
        with pytest.raises(UsageError, match=message):
            make()
    for other in ([], torch.optim.SGD(weights(), 0.1)):
        with pytest.raises(UsageError, match="Several goes around optimizers that are made"):
            Several(other)  # type: ignore[arg-type]


def test_groups_that_change_inside_another_optimizer() -> None:
    """A rate that is set outside would not reach them."""
    changes: tuple[Callable[[Optimizer], Any], ...] = (
        lambda base: base.add_param_group({"params": weights()}),
        lambda base: base.load_state_dict(base.state_dict()),
    )
    for change in changes:
        base = torch.optim.SGD(weights(), lr=0.1)
        outer = ErrorFeedback(base, tau=1)
        change(base)
        outer.param_groups[0]["params"][0].grad = torch.ones(2)
        with pytest.raises(UsageError, match="was given other groups, which the outer one does not see: load states into the outer one"):
            outer.step()
    base = torch.optim.SGD(weights(), lr=0.1)
    outer = ErrorFeedback(base, tau=1)
    base.add_param_group({"params": weights()})
    with pytest.raises(UsageError, match="was given other groups"):
        outer.load_state_dict(outer.state_dict())


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_options_of_torch_that_are_not_there(option: str) -> None:
    for make in (SCAdamW, partial(SCSGD, lr=0.1)):
        with pytest.raises(UsageError, match=f"has no {option}: leave it out"):
            make([{"params": weights(), option: True}], tau=1)
    with pytest.raises(UsageError, match=f"SCAdamW has no {option}"):
        SCAdamW(weights(), tau=1).load_state_dict(torch.optim.AdamW(weights(), **{option: True}).state_dict())


def test_milestones_may_stand_in_any_order() -> None:
    there, back = (Schedule("steps", 10, milestones=at, gamma=0.5) for at in ((2, 5), (5, 2)))
    assert [back.factor(n) for n in range(8)] == [there.factor(n) for n in range(8)] == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("c", [NAN, float("inf"), -1, "a", None])
def test_error_feedback_with_a_wrong_factor(c: Any) -> None:
    def around() -> Optimizer:
        return ErrorFeedback(torch.optim.SGD(weights(), lr=0.1), tau=1, c=c)

    for make in (around, partial(error_feedback, SGD(0.1), c)):
        with pytest.raises(UsageError, match=f"c of error feedback is a number from 0 on, not {c!r}"):
            make()


@pytest.mark.parametrize("tau", [0, -1, NAN, float("inf"), "a", None])
def test_error_feedback_with_a_wrong_staleness(tau: Any) -> None:
    with pytest.raises(UsageError, match=f"corrects a staleness above 0, not one of {tau!r}: use the optimizer without it"):
        ErrorFeedback(torch.optim.SGD(weights(), lr=0.1), tau=tau)
