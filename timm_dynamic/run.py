"""`python -m timm_dynamic.run SCRIPT ARGS...`: run a Python script unchanged, with our models registered in timm."""

import os
import runpy
import sys

import timm_dynamic  # noqa: F401 (registers our models)


def main() -> None:
    if len(sys.argv) < 2 or not os.path.isfile(sys.argv[1]):
        problem = f"no such script: {sys.argv[1]}" if len(sys.argv) > 1 else "name a script"
        sys.exit(_fail(f"{problem} (usage: python -m timm_dynamic.run SCRIPT ARGS...)"))
    del sys.argv[0]
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(sys.argv[0]))  # as `python SCRIPT` has it
    runpy.run_path(sys.argv[0], run_name="__main__")


def _fail(message: str) -> int:
    print(f"timm_dynamic.run: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
