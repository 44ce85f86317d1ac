"""dynconv_resnet8 trained on digits with several budgets: accuracy, executed MACs and time, on the 360 test images.

    timm-dynamic digits DIGITS
    for budget in -1 0.7 0.5 0.3; do
        timm-dynamic train DIGITS --config configs/dynconv_resnet8.digits.yaml --model-kwargs budget=$budget \
            --output RUNS --experiment $budget
    done
    python benchmarks/digits_budgets.py DIGITS RUNS

Takes the last checkpoint of each run. What is timed classifies all images, in batches: each model as it runs by
default, and "dense", which computes every position and then multiplies by the masks; all of them optimized.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import timm
import torch
from timm.data import ImageDataset, create_transform, resolve_data_config
from torch import Tensor, nn

from timm_dynamic import optimize
from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.convert import load_checkpoint
from timm_dynamic.cost import count_active, count_macs
from timm_dynamic.ops import backend_info
from timm_dynamic.timing import environment, measure, summarise

MODEL = "dynconv_resnet8"
BUDGETS = (-1, 0.7, 0.5, 0.3)


def load_images(folder: Path) -> tuple[Tensor, Tensor]:
    """All images of a folder, as the model wants them, and their labels."""
    config = resolve_data_config({}, model=timm.create_model(MODEL))
    dataset = ImageDataset(str(folder), transform=create_transform(**config))
    images, labels = zip(*dataset, strict=True)
    return torch.stack(images), torch.tensor(labels)


def describe(model: nn.Module, images: Tensor, labels: Tensor) -> dict:
    with count_active(model) as active:
        right = model(images).argmax(1) == labels
    macs = count_macs(model, images)
    row = {"budget": model.budget, "top1": 100 * right.double().mean().item(), "macs": macs.executed}
    if active.blocks:
        row["share"] = active.share
        row["positions"] = [round(block.active / block.positions, 3) for block in active.blocks.values()]
    return row


def classify(model: nn.Module, batches: list[Tensor]) -> None:
    for batch in batches:
        model(batch)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("digits", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "digits_budgets_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    images, labels = load_images(args.digits / "val")
    batches = [batch.contiguous(memory_format=torch.channels_last) for batch in images.split(args.batch_size)]
    rows, candidates = {}, {}
    for budget in BUDGETS:
        model = timm.create_model(MODEL, budget=budget).eval()
        load_checkpoint(model, args.runs / str(budget) / "last.pth.tar")
        rows[budget] = describe(model, images, labels)
        for execution in ("auto", "dense"):
            model.execution = execution
            fast = optimize(model, batches[0], memory_format=torch.channels_last)
            candidates[budget, execution] = partial(classify, fast, batches)
    samples = measure(candidates, args.iterations, 5, device)
    for (budget, name), times in samples.items():
        rows[budget][name] = summarise([time / len(images) for time in times])  # per image
    report = {
        "batch_size": args.batch_size,
        **environment(device),
        "kernels": backend_info()["cpu"],
        "rows": list(rows.values()),
    }
    with replacing(args.output) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
