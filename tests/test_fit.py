"""`delock.fit` as a user meets it: own network, own data, own loss, any method, one process or many, and what it leaves alone."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import delock
from delock.data.iterable import as_loader
from delock.errors import NonFinite, StageFailed, UsageError
from delock.keys import key
from delock.methods import ADL, BP, DDG, DSP, FDG, FR, GPipe, OneFOneB
from delock.records import EvaluationRecord, Event, Result, Started, StepRecord

from programs import torchrun

CLASSES = 3


class Points(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """n points of three kinds, each read with noise drawn afresh from all three generators, as transforms do; every fifth has no label."""

    def __init__(self, n: int = 22) -> None:
        g = torch.Generator().manual_seed(0)
        self.label = torch.randint(CLASSES, (n,), generator=g)
        self.x = torch.randn(n, 6, generator=g) + self.label[:, None]
        self.weight = torch.rand(n, generator=g) + 0.5

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.x[i] + 0.1 * torch.randn(6) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        label = self.label[i] if i % 5 else torch.tensor(-100)
        return x, {"label": label, "weight": self.weight[i]}


def train_data(batch_size: int = 6, n: int = 22) -> DataLoader[Any]:
    return DataLoader(Points(n), batch_size=batch_size, shuffle=True)


def test_data() -> DataLoader[Any]:
    return DataLoader(Points(10), batch_size=4)


test_data.__test__ = False


def network(dropout: float = 0.2) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(dropout)
        return nn.Sequential(*first, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def weighted(out: Tensor, target: dict[str, Tensor]) -> Tensor:
    """Cross-entropy with a weight per sample; samples without a label are ignored."""
    losses = cross_entropy(out, target["label"], reduction="none", ignore_index=-100)
    return (losses * target["weight"]).mean()


def hits(out: Tensor, target: dict[str, Tensor]) -> Tensor:
    return (out.argmax(1) == target["label"]).float().mean()


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)


def fit(model: Any = None, train: Any = None, test: Any = None, **options: Any) -> tuple[Any, Result]:
    """The model and the result of a short run, inline and in two stages unless it says otherwise."""
    if model is None:
        model = network()
        options = options if "stages" in options or "cuts" in options else {"cuts": [4], **options}  # a measured cut may vary
    options = {"loss": weighted, "method": "fdg", "optimizer": SGD, "epochs": 2, "workers": "inline", "pin": False} | options
    if options["epochs"] is None:
        del options["epochs"]
    result = delock.fit(model, train_data() if train is None else train, test, **options)
    assert result is not None
    return model, result


def weights(model: nn.Module | Sequence[nn.Module]) -> list[Tensor]:
    parts = model if isinstance(model, list) else [model]
    return [value for part in parts for value in part.state_dict().values()]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


# -- the same everywhere -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "K"), [(BP(), 3), (BP(accumulate=2), 2), (ADL(2), 2), (DSP(), 3)], ids=str)
def test_processes_give_what_one_process_gives(method: Any, K: int) -> None:
    """Weights in the model, losses, evaluations, staleness; the data are shuffled and noisy."""
    options = {"method": method, "stages": K, "metrics": {"hits": hits}, "cuts": [2, 4][: K - 1], "seed": 5}
    here, a = fit(test=test_data(), **options)
    there, b = fit(test=test_data(), workers="processes", **options)
    assert same(here, there)
    assert not same(here, network())
    assert a.losses == b.losses
    assert [(e.step, e.test_loss, e.metrics) for e in a.evaluations] == [(e.step, e.test_loss, e.metrics) for e in b.evaluations]
    for s, t in zip(a.stages, b.stages, strict=True):
        assert (s.parameters, s.updates, s.staleness, s.layer_staleness) == (t.parameters, t.updates, t.staleness, t.layer_staleness)


@pytest.mark.parametrize("method", ["bp", "gpipe", "ddg", "fr", "fdg", "adl", "dsp"])
def test_the_data_do_not_depend_on_the_method_or_the_stages(method: str) -> None:
    """What the network is fed, batch by batch: order, augmentation and labels."""
    fed: list[list[Tensor]] = []
    for K in (1, 2, 4):
        seen: list[Tensor] = []

        class Watch(nn.Linear):
            def forward(self, x: Tensor, seen: list[Tensor] = seen) -> Tensor:
                if self.training and torch.is_grad_enabled() and not any(torch.equal(x, y) for y in seen):
                    seen.append(x.detach().clone())
                return super().forward(x)

        model = nn.Sequential(Watch(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, CLASSES))
        fit(model, stages=K, cuts=[1, 2, 3][: K - 1], method=method, seed=3)
        fed.append(torch.cat(seen)[:22] if method == "gpipe" else torch.cat(seen[-7:]))
    assert torch.equal(fed[0], fed[1])
    assert torch.equal(fed[0], fed[2])


def by_hand(model: nn.Module, data: DataLoader[Any], epochs: int, seed: int, schedule: Any = None) -> list[float]:
    """Plain PyTorch, seeded with the keys that the common ground names: order and noise by (seed, epoch, batch), dropout by batch."""
    optimizer = SGD(model.parameters())
    rates = schedule(optimizer) if schedule else None
    losses: list[float] = []
    model.train()
    with torch.random.fork_rng(devices=[]):
        for e in range(epochs):
            for x, y in as_loader(data, seed).epoch(e):
                torch.manual_seed(key(seed, 0, len(losses)))
                loss = weighted(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if rates:
                    rates.step()
                losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", [BP(), DDG(), FR(), FDG(), FDG(at="mixed", order="backward-first"), ADL(1), DSP()], ids=str)
def test_one_stage_is_plain_training_bit_for_bit(method: Any) -> None:
    schedule = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=12)
    plain = network()
    losses = by_hand(plain, train_data(), 3, 11, schedule)
    model, result = fit(stages=1, method=method, epochs=3, seed=11, schedule=schedule)
    assert same(model, plain)
    assert result.losses == losses


def test_bp_accumulates() -> None:
    """Micro-batches of a batch make its one step: close to the whole batch, and the same however the work is ordered."""
    made = [fit(network(0), method=m, loss=mean_loss, train=train_data(8), stages=2, cuts=[4]) for m in (BP(2), GPipe(2), OneFOneB(2))]
    assert same(made[0][0], made[1][0])
    assert same(made[0][0], made[2][0])
    assert made[0][1].losses == made[1][1].losses == made[2][1].losses
    assert [s.updates for s in made[0][1].stages] == [6, 6]
    without_statistics = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)]
    whole, parts = (nn.Sequential(*(seeded_copy(m) for m in without_statistics)).double() for _ in range(2))
    data = [(x.double(), y) for x, y in as_loader(train_data(8)).epoch(0)]
    fit(whole, data, loss=mean_loss, method=BP())
    fit(parts, data, loss=mean_loss, method=BP(3))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(weights(whole), weights(parts), strict=True))
    assert not same(whole, parts), "was it split at all?"


def seeded_copy(module: nn.Module) -> nn.Module:
    made = type(module)(module.in_features, module.out_features) if isinstance(module, nn.Linear) else nn.Tanh()
    made.load_state_dict(module.state_dict())
    return made


def mean_loss(out: Tensor, target: dict[str, Tensor]) -> Tensor:
    return (cross_entropy(out, target["label"].clamp(0), reduction="none") * target["weight"]).mean()


# -- one's own ---------------------------------------------------------------------------------------------------------------------


def test_a_list_of_stages_is_a_stage_each() -> None:
    parts = [nn.Sequential(*part) for part in (list(network())[:2], list(network())[2:4], list(network())[4:])]
    before = [value.clone() for value in weights(parts)]
    _, result = fit(parts)
    assert len(result.stages) == 3
    whole, _ = fit(cuts=[2, 4])
    assert all(torch.equal(a, b) for a, b in zip(weights(parts), weights(whole), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(parts), before, strict=True))


class Tokens:
    """An own Loader of integer inputs with a seed of its own; sequences grow fourfold, messages so from 2 to 100 kilobytes."""

    def __len__(self) -> int:
        return 4

    def sizes(self) -> None:
        return None

    def epoch(self, e: int) -> Iterator[tuple[Any, Any]]:
        g = torch.Generator().manual_seed(e)
        for b in range(4):
            tokens = torch.randint(7, (3, 2 * 4**b), generator=g)
            yield (tokens, tokens > 3), [tokens.roll(1), None]


class Look(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 64)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        tokens, mask = inputs
        return self.table(tokens), mask


class Read(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(64, 7)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        h, mask = inputs
        logits: Tensor = self.out(h * mask[..., None])
        return logits


def token_loss(out: Tensor, targets: list[Any]) -> Tensor:
    return cross_entropy(out.flatten(0, 1), targets[0].flatten(), ignore_index=0)


def tokens_model() -> list[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [Look(), Read()]


def test_own_loader_tuples_integers_and_lengths_that_change() -> None:
    here, a = fit(tokens_model(), Tokens(), Tokens(), loss=token_loss, method=FDG(beta=0.5), epochs=3)
    there, b = fit(tokens_model(), Tokens(), Tokens(), loss=token_loss, method=FDG(beta=0.5), epochs=3, workers="processes")
    assert same(here, there)
    assert a.losses == b.losses
    assert [e.test_loss for e in a.evaluations] == [e.test_loss for e in b.evaluations]


def no_decay(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Biases and batch norm apart, by their names in the whole network; layer 6 has a rate of its own."""
    groups = [{"params": [p for n, p in named if n.endswith("bias") or n.startswith("1.")], "weight_decay": 0.0}]
    groups += [{"params": [p for n, p in named if n == "6.weight"], "lr": 0.01}]
    groups += [{"params": [p for n, p in named if not n.endswith("bias") and not n.startswith("1.") and n != "6.weight"]}]
    return torch.optim.SGD([g for g in groups if g["params"]], lr=0.1, weight_decay=0.5)


