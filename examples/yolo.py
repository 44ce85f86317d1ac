"""Ultralytics' YOLO with dynamic convolutions in its backbone: train, merge the norms, validate, export to ONNX.

    pip install ultralytics   # under AGPL-3.0, and no part of this package
    python examples/yolo.py [LAYER] [--batch 2]

Ultralytics builds a network anew for each training, from its YAML file. So the trainer makes it dynamic, after it has
been built and has its static weights. The data are a few images with a bright square, drawn here; for yours, name your
data's YAML file in `main`.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.torch_utils import unwrap_model

import timm_dynamic


class DynamicTrainer(DetectionTrainer):
    """A trainer of YOLOs whose backbones have dynamic 3x3 convolutions, the stem apart."""

    layer = "dcd"  # one of timm_dynamic.families.layers()

    def get_model(self, cfg=None, weights=None, verbose=True) -> nn.Module:
        model = super().get_model(cfg, weights, verbose)

        def in_backbone(name: str, conv: nn.Conv2d) -> bool:
            number = int(name.split(".")[1])  # model.NUMBER.conv, ...
            return 0 < number < len(model.yaml["backbone"]) and conv.kernel_size == (3, 3)

        timm_dynamic.dynamize(model, self.layer, where=in_backbone)
        if weights is not None:
            model.load(weights)  # again, in case that they are of a network that is dynamic already
        return model


def follow_schedule(trainer: DetectionTrainer) -> None:
    """For the layers whose temperature follows the training; an averaged copy has a schedule of its own."""
    for model in (unwrap_model(trainer.model), trainer.ema.ema):
        timm_dynamic.set_progress(model, trainer.epoch, trainer.epochs)


def draw_data(folder: Path, count: int = 4, size: int = 64) -> Path:
    """Images of noise with a bright square, the labels, and the YAML file that names them."""
    random = np.random.default_rng(0)
    for i in range(count):
        image, side = random.integers(0, 128, (size, size, 3), dtype=np.uint8), size // 3
        x, y = random.integers(0, size - side, 2)
        image[y : y + side, x : x + side] = 255
        for kind in ("images", "labels"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        box = np.array([x + side / 2, y + side / 2, side, side]) / size
        (folder / "labels" / f"{i}.txt").write_text("0 " + " ".join(map(str, box)))
    data = folder / "data.yaml"
    data.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: [square]\n")
    return data


def main(layer: str = "dcd", batch: int = 2, folder: Path | None = None, size: int = 64) -> YOLO:
    DynamicTrainer.layer = layer
    folder = Path(folder or tempfile.mkdtemp())
    yolo = YOLO("yolo11n.yaml")  # or yolo11n.pt, whose weights the dynamic network begins with
    yolo.add_callback("on_train_epoch_start", follow_schedule)
    quiet = {"imgsz": size, "batch": batch, "workers": 0, "device": "cpu", "plots": False, "verbose": False}
    data = draw_data(folder / "data", size=size)
    options = {"epochs": 1, "optimizer": "AdamW", "project": str(folder), "name": "train", "val": False, **quiet}
    yolo.train(trainer=DynamicTrainer, data=str(data), **options)
    # From here on `yolo` is the averaged network, from its checkpoint. `fuse` merges norms into dynamic layers exactly.
    metrics = yolo.val(data=str(data), project=str(folder), name="val", **quiet)
    print(f"mAP50 {metrics.box.map50:.3f}")
    yolo.fuse()
    print("exported to", yolo.export(format="onnx", imgsz=size, simplify=False))
    return yolo


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "layer", metavar="LAYER", nargs="?", default="dcd", help="one of timm_dynamic.families.layers()"
    )
    parser.add_argument("--batch", type=int, default=2)
    main(**vars(parser.parse_args()))
