"""Compares an implementation with its formula in float64, and times both; in a process apart."""

import math
import multiprocessing
import signal
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from timm_dynamic.cases import Case, Subject, arguments_of, build, values
from timm_dynamic.dispatch import use
from timm_dynamic.ops.kernels import FORMULA, KERNEL
from timm_dynamic.ops.registration import OPERATORS
from timm_dynamic.timing import measure

# Largest error in standard deviations of the result; more is right where the formula in the same dtype is as far off.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
AS_FORMULA = 5.0  # times its error


def run(case: Case, seconds: float, compiled: bool) -> dict:
    """Compare, then time.

    Args:
        case: What.
        seconds: For which to time.
        compiled: Time the formula under `torch.compile` too; the shorter time counts.

    Returns:
        `{"right", "error", "allowed", "ms", "formula_ms", "ratio", "problem"}`; times only of what is right. With
        `{"skipped"}` alone, why the formula cannot be run.
    """
    if case.setting.device == "cuda":
        torch.backends.cudnn.benchmark = True
    model = build(case.model)
    ways = _ways_of_row(model, case) if case.number is None else _ways_of_operator(model, case)
    try:
        exact = ways("exact")()
        formula = ways("formula")()
    except (RuntimeError, NotImplementedError) as error:
        return {"skipped": f"the formula: {_first_line(error)}"}
    with use(KERNEL):
        verdict = _compared(ways("subject")(), formula, exact, case.setting.dtype)
    if not verdict["right"]:
        return verdict
    return verdict | _timed(ways, case, seconds, compiled)


def _ways_of_row(model: nn.Module, case: Case) -> Callable[..., Callable]:
    def way(kind: str, timed: bool = False, wrap: Callable = lambda function: function):
        subject = Subject(model, case, torch.float64 if kind == "exact" else None)
        plain = subject.call(case.source if kind == "subject" else FORMULA)
        function = wrap(lambda: plain())
        state = () if timed else [b for b in subject.layer.buffers() if b.is_floating_point()]
        return lambda: [*values(function, subject.wanted()), *state]

    return _with_choice(way)


def _ways_of_operator(model: nn.Module, case: Case) -> Callable[..., Callable]:
    args, kwargs = arguments_of(model, case)
    definition, differentiable, _ = OPERATORS[case.name]
    operator = getattr(torch.ops.timm_dynamic, case.name)
    schema = operator.default._schema
    written = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    gradients = differentiable and case.setting.training

    def way(kind: str, timed: bool = False, wrap: Callable = lambda function: function):
        arguments = tree_map(partial(_fresh, exact=kind == "exact", gradients=gradients), args)
        function = wrap(operator if kind == "subject" else definition)
        wanted = [t for t in tree_leaves(arguments) if isinstance(t, Tensor) and t.requires_grad]

        def call():
            out = function(*arguments, **kwargs)
            # Of several results of an operator with gradients all but the first are for its gradient.
            return out[0] if differentiable and isinstance(out, tuple) else out

        return lambda: [*values(call, wanted), *(() if timed else (arguments[i] for i in written))]

    return _with_choice(way)


def _with_choice(way: Callable) -> Callable[..., Callable]:
    """What is no subject runs as plain PyTorch."""

    def chosen(kind: str, **options):
        function = way(kind, **options)

        def call():
            with use(KERNEL if kind == "subject" else FORMULA):
                return function()

        return call

    return chosen


