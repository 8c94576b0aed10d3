"""Calls of a model with a batch, by the names of forward's arguments and by place; and what counts as a sample."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import delock
from delock.data.call import Call, Takes, takes
from delock.data.iterable import Batches, evaluation_loader, train_loader
from delock.data.loader import Loader, call_of, loaded
from delock.engine.feed import Feed
from delock.errors import UsageError
from delock.ops import Evaluate, Forward
from delock.tensors import tensors

from workloads import sgd

B, T = 4, 3
X, MASK, Y = torch.randn(B, T), torch.ones(T, T), torch.arange(B)


class Own(nn.Module):
    """Adds up what it is given, each part with a factor of its own."""

    def forward(self, x: Any, mask: Any = None, *, labels: Any = None, scale: float = 1.0, extra: Any = None) -> Any:
        out = x.sum() * scale
        for i, one in enumerate((mask, labels)):
            out = out if one is None else out + 10 ** (i + 1) * one.sum()
        return out if extra is None else out + 7 * extra["a"][1].sum() - extra["b"]


class Pair(nn.Module):
    def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
        return both[0].sum() - both[1].sum()


class Open(nn.Module):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return sum((i + 1) * one.sum() for i, one in enumerate([*args, *kwargs.values()]))  # type: ignore[return-value]


def loader(model: nn.Module, data: Any, *, loss: bool = True) -> Loader:
    return train_loader(data, 0, takes(model, loss=loss), None)


def called(model: nn.Module, data: Any, *, loss: bool = True) -> tuple[Tensor, Any, Call]:
    """Calls the model with the first batch as the loader says: its result, the targets, and the call."""
    made = loader(model, data, loss=loss)
    ((inputs, targets), *_) = made.epoch(0)
    call = call_of(made)
    assert call is not None
    args, kwargs = pickle.loads(pickle.dumps(call)).arguments(tensors(inputs))
    assert call.tensors(*args, **kwargs) == tensors(inputs)
    return model(*args, **kwargs), targets, call


# ---- with a loss -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [dict, lambda d: dict(reversed(d.items()))], ids=["in order", "reversed"])
def test_a_dict_gives_the_arguments_by_name(keep: Any) -> None:
    batch = keep({"x": X, "labels": Y, "mask": MASK.numpy(), "scale": 2.0, "extra": {"a": [None, X], "b": 3}})
    out, targets, call = called(Own(), [batch])
    assert targets is Y
    assert torch.equal(out, Own()(X, MASK, scale=2.0, extra={"a": [None, X], "b": 3}))
    assert call.words() == "(x=tensor, mask=tensor, scale=2.0, extra={'a': [None, tensor], 'b': 3})"


def test_the_order_in_a_dict_makes_no_difference() -> None:
    batches = [{"x": X, "mask": MASK, "extra": {"a": [1, X], "b": 1}, "labels": Y}]
    batches.append(dict(reversed(batches[0].items())))
    made = loader(Own(), batches)
    (one, _), (two, _) = made.epoch(0)
    assert all(a is b for a, b in zip(one, two, strict=True))


def test_a_pair_gives_them_by_place() -> None:
    for inputs, words in (((X, MASK), "(tensor, tensor)"), ([X, MASK.numpy()], "(tensor, tensor)"), (X, "(tensor)"), ((X,), "(tensor)")):
        out, targets, call = called(Own(), [(inputs, Y)])
        assert targets is Y
        assert call.words() == words
        assert torch.equal(out, Own()(X, MASK if "," in words else None))
    out, _, call = called(Pair(), [((X, MASK), Y)])
    assert call.words() == "((tensor, tensor))"
    assert torch.equal(out, Pair()((X, MASK)))
    assert torch.equal(called(Open(), [((X, MASK, X), Y)])[0], Open()(X, MASK, X))
    assert torch.equal(called(Own(), [({"mask": MASK, "x": X}, {"any": Y})])[0], Own()(X, MASK))


def test_a_choice_gives_what_it_says() -> None:
    batch = {"pixels": X, "mask": MASK, "id": ["a"], "digit": Y}
    by_name = Batches([{"x": X, **batch}], inputs=["mask", "x"], targets="digit")
    assert called(Own(), by_name)[2].words() == "(x=tensor, mask=tensor)"
    several = Batches([{"x": X, "one": Y, "two": X}], targets=["two", "one"])
    assert called(Own(), several)[1] == {"two": X, "one": Y}
    assert called(Own(), Batches([(X, Y, MASK)], inputs=[0, 2], targets=1))[2].words() == "(tensor, tensor)"
    out, targets, call = called(Own(), Batches([(X, Y, MASK)], targets=[1]))
    assert (call.words(), targets) == ("(tensor, tensor)", (Y,))
    assert torch.equal(out, Own()(X, MASK))
    named = Batches([batch], inputs=lambda b: {"mask": b["mask"], "x": b["pixels"]}, targets=lambda b: b["digit"])
    assert torch.equal(called(Own(), named)[0], Own()(X, MASK))
    placed = Batches([batch], inputs=lambda b: (b["pixels"], b["mask"]), targets="digit")
    assert called(Own(), placed)[2].words() == "(tensor, tensor)"


# ---- without a loss ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "targets", "words"),
    [
        ({"x": X, "labels": Y}, Y, "(x=tensor, labels=tensor)"),
        ({"x": X}, None, "(x=tensor)"),
        ((X, Y), Y, "(tensor, tensor)"),
        (({"x": X}, Y), Y, "(x=tensor, labels=tensor)"),
        ((X, {"labels": Y}), {"labels": Y}, "(tensor, labels=tensor)"),
        (X, None, "(tensor)"),
        (X.numpy(), None, "(tensor)"),
        ((X,), None, "(tensor)"),
    ],
)
def test_a_model_with_its_own_loss_takes_the_targets(batch: Any, targets: Any, words: str) -> None:
    out, found, call = called(Own(), [batch], loss=False)
    assert call.words() == words
    assert found is targets or found == targets
    whole = {"x": X, "labels": Y} if "labels" in words else {"x": X, "mask": Y} if "," in words else {"x": X}
    assert torch.equal(out, Own()(**whole))


def test_lists_that_are_arguments_stay_lists() -> None:
    """As of a detection model: more images than forward has arguments."""

    class Images(nn.Module):
        def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
            return sum(x.sum() for x in images) - sum(t["boxes"].sum() for t in targets)  # type: ignore[return-value]

    out, _, call = called(Images(), [([X, X, X], [{"boxes": MASK}] * 3)], loss=False)
    assert call.words() == "([tensor, tensor, tensor], [{'boxes': tensor}, {'boxes': tensor}, {'boxes': tensor}])"
    assert torch.equal(out, 3 * X.sum() - 3 * MASK.sum())


# ---- refused -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "data", "loss", "says"),
    [
        (Own(), [{"x": X, "id": Y, "labels": Y}], True, r"has 'id', which the model's forward does not take by name: .* inputs=\['x'\]\)"),
        (Own(), [{"x": X, "label": Y}], False, "has targets, but the model's forward does not take them, and fit is given no loss"),
        (Own(), Batches([{"x": X, "id": Y}], inputs=["x", "id"], targets="id"), True, "has 'id', which the model's forward does not take"),
        (Own(), [({"x": X, 3: X}, Y)], True, "has 3, which the model's forward does not take by name"),
        (Pair(), [({"both": (X, X)}, Y)], False, "has inputs by name, and targets without one"),
        (Own(), [{"scale": 2.0, "labels": Y}], True, r"gives the model \(scale=2.0\), which holds no tensor"),
        (Own(), [{"x": X, "extra": object(), "labels": Y}], True, "batch 0 of epoch 0 of the data: a object cannot travel"),
        (
            Own(),
            [{"x": X, "labels": Y}, {"x": X, "mask": MASK, "labels": Y}],
            True,
            r"gives the model \(x=tensor, mask=tensor\), but the first",
        ),
        (Own(), [{"x": X, "scale": s, "labels": Y} for s in (1, True)], True, r"\(x=tensor, scale=True\), but the first .* scale=1\)"),
        (
            Own(),
            [((X, Y), Y), (X, Y)],
            True,
            r"batch 1 of epoch 0 .* gives the model \(tensor\), but the first batch gave it \(tensor, tensor",
        ),
        (Own(), [(X, Y, MASK)], False, "a tuple of 3, not a pair"),
    ],
)
def test_batches_that_do_not_fit_are_refused(model: nn.Module, data: Any, loss: bool, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        list(loader(model, data, loss=loss).epoch(0))


@pytest.mark.usefixtures("own_random")
def test_test_data_must_call_the_model_as_the_training_data_does() -> None:
    models = pytest.importorskip("torchvision").models
    resnet = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 2])
    with pytest.raises(UsageError, match=r"the test data 'b' gives the model \(x=tensor\), but the training data gives it \(tensor\)"):
        delock.fit(
            resnet, [(images, labels)], {"a": [(images, labels)], "b": [{"x": images, "labels": labels}]},
            loss=nn.functional.cross_entropy, optimizer=sgd, stages=2, epochs=1, workers="inline",
        )  # fmt: skip


# ---- what a model takes ------------------------------------------------------------------------------------------------------------


def test_what_a_model_takes() -> None:
    assert takes(nn.Sequential(Own())) == takes([Own()]) == takes(nn.ModuleList([Own()])) == Takes()
    own = Takes(False, ("x", "mask", "labels", "scale", "extra"), 2, others=False)
    assert takes(Own()) == own
    wrapped = (nn.DataParallel(Own()), torch.optim.swa_utils.AveragedModel(Own()), torch.compile(Own()))
    assert [takes(one) for one in wrapped] == [own] * 3
    assert takes(Open(), loss=False) == Takes(False, (), None, others=True, loss=False)


@pytest.mark.usefixtures("own_random")
def test_what_models_of_transformers_and_peft_take() -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    found = takes(model, loss=False)
    assert {"input_ids", "attention_mask", "labels"} <= {*found.names}
    batch = transformers.BatchEncoding({"labels": torch.ones(2, 3), "attention_mask": torch.ones(2, 3), "input_ids": torch.ones(2, 3)})
    made = loader(model, [batch], loss=False)
    next(made.epoch(0))
    call = call_of(pickle.loads(pickle.dumps(made)))
    assert call is not None
    assert call.words() == "(input_ids=tensor, attention_mask=tensor, labels=tensor)"
    with pytest.raises(UsageError, match="has 'special_tokens_mask', which the model's forward does not take by name"):
        next(loader(model, [{**batch, "special_tokens_mask": torch.ones(2, 3)}], loss=False).epoch(0))
    lora = peft.PeftModel(model, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert takes(lora, loss=False) == found


# ---- loaders of the user's, and samples --------------------------------------------------------------------------------------------


class OwnLoader:
    """A Loader with a place."""

    def __init__(self) -> None:
        self.place = 0

    def __len__(self) -> int:
        return 2

    def sizes(self) -> list[int]:
        return [B, B]

    def epoch(self, e: int) -> Any:
        return iter([(X, Y)] * 2)

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def test_an_own_loader_is_read_by_the_same_rules() -> None:
    own = OwnLoader()
    made = train_loader(Batches(own, weight=len), 0, takes(Own(), loss=False), None)
    assert (len(made), made.sizes()) == (2, [B, B])
    assert len([*made.epoch(0)]) == 2
    call = call_of(made)
    assert call is not None
    assert call.words() == "(tensor, tensor)"
    feed = Feed(made, None, 1, torch.device("cpu"))
    feed.load({"place": 7})
    assert (own.place, feed.state()) == (7, {"place": 7})
    assert train_loader(own, 0, Takes(), None) is own


def graphs(n: int, nodes: int) -> dict[str, Tensor]:
    """A batch of n graphs as one."""
    return {"x": torch.randn(nodes, 2), "edges": torch.randint(nodes, (2, 5)), "of": torch.arange(nodes) % n, "y": torch.arange(n)}


def count(batch: dict[str, Tensor]) -> int:
    return len(batch["y"])


@pytest.mark.usefixtures("own_random")
def test_samples_are_what_the_rule_says() -> None:
    takes_graphs = Takes(False, ("x", "edges", "of"), 3)
    data = [graphs(3, 7), graphs(2, 5)]
    plain = train_loader(Batches(data, targets="y"), 0, takes_graphs, None)
    with pytest.raises(UsageError, match=r"delock.data.Batches\(loader, samples=...\)"):
        _ = next(loaded(plain, 0)).samples
    made = train_loader(Batches(data, targets="y", samples=count), 0, takes_graphs, None)
    test = evaluation_loader({"a": Batches(data, targets="y", samples=count, weight=lambda y: 10 * len(y)), "b": made}, 0, takes_graphs)
    assert made.sizes() is None
    assert [batch.samples for batch in loaded(made, 0)] == [3, 2]
    feed = Feed(made, test, 1, torch.device("cpu"))
    assert [feed(Forward(b)).samples for b in range(3)] == [3, 2, 3]
    assert [(m.samples, m.count) for m in (feed(Evaluate(i)) for i in range(5))] == [(3, 30), (2, 20), (3, 3), (2, 2), (3, 30)]
    with pytest.raises(UsageError, match="batch 0 has 3 samples, but none of its inputs has a row for each"):
        Feed(made, None, 2, torch.device("cpu"))(Forward(0))


def test_parts_are_the_rows_of_what_the_rule_counts() -> None:
    """Also where the inputs and the targets leave it open."""
    positions, square, tokens, y = torch.arange(3), torch.ones(3, 3), torch.arange(12).reshape(4, 3), torch.arange(12)
    data = Batches([(positions, square, tokens, y)], targets=lambda b: {"y": b[3], "of": b[2]}, inputs=[0, 1, 2], samples=lambda b: 4)
    feed = Feed(train_loader(data, 0, Takes(False, ("p", "s", "t"), 3), None), None, 2, torch.device("cpu"))
    for j, part in enumerate(([0, 1, 2], [6, 7, 8])):
        message = feed(Forward(j))
        p, s, t = message.values
        assert torch.equal(p, positions)
        assert torch.equal(s, square)
        assert t.shape == (2, 3)
        assert t[0].tolist() == part
        assert torch.equal(message.targets["of"], t)
        assert torch.equal(message.targets["y"], y)
        assert (message.samples, message.weight) == (2, 0.5)


# ---- trained -----------------------------------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """Has several arguments, and computes its loss if it is given labels."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.middle = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None, scale: float = 1.0) -> Any:
        h = self.table(ids)
        for layer in self.middle:
            h = h + torch.tanh(layer(h)) * (1 if mask is None else mask[..., None])
        logits = self.out(h) * scale
        return logits if labels is None else {"loss": token_loss(logits, labels), "logits": logits}


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def tagger() -> Tagger:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tagger()


