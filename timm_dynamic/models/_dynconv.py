"""What the networks with learned masks share."""

import copy
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from timm_dynamic.convert import extract_state_dict
from timm_dynamic.layers import CountingConv2d, SparseBranch, SparseStage, attach_loss
from timm_dynamic.layers.auxiliary import warn_about_float16
from timm_dynamic.layers.capacity import run_without_waiting
from timm_dynamic.layers.folded_stage import AffineNorm
from timm_dynamic.layers.folding import KeepsFolded, is_foldable, normed_pairs
from timm_dynamic.layers.progress import Progress
from timm_dynamic.layers.sparse_branch import EXECUTIONS, Cost, may_run_sparse
from timm_dynamic.models._cfg import imagenet_cfg
from timm_dynamic.ops._autocast import autocast_dtype
from timm_dynamic.training import BUDGET_WEIGHT, budget_loss


class MaskedModel(KeepsFolded):
    """Mixin of timm models whose residual branches have masks; it goes before the timm model.

    In training, the budget loss (see `timm_dynamic.training.budget_loss`) is attached at the model's output.

    Attributes:
        budget: The share of the branches' computations that training aims at; -1: there are no masks.
    """

    __jit_unused_properties__ = ["execution", "max_active"]

    def setup_masks(
        self, first_conv: str, stages: Iterable[str], budget: float, total_steps: int | None, aux_scale: float
    ) -> None:
        """Finish the construction of a model whose masked blocks are in their places.

        Args:
            first_conv: Name of the convolution that counts steps.
            stages: Names of the sequences of blocks.
            budget, total_steps, aux_scale: As for the models.

        Raises:
            ValueError: If an argument has an unusable value.
        """
        check_budget(budget)
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        if not isinstance(aux_scale, (int, float)) or not aux_scale >= 0:
            raise ValueError(f"aux_scale must be a number and not negative, got {aux_scale!r}")
        self.budget, self.aux_scale = budget, aux_scale
        self.auxiliary_terms = () if budget < 0 else ("network_budget", "block_budget")
        self._costs = _Costs()
        if budget < 0 or total_steps is None:  # weights of a model that counted fit one that does not
            self.register_load_state_dict_pre_hook(partial(_drop_step, f"{first_conv}.step"))
        if budget < 0:
            return
        device = self.get_submodule(first_conv).weight.device
        self.progress = Progress(device)
        if total_steps is not None:
            counter = CountingConv2d.from_conv(self.get_submodule(first_conv))
            self.set_submodule(first_conv, counter)
            self.progress.count(counter, total_steps)
        for name in self.auxiliary_terms:  # of the last training forward, weighted
            self.register_buffer(name, torch.zeros((), device=device), persistent=False)
        for name in stages:
            self.set_submodule(name, SparseStage(*self.get_submodule(name)))
        for block in self.masked_blocks():
            block.on_cost = self._costs.take
            block.masker.progress = self.progress
            block.masker.reset_parameters()  # timm has initialised its convolution like any other

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
            if isinstance(module, (SparseBranch, SparseStage)):
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

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if isinstance(x, Tensor):  # not a proxy of torch.fx
                if self.training and self.budget >= 0:
                    return self._forward_with_budget(x)
                if not self.training and self.budget >= 0 and may_run_sparse(x, self.execution):
                    return self._forward_folded(x)
        return self.forward_head(self.forward_features(x))

    @torch.jit.unused
    def _forward_folded(self, x: Tensor) -> Tensor:
        """With the norms outside the stages folded, too."""
        model = self
        if x.dtype == autocast_dtype(x) == torch.float32:
            model = self._keep(None, self._stages, self._fold_outside)

        def forward() -> Tensor:
            return self.forward_head(model.forward_features(x))

        return forward() if torch.compiler.is_compiling() else run_without_waiting(forward, self, x)

    @torch.jit.unused
    def _stages(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, SparseStage)]

    @torch.jit.unused
    def _fold_outside(self) -> "MaskedModel":
        """The model with its own norms in the place of the convolutions' outputs: to the bit what they give."""
        model = copy.copy(self)
        model._modules = dict(self._modules)
        for parent, name, norm_name in normed_pairs(self):
            if parent is not self:
                continue
            conv, norm = getattr(self, name), getattr(self, norm_name)
            act_name = norm_name.replace("bn", "act")  # a ResNet's
            act = self._modules.get(act_name)
            if is_foldable(conv, norm, act):
                model._modules[norm_name] = AffineNorm(norm, act)
                if act is not None:
                    model._modules[act_name] = nn.Identity()
        return model

    @torch.jit.unused
    def _forward_with_budget(self, x: Tensor) -> Tensor:
        with self._costs as costs:
            y = self.forward_head(self.forward_features(x))
            network, block = budget_loss(costs, self.budget, self.progress())
        self.network_budget.copy_(BUDGET_WEIGHT * network.detach())
        self.block_budget.copy_(BUDGET_WEIGHT * block.detach())
        if y.dtype == torch.float16 and not torch.compiler.is_compiling() and not isinstance(self.aux_scale, Tensor):
            warn_about_float16("DynConv's budget loss")
        return attach_loss(y, network + block, BUDGET_WEIGHT, self.aux_scale)


class _Costs:
    """Of the masked blocks, during one training forward of the model: tensors with a graph, which nobody could copy."""

    def __init__(self):
        self.collected: list[Cost] | None = None

    def take(self, cost: Cost) -> None:
        if self.collected is not None:  # else a feature extractor runs the block
            self.collected.append(cost)

    def __enter__(self) -> list[Cost]:
        self.collected = []
        return self.collected

    def __exit__(self, *error) -> None:
        self.collected = None


def _drop_step(step: str, model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    state_dict.pop(prefix + step, None)


def check_budget(budget: float) -> None:
    if not isinstance(budget, (int, float)) or not (0 <= budget <= 1 or budget == -1):
        raise ValueError(f"budget must be between 0 and 1, or -1 for a network without masks, got {budget!r}")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoints, and static weights.

    Their keys are ours, within a wrapper. A model without masks takes no mask units; one with masks keeps its own where
    a static network's weights have none, and its own step counter.
    """
    own = model.state_dict()
    if all(key in own for key in state_dict) and len(state_dict) == len(own):
        return state_dict
    state = {k: v for k, v in extract_state_dict(state_dict).items() if k in own or not k.endswith(".step")}
    static = not any(".masker." in key for key in state)
    if model.budget < 0:
        if not static:
            warnings.warn(
                "timm_dynamic: these weights were trained with masks; with budget=-1 the network computes everywhere, "
                "and gives other results.",
                stacklevel=2,
            )
        return {key: value for key, value in state.items() if ".masker." not in key}
    if static:
        warnings.warn(
            "timm_dynamic: static weights: the mask units keep their own, untrained ones. Train the model, or create "
            "it with budget=-1 for the static network.",
            stacklevel=2,
        )
    kept = [key for key in own if key.endswith(".step") or (static and ".masker." in key)]
    return {**{key: own[key] for key in kept}, **state}


def dynconv_cfg(first_conv: str, classifier: str, **kwargs) -> dict[str, Any]:
    """A model's cfg, for `generate_default_cfgs`."""
    about = {
        "interpolation": "bilinear",
        "origin_url": "https://github.com/thomasverelst/dynconv",
        "paper_ids": "arXiv:1912.03203",
    }
    return imagenet_cfg(first_conv, classifier, **{**about, **kwargs})
