"""The oracles checked among themselves: limits, closed formulas, and second ways to the same numbers."""

import copy
import itertools
import math
import pickle
from collections import deque
from functools import partial

import pytest
import torch
from torch import nn

from delock.keys import key

from harness import enough
from oracles import OracleRun, backprop, delayed, delays_of, gap
from oracles_ticks import UnifiedSGD, dsp_unified, mixed_deque
from workloads import WORK, Samples, batches, class_loss, mlp, sgd, warm_up, weighted_loss

pytestmark = pytest.mark.usefixtures("own_random")

pytestmark = pytest.mark.usefixtures("own_random")

SEED = 3


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def work(name: str, K: int, n: int = 23, size: int = 5, epochs: int = 2) -> dict:
    """Arguments of an oracle: 2 epochs of 4 batches of 5 and one of 3."""
    net, kind, loss = WORK[name]
    training = {"make_optimizer": sgd, "make_schedule": warm_up, "seed": SEED}
    return {"stages": net(K), "batches": batches(n, size, epochs, kind), "loss": loss, **training}


def fdg(K: int) -> list[int]:
    return [2 * (K - 1 - k) for k in range(K)]


def results(run: OracleRun) -> tuple:
    return run.states, run.losses, run.optimizer_states


def flat(run: OracleRun) -> list[torch.Tensor]:
    return [x for state in run.states for x in state.values()]


