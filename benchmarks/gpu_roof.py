"""How near the ddf kernels are to what this GPU's memory allows, and to cuDNN's depthwise convolution.

    python benchmarks/gpu_roof.py [--output FILE.json]

Measures copy bandwidth and matrix rate, then each case as GPU time (CUDA graphs, so without launch overhead) and as a
share of its floor: the bytes that must move at least, at the bandwidth of a large copy.
"""

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from timm_dynamic.ops import backend_info, ddf
from timm_dynamic.timing import environment

# The first seven are those of the authors' timing tool.
SHAPES = [(32, 256, n, n) for n in (224, 112, 56, 28, 14, 7)] + [(2, 256, 200, 300), (128, 64, 56, 56)]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def gpu_ms(call: Callable[[], object], at_least_ms: float = 20.0) -> float:
    """Median over replays of a graph that holds as many calls as take `at_least_ms` together."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
    stream.synchronize()
    calls = max(1, min(200, int(at_least_ms / max(start.elapsed_time(end), 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(7):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def cudnn_depthwise(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    options = ([1, 1], [1, 1], [1, 1], x.shape[1], True, False, False)  # padding, stride, dilation, groups, benchmark
    return lambda: torch.ops.aten.cudnn_convolution(x, weight, *options)


def calls(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> dict[str, tuple[Callable[[], object], int]]:
    """Name to what is timed and the bytes that it must move."""
    B, C, H, W = shape
    x = torch.randn(shape, dtype=dtype, device="cuda").contiguous(memory_format=LAYOUTS[layout])
    channel = torch.randn(B, C, 3, 3, dtype=dtype, device="cuda")
    spatial = torch.randn(B, 9, H, W, dtype=dtype, device="cuda")
    weight = torch.randn(C, 1, 3, 3, dtype=dtype, device="cuda").contiguous(memory_format=LAYOUTS[layout])
    maps, filters = 2 * x.nbytes, channel.nbytes + spatial.nbytes

    def gradients(*needs: bool) -> Callable[[], object]:  # x stands for the gradient too: same size
        return lambda: torch.ops.timm_dynamic.ddf_backward(x, x, channel, spatial, 3, 1, 1, "mul", list(needs))

    return {
        "forward": (lambda: ddf(x, channel, spatial), maps + filters),
        "grad of features": (gradients(True, False, False), maps + filters),
        "grads of filters": (gradients(False, True, True), maps + 2 * filters),
        "copy": (lambda: x.clone(), maps),
        "depthwise, torch": (lambda: torch.nn.functional.conv2d(x, weight, None, 1, 1, 1, C), maps),
        "depthwise, cuDNN": (cudnn_depthwise(x, weight), maps),
    }


def rows(copy_bandwidth: float) -> Iterator[dict]:
    for shape, dtype, layout in itertools.product(SHAPES, (torch.float32, torch.bfloat16), LAYOUTS):
        for name, (call, moved) in calls(shape, dtype, layout).items():
            row = {"shape": shape, "dtype": str(dtype), "layout": layout, "what": name, "bytes": moved}
            try:
                row["ms"] = gpu_ms(call)
                row["share_of_copy_bandwidth"] = moved / row["ms"] / 1e6 / copy_bandwidth
            except RuntimeError as error:  # cuDNN lacks a kernel for some layouts and types
                row["error"] = str(error).splitlines()[0]
            yield row


def show(row: dict) -> str:
    what = f"{str(row['shape']):21} {row['dtype'][6:]:9} {row['layout']:14} {row['what']:17}"
    if "error" in row:
        return f"{what} {row['error']}"
    return f"{what} {1e3 * row['ms']:10.1f} us {100 * row['share_of_copy_bandwidth']:6.1f} % of copy bandwidth"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu_roof.json")
    args = parser.parse_args()
    if not torch.cuda.is_available() or backend_info()["cuda"] != "loaded":
        parser.error(f"needs a CUDA device and the CUDA kernels ({backend_info()['cuda']})")
    torch.backends.cudnn.benchmark = True
    source, target = torch.empty(2, 1 << 30, dtype=torch.uint8, device="cuda").unbind()
    bandwidth = 2 * source.nbytes / gpu_ms(lambda: target.copy_(source)) / 1e6
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind()
    tflops = 2 * 8192**3 / gpu_ms(lambda: a @ b) / 1e9
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth:.0f} GB/s, bf16 matrix product {tflops:.0f} TFLOP/s")
    found = []
    for row in rows(bandwidth):
        found.append(row)
        print(show(row), flush=True)
    report = {
        "command": "python benchmarks/gpu_roof.py",
        **environment(torch.device("cuda")),
        "copy_gb_per_s": bandwidth,
        "bf16_matrix_tflop_per_s": tflops,
        "rows": found,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_name(args.output.name + ".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, args.output)
    print(f"saved {args.output.name}")


if __name__ == "__main__":
    main()
