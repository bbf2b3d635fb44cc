"""The notebooks run as they are, and show what they print."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.test_package import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda path: path.stem
)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def kinds(notebook):
    """What each cell shows: printed lines, pictures."""
    return [
        sorted(
            {
                "text" if output.output_type == "stream" else "picture"
                for output in cell.outputs
                if output.get("name") != "stderr"
            }
        )
        for cell in code_cells(notebook)
    ]


@every_notebook
def test_it_runs(path, tmp_path, monkeypatch):
    """With the outputs that are in the file, but for their numbers."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    expected = kinds(notebook)
    client = NotebookClient(
        notebook,
        timeout=1800,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    assert kinds(notebook) == expected


@every_notebook
def test_it_is_small_and_clean(path):
    assert path.stat().st_size < 300_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert outputs(notebook)
    for output in outputs(notebook):
        if output.output_type == "stream":
            assert output.name == "stdout"
            assert not re.search(r"Warning|Error|/\w+/\w+/", output.text)
        else:
            assert output.output_type == "display_data"
            assert "image/png" in output.data
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


@every_notebook
def test_it_installs_what_is_missing_and_downloads_nothing(path):
    notebook = nbformat.read(path, as_version=4)
    first, *others = [cell.source for cell in code_cells(notebook)]
    assert "except ImportError" in first
    for package in ("keras-lesam", "matplotlib", "scikit-learn"):
        assert package in first
    for source in others:
        assert not re.search(r"https?://|fetch_|\.datasets\.\w+\.load", source)
        for module in re.findall(r"^(?:from|import) (\w+)", source, re.M):
            assert module in (
                *("keras", "keras_lesam", "matplotlib", "numpy"),
                *("os", "sklearn"),
            )
