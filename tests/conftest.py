"""What several test files need: the golden cases, a small image folder."""

import functools
import gc
import importlib
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from golden import DATA, Golden
from processes import Processes

import timm_dynamic


def pytest_collection_finish():
    """What is there by now stays: collections, of which there are fewer, need look at what tests leave alone."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(scope="session")
def golden():
    """`golden(name)` is the `Golden` of a case."""
    return functools.cache(Golden)


@pytest.fixture
def script(monkeypatch):
    """`script(name)` is one of the scripts under benchmarks/ or docs/, as a module."""
    for folder in ("docs", "benchmarks"):
        monkeypatch.syspath_prepend(DATA.parents[1] / folder)
    return importlib.import_module


@pytest.fixture(scope="session")
def processes():
    """What runs commands in processes of their own."""
    processes = Processes()
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def small_digits(tmp_path_factory):
    """An image folder of ten classes: 40 of scikit-learn's digits in train/, 20 in val/. Not to be written to."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    for label in range(10):
        images = digits.images[digits.target == label][:6]
        for i, image in enumerate(images):
            path = folder / ("train" if i < 4 else "val") / str(label) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15).astype(np.uint8)).save(path)
    return folder


@pytest.fixture
def nothing_drawn_on_meta(monkeypatch):
    """There random numbers are none, and yet take most of the time in which a network is made."""
    for name in ("normal_", "uniform_"):
        draw = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda x, *args, draw=draw, **kwargs: x if x.is_meta else draw(x, *args, **kwargs)
        )


@pytest.fixture(autouse=True)
def kernels_of_gpus_are_on(request):
    """In tests of them, measured or not."""
    with timm_dynamic.use("kernel") if request.node.get_closest_marker("cuda") else nullcontext():
        yield
