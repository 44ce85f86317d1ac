"""Times networks with a weight for every sample beside the same networks as their authors compute them.

    python benchmarks/grouped.py [--models NAME ...] [--threads N] [--seconds N] [--output FILE]

The authors' way is plain PyTorch: the weights of all samples are made, gates included, and applied as one convolution
whose groups are those of the batch. Beside it, in turn: the network as this package runs it (in evaluation as the copy
that `timm_dynamic.optimize` makes), and its static twin, likewise. Training is a forward and a backward pass.
"""

import argparse
import contextlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import timm_dynamic
from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.families import static_twin
from timm_dynamic.layers import cond, kw, od
from timm_dynamic.ops import backend_info
from timm_dynamic.timing import environment, measure, summarise

MODELS = ("cond_efficientnet_b0_4e", "od_resnet18", "od_resnet18_4x", "od_mobilenetv2_4x", "kw1x_resnet18")
CASES = (("eval", 1), ("eval", 16), ("train", 16))
FEWEST, MOST = 5, 40  # rounds


def sample_conv2d(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> Tensor:
    """`timm_dynamic.ops.sample_conv2d`, as one grouped convolution over the batch."""
    B, O = weight.shape[:2]
    out = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), None, stride, padding, dilation, B * groups)
    return out.view(B, O, *out.shape[2:])


def mixed_conv2d(x, attention, kernels, stride, padding, dilation, groups, a_in=None, a_tap=None, a_out=None) -> Tensor:
    """`timm_dynamic.ops.mixed_conv2d`, likewise; the gates of the inputs and outputs scale the maps."""
    weight = kernels
    if a_tap is not None:
        weight = weight * a_tap.view(len(x), 1, 1, 1, *kernels.shape[3:])
    if attention is not None:
        weight = weight * attention[:, :, None, None, None, None]
    weight = weight.sum(1) if weight.ndim == 6 else weight.expand(len(x), *weight.shape[1:])
    x = x if a_in is None else x * a_in[:, :, None, None]
    out = sample_conv2d(x, weight, stride, padding, dilation, groups)
    return out if a_out is None else out * a_out[:, :, None, None]


@contextlib.contextmanager
def authors_way():
    """Within this context the layers compute as their authors' do."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(timm_dynamic.use("formula"))
        stack.enter_context(mock.patch.object(cond, "mixed_conv2d", mixed_conv2d))
        stack.enter_context(mock.patch.object(od, "mixed_conv2d", mixed_conv2d))
        stack.enter_context(mock.patch.object(kw, "sample_conv2d", sample_conv2d))
        yield


def candidates(name: str, mode: str, x: Tensor) -> dict[str, Callable[[], object]]:
    """The ways of a network, one iteration each."""
    torch.manual_seed(0)
    model, twin = timm.create_model(name), timm.create_model(static_twin(name))
    if mode == "train":
        steps = {"this package": partial(step, model, x), "static twin": partial(step, twin, x)}
        return {**steps, "grouped convolution": partial(as_authors, partial(step, model, x))}
    model, twin = model.eval(), twin.eval()
    forms = {"this package": timm_dynamic.optimize(model, x), "static twin": timm_dynamic.optimize(twin, x)}
    with torch.no_grad(), authors_way():
        theirs = model(x)
    torch.testing.assert_close(forms["this package"](x), theirs, rtol=1e-3, atol=1e-3 * theirs.std().item())
    ways = {way: partial(evaluate, form, x) for way, form in forms.items()}
    return {**ways, "grouped convolution": partial(as_authors, partial(evaluate, model, x))}


def as_authors(run: Callable[[], object]) -> None:
    with authors_way():
        run()


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor) -> None:
    model(x)


def step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().mean().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60, help="for the timed rounds of a case (default: 60)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "grouped_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = {**environment(torch.device("cpu")), "kernels": backend_info()["cpu"], "seconds": args.seconds, "rows": []}
    for name in tqdm(args.models, disable=None):
        for mode, batch_size in CASES:
            x = torch.randn(batch_size, *timm.get_pretrained_cfg(name).input_size)
            ways = candidates(name, mode, x)
            first = measure(ways, 1, 1, torch.device("cpu"))
            rounds = int(min(max(1e3 * args.seconds / sum(map(sum, first.values())), FEWEST), MOST))
            samples = measure(ways, rounds, 0, torch.device("cpu"))
            times = {way: summarise(values) for way, values in samples.items()}
            ratios = {way: time["median_ms"] / times["static twin"]["median_ms"] for way, time in times.items()}
            report["rows"].append({"model": name, "mode": mode, "batch_size": batch_size, "ways": times})
            tqdm.write(f"{name}, {mode}, batch {batch_size}: " + ", ".join(f"{w} {r:.2f}" for w, r in ratios.items()))
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with replacing(args.output) as temporary:
                temporary.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
