"""How near every operator is to what this GPU's memory and matrix units allow.

    python benchmarks/gpu_roof.py [--operators NAME ...] [--output FILE.json]

Measures copy bandwidth and matrix rate, then each case (`roof_cases.py`) as GPU time, and as a share of its floor: the
bytes that must move at least, at the bandwidth of a large copy, or its operations at the rate of a large product,
whichever takes longer. Calls are timed as parts of a CUDA graph, so without launch overhead, but for those that wait
for the GPU. The file is written after every case: a run that is stopped leaves what it has measured.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from roof_cases import OPERATORS, Case, floor_ms

from timm_dynamic.ops import backend_info
from timm_dynamic.timing import environment

CUDA = torch.device("cuda")


def gpu_ms(call: Callable[[], object], in_graph: bool = True, at_least_ms: float = 20.0) -> float:
    """Median over several batches of calls, each as many calls as take `at_least_ms` together.

    Args:
        call: What is timed.
        in_graph: Whether a batch is a CUDA graph. Else launches count where the GPU waits for them.
        at_least_ms: Time of a batch.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # where the arguments are made
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
    stream.synchronize()
    calls = max(1, min(200, int(at_least_ms / max(start.elapsed_time(end), 1e-3))))

    def batch() -> None:
        for _ in range(calls):
            call()

    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            batch()
        batch = graph.replay
    times = []
    for _ in range(7):
        start.record()
        batch()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def rates() -> tuple[float, float]:
    """GB/s of a large copy, TFLOP/s of a large matrix product in bfloat16."""
    source, target = torch.empty(2, 1 << 30, dtype=torch.uint8, device="cuda").unbind()
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16().unbind()
    copy, product = gpu_ms(lambda: target.copy_(source)), gpu_ms(lambda: a @ b)
    return 2 * source.nbytes / copy / 1e6, 2 * len(a) ** 3 / product / 1e9


def rows(operators: list[str], copy_gb_per_s: float, tflop_per_s: float, device: torch.device = CUDA) -> Iterator[dict]:
    """A row of the report for each case."""
    for case in (case for name in operators for case in OPERATORS[name](device)):
        row = {key: value for key, value in case._asdict().items() if key != "call"} | {"dtype": str(case.dtype)[6:]}
        try:
            row |= timed(case)
        except RuntimeError as error:  # cuDNN lacks a kernel for some layouts and types
            row["error"] = (str(error).splitlines() or [type(error).__name__])[0]
        else:
            row["floor_ms"] = floor_ms(case, copy_gb_per_s, tflop_per_s)
            row["share_of_floor"] = row["floor_ms"] / row["ms"]
        yield row


def timed(case: Case) -> dict:
    """The time; outside a graph where the call cannot be part of one."""
    if case.in_graph:
        with suppress(RuntimeError):
            return {"ms": gpu_ms(case.call), "in_graph": True}
    return {"ms": gpu_ms(case.call, in_graph=False), "in_graph": False}


def show(row: dict) -> str:
    what = f"{row['operator']:17} {row['what']:36} {row['shape']:36} {row['dtype']:9} {row['layout']:14}"
    if "error" in row:
        return f"{what} {row['error']}"
    how = "" if row["in_graph"] else ", launches included"
    return f"{what} {1e3 * row['ms']:10.1f} us {100 * row['share_of_floor']:6.1f} % of the roof{how}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS), help="default: all")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu_roof.json")
    args = parser.parse_args()
    if not torch.cuda.is_available() or backend_info()["cuda"] != "loaded":
        parser.error(f"needs a CUDA device and the CUDA kernels ({backend_info()['cuda']})")
    torch.backends.cudnn.benchmark = True
    bandwidth, tflops = rates()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth:.0f} GB/s, bf16 matrix product {tflops:.0f} TFLOP/s")
    report = {
        "command": " ".join(["python benchmarks/gpu_roof.py", "--operators", *args.operators]),
        **environment(CUDA),
        "copy_gb_per_s": bandwidth,
        "bf16_matrix_tflop_per_s": tflops,
        "rows": [],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_name(args.output.name + ".tmp")
    for row in rows(args.operators, bandwidth, tflops):
        print(show(row), flush=True)
        report["rows"].append(row)
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(temporary, args.output)


if __name__ == "__main__":
    main()