@pytest.mark.parametrize("cuts", [[], [2], [1, 4, 5]], ids=str)
def test_parameter_groups_by_the_names_of_the_whole_network(cuts: list[int]) -> None:
    """BP over stages with groups equals plain PyTorch with the same groups."""
    plain = network(0.0)
    optimizer = no_decay(list(plain.named_parameters()))
    for e in range(2):
        for x, y in as_loader(train_data(), 0).epoch(e):
            optimizer.zero_grad()
            weighted(plain(x), y).backward()
            optimizer.step()
    model, _ = fit(network(0.0), optimizer=no_decay, method="bp", cuts=cuts)
    assert same(model, plain)


def test_a_network_may_be_frozen_in_part() -> None:
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, cuts=[1])
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[4].weight, network()[4].weight)


# -- how long, and what is told ----------------------------------------------------------------------------------------------------


def test_events_come_in_order_and_are_the_result() -> None:
    heard: list[Event] = []
    _, result = fit(test=test_data(), on_event=heard.append, log_every=3, metrics={"hits": hits, "one": one})
    first, *rest = heard
    assert isinstance(first, Started)
    assert first == result.started
    assert (first.method.lower()[:3], first.workers, first.batches, first.epochs, len(first.stages)) == ("fdg", "inline", 8, 2.0, 2)
    steps = [event for event in rest if isinstance(event, StepRecord)]
    assert [(e.step, e.epoch, e.loss) for e in steps] == [(n, n / 4, result.losses[n - 1]) for n in (3, 6, 8)]
    assert [e.samples for e in steps] == [18, 34, 44]
    evaluations = [event for event in rest if isinstance(event, EvaluationRecord)]
    assert evaluations == result.evaluations
    assert [(e.step, e.epoch, e.samples) for e in evaluations] == [(4, 1.0, 22), (8, 2.0, 44)]
    assert [e.train_loss for e in evaluations] == [pytest.approx(sum(result.losses[a : a + 4]) / 4) for a in (0, 4)]
    assert all(e.metrics["one"] == 1.0 and 0 <= e.metrics["hits"] <= 1 for e in evaluations)
    assert [type(event).__name__ for event in rest] == ["StepRecord", "EvaluationRecord", "StepRecord", "StepRecord", "EvaluationRecord"]
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(rest))
    assert (result.samples, len(result.losses)) == (44, 8)
    assert result.samples_per_second == pytest.approx(44 / result.seconds)


