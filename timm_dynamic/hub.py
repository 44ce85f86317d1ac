"""Where `pretrained=True` finds weights: the local folder first, then the package, then the Hugging Face hub."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from timm.models import PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from timm_dynamic.convert import check_finite, extract_state_dict, one_line, read_checkpoint

PACKAGE_WEIGHTS = Path(__file__).parent / "weights"
_FILENAME = "model.safetensors"  # timm's name for weights in a hub repository


def local_weights(name: str) -> Path:
    """The file in the local folder for a model's weights, whether it is there or not.

    The folder is `$TIMM_DYNAMIC_WEIGHTS`, by default `timm-dynamic` under the Hugging Face cache.

    Args:
        name: Model name with its tag, such as `ddf_mul_resnet50.in1k`.
    """
    folder = os.environ.get("TIMM_DYNAMIC_WEIGHTS") or Path(constants.HF_HOME) / "timm-dynamic"
    return Path(folder).expanduser() / f"{name}.safetensors"


def build_model(
    model_cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | os.PathLike | None = None,
    **kwargs,
) -> nn.Module:
    """timm's `build_model_with_cfg` with our places to look for weights. Every model of this package is made by it.

    A source that the caller names (a cfg of its own, or a source in the overlay) is left to timm.

    Args:
        model_cls, variant, pretrained, pretrained_cfg, pretrained_cfg_overlay, cache_dir: As in timm.
        **kwargs: For timm's function and the model.

    Raises:
        ValueError: If weights are wanted and neither the local folder nor the hub has them, or if their file is
            damaged, is another model's, or holds NaN or infinity.
    """
    file = None
    if pretrained and not isinstance(pretrained_cfg, (dict, PretrainedCfg)):
        overlay = pretrained_cfg_overlay or {}
        if not any(overlay.get(key) for key in ("file", "url", "state_dict", "hf_hub_id", "source")):
            cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
            file = _find_weights(cfg, cache_dir)
            pretrained_cfg_overlay = {**overlay, "file": file}
    try:
        model = build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=pretrained_cfg_overlay,
            cache_dir=cache_dir,
            **kwargs,
        )
    except Exception as error:
        if file:
            extract_state_dict(read_checkpoint(file))  # says what is wrong with a damaged file
            if "state_dict" in str(error):
                raise ValueError(f"{file} does not load into {variant}: {one_line(error)}") from error
        raise
    if file:
        try:
            check_finite(model.state_dict())
        except ValueError as error:
            raise ValueError(f"{file} does not load into {variant}: {error}") from error
    return model


def _find_weights(cfg: PretrainedCfg, cache_dir: str | os.PathLike | None) -> str | None:
    """The path of a registered tag's weights, downloaded if necessary; None for a tag without weights."""
    name = f"{cfg.architecture}.{cfg.tag}"
    local = local_weights(name)
    if local.exists():
        return str(local)
    if cfg.file or not cfg.hf_hub_id:
        return cfg.file
    organisation, repository = cfg.hf_hub_id.split("/")
    repo_id = f"{os.environ.get('TIMM_DYNAMIC_HUB_ORG') or organisation}/{repository}"
    try:
        if not isinstance(try_to_load_from_cache(repo_id, _FILENAME, cache_dir), str):
            get_hf_file_metadata(hf_hub_url(repo_id, _FILENAME))  # fails at once; hf_hub_download retries for 25 s
        return hf_hub_download(repo_id, _FILENAME, cache_dir=cache_dir)
    except Exception as error:  # which one depends on huggingface_hub's version and the HTTP library under it
        raise ValueError(
            f"no weights for {name}: {local} does not exist, and the Hugging Face hub did not give {repo_id} "
            f"({type(error).__name__}). Convert the authors' file: "
            f"timm-dynamic convert SRC {local} --model {cfg.architecture}"
        ) from error
