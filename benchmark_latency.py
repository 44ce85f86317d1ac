import sys

from timm_dynamic.cli import main

sys.exit(main(["benchmark", *sys.argv[1:]]))
