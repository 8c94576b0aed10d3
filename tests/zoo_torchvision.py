"""torchvision's classification and segmentation networks, made narrow by their own arguments."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision import models
from torchvision.models import segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.models.vgg import make_layers

from specimens import CLASSES, SGD, SLOW, Specimen, images, of_scenes, scenes, with_auxiliary

small = partial(images, size=16)


class Wrapped(nn.Module):
    """A network inside a user's own module, which normalises images first."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Any) -> Any:
        return self.net((x - 0.1) / 1.5)


def resnet(block: Any = BasicBlock) -> nn.Module:
    return models.ResNet(block, [1, 1, 1, 1], num_classes=CLASSES, width_per_group=8 if block is Bottleneck else 64)


def mobilenet_v2() -> nn.Module:
    return models.MobileNetV2(CLASSES, 0.25, [[1, 8, 1, 1], [6, 16, 2, 2], [6, 24, 2, 2]], dropout=0.0)


def blocks_v3() -> list[InvertedResidualConfig]:
    rows = [(8, 3, 16, 8, False, "RE", 1, 1), (8, 3, 16, 16, True, "HS", 2, 1), (16, 5, 32, 16, True, "HS", 1, 1)]
    return [InvertedResidualConfig(*row, 1.0) for row in rows]


def mobilenet_v3() -> models.MobileNetV3:
    return models.MobileNetV3(blocks_v3(), 32, CLASSES, dropout=0.0)


def efficientnet() -> nn.Module:
    rows = [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 3, 2, 8, 16, 2), MBConvConfig(4, 5, 2, 16, 24, 1)]
    return models.EfficientNet(rows, dropout=0.0, stochastic_depth_prob=0.0, num_classes=CLASSES)


def efficientnet_v2() -> nn.Module:
    rows = [FusedMBConvConfig(1, 3, 1, 8, 8, 1), FusedMBConvConfig(4, 3, 2, 8, 16, 2), MBConvConfig(4, 3, 2, 16, 24, 1)]
    return models.EfficientNet(rows, dropout=0.0, stochastic_depth_prob=0.0, num_classes=CLASSES, last_channel=64)


def densenet() -> nn.Module:
    return models.DenseNet(4, (2, 2, 2, 2), 8, num_classes=CLASSES)


def googlenet() -> nn.Module:
    return models.GoogLeNet(CLASSES, aux_logits=True, init_weights=False, dropout=0.0, dropout_aux=0.0)


def squeezenet() -> nn.Module:
    return models.SqueezeNet("1_1", CLASSES, dropout=0.0)


def shufflenet() -> nn.Module:
    return models.ShuffleNetV2([2, 2, 1], [8, 16, 32, 64, 64], num_classes=CLASSES)


def vgg() -> nn.Module:
    with torch.device("meta"):  # the classifier of 120 million weights is not kept
        model = models.VGG(nn.Identity(), init_weights=False)
    model.features = make_layers([8, "M", 16, "M", 16], batch_norm=True)
    model.classifier = nn.Sequential(nn.Linear(16 * 49, 32), nn.ReLU(inplace=True), nn.Linear(32, CLASSES))
    return model


def regnet() -> nn.Module:
    return models.RegNet(BlockParams.from_init_params(4, 8, 8.0, 2.0, 8, se_ratio=0.25), CLASSES, stem_width=8)


def convnext() -> nn.Module:
    return models.ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, 24, 2), CNBlockConfig(24, None, 1)], 0.0, 0.1, CLASSES)


def swin(block: str = "1") -> nn.Module:
    v2 = {"block": models.swin_transformer.SwinTransformerBlockV2, "downsample_layer": models.swin_transformer.PatchMergingV2}
    more = v2 if block == "2" else {}
    return models.SwinTransformer([2, 2], 8, [2, 2], [2, 2], [2, 2], stochastic_depth_prob=0.0, num_classes=CLASSES, **more)


def vit() -> nn.Module:
    return models.VisionTransformer(16, 4, 3, 2, 16, 32, num_classes=CLASSES)


def backbone(**layers: str) -> nn.Module:
    return IntermediateLayerGetter(mobilenet_v3().features, {at: name for name, at in layers.items()})


def fcn() -> nn.Module:
    return segmentation.FCN(backbone(out="3", aux="1"), FCNHead(16, CLASSES), FCNHead(8, CLASSES))


def deeplab() -> nn.Module:
    return segmentation.DeepLabV3(backbone(out="3"), DeepLabHead(16, CLASSES, [1, 2]))


def lraspp() -> nn.Module:
    return segmentation.LRASPP(backbone(low="1", high="3"), 8, 16, CLASSES, inter_channels=16)


def by_features() -> nn.Module:
    """A backbone that torchvision has traced itself, and so is an fx GraphModule."""
    found = create_feature_extractor(mobilenet_v3(), {"features.1": "low", "features.3": "high"})
    return segmentation.LRASPP(found, 8, 16, CLASSES, inter_channels=16)


def specimen(name: str, make: Any, batch: Any = images, loss: Any = cross_entropy, optimizer: Any = SGD) -> Specimen:
    family = "torchvision segmentation" if batch is scenes else "torchvision classification"
    return Specimen(f"tv {name}", family, make, batch, loss, {"optimizer": optimizer})


SPECIMENS = (
    specimen("resnet", resnet, optimizer=SLOW),
    specimen("resnet wrapped", lambda: Wrapped(resnet(Bottleneck)), optimizer=SLOW),
    specimen("mobilenet_v2", mobilenet_v2, optimizer=SLOW),
    specimen("mobilenet_v3", mobilenet_v3),
    specimen("efficientnet", efficientnet),
    specimen("efficientnet_v2", efficientnet_v2),
    specimen("densenet", densenet),
    specimen("googlenet", googlenet, loss=with_auxiliary, optimizer=SLOW),
    specimen("squeezenet", squeezenet),
    specimen("shufflenet_v2", shufflenet),
    specimen("vgg", vgg, small),
    specimen("regnet", regnet),
    specimen("convnext", convnext),
    specimen("swin", swin, small),
    specimen("swin_v2", partial(swin, "2"), small),
    specimen("vit", vit, small),
    specimen("fcn", fcn, scenes, of_scenes),
    specimen("deeplab", deeplab, scenes, of_scenes),
    specimen("lraspp", lraspp, scenes, of_scenes),
    specimen("lraspp by features", by_features, scenes, of_scenes),
)
