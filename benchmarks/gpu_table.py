"""Prints what the GPU's results say, in a few lines: `python benchmarks/gpu_table.py [FOLDER]`."""

import json
import sys
from pathlib import Path

from page_gpu import roof_lines
from page_models import by_case, what

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results"


def load(name: str) -> dict | None:
    path = FOLDER / name
    if not path.exists():
        print(f"{name}: not there yet")
        return None
    report = json.loads(path.read_text())
    print(f"\n{name}: {report['device']}, torch {report['torch']}, commit {str(report['commit'])[:12]}")
    return report


def main() -> None:
    if tests := load("gpu_tests.json"):
        print(f"  {tests['passed']} passed, {tests['failed']} failed" + ("" if tests["complete"] else ", incomplete"))
        print("".join(f"  FAILED {name}\n" for part in tests["parts"].values() for name in part["failures"]), end="")
        print("".join(f"  {tool}: {how}\n" for tool, how in tests["sanitizers"].items()), end="")
    if roof := load("gpu_roof.json"):
        print(f"  copy {roof['copy_gb_per_s']:.0f} GB/s, product {roof['bf16_matrix_tflop_per_s']:.0f} TFLOP/s")
        print("  share of the floor: worst, median, best; time beside conv2d: median, worst")
        for name, dtype, layout, shapes, shares, beside in roof_lines(roof):
            print(f"  {name:44} {dtype:9} {layout:14} {shapes:14} {shares:22} {beside}")
    for report in filter(None, (load("paths_cuda.json"),)):
        print("  time, memory and MACs over the static twin's")
        for (model, _, mode, batch), rows in by_case(report["rows"]).items():
            for row in rows[1:]:
                ratios = f"{row['time_ratio']:6.2f} {row['memory_ratio']:6.2f} {row['macs_ratio']:6.2f}"
                print(f"  {model:18} {mode:6} {batch:4} {what(row):26} {row['median_ms']:9.2f} ms {ratios}")
        print("".join(f"  FAILED {case}: {why}\n" for case, why in report["failed"].items()), end="")
    for dtype in ("float32", "bfloat16"):
        if report := load(f"sparse_cuda_{dtype}.json"):
            print("  share of active positions, speed over folded dense, over the static twin")
            for row in report["rows"]:
                speeds = [row[f"speedup_over_{dense}"] for dense in ("folded_dense", "static_twin")]
                place = f"{row['model']:22} {row['batch_size']:4} {row['pattern']:10} {row['share']:.1f}"
                print(f"  {place} {speeds[0]:6.2f} {speeds[1]:6.2f}")


if __name__ == "__main__":
    main()
