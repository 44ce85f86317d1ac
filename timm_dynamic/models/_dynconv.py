"""What the networks with learned masks share."""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from timm_dynamic.convert import extract_state_dict
from timm_dynamic.layers import SparseBranch, SparseStage
from timm_dynamic.layers.budget import Budget
from timm_dynamic.layers.progress import KEY, share_progress
from timm_dynamic.layers.sparse_branch import EXECUTIONS
from timm_dynamic.models._cfg import imagenet_cfg


class MaskedModel(nn.Module):
    """Mixin of timm models whose residual branches have masks; it goes before the timm model.

    In training, the budget loss (see `timm_dynamic.training.budget_loss`) is attached to the masks (see `Budget`).

    Attributes:
        budget: The share of the branches' computations that training aims at; -1: there are no masks.
        counted_biases: Names of the convolutions whose biases count as multiply-accumulates, as the authors count.
    """

    counted_biases = ()  # without an annotation, which TorchScript would read

    __jit_unused_properties__ = ["execution", "max_active"]

    def setup_masks(
        self,
        stages: Iterable[str],
        budget: float,
        total_steps: int | None,
        aux_scale: float,
        weight: float,
    ) -> None:
        """Finish the construction of a model whose masked blocks are in their places.

        Args:
            stages: Names of the sequences of blocks, or of modules with such sequences within.
            budget, total_steps, aux_scale: As for the models.
            weight: Of the budget loss.

        Raises:
            ValueError: If an argument has an unusable value.
        """
        check_budget(budget)
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        for key, value in (("aux_scale", aux_scale), ("budget_weight", weight)):
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{key} must be a finite number and not negative, got {value!r}")
        self.budget = budget
        if budget < 0:
            self.register_load_state_dict_pre_hook(_drop_progress)  # weights trained with masks fit
            return
        loss, number = Budget(budget, aux_scale, next(self.parameters()).device, weight), 0
        for name in stages:
            for inner, part in list(self.get_submodule(name).named_modules(prefix=name)):
                if type(part) is nn.Sequential and (
                    inner == name or any(isinstance(one, SparseBranch) for one in part)
                ):
                    self.set_submodule(inner, SparseStage(*part))
            blocks = [block for block in self.get_submodule(name).modules() if isinstance(block, SparseBranch)]
            for block in blocks:
                number += 1
                block.use_budget(loss, number, block is blocks[-1])
                block.masker.reset_parameters()  # timm has initialised its convolution like any other
        share_progress(self).begin(total_steps)

    @torch.jit.unused
    def masked_blocks(self) -> list[SparseBranch]:
        """In the order in which they run."""
        return [module for module in self.modules() if isinstance(module, SparseBranch)]

    @property
    def execution(self) -> str:
        """How eval mode runs: `"auto"`, `"sparse"` or `"dense"`. The results are the same."""
        return getattr(self, "_execution", "auto")

    @execution.setter
    def execution(self, value: str) -> None:
        if value not in EXECUTIONS:
            raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}, got {value!r}")
        self._execution = value
        for module in self.modules():
            if isinstance(module, SparseBranch):
                module.execution = value

    @property
    def max_active(self) -> float | None:
        """Up to which share of active positions `"auto"` runs a block sparse; None: as measured."""
        return getattr(self, "_max_active", None)

    @max_active.setter
    def max_active(self, value: float | None) -> None:
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value <= 1):
            raise ValueError(f"max_active must be between 0 and 1, or None, got {value!r}")
        self._max_active = value
        for block in self.masked_blocks():
            block.max_active = value


def _drop_progress(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    state_dict.pop(prefix + KEY, None)


def check_budget(budget: float) -> None:
    if not isinstance(budget, (int, float)) or not (0 <= budget <= 1 or budget == -1):
        raise ValueError(f"budget must be between 0 and 1, or -1 for a network without masks, got {budget!r}")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoints, and static weights.

    Their keys are ours, within a wrapper. A model without masks takes no mask units; one with masks keeps its own where
    a static network's weights have none, and its progress.
    """
    own = model.state_dict()
    if all(key in own for key in state_dict) and len(state_dict) == len(own):
        return state_dict
    state = extract_state_dict(state_dict)
    static = not any(".masker." in key for key in state)
    if model.budget < 0:
        if not static:
            warnings.warn(
                "timm_dynamic: these weights were trained with masks; with budget=-1 the network computes everywhere, "
                "and gives other results.",
                stacklevel=2,
            )
        return {key: value for key, value in state.items() if ".masker." not in key and key != KEY}
    if static:
        warnings.warn(
            "timm_dynamic: static weights: the mask units keep their own, untrained ones. Train the model, or create "
            "it with budget=-1 for the static network.",
            stacklevel=2,
        )
        state = {**{key: own[key] for key in own if ".masker." in key or key == KEY}, **state}
    return state


def dynconv_cfg(first_conv: str, classifier: str | tuple[str, ...], **kwargs) -> dict[str, Any]:
    """A model's cfg, for `generate_default_cfgs`."""
    about = {
        "interpolation": "bilinear",
        "origin_url": "https://github.com/thomasverelst/dynconv",
        "paper_ids": "arXiv:1912.03203",
    }
    return imagenet_cfg(first_conv, classifier, **{**about, **kwargs})
