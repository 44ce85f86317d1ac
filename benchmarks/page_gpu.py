"""The part of benchmarks/README.md about the GPU: what ran on one, what kernels take, operators beside the roof."""

import hashlib
from pathlib import Path
from statistics import median

SOURCES = Path(__file__).parents[1] / "cuda_ops"
OPERATORS = ("ddf", "sparse", "mixed_conv2d", "factored_conv2d", "per_sample_conv2d", "dcd")
UNVERIFIED = """
## GPU

Unverified on GPU: {what}. The CUDA kernels compile for sm_75 to sm_120 and PTX; `benchmarks/gpu.sh` builds, tests and
measures them on a GPU.
"""
VERIFIED = """
## GPU

`benchmarks/gpu.sh tests`, `results/gpu_tests.json`, {machine}: {passed} of {total} tests passed; {sanitizers}.
"""
CHANGED = "The kernels' sources have changed since: what they are now is unverified on GPU.\n"
INCOMPLETE = "Not all of the tests ran: the rest is unverified on GPU.\n"
KERNELS = """
What each kernel takes, read from the binary ({megabytes:.1f} MB) by `benchmarks/kernel_report.py`, `results/{file}`;
{compiler}; PTX for {ptx}. Of a kernel's variants (dtype, kernel size, vector width)
the largest number counts. {spills}

| kernel | run on a GPU | variants | shared memory, bytes | stack, bytes | registers: {archs} |
|---|---|---|---|---|---|{rule}
"""
ROOF = """
### Operators and the roof

`python benchmarks/gpu_roof.py`, `results/{file}`, {machine}: a large copy runs at {copy_gb_per_s:.0f} GB/s,
a large matrix product in bfloat16 at {bf16_matrix_tflop_per_s:.0f} TFLOP/s. An operator's floor is the time of the
bytes that must move, or of its operations, at these rates, whichever is longer; the file has every shape. Last, the
ratio of the time to that of `conv2d` (`DCDConv2d`: of `nn.Conv2d`) of the same shape.

| operator | dtype | layout | shapes | share of the floor: worst, median, best | beside conv2d: median, worst |
|---|---|---|---|---|---|
"""


def sources() -> str:
    """A checksum of the kernels' sources."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*/*")))).hexdigest()


def tested(tests: dict | None) -> bool:
    """Whether the kernels as they are now passed their tests on a GPU."""
    return (
        bool(tests) and tests["complete"] and tests["sources"] == sources() and tests["failed"] == 0 < tests["passed"]
    )


def gpu_text(tests: dict | None, roof: dict | None, kernels: dict, machine) -> str:
    """The section.

    Args:
        tests: What `gpu_tests.py` wrote on a GPU, if it ran.
        roof: What `gpu_roof.py` wrote, likewise.
        kernels: What `kernel_report.py` wrote.
        machine: Gives a report's machine, in words.
    """
    if tests:
        parts = [f"{name} {how}" for name, how in tests["sanitizers"].items()] or ["no sanitizer ran"]
        total = tests["passed"] + tests["failed"]
        text = VERIFIED.format(machine=machine(tests), passed=tests["passed"], total=total, sanitizers=", ".join(parts))
        text += "" if tests["complete"] else INCOMPLETE
        text += "" if tests["sources"] == sources() else CHANGED
    else:
        text = UNVERIFIED.format(what=f"every CUDA kernel, and every operator ({', '.join(OPERATORS)})")
    text += kernels_table(kernels, "cuda_kernels.json", tested(tests))
    if roof:
        text += roof_table(roof, "gpu_roof.json", machine(roof))
    elif tests:
        text += f"\nHow near {', '.join(OPERATORS)} are to the roof is unverified on GPU.\n"
    return text


def kernels_table(report: dict, name: str, is_tested: bool) -> str:
    families: dict[str, list[dict]] = {}
    for row in report["rows"]:
        families.setdefault(row["kernel"].split("<")[0], []).append(row)
    archs = sorted({row["arch"] for row in report["rows"]}, key=lambda arch: int(arch[3:]))
    framed = sorted({f"`{row['kernel']}`" for row in report["rows"] if row["stack"] or row["local"]})
    table = KERNELS.format(
        file=name,
        megabytes=report["binary_bytes"] / 1e6,
        compiler=report["compiler"],
        ptx=", ".join(report["ptx"]),
        spills=f"With a stack frame: {', '.join(framed)}." if framed else "No spills: no kernel has a stack frame.",
        archs=" | ".join(archs),
        rule="---|" * len(archs),
    )
    for family, rows in families.items():
        registers = (str(max(row["registers"] for row in rows if row["arch"] == arch)) for arch in archs)
        shared, stack = (max(row[field] for row in rows) for field in ("shared", "stack"))
        table += (
            f"| `{family}` | {'tested' if is_tested else 'unverified'} | {len(rows) // len(archs)} | {shared or ''} | "
            f"{stack or ''} | {' | '.join(registers)} |\n"
        )
    return table


def roof_lines(report: dict) -> list[tuple[str, ...]]:
    """For each operator, dtype and layout: how many shapes, shares of the floor, and times beside a convolution's."""
    times = {(row["operator"], row["what"], row["shape"]): row["ms"] for row in report["rows"] if "ms" in row}
    found: dict[tuple[str, ...], list[dict]] = {}
    for row in report["rows"]:
        found.setdefault((row["operator"], row["what"], row["dtype"], row["layout"]), []).append(row)
    lines = []
    for (operator, what, dtype, layout), rows in found.items():
        good = [row for row in rows if "ms" in row]
        shares = sorted(row["share_of_floor"] for row in good)
        texts = [f"{100 * share:.0f} %" for share in (shares[0], median(shares), shares[-1])] if shares else []
        _, _, mode = what.partition(", ")
        static = ("dcd", f"nn.Conv2d, {mode}") if operator == "dcd" else ("static", f"conv2d, {mode}")
        beside = [row["ms"] / times[key] for row in good if (key := (*static, row["shape"])) in times]
        ratio = f"{median(beside):.2f}, {max(beside):.2f}" if beside and static != (operator, what) else ""
        failed = f" ({len(rows) - len(good)} failed)" if len(good) < len(rows) else ""
        name = what if what.startswith(operator) else f"{operator}: {what}"
        lines.append((name, dtype, layout, f"{len(rows)}{failed}", ", ".join(texts), ratio))
    return lines


def roof_table(report: dict, name: str, machine: str) -> str:
    table = ROOF.format(file=name, machine=machine, **report)
    return table + "".join(f"| {' | '.join(line)} |\n" for line in roof_lines(report))
