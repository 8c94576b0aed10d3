"""Auxiliary heads: what they compute, what they hold, where they fit, and what they cost beside their stage."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delock.errors import UsageError
from delock.nets import build
from delock.nets.heads import HEADS, HeadShare, build_head, choose, flops, head_share

pytestmark = pytest.mark.usefixtures("own_random")

STRING = "conv128-bn-conv64-bn-pool-fc"
IMAGE = ["mlp-sr", "mlp", "cnn", STRING, "conv5-conv3-bn-pool-fc"]


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- what they hold -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "side", "published"),
    [
        ("mlp-sr", 128, 32, 846_346),
        ("mlp-sr", 256, 16, 3_363_850),
        ("mlp-sr", 512, 8, 13_412_362),
        ("cnn", 128, 32, 300_810),
        ("cnn", 256, 16, 1_191_434),
        ("cnn", 512, 8, 4_742_154),
    ],
)
def test_number_of_parameters_is_the_published_one_less_what_is_never_used(name, channels, side, published):
    unused = 2 * channels if name == "mlp-sr" else 0  # a BN(C) that the released code registers and never calls
    assert parameters(build_head(name, (channels, side, side), 10)) == published - unused


@pytest.mark.parametrize(
    ("name", "sides", "pixels"),
    [
        ("cnn", (8, 8), 4),
        ("cnn", (2, 2), 4),
        ("cnn", (1, 1), 1),
        ("cnn", (1, 9), 2),
        ("mlp", (8, 8), 4),
        ("mlp", (5, 5), 4),
        ("mlp", (4, 4), 1),
        ("mlp", (1, 1), 1),
        ("mlp", (4, 5), 2),
        ("mlp-sr", (32, 32), 4),
        ("mlp-sr", (4, 4), 1),
        ("mlp-sr", (32, 3), 2),
    ],
)
def test_a_pool_never_enlarges_and_each_side_is_its_own(name, sides, pixels):
    head = build_head(name, (6, *sides), 3)
    assert head.fc.in_features == 6 * pixels
    assert head(draw(4, 6, *sides)).shape == (4, 3)


def test_a_conv_string_is_read_word_by_word():
    def kinds(name: str) -> list[str]:
        return [str(m).split("(")[0] for m in build_head(name, (3, 8, 8), 10).modules() if not isinstance(m, nn.Sequential)]

    end = ["AdaptiveAvgPool2d", "Flatten", "Linear"]
    assert kinds(STRING) == ["Conv2d", "BatchNorm2d", "ReLU"] * 2 + end
    assert kinds("conv7-pool-fc") == ["Conv2d", "ReLU", *end]
    assert kinds("conv4-conv2-bn-pool-fc") == ["Conv2d", "ReLU", "Conv2d", "BatchNorm2d", "ReLU", *end]
    first, second = (m for m in build_head(STRING, (3, 8, 8), 10).modules() if isinstance(m, nn.Conv2d))
    assert (first.in_channels, first.out_channels, second.in_channels, second.out_channels) == (3, 128, 128, 64)
    assert first.kernel_size == (3, 3)
    assert first.padding == (1, 1)
    assert first.bias is not None


@pytest.mark.parametrize("name", IMAGE)
@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 1, 1), (5, 7, 10)])
def test_an_image_head_passes_an_error_back_and_does_not_write_on_its_input(name, shape):
    x = draw(8, *shape).requires_grad_()
    before = x.detach().clone()
    out = build_head(name, shape, 10)(x)
    (out * draw(8, 10, seed=1)).sum().backward()
    assert torch.equal(x.detach(), before)
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_every_parameter_gets_a_gradient():
    for name, shape in [*((name, (6, 8, 8)) for name in IMAGE), ("transformer", (5, 6)), ("linear", (6,))]:
        head = build_head(name, shape, 10)
        out = head(draw(8, *shape))
        (out * draw(*out.shape, seed=1)).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters()), name


# --- what they compute ----------------------------------------------------------------------------------------------------------


class Written:
    """A head's parameters in the order of its layers, used up by the table of the specification, line by line."""

    def __init__(self, head: nn.Module) -> None:
        self.left = [p.detach() for p in head.parameters()]

    def take(self, count: int) -> list[Tensor]:
        taken, self.left = self.left[:count], self.left[count:]
        return taken

    def bn(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, *self.take(2), training=True)

    def mlp(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for _ in range(3):
            x = F.relu(self.bn(F.linear(x, *self.take(2))))
        return F.linear(x, *self.take(2))


@pytest.mark.parametrize("name", ["mlp-sr", "mlp", "cnn", STRING])
def test_an_image_head_computes_what_the_table_says(name):
    x, head = draw(4, 6, 16, 16), build_head(name, (6, 16, 16), 10)
    written = Written(head)
    if name == "mlp":
        expected = written.mlp(F.avg_pool2d(x, 8))  # 4 x 4, then 2 x 2
    elif name == "mlp-sr":
        h = F.avg_pool2d(x, 4)
        for _ in range(3):
            h = F.relu(written.bn(F.conv2d(h, *written.take(1))))
        expected = written.mlp(F.avg_pool2d(h, 2))
    elif name == "cnn":
        h = x
        for _ in range(2):
            h = F.relu(written.bn(F.conv2d(h, *written.take(1), padding=1)))
        expected = F.linear(written.bn(F.avg_pool2d(h, 8)).flatten(1), *written.take(2))
    else:
        h = x
        for _ in range(2):
            h = F.relu(written.bn(F.conv2d(h, *written.take(2), padding=1)))
        expected = F.linear(h.mean((2, 3)), *written.take(2))
    assert not written.left
    torch.testing.assert_close(head(x), expected)


def test_the_transformer_head_predicts_at_every_place():
    head, x = build_head("transformer", (5, 8), 11), draw(2, 5, 8)
    assert torch.equal(head(x), F.linear(F.layer_norm(x, (8,)), head.fc.weight))
    assert head(x[:, :3]).shape == (2, 3, 11)  # any length
    assert head.fc.bias is None
    wide = build_head("transformer", (5, 512), 1000)
    assert wide.fc.weight.std().item() == pytest.approx(0.02, rel=0.01)
    loss = F.cross_entropy(wide(draw(4, 5, 512)).flatten(0, 1), torch.arange(20))
    assert loss.item() == pytest.approx(math.log(1000), rel=0.1)  # nearly uniform


def test_the_linear_head():
    head, x = build_head("linear", (8,), 3), draw(2, 8)
    assert torch.equal(head(x), F.linear(x, head.fc.weight, head.fc.bias))


# --- which fits, and with which weights -----------------------------------------------------------------------------------------


def test_the_default_is_chosen_from_the_shape():
    assert choose((16, 8, 8)) == choose(torch.Size([16, 1, 3])) == "mlp-sr"
    assert choose((128, 64)) == "transformer"
    assert choose([256]) == "linear"
    assert choose((4, 8, 8, 8)) == "volume"


@pytest.mark.parametrize(
    ("name", "shape", "classes", "says"),
    [
        ("cnn", (128, 64), 10, r"head cnn takes images \(C, H, W\) and does not fit .* shape \(128, 64\): use transformer"),
        (STRING, (64,), 10, r"does not fit a stage whose output has the shape \(64,\): use linear"),
        ("transformer", (64, 8, 8), 10, rf"takes sequences \(T, C\) .*: use mlp-sr or mlp or cnn or tokens or pixels or {STRING}"),
        ("linear", (64, 8), 10, r"takes vectors \(C,\) .*: use transformer or tokens or pixels"),
        ("mlp-sr", (4, 4, 4, 4), 10, r"takes images \(C, H, W\) .*: use volume or pixels"),
        ("mlp-sr", (4, 4, 4, 4, 4), 10, r"no head fits .* \(4, 4, 4, 4, 4\).*cut elsewhere, or give a head of your own"),
        ("linear", (), 10, r"no head fits .* shape \(\)"),
        ("mlp_sr", (8, 8, 8), 10, r"no head is called 'mlp_sr': did you mean 'mlp-sr'"),
        ("conv128-bm-pool-fc", (8, 8, 8), 10, rf"no head is called 'conv128-bm-pool-fc': did you mean '{STRING}'"),
        ("conv8-bn-bn-pool-fc", (8, 8, 8), 10, "no head is called"),
        ("bn-conv8-pool-fc", (8, 8, 8), 10, "no head is called"),
        ("conv0-pool-fc", (8, 8, 8), 10, "no head is called"),
        ("conv8-pool", (8, 8, 8), 10, "no head is called"),
        ("pool-fc", (8, 8, 8), 10, "no head is called"),
        ("qqq", (8, 8, 8), 10, rf"there are {', '.join(HEADS)}, and strings like {STRING}"),
        ("cnn", (8, 0, 8), 10, r"sizes of at least 1, not an output of shape \(8, 0, 8\) and 10 classes"),
        ("cnn", (8, 8, 8), 0, "sizes of at least 1"),
    ],
)
def test_a_head_that_cannot_be_is_refused(name, shape, classes, says):
    with pytest.raises(UsageError, match=says):
        build_head(name, shape, classes)


def test_no_default_for_a_shape_that_nothing_fits():
    with pytest.raises(UsageError, match="no head fits"):
        choose((1, 2, 3, 4, 5))


@pytest.mark.parametrize(("name", "shape"), [*((name, (4, 6, 6)) for name in IMAGE), ("transformer", (5, 4)), ("linear", (4,))])
def test_weights_are_a_function_of_the_seed_and_global_random_state_is_untouched(name, shape):
    before = torch.get_rng_state()
    one, same, other = (build_head(name, shape, 3, seed=seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


# --- what they cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_random")
def test_multiply_adds_are_those_counted_by_hand():
    assert flops(nn.Linear(3, 5), (3,)) == 15
    assert flops(nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2), (4, 8, 8)) == 16 * 9 * (4 // 2) * 6
    assert flops(build_head("mlp-sr", (8, 32, 32), 10), (8, 32, 32)) == 3 * 64 * 8**2 + 3 * 32**2 + 32 * 10
    assert flops(build_head("cnn", (8, 16, 16), 10), (8, 16, 16)) == 2 * 256 * 9 * 8**2 + 32 * 10
    assert flops(build_head("transformer", (7, 8), 11), (7, 8)) == 7 * 8 * 11
    assert flops(nn.ReLU(), (3,)) == 0
    assert flops(nn.Linear(3, 5).double(), (3,)) == 15
    assert flops(build("resnet20", classes=10, in_channels=3, image_size=32), (3, 32, 32)) == 40_551_040  # 0.04 G, option A


class Attention(nn.Module):
    """One causal head of width 8 on tokens, plus the same from torch's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(11, 8), nn.Linear(8, 24)
        self.multi = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        tokens, mask = inputs
        q, k, v = self.qkv(self.embed(tokens))[:, None].chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0] * mask[..., None]
        return self.multi(h, h, h, need_weights=False)[0]


@pytest.mark.usefixtures("own_random")
def test_attention_and_inputs_that_are_tuples_of_integers_are_counted():
    stage, head = Attention(), build_head("transformer", (6, 8), 11)
    share = head_share(stage, head, (torch.zeros(3, 6, dtype=torch.long), torch.ones(3, 6, dtype=torch.bool)))
    attention = 2 * 6 * 6 * 8  # every query with every key, every weight with every value
    assert share.stage_flops == 2 * (6 * 8 * 24 + attention) + 6 * 8 * 8
    assert share.head_flops == 6 * 8 * 11


@pytest.mark.usefixtures("own_random")
def test_the_share_of_a_head():
    stage = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Dropout(0.5))
    head = build_head("cnn", (16, 8, 8), 10)
    states, x = copy.deepcopy((stage.state_dict(), head.state_dict())), draw(4, 3, 8, 8)
    kept, random = x.clone(), torch.get_rng_state()
    share = head_share(stage, head, x)
    assert share.head_flops == flops(head, (16, 8, 8))
    assert share.stage_flops == 64 * 9 * 3 * 16
    assert (share.head_params, share.stage_params) == (parameters(head), 3 * 9 * 16 + 16 + 32)
    assert share.flops == share.head_flops / share.stage_flops
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), random)
    assert stage.training
    assert head.training
    for module, state in zip((stage, head), states, strict=True):
        assert all(torch.equal(module.state_dict()[key], state[key]) for key in state)


def test_the_share_is_printed_and_infinite_beside_nothing():
    assert str(HeadShare(5, 200, 300, 400)) == "2.5% of its stage's multiply-adds, 75.0% of its parameters"
    nothing = head_share(nn.Flatten(), build_head("linear", (12,), 2), draw(2, 3, 2, 2))
    assert nothing.flops == nothing.params == math.inf


def test_the_default_head_keeps_to_the_design_rule_on_the_networks_it_was_made_for():
    first = build("dgl-cnn6", classes=10, in_channels=3, image_size=32)[:2]  # conv1, conv2: 128 channels, 32 pixels
    assert head_share(first, build_head("mlp-sr", (128, 32, 32), 10), draw(1, 3, 32, 32)).flops < 0.05


@pytest.mark.usefixtures("own_random")
def test_a_head_of_ones_own_that_does_not_take_the_output_is_refused():
    with pytest.raises(UsageError, match=r"the head does not take the output of its stage, of shape \(4, 8, 8\) without the batch: .*"):
        head_share(nn.Conv2d(3, 4, 3, padding=1), nn.Linear(5, 2), draw(2, 3, 8, 8))
