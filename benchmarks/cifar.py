"""Every family on CIFAR-10 with one recipe: accuracy beside parameters, multiply-accumulates and measured time.

    python benchmarks/cifar.py train DATA RUNS [--seeds 0 1 2] [--networks NAME ...]
    python benchmarks/cifar.py report DATA RUNS [--threads N]

DATA has the photographs, DATA/train/CLASS/* and DATA/test/CLASS/*. `train` runs `timm-dynamic train` with
configs/dynconv_resnet8.cifar10.yaml for every network and seed, seed by seed; what is in RUNS is not done again,
and a run that was stopped goes on. `report` takes the last epoch of every finished run (none is chosen by its accuracy
on the test set), times the networks, and writes results/cifar_cpu.json. What that file says of runs that are not in
RUNS stays; their networks are timed again, untrained, but for those whose masks need weights that are not there.
"""

import argparse
import copy
import csv
import json
import subprocess
import sys
import time
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import mean, stdev

import timm
import torch
import yaml
from timm.data import create_dataset, create_loader, resolve_data_config
from torch import nn

import timm_dynamic
from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.convert import read_checkpoint
from timm_dynamic.cost import count_active, count_macs
from timm_dynamic.families import layers
from timm_dynamic.inspect import record, routing_entropy
from timm_dynamic.timing import environment, measure, summarise

CONFIG = Path(__file__).parent.parent / "configs" / "dynconv_resnet8.cifar10.yaml"
STATIC = {"budget": -1}
# Of a static network: its channels, from which the curve is made that says what the same time buys statically.
WIDTHS = {"static_050": (8, 16, 32), "static_150": (24, 48, 96), "static_200": (32, 64, 128)}
NETWORKS = {
    "static": STATIC,
    **{name: {**STATIC, "channels": list(channels)} for name, channels in WIDTHS.items()},
    **{f"dynconv_{int(100 * budget):03}": {"budget": budget} for budget in (0.7, 0.5, 0.3)},
    "dynconv_050_quiet": {"budget": 0.5, "gumbel_noise": False},
    "dynconv_030_firm": {"budget": 0.3, "budget_weight": 30.0},  # three times the authors'
    **{family: STATIC | {"from_scratch": True} for family in layers()},
    # Layers that begin as the static ones, as in a network that has been trained.
    **{f"{family}_exact": STATIC for family in ("dcd", "dy")},
    "resnet20_static": STATIC,
    "resnet20_dynconv_050": {"budget": 0.5},
}
# Tags of weights that came of a network's first run.
SHIPPED = {
    "dynconv_050": "dynconv_resnet8.budget50_cifar10",
    "dynconv_030_firm": "dynconv_resnet8.budget30_cifar10",
    "resnet20_dynconv_050": "dynconv_resnet20.budget50_cifar10",
}


def model_of(network: str) -> str:
    """The model of the package that it is made of."""
    return "dynconv_resnet20" if network.startswith("resnet20") else yaml.safe_load(CONFIG.read_text())["model"]


def create(network: str) -> nn.Module:
    """A network of the study, untrained."""
    model, layer, kwargs = model_of(network), layer_of(network), NETWORKS[network]
    if layer:
        return timm.create_model("dynamized", base=model, layer=layer, num_classes=10, **kwargs)
    return timm.create_model(model, num_classes=10, **kwargs)


def layer_of(network: str) -> str | None:
    """The layer that it is made dynamic with."""
    layer = network.removesuffix("_exact")
    return layer if layer in layers() else None


