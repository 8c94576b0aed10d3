"""Input that `delock.fit` refuses before anything runs, and runs that fail, each with its remedy."""

from __future__ import annotations

from functools import partial
from threading import Lock
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from delock.errors import NonFinite, StageFailed, UsageError
from delock.methods import BP, DSP, GPipe
from delock.recipes import Schedule, muon, scadamw
from delock.records import Event

from points import CLASSES, broken_loss, fit, network, test_data, train_data, weighted, weights


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, CLASSES))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("workers", ["inline", "processes"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": 2, "batches": 3}, "either epochs or batches"),
        ({"epochs": None}, "either epochs or batches"),
        ({"epochs": 0}, "at least one batch"),
        ({"epochs": None, "batches": -1}, "at least one batch"),
        ({"eval_every": 0, "test": "yes"}, "eval_every is 0"),
        ({"stages": 8}, "cannot cut a network of 7 layers into 8 stages: use at most 7"),
        ({"stages": 0}, "least is 1"),
        ({"stages": 3, "cuts": [2]}, "1 cuts make 2 stages, but stages is 3"),
        ({"cuts": [4, 2]}, "out of order"),
        ({"cuts": ["nothing"]}, "no layer is called 'nothing'"),
        ({"method": "fgd"}, "no method is called 'fgd'; did you mean 'fdg'"),
        ({"method": DSP(p=(1, 1))}, "dsp"),
        ({"workers": "threads"}, "workers is 'threads'.*'processes' or 'inline'"),
        ({"device": "gpu"}, "no device 'gpu'"),
        ({"threads": 2}, r"fit has no keyword 'threads' any more: write placement=delock.Placement\(threads=...\)"),
        ({"steps": 2}, r"fit has no keyword 'steps' any more: write batches=..."),
        ({"on_event": print}, r"fit has no keyword 'on_event' any more: write callbacks=\[...\]"),
        ({"callbacks": print}, r"callbacks is <built-in function print>, but it must be a list of functions"),
        ({"callbacks": ["print"]}, r"callbacks is \['print'\], but it must be a list of functions"),
        ({"model": tied(), "cuts": [1]}, "0.weight.*2.weight.*same tensor"),
        ({"model": nn.Sequential()}, "no layer"),
        ({"model": nn.Linear(6, CLASSES)}, "network of 1 layers into 2 stages"),
        ({"train": [(torch.ones(2, 6),)] * 2}, "not a pair"),
        ({"train": []}, "at least one batch"),
        ({"cuts": "2"}, "cuts is '2', but it must be a list"),
        ({"cuts": [1.5]}, r"cuts is \[1.5\], but it must be a list"),
        ({"cuts": [True]}, r"cuts is \[True\], but it must be a list"),
        ({"loss": nn.CrossEntropyLoss}, r"loss is the class CrossEntropyLoss: give CrossEntropyLoss\(\)"),
        ({"optimizer": muon}, r"optimizer is the class muon: give muon\(...\), not muon"),
        ({"optimizer": scadamw}, r"optimizer is the class scadamw: give scadamw\(...\)"),
        ({"optimizer": partial(muon, lr=0.1)}, r"optimizer is the class muon: give muon\(...\)"),
        ({"schedule": Schedule}, r"schedule is the class Schedule: give Schedule\(...\)"),
        ({"metrics": [len]}, "metrics is .*, but it must be a dict with a function"),
        ({"metrics": {"a": "accuracy"}}, "metrics is .*, but it must be a dict with a function"),
        ({"metrics": {"loss": len}, "test": {"a": test_data()}}, "a metric is called loss"),
        ({"train": 7}, "must be an iterable"),
        ({"train": "short"}, "fails on its input"),
        ({"train": "one left"}, r"a batch of one sample would put a single sample in front of BatchNorm.*another batch size"),
        ({"train": "two left", "method": GPipe(2)}, r"a batch of 2 samples, split into 2 micro-batches, would put a single sample"),
        ({"method": BP(4)}, r"a batch of 4 samples, split into 4 micro-batches"),
    ],
    ids=lambda value: "-".join(f"{n}={v!r}"[:30] for n, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_anything_runs(options: dict[str, Any], says: str, workers: str) -> None:
    ready = {
        "yes": test_data(),
        "one left": train_data(7),
        "two left": train_data(5),
        "short": [(torch.ones(2, 5), {"label": torch.ones(2).long(), "weight": torch.ones(2)})],
    }
    options = {name: ready.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    model = options.pop("model", network())
    before = [value.clone() for value in weights(model)]
    heard: list[Event] = []
    with pytest.raises(UsageError, match=says):
        fit(model, options.pop("train", None), options.pop("test", None), **({"workers": workers, "callbacks": [heard.append]} | options))
    assert not heard
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_a_class_in_place_of_a_model_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot cut a type into stages: a model is a module"):
        fit(nn.Linear)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_a_gpu_that_is_not_there(workers: str) -> None:
    with pytest.raises(UsageError, match=r'torch sees no GPU here; use device "cpu"'):
        fit(device="cuda", workers=workers)


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_a_loss_that_explodes_is_told(workers: str) -> None:
    with pytest.raises(NonFinite, match=r"the loss of batch \d became (nan|inf) at stage 1, after \d updates?"):
        fit(optimizer=partial(torch.optim.SGD, lr=1e30), workers=workers, epochs=3)


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_a_stage_that_raises_in_a_run_is_told(workers: str) -> None:
    with pytest.raises(StageFailed, match=r"(?s)^stage 1 failed in B3 \(backward of batch 3, tick 4\): ZeroDivisionError.*in broken_loss"):
        fit(loss=broken_loss, workers=workers)


def losses(out: Tensor, target: dict[str, Tensor]) -> Tensor:
    return cross_entropy(out, target["label"], reduction="none")


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_a_loss_per_sample_is_told_what_is_missing(workers: str) -> None:
    with pytest.raises(UsageError, match=r"the loss must be one number for a batch.*returned a tensor of shape \(6,\): take its mean"):
        fit(loss=losses, workers=workers)


def test_what_cannot_go_to_a_process_is_named() -> None:
    lock = Lock()
    with pytest.raises(UsageError, match=r'process: the variable `lock` of the lambda in line \d+: .*workers="inline"'):
        fit(loss=lambda out, y: weighted(out, y) if lock else None, workers="processes")
