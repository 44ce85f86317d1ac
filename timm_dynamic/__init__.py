"""Dynamic convolution for timm: importing this package registers its models in timm's registry."""

from timm_dynamic import families, models
from timm_dynamic.cost import count_macs
from timm_dynamic.dispatch import explain, use
from timm_dynamic.inspect import record
from timm_dynamic.ops.kernels import backend_info
from timm_dynamic.optimize import optimize
from timm_dynamic.replace import dynamize
from timm_dynamic.training import auxiliary_loss, set_progress
from timm_dynamic.version import __version__

__all__ = [
    "__version__",
    "auxiliary_loss",
    "backend_info",
    "count_macs",
    "dynamize",
    "explain",
    "families",
    "models",
    "optimize",
    "record",
    "set_progress",
    "use",
]
