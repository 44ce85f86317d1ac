"""What the DCD networks share: the dynamic classifier, and the authors' checkpoints."""

import re
from typing import Any

from torch import Tensor, nn

from timm_dynamic.convert import extract_state_dict
from timm_dynamic.layers import DCDConv2d, DCDLinear
from timm_dynamic.layers.base import rename
from timm_dynamic.models._cfg import imagenet_cfg


class DynamicClassifier:
    """To inherit from before a class of timm's: its classifier is a `DCDLinear`, also after `reset_classifier`."""

    classifier_name: str

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._make_classifier_dynamic()

    def reset_classifier(self, num_classes: int, *args, **kwargs) -> None:
        """As timm's, with a dynamic classifier."""
        super().reset_classifier(num_classes, *args, **kwargs)
        self._make_classifier_dynamic()

    def _make_classifier_dynamic(self) -> None:
        static = getattr(self, self.classifier_name)
        if isinstance(static, nn.Linear):
            dd = {"device": static.weight.device, "dtype": static.weight.dtype}
            dynamic = DCDLinear(static.in_features, static.out_features, **dd)
            setattr(self, self.classifier_name, dynamic.train(static.training))


def load_authors(state_dict: dict[str, Any], model: DynamicClassifier) -> dict[str, Tensor]:
    """The weights in an author's checkpoint: those of dynamic layers with our names, the others as they are.

    Args:
        state_dict: Wrapped or not, with or without `module.` (see `extract_state_dict`).
        model: The one to load it into.
    """
    state = {}
    for key, value in extract_state_dict(state_dict).items():
        # After the dropout, or first where there was none.
        classifier = re.fullmatch(r"classifier\.[01]\.(.+)", key)
        if classifier:
            key = f"{model.classifier_name}.{rename(classifier[1], DCDLinear.reference_names)}"
        else:
            layer, dot, leaf = key.rpartition(".conv_")
            key = layer + "." + rename(f"conv_{leaf}", DCDConv2d.reference_names) if dot else key
        state[key] = value
    return state


def dcd_cfg(first_conv: str, classifier: str, **kwargs) -> dict[str, Any]:
    """A model's cfg, for `generate_default_cfgs`."""
    about = {
        "interpolation": "bilinear",
        "origin_url": "https://github.com/liyunsheng13/dcd",
        "paper_ids": "arXiv:2103.08756",
    }
    classifiers = tuple(f"{classifier}.{name}" for name in ("linear", "p", "fc_scale"))
    return imagenet_cfg(first_conv, classifiers, **{**about, **kwargs})
