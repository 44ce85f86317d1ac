"""Models: importing this package registers those of all its files in timm's registry, and their families."""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
