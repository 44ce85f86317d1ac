"""What the cfgs of all families have in common."""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from timm_dynamic.hub import PACKAGE_WEIGHTS

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def imagenet_cfg(first_conv: str, classifier: str | tuple[str, ...], **kwargs) -> dict[str, Any]:
    """A cfg for `generate_default_cfgs`: of a classifier of ImageNet's images, where `kwargs` say nothing else."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
        **kwargs,
    }


def shipped_cfg(tag: str) -> dict[str, Any]:
    """What is another in the cfg of small weights that we trained, for ten classes, and ship."""
    cifar10 = {"input_size": (3, 32, 32), "pool_size": (8, 8), "label_names": _CIFAR10}
    return {
        "file": str(PACKAGE_WEIGHTS / f"{tag}.safetensors"),
        "num_classes": 10,
        "input_size": (3, 64, 64),
        "pool_size": (2, 2),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "origin_url": None,
        "license": "apache-2.0",
        **(cifar10 if tag.endswith("cifar10") else {}),
    }
