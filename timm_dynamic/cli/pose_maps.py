"""Heat maps of joints: their targets and loss, the joints that they show, and PCKh. As for MPII in arXiv 1912.03203."""

import torch
from torch import Tensor, nn

JOINTS = (
    "right ankle, right knee, right hip, left hip, left knee, left ankle, pelvis, thorax, upper neck, head top, "
    "right wrist, right elbow, right shoulder, left shoulder, left elbow, left wrist"
).split(", ")
PAIRS = ((0, 5), (1, 4), (2, 3), (10, 15), (11, 14), (12, 13))  # right and left
PARENTS = (1, 2, 6, 6, 3, 4, 6, 6, 7, 8, 11, 12, 7, 7, 13, 14)  # the other end of each joint's bone
STRIDE = 4  # pixels of the image for one of a map
RADIUS = 6  # of a target, in pixels of the map: three standard deviations
THRESHOLDS = (0.5, 0.1, 0.11)
_SIGMA = 2.0
_GROUPS = {
    "head": (9,),
    "shoulder": (12, 13),
    "elbow": (11, 14),
    "wrist": (10, 15),
    "hip": (2, 3),
    "knee": (1, 4),
    "ankle": (0, 5),
}
_COUNTED = [joint for joint in range(len(JOINTS)) if joint not in (6, 7)]  # in the mean: not pelvis and thorax
_SWAPPED = list(range(len(JOINTS)))
for _right, _left in PAIRS:
    _SWAPPED[_right], _SWAPPED[_left] = _left, _right


def finds_joints(model: nn.Module) -> bool:
    """Whether a model gives heat maps of joints."""
    return hasattr(model, "forward_stacks")


def check_network(name: str, model: nn.Module) -> None:
    """Raise a `ValueError` if a model of that name does not give heat maps of MPII's joints."""
    if not finds_joints(model):
        raise ValueError(f"{name} is no pose network: timm.list_models('*hourglass*') names ours")
    if model.num_classes != len(JOINTS):
        raise ValueError(f"{name} has {model.num_classes} joints, MPII {len(JOINTS)}: leave out num_joints")


def swap_sides(joints: Tensor, dim: int) -> Tensor:
    """What belongs to the joints of a mirrored person: right and left exchanged along a dimension."""
    return joints.index_select(dim, torch.tensor(_SWAPPED, device=joints.device))


def target_maps(target: Tensor, height: int, width: int) -> Tensor:
    """Gaussians around joints, 1 at their centres, cut off at three standard deviations of two pixels.

    Args:
        target: `[B, J, 3]`: column and row of the centre, whole numbers, and 1, or 0 for a joint that does not count.
        height, width: Of a map.

    Returns:
        `[B, J, height, width]`, float32; zeros for a joint that does not count.
    """

    def bell(centre: Tensor, size: int) -> Tensor:
        distance = torch.arange(size, device=target.device) - centre[..., None]
        return (distance.abs() <= RADIUS) * torch.exp(-(distance**2) / (2 * _SIGMA**2))

    column, row, weight = target.float().unbind(-1)
    return (weight[..., None] * bell(row, height))[..., None] * bell(column, width)[..., None, :]


class HeatmapLoss(nn.Module):
    """Half the mean squared error over all joints and positions, added up over the maps of a network's stacks.

    A joint that does not count adds nothing to the sum, but its positions count in the mean.
    """

    def forward(self, maps: Tensor | list[Tensor], target: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            maps: `[B, J, h, w]`, of every stack.
            target: As for `target_maps`.
        """
        maps = [maps] if isinstance(maps, Tensor) else maps
        wanted = target_maps(target, *maps[0].shape[2:])
        weight = target[..., 2, None, None].to(wanted.dtype)
        return sum((weight * (stack.float() - wanted)).square().mean() / 2 for stack in maps)


def predict(model: nn.Module, images: Tensor, flip_test: bool = False) -> Tensor:
    """Heat maps, `[B, J, H/4, W/4]`, of `[B, 3, H, W]`.

    Args:
        model: In eval mode.
        images: Normalised.
        flip_test: Average them with those of the mirrored images, which are mirrored back and then shifted one column
            to the right.
    """
    maps = model(images)
    if not flip_test:
        return maps
    mirrored = swap_sides(model(images.flip(3)).flip(3), 1)
    mirrored = torch.cat([mirrored[..., :1], mirrored[..., :-1]], 3)
    return (maps + mirrored) / 2


def peaks(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Where heat maps are highest.

    Args:
        maps: `[B, J, h, w]`.

    Returns:
        Column and row, `[B, J, 2]` of float64, and the height, `[B, J]`. A peak that does not reach the border is moved
        by a quarter of a pixel towards its higher neighbour. Without positive values it is (0, 0).
    """
    height, width = maps.shape[2:]
    flat = maps.flatten(2)
    index = flat.argmax(2)  # the first of several
    score = flat.gather(2, index[..., None])[..., 0]
    index = index * (score > 0)
    column, row = index % width, index // width

    def towards(before: int, after: int) -> Tensor:
        ends = [flat.gather(2, (index + step).clamp(0, height * width - 1)[..., None]) for step in (before, after)]
        return 0.25 * torch.sign(ends[1] - ends[0])[..., 0].double()

    inside = (column > 1) & (column < width - 1) & (row > 1) & (row < height - 1)
    moves = torch.stack([towards(-1, 1), towards(-width, width)], 2)
    return torch.stack([column, row], 2) + moves * inside[..., None], score


def count_hits(found: Tensor, wanted: Tensor, missing: Tensor, head_sizes: Tensor) -> Tensor:
    """How many joints were found, at each of `THRESHOLDS`, and how many there are.

    Args:
        found, wanted: `[N, J, 2]`, in pixels of the photograph.
        missing: `[N, J]`, whether a joint does not count.
        head_sizes: `[N]`, in pixels.

    Returns:
        `[len(THRESHOLDS) + 1, J]` of float64, to be added up.
    """
    distance = torch.linalg.vector_norm(found - wanted, dim=2) / head_sizes[:, None]
    hits = [((distance <= threshold) & ~missing).sum(0) for threshold in THRESHOLDS]
    return torch.stack([*hits, (~missing).sum(0)]).double()


def pckh(counts: Tensor) -> dict[str, float | None]:
    """Percentages of joints that were found within a share of the head's size (Andriluka et al., CVPR 2014).

    That is the share of `THRESHOLDS`: half of it for the joints, whose right and left are averaged, and for `mean`, of
    all joints but pelvis and thorax, each joint counted as often as it occurs. `mean@0.1` and `mean@0.11` are at
    those shares. What the authors call "Mean@0.1" is the latter.

    Args:
        counts: Of `count_hits`, added up.

    Returns:
        By name; None where there is no such joint.
    """
    *hits, total = counts
    shares = {}
    for name, joints in _GROUPS.items():
        joints = list(joints)
        shares[name] = (100 * hits[0][joints] / total[joints]).mean().item() if total[joints].all() else None
    number = total[_COUNTED].sum()
    for threshold, row in zip(THRESHOLDS, hits, strict=True):
        name = "mean" if threshold == THRESHOLDS[0] else f"mean@{threshold}"
        shares[name] = (100 * row[_COUNTED].sum() / number).item() if number else None
    return shares
