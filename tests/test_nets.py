"""Networks: what they are, what they can be cut into, what that costs, and that a cut network is still the same network."""

import copy
import itertools
import pickle
import random
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from delock.errors import UsageError
from delock.nets import (
    MODELS,
    Atom,
    AtomCost,
    Group,
    atoms,
    balance,
    build,
    has_batch_norm,
    join_state,
    measure,
    resolve_cuts,
    stages,
)

OURS = [name for name in MODELS if not name.startswith("torchvision/")]
LARGE = ("resnet110", "resnet1202", "resnet34-cifar", "wrn-28-10", "vgg19", "dgl-cnn6")
SMALL = [name for name in OURS if name not in LARGE]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def digits(name, **more):
    return build(name, **{"classes": 10, "in_channels": 1, "image_size": 8, **more})


def prefixes(model):
    return [atom.prefix for atom in atoms(model)]


def through(parts, x):
    for part in parts:
        x = part(x)
    return x


def cross_entropy(out, y):
    return nn.functional.cross_entropy(out, y)


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- models ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions", "digits_of_paper"),
    [
        ("resnet20", 0.27, 2),
        ("resnet32", 0.46, 2),
        ("resnet44", 0.66, 2),
        ("resnet56", 0.85, 2),
        ("resnet110", 1.7, 1),
        ("resnet1202", 19.4, 1),
        ("wrn-16-4", 2.75, 2),  # the paper's table rounds it to 2.8
        ("wrn-28-10", 36.5, 1),
    ],
)
def test_number_of_parameters_is_the_papers(name, millions, digits_of_paper):
    builder = MODELS[name]
    dropout = {"dropout": 0.0} if name.startswith("wrn") else {}
    with torch.device("meta"):  # shapes only
        model = builder(classes=10, in_channels=3, **dropout)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, digits_of_paper) == millions


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # counted by hand: convolutions without bias, two numbers per channel of a batch norm, linear with bias
        ("resnet18-cifar", 11_173_962),
        ("resnet34-cifar", 21_282_122),
        ("vgg11", 9_228_362),
        ("vgg19", 20_035_018),
        ("dgl-cnn6", 9 * (3 * 128 + 128**2 * (1 + 2 + 4 + 8 + 16)) + 4 * 896 + 2 * 2048 * (2048 + 1 + 2) + 2049 * 10),
    ],
)
def test_number_of_parameters_of_the_networks_with_heads_at_several_resolutions(name, parameters):
    more = {} if name.startswith("resnet") else {"image_size": 32}
    with torch.device("meta"):
        model = MODELS[name](classes=10, in_channels=3, **more)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
@pytest.mark.parametrize("name", [*SMALL, "torchvision/resnet18"])
def test_every_model_takes_digits_and_cifar_and_every_parameter_learns(name, channels, size):
    model = build(name, classes=7, in_channels=channels, image_size=size)
    out = model(torch.randn(4, channels, size, size))  # of two samples a batch norm on 1 x 1 pixels makes 1 and -1, whatever they are
    assert out.shape == (4, 7)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet8", "wrn-16-4", "cnn", "mlp", "torchvision/resnet18"])
def test_weights_are_a_function_of_the_seed_and_global_random_state_is_untouched(name):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = digits(name, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same_state(one, digits(name, seed=3).state_dict())
    assert not same_state(one, digits(name, seed=4).state_dict())


def test_initial_variance_is_hes():
    model = build("wrn-16-4", classes=10, in_channels=3, image_size=32)
    weight = model.layer3[1].conv1.weight  # fan_out = 9 * 256
    assert weight.var().item() == pytest.approx(2 / (9 * 256), rel=0.02)
    assert model.fc.bias.abs().max() == 0


def test_option_a_shortcut_is_the_image_between_zeros():
    block = digits("resnet8").layer2[0]
    x = torch.randn(2, 16, 8, 8)
    out = block.shortcut(x)
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].abs().sum() == out[:, 24:].abs().sum() == 0
    assert torch.equal(digits("resnet8").layer1[0].shortcut(x), x)


