"""timm's convolutional networks and transformers: its smallest models, or its own classes with narrow settings."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from specimens import ADAMW, CLASSES, SGD, SLOW, Specimen, images

small, large = partial(images, size=16), partial(images, size=64)
GRID = {"img_size": 16, "patch_size": 4, "embed_dim": 16}


def timm(name: str, **settings: Any) -> nn.Module:
    from timm import create_model

    return create_model(name, num_classes=CLASSES, **settings)


def regnet() -> nn.Module:
    from timm.models.regnet import RegNet, RegNetCfg

    return RegNet(RegNetCfg(depth=4, w0=8, wa=12.0, wm=1.5, group_size=8, se_ratio=0.25, stem_width=8), num_classes=CLASSES)


def dla() -> nn.Module:
    """Trees of blocks, in which a node joins the outputs of several."""
    from timm.models.dla import DLA, DlaBasic

    return DLA((1, 1, 1, 2, 2, 1), (4, 8, 8, 16, 16, 24), num_classes=CLASSES, block=DlaBasic)


def dpn() -> nn.Module:
    """Blocks that hand on a pair of tensors."""
    from timm.models.dpn import DPN

    return DPN((1, 1, 2, 1), (2, 4, 4, 8), 8, 4, num_classes=CLASSES, num_init_features=8, small=True)


def mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(CLASSES, 16, patch_size=4, num_blocks=4, embed_dim=16)


def conv(name: str, model: Any = "", optimizer: Any = SGD, batch: Any = images, **settings: Any) -> Specimen:
    make = model if callable(model) else partial(timm, model or name, **settings)
    return Specimen(f"timm {name}", "timm convolutional", make, batch, options={"optimizer": optimizer})


def vit(name: str, model: Any = "", batch: Any = small, **settings: Any) -> Specimen:
    make = model if callable(model) else partial(timm, model or name, **settings)
    return Specimen(f"timm {name}", "timm transformer", make, batch, options={"optimizer": ADAMW})


SPECIMENS = (
    conv("test_resnet"),
    conv("test_efficientnet", batch=large),
    conv("test_efficientnet_evos", optimizer=SLOW),
    conv("test_byobnet"),
    conv("test_convnext"),
    conv("test_nfnet"),
    conv("test_mambaout"),
    conv("regnet", regnet, batch=large),
    conv("dla", dla, SLOW, large),
    conv("dpn", dpn, SLOW),
    conv("ghostnet", "ghostnet_050", SLOW, drop_rate=0.0),
    conv("res2net", "res2net50_26w_4s", layers=(1, 1, 1, 1), channels=(8, 16, 24, 32)),
    vit("test_vit", batch=images, img_size=32),
    vit("test_vit2", batch=images, img_size=32),
    vit("deit distilled", "deit_tiny_distilled_patch16_224", depth=4, num_heads=2, **GRID),
    vit("beit", "beit_base_patch16_224", depth=3, num_heads=2, **GRID),
    vit(
        "swin",
        "swin_tiny_patch4_window7_224",
        depths=(2, 2),
        num_heads=(2, 2),
        window_size=2,
        drop_path_rate=0.0,
        **{**GRID, "patch_size": 2},
    ),
    vit("mixer", mixer),
    vit("cait", "cait_xxs24_224", depth=3, num_heads=2, **GRID),
    vit("xcit", "xcit_nano_12_p16_224", depth=3, num_heads=2, **{**GRID, "patch_size": 8}),
    vit("pvt_v2", "pvt_v2_b0", images, depths=(1, 1, 1, 1), embed_dims=(8, 16, 16, 16), num_heads=(1, 2, 2, 2)),
    vit("eva rotary", "eva02_tiny_patch14_224", depth=2, num_heads=2, **{**GRID, "embed_dim": 24}),
)
