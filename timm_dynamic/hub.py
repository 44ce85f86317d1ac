"""The Hugging Face Hub: where `pretrained=True` finds weights (local folder, package, Hub), and how ours get there."""

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.utils import EntryNotFoundError, OfflineModeIsEnabled, validate_repo_id
from timm.models import PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg
from timm.models._hub import save_config_for_hf
from torch import nn

from timm_dynamic.convert import check_finite, convert, extract_state_dict, filter_fn_of, one_line, read_checkpoint
from timm_dynamic.layers.argument_types import check_types
from timm_dynamic.layers.progress import Progress, save_once
from timm_dynamic.layers.warehouse import save_warehouses_once
from timm_dynamic.version import __version__

PACKAGE_WEIGHTS = Path(__file__).parent / "weights"
WEIGHT_SOURCES = ("file", "url", "state_dict", "hf_hub_id", "source")  # keys of a cfg that say where weights are
_FILENAME = "model.safetensors"  # timm's name for weights in a hub repository


def local_weights(name: str) -> Path:
    """The file in the local folder for a model's weights, whether it is there or not.

    The folder is `$TIMM_DYNAMIC_WEIGHTS`, by default `timm-dynamic` under the Hugging Face cache.

    Args:
        name: Model name with its tag, such as `ddf_mul_resnet50.in1k`.
    """
    folder = os.environ.get("TIMM_DYNAMIC_WEIGHTS") or Path(constants.HF_HOME) / "timm-dynamic"
    return Path(folder).expanduser() / f"{name}.safetensors"


