"""A detector of torchvision with a dynamic backbone, and a pyramid that upsamples as in CARAFE's and DDF's papers.

    python examples/detection.py [carafe | ddf | nearest [LAYER]]

torchvision's pyramid enlarges each map to the next one's size by repeating pixels. Here it is a layer of this package:
`CARAFE` (Wang et al., ICCV 2019) or `DDFUpPack` (Zhou et al., CVPR 2021). The program takes a step of training on two
photographs, checks that gradients reach all of the backbone and of the pyramid, and evaluates.
"""

import sys
from collections import OrderedDict

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FeaturePyramidNetwork, box_iou

import timm_dynamic
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


def detector(
    upsampler: str, num_classes: int = 91, backbone: str = "resnet50", layer: str = "", **kwargs
) -> FasterRCNN:
    """A Faster R-CNN. With `weights="DEFAULT"` its backbone, but not its pyramid, has learned ImageNet.

    Args:
        upsampler: `"carafe"`, `"ddf"` or `"nearest"`.
        num_classes: With the background.
        backbone: One of torchvision's ResNets.
        layer: That the convolutions of its blocks become: one of `timm_dynamic.families.layers()`.
    """
    body = resnet_fpn_backbone(backbone_name=backbone, **{"weights": None, "trainable_layers": 5, **kwargs})
    if layer:
        timm_dynamic.dynamize(body.body, layer)
    if upsampler != "nearest":
        body.fpn = DynamicFPN(body.fpn, body.out_channels, upsampler)
    return FasterRCNN(body, num_classes, min_size=128, max_size=200, box_score_thresh=0.0)


def photographs() -> list[Tensor]:
    """scikit-learn's two: a temple by a lake, a flower."""
    return [torch.tensor(image).permute(2, 0, 1) / 255 for image in load_sample_images().images]


def main(upsampler: str = "ddf", layer: str = "dcd", steps: int = 1, backbone: str = "resnet18") -> FasterRCNN:
    torch.manual_seed(0)
    model = detector(upsampler, 3, backbone, layer).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    images = photographs()
    boxes = [[240.0, 130.0, 560.0, 350.0], [200.0, 70.0, 500.0, 380.0]]  # the temple, the flower
    targets = [{"boxes": torch.tensor([box]), "labels": torch.tensor([i + 1])} for i, box in enumerate(boxes)]
    for step in range(steps):
        timm_dynamic.set_progress(model, step, steps)  # for the layers with a schedule
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}", flush=True)
    without = [name for name, p in model.backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"no gradient: {without}"
    with torch.no_grad():
        for result, target in zip(model.eval()(images), targets, strict=True):
            overlap = box_iou(result["boxes"], target["boxes"]).max().item() if len(result["boxes"]) else 0
            print(f"{len(result['boxes'])} boxes, the best of which overlaps with the object by {overlap:.2f}")
    return model


if __name__ == "__main__":
    main(*sys.argv[1:3])