def _compared(found: list[Tensor], formula: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> dict:
    """The largest error of all results, in standard deviations, and whether it is allowed."""
    for result, expected in zip(found, formula, strict=True):
        if (result.shape, result.dtype) != (expected.shape, expected.dtype):
            problem = f"{list(result.shape)} {result.dtype}, not {list(expected.shape)} {expected.dtype}"
            return {"right": False, "error": math.inf, "allowed": 0.0, "problem": problem}
    verdicts = []
    for result, expected, truth in zip(found, formula, exact, strict=True):
        allowed = max(TOLERANCE[dtype], AS_FORMULA * _error(expected, truth)) if truth.is_floating_point() else 0.0
        verdicts.append((_error(result, truth), allowed))
    wrong = [verdict for verdict in verdicts if not verdict[0] <= verdict[1]]
    error, allowed = max(wrong or verdicts, default=(0.0, 0.0))
    problem = f"an error of {error:.1e}, allowed are {allowed:.1e}" if wrong else ""
    return {"right": not wrong, "error": error, "allowed": allowed, "problem": problem}


def _error(found: Tensor, exact: Tensor) -> float:
    if not exact.is_floating_point():
        return 0.0 if torch.equal(found, exact) else math.inf
    found, exact = found.detach().double(), exact.detach().double()
    difference = torch.where((found == exact) | (found.isnan() & exact.isnan()), 0, (found - exact).abs())
    if difference.numel() == 0:
        return 0.0
    spread = exact.std().item() if exact.numel() > 1 else exact.abs().item()
    worst = difference.max().item()
    return math.inf if math.isnan(worst) else worst / (spread if 0 < spread < math.inf else 1.0)


def _timed(ways: Callable, case: Case, seconds: float, compiled: bool) -> dict:
    calls = {"subject": ways("subject", timed=True), "formula": ways("formula", timed=True)}
    notes = {}
    if compiled:
        candidate = ways("formula", timed=True, wrap=torch.compile)
        try:
            candidate()
            calls["compiled"] = candidate
        except Exception as error:  # of the compiler, of any kind
            notes["compiled"] = _first_line(error)
    device = torch.device(case.setting.device)
    once = sum(median(times) for times in measure(calls, 2, 1, device).values())
    rounds = min(200, max(5, int(1e3 * seconds / max(once, 1e-3))))
    times = {name: median(found) for name, found in measure(calls, rounds, 1, device).items()}
    formula = min(time for name, time in times.items() if name != "subject")
    found = {"ms": times["subject"], "formula_ms": formula, "ratio": times["subject"] / formula, **notes}
    return found | ({"compiled_ms": times["compiled"]} if "compiled" in times else {})


class Worker:
    """Calls functions in a process of its own, which serves until a call fails; the next one is begun anew.

    A kernel that crashes ends that process, not ours; what it leaves behind on a device is gone with it.
    """

    def __init__(self):
        self._context = multiprocessing.get_context("forkserver")  # imports once, before any device is in use
        self._context.set_forkserver_preload([__name__])
        self._process = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self._end()

    def call(self, function: Callable, *args, seconds: float) -> tuple[Any, str]:
        """Call a function.

        Args:
            function, args: Must be importable and picklable, as what is returned.
            seconds: After which the process is ended.

        Returns:
            The result and "", or None and what went wrong, in words.
        """
        if self._process is None:
            self._pipe, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(theirs, torch.get_num_threads()), daemon=True)
            self._process.start()
            theirs.close()
        answer = self._ask(function, args, seconds)
        if answer[1]:
            self._end()
        return answer

    def _ask(self, function: Callable, args: tuple, seconds: float) -> tuple[Any, str]:
        try:
            self._pipe.send((function, args))
            return self._pipe.recv() if self._pipe.poll(seconds) else (None, f"stopped after {seconds:.0f} s")
        except (EOFError, ConnectionError):
            self._process.join(10)
            code = self._process.exitcode
            return None, f"crashed: {signal.Signals(-code).name if code and code < 0 else f'exit status {code}'}"

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(pipe, threads: int) -> None:
    torch.set_num_threads(threads)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = function(*args), ""
        except Exception as error:
            answer = None, f"{type(error).__name__}: {_first_line(error)}"
        pipe.send(answer)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _fresh(value, exact: bool, gradients: bool):
    if not isinstance(value, Tensor):
        return value
    value = value.detach().clone()
    if not value.is_floating_point():
        return value
    return (value.double() if exact else value).requires_grad_(gradients)
