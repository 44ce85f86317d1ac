"""`timm.create_model("dynamized", base="resnet50", layer="dcd")`: any CNN of timm with a dynamic layer in it.

Everything that names a model of timm can so name a network that `timm_dynamic.dynamize` has changed: scripts,
checkpoints, repositories on the Hub.
"""

import logging
import re
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, generate_default_cfgs, get_arch_name, register_model
from timm.models._builder import load_pretrained
from torch import Tensor, nn

from timm_dynamic.convert import check_finite, check_fits, filter_fn_of, one_line
from timm_dynamic.hub import WEIGHT_SOURCES, check_hub_file
from timm_dynamic.layers.base import DropInConv2d
from timm_dynamic.layers.progress import KEY
from timm_dynamic.models._cfg import shipped_cfg
from timm_dynamic.replace import Where, dynamize, layer_class, layer_options
from timm_dynamic.suggest import did_you_mean

_logger = logging.getLogger(__name__)

_TAG = "untrained"  # every model of timm has one; its cfg is that of the base


@dataclass(frozen=True)
class Recipe:
    """What a dynamized network is made of; it has this as its attribute `recipe`.

    Attributes:
        base: Name of the static network, with or without a tag.
        base_kwargs: Its arguments.
        layer: The dynamic layer: a name of `timm_dynamic.families.layers()`, or a class.
        where: Which convolutions are replaced, as for `dynamize`.
        layer_kwargs: The layer's keyword arguments.
    """

    base: str
    base_kwargs: dict[str, Any]
    layer: str | type[DropInConv2d]
    where: Where = None
    layer_kwargs: dict[str, Any] | None = None

    def __str__(self) -> str:
        layer = self.layer if isinstance(self.layer, str) else self.layer.__name__
        return f"dynamized (base={self.base}, layer={layer})"

    def make_base(self, **kwargs) -> nn.Module:
        """The static network; `kwargs` are more of its arguments."""
        return timm.create_model(self.base, **{**self.base_kwargs, **kwargs})

    def dynamize(self, base: nn.Module) -> nn.Module:
        """The static network, changed in place into the dynamic one."""
        return dynamize(base, self.layer, self.where, **self.layer_kwargs or {})


# Networks whose weights are in the package, by tag.
_SHIPPED = {"kw_resnet8_cifar10": Recipe("dynconv_resnet8", {"budget": -1}, "kw")}
default_cfgs = generate_default_cfgs(
    {f"dynamized.{tag}": shipped_cfg(f"dynamized.{tag}") for tag in _SHIPPED} | {f"dynamized.{_TAG}*": {}}
)


