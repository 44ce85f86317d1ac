"""For mkdocs: pages and pictures that lie outside of docs/, and links to them as they are on a code host."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "*.md",
    "benchmarks/README.md",
    "benchmarks/results/*.png",
    "timm_dynamic/weights/README.md",
    "examples/*",
    "notebooks/*.ipynb",
)


def on_files(files, config):
    """Put them where they are in the repository, seen from docs/."""
    for path in sorted(found for pattern in OUTSIDE for found in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """A page of docs/ names the others with `../`, the others name those of docs/ with `docs/`."""
    if page.file.src_uri in {path.name for path in ROOT.glob("*.md")} or "/" in page.file.src_uri:
        return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
    return re.sub(r"\]\(\.\./", "](", markdown)
