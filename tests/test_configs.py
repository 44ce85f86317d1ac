import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_dynamic.cli.train_arguments import make_parser

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
DDF = [path for path in CONFIGS if path.stem.startswith("ddf_")]
# The authors' script, per epoch.
DDF_RATES = {
    0: 1e-4,
    1: 0.08008,
    2: 0.16006,
    3: 0.24004,
    4: 0.32002,
    5: 0.398289,
    6: 0.397538,
    60: 0.200005,
    119: 7.9e-5,
}
DDF_RATES |= {epoch: 1e-5 for epoch in range(120, 130)}


def parse(path):
    return make_parser().parse_args(["data", "--config", str(path)])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_taken_over(path):
    values = yaml.safe_load(path.read_text())
    args = vars(parse(path))
    assert {key: args[key] for key in values} == values
    assert all(isinstance(args[key], type(value)) for key, value in values.items())
    assert timm.is_model(args["model"])
    assert re.fullmatch(rf"{args['model']}(\.digits|_w\d+(_kernels)?)?", path.stem)


def test_every_ddf_model_has_one():
    assert {path.stem for path in DDF} == set(timm.list_models("ddf_*"))


@pytest.mark.parametrize("path", DDF, ids=lambda path: path.stem)
def test_ddf_recipe(path):
    """Schedule and weight decay are those of the authors' script."""
    args = parse(path)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
    decay = {len(group["params"]): group["weight_decay"] for group in optimizer.param_groups}
    assert decay == {1: 1e-4, 3: 0.0}  # the weight; the bias and BatchNorm's two
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["nesterov"] and optimizer.defaults["momentum"] == 0.9

    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=1251)
    assert epochs == 130
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch + 1)
    assert {epoch: rates[epoch] for epoch in DDF_RATES} == pytest.approx(DDF_RATES, rel=1e-2)
    assert [rates[epoch] for epoch in range(7)] == pytest.approx([DDF_RATES[epoch] for epoch in range(7)], rel=2e-6)
    assert args.batch_size * 8 == 1024
