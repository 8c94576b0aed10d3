"""The GPT: what it computes, where it may be cut, that it learns, here and in stages, and what it writes."""

import copy
import functools
import math

import pytest
import torch
from torch import nn

import delock
from delock.data import as_loader
from delock.errors import UsageError
from delock.methods import Interlocking
from delock.nets.generate import generate
from delock.nets.gpt import Block, bits, gpt, nats
from delock.nets.heads import build_head
from delock.partition.layers import layers
from delock.partition.stages import join_state, stages

from oracles_local import n_wise

TINY = {"depth": 2, "width": 16, "heads": 2, "context": 12}


def random_tokens(*shape, vocabulary=11, seed=0):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def fresh(seed=0):
    return torch.Generator().manual_seed(seed)


# the network


@pytest.mark.parametrize("length", [1, 7, 12])
def test_tokens_become_logits_of_each_next_token(length):
    logits = gpt(11, **TINY)(random_tokens(3, length))
    assert (logits.shape, logits.dtype) == ((3, length, 11), torch.float32)


@pytest.mark.parametrize(("depth", "width", "heads", "context"), [(1, 8, 1, 5), (3, 24, 4, 64)])
def test_number_of_parameters(depth, width, heads, context):
    model = gpt(13, depth=depth, width=width, heads=heads, context=context)
    assert parameters(model) == (2 * 13 + context) * width + depth * (12 * width**2 + 13 * width) + 2 * width


def test_the_default_size():
    assert parameters(gpt(65)) == (2 * 65 + 128) * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128 == 826_368


@pytest.mark.parametrize("place", [0, 5, 11])
def test_a_token_changes_nothing_before_it(place):
    model = gpt(11, **TINY)
    tokens = random_tokens(2, 12)
    other = tokens.clone()
    other[:, place] = (other[:, place] + 1) % 11
    with torch.no_grad():
        was, now = model(tokens), model(other)
    assert torch.equal(was[:, :place], now[:, :place])
    assert (was[:, place:] != now[:, place:]).any(-1).all()  # and every place from there on sees it


@pytest.mark.usefixtures("own_random")
def test_attention_is_softmax_over_the_places_seen():
    block = Block(6, heads=3, dropout=0.0).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64, generator=fresh())
    q, k, v = block.qkv(x).chunk(3, dim=-1)
    want = torch.zeros_like(x)
    for head in (slice(0, 2), slice(2, 4), slice(4, 6)):
        for t in range(5):
            scores = torch.einsum("bc,bsc->bs", q[:, t, head], k[:, : t + 1, head]) / math.sqrt(2)
            want[:, t, head] = torch.einsum("bs,bsc->bc", scores.softmax(-1), v[:, : t + 1, head])
    assert torch.allclose(block.attend(x), want, rtol=0, atol=1e-12)


def test_initial_weights_are_gpt2s():
    weights = gpt(500, depth=8, width=128, heads=4, context=400).state_dict()
    for name, p in weights.items():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert float(p.std()) == pytest.approx(std, rel=0.03), name
            assert abs(float(p.mean())) < 0.03 * std, name


def test_initial_weights_follow_from_seed_and_name():
    before = torch.get_rng_state()
    a, b, deeper, other = (gpt(11, **{**TINY, **more}, seed=seed) for more, seed in (({}, 3), ({}, 3), ({"depth": 5}, 3), ({}, 4)))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert torch.equal(a.block1.qkv.weight, deeper.block1.qkv.weight)
    assert not torch.equal(a.block1.qkv.weight, other.block1.qkv.weight)
    assert not torch.equal(a.block0.qkv.weight, a.block1.qkv.weight)


