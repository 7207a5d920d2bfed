"""The notebooks run from top to bottom, and are kept without what they printed."""

from __future__ import annotations

import os
import pathlib

import pytest

from tests.conftest import REPOSITORY

nbformat = pytest.importorskip("nbformat", reason="needs the extra [test]")

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def read(path: pathlib.Path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert len(code) < len(notebook.cells)  # the rest is said in words


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    """In a folder of its own, with nothing prepared."""
    client = pytest.importorskip("nbclient", reason="needs the extra [test]")
    kept = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(REPOSITORY), kept))))
    notebook = read(path)
    resources = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources=resources
    ).execute()
    shown = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    pictures = [o for o in shown if any(kind.startswith("image/") for kind in o.get("data", ()))]
    assert len(pictures) >= 3
