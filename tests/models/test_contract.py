"""The contract of all models of all families."""

import functools

import pytest
import timm
from contract import ModelContract, RecordContract
from timm.models import model_entrypoint

from timm_dynamic.families import FAMILIES

# Those of segmentation and pose have no pooled features and no classifier of one label an image: their files in
# tests/models.
MODELS = [n for family in FAMILIES.values() for n in family.models if "deeplab" not in n and "hourglass" not in n]

# What computes runs in one network of each kind, with arguments that make it small: others are deeper or wider only.
RESNET = {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 48)}
SMALL = {
    **{family.tiny: {} for family in FAMILIES.values()},
    "cond_efficientnet_b0_4e": {},
    "cotnext50_2x48d": {"layers": (1, 1, 1, 1)},
    "dcd_mobilenetv2_035": {},
    "dcd_resnet50": RESNET,
    "ddf_add_resnet50": RESNET,
    "dy_mobilenetv2_035": {},
    "dy_mobilenetv3_small_025": {},
    "dy_resnet50": RESNET,
    "dynconv_mobilenetv2_050": {},
    "dynconv_resnet18": RESNET,
    "dynconv_resnet50": RESNET,
    "kw1d2x_mobilenetv2_050": {},
    "kw1d2x_resnet50": RESNET,
    "kw1x_convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)},
    "lsnet_t_distill": {},
    "od_mobilenetv2_050": {},
    "od_resnet50": RESNET,
    "ped_mobilenetv2": {},
    "ped_resnet50": RESNET,
    "skoltech_dy_mobilenetv3_small_025": {},
}


@pytest.mark.parametrize("name", MODELS)
class TestRecords(RecordContract):
    pass


@pytest.mark.parametrize("name", SMALL, scope="module")  # one model after the other, so that each is made once
class TestModels(ModelContract):
    @pytest.fixture(scope="module")
    def create(self, name):
        return functools.partial(timm.create_model, name, **SMALL[name])


def test_every_model_of_the_package_has_a_family():
    ours = {name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("timm_dynamic.")}
    assert {name for family in FAMILIES.values() for name in family.models} == ours - {"dynamized"}


def test_a_network_of_every_file_is_run():
    assert {model_entrypoint(name).__module__ for name in MODELS} == {model_entrypoint(n).__module__ for n in SMALL}
