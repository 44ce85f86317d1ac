from timm_dynamic_start import run

run("validate")