@register_model
def dynamized(
    pretrained: bool = False,
    base: str = "",
    layer: str | type[DropInConv2d] = "",
    where: Where = None,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    **kwargs,
) -> nn.Module:
    """A convolutional network of timm, made dynamic by `timm_dynamic.dynamize`.

    Its `load_state_dict` takes weights of the static network, too, and so does `checkpoint_path` of `create_model`:
    they are loaded into the base before it is changed.

    Args:
        pretrained: Take the weights of the base, which the dynamic network goes on from. (Those of a repository or a
            folder, `hf-hub:` or `local-dir:`, and those of a file in the overlay are of either network.)
        base: Any CNN of timm or of this package, with or without a tag.
        layer: The dynamic layer: one of `timm_dynamic.families.layers()`, or a class.
        where: Which convolutions to replace, as for `dynamize`.
        pretrained_cfg, pretrained_cfg_overlay, cache_dir: As in timm.
        **kwargs: Keyword arguments of the layer go to the layer, all others to the base.

    Raises:
        ValueError: If the base or the layer is missing or unknown, no convolution can be replaced, or the weights are
            another network's.
    """
    if isinstance(pretrained_cfg, str) and (shipped := _SHIPPED.get(pretrained_cfg)):
        base, layer, kwargs = base or shipped.base, layer or shipped.layer, {**shipped.base_kwargs, **kwargs}
        pretrained_cfg = timm.get_pretrained_cfg(f"dynamized.{pretrained_cfg}")
    if isinstance(pretrained_cfg, str) and pretrained_cfg != _TAG:
        raise ValueError(f"dynamized has no tag {pretrained_cfg!r}: name the base's, as in base='resnet50.a1_in1k'")
    recipe = _recipe(base, layer, where, kwargs)
    features_only = recipe.base_kwargs.pop("features_only", False)
    features = {key: recipe.base_kwargs.pop(key) for key in ("out_indices", "feature_cls") if key in kwargs}
    given = None if isinstance(pretrained_cfg, str) else pretrained_cfg
    cfg = given.to_dict() if isinstance(given, PretrainedCfg) else dict(given or {})
    cfg = {key: value for key, value in cfg.items() if value is not None}  # it is the base's then
    if cfg:  # of a repository or a folder: what it says of the network, as timm's own models take it
        said = {"num_classes": cfg.get("num_classes"), "in_chans": (cfg.get("input_size") or [None])[0]}
        recipe.base_kwargs.update({key: v for key, v in said.items() if v is not None and key not in kwargs})
    cfg |= pretrained_cfg_overlay or {}
    elsewhere = any(cfg.get(key) for key in WEIGHT_SOURCES)  # weights that are not the base's
    try:
        base_model = recipe.make_base(pretrained=pretrained and not elsewhere, cache_dir=cache_dir)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if not unknown:
            raise
        hint = did_you_mean(unknown[1], layer_options(layer_class(layer)), f"see {base} in timm")
        raise ValueError(f"neither {base} nor {layer} has an argument {unknown[1]!r}; {hint}") from error
    base_cfg = {key: value for key, value in base_model.pretrained_cfg.items() if key not in WEIGHT_SOURCES}
    model = recipe.dynamize(base_model)
    model.recipe = recipe
    hook = model.register_load_state_dict_pre_hook(_take_either)
    model._load_state_dict_pre_hooks.move_to_end(hook.id, last=False)  # others give shared parts all of their names
    model.pretrained_cfg = model.default_cfg = {**base_cfg, **cfg, "architecture": "dynamized"}
    if pretrained and elsewhere:
        check_hub_file(model.pretrained_cfg, cache_dir)
        channels = recipe.base_kwargs.get("in_chans", 3)
        try:
            load_pretrained(model, model.pretrained_cfg, model.num_classes, channels, checkpoint_filter_fn)
        except RuntimeError as error:
            raise ValueError(f"the weights do not load into {recipe}: {one_line(error)}") from error
        check_finite(model.state_dict())
    return _features(model, features) if features_only else model


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of the base, in timm's or its authors' format, as those of the dynamic network; others as they are.

    Which the file holds, its names say. Weights of other shapes (another number of classes) are passed on; of layers
    that stay as they are, such as the classifier, some may be missing.
    """
    dynamic = _names(model.state_dict())
    if _names(state) == dynamic:
        _logger.info("the file holds weights of the dynamic network")
        return state
    base = model.recipe.make_base()
    translate = filter_fn_of(get_arch_name(model.recipe.base))
    try:
        static = translate(state, base) if translate else state
    except Exception:  # it expects one format and breaks on others
        return state
    expected = base.state_dict()
    missing = {key for key in _names(expected) - _names(static) if not key.endswith("num_batches_tracked")}
    if _names(static) - _names(expected) or missing - dynamic:
        return state
    others = {key: value for key, value in static.items() if key not in expected or value.shape != expected[key].shape}
    base.load_state_dict({**expected, **{key: value for key, value in static.items() if key not in others}})
    _logger.info(f"the file holds weights of the static {model.recipe.base}: they were loaded before it became dynamic")
    found = {**model.recipe.dynamize(base).state_dict(), **others}
    return {key: value for key, value in found.items() if key not in missing}


def _take_either(model: nn.Module, state: dict[str, Tensor], prefix: str, *_) -> None:
    """Make weights of the base, in a state dict that is loaded into this network, those of the network.

    PyTorch says to no hook whether it loads strictly: what could be a part of the weights is left to it.

    Raises:
        ValueError: They are of another network, or of other shapes.
    """
    expected = model.state_dict()
    if prefix or _shapes(state) == _shapes(expected):
        return
    found = checkpoint_filter_fn(dict(state), model)
    unknown = [key for key in found if key not in expected]
    others = [key for key in _names(found) if key in expected and found[key].shape != expected[key].shape]
    if others or 2 * len(unknown) > len(found):
        try:
            check_fits(found, model)
        except ValueError as error:
            raise ValueError(f"these weights do not load into {model.recipe}: {error}") from error
    state.clear()
    state.update(found)


def _names(state: dict[str, Tensor]) -> set[str]:
    return set(state) - {KEY}


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    """By name, without what PyTorch can do without."""
    return {key: state[key].shape for key in _names(state) if not key.endswith("num_batches_tracked")}


def _recipe(base: str, layer: str | type[DropInConv2d], where: Where, kwargs: dict[str, Any]) -> Recipe:
    for name, value, example in (("base", base, "resnet50"), ("layer", layer, "dcd")):
        if not value:
            raise ValueError(f"dynamized needs {name}=NAME, as in {name}={example!r}")
    if ":" not in base and not timm.is_model(get_arch_name(base)):
        raise ValueError(f"unknown base {base!r}; {did_you_mean(base, timm.list_models(), 'any CNN of timm will do')}")
    options = layer_options(layer_class(layer))
    layer_kwargs = {key: value for key, value in kwargs.items() if key in options}
    base_kwargs = {key: value for key, value in kwargs.items() if key not in options}
    return Recipe(base, base_kwargs, layer, where, layer_kwargs)


def _features(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """The feature extractor that timm makes of the base, with the layers and weights of the dynamic network.

    Its names have underscores where those of the network have dots, or begin with `model.`.
    """

    def same(name: str) -> str:
        return name.removeprefix("model.").replace(".", "_")

    recipe = model.recipe
    dynamic = {same(name) for name, module in model.named_modules() if isinstance(module, layer_class(recipe.layer))}
    features = recipe.make_base(features_only=True, **options)
    dynamize(features, recipe.layer, lambda name, _: same(name) in dynamic, **recipe.layer_kwargs or {})
    state = {same(name): value for name, value in model.state_dict().items()}
    features.load_state_dict({name: state[same(name)] for name in features.state_dict()})
    features.recipe = recipe
    features.pretrained_cfg = {**features.pretrained_cfg, "architecture": "dynamized"}
    return features
