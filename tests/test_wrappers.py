"""Models in wrappers, with frozen parts, with computed weights, and messages with single numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import weight_norm

from delock import FDG, Compression, Execution, GPipe, Placement, UsageError, fit
from delock.methods import make
from delock.partition.wrappers import unwrapped

import zoo
from harness import trained_plainly
from specimens import CLASSES, SGD, vectors
from zoo import ZOO
from zoo_own import WIDTH, Mlp

pytestmark = [pytest.mark.usefixtures("own_random"), pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")]

Batches = list[tuple[Tensor, Tensor]]
bp = partial(fit, method="bp", optimizer=SGD, workers="inline")


def data() -> Batches:
    g = torch.Generator().manual_seed(0)
    return [vectors(n, g) for n in (4, 4, 3)]


def by_hand(model: nn.Module, batches: Batches, loss: Any = cross_entropy, make_optimizer: Any = SGD) -> dict[str, Tensor]:
    """Trains in plain PyTorch."""
    trained_plainly(model, batches, loss, make_optimizer([weight for weight in model.parameters() if weight.requires_grad]))
    return model.state_dict()


def unlike(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert list(one) == list(other)
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


# -- wrappers ----------------------------------------------------------------------------------------------------------------------


def test_a_compiled_model_trains_as_the_one_inside() -> None:
    model = Mlp()
    want = by_hand(copy.deepcopy(model), data())
    with pytest.warns(UserWarning, match=r"they run the model inside it as it is; execution=delock.Execution\(compile=True\)"):
        bp(torch.compile(model), data(), loss=cross_entropy, stages=2, epochs=1)
    assert unlike(model.state_dict(), want) == []


def test_a_model_that_compiles_itself_is_warned_of_once(recwarn: pytest.WarningsRecorder) -> None:
    model = nn.DataParallel(torch.compile(nn.Linear(2, 2)))
    assert isinstance(unwrapped(model), nn.Linear)
    assert len(recwarn) == 1
    own = nn.Linear(2, 2)
    own.compile()
    assert unwrapped(own) is own
    assert len(recwarn) == 2
    assert unwrapped(own, compiles=Execution(compile=True).compile) is own
    assert len(recwarn) == 2


def test_data_parallel_trains_as_the_model_inside() -> None:
    model = nn.DataParallel(Mlp())
    want = by_hand(copy.deepcopy(model.module), data())
    bp(model, data(), loss=cross_entropy, stages=2, epochs=1)
    assert unlike(model.module.state_dict(), want) == []


def test_wrappers_that_would_train_otherwise_are_refused() -> None:
    average = torch.optim.swa_utils.AveragedModel(Mlp())
    with pytest.raises(UsageError, match=r"a model in AveragedModel cannot .*: train the model that it averages"):
        bp(average, data(), loss=cross_entropy, stages=2, epochs=1)
    distributed = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(distributed)
    with pytest.raises(UsageError, match=r"a model in DistributedDataParallel cannot .*: give its module, .* start the script by torchrun"):
        bp(distributed, data(), loss=cross_entropy, stages=2, epochs=1)


# -- peft --------------------------------------------------------------------------------------------------------------------------


def test_lora_trains_bit_for_bit_and_is_saved(tmp_path: Path) -> None:
    from peft import PeftModel

    one = ZOO["LoRA on own"]
    want, losses, _ = zoo.train(one)
    model = one.model()
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    held: list[set[str]] = []

    def optimizer(params: Any) -> torch.optim.Optimizer:
        held.append({name for name, _ in params})
        return torch.optim.AdamW(params, lr=3e-3)

    result = bp(model, one.train(), **{**one.fit_options(), "optimizer": optimizer}, cuts=["base_model.model.blocks.2"], epochs=1)
    assert set.union(*held) == names
    assert result.losses == losses
    assert unlike(dict(zoo.state(model)), want) == []
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(one.model().unload(), tmp_path)
    x = one.test()[0][0]
    assert torch.equal(again.eval()(x), model.eval()(x))


# -- frozen below ------------------------------------------------------------------------------------------------------------------

ASKED: list[tuple[int, bool]] = []


class Asked(torch.autograd.Function):
    """Notes in its backward which block it is in, and if the gradient of its input is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, block: int) -> Tensor:
        ctx.block = block
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        ASKED.append((ctx.block, ctx.needs_input_grad[0]))
        return grad if ctx.needs_input_grad[0] else None, grad.sum(), None


