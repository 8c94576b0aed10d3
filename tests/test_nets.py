"""Networks: what they can be cut into, and that a cut network is still the same network."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

from delock.errors import UsageError
from delock.nets import MODELS, build
from delock.nets.group import Group
from delock.partition.balance import balance
from delock.partition.layers import Layer, has_batch_norm, layers
from delock.partition.stages import join_state, resolve_cuts, stages

from harness import same_state
from workloads import SMALL, digits

pytestmark = pytest.mark.usefixtures("own_random")


def prefixes(model):
    return [layer.prefix for layer in layers(model)]


def through(parts, x):
    for part in parts:
        x = part(x)
    return x


# --- atoms ----------------------------------------------------------------------------------------------------------------------


def test_atoms_of_our_networks_are_stem_blocks_and_head():
    assert prefixes(digits("resnet8")) == ["conv1", "bn1", "relu", "layer1.0", "layer2.0", "layer3.0", "avgpool", "flatten", "fc"]
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert prefixes(digits("resnet18-cifar")) == ["conv1", "bn1", "relu", *blocks, "avgpool", "flatten", "fc"]
    convs = ["conv1_1", "pool1", "conv2_1", "pool2", "conv3_1", "conv3_2", "pool3", "conv4_1", "conv4_2", "conv5_1", "conv5_2"]
    assert prefixes(digits("vgg11")) == [*convs, "avgpool", "flatten", "fc"]  # 8 pixels are pooled three times
    assert prefixes(digits("mlp")) == ["flatten", "hidden1", "hidden2", "hidden3", "fc"]


@pytest.mark.usefixtures("own_random")
def test_a_sequentials_children_are_atoms_and_only_children_are_looked_into():
    inner = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert prefixes(inner) == ["0", "1"]
    assert prefixes(nn.Sequential(nn.Sequential(OrderedDict(body=inner)))) == ["0.body.0", "0.body.1"]
    assert prefixes(nn.Sequential(nn.Linear(2, 2))) == ["0"]
    assert prefixes(nn.Sequential(nn.Linear(2, 2), Group(nn.ReLU(), Group(nn.ReLU(), nn.ReLU())))) == ["0", "1.0", "1.1.0", "1.1.1"]
    relu = nn.ReLU()
    assert prefixes(nn.Sequential(nn.Linear(2, 2), relu, nn.Linear(2, 2), relu)) == ["0", "1", "2", "3"]  # one ReLU used twice


@pytest.mark.usefixtures("own_random")
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
        (nn.Linear(2, 2), "cannot cut a Linear .* a model is a module, or a list of modules"),
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
        layers(model)


@pytest.mark.usefixtures("own_random")
def test_an_overridden_sequential_inside_is_one_atom():
    assert prefixes(nn.Sequential(Reversed(nn.Linear(2, 2), nn.ReLU()))) == ["0"]


TORCHVISION = [name for name in MODELS if name.startswith("torchvision/")]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if i % 3 else []) for i, name in enumerate(TORCHVISION)])
def test_torchvision_resnets_keep_their_names(name):
    with torch.device("meta"):
        model = MODELS[name](classes=10, in_channels=3)
    found = layers(model)
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
            layers(Features(BasicBlock, [1, 1, 1, 1]))


# --- cuts and stages ------------------------------------------------------------------------------------------------------------


def test_cuts_are_indices_or_names():
    found = layers(digits("resnet8"))
    assert resolve_cuts(found, []) == []
    assert resolve_cuts(found, [1, "4", "layer3.0"]) == [1, 4, 5]
    assert resolve_cuts(found, ["layer2", "fc"]) == [4, 8]  # a group is its first atom
    named = [Layer("a", nn.ReLU()), Layer("3", nn.ReLU()), Layer("b", nn.ReLU()), Layer("c", nn.ReLU())]
    assert resolve_cuts(named, ["3"]) == [1]  # a name goes before a number


def test_the_splits_of_the_papers_can_be_written():
    blocks = layers(build("resnet56", classes=10, in_channels=3, image_size=32))
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
    found = layers(digits("resnet8"))
    with pytest.raises(UsageError, match=says):
        resolve_cuts(found, cuts)
    with pytest.raises(UsageError, match=says):
        stages(found, cuts)


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("name", [*SMALL, "torchvision/resnet18"])
def test_stages_compute_what_the_model_computes_and_join_to_its_state(name):
    model = digits(name)
    found = layers(model)
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


@pytest.mark.usefixtures("own_random")
def test_original_names_every_parameter_and_buffer_and_survives_pickling():
    model = nn.Sequential(OrderedDict(a=nn.Linear(2, 2), b=nn.Sequential(nn.BatchNorm1d(2), nn.ReLU())))
    model.b[0].register_buffer("scratch", torch.zeros(1), persistent=False)
    _, second = stages(layers(model), [1])
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

    parts = stages(layers([Pair(), Pair(), Pair()]), [1, 2])
    a, b = through(parts, (torch.tensor(3.0), torch.tensor(1.0)))
    assert (a, b) == (8.0, 4.0)


def test_joining_stages_of_different_models_is_refused():
    with pytest.raises(UsageError, match=r"stage 1 and a stage before it both hold 0\.weight"):
        join_state([{"0.weight": torch.ones(1)}, {"0.weight": torch.ones(1)}])


def tied(how):
    embed, head = nn.Embedding(5, 5), nn.Linear(5, 5, bias=False)
    head.weight = embed.weight if how == "parameter" else nn.Parameter(embed.weight.data)
    return nn.Sequential(OrderedDict(embed=embed, mid=nn.Linear(5, 5), head=head))


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("how", ["parameter", "memory"])
def test_tied_weights_across_a_cut_are_refused_by_name(how):
    found = layers(tied(how))
    with pytest.raises(UsageError, match=r"embed\.weight \(stage 0\) and head\.weight \(stage 1\) are the same tensor: cut so"):
        stages(found, [2])
    with pytest.raises(UsageError, match=r"embed\.weight \(stage 0\) and head\.weight \(stage 2\)"):
        stages(found, [1, 2])


@pytest.mark.usefixtures("own_random")
def test_a_module_in_two_stages_is_refused_if_it_has_state_and_allowed_within_one():
    linear, norm, relu = nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False), nn.ReLU()
    with pytest.raises(UsageError, match=r"0\.weight \(stage 0\) and 1\.weight \(stage 1\)"):
        stages(layers([linear, linear]), [1])
    with pytest.raises(UsageError, match=r"1\.running_mean \(stage 0\) and 2\.running_mean \(stage 1\)"):
        stages(layers([linear, norm, norm]), [2])
    with torch.device("meta"):
        unmade = nn.Linear(2, 2)
        stages(layers([unmade, nn.Linear(2, 2)]), [1])  # no address yet, and still told apart
    with pytest.raises(UsageError, match="same tensor"):
        stages(layers([unmade, unmade]), [1])
    x = torch.randn(3, 2)
    first, second = stages(layers(nn.Sequential(linear, relu, linear, relu)), [3])
    assert torch.equal(second(first(x)), linear(linear(x).relu()).relu())
    assert set(first.original.values()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_has_batch_norm():
    assert has_batch_norm(layers(digits("resnet8")))
    assert has_batch_norm(layers(digits("cnn"))[:1])
    assert not has_batch_norm(layers(digits("mlp")))
    assert not has_batch_norm(layers(nn.Sequential(nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.InstanceNorm2d(2))))
    fixed = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
    assert not has_batch_norm(layers(fixed))
    assert has_batch_norm(layers(fixed.eval()))  # all of it is trained


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(("name", "K"), [("resnet1202", 4), ("wrn-28-10", 2)])
def test_the_deepest_and_the_widest_network_build_split_and_run(name, K):
    model = digits(name)
    found = layers(model)
    params = [sum(p.numel() for p in layer.module.parameters()) for layer in found]
    parts = stages(found, balance([float(p) for p in params], K, params))
    assert len(parts) == K
    with torch.no_grad():  # in training mode: before any statistics are gathered, 600 residual blocks overflow in eval mode
        assert through(parts, torch.randn(3, 1, 8, 8)).isfinite().all()
    assert [n for part in parts for n in part.original.values()] == list(model.state_dict())
