"""Files that a command writes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output_file(flag: str, path: str, suffixes: tuple[str, ...]) -> None:
    """Raise a `ValueError` if `path` has none of the suffixes, or could not be written."""
    target = Path(path)
    if target.suffix not in suffixes:
        raise ValueError(f"{flag} {path}: the name must end in {' or '.join(suffixes)}")
    if target.is_dir() or not os.access(target.parent, os.W_OK):
        raise ValueError(f"{flag} {path}: cannot write there")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; it takes its place if the block ends without an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