# Plain PyTorch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "K"), [("conv", 1), ("tuple", 1), ("mlp", 1), ("mlp", 4)])
def test_backprop_is_the_loop_everybody_writes(name, K):
    arguments = work(name, K)
    model = nn.Sequential(*copy.deepcopy(arguments["stages"])).train()
    optimizer = sgd(model.parameters())
    schedule = warm_up(optimizer)
    losses = []
    for t, (x, y) in enumerate(arguments["batches"]):
        torch.manual_seed(key(SEED, 0, t))
        optimizer.zero_grad()
        loss = arguments["loss"](model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    run = backprop(**arguments)
    assert gap([flat(run), run.losses], [list(model.state_dict().values()), losses]) == 0


@pytest.mark.parametrize("M", [2, 3])
def test_micro_batches_add_up_to_the_batch(M):
    arguments = work("mlp", 3)
    assert 0 < gap(results(backprop(**arguments, accumulate=M)), results(backprop(**arguments))) < 1e-10


def test_more_parts_than_samples_leaves_empty_parts_out():
    arguments = work("mlp", 2, n=7, size=5)  # batches of 5 and 2
    assert gap(results(backprop(**arguments, accumulate=3)), results(backprop(**arguments))) < 1e-10


def test_accumulating_over_halves_is_the_mean_of_a_whole_batch():
    """ADL without delays; 5 batches of 4 are 2 groups of 2 and one of 1, which a batch of 8, 8, 4 gives too."""
    halves, whole = work("mlp", 3, 20, 4, 1), work("mlp", 3, 20, 8, 1)
    one, two = delayed(**halves, delays=[0] * 3, M=2), backprop(**whole)
    assert gap([one.states, one.optimizer_states], [two.states, two.optimizer_states]) < 1e-10


def test_the_caller_s_modules_and_generator_are_left_alone():
    arguments = work("conv", 2)
    before, generator = copy.deepcopy([s.state_dict() for s in arguments["stages"]]), torch.get_rng_state()
    delayed(**arguments, delays=[2, 0], at="replay")
    assert gap([s.state_dict() for s in arguments["stages"]], before) == 0
    assert torch.equal(torch.get_rng_state(), generator)


# Limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["stash", "replay", "mixed"])
@pytest.mark.parametrize("K", [1, 3, 5])
@pytest.mark.parametrize("name", WORK)
def test_without_delays_all_is_backprop_bit_for_bit(name, K, at):
    arguments = work(name, K)
    assert gap(results(delayed(**arguments, delays=[0] * K, at=at)), results(backprop(**arguments))) == 0


@pytest.mark.parametrize("K", [1, 4])
def test_the_deque_without_delays_is_backprop_bit_for_bit(K):
    arguments = work("tuple", K)
    assert gap(results(mixed_deque(**arguments, delays=[0] * K, backward_first=K == 1)), results(backprop(**arguments))) == 0


@pytest.mark.parametrize("name", WORK)
def test_at_rate_zero_the_three_derivatives_are_one(name):
    """Weights stand still, so what differs is dropout masks and statistics alone - and they must not."""
    arguments = work(name, 4) | {"make_optimizer": partial(sgd, lr=0.0)}
    stash, replay, mixed = (results(delayed(**arguments, delays=fdg(4), at=at)) for at in ("stash", "replay", "mixed"))
    assert gap(replay, stash) == gap(mixed, stash) == 0
    assert gap([stash[0], stash[1]], list(results(backprop(**arguments))[:2])) == 0
    counts = [x for state in replay[0] for n, x in state.items() if n.endswith("num_batches_tracked")]
    assert all(x == len(arguments["batches"]) for x in counts)


@pytest.mark.parametrize("name", WORK)
def test_with_delays_the_three_derivatives_are_three(name):
    arguments = work(name, 3)
    states = [delayed(**arguments, delays=fdg(3), at=at).states for at in ("stash", "replay", "mixed")]
    states.append(backprop(**arguments).states)
    assert all(gap(a, b) > 1e-4 for i, a in enumerate(states) for b in states[:i])


@pytest.mark.parametrize("M", [1, 3])
def test_a_sum_is_a_mean_at_another_rate(M):
    """(lr, wd) with sums = (M lr, wd / M) with means, momentum on; whole groups only."""
    arguments = work("conv", 3, n=20) | {"batches": batches(18, 3, 2)}
    arguments["make_optimizer"] = partial(sgd, lr=0.01, weight_decay=6e-3)
    sums = delayed(**arguments, delays=fdg(3), M=M, reduce="sum", backward_first=True)
    arguments["make_optimizer"] = partial(sgd, lr=0.01 * M, weight_decay=6e-3 / M)
    means = delayed(**arguments, delays=fdg(3), M=M, backward_first=True)
    assert gap([sums.states, sums.losses], [means.states, means.losses]) < 1e-10
    assert M == 1 or gap(sums.states, delayed(**arguments, delays=fdg(3), M=M, reduce="sum", backward_first=True).states) > 1e-4


def test_accumulating_one_batch_is_fdg_whatever_the_reduction():
    arguments = work("tuple", 3)
    assert gap(*(results(delayed(**arguments, delays=fdg(3), M=1, reduce=r)) for r in ("sum", "mean"))) == 0


@pytest.mark.parametrize("beta", [0.5, 0.3])
def test_shrinking_compounds_down_the_stages(beta):
    """One batch, no decay: stage k moves by beta^(K-1-k) of what it does otherwise."""
    arguments = work("mlp", 4, n=5, epochs=1) | {"make_optimizer": partial(sgd, weight_decay=0.0), "make_schedule": None}
    start = [list(s.state_dict().values()) for s in arguments["stages"]]
    for oracle in (delayed, mixed_deque):
        full, shrunk = (oracle(**arguments, delays=fdg(4), shrink=b).states for b in (1.0, beta))
        for k, (w, f, s) in enumerate(zip(start, full, shrunk, strict=True)):
            moved = [[x - w0 for x, w0 in zip(state.values(), w, strict=True)] for state in (s, f)]
            assert gap(moved[0], [beta ** (3 - k) * x for x in moved[1]]) < 1e-10


# Staleness ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("early", "M"), enough(itertools.product((False, True), (1, 2, 3, 4)), together=1))
def test_staleness_equals_the_closed_formulas(early, M):
    data = [(torch.ones(2, 3), torch.zeros(2, 3))] * (22 + M)
    for K in range(1, 9):
        stages = [nn.Linear(3, 3) for _ in range(K)]
        training = {"loss": nn.functional.mse_loss, "make_optimizer": sgd}
        arguments = training | {"delays": fdg(K), "M": M, "backward_first": early}
        run, ticks = delayed(stages, data, **arguments), mixed_deque(stages, data, **arguments)
        assert run.staleness == ticks.staleness
        assert K != 3 or delayed(stages, data, **arguments, at="replay").staleness == [[0] * K] * len(data)
        for k, d in enumerate(fdg(K)):
            e = int(early and k < K - 1)
            seen = [row[k] for row in run.staleness]
            assert seen == [b // M - max(0, b - d + e) // M for b in range(len(data))]
            warm = -(-d // M) * M
            assert seen[warm : warm + M] == [max(0, math.ceil((d - e - j) / M)) for j in range(M)]
            assert sum(seen[warm : warm + M]) / M == pytest.approx((d - e) / M)


def test_staleness_of_the_examples():
    def last(K, M, early):
        data = [(torch.ones(2, 3), torch.zeros(2, 3))] * 24
        run = delayed([nn.Linear(3, 3) for _ in range(K)], data, loss=nn.functional.mse_loss, make_optimizer=sgd,
                      delays=fdg(K), M=M, backward_first=early)  # fmt: skip
        return [tuple(row[k] for row in run.staleness[-M:]) for k in range(K)]

    assert last(3, 2, False) == [(2, 2), (1, 1), (0, 0)]
    assert last(3, 2, True) == [(2, 1), (1, 0), (0, 0)]
    assert [n for (n,) in last(8, 1, True)] == [13, 11, 9, 7, 5, 3, 1, 0]
    assert delays_of([1, 1], [1, 1]) == [4, 2, 0]
    assert delays_of([0, 0, 0], [1, 1, 1]) == [3, 2, 1, 0]


# Second ways to the same numbers --------------------------------------------------------------------------------------


def lock_step(stages, batches, loss, make_optimizer, make_schedule, seed, M, early, shrink):
    """FDG and ADL with stash, as machines that post letters: at tick t stage k forwards t - k and backwards t - 2(K-1) + k, and
    every letter takes a tick. A forward works on a copy of the stage that nobody updates; that is what stash means."""
    n, K = len(batches), len(stages)
    stages = [copy.deepcopy(s) for s in stages]
    optimizers = [make_optimizer(list(s.parameters())) for s in stages]
    schedules = [make_schedule(o) for o in optimizers]
    live, up, down, losses = [deque() for _ in stages], {}, {}, []

    def forward(k, b):
        if not 0 <= b < n:
            return
        h = batches[b][0] if k == 0 else up.pop((k, b))
        h = h.clone().requires_grad_(k > 0)
        twin = copy.deepcopy(stages[k])
        twin.zero_grad()  # deepcopy takes what is accumulated along
        torch.manual_seed(key(seed, k, b))
        out = twin(h)
        for x, new in zip(stages[k].buffers(), twin.buffers(), strict=True):
            x.copy_(new)
        if k < K - 1:
            letters.append((up, (k + 1, b), out.detach().clone()))
        else:
            out = loss(out, batches[b][1])
            losses.append(out.detach())
            down[k, b] = torch.ones_like(out)
        live[k].append((twin, h, out))

    def backward(k, b):
        if not 0 <= b < n:
            return
        twin, h, out = live[k].popleft()
        out.backward(down.pop((k, b)) * (shrink if k < K - 1 else 1))
        for p, q in zip(stages[k].parameters(), twin.parameters(), strict=True):
            p.grad = q.grad / M if p.grad is None else p.grad + q.grad / M
        if k > 0:
            letters.append((down, (k - 1, b), h.grad))
        if (b + 1) % M == 0:
            optimizers[k].step()
            optimizers[k].zero_grad()
            schedules[k].step()

    for t in range(n + 2 * K):
        letters = []
        for k in range(K):
            ops = [(forward, t - k), (backward, t - 2 * (K - 1) + k)]
            for op, b in reversed(ops) if early and k < K - 1 else ops:
                op(k, b)
        for box, address, letter in letters:
            box[address] = letter
    return [s.state_dict() for s in stages], losses, [o.state_dict() for o in optimizers]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("K", "M"), [(2, 1), (4, 1), (3, 2)])
def test_the_pipeline_equals_the_sequential_loop(K, M, early):
    arguments = work("conv", K)
    run = delayed(**arguments, delays=fdg(K), M=M, backward_first=early, shrink=0.7)
    assert gap(results(run), lock_step(**arguments, M=M, early=early, shrink=0.7)) < 1e-12


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("D", "M"), [([4, 2, 0], 1), ([4, 2, 0], 3), ([2, 1, 0], 1), ([5, 2, 0], 2), ([2, 2, 0], 1)])
@pytest.mark.parametrize("name", ["conv", "tuple"])
def test_the_deque_equals_the_loop_that_overwrites(name, D, M, early):
    arguments = work(name, 3) | {"delays": D, "M": M, "backward_first": early, "shrink": 0.8}
    run, ticks = delayed(**arguments, at="mixed"), mixed_deque(**arguments)
    assert gap(results(ticks), results(run)) == 0
    assert ticks.staleness == run.staleness
    assert gap(ticks.states, delayed(**arguments, at="stash").states) > 1e-5


def test_mixed_is_old_activations_and_masks_with_weights_of_now():
    """The definition, by hand: dW_l = delta_l^T h_{l-1}(old); delta_{l-1} = mask_{l-1}(old) * W_l(now)^T delta_l."""
    torch.manual_seed(0)
    below = nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 4, bias=False)).double()
    data = [(torch.randn(3, 5).double(), torch.randn(3, 4).double()) for _ in range(6)]
    plain, D, lr = partial(torch.optim.SGD, lr=0.1), 2, 0.1
    run = mixed_deque([below, nn.Identity()], data, loss=lambda h, y: ((h - y) ** 2).sum() / 2, make_optimizer=plain,
                      delays=[D, 0], backward_first=False)  # fmt: skip
    w1, w2 = (p.detach().clone() for p in below.parameters())
    kept = {}
    for t in range(len(data) + D):
        if t < len(data):
            x, y = data[t]
            h = (x @ w1.T).relu()
            kept[t] = x, h, h @ w2.T - y  # the error: the last stage is the identity and has no delay
        if t >= D:
            x, h, delta = kept.pop(t - D)
            d1 = (h > 0) * (delta @ w2)
            w1, w2 = w1 - lr * d1.T @ x, w2 - lr * delta.T @ h
    assert gap(list(run.states[0].values()), [w1, w2]) < 1e-12


