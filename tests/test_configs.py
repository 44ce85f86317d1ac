import math
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.data import create_transform
from timm.data.mixup import mixup_target
from timm.models import model_entrypoint
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torchvision.transforms import ColorJitter

from timm_dynamic.cli.arguments.train import make_parser
from timm_dynamic.cli.arguments.train_pose import make_parser as make_pose_parser
from timm_dynamic.cli.arguments.train_segmentation import make_parser as make_segmentation_parser
from timm_dynamic.cli.common import create_model
from timm_dynamic.cli.train_segmentation import build_optimizer

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


# By epoch, at the first of its updates.
DYNCONV_RATES = {
    "dynconv_resnet32": {0: 0.1, 149: 0.1, 150: 0.01, 249: 0.01, 250: 1e-3, 349: 1e-3},
    "dynconv_resnet101": {0: 0.025, 29: 0.025, 30: 2.5e-3, 59: 2.5e-3, 60: 2.5e-4, 89: 2.5e-4, 90: 2.5e-5, 99: 2.5e-5},
}
DCD_RATES = {
    "dcd_resnet50": {0: 0.1, 29: 0.1, 30: 0.01, 59: 0.01, 60: 1e-3, 89: 1e-3, 90: 1e-4, 119: 1e-4},
    "dcd_mobilenetv2": {0: 0.1, 100: 0.075, 150: 0.05, 200: 0.025},
}


def parse(path):
    others = {"deeplab": make_segmentation_parser, "hourglass": make_pose_parser}
    parser = next((make for name, make in others.items() if name in path.stem), make_parser)()
    return parser.parse_args(["data", "--config", str(path)])


def rates(optimizer, args, updates):
    """The learning rate of every update, in a list for each epoch."""
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates)
    result = []
    for epoch in range(epochs):
        result.append([])
        for update in range(updates):
            result[-1].append(optimizer.param_groups[0]["lr"])
            scheduler.step_update(epoch * updates + update + 1)
        scheduler.step(epoch + 1)
    return result


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_taken_over(path):
    values = yaml.safe_load(path.read_text())
    args = vars(parse(path))
    assert {key: args[key] for key in values} == values
    assert all(isinstance(args[key], type(value)) for key, value in values.items())
    assert timm.is_model(args["model"])
    assert re.fullmatch(rf"{args['model']}(\.digits|\.cifar10|\.(budget\w+|base)_mpii|_w\d+(_kernels)?)?", path.stem)


def config_of(tag):
    """The stem of the config that weights come from: one for all budgets."""
    if tag.startswith("dynamized."):  # the base's
        return re.sub(r"dynamized\.\w+_resnet8_", "dynconv_resnet8.", tag)
    if tag.startswith(("dynconv_resnet8.", "dynconv_resnet20.")):  # ours, one for all depths
        return re.sub(r"resnet\d+\.(budget\d+_)?", "resnet8.", tag)
    name = re.sub(r"_[24]x(?=\.)", "", tag)  # one for all numbers of kernels
    return re.sub(r"\.((budget\d+|base)_)?(in1k|cifar10)$", "", name)


def test_every_ddf_model_has_one():
    assert {path.stem for path in DDF} == set(timm.list_models("ddf_*"))


def test_every_model_with_weights_has_one():
    """Those that the authors trained on ImageNet, those that we trained."""
    ours = [
        tag
        for tag in timm.list_models(include_tags=True)
        if model_entrypoint(tag).__module__.startswith("timm_dynamic.") and not tag.endswith(".untrained")
    ]
    assert {config_of(tag) for tag in ours} <= {path.stem for path in CONFIGS}


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

    by_epoch = [rate for (rate,) in rates(optimizer, args, updates=1)]
    assert len(by_epoch) == 130
    assert {epoch: by_epoch[epoch] for epoch in DDF_RATES} == pytest.approx(DDF_RATES, rel=1e-2)
    assert by_epoch[:7] == pytest.approx([DDF_RATES[epoch] for epoch in range(7)], rel=2e-6)
    assert args.batch_size * 8 == 1024


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "decay", "dropout"),
    [("dcd_resnet50", 120, 256, 1e-4, 0.1), ("dcd_mobilenetv2", 300, 512, 2e-5, 0.2)],
)
def test_dcd_recipe(name, epochs, batch, decay, dropout):
    """Schedule, weight decay and targets are those of the authors' script, as are the flags of their command."""
    args = parse(next(path for path in CONFIGS if path.stem == name))
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.SGD)
    assert (len(group["params"]), group["weight_decay"]) == (4, decay)
    assert not group["nesterov"] and group["momentum"] == 0.9

    updates = 3
    by_epoch = rates(optimizer, args, updates)
    assert len(by_epoch) == epochs
    assert {epoch: by_epoch[epoch][0] for epoch in DCD_RATES[name]} == pytest.approx(DCD_RATES[name])
    if name == "dcd_mobilenetv2":  # the cosine moves in every update
        expected = [0.05 * (1 + math.cos(math.pi * i / epochs / updates)) for i in range(epochs * updates)]
        assert sum(by_epoch, []) == pytest.approx(expected)

    target = mixup_target(torch.tensor([3]), 1000, smoothing=args.smoothing, lam=1.0)[0]
    assert target[3].item() == pytest.approx(0.9, rel=1e-6)
    assert target[4].item() == pytest.approx(0.1 / 999, rel=1e-5)
    assert (args.batch_size * 4, args.drop, args.mixup) == (batch, dropout, 0.2)


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "decay"), [("dynconv_resnet32", 350, 256, 5e-4), ("dynconv_resnet101", 100, 64, 1e-4)]
)
def test_dynconv_recipe(name, epochs, batch, decay):
    """Schedule, weight decay and targets are those of the authors' script."""
    args = parse(next(path for path in CONFIGS if path.stem == name))
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.SGD)
    assert (len(group["params"]), group["weight_decay"]) == (4, decay)
    assert not group["nesterov"] and group["momentum"] == 0.9
    by_epoch = rates(optimizer, args, updates=2)
    assert len(by_epoch) == epochs
    assert {epoch: by_epoch[epoch][0] for epoch in DYNCONV_RATES[name]} == pytest.approx(DYNCONV_RATES[name])
    assert (args.batch_size, args.smoothing, args.mixup, args.color_jitter) == (batch, 0, 0, 0)