def one(out: Tensor, target: Any) -> int:
    return 1


def test_an_evaluation_is_the_mean_over_the_samples_in_eval_mode() -> None:
    model, result = fit(test=test_data(), metrics={"hits": hits})
    model.eval()
    batches = list(as_loader(test_data(), 0).epoch(0))
    with torch.no_grad():
        outputs = [(model(x), y, len(x)) for x, y in batches]
    assert result.evaluations[-1].test_loss == pytest.approx(sum(weighted(o, y).item() * n for o, y, n in outputs) / 10)
    assert result.evaluations[-1].metrics["hits"] == pytest.approx(sum(hits(o, y).item() * n for o, y, n in outputs) / 10)


@pytest.mark.parametrize("method", [BP(), FDG(), DSP()], ids=str)
def test_steps_and_evaluations_at_any_step(method: Any) -> None:
    _, long = fit(epochs=3, method=method)
    _, short = fit(epochs=None, steps=7, test=test_data(), eval_every=3, method=method)
    assert short.losses == long.losses[:7], "an evaluation, or the end, changes what was before"
    assert [e.step for e in short.evaluations] == [3, 6, 7]
    _, never = fit(epochs=None, steps=2, eval_every=5, test=test_data(), method=method)
    assert [e.step for e in never.evaluations] == [2]
    _, untested = fit(epochs=None, steps=5, method=method)
    assert [(e.step, e.metrics) for e in untested.evaluations] == [(4, {}), (5, {})]
    assert all(e.test_loss != e.test_loss for e in untested.evaluations)