def test_dropout_follows_the_global_seed_and_only_in_training():
    model, tokens = gpt(11, **TINY, dropout=0.3), random_tokens(2, 12)
    with torch.random.fork_rng(devices=[]):
        outs = [(torch.manual_seed(seed), model(tokens))[1] for seed in (0, 0, 1)]
        assert torch.equal(outs[0], outs[1])
        assert not torch.equal(outs[0], outs[2])
    model.eval()
    assert torch.equal(model(tokens), gpt(11, **TINY)(tokens))
    assert not any(isinstance(module, nn.Dropout) for module in gpt(11, **TINY).modules())


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"depth": 0}, "depth of a GPT must be at least 1"),
        ({"context": 0}, "context of a GPT must be at least 1"),
        ({"heads": 3}, "3 heads cannot share a width of 16"),
        ({"dropout": 1.0}, "dropout is a probability below 1"),
    ],
)
def test_impossible_sizes_are_refused(wrong, complaint):
    with pytest.raises(UsageError, match=complaint):
        gpt(11, **{**TINY, **wrong})


def test_a_sequence_beyond_the_context_is_refused():
    with pytest.raises(UsageError, match="13 tokens is longer than the context of 12"):
        gpt(11, **TINY)(random_tokens(1, 13))


# stages


def test_a_cut_may_fall_before_every_block():
    assert [layer.prefix for layer in layers(gpt(11, **TINY))] == ["embed", "block0", "block1", "norm", "head"]


@pytest.mark.parametrize("cuts", [["block1"], [1, 4], [1, 2, 3, 4]])
def test_stages_compute_the_same_logits_and_gradients(cuts):
    whole, cut, tokens = gpt(11, **TINY), gpt(11, **TINY), random_tokens(3, 12)
    parts = stages(layers(cut), cuts)
    h = tokens
    for part in parts:
        h = part(h)
    logits = whole(tokens)
    assert torch.equal(h, logits)
    for out in (h, logits):
        nats(out, tokens).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(whole.parameters(), cut.parameters(), strict=True))
    assert join_state([part.original_state() for part in parts]).keys() == whole.state_dict().keys()


# learning


def test_the_loss_is_the_mean_over_all_tokens():
    logits, targets = torch.randn(2, 3, 4, generator=fresh()), random_tokens(2, 3, vocabulary=4)
    want = -sum(logits[b, t].log_softmax(-1)[targets[b, t]] for b in range(2) for t in range(3)) / 6
    assert float(nats(logits, targets)) == pytest.approx(float(want), rel=1e-6)
    assert bits(torch.zeros(2, 3, 8), targets) == pytest.approx(3)  # 8 equally likely tokens


def test_an_untrained_gpt_knows_nothing():
    tokens, targets = (random_tokens(8, 12, vocabulary=65, seed=seed) for seed in (0, 1))
    assert bits(gpt(65, **TINY)(tokens), targets) == pytest.approx(math.log2(65), rel=0.01)


@pytest.fixture(scope="module")
def counting():
    """A GPT that has learned by heart to count to ten and begin again, and the sequence."""
    model, sequence = gpt(11, **TINY), torch.arange(13).remainder(11).unsqueeze(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nats(model(sequence[:, :-1]), sequence[:, 1:]).backward()
        optimizer.step()
    return model, sequence


def test_it_learns_a_short_text_by_heart(counting):
    model, sequence = counting
    assert bits(model(sequence[:, :-1]), sequence[:, 1:]) < 0.05


class Counting:
    """A Loader of sequences that count upwards from anywhere, modulo 11."""

    def __len__(self):
        return 8

    def sizes(self):
        return [4] * 8

    def epoch(self, e):
        for b in range(8):
            sequences = (random_tokens(4, 1, seed=100 * e + b) + torch.arange(13)) % 11
            yield sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_two_stages_train_it_with_fdg(dropout):
    result = delock.fit(
        gpt(11, **TINY, dropout=dropout),
        Counting(),
        Counting(),
        loss=nats,
        metrics={"bits": bits},
        method="fdg",
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-2),
        stages=2,
        batches=40,
        eval_every=20,
        workers="inline",
    )
    last = result.evaluations[-1]
    assert last.test_loss < 0.6 * result.losses[0]
    assert last.metrics["bits"] == pytest.approx(last.test_loss / math.log(2))
    assert [stage.updates for stage in result.stages] == [40, 40]


# writing


def test_it_goes_on_with_what_it_knows_by_heart(counting):
    model, sequence = counting
    written = generate(model, sequence[:, :4], 8, temperature=0, generator=fresh())
    assert torch.equal(written, sequence[:, :12])
    assert model.training


