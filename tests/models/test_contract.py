"""The contract of all models of all families."""

import functools
import re

import pytest
import timm
from contract import CfgContract, ModelContract, NameContract
from shallow import shallow
from timm.models import model_entrypoint

from timm_dynamic.families import FAMILIES
from timm_dynamic.models import cond_efficientnet
from timm_dynamic.models._mobilenetv2 import _STAGES

# Those of segmentation and pose have no pooled features and no classifier of one label an image: their files in
# tests/models.
MODELS = [n for family in FAMILIES.values() for n in family.models if "deeplab" not in n and "hourglass" not in n]

# What computes runs in one network of each kind, with arguments that make it small: others are deeper or wider only.
RESNET = {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 48)}
ONE_A_STAGE, TWO_A_STAGE = functools.partial(shallow, _STAGES), functools.partial(shallow, _STAGES, 2)
SMALL = {
    **{family.tiny: {} for family in FAMILIES.values()},
    "cond_efficientnet_b0_4e": lambda: shallow(cond_efficientnet._STAGES),
    "cotnext50_2x48d": {"layers": (1, 1, 1, 1)},
    "dcd_mobilenetv2_035": ONE_A_STAGE,
    "dcd_resnet50": RESNET,
    "ddf_add_resnet50": RESNET,
    "dy_mobilenetv2_035": ONE_A_STAGE,
    "dy_mobilenetv3_small_025": {},
    "dy_resnet50": RESNET,
    "dynconv_mobilenetv2_050": TWO_A_STAGE,  # the first has no mask
    "dynconv_resnet18": RESNET,
    "dynconv_resnet50": RESNET,
    "kw1d2x_mobilenetv2_050": ONE_A_STAGE,
    "kw1d2x_resnet50": RESNET,
    "kw1x_convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)},
    "lsnet_t_distill": {"embed_dim": (16, 32, 48, 64), "depth": (0, 2, 2, 2)},
    "od_mobilenetv2_050": ONE_A_STAGE,
    "od_resnet50": RESNET,
    "ped_mobilenetv2": ONE_A_STAGE,
    "ped_resnet50": RESNET,
    "skoltech_dy_mobilenetv3_small_025": {},
}


@pytest.mark.parametrize("name", MODELS)
class TestNames(NameContract):
    pass


@pytest.mark.parametrize("name", [name for name in MODELS if not re.search("1(01|52)(_|$)", name)])
class TestCfgs(CfgContract):
    pass


@pytest.mark.parametrize("name", SMALL, scope="module")  # one model after the other, so that each is made once
class TestModels(ModelContract):
    @pytest.fixture(scope="module")
    def create(self, name):
        options = SMALL[name]
        return lambda **kwargs: timm.create_model(name, **(options() if callable(options) else options), **kwargs)


def test_every_model_of_the_package_has_a_family():
    ours = {name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("timm_dynamic.")}
    assert {name for family in FAMILIES.values() for name in family.models} == ours - {"dynamized"}


def test_a_network_of_every_file_is_run():
    assert {model_entrypoint(name).__module__ for name in MODELS} == {model_entrypoint(n).__module__ for n in SMALL}
