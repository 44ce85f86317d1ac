"""What all tests of models need."""

import pytest


@pytest.fixture(autouse=True)
def _quick_on_meta(nothing_drawn_on_meta):
    pass
