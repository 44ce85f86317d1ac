"""The families of dynamic convolution: the only list of them. Each file of models adds its record on import.

Whatever has a list of families, their layers, models, static twins or accuracies takes it from here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import timm
from timm.models import split_model_name_tag
from torch import nn


@dataclass(frozen=True)
class Family:
    """What one family is. Several files of models can each say a part of it (see `register`).

    Attributes:
        name: In lower case. Its models are named `NAME_...` or `test_NAME_...`, its layers have it as `family`.
        title: As people write it.
        about: What it does, to follow the title in a sentence.
        paper: Authors, and where it was published.
        tiny: The model for tests and small images.
        layer: The drop-in convolution that `dynamize` puts into other models; None: there is none.
        keeps: How far `dynamize` may move the outputs of a pretrained network in evaluation, in standard deviations of
            its logits; None: weights are not taken over.
        routing: What `timm_dynamic.record` gives of its layers; "": nothing.
        terms: Names of the auxiliary losses of its models.
        exact: Arguments of its models under which training has no noise.
        timed: The models that benchmarks/models.py times beside their twins.
        twins: By model, the timm model with ordinary convolutions in the place of the dynamic ones.
        reported: The authors' ImageNet top-1 in percent: by tag of published weights, or by model if only the paper has
            it. (On another dataset if the tag says so.)
        patterns: Of the names of its models, where they are others, such as `rednet*`.
        static: Arguments that make a model of it its own static network, where no timm model is that.
        golden: Cases in tests/data whose name is not that of their model: the model, and its arguments.
    """

    name: str
    title: str = ""
    about: str = ""
    paper: str = ""
    tiny: str = ""
    layer: type[nn.Module] | None = None
    keeps: float | None = None
    routing: str = ""
    terms: tuple[str, ...] = ()
    exact: Mapping[str, Any] = field(default_factory=dict)
    timed: tuple[str, ...] = ()
    twins: Mapping[str, str] = field(default_factory=dict)
    reported: Mapping[str, float] = field(default_factory=dict)
    patterns: tuple[str, ...] = ()
    static: Mapping[str, Any] = field(default_factory=dict)
    golden: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """All of its models, without tags."""
        return timm.list_models([f"{self.name}_*", f"test_{self.name}_*", *self.patterns])

    def _joined(self, other: "Family") -> "Family":
        facts = {}
        for key in (f.name for f in fields(self)):
            mine, theirs = getattr(self, key), getattr(other, key)
            if isinstance(mine, Mapping):
                facts[key] = {**mine, **theirs}
            elif isinstance(mine, tuple):
                facts[key] = tuple(dict.fromkeys(mine + theirs))
            elif mine in ("", None) or theirs in ("", None, mine):
                facts[key] = theirs if mine in ("", None) else mine
            else:
                raise ValueError(f"the family {self.name} has two values for {key}: {mine!r} and {theirs!r}")
        return Family(**facts)


FAMILIES: dict[str, Family] = {}


def register(record: Family) -> None:
    """Add a family, or what another file of models says of it.

    Args:
        record: With a part of the attributes; mappings and tuples are joined with those of earlier records.

    Raises:
        ValueError: If it contradicts an earlier record.
    """
    known = FAMILIES.get(record.name)
    FAMILIES[record.name] = record if known is None else known._joined(record)


def layers() -> dict[str, type[nn.Module]]:
    """The layers that can replace a convolution of another model, by the name of the family."""
    return {name: family.layer for name, family in sorted(FAMILIES.items()) if family.layer is not None}


def family_of(model: str) -> Family:
    """The family of a model of this package.

    Args:
        model: Its name, with or without a tag.

    Raises:
        ValueError: If it has none.
    """
    model = _architecture(model)
    for family in FAMILIES.values():
        if model in family.models:
            return family
    raise ValueError(f"{model} is no model of {', '.join(sorted(FAMILIES))}")


def static_twin(model: str) -> str:
    """The timm model that has ordinary convolutions where this one has dynamic ones.

    Args:
        model: Its name, with or without a tag.

    Raises:
        ValueError: If it has none.
    """
    model = _architecture(model)
    for family in FAMILIES.values():
        if model in family.twins:
            return family.twins[model]
    raise ValueError(f"{model} has no static twin: name a model to compare it with (--baseline NAME)")


def _architecture(model: str) -> str:
    if isinstance(model, str):
        return split_model_name_tag(model)[0]
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    example = f"{name!r} for this one" if name else "'dcd_resnet50'"
    raise ValueError(f"give the name of a model, as in timm.create_model, {example}; got a {type(model).__name__}")


def name_of(spelt: str) -> str:
    """The name of the family that somebody may mean: `od` for `ODConv` or `odconv2d`; others in lower case."""
    title = spelt.lower().removesuffix("2d")
    return next((name for name, family in FAMILIES.items() if family.title.lower() == title), spelt.lower())
