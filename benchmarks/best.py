"""A model in its fastest execution beside its static twin in its fastest: one process of `models.py --best`.

    python benchmarks/best.py MODEL[+LAYER] --runtime torch|onnxruntime --mode eval|train --batch-size N [N ...] \
        [--iterations N] [--threads N] [--json FILE]

`resnet50+dcd` is a static network that was made dynamic, beside itself. Within PyTorch: eager and
`timm_dynamic.optimize`d, contiguous and in channels_last, the optimized copy under `torch.compile`, and the model as it
is with inductor's freezing; training eager in both formats, and compiled. In onnxruntime: the file exported of the
model as it is, and of the optimized one, with a dynamic batch.

All ways of both networks run in turns for some rounds; the fastest of each then run in turns against each other.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_dynamic import count_macs, families, optimize
from timm_dynamic.timing import environment, measure, summarise

CPU = torch.device("cpu")
FORMATS = {"": torch.contiguous_format, ", channels_last": torch.channels_last}
Way = Callable[[Tensor], object]


def create(name: str) -> tuple[nn.Module, nn.Module, str]:
    """A network, its static twin, and the twin's name."""
    base, _, layer = name.partition("+")
    twin = base if layer else families.static_twin(name)
    dynamic = timm.create_model("dynamized", base=base, layer=layer) if layer else timm.create_model(name)
    return dynamic, timm.create_model(twin), twin


def evaluation(model: nn.Module, x: Tensor) -> dict[str, Way]:
    """Ways to run a model within PyTorch; what is compiled is compiled at the first call."""
    ways = {}
    for name, form in FORMATS.items():
        eager = copy.deepcopy(model).to(memory_format=form)
        ways[f"eager{name}"] = partial(_evaluate, eager, form)
        ways[f"optimized{name}"] = partial(_evaluate, optimize(model, x, memory_format=form), form)
    plain = torch.contiguous_format
    compiled = torch.compile(optimize(model, x, memory_format=plain), dynamic=False)
    frozen = torch.compile(copy.deepcopy(model), dynamic=False, options={"freezing": True})
    networks = {"optimized, compiled": compiled, "frozen": frozen}
    return ways | {name: partial(_evaluate, network, plain) for name, network in networks.items()}


def training(model: nn.Module, x: Tensor) -> dict[str, Way]:
    """Ways to run a training step."""
    ways = {}
    for name, form in FORMATS.items():
        ways[f"eager{name}"] = _step(copy.deepcopy(model).to(memory_format=form), form, lambda network: network)
    compiled = _step(copy.deepcopy(model), torch.contiguous_format, partial(torch.compile, dynamic=False))
    return ways | {"compiled": compiled}


def _evaluate(model: Callable, form: torch.memory_format, x: Tensor) -> None:
    with torch.no_grad():
        model(x.contiguous(memory_format=form))


def _step(model: nn.Module, form: torch.memory_format, prepare: Callable) -> Way:
    optimizer, forward = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), prepare(model)

    def step(x: Tensor) -> None:
        target = torch.zeros(len(x), dtype=torch.long)
        F.cross_entropy(forward(x.contiguous(memory_format=form)), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def onnxruntime_ways(model: nn.Module, x: Tensor, folder: Path, threads: int) -> dict[str, Way]:
    """Sessions of both files."""
    ways = {}
    for name, exported in (("as it is", model), ("optimized", optimize(model, x))):
        path, shapes = folder / f"{name}.onnx", ({0: torch.export.Dim.DYNAMIC},)
        torch.onnx.export(
            *(exported, (x,), path), dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False
        )
        ways[name] = onnxruntime_way(path, threads)
    return ways


def onnxruntime_way(path: Path, threads: int) -> Callable[..., None]:
    """Runs a file on its inputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads of a session that was run before would otherwise wait for more work on the cores that the next one needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda *inputs: session.run(None, {name: t.numpy() for name, t in zip(names, inputs, strict=True)})


def compare(networks: dict[str, dict[str, Way]], x: Tensor, iterations: int) -> dict:
    """The fastest way of ours and of the twin's, and their times in milliseconds.

    Args:
        networks: Ways by name, of `"ours"` and `"twin"`.
        x: Images.
        iterations: Rounds for the fastest two; the others run a quarter of them.
    """
    steps = {(network, way): partial(run, x) for network, ways in networks.items() for way, run in ways.items()}
    times = {key: summarise(samples)["median_ms"] for key, samples in _measure(steps, -(-iterations // 4)).items()}
    best = {network: min(ways, key=lambda way: times[network, way]) for network, ways in networks.items()}
    final = _measure({network: steps[network, way] for network, way in best.items()}, iterations)
    ours, twin = (summarise(final[network])["median_ms"] for network in ("ours", "twin"))
    tried = {network: {way: times[network, way] for way in ways} for network, ways in networks.items()}
    return {
        **{"execution": best["ours"], "baseline_execution": best["twin"], "median_ms": ours, "baseline_ms": twin},
        **{"time_ratio": ours / twin, "tried_ms": tried["ours"], "baseline_tried_ms": tried["twin"]},
    }


def _measure(steps: dict, iterations: int) -> dict:
    return measure(steps, iterations, 2, CPU)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--runtime", choices=("torch", "onnxruntime"), default="torch")
    parser.add_argument("--mode", choices=("eval", "train"), default="eval")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1])
    parser.add_argument("--iterations", type=int, default=20, help="at batch 1; a quarter of them at others")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the rows are written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    *networks, twin = create(args.model)
    models = {key: model.train(args.mode == "train") for key, model in zip(("ours", "twin"), networks, strict=True)}
    size = models["ours"].pretrained_cfg["input_size"]
    macs = {network: sum(count_macs(model, torch.randn(1, *size))[1:]) for network, model in models.items()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ways = {}
        for batch_size in args.batch_size:
            x = torch.randn(batch_size, *size)
            for network, model in models.items():
                if args.runtime == "torch":
                    torch.compiler.reset()  # what was compiled for another batch
                    ways[network] = (training if args.mode == "train" else evaluation)(model, x)
                elif network not in ways:  # one file for all batches
                    path = Path(folder, network)
                    path.mkdir()
                    ways[network] = onnxruntime_ways(model, torch.randn(2, *size), path, args.threads)
            iterations = args.iterations if batch_size == 1 else -(-args.iterations // 4)
            row = {"model": args.model, "baseline": twin, "runtime": args.runtime, "mode": args.mode}
            row["commit"] = environment(CPU)["commit"]
            rows.append(
                row
                | {"batch_size": batch_size, "img_size": size[-1], "iterations": iterations}
                | compare(ways, x, iterations)
                | {"macs_ratio": macs["ours"] / macs["twin"]}
            )
    text = json.dumps({"rows": rows}, indent=1) + "\n"
    args.json.write_text(text) if args.json else print(text)


if __name__ == "__main__":
    main()
