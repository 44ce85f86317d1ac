"""Models: importing this package registers them all in timm's registry."""

from timm.models import split_model_name_tag

from timm_dynamic.models import (
    dcd_mobilenetv2,
    dcd_resnet,
    ddf_resnet,
    dy_deeplabv3plus,  # noqa: F401 (timm has no twin of it)
    dy_mobilenetv2,
    dy_mobilenetv3,
    dy_resnet,
    dynconv_mobilenetv2,
    dynconv_resnet,
    ped_mobilenetv2,
    ped_resnet,
)

_FAMILIES = (  # those with static twins in timm
    dcd_mobilenetv2,
    dcd_resnet,
    ddf_resnet,
    dy_mobilenetv2,
    dy_mobilenetv3,
    dy_resnet,
    dynconv_mobilenetv2,
    dynconv_resnet,
    ped_mobilenetv2,
    ped_resnet,
)


def static_twin(name: str) -> str:
    """The timm model that has ordinary convolutions where this one has dynamic ones.

    Args:
        name: One of this package's models, with or without a tag.

    Raises:
        ValueError: If it has none.
    """
    twins = {dynamic: static for family in _FAMILIES for dynamic, static in family.STATIC_TWINS.items()}
    name = split_model_name_tag(name)[0]
    if name not in twins:
        raise ValueError(f"{name} has no static twin: name a model to compare it with (--baseline NAME)")
    return twins[name]