# -- what is left alone ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_random_state_threads_and_environment_are_the_callers(workers: str) -> None:
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), dict(os.environ)
    _, first = fit(workers=workers, test=test_data(), threads=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    assert dict(os.environ) == before[3]
    assert torch.get_num_threads() == 1
    if workers == "inline":
        torch.rand(7)
        random.random()
        _, second = fit(test=test_data(), threads=2)
        assert second.losses == first.losses, "a run depends on what was drawn before it"


def test_another_seed_is_another_run() -> None:
    runs = [fit(seed=seed)[1].losses for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_threads_are_given_back_after_a_failure() -> None:
    state = torch.get_rng_state()
    with pytest.raises(StageFailed):
        fit(loss=broken_loss, threads=2)
    assert torch.get_num_threads() == 1
    assert torch.equal(torch.get_rng_state(), state)


# -- bad input ---------------------------------------------------------------------------------------------------------------------


def broken_loss(out: Tensor, target: Any) -> Tensor:
    """Breaks in a run, not while the layers are measured."""
    if len(out) == 4:
        raise ZeroDivisionError("the culprit's own words")
    return weighted(out, target)


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, CLASSES))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("workers", ["inline", "processes"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": 2, "steps": 3}, "either epochs or steps"),
        ({"epochs": None}, "either epochs or steps"),
        ({"epochs": 0}, "at least one batch"),
        ({"epochs": None, "steps": -1}, "at least one batch"),
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
        ({"threads": 0}, "threads is 0, but it must be at least 1"),
        ({"log_every": 0}, "log_every is 0, but it must be at least 1"),
        ({"model": tied(), "cuts": [1]}, "0.weight.*2.weight.*same tensor"),
        ({"model": nn.Sequential()}, "no layer"),
        ({"model": nn.Linear(6, CLASSES)}, "cannot cut a Linear"),
        ({"train": [(torch.ones(2, 6),)] * 2}, "not a pair"),
        ({"train": []}, "at least one batch"),
        ({"train": 7}, "must be an iterable"),
        ({"train": "short"}, "does not take its input"),
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
        fit(model, options.pop("train", None), options.pop("test", None), on_event=heard.append, **({"workers": workers} | options))
    assert not heard
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


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
    with pytest.raises(UsageError, match=r"the loss must be one number for a batch.*returned \(6,\); take its mean"):
        fit(loss=losses, workers=workers)


def test_what_cannot_go_to_a_process_is_named() -> None:
    with pytest.raises(UsageError, match=r'payload\.loss.*workers="inline"'):
        fit(loss=lambda out, y: weighted(out, y), workers="processes")


# -- torchrun ----------------------------------------------------------------------------------------------------------------------

SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from test_fit import ADL, SGD, hits, network, test_data, train_data, weighted
import delock

model, heard = network(), []
result = delock.fit(model, train_data(), test_data(), loss=weighted, method=ADL(2), optimizer=SGD, epochs=2, metrics={{"hits": hits}},
                    cuts=[4], on_event=heard.append)
assert (result is None) == (os.environ["RANK"] != "0")
if result is not None:
    torch.save({{"state": model.state_dict(), "losses": result.losses, "heard": [type(e).__name__ for e in heard]}}, sys.argv[1])
"""


def test_torchrun_gives_the_same_weights(tmp_path: Path) -> None:
    script, out = tmp_path / "script.py", tmp_path / "out.pt"
    script.write_text(SCRIPT)
    done = torchrun(script, str(out))
    assert done.returncode == 0, done.stderr
    there = torch.load(out)
    model, result = fit(test=test_data(), method=ADL(2), metrics={"hits": hits}, cuts=[4])
    assert all(torch.equal(value, there["state"][name]) for name, value in model.state_dict().items())
    assert there["losses"] == result.losses
    assert there["heard"] == ["Started", "EvaluationRecord", "StepRecord", "EvaluationRecord"]
