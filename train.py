import sys

from timm_dynamic.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
