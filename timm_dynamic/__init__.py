"""Dynamic convolution for timm: importing this package registers its models in timm's registry."""

from timm_dynamic import models
from timm_dynamic.cost import count_macs
from timm_dynamic.ops import backend_info
from timm_dynamic.version import __version__

__all__ = ["__version__", "backend_info", "count_macs", "models"]
