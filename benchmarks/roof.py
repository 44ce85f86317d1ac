"""What bounds the networks on a CPU: arithmetic, parameters, maps or calls, beside the time that they take.

    python benchmarks/roof.py [--models NAME ...] [--threads N] [--iterations N] [--output FILE]

The machine's rates are measured first: multiply-accumulates in a product of large matrices, bytes in a copy that no
cache holds, and a call that does nothing. Then, for the copies that `timm_dynamic.optimize` makes of each network and
of its static twin, in turns: their time, and what they would take at these rates for their multiply-accumulates alone,
for reading every parameter once, for reading and writing all maps from memory, and for their calls. No network can be
faster than the largest of the first two; maps stay in the caches in part, and calls overlap with nothing.

At last what bounds a sample's weight in onnxruntime: convolutions whose weight is an input beside the same ones with a
constant, which the runtime lays out in blocks beforehand.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from best import onnxruntime_way
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import timm_dynamic
from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.families import static_twin
from timm_dynamic.timing import environment, measure, summarise

MODELS = (
    *("dcd_resnet50", "dcd_mobilenetv2", "ped_resnet18", "dy_mobilenetv2", "ddf_mul_resnet50"),
    *("od_resnet18", "od_resnet18_4x", "od_mobilenetv2_4x", "kw1x_resnet18", "cond_efficientnet_b0_4e"),
)
# Of convolutions in onnxruntime: channels, size of the map and of the kernel, groups.
SHAPES = ((64, 56, 3, 1), (128, 28, 3, 1), (512, 7, 3, 1), (96, 56, 3, 96), (384, 14, 3, 384), (512, 14, 1, 1))
CPU = torch.device("cpu")


class Traffic(TorchDispatchMode):
    """Counts calls of operators that do something, and the bytes of the maps that these read and write.

    Args:
        model: Of whose parameters and buffers the bytes do not count.

    Attributes:
        calls: Of operators, but for those that only give another view.
        maps: Bytes of the tensors that go in and come out.
        parameters: Bytes of the parameters and buffers that are used, each once.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.calls = self.maps = 0
        self.used: dict[int, int] = {}
        self._static = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    @property
    def parameters(self) -> int:
        return sum(self.used.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        alias = [value.alias_info for value in func._schema.returns]
        if any(info is not None and not info.is_write for info in alias):
            return out
        self.calls += 1
        for value in tree_leaves((args, kwargs, out)):
            if isinstance(value, Tensor):
                storage, size = value.untyped_storage().data_ptr(), value.numel() * value.element_size()
                if storage in self._static:
                    self.used[value.data_ptr()] = size
                else:
                    self.maps += size
        return out


def rates() -> dict[str, float]:
    """Of this machine, with the threads that are set: MACs and bytes a second, and seconds a call."""
    n = 1024
    a, b, one = torch.randn(n, n), torch.randn(n, n), torch.zeros(1)
    source = torch.zeros(2**26)  # 256 MB
    target = torch.empty_like(source)
    ways = {"macs": partial(torch.mm, a, b), "bytes": partial(target.copy_, source), "calls": partial(_add, one)}
    seconds = {name: min(times) / 1e3 for name, times in measure(ways, 10, 2, CPU).items()}
    moved = 2 * source.numel() * source.element_size()
    return {"macs": n**3 / seconds["macs"], "bytes": moved / seconds["bytes"], "call_s": seconds["calls"] / 1000}


def _add(one: Tensor) -> None:
    for _ in range(1000):
        one.add_(1)


def bounds(model: nn.Module, macs: int, x: Tensor, rate: dict[str, float]) -> dict[str, float]:
    """Milliseconds that each of them would take alone."""
    with Traffic(model) as traffic:
        model(x)
    return {
        "arithmetic": 1e3 * macs / rate["macs"],
        "parameters": 1e3 * traffic.parameters / rate["bytes"],
        "maps": 1e3 * traffic.maps / rate["bytes"],
        "calls": 1e3 * traffic.calls * rate["call_s"],
    }


@torch.inference_mode()
def row(name: str, batch_size: int, iterations: int, rate: dict[str, float]) -> dict:
    x = torch.randn(batch_size, 3, 224, 224)
    networks = {name: timm.create_model(name).eval(), "twin": timm.create_model(static_twin(name)).eval()}
    fast = {key: timm_dynamic.optimize(net, x) for key, net in networks.items()}
    times = measure({key: partial(net, x) for key, net in fast.items()}, iterations, 3, CPU)
    found = {"model": name, "twin": static_twin(name), "batch_size": batch_size}
    for key, side in ((name, "ours"), ("twin", "static")):
        macs = timm_dynamic.count_macs(networks[key], x[:1])
        total = batch_size * (macs.executed + macs.linear)
        found[side] = {"median_ms": summarise(times[key])["median_ms"], **bounds(fast[key], total, x, rate)}
    return found


class Chain(nn.Module):
    """Eight times the same convolution, with a constant weight or an input."""

    def __init__(self, weight: Tensor, groups: int):
        super().__init__()
        self.weight, self.groups = nn.Parameter(weight), groups

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        for _ in range(8):  # so that what brings the first map into the runtime's layout counts little
            x = F.conv2d(x, self.weight if weight is None else weight, padding="same", groups=self.groups)
        return x


def varying_weights(iterations: int, threads: int) -> list[dict]:
    """How much longer onnxruntime convolves one image with a weight that is not a constant."""
    rows = []
    for channels, size, kernel_size, groups in SHAPES:
        x, weight = torch.randn(1, channels, size, size), torch.randn(channels, channels // groups, *2 * (kernel_size,))
        weight /= weight[0].numel() ** 0.5
        steps = {}
        with tempfile.TemporaryDirectory() as folder:
            for name, inputs in (("constant", (x,)), ("input", (x, weight))):
                path = Path(folder, f"{name}.onnx")
                torch.onnx.export(Chain(weight, groups).eval(), inputs, path, dynamo=True, verbose=False)
                steps[name] = partial(onnxruntime_way(path, threads), *inputs)
        times = {name: summarise(found)["median_ms"] for name, found in measure(steps, iterations, 3, CPU).items()}
        shape = {"channels": channels, "size": size, "kernel_size": kernel_size, "groups": groups}
        rows.append({**shape, "time_ratio": times["input"] / times["constant"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "roof_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rate = rates()
    report = {**environment(CPU), "threads": args.threads, "rates": rate, "rows": []}
    report["varying_weights"] = varying_weights(args.iterations, args.threads)
    for name in tqdm(args.models, unit="model", disable=None):
        report["rows"] += [row(name, batch_size, args.iterations, rate) for batch_size in args.batch_sizes]
        with replacing(args.output) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