@pytest.mark.parametrize("name", timm.list_models("*_mpii", include_tags=True))
def test_pose_recipe(name):
    """Schedule, budget and augmentation are those of the authors' script."""
    args = parse(next(path for path in CONFIGS if path.stem == name))
    optimizer = create_optimizer_v2(torch.nn.Linear(2, 2), **optimizer_kwargs(args), **args.opt_kwargs)
    assert type(optimizer) is torch.optim.Adam
    assert all((group["betas"], group["weight_decay"]) == ((0.9, 0.999), 0) for group in optimizer.param_groups)
    by_epoch = [rate for (rate,) in rates(optimizer, args, updates=1)]
    assert by_epoch == pytest.approx([2.5e-4] * 59 + [2.5e-5] * 30 + [2.5e-6] * 11)
    tag = name.partition(".")[2].removesuffix("_mpii")
    budgets = {"budget12p5": 0.125, "budget25": 0.25, "budget50": 0.5, "base": -1}
    assert (args.model_kwargs, args.img_size, args.batch_size) == ({"budget": budgets[tag]}, 256, 6)
    assert (args.scale_factor, args.rotation_factor, args.rotation_prob, args.hflip) == (0.25, 30, 0.6, 0.5)
    assert timm.create_model(args.model, **args.model_kwargs).num_features == (48 if "f48" in args.model else 96)


def test_dynconv_starts_from_static_weights(tmp_path):
    """The recipe's `--initial-checkpoint`: those of timm's network, with new mask units."""
    static = timm.create_model("resnet18", num_classes=10)
    torch.save(static.state_dict(), tmp_path / "static.pth")
    masked = create_model("dynconv_resnet18", str(tmp_path / "static.pth"), num_classes=10).state_dict()
    assert all(torch.equal(masked[key], value) for key, value in static.state_dict().items())
    new = {key for key in masked if key not in static.state_dict()}
    assert new == {key for key in masked if ".masker." in key} | {"progress.done"} and len(new) == 8 * 4 + 1
    assert all(masked[key].std() > 0 for key in new if key.endswith("weight"))


@pytest.mark.parametrize("name", ["dy_deeplabv3plus_mobilenetv2", "skoltech_dy_deeplabv3plus"])
@pytest.mark.parametrize(("width", "dataset", "divisor"), [("", "voc", 1), ("_050", "voc+sbd", 16)])
def test_segmentation_recipe(name, width, dataset, divisor):
    """Rates of backbone and head, schedule and weight decay are those of the authors' script.

    It divided one loss by 16. A step of SGD with momentum is the same with that, and with the rates divided and the
    decay multiplied by it.
    """
    args = parse(next(path for path in CONFIGS if path.stem == f"{name}{width}"))
    assert (args.dataset, args.img_size, args.scale, args.batch_size) == (dataset, 513, [0.5, 2.0], 16)
    assert args.model_kwargs == {"pretrained_backbone": True}
    model = torch.nn.ModuleDict({"backbone": torch.nn.BatchNorm2d(4), "head": torch.nn.Conv2d(3, 4, 1)})
    optimizer = build_optimizer(args, model)
    assert isinstance(optimizer, torch.optim.SGD)
    backbone, head = optimizer.param_groups
    for group, part in ((backbone, "backbone"), (head, "head")):
        assert set(group["params"]) == set(model[part].parameters())
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4 * divisor, False)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=1)
    assert epochs == 100 and (backbone["lr"], head["lr"]) == pytest.approx((0.007 / divisor, 0.07 / divisor))
    for epoch in (50, 100):
        scheduler.step(epoch)
        share = (1 + math.cos(math.pi * epoch / 100)) / 2
        rates = [(1e-6 + (lr - 1e-6) * share) / divisor for lr in (0.007, 0.07)]
        assert (backbone["lr"], head["lr"]) == pytest.approx(rates)


@pytest.mark.parametrize("width", ["", "_050", "_025"])
def test_mobilenetv3_recipe(width):
    """Published for one network, and taken over for timm's: nothing but the model differs."""
    paths = {path.stem: path for path in CONFIGS}
    name = f"dy_mobilenetv3_small{width}"
    theirs, ours = (yaml.safe_load(paths[stem].read_text()) for stem in (f"skoltech_{name}", name))
    assert {**ours, "model": theirs["model"]} == theirs and theirs["model"] == f"skoltech_{ours['model']}"
    jitter = theirs["color_jitter"]
    transform = create_transform(224, is_training=True, color_jitter=jitter)
    (found,) = (one for one in transform.transforms if isinstance(one, ColorJitter))
    assert (found.brightness, found.saturation, found.hue) == ((0.7, 1.3), (0.8, 1.2), (-0.1, 0.1))
    assert theirs["drop"] == 0.2