def train(data: Path, runs: Path, networks: list[str], seeds: list[int], channels_last: bool) -> None:
    """Train what has not been trained; the log of every run is beside it."""
    for seed in seeds:
        for network in networks:
            folder = runs / f"{network}.{seed}"
            if (folder / "done.json").exists():
                continue
            folder.mkdir(parents=True, exist_ok=True)
            command = [str(Path(sys.executable).with_name("timm-dynamic")), "train", str(data), "--config", str(CONFIG)]
            command += ["--model", model_of(network)]
            command += ["--seed", str(seed), "--output", str(runs), "--experiment", folder.name, "--resume", "auto"]
            command += ["--model-kwargs", *(f"{k}={v}".replace(" ", "") for k, v in NETWORKS[network].items())]
            command += ["--dynamize", layer_of(network)] if layer_of(network) else []
            command += ["--channels-last"] if channels_last else []
            print(time.strftime("%H:%M"), folder.name, flush=True)
            begin = time.monotonic()
            with open(folder / "log.txt", "a") as log:
                status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
            if status:
                print(f"{folder.name} ended with exit status {status}: see {folder / 'log.txt'}", flush=True)
                continue
            lines = (folder / "log.txt").read_text().splitlines()
            done = {
                "minutes": round((time.monotonic() - begin) / 60, 1),
                "last_line": lines[-1],
                "command": command[1:],
            }
            (folder / "done.json").write_text(json.dumps({**done, **environment(torch.device("cpu"))}, indent=1))


def load(network: str, folders: list[Path]) -> nn.Module:
    """A network with the weights of its first run here, or those of the package; untrained without both."""
    if not folders and network in SHIPPED:
        return timm.create_model(SHIPPED[network], pretrained=True).eval()
    net = create(network)
    if folders:
        net.load_state_dict(read_checkpoint(folders[0] / "last.pth.tar")["state_dict"])
    return net.eval()