def test_resnet18_is_torchvisions_but_for_the_stem():
    from torchvision.models import resnet18

    ours = build("resnet18-cifar", classes=10, in_channels=3, image_size=32)
    with torch.device("meta"):
        theirs = resnet18(num_classes=10)
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    state = copy.deepcopy(ours.state_dict())
    assert list(theirs.state_dict()) == list(state)
    theirs.load_state_dict(state, assign=True)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_pools_of_the_plain_networks_halve_the_image_where_the_width_changes():
    def sides(name, size):
        h, seen = torch.randn(4, 3, size, size), []
        for atom in atoms(build(name, classes=10, in_channels=3, image_size=size)):
            h = atom.module(h)
            if atom.prefix.startswith("conv"):
                seen.append(tuple(h.shape[1:3]))
        return seen

    assert sides("dgl-cnn6-quarter", 32) == [(32, 32), (32, 32), (64, 16), (64, 16), (128, 8), (128, 8)]
    assert sides("dgl-cnn6-quarter", 3) == [(32, 3), (32, 3), (64, 1), (64, 1), (128, 1), (128, 1)]
    assert sides("vgg11", 32) == [(64, 32), (128, 16), (256, 8), (256, 8), (512, 4), (512, 4), (512, 2), (512, 2)]
    assert [side for _, side in sides("vgg11", 28)] == [28, 14, 7, 7, 3, 3, 1, 1]  # and no pool is left over for one pixel


def test_the_cuts_of_the_buffer_study_give_one_convolution_to_each_stage():
    found = atoms(digits("dgl-cnn6-quarter"))
    parts = stages(found, ["conv2", "pool1", "conv4", "pool2", "conv6"])
    assert [sum(isinstance(m, nn.Conv2d) for m in part.modules()) for part in parts] == [1] * 6


@pytest.mark.parametrize("name", ["wrn-16-4", "cnn", "mlp"])
def test_dropout_is_an_option_and_absent_otherwise(name):
    def kinds(model):
        return [m.p for m in model.modules() if isinstance(m, nn.Dropout)]

    assert kinds(digits(name)) == []
    found = kinds(digits(name, dropout=0.3))
    assert found
    assert set(found) == {0.3}
    assert same_state(digits(name).state_dict(), digits(name, dropout=0.3).state_dict())  # the same names and weights with and without


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("resnet21", {}, "no model is called 'resnet21': did you mean .*'resnet20'"),
        ("wrn-28-1", {}, "did you mean 'wrn-28-10'"),
        ("torchvision/resnet81", {}, "did you mean 'torchvision/resnet"),
        ("qqq", {}, "there are resnet8, resnet20"),
        ("resnet20", {"dropout": 0.1}, "resnet20 has no dropout.*wrn-16-4, wrn-28-10, cnn, mlp"),
        ("cnn", {"dropout": 1.0}, "dropout is a probability below 1"),
        ("cnn", {"classes": 0}, "must be at least 1"),
    ],
)
def test_bad_model_arguments_are_refused(name, more, says):
    with pytest.raises(UsageError, match=says):
        digits(name, **more)


def test_torchvision_is_imported_only_when_asked_for():
    code = (
        "import sys, torch, delock.nets as n\n"
        "n.atoms(n.build('mlp', classes=2, in_channels=1, image_size=2))\n"
        "sys.exit('torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# --- atoms ----------------------------------------------------------------------------------------------------------------------


def test_atoms_of_our_networks_are_stem_blocks_and_head():
    assert prefixes(digits("resnet8")) == ["conv1", "bn1", "relu", "layer1.0", "layer2.0", "layer3.0", "avgpool", "flatten", "fc"]
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert prefixes(digits("resnet18-cifar")) == ["conv1", "bn1", "relu", *blocks, "avgpool", "flatten", "fc"]
    convs = ["conv1_1", "pool1", "conv2_1", "pool2", "conv3_1", "conv3_2", "pool3", "conv4_1", "conv4_2", "conv5_1", "conv5_2"]
    assert prefixes(digits("vgg11")) == [*convs, "avgpool", "flatten", "fc"]  # 8 pixels are pooled three times
    assert prefixes(digits("mlp")) == ["flatten", "hidden1", "hidden2", "hidden3", "fc"]


def test_a_sequentials_children_are_atoms_and_only_children_are_looked_into():
    inner = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert prefixes(inner) == ["0", "1"]
    assert prefixes(nn.Sequential(nn.Sequential(OrderedDict(body=inner)))) == ["0.body.0", "0.body.1"]
    assert prefixes(nn.Sequential(nn.Linear(2, 2))) == ["0"]
    assert prefixes(nn.Sequential(nn.Linear(2, 2), Group(nn.ReLU(), Group(nn.ReLU(), nn.ReLU())))) == ["0", "1.0", "1.1.0", "1.1.1"]
    relu = nn.ReLU()
    assert prefixes(nn.Sequential(nn.Linear(2, 2), relu, nn.Linear(2, 2), relu)) == ["0", "1", "2", "3"]  # one ReLU used twice


def test_a_list_is_one_atom_per_element():
    parts = [nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 1)]
    assert prefixes(parts) == prefixes(tuple(parts)) == prefixes(nn.ModuleList(parts)) == ["0", "1"]
    assert prefixes([nn.Sequential(nn.Linear(2, 2), nn.ReLU())]) == ["0"]


