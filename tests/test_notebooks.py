"""The notebooks run from the first cell to the last, and are stored without outputs."""

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
SMALLER = {"time_against_macs": {"= 224, 5, 1": "= 64, 2, 1", "randn(8, 3, 256, 256": "randn(2, 3, 64, 64"}}


@pytest.mark.parametrize("name", SAYS)
def test_it_runs(name, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "store it without outputs"
    for text, other in SMALLER.get(name, {}).items():
        (cell,) = [cell for cell in cells if text in cell.source]
        cell.source = cell.source.replace(text, other)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=FOLDER)
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    assert re.search(SAYS[name], "".join(output.get("text", "") for output in outputs))


def test_all_of_them():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(SAYS)