def photographs(net: nn.Module, data: Path, images: int = 1000) -> list[torch.Tensor]:
    """Some test images of every class, in batches of 100."""
    config = resolve_data_config({}, model=net)
    dataset = create_dataset("", root=str(data), split="test")
    colours = {"mean": config["mean"], "std": config["std"]}
    loader = create_loader(dataset, config["input_size"], 100, use_prefetcher=False, **colours)
    # The folders of the classes follow each other: every tenth batch.
    return [x for i, (x, _) in enumerate(loader) if i % (len(dataset) // images) == 0]


@torch.inference_mode()
def executed(net: nn.Module, batches: list[torch.Tensor]) -> dict[str, float | None]:
    """Multiply-accumulates of an image, on average, and the share that masks leave of theirs."""
    with count_active(net) as active:
        macs = mean(count_macs(net, x).executed for x in batches)
    return {"macs": macs, "share": active.share}


@torch.inference_mode()
def routing(net: nn.Module, batches: list[torch.Tensor]) -> dict[str, float] | None:
    """How far decisions vary between images: their mean entropy, and the entropy of their mean.

    Shares of the highest entropy, on average over layers. They are equal if all images are decided alike.
    """
    decided: dict[str, list[torch.Tensor]] = {
        name: [] for name, layer in net.named_modules() if hasattr(layer, "routing_limit")
    }
    if not decided:
        return None
    for x in batches:
        with record(net) as seen:
            net(x)
        for name, values in decided.items():
            values.append(seen[name].double())
    rows = []
    for name, values in decided.items():
        every = torch.cat(values)
        for_each, highest = routing_entropy(net.get_submodule(name), every)
        of_mean, _ = routing_entropy(net.get_submodule(name), every.mean(0, keepdim=True))
        rows.append((for_each.mean().item() / highest, of_mean.item() / highest))
    return dict(zip(("mean_entropy", "entropy_of_mean"), map(mean, zip(*rows, strict=True)), strict=True))


def executions(network: str, net: nn.Module, inputs: list[torch.Tensor]) -> dict[tuple[str, str], partial]:
    """The ways to run a network, of which the fastest counts; every call takes another input, and so other masks."""
    last = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    fast = timm_dynamic.optimize(net, inputs[0])
    ways = {"eager": (net, inputs), "eager, channels_last": (net, last), "optimized": (fast, inputs)}
    return {(network, way): partial(_next, run, cycle(x)) for way, (run, x) in ways.items()}


def _next(run: nn.Module, inputs) -> None:
    run(next(inputs))


def steps(network: str, net: nn.Module, x: torch.Tensor) -> dict[tuple[str, str], partial]:
    """A training step without the optimizer's, in both layouts."""
    layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return {
        (network, name): partial(_step, copy.deepcopy(net).to(memory_format=layout), x.contiguous(memory_format=layout))
        for name, layout in layouts.items()
    }


def _step(net: nn.Module, x: torch.Tensor) -> None:
    net.zero_grad()
    net(x).square().sum().backward()


def fastest(ways: dict[tuple[str, str], partial], iterations: int, images: int) -> dict[str, dict[str, str | float]]:
    """Of every network the fastest way, by median; all ways of all networks run in turns."""
    found: dict[str, dict[str, str | float]] = {}
    for (network, way), times in measure(ways, iterations, 2, torch.device("cpu")).items():
        median = summarise(times)["median_ms"] / images
        if network not in found or median < found[network]["ms_per_image"]:
            found[network] = {"execution": way, "ms_per_image": median}
    return found


def result(network: str, folders: list[Path], net: nn.Module, batches: list[torch.Tensor], before: dict | None) -> dict:
    """What the runs of a network say of it; `before`: what a report said of its runs, of which some may not be here."""
    runs = {run["seed"]: run for run in before["runs"]} if before else {}
    for folder in folders:
        done, seed = json.loads((folder / "done.json").read_text()), int(folder.suffix[1:])
        runs[seed] = {
            "seed": seed,
            "top1": float(list(csv.DictReader(open(folder / "summary.csv")))[-1]["eval_top1"]),
            "last_line": done["last_line"].partition(", in ")[0],
            "commit": done["commit"],
            "command": words(done["command"]),
        }
    top1 = [run["top1"] for run in runs.values()]
    facts = {**executed(net, batches), "routing": routing(net, batches)} if folders else before
    return {
        "network": network,
        "runs": sorted(runs.values(), key=lambda run: run["seed"]),
        "top1_mean": mean(top1),
        "top1_std": stdev(top1) if len(top1) > 1 else None,
        "params": sum(p.numel() for p in net.parameters()),
        **{key: facts[key] for key in ("macs", "share", "routing")},
    }


def words(command: list[str]) -> str:
    """A command as anybody would give it: two folders are named."""
    command = [f"configs/{CONFIG.name}" if word.endswith(CONFIG.name) else word for word in command]
    command[1], command[command.index("--output") + 1] = "DATA", "RUNS"
    return " ".join(["timm-dynamic", *command])


def report(data: Path, runs: Path, threads: int, iterations: int, output: Path) -> None:
    torch.set_num_threads(threads)
    rows, ways = {}, {"batch_1": {}, "batch_64": {}, "training": {}}
    earlier = {row["network"]: row for row in json.loads(output.read_text())["rows"]} if output.exists() else {}
    for network in NETWORKS:
        folders = sorted(path.parent for path in runs.glob(f"{network}.*/done.json"))
        if not folders and network not in earlier:
            continue
        net = load(network, folders)
        batches = photographs(net, data)
        rows[network] = result(network, folders, net, batches, earlier.get(network))
        print(json.dumps(rows[network]), flush=True)
        if rows[network]["share"] is not None and not folders and network not in SHIPPED:
            continue
        images = torch.cat(batches)
        with torch.inference_mode():
            # Every class is in every batch.
            ways["batch_1"] |= executions(network, net, list(images[::20].split(1)))
            ways["batch_64"] |= executions(network, net, [images[i::15][:64] for i in range(15)])
        ways["training"] |= steps(network, create(network), images[::7][:128])
    with torch.inference_mode():
        times = {name: fastest(ways[name], iterations, int(name[6:])) for name in ("batch_1", "batch_64")}
    times["training"] = fastest(ways["training"], max(1, iterations // 10), 128)
    for network, row in rows.items():
        row |= {name: of_all.get(network) for name, of_all in times.items()}
    epochs = yaml.safe_load(CONFIG.read_text())["epochs"]
    facts = {"threads": threads, "data": "CIFAR-10, JPEG", "epochs": epochs}
    found = {**environment(torch.device("cpu")), **facts, "rows": list(rows.values())}
    with replacing(output) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "report"))
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--channels-last", action="store_true", help="train in that layout")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cifar_cpu.json")
    args = parser.parse_args()
    if args.what == "train":
        train(args.data, args.runs, args.networks, args.seeds, args.channels_last)
    else:
        report(args.data, args.runs, args.threads, args.iterations, args.output)


if __name__ == "__main__":
    main()
