"""The notebook runs from the first cell to the last, and what it trains finds something."""

import re

import pytest

from tests.docs.pages import ROOT


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs pip install -e .[docs]")
    nbclient = pytest.importorskip("nbclient", reason="needs pip install -e .[docs]")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs/own_loss.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=3600, resources=resources).execute()  # raises what a cell raises

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    found = re.findall(r"^(\w+) +AP ([\d.]+) .*AP50 ([\d.]+)$", text, re.MULTILINE)
    assert [name for name, _, _ in found] == ["SigmoidFocalLoss", "PolyFocalLoss"]
    assert all(float(ap50) > 15 for _, _, ap50 in found)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
