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
# They differ from another one by the number of kernels or by the width alone: what runs on the meta device.
AS_ANOTHER = [name for name in MODELS if re.search(r"_\dx$|^skoltech.*_small(_050)?$", name)]


class TestModels(ModelContract):
    @pytest.fixture(params=[name for name in MODELS if name not in AS_ANOTHER])
    def name(self, request):
        return request.param


@pytest.mark.parametrize("name", AS_ANOTHER)
class TestModelsAsAnother:
    test_registration = ModelContract.test_registration
    test_default_cfg_describes_the_model = ModelContract.test_default_cfg_describes_the_model


def test_every_model_of_the_package_has_a_family():
    ours = {name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("timm_dynamic.")}
    assert {name for family in FAMILIES.values() for name in family.models} == ours - {"dynamized"}
