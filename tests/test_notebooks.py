"""The notebooks run from the first cell to the last, and are stored without outputs."""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
SAYS = {
    "make_a_network_dynamic": r"largest difference of a logit: \d\.\de-0[4-9]",
    "time_against_macs": r"ddf_mul_resnet50 +[\d.]+ +[\d.]+ +0\.\d\d +\d\.\d\d\n",
    "what_a_network_decides": r"test_dy_resnet\.digits: (9[89]|100)\.\d% right",
}
# What makes it quicker, and is seen to be there.
SMALLER = {
    "make_a_network_dynamic": {
        "load_digits()": "load_digits(n_class=4)",
        "train(static, 3,": "train(static, 1,",
        "train(model, 3,": "train(model, 1,",
    },
    "time_against_macs": {"= 224, 5, 1": "= 64, 2, 1", "randn(8, 3, 256, 256": "randn(2, 3, 64, 64"},
}


@pytest.mark.parametrize("name", SAYS)
def test_it_runs(name, capsys):
    """Its cells are plain Python, one after the other; Jupyter would show the figures."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), "store it without outputs"
    code = ["".join(cell["source"]) for cell in cells]
    for text, other in SMALLER.get(name, {}).items():
        assert sum(text in one for one in code) == 1
        code = [one.replace(text, other) for one in code]
    scope = {}
    pyplot.switch_backend("agg")
    for one in code:
        exec(one, scope)
    figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
    assert figures
    for figure in figures:
        figure.canvas.draw()
    pyplot.close("all")
    assert re.search(SAYS[name], capsys.readouterr().out)


def test_all_of_them():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(SAYS)
