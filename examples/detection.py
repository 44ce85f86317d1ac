"""A detector of torchvision whose feature pyramid upsamples dynamically, as in CARAFE's and DDF's papers.

    python examples/detection.py [carafe | ddf | nearest]

torchvision's pyramid enlarges each map to the next one's size by repeating pixels. Here it is a layer of this package:
`CARAFE` (Wang et al., ICCV 2019) or `DDFUpPack` (Zhou et al., CVPR 2021). The program takes a few steps of training on
random images, prints the losses, and checks that gradients reach all of the pyramid.
"""

import sys
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FeaturePyramidNetwork

from timm_dynamic.layers import CARAFE, DDFUpPack


class DynamicFPN(nn.Module):
    """torchvision's feature pyramid, with its own convolutions, and an upsampler of ours at each level but the first.

    Args:
        fpn: A new or trained pyramid; its modules are taken over.
        channels: Of its outputs.
        upsampler: `"carafe"` or `"ddf"`.
    """

    def __init__(self, fpn: FeaturePyramidNetwork, channels: int, upsampler: str):
        super().__init__()
        self.fpn = fpn
        layer = {"carafe": CARAFE, "ddf": DDFUpPack}[upsampler]
        self.up = nn.ModuleList(layer(channels) for _ in range(len(fpn.inner_blocks) - 1))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        names, maps = list(features), list(features.values())
        last = self.fpn.inner_blocks[-1](maps[-1])
        results = [self.fpn.layer_blocks[-1](last)]
        for i in range(len(maps) - 2, -1, -1):
            lateral = self.fpn.inner_blocks[i](maps[i])
            enlarged = self.up[i](last)[..., : lateral.shape[2], : lateral.shape[3]]  # maps of odd size are rounded up
            last = lateral + enlarged
            results.insert(0, self.fpn.layer_blocks[i](last))
        if self.fpn.extra_blocks is not None:
            results, names = self.fpn.extra_blocks(results, maps, names)
        return OrderedDict(zip(names, results, strict=True))


def detector(upsampler: str, num_classes: int = 91, backbone: str = "resnet50", **kwargs) -> FasterRCNN:
    """A Faster R-CNN. With `weights="DEFAULT"` its backbone, but not its pyramid, has learned ImageNet."""
    body = resnet_fpn_backbone(backbone_name=backbone, **{"weights": None, "trainable_layers": 5, **kwargs})
    if upsampler != "nearest":
        body.fpn = DynamicFPN(body.fpn, body.out_channels, upsampler)
    return FasterRCNN(body, num_classes, min_size=128, max_size=160)


def main(upsampler: str = "carafe", steps: int = 3, backbone: str = "resnet18") -> None:
    torch.manual_seed(0)
    model = detector(upsampler, 2, backbone).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    images = list(torch.rand(2, 3, 100, 135))
    targets = [{"boxes": torch.tensor([[10.0, 20.0, 70.0, 80.0]]), "labels": torch.tensor([1])}] * 2
    for step in range(steps):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}", flush=True)
    without = [name for name, p in model.backbone.fpn.named_parameters() if p.grad is None]
    assert not without, f"no gradient: {without}"


if __name__ == "__main__":
    main(*sys.argv[1:2])
