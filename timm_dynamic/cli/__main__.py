from timm_dynamic.cli import run

run()