LAGS = [((1, 1, 0), (4, 2, 0)), ((2, 1, 0), (6, 3, 0)), ((1, 1, 2, 0), (9, 6, 3, 0)), ((0,), (0,))]


@pytest.mark.parametrize(("p", "m"), LAGS)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", ["conv", "tuple"])
def test_queues_and_unified_sgd_equal_the_loop_with_replay(name, nesterov, p, m):
    arguments = work(name, len(m)) | {"make_optimizer": partial(sgd, nesterov=nesterov), "make_schedule": None}
    run = delayed(**arguments, delays=m, at="replay")
    del arguments["make_optimizer"], arguments["make_schedule"]
    queues = dsp_unified(**arguments, p=p, m=m, lr=0.02, momentum=0.9, s=float(nesterov), weight_decay=5e-3)
    assert gap([queues.states, queues.losses], [run.states, run.losses]) < 1e-10
    assert (queues.age, queues.staleness) == (run.age, run.staleness)


def test_impossible_lags_are_refused():
    arguments = {n: x for n, x in work("mlp", 3).items() if not n.startswith("make")}
    for p, m in [((1, 1, 0), (3, 2, 0)), ((0, 1, 0), (4, 2, 0)), ((1, 1, 0), (4, 2, 1)), ((1, 1, 1), (4, 2, 0))]:
        with pytest.raises(ValueError, match="no DSP"):
            dsp_unified(**arguments, p=p, m=m, lr=0.1)
    with pytest.raises(ValueError, match="backward-first"):
        delayed(**work("mlp", 3), delays=[0, 0, 0], backward_first=True)
    with pytest.raises(ValueError, match="fall to 0"):
        mixed_deque(**work("mlp", 3), delays=[1, 2, 0])