def test_beyond_the_context_it_sees_the_last_tokens():
    model = gpt(11, **TINY).eval()
    prompt = random_tokens(2, 15)
    written = generate(model, prompt, 3, temperature=0, generator=fresh())
    assert written.shape == (2, 18)
    for t in (15, 16, 17):
        assert torch.equal(written[:, t], model(written[:, t - 12 : t])[:, -1].argmax(-1))
    assert not model.training
    written += 1  # an ordinary tensor


def test_the_generator_alone_decides():
    model, prompt = gpt(11, **TINY, dropout=0.5), random_tokens(2, 3)
    before = torch.get_rng_state()
    a, b, c = (generate(model, prompt, 20, generator=fresh(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3), (1.0, 1), (1e-9, None), (1.0, 99)])
def test_draws_follow_the_logits(temperature, top_k):
    model = gpt(6, **TINY)
    with torch.no_grad():
        model.head.weight.mul_(20)  # so that some tokens are clearly likelier
        logits = model(torch.zeros(1, 1, dtype=torch.int64))[0, 0].double()
    kept = logits >= logits.sort().values[-min(top_k or 6, 6)]
    want = (logits / temperature).masked_fill(~kept, -math.inf).softmax(-1)
    drawn = generate(model, torch.zeros(4000, 1, dtype=torch.int64), 1, temperature=temperature, top_k=top_k, generator=fresh())[:, 1]
    shares = torch.bincount(drawn, minlength=6) / 4000
    assert torch.allclose(shares.double(), want, rtol=0, atol=0.03)
    assert not shares[~kept].any()


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"prompt": torch.zeros(1, 0, dtype=torch.int64)}, "at least one token"),
        ({"prompt": torch.zeros(4, dtype=torch.int64)}, r"a tensor \(B, T\)"),
        ({"temperature": -1.0}, "temperature of 0 or more"),
        ({"temperature": math.nan}, "temperature of 0 or more"),
        ({"top_k": 0}, "top-k of 1 or more"),
        ({"n": -1}, "length"),
        ({"model": nn.Sequential(nn.Linear(1, 1))}, "begins with Linear"),
    ],
)
def test_what_cannot_be_written_is_refused(wrong, complaint):
    given = {"model": gpt(11, **TINY), "prompt": random_tokens(1, 2), "n": 1, "generator": fresh(), **wrong}
    with pytest.raises(UsageError, match=complaint):
        generate(**given)


def test_a_diverged_model_writes_nothing():
    model = gpt(11, **TINY)
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    with pytest.raises(UsageError, match="diverged"):
        generate(model, random_tokens(1, 2), 1, generator=fresh())


@pytest.mark.parametrize("N", range(1, 5))
def test_interlocking_on_a_gpt_is_its_definition(N):
    """Attention, embeddings and heads of language models split into halves as convolutions do: float64, AdamW, four stages."""
    method, adamw = Interlocking(N), functools.partial(torch.optim.AdamW, lr=1e-2)
    cut = stages(layers(gpt(13, depth=4, width=16, heads=2, context=8, seed=1).double()), [2, 3, 4])
    g = torch.Generator().manual_seed(0)
    made = [(torch.randint(13, (4, 8), generator=g), torch.randint(13, (4, 8), generator=g)) for _ in range(8)]
    heads = {k: build_head("transformer", (8, 16), 13, seed=k).double() for k in method.headed(4)}
    want, _ = n_wise(cut, heads, made, N=N, combine="furthest", loss=nats, make_optimizer=adamw, seed=7)
    model = copy.deepcopy(list(cut))
    delock.fit(model, as_loader(made), loss=nats, method=method, optimizer=lambda named: adamw([p for _, p in named]), seed=7,
               batches=len(made), heads=list(heads.values()) or None, workers="inline")  # fmt: skip
    for stage, state in zip(model, want.states, strict=True):
        assert all(torch.allclose(value, state[name], rtol=0, atol=1e-10) for name, value in stage.state_dict().items())
