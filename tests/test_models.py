"""Models: sizes, names and weights are those of the papers, and every one learns."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from delock.errors import UsageError
from delock.nets import MODELS, build
from delock.partition.layers import layers
from delock.partition.stages import stages

from harness import enough, same_state
from workloads import SMALL, digits

pytestmark = pytest.mark.usefixtures("own_random")

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


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(
    ("name", "channels", "size"),
    enough(((name, *image) for name in (*SMALL, "torchvision/resnet18") for image in ((1, 8), (3, 32))), together=1),
)
def test_every_model_takes_digits_and_cifar_and_every_parameter_learns(name, channels, size):
    model = build(name, classes=7, in_channels=channels, image_size=size)
    out = model(torch.randn(4, channels, size, size))  # of two samples a batch norm on 1 x 1 pixels makes 1 and -1, whatever they are
    assert out.shape == (4, 7)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.usefixtures("own_random")
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


@pytest.mark.usefixtures("own_random")
def test_option_a_shortcut_is_the_image_between_zeros():
    block = digits("resnet8").layer2[0]
    x = torch.randn(2, 16, 8, 8)
    out = block.shortcut(x)
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].abs().sum() == out[:, 24:].abs().sum() == 0
    assert torch.equal(digits("resnet8").layer1[0].shortcut(x), x)


@pytest.mark.usefixtures("own_random")
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


@pytest.mark.usefixtures("own_random")
def test_the_pools_of_the_plain_networks_halve_the_image_where_the_width_changes():
    def sides(name, size):
        h, seen = torch.randn(4, 3, size, size), []
        for layer in layers(build(name, classes=10, in_channels=3, image_size=size)):
            h = layer.module(h)
            if layer.prefix.startswith("conv"):
                seen.append(tuple(h.shape[1:3]))
        return seen

    assert sides("dgl-cnn6-quarter", 32) == [(32, 32), (32, 32), (64, 16), (64, 16), (128, 8), (128, 8)]
    assert sides("dgl-cnn6-quarter", 3) == [(32, 3), (32, 3), (64, 1), (64, 1), (128, 1), (128, 1)]
    assert sides("vgg11", 32) == [(64, 32), (128, 16), (256, 8), (256, 8), (512, 4), (512, 4), (512, 2), (512, 2)]
    assert [side for _, side in sides("vgg11", 28)] == [28, 14, 7, 7, 3, 3, 1, 1]  # and no pool is left over for one pixel


def test_the_cuts_of_the_buffer_study_give_one_convolution_to_each_stage():
    found = layers(digits("dgl-cnn6-quarter"))
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
        "import sys, torch, delock.nets as n\nfrom delock.partition.layers import layers\n"
        "layers(n.build('mlp', classes=2, in_channels=1, image_size=2))\n"
        "sys.exit('torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