@pytest.mark.parametrize("nesterov", [False, True])
def test_unified_sgd_is_torch_s_while_the_rate_stands(nesterov):
    """z_0 = w_0 is torch's empty buffer; w are torch's weights: s = 0 its momentum, s = 1 its nesterov. When the rate changes
    they part: torch scales the whole buffer by the new rate."""

    def parted(rates):
        torch.manual_seed(0)
        ours = [torch.randn(4).double()]
        theirs = [ours[0].clone().requires_grad_()]
        unified = UnifiedSGD(ours, 0.0, 0.9, float(nesterov), 5e-3)
        optimizer = sgd(theirs, nesterov=nesterov)
        for rate in rates:
            unified.lr = optimizer.param_groups[0]["lr"] = rate
            theirs[0].grad = torch.sin(3 * theirs[0].detach())
            ours[0].grad = torch.sin(3 * ours[0])
            unified.step()
            optimizer.step()
        return gap(ours, [theirs[0].detach()])

    assert parted([0.1] * 20) < 1e-12
    assert parted([0.1] * 10 + [0.01] * 10) > 1e-3


# The workloads and the yardstick --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WORK)
def test_networks_can_be_cut_pickled_and_trained_in_both_dtypes(name, dtype):
    net, kind, loss = WORK[name]
    data = batches(11, 4, 1, kind, dtype)
    whole = [list(nn.Sequential(*net(K, dtype)).state_dict().values()) for K in range(1, 6)]
    assert all(gap(w, whole[0]) == 0 for w in whole)
    for K in range(1, 6):
        stages = pickle.loads(pickle.dumps(net(K, dtype)))
        assert len(stages) == K
        for function in (loss, sgd, warm_up):
            assert pickle.loads(pickle.dumps(function)) is function
        run = delayed(stages, data, loss=loss, make_optimizer=sgd, make_schedule=warm_up, delays=fdg(K))
        assert all(x.dtype in (dtype, torch.int64) for x in flat(run))
        assert all(math.isfinite(x) for x in run.losses)