def sentences() -> list[dict[str, Any]]:
    """Uneven batches with the labels in front, a mask, and a constant."""
    g = torch.Generator().manual_seed(0)
    drawn = [(torch.randint(11, (2, n, 5), generator=g), torch.rand(n, 5, generator=g).round()) for n in (4, 4, 3, 2, 4)]
    return [{"labels": y, "scale": 2.0, "mask": mask, "ids": x} for (x, y), mask in drawn]


@pytest.mark.parametrize("own", [False, True], ids=["a loss", "its own loss"])
def test_a_model_of_several_arguments_trains_as_plain_pytorch(own: bool) -> None:
    plain, optimizer = (model := tagger()), torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in sentences():
        optimizer.zero_grad()
        given = {name: one for name, one in batch.items() if own or name != "labels"}
        (plain(**given)["loss"] if own else token_loss(plain(**given), batch["labels"])).backward()
        optimizer.step()
    model = tagger()
    arrays = [{name: one if isinstance(one, float) else one.numpy() for name, one in batch.items()} for batch in sentences()]
    result = delock.fit(
        model, arrays, {"valid": sentences()[:2], "other": arrays}, loss=None if own else token_loss, method="bp", stages=2, epochs=1,
        optimizer=partial(torch.optim.SGD, lr=0.1), workers="inline",
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    with torch.no_grad():
        wanted = [float(model(**batch)["loss"]) for batch in sentences()[:2]]
    assert result.evaluations[-1].metrics["valid/loss"] == result.evaluations[-1].test_loss == pytest.approx(sum(wanted) / 2)
