"""`timm-dynamic check`: are the faster implementations right on this machine, and faster?"""

import argparse
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from time import monotonic

import timm
import torch
from tqdm import tqdm

from timm_dynamic.cases import Case, operators_of, plan
from timm_dynamic.check import Worker, run
from timm_dynamic.families import FAMILIES, family_of
from timm_dynamic.ops import records
from timm_dynamic.ops.kernels import backend_info
from timm_dynamic.suggest import did_you_mean
from timm_dynamic.timing import environment

DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
_ROW = "{:26} {:34} {:9} {:13} {:5} {:>9} {:>10} {:>10} {:>6}  {}"
_HEAD = _ROW.format("implementation", "shapes", "dtype", "layout", "mode", "error/std", "ms", "formula", "ratio", "")


def main(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device here")
    models = args.models or default_models(args.quick)
    unknown = [name for name in models if not timm.is_model(timm.models.get_arch_name(name))]
    if unknown:
        raise ValueError(f"unknown models {', '.join(unknown)}; {did_you_mean(unknown[0], timm.list_models())}")
    _check_names(args.only or (), args.device)
    print(f"{args.device} kernels: {backend_info()[args.device]}")
    deadline = monotonic() + 60 * args.minutes
    with Worker() as worker:
        cases, results = _planned(worker, models, args, deadline)
        cases = sorted((case for case in cases if _wanted(case.name, args.only)), key=lambda case: case.name)
        done = results + _checked(worker, cases, args, deadline)
    left = {case.name for case in cases[len(done) - len(results) :]}
    verdicts = summarise([row for row in done if row["name"] not in left])
    record = _record(args, verdicts, done)
    if not args.quick:
        records.write(records.path_of_user(), record)
    if args.json:
        Path(args.json).unlink(missing_ok=True)
        records.write(Path(args.json), record)
    _print_summary(verdicts, left, args.device)
    print("Not recorded: --quick" if args.quick else f"Recorded in {records.path_of_user()}")
    return 1 if any(not verdict["right"] for verdict in verdicts.values()) else 0


def default_models(quick: bool) -> list[str]:
    """Those that benchmarks time, and the tiny one of a family that has none; with `quick` the tiny ones."""
    families = FAMILIES.values()
    names = [(family.tiny,) if quick else family.timed or (family.tiny,) for family in families]
    return [name for group in names for name in group if name]


def _check_names(names: Iterable[str], device: str) -> None:
    known = {*FAMILIES, *operators_of(device)}
    for name in names:
        if name.split(":")[0] not in known:
            raise ValueError(f"--only {name}: there are {', '.join(sorted(known))}")


def _wanted(name: str, only: list[str] | None) -> bool:
    return not only or name in only or name.split(":")[0] in only


def _planned(worker: Worker, models: list[str], args, deadline: float) -> tuple[list[Case], list[dict]]:
    """The cases of all models, and a result for each model that gives none because it cannot run."""
    cases, failed = [], []
    dtypes = [getattr(torch, name) for name in args.dtype or DTYPES[args.device]]
    names = [name for name in args.only or () if name in FAMILIES or ":" in name]
    if args.only and len(names) == len(args.only) and not args.models:  # rows of some families: no need for the others
        models = [name for name in models if family_of(name).name in {n.split(":")[0] for n in names}]
    for name in tqdm(models, "looking for calls", disable=None, leave=False):
        if monotonic() > deadline:
            break
        found, problem = worker.call(
            plan, name, args.device, dtypes, args.batch_size, args.shapes, seconds=5 * args.timeout
        )
        cases += found or []
        if problem:
            failed.append({"name": f"calls of {name}", "problem": problem, "right": False})
            tqdm.write(f"{name}: {problem}")
    return list(dict.fromkeys(cases)), failed


def _checked(worker: Worker, cases: list[Case], args, deadline: float) -> list[dict]:
    rows = []
    tqdm.write(_HEAD)
    for case in tqdm(cases, "checking", disable=None, leave=False):
        if monotonic() > deadline:
            break
        found, problem = worker.call(run, case, args.seconds, args.compiled, seconds=args.timeout)
        row = {**_facts(case), **(found or {"right": False, "problem": problem})}
        rows.append(row)
        tqdm.write(line(row))
    return rows


def _facts(case: Case) -> dict:
    setting = asdict(case.setting) | {"dtype": str(case.setting.dtype).removeprefix("torch.")}
    return {**asdict(case), **setting, "setting": None}


def verdict_of(row: dict) -> str:
    """In words."""
    if "skipped" in row:
        return f"not compared: {row['skipped']}"
    if not row["right"]:
        return f"WRONG: {row['problem']}"
    return "right, faster" if row["ratio"] < 1 else "right, slower"


def line(row: dict) -> str:
    """Of the table."""
    mode = "train" if row["training"] else "eval"
    error = f"{row['error']:.1e}" if "error" in row else ""
    times = [f"{row[key]:.3f}" if key in row else "" for key in ("ms", "formula_ms")]
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
    where = (row["name"], row["about"], row["dtype"], row["layout"], mode)
    return _ROW.format(*where, error, *times, ratio, verdict_of(row))


def summarise(rows: list[dict]) -> dict[str, dict]:
    """By name: `{"right", "ratio", "on", "cases"}`; on is what is right in all cases, and faster on average."""
    verdicts = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        compared = [row for row in rows if row["name"] == name and "skipped" not in row]
        right = all(row["right"] for row in compared)
        ratios = [row["ratio"] for row in compared if "ratio" in row]
        ratio = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
        on = right and ratio is not None and ratio < 1
        verdicts[name] = {"right": right, "ratio": ratio, "on": on, "cases": len(compared)}
    return verdicts


def _record(args, verdicts: dict[str, dict], rows: list[dict]) -> dict:
    facts = environment(torch.device(args.device))
    cases = [
        {k: v for k, v in row.items() if k not in ("setting", "device")} for row in rows if row["name"] in verdicts
    ]
    return facts | records.place(args.device, facts["device"]) | {"names": verdicts, "cases": cases}


def _print_summary(verdicts: dict[str, dict], left: set[str], device: str) -> None:
    print()
    for name, verdict in verdicts.items():
        ratio = f"{verdict['ratio']:.2f}x the formula's time" if verdict["ratio"] else "not timed"
        say = "WRONG" if not verdict["right"] else "on" if verdict["on"] or device == "cpu" else "off"
        print(f"{name:34} {say:6} {ratio}, {verdict['cases']} cases")
    if left:
        print(f"not finished, so not recorded: {', '.join(sorted(left))}")