@pytest.mark.parametrize("name", WORK)
def test_every_parameter_gets_a_gradient_and_the_network_learns(name):
    arguments = work(name, 3, 60, 12, 16) | {"make_optimizer": partial(sgd, lr=0.1, weight_decay=0.0), "make_schedule": None}
    run = backprop(**arguments)
    before = dict(nn.Sequential(*arguments["stages"]).named_parameters())
    after = {f"{k}.{n}": x for k, state in enumerate(run.states) for n, x in state.items()}
    assert all(gap(after[n], p.detach()) > 0 for n, p in before.items())
    assert sum(run.losses[-5:]) < 0.8 * sum(run.losses[:5])


@pytest.mark.parametrize(("kind", "loss"), [("image", class_loss), ("token", weighted_loss), ("vector", class_loss)])
def test_samples_come_all_once_an_epoch_in_a_new_order(kind, loss):
    samples = Samples(kind, 11, 4, torch.float32, seed=2)
    assert samples.sizes() == [4, 4, 3] == [len(x) for x, _ in samples.epoch(0)]
    assert len(samples) == 3
    epochs = [torch.cat([x for x, _ in samples.epoch(e)]) for e in (0, 0, 1)]
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])
    assert torch.equal(*(x.flatten(1).double().sum(1).sort().values for x in epochs[1:]))
    assert gap([batch for e in (0, 1) for batch in samples.epoch(e)], batches(11, 4, 2, kind, torch.float32, seed=2)) == 0


def test_the_yardstick_measures():
    one, two = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 5.0])
    assert gap({"a": [one, 3]}, {"a": [one.clone(), 3]}) == 0
    assert gap([one], [two]) == pytest.approx(0.2)
    assert gap([one], [one, one]) == gap([one], [one.double()]) == gap([one], [one[:1]]) == gap([3], [4]) == math.inf
    assert gap([one * math.nan], [one]) == gap([one], [one * math.nan]) == math.inf
    assert mlp(2)[0][0][0].weight.dtype == torch.float64