def is_ours(name: str) -> bool:
    """Whether a model of that name, with or without a tag, is registered by this package."""
    architecture = name.partition(".")[0]
    return timm.is_model(architecture) and timm.model_entrypoint(architecture).__module__.startswith("timm_dynamic.")


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

    Other formats of weights are translated by the `checkpoint_filter_fn` of the file that defines the model.

    A source that the caller names (a cfg of its own, or a source in the overlay) is left to timm; the download of an
    `hf-hub:` name is checked first.

    Args:
        model_cls, variant, pretrained, pretrained_cfg, pretrained_cfg_overlay, cache_dir: As in timm.
        **kwargs: For timm's function and the model.

    Raises:
        ValueError: If an argument is of another type than it must be, if weights are wanted and neither the local
            folder nor the hub has them, or if their file is damaged, is another model's, or holds NaN or infinity.
    """
    check_types(model_cls, kwargs)
    kwargs.setdefault("pretrained_filter_fn", filter_fn_of(variant))
    file = None
    if pretrained and not isinstance(pretrained_cfg, (dict, PretrainedCfg)):
        overlay = pretrained_cfg_overlay or {}
        if not any(overlay.get(key) for key in WEIGHT_SOURCES):
            cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
            file = _find_weights(cfg, cache_dir)
            pretrained_cfg_overlay = {**overlay, "file": file}
    elif pretrained and isinstance(pretrained_cfg, dict):
        check_hub_file(pretrained_cfg, cache_dir)
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
    if kwargs.get("features_only"):
        for progress in {module for module in model.modules() if isinstance(module, Progress)}:
            save_once(model, progress)
        save_warehouses_once(model)
    if file:
        try:
            check_finite(model.state_dict())
        except ValueError as error:
            raise ValueError(f"{file} does not load into {variant}: {error}") from error
    return model


def check_hub_file(cfg: dict[str, Any], cache_dir: str | os.PathLike | None) -> None:
    """Download the weights of an `hf-hub:` name, whose cfg this is, and check them; nothing for other cfgs.

    Raises:
        ValueError: They are damaged.
    """
    if cfg.get("source") == "hf-hub":
        repo_id, _, revision = cfg["hf_hub_id"].partition("@")
        with suppress(EntryNotFoundError):  # timm knows other file names, too
            _check_content(_download(repo_id, _FILENAME, revision or None, cache_dir), repo_id)


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
        path = _download(repo_id, cfg.hf_hub_filename or _FILENAME, None, cache_dir)
    except Exception as error:  # which one depends on huggingface_hub's version and the HTTP library under it
        static = " --model-kwargs budget=-1" if cfg.tag.startswith("base_") else ""  # DynConv without masks
        raise ValueError(
            f"no weights for {name}: convert the authors' file by `timm-dynamic convert SRC --install --model "
            f"{name}{static}`. {local} does not exist, and the Hugging Face Hub did not give {repo_id}: "
            f"{why_failed(error)}"
        ) from error
    _check_content(path, repo_id)
    if not path.endswith(".safetensors"):
        extract_state_dict(read_checkpoint(path))  # refuses what is more than weights, before timm reads it
    return path


def _download(repo_id: str, filename: str, revision: str | None, cache_dir: str | os.PathLike | None) -> str:
    if not isinstance(try_to_load_from_cache(repo_id, filename, cache_dir, revision), str):
        # Fails at once; hf_hub_download retries for 25 s.
        get_hf_file_metadata(hf_hub_url(repo_id, filename, revision=revision))
    return hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir)


def _check_content(path: str, repo_id: str) -> None:
    """Raise a `ValueError`, and remove the file, if its content is not what the Hub announced.

    huggingface_hub compares sizes only. It caches a file under its SHA-256, which a link points to.
    """
    link = Path(path)
    if not link.is_symlink():
        return  # a file system without links
    blob = link.parent / os.readlink(link)
    if not re.fullmatch("[0-9a-f]{64}", blob.name) or file_sha256(blob) == blob.name:
        return
    with suppress(OSError):
        blob.unlink()
        link.unlink()
    removed = "it was removed, try again" if not blob.exists() else "delete it and try again"
    raise ValueError(f"the weights of {repo_id} are damaged: {blob} has not the SHA-256 that the Hub states; {removed}")


def file_sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def why_failed(error: Exception) -> str:
    """In a few words, why a request to the Hub failed."""
    while getattr(error, "response", None) is None and error.__cause__ is not None:
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"HTTP {status}: it is not there, or you need access: `hf auth login` or HF_TOKEN, and its conditions"
    if status == 404:
        return "HTTP 404: it is not there"
    if status:
        return f"HTTP {status}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and the cache does not have it"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def check_repo_id(repo_id: str) -> None:
    """Raise a `ValueError` if `repo_id` is not of the form ORG/NAME."""
    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise ValueError("ORG/NAME is expected")
    except ValueError as error:
        raise ValueError(f"{repo_id!r} cannot be a repository: {error}") from None


def save_for_hub(
    model: nn.Module,
    checkpoint: str | os.PathLike,
    folder: str | os.PathLike,
    model_args: dict[str, Any],
    label_names: list[str] | None = None,
    label_descriptions: dict[str, str] | None = None,
    use_ema: bool = False,
) -> None:
    """Write a model in timm's format for the Hub: `model.safetensors` and `config.json`.

    Args:
        model: As `timm.create_model` made it with `model_args`; it holds the checkpoint's weights afterwards.
        checkpoint: File to load, strictly (see `timm_dynamic.convert.load_checkpoint`).
        folder: Existing folder to write to.
        model_args: What the model was created with and has to be created with again.
        label_names: One for each class; None: those in the model's cfg, if any.
        label_descriptions: By label name.
        use_ema: Take the averaged weights of the checkpoint.

    Raises:
        FileNotFoundError, ValueError: As for `load_checkpoint`, or the number of labels is not that of the classes.
        OSError: The files cannot be written.
    """
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f"{len(label_names)} labels for {model.num_classes} classes")
    convert(checkpoint, Path(folder) / _FILENAME, model, use_ema)
    labels = {"label_names": label_names, "label_descriptions": label_descriptions}
    save_config_for_hf(model, Path(folder) / "config.json", {k: v for k, v in labels.items() if v}, model_args)


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a folder to a repository of the Hub, which is made if missing, and return the address of the commit.

    Args:
        folder: What to upload, in one commit.
        repo_id: ORG/NAME.
        private: Make a new repository private.
        revision: Branch, made if missing; None: main.
        token: None: the one of huggingface_hub's login.

    Raises:
        ValueError: The Hub does not take it.
    """
    api = HfApi(token=token, library_name="timm-dynamic", library_version=__version__)
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Upload by timm-dynamic push"
        ).commit_url
    except Exception as error:  # see _find_weights
        raise ValueError(f"cannot push to {repo_id}: {why_failed(error)}") from error