class Reversed(nn.Sequential):
    """A Sequential that computes something else than its children in turn."""

    def forward(self, x):
        return through(reversed(list(self)), x)


class Loose(nn.Sequential):
    """A Sequential with a parameter of its own."""

    def __init__(self):
        super().__init__(nn.Linear(2, 2), nn.Linear(2, 2))
        self.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Linear(2, 2), "cannot cut a Linear .* accepted are an nn.Sequential .* list of modules .* torchvision ResNet"),
        (Reversed(nn.Linear(2, 2), nn.ReLU()), "cannot cut a Reversed"),
        ("resnet20", "cannot cut a str"),
        ([nn.Linear(2, 2), torch.relu], "cannot use a builtin_function_or_method as a layer"),
        ([], "empty network"),
        (nn.Sequential(), "empty network"),
        (Loose(), "scale of the Loose would belong to no stage"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(model, says):
    with pytest.raises(UsageError, match=says):
        atoms(model)


def test_an_overridden_sequential_inside_is_one_atom():
    assert prefixes(nn.Sequential(Reversed(nn.Linear(2, 2), nn.ReLU()))) == ["0"]


TORCHVISION = [name for name in MODELS if name.startswith("torchvision/")]


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_resnets_keep_their_names(name):
    with torch.device("meta"):
        model = MODELS[name](classes=10, in_channels=3)
    found = atoms(model)
    depth = [len(getattr(model, f"layer{i}")) for i in (1, 2, 3, 4)]
    blocks = [f"layer{i + 1}.{j}" for i, n in enumerate(depth) for j in range(n)]
    assert [a.prefix for a in found] == ["conv1", "bn1", "relu", "maxpool", *blocks, "avgpool", "", "fc"]
    names = [name for stage in stages(found, ["layer2.0", "layer3.1"]) for name in stage.original.values()]
    assert names == list(model.state_dict())


def test_a_torchvision_resnet_with_another_forward_is_refused():
    from torchvision.models.resnet import BasicBlock, ResNet

    class Features(ResNet):
        def forward(self, x):
            return self.conv1(x)

    class Same(ResNet):
        pass

    with torch.device("meta"):
        assert prefixes(Same(BasicBlock, [1, 1, 1, 1]))[4] == "layer1.0"
        with pytest.raises(UsageError, match="cannot cut a Features"):
            atoms(Features(BasicBlock, [1, 1, 1, 1]))


# --- cuts and stages ------------------------------------------------------------------------------------------------------------


def test_cuts_are_indices_or_names():
    found = atoms(digits("resnet8"))
    assert resolve_cuts(found, []) == []
    assert resolve_cuts(found, [1, "4", "layer3.0"]) == [1, 4, 5]
    assert resolve_cuts(found, ["layer2", "fc"]) == [4, 8]  # a group is its first atom
    named = [Atom("a", nn.ReLU()), Atom("3", nn.ReLU()), Atom("b", nn.ReLU()), Atom("c", nn.ReLU())]
    assert resolve_cuts(named, ["3"]) == [1]  # a name goes before a number


def test_the_splits_of_the_papers_can_be_written():
    blocks = atoms(build("resnet56", classes=10, in_channels=3, image_size=32))
    parts = stages(blocks, ["layer1.6", "layer2.4", "layer3.2"])  # [6 | 3+4 | 5+2 | 7]
    assert [sum(type(m).__name__ == "BasicBlock" for m in part) for part in parts] == [6, 7, 7, 7]


@pytest.mark.parametrize(
    ("cuts", "says"),
    [
        ([5, 3], r"cuts 5, 3 are out of order"),
        (["layer3.0", "layer2.0"], r"cuts layer3.0, layer2.0 are out of order \(layers \[5, 4\]\)"),
        ([4, 4], "out of order"),
        ([0], r"cut 0 is out of range: .* 1 \.\. 8"),
        ([9], "cut 9 is out of range"),
        (["-1"], "cut '-1' is out of range"),
        (["conv1"], "cut 'conv1' is out of range"),
        (["layer2.3"], "no layer is called 'layer2.3': did you mean 'layer2.0'"),
        ([""], "no layer is called ''"),
        (list(range(1, 10)), "10 stages need at least as many layers, and this network has 9"),
    ],
)
def test_bad_cuts_are_refused(cuts, says):
    found = atoms(digits("resnet8"))
    with pytest.raises(UsageError, match=says):
        resolve_cuts(found, cuts)
    with pytest.raises(UsageError, match=says):
        stages(found, cuts)


@pytest.mark.parametrize("name", [*SMALL, "torchvision/resnet18"])
def test_stages_compute_what_the_model_computes_and_join_to_its_state(name):
    model = digits(name)
    found = atoms(model)
    x = torch.randn(3, 1, 8, 8)
    whole = copy.deepcopy(model)
    expected = whole(x)
    parts = stages(found, [1, len(found) // 2, len(found) - 1])
    assert torch.equal(through(parts, x), expected)
    joined = join_state([part.original_state() for part in parts])
    assert list(joined) == list(model.state_dict())
    assert same_state(joined, whole.state_dict())  # batch statistics moved in both
    fresh = digits(name, seed=5)
    fresh.load_state_dict(joined)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_original_names_every_parameter_and_buffer_and_survives_pickling():
    model = nn.Sequential(OrderedDict(a=nn.Linear(2, 2), b=nn.Sequential(nn.BatchNorm1d(2), nn.ReLU())))
    model.b[0].register_buffer("scratch", torch.zeros(1), persistent=False)
    _, second = stages(atoms(model), [1])
    assert second.original == {
        "0.0.weight": "b.0.weight",
        "0.0.bias": "b.0.bias",
        "0.0.running_mean": "b.0.running_mean",
        "0.0.running_var": "b.0.running_var",
        "0.0.num_batches_tracked": "b.0.num_batches_tracked",
        "0.0.scratch": "b.0.scratch",
    }
    assert pickle.loads(pickle.dumps(second)).original == second.original
    assert second[0][0] is model.b[0]  # shared, not copied


def test_stages_pass_tuples_on():
    class Pair(nn.Module):
        def forward(self, x):
            a, b = x
            return a + b, a - b

    parts = stages(atoms([Pair(), Pair(), Pair()]), [1, 2])
    a, b = through(parts, (torch.tensor(3.0), torch.tensor(1.0)))
    assert (a, b) == (8.0, 4.0)


def test_joining_stages_of_different_models_is_refused():
    with pytest.raises(UsageError, match=r"stage 1 and a stage before it both hold 0\.weight"):
        join_state([{"0.weight": torch.ones(1)}, {"0.weight": torch.ones(1)}])


def tied(how):
    embed, head = nn.Embedding(5, 5), nn.Linear(5, 5, bias=False)
    head.weight = embed.weight if how == "parameter" else nn.Parameter(embed.weight.data)
    return nn.Sequential(OrderedDict(embed=embed, mid=nn.Linear(5, 5), head=head))


@pytest.mark.parametrize("how", ["parameter", "memory"])
def test_tied_weights_across_a_cut_are_refused_by_name(how):
    found = atoms(tied(how))
    with pytest.raises(UsageError, match=r"embed\.weight \(stage 0\) and head\.weight \(stage 1\) are the same tensor: cut so"):
        stages(found, [2])
    with pytest.raises(UsageError, match=r"embed\.weight \(stage 0\) and head\.weight \(stage 2\)"):
        stages(found, [1, 2])


def test_a_module_in_two_stages_is_refused_if_it_has_state_and_allowed_within_one():
    linear, norm, relu = nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False), nn.ReLU()
    with pytest.raises(UsageError, match=r"0\.weight \(stage 0\) and 1\.weight \(stage 1\)"):
        stages(atoms([linear, linear]), [1])
    with pytest.raises(UsageError, match=r"1\.running_mean \(stage 0\) and 2\.running_mean \(stage 1\)"):
        stages(atoms([linear, norm, norm]), [2])
    with torch.device("meta"):
        unmade = nn.Linear(2, 2)
        stages(atoms([unmade, nn.Linear(2, 2)]), [1])  # no address yet, and still told apart
    with pytest.raises(UsageError, match="same tensor"):
        stages(atoms([unmade, unmade]), [1])
    x = torch.randn(3, 2)
    first, second = stages(atoms(nn.Sequential(linear, relu, linear, relu)), [3])
    assert torch.equal(second(first(x)), linear(linear(x).relu()).relu())
    assert set(first.original.values()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_has_batch_norm():
    assert has_batch_norm(digits("resnet8"))
    assert has_batch_norm(stages(atoms(digits("cnn")), [1])[0])
    assert not has_batch_norm(digits("mlp"))
    assert not has_batch_norm(nn.Sequential(nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.InstanceNorm2d(2)))


@pytest.mark.parametrize(("name", "K"), [("resnet1202", 4), ("wrn-28-10", 2)])
def test_the_deepest_and_the_widest_network_build_split_and_run(name, K):
    model = digits(name)
    found = atoms(model)
    params = [sum(p.numel() for p in atom.module.parameters()) for atom in found]
    parts = stages(found, balance([float(p) for p in params], K, params))
    assert len(parts) == K
    with torch.no_grad():  # in training mode: before any statistics are gathered, 600 residual blocks overflow in eval mode
        assert through(parts, torch.randn(3, 1, 8, 8)).isfinite().all()
    assert [n for part in parts for n in part.original.values()] == list(model.state_dict())


# --- costs ----------------------------------------------------------------------------------------------------------------------


def test_measuring_counts_and_leaves_everything_as_it_was():
    model = build("cnn", classes=10, in_channels=1, image_size=8, dropout=0.5).eval()
    found, x = atoms(model), torch.randn(4, 1, 8, 8)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    costs = measure(found, x, torch.arange(4), cross_entropy, repeats=1)
    assert same_state(before, model.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert [c.params for c in costs] == [sum(p.numel() for p in a.module.parameters()) for a in found]
    assert [c.out_bytes for c in costs] == [4 * 4 * n for n in (32 * 64, 64 * 16, 64 * 16, 128 * 4, 128 * 4, 128, 128, 10)]
    assert all(c.forward_s > 0 and c.backward_s > 0 for c in costs)
    assert costs[0].total_s == costs[0].forward_s + costs[0].backward_s


def test_measured_time_follows_the_work():
    found = atoms([nn.Linear(400, 400), nn.Linear(400, 20), nn.Linear(20, 1)])
    costs = measure(found, torch.randn(400, 400), torch.zeros(400, 1), nn.functional.mse_loss, repeats=5)
    assert costs[0].total_s > costs[2].total_s
    assert costs[1].out_bytes == 400 * 20 * 4


def test_the_median_of_the_repeats_is_taken(monkeypatch):
    clock = itertools.accumulate([0, 1, 0, 2, 0, 9, 0, 3, 0, 5, 0, 7])  # (forward, backward) = (1, 2), (9, 3), (5, 7)
    fake = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(sys.modules["delock.nets.measure"], "time", fake)  # the package's `measure` is the function
    (cost,) = measure(atoms([nn.Linear(2, 1)]), torch.ones(3, 2), torch.ones(3, 1), nn.functional.mse_loss, repeats=3)
    expected = AtomCost(forward_s=5, backward_s=3, out_bytes=12, params=3, shape=(1,), outputs=(((3, 1), torch.float32),))
    assert replace(cost, memory=None) == expected


class Tokens(nn.Module):
    """(tokens, mask) -> (embedded, mask): integers and booleans in, one floating and one boolean tensor out."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)

    def forward(self, x):
        tokens, mask = x
        return self.embed(tokens), mask


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.seen = []

    def forward(self, x):
        h, mask = x
        assert h.requires_grad
        assert not mask.requires_grad
        return self.linear(h) * mask[..., None], mask


def test_integers_tuples_and_pytrees_of_targets_are_measured():
    found = atoms([Tokens(), Mix(), Mix()])
    tokens, mask = torch.randint(0, 11, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    targets = {"y": torch.zeros(2, 5, 8), "weights": [torch.ones(2, 5)]}

    def loss(out, targets):
        return ((out[0] - targets["y"]).square().mean(-1) * targets["weights"][0]).sum()

    costs = measure(found, (tokens, mask), targets, loss)
    assert [c.out_bytes for c in costs] == [2 * 5 * 8 * 4 + 10] * 3
    assert all(c.backward_s > 0 for c in costs)


def test_what_does_not_learn_has_no_backward_and_in_place_atoms_are_served():
    frozen = nn.Linear(4, 4).requires_grad_(False)
    x = torch.randn(2, 4)
    kept = x.clone()
    costs = measure(atoms([nn.ReLU(inplace=True), frozen, nn.Linear(4, 4), nn.ReLU(inplace=True)]), x, kept, nn.functional.mse_loss)
    assert [c.backward_s > 0 for c in costs] == [False, False, True, True]
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ([nn.Linear(3, 3), nn.Linear(4, 4)], r"layer 1 \(1\), or the loss behind it, does not take its input \(2, 3\) float32: .*mat1"),
        ([nn.LSTM(3, 3), nn.Linear(3, 3)], r"a LSTM returns a tuple, and only a tensor or a tuple of tensors can go from layer to layer"),
        ([nn.Conv2d(1, 1, 3), nn.Flatten()], r"layer 0 \(0\) does not take its input \(2, 3\) float32"),
    ],
)
def test_an_atom_that_does_not_fit_is_named(model, says):
    with pytest.raises(UsageError, match=says):
        measure(atoms(model), torch.randn(2, 3), torch.randn(2, 3), nn.functional.mse_loss)


# --- balance --------------------------------------------------------------------------------------------------------------------


def parts_of(values, cuts):
    return [values[a:b] for a, b in itertools.pairwise([0, *cuts, len(values)])]


def by_hand(costs, K, params):
    """The best over all cuts, by trying them all."""

    def value(cuts):
        sums = [sum(part) for part in parts_of(costs, cuts)]
        bare = sum(not any(part) for part in parts_of(params, cuts))
        return bare, max(sums), sum(s * s for s in sums)

    return min(value(cuts) for cuts in itertools.combinations(range(1, len(costs)), K - 1)), value


def test_balance_is_exact():
    draw = random.Random(0)
    for _ in range(150):
        n = draw.randint(1, 9)
        K = draw.randint(1, n)
        costs = [float(draw.choice([0, 1, 2, 3, 5, 8, 20])) for _ in range(n)]
        params = [draw.choice([0, 0, 7]) for _ in range(n)]
        for given, counted in ((None, [1] * n), (params, params)):
            best, value = by_hand(costs, K, counted)
            cuts = balance(costs, K, given)
            assert cuts == balance(costs, K, given)
            assert value(cuts) == best, (costs, K, given)


def test_balance_known_cases():
    assert balance([1, 1, 1, 1], 1) == []
    assert balance([1, 1, 1, 1], 2) == [2]
    assert balance([1, 1, 1, 1], 4) == [1, 2, 3]
    assert balance([10, 1, 1, 1, 1], 3) == [1, 3]  # the largest stage is settled: the others are evened out
    assert balance([1, 9, 9], 2) == [2]
    assert balance([5, 5, 9], 2, [1, 1, 0]) == [1]  # better a dearer stage than one that has nothing to learn
    assert balance([5, 5, 9], 3, [1, 1, 0]) == [1, 2]  # legal where it cannot be helped
    assert balance([3, 3], 2, [0, 0]) == [1]
    assert balance([1, 1, 1], 2) == [1]  # a tie: the earlier cut


@pytest.mark.parametrize("K", [0, 4])
def test_balance_refuses_an_impossible_number_of_stages(K):
    with pytest.raises(UsageError, match=f"cannot make {K} stages of 3 layers: use 1 to 3 stages"):
        balance([1, 1, 1], K)
