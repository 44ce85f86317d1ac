"""The contract of all models of all families."""

import re

import pytest
import timm
from contract import ModelContract
from timm.models import model_entrypoint

from timm_dynamic.families import FAMILIES

# Those of segmentation and pose have no pooled features and no classifier of one label an image: their files in
# tests/models.
MODELS = [n for family in FAMILIES.values() for n in family.models if "deeplab" not in n and "hourglass" not in n]
# They differ from another one by the number of kernels alone, and are large: what runs on the meta device.
MORE_KERNELS = [name for name in MODELS if re.search(r"_\dx$", name)]


class TestModels(ModelContract):
    @pytest.fixture(params=[name for name in MODELS if name not in MORE_KERNELS])
    def name(self, request):
        return request.param


@pytest.mark.parametrize("name", MORE_KERNELS)
class TestModelsWithMoreKernels:
    test_registration = ModelContract.test_registration
    test_default_cfg_describes_the_model = ModelContract.test_default_cfg_describes_the_model


def test_every_model_of_the_package_has_a_family():
    ours = {name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("timm_dynamic.")}
    assert {name for family in FAMILIES.values() for name in family.models} == ours - {"dynamized"}