class Scale(nn.Module):
    def __init__(self, block: int) -> None:
        super().__init__()
        self.block, self.weight = block, nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return Asked.apply(x, self.weight, self.block)


@pytest.fixture
def asked() -> Iterator[list[tuple[int, bool]]]:
    ASKED.clear()
    yield ASKED
    ASKED.clear()


@pytest.mark.parametrize("method", ["bp", "gpipe", "zb1p", "fdg", "interlocking"])
@pytest.mark.parametrize("frozen", [1, 2])
def test_what_is_frozen_below_has_no_backward(frozen: int, method: str, asked: list[tuple[int, bool]]) -> None:
    """Nor is the gradient of its outputs computed above."""
    blocks = [nn.Sequential(Scale(i), nn.Linear(WIDTH, WIDTH), nn.Tanh()) for i in range(3)]
    for block in blocks[:frozen]:
        block.requires_grad_(False)
    model = nn.Sequential(*blocks, nn.Linear(WIDTH, CLASSES))
    want = by_hand(copy.deepcopy(model), data())
    asked.clear()
    result = fit(model, data(), method=method, optimizer=SGD, loss=cross_entropy, workers="inline", cuts=[1, 2], epochs=1)
    assert set(asked) == {(frozen, False), *((i, True) for i in range(frozen + 1, 3))}
    backward = [stage.backward for stage in result.started.stages]
    assert backward[:frozen] == [0.0] * frozen
    assert min(backward[frozen:]) > 0
    if method == "bp":
        assert unlike(model.state_dict(), want) == []


def test_a_frozen_half_of_a_traced_model_has_no_backward() -> None:
    one = ZOO["frozen lower half"]
    want, losses, _ = zoo.train(one)
    model = one.model()
    result = bp(model, one.train(), cuts=["encoder.2"], epochs=1, **one.fit_options())
    assert result.losses == losses
    assert unlike(dict(zoo.state(model)), want) == []
    assert result.started.stages[0].backward == 0.0 < result.started.stages[1].backward


# -- no gradient ------------------------------------------------------------------------------------------------------------------


class Beside(nn.Module):
    """Returns something beside what the loss is taken of."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.out, self.side = nn.Linear(WIDTH, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.low(x))
        aside = self.side(h)
        return {"out": self.out(torch.tanh(self.high(h))), "aside": aside}


@pytest.mark.parametrize("options", [{}, {"workers": "processes"}, {"compression": Compression(error_codec="bf16")}], ids=str)
def test_a_weight_without_a_gradient_is_left_alone(options: dict[str, Any]) -> None:
    """A gradient of zero would let it decay."""
    decaying = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5)
    model, plain = Beside(), Beside()
    plain.load_state_dict(model.state_dict())
    before = model.side.weight.detach().clone()
    bp(model, data(), loss=of_the_output, optimizer=decaying, cuts=["high"], epochs=1, **options)
    found = by_hand(plain, data(), of_the_output, decaying)
    assert torch.equal(model.side.weight, before)
    if "compression" not in options:
        assert not unlike(model.state_dict(), found)


def of_the_output(found: dict[str, Tensor], targets: Tensor) -> Tensor:
    return cross_entropy(found["out"], targets)


# -- old weight norm ---------------------------------------------------------------------------------------------------------------


def normed() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(WIDTH, 8)), nn.ReLU(), weight_norm(nn.Linear(8, CLASSES)))


@pytest.mark.parametrize("workers", ["inline", "processes"])
@pytest.mark.parametrize("make_model", [normed, partial(Mlp, norm=weight_norm)], ids=["chain", "traced"])
def test_old_weight_norm_trains_bit_for_bit(make_model: Any, workers: str) -> None:
    """Its weight is computed, and such a tensor can neither be copied nor pickled."""
    model = make_model()
    other = make_model()
    other.load_state_dict(model.state_dict())
    want = by_hand(other, data())
    fit(model, data(), data()[:1], method="bp", optimizer=SGD, loss=cross_entropy, stages=2, epochs=1, workers=workers)
    assert unlike(model.state_dict(), want) == []
    x = data()[0][0]
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("make_model", [normed, partial(Mlp, norm=weight_norm)], ids=["chain", "traced"])
def test_old_weight_norm_is_refused_with_mixed(make_model: Any) -> None:
    with pytest.raises(UsageError, match='at="mixed" cannot be computed for'):
        bp(make_model(), data(), loss=cross_entropy, stages=2, epochs=1, method=FDG(at="mixed"))


# -- single numbers in messages ----------------------------------------------------------------------------------------------------


class Low(nn.Module):
    """Sends a number beside an activation, or alone."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.inp, self.scale = form, nn.Linear(WIDTH, 8), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.inp(x))
        s = self.scale * h.mean()
        sent = {"first": (s, h), "middle": (h, s, 2 * h), "count": (torch.tensor(3), h, s), "alone": s, "alone in a tuple": (s,)}
        return sent[self.form]


class Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, given: Any) -> Any:
        if isinstance(given, Tensor):
            return given * self.weight
        return tuple(one * self.weight if one.is_floating_point() else one for one in given)


class High(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.middle, self.out = nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, given: Any) -> Tensor:
        h = sum((one if one.dim() else one * torch.ones(1, 8)) for one in (given if isinstance(given, tuple) else (given,)))
        return self.out(torch.tanh(self.middle(h)))


def for_all(out: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of one row for all samples, where nothing else was sent."""
    return cross_entropy(out.expand(len(targets), -1), targets)


FORMS = ["first", "middle", "count", "alone", "alone in a tuple"]


def numbers(form: str) -> nn.Sequential:
    return nn.Sequential(Low(form), Middle(), High())


@pytest.mark.parametrize("form", FORMS)
def test_single_numbers_train_bit_for_bit(form: str) -> None:
    model = numbers(form)
    want = by_hand(copy.deepcopy(model), data(), for_all)
    result = bp(model, data(), data(), loss=for_all, cuts=[1, 2], epochs=1)
    assert unlike(model.state_dict(), want) == []
    assert len(result.evaluations) == 1


def parts(model: nn.Module) -> dict[str, Tensor]:
    """Trains in plain PyTorch on the two parts of every batch, each by its share of the samples."""
    optimizer = SGD(model.parameters())
    for x, y in data():
        optimizer.zero_grad()
        for a, b in zip(x.tensor_split(2), y.tensor_split(2), strict=True):
            (for_all(model(a), b) * (len(b) / len(y))).backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("form", FORMS)
def test_single_numbers_in_parts_of_a_batch(form: str) -> None:
    model = numbers(form)
    want = parts(copy.deepcopy(model))
    bp(model, data(), loss=for_all, cuts=[1, 2], epochs=1, method=GPipe(micro_batches=2))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, want[name], msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("link", "codec"), [("shared", "none"), ("gloo", "none"), ("shared", "bf16"), ("gloo", "int8")])
def test_single_numbers_over_links(form: str, link: Any, codec: str) -> None:
    """They arrive in processes as they do in one, in parts of a batch and encoded."""
    options = {"loss": for_all, "cuts": [1, 2], "epochs": 1, "optimizer": SGD, "method": GPipe(micro_batches=2)}
    options |= {"compression": Compression(codec=codec, error_codec=codec), "placement": Placement(link=link)}
    inline = numbers(form)
    other = copy.deepcopy(inline)
    fit(inline, data(), workers="inline", **{**options, "placement": Placement()})
    fit(other, data(), workers="processes", **options)
    assert unlike(inline.state_dict(), other.state_dict()) == []


@pytest.mark.slow
def test_single_numbers_reach_free_running_stages() -> None:
    for form in FORMS:
        model, heads = numbers(form), [High(), High()]
        fit(model, data(), method=make("dgl-async"), loss=for_all, cuts=[1, 2], epochs=1, optimizer=SGD, heads=heads)
        assert all(value.isfinite().all() for value in model.state_dict().values())
