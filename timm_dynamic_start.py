"""The `timm-dynamic` program. It answers at once: the package, and with it torch, is imported when work begins."""

import importlib.util
import sys


def run(*words: str) -> None:
    """Run the command line, after these words, and exit."""
    spec = importlib.util.find_spec("timm_dynamic")
    # A package whose own file has not run yet, so that its subpackage can be imported: `cli` runs it.
    sys.modules["timm_dynamic"] = importlib.util.module_from_spec(spec)
    from timm_dynamic import cli

    sys.argv[1:1] = words
    cli.run()


if __name__ == "__main__":
    run()
