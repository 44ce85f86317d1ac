"""Times spatially sparse networks against the share of active positions, with masks of a given shape.

    python benchmarks/sparse.py [--device cpu|cuda] [--dtype float32|bfloat16] [--threads N] [--models NAME ...] \
        [--batch-sizes N ...] [--quick] [--output FILE.json]

The mask units run, but their masks are replaced: one blob, or scattered positions. Beside the sparse executor run, in
turn: the same network with every position computed ("folded dense"), and the static twin, or the network without masks
where there is none. All three are `timm_dynamic.optimize`d. Saves one row per model, batch size, pattern and share.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

import timm_dynamic
from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.families import family_of
from timm_dynamic.layers import SparseBranch
from timm_dynamic.ops import backend_info
from timm_dynamic.timing import environment, measure, peak_memory, summarise

MODELS = ("dynconv_resnet101", "dynconv_resnet50", "dynconv_mobilenetv2")
SHARES = tuple(round(0.1 * i, 1) for i in range(1, 11))


def active_positions(size: tuple[int, int], share: float, pattern: str) -> Tensor:
    """A mask `[1, 1, H, W]` with that share of ones: those nearest to the centre, or drawn at random."""
    H, W = size
    y, x = torch.arange(H) - (H - 1) / 2, torch.arange(W) - (W - 1) / 2
    if pattern == "blob":
        order = (y[:, None].square() + x.square()).flatten().argsort(stable=True)
    else:
        order = torch.randperm(H * W, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(H * W)
    mask[order[: round(share * H * W)]] = 1
    return mask.view(1, 1, H, W)


@contextmanager
def masks(model: nn.Module, share: float, pattern: str) -> Iterator[None]:
    """Within this context the mask units of a model, which run, give other masks."""
    made: dict[torch.Size, Tensor] = {}

    def replace(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        mask = run(x)
        if mask.shape not in made:
            own = active_positions(mask.shape[2:], share, pattern).to(mask)
            made[mask.shape] = own.expand_as(mask).contiguous()
        return made[mask.shape]

    units = [module.masker for module in model.modules() if isinstance(module, SparseBranch)]
    for unit in units:  # no hooks: with these a GPU would wait for every mask
        unit.forward = partial(replace, unit.forward)
    try:
        yield
    finally:
        for unit in units:
            del unit.forward


def networks(name: str, x: Tensor) -> dict[str, nn.Module]:
    """A model sparse and dense, and the network without masks that it is compared with, in their forms for inference.

    Args:
        name: Of the model.
        x: Its input.
    """
    family, forms = family_of(name), {}
    for candidate, execution in (("sparse", "sparse"), ("folded dense", "dense")):
        torch.manual_seed(0)
        model = timm.create_model(name).eval().to(x)
        model.execution = execution
        layout = torch.channels_last if execution == "sparse" else "auto"
        forms[candidate] = timm_dynamic.optimize(model, x, memory_format=layout)
    twin = family.twins.get(name)
    static = timm.create_model(twin) if twin else timm.create_model(name, **family.static)
    return {**forms, "static twin": timm_dynamic.optimize(static.eval().to(x), x)}


def measure_model(name: str, batch_size: int, to: dict, quick: bool, bar: tqdm) -> Iterator[dict]:
    """Rows of the report; `to` is the device and the dtype."""
    device, size = to["device"], timm.get_pretrained_cfg(name).input_size
    x = torch.randn(batch_size, *size, **to).contiguous(memory_format=torch.channels_last)
    forms = networks(name, x)
    model, dense = forms["sparse"], forms["folded dense"]
    candidates = {candidate: partial(form, x) for candidate, form in forms.items()}
    for pattern in ("blob",) if quick else ("blob", "scattered"):
        for share in (0.3, 1.0) if quick else SHARES:
            with masks(model, share, pattern), masks(dense, share, pattern):
                macs = timm_dynamic.count_macs(model, x)
                iterations = {1: 30}.get(batch_size, 10)
                samples = measure(candidates, iterations, 3, device)
                times = {candidate: summarise(values) for candidate, values in samples.items()}
                memory = {key: peak_memory(candidates[key], device)[0] for key in ("sparse", "folded dense")}
            own = times["sparse"]["median_ms"]
            yield {
                "model": name,
                "batch_size": batch_size,
                "img_size": size[-1],
                "pattern": pattern,
                "share": share,
                "macs": macs._asdict(),
                "times": times,
                "speedup_over_folded_dense": times["folded dense"]["median_ms"] / own,
                "speedup_over_static_twin": times["static twin"]["median_ms"] / own,
                "peak_memory": memory,
            }
            bar.update()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="default: 1 and 8; on a GPU 1, 32 and 128")
    parser.add_argument("--quick", action="store_true", help="a blob at 0.3 and 1.0 only")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    output = args.output or Path(__file__).parent / "results" / f"sparse_{args.device}.json"
    to = {"device": device, "dtype": getattr(torch, args.dtype)}
    report = {**environment(device), "kernels": backend_info()[args.device], "dtype": args.dtype, "rows": []}
    batches = args.batch_sizes or ((1, 8) if args.device == "cpu" else (1, 32, 128))
    with tqdm(total=len(args.models) * len(batches) * (2 if args.quick else 20), disable=None) as bar:
        for name in args.models:
            for batch_size in batches:
                for row in measure_model(name, batch_size, to, args.quick, bar):
                    tqdm.write(
                        f"{name}, batch {batch_size}, {row['pattern']} {row['share']}: "
                        f"{row['times']['sparse']['median_ms']:.1f} ms, {row['speedup_over_folded_dense']:.2f}x faster "
                        f"than dense, {row['speedup_over_static_twin']:.2f}x than the static twin"
                    )
                    report["rows"].append(row)
                    with replacing(output) as temporary:
                        temporary.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
