"""Times calls of dynamic_filter (DDF, SKA, involution, CARAFE) against depthwise convolutions and plain PyTorch.

    python benchmarks/op_ddf.py [--device cpu|cuda] [--threads N] [--quick] [--output FILE.json]

All candidates of a case are run in turn, in an order drawn anew for every round: what ran before decides what is in
the cache. Saves one row per case, mode (forward, forward+backward) and candidate. Where the operator makes maps larger
the depthwise convolution is of the map enlarged by its nearest pixels, and enlarging counts.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.ops import backend_info
from timm_dynamic.ops.dynamic_filter.definition import definition
from timm_dynamic.timing import environment, measure, peak_memory, summarise


class Case(NamedTuple):
    """One shape. `everything` adds the slow candidates, which are timed in every `SLOW_EVERY`th round only.

    With `filters`, that many groups of channels, of this grouping, have filters of their own and there is no channel
    filter: involution, LSNet's SKA, or CARAFE, which makes maps larger; without, the call is DDF's.
    """

    shape: tuple[int, int, int, int]
    kernel_size: int = 3
    stride: int = 1
    dtype: str = "float32"
    everything: bool = False
    filters: int = 0
    grouping: str = "blocks"
    upsample: int = 1

    @property
    def operator(self) -> str:
        if self.filters == 0:
            return "DDF"
        if self.upsample > 1:
            return "CARAFE"
        return "SKA" if self.grouping == "interleaved" else "involution"

    @property
    def output_size(self) -> tuple[int, int]:
        return tuple((size * self.upsample - 1) // self.stride + 1 for size in self.shape[2:])


SLOW_EVERY = 5
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def cases(device: str, quick: bool) -> list[Case]:
    batch = 32 if device == "cuda" else 8
    headline = [Case((batch, 256, 56, 56), everything=not quick)]
    if quick:
        return headline
    grouped = [
        Case((8, 128, 56, 56), everything=True, filters=16, grouping="interleaved"),
        Case((8, 128, 28, 28), kernel_size=7, everything=True, filters=8),
        Case((8, 128, 28, 28), kernel_size=5, everything=True, filters=1, upsample=2),
    ]
    resnet = [(1, 64, 56, 56), (1, 128, 28, 28), (1, 256, 14, 14), (1, 512, 7, 7), (batch, 512, 7, 7)]
    return [
        *headline,
        Case((batch, 256, 56, 56), dtype="bfloat16", everything=True),
        Case((batch, 256, 56, 56), stride=2),
        Case((batch, 128, 56, 56), kernel_size=5),
        *(Case(shape) for shape in resnet),
        *(grouped if device == "cpu" else []),  # no CUDA kernel knows these
    ]


class Inputs(NamedTuple):
    features: Tensor
    filters: Tensor
    channel_filter: Tensor
    weight: Tensor  # of the depthwise convolution
    grad: Tensor

    @classmethod
    def make(cls, case: Case, layout: str, device: torch.device) -> "Inputs":
        (B, C, H, W), K, (Ho, Wo) = case.shape, case.kernel_size, case.output_size
        filters = (B, max(case.filters, 1), K * K, Ho, Wo)
        shapes = ((B, C, H, W), filters, (B, C, K * K), (C, 1, K, K), (B, C, Ho, Wo))
        made = [torch.randn(shape, device=device).to(getattr(torch, case.dtype)) for shape in shapes]
        for i in (0, 4):
            made[i] = made[i].contiguous(memory_format=LAYOUTS[layout])
        if case.filters:  # as a convolution in this layout makes them
            made[1] = made[1].flatten(1, 2).contiguous(memory_format=LAYOUTS[layout]).unflatten(1, filters[1:3])
        return cls(*(t.requires_grad_(i < 4) for i, t in enumerate(made)))


def unfolded(case: Case, x: Tensor, filters: Tensor, channel_filter: Tensor | None) -> Tensor:
    """The operator as one multiplies im2col's patches."""
    (B, C, H, W), (G, taps, Ho, Wo), K = x.shape, filters.shape[1:], case.kernel_size
    members, inner = (C // G, G) if case.grouping == "interleaved" else (C // G, 1)
    patches = F.unfold(x, K, padding=K // 2, stride=case.stride)
    if case.upsample > 1:
        patches = enlarged(patches.view(B, -1, H, W), case.upsample)
    patches = patches.view(B, -1, members, inner, taps, Ho * Wo)
    weight = filters.reshape(B, -1, 1, inner, taps, Ho * Wo)
    if channel_filter is not None:
        weight = weight * channel_filter.reshape(B, -1, members, inner, taps, 1)
    return (patches * weight).sum(4).view(B, C, Ho, Wo)


def enlarged(x: Tensor, times: int) -> Tensor:
    return F.interpolate(x, scale_factor=times) if times > 1 else x


def candidates(case: Case, inputs: Inputs) -> dict[str, tuple[Callable[[], Tensor], tuple[Tensor, ...]]]:
    """Name to (forward, what it is differentiated for)."""
    x, filters, c, weight, _ = inputs
    K, stride, times = case.kernel_size, case.stride, case.upsample
    tensors = (x, filters, None if case.filters else c)
    ours, conv = tensors[: 2 if case.filters else 3], (x, weight)
    options = (K, "mul", filters.shape[1] if case.grouping == "blocks" else 1, 1, stride, times)
    found = {
        "kernel": (lambda: torch.ops.timm_dynamic.dynamic_filter(*tensors, *options), ours),
        "depthwise": (lambda: F.conv2d(enlarged(x, times), weight, None, stride, K // 2, 1, case.shape[1]), conv),
    }
    if case.everything:
        torch.compiler.reset()
        compiled = torch.compile(definition)
        found["reference"] = (lambda: definition(*tensors, *options), ours)
        found["compiled reference"] = (lambda: compiled(*tensors, *options), ours)
        found["unfold"] = (lambda: unfolded(case, *tensors), ours)
    return found


def steps(case: Case, inputs: Inputs, mode: str) -> dict[str, Callable[[], object]]:
    def forward(run):
        with torch.no_grad():
            return run()

    def train(run, wanted):
        return torch.autograd.grad(run(), wanted, inputs.grad)

    if mode == "forward":
        found = {n: lambda run=run: forward(run) for n, (run, _) in candidates(case, inputs).items()}
        return {**found, "copy": lambda: inputs.features.detach().clone()}
    return {n: lambda run=run, w=wanted: train(run, w) for n, (run, wanted) in candidates(case, inputs).items()}


def time_all(
    runs: dict[str, Callable[[], object]], rounds: int, device: torch.device, progress: tqdm
) -> dict[str, list[float]]:
    fast = [name for name in runs if name in ("kernel", "depthwise", "copy")]
    measure(runs, 0, 2, device)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        names = list(runs) if i % SLOW_EVERY == 0 else fast[:]
        random.shuffle(names)
        for name, times in measure({n: runs[n] for n in names}, 1, 0, device).items():
            samples[name] += times
        progress.update()
    return samples


def keep_pages() -> None:
    """Stop glibc from returning freed memory to the kernel: faulting it in again would be most of what we time."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def peak_bytes(step: Callable[[], object], device: torch.device) -> tuple[int | None, str]:
    """Memory that one call takes at its peak above what was there before, everything included.

    On the CPU this is the growth of the process's resident set, because the kernels' own scratch is not torch's.
    """
    if device.type == "cuda":
        return peak_memory(step, device)
    how = "growth of the resident set (VmHWM)"
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest value so far
        before = _status("VmRSS")
        result = step()
        peak = _status("VmHWM") - before
    except (OSError, AttributeError):
        return None, "not measured"
    del result
    return peak, how


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def run_case(case: Case, layout: str, rounds: int, device: torch.device, progress: tqdm) -> Iterator[dict]:
    inputs = Inputs.make(case, layout, device)
    about = {"operator": case.operator, **case._asdict(), "layout": layout}
    del about["everything"]
    for mode in ("forward", "forward+backward"):
        runs = steps(case, inputs, mode)
        samples = time_all(runs, rounds, device, progress)
        medians = {name: summarise(times)["median_ms"] for name, times in samples.items()}
        for name, run in runs.items():
            peak, how = peak_bytes(run, device)
            row = {**about, "mode": mode, "candidate": name, **summarise(samples[name]), "samples": len(samples[name])}
            row["ratio_to_depthwise"] = medians[name] / medians["depthwise"]
            row["peak_bytes"], row["peak_bytes_measured_by"] = peak, how
            if mode == "forward" and name in ("kernel", "copy"):
                out = inputs.grad.nbytes
                read = (
                    sum(t.nbytes for t in inputs[: 2 if case.filters else 3])
                    if name == "kernel"
                    else inputs.features.nbytes
                )
                moved = read + (out if name == "kernel" else read)
                row["gb_per_s"] = moved / medians[name] / 1e6
                if name == "kernel":
                    row["output_bytes"], row["input_and_output_bytes"] = out, moved
            yield row


def show(row: dict) -> str:
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:9.1f} MiB"
    shape = f"{row['operator']} {list(row['shape'])} K{row['kernel_size']} s{row['stride']}"
    times = f"{row['median_ms']:9.3f} ms ({row['p10_ms']:.3f} .. {row['p90_ms']:.3f})"
    return (
        f"{shape:39} {row['dtype']:9} {row['layout']:14} {row['mode']:17} {row['candidate']:19} {times:36} "
        f"{row['ratio_to_depthwise']:6.2f}x {peak}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=60, help="timed calls of each fast candidate (default: 60)")
    parser.add_argument("--quick", action="store_true", help="only the headline shape, without the slow candidates")
    parser.add_argument("--output", type=Path, help="default: results/op_ddf_DEVICE.json beside this file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    keep_pages()
    device = torch.device(args.device)
    output = args.output or Path(__file__).parent / "results" / f"op_ddf_{args.device}.json"
    command = f"python benchmarks/op_ddf.py --device {args.device} --threads {torch.get_num_threads()}"
    command += f" --rounds {args.rounds}" + " --quick" * args.quick
    report = {"command": command, **environment(device), "kernels": backend_info(), "rows": []}
    todo = [(case, layout) for case in cases(args.device, args.quick) for layout in LAYOUTS]
    with tqdm(total=2 * args.rounds * len(todo), unit="round") as progress:
        for case, layout in todo:
            for row in run_case(case, layout, args.rounds, device, progress):
                report["rows"].append(row)
                progress.write(show(row))
            save(output, report)
    print(f"saved {output.name}")


def save(output: Path, report: dict) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
