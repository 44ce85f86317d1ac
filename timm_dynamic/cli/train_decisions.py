"""What `timm-dynamic train` reports of a network's decisions: do they differ between images, and what do masks skip?"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

from torch import Tensor, nn

from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.cost import count_active, masked_blocks
from timm_dynamic.inspect import routing_spread

_IMAGES = 32


class FirstImages:
    """A loader that remembers the first images of a pass, as `first`."""

    def __init__(self, loader):
        self.loader, self.first = loader, None

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        for images, target in self.loader:
            if self.first is None:
                self.first = images[:_IMAGES]
            yield images, target


def routing_spreads(model: nn.Module, images: Tensor | None, path: Path, epoch: int) -> dict[str, float]:
    """How much what layers decide differs between images: of each layer into a file, their mean as `routing_spread`.

    Args:
        model: As it was just validated.
        images: Some; one or none gives no spread.
        path: JSON file to write.
        epoch: For that file.
    """
    if images is None or len(images) < 2:
        return {}
    spreads = routing_spread(model.eval(), images)
    if not spreads:
        return {}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"epoch": epoch, "images": len(images), "spread": spreads}, indent=1) + "\n")
    return {"routing_spread": mean(spreads.values())}


@contextmanager
def executed_share(model: nn.Module) -> Iterator[dict[str, float]]:
    """A dict that has, after the block, the share of the masked blocks' MACs that ran in it, as `executed`.

    It is what a network's budget names, of this process's images. The dict stays empty for a model without masks, or a
    compiled one.
    """
    found: dict[str, float] = {}
    if hasattr(model, "_orig_mod") or not masked_blocks(model):
        yield found
        return
    with count_active(model) as active:
        yield found
    found["executed"] = active.share
