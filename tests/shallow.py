"""Networks of timm's EfficientNet with fewer blocks: others of a stage differ in nothing that a test looks at."""

import re
from collections.abc import Sequence
from typing import Any

from timm.models._efficientnet_builder import decode_arch_def


def shallow(stages: Sequence[Sequence[str]], most: int = 1) -> dict[str, Any]:
    """Arguments of one network, which timm takes apart: of each line of its `stages` at most so many blocks."""
    cut = [[re.sub(r"_r(\d)_", lambda r: f"_r{min(most, int(r[1]))}_", line) for line in stage] for stage in stages]
    return {"block_args": decode_arch_def(cut)}
