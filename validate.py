import sys

from timm_dynamic.cli import main

sys.exit(main(["validate", *sys.argv[1:]]))
