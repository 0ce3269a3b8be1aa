"""The documentation as a site: it builds without a warning, shows the Python API, and a wrong link is an error."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort
from nbclient import NotebookClient

import dist_egnn

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")


def test_the_site_shows_the_whole_api(tmp_path: Path) -> None:
    """A build without a warning; every public name has its entry; pages of recipes link to pages of docs/."""
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    entries = re.findall(r'id="dist_egnn\.(\w+)"', (tmp_path / "api.html").read_text(encoding="utf-8"))
    assert sorted(entries) == sorted(dist_egnn.__all__)
    recipe = (tmp_path / "recipes/lagrangebench/index.html").read_text(encoding="utf-8")
    assert 'href="../../rollout.html#evaluation"' in recipe


@pytest.mark.parametrize("mistake", ["[a](absent.md)", "[a](README.md#absent)", "::: dist_egnn.absent"])
def test_what_leads_nowhere_is_an_error(tmp_path: Path, mistake: str) -> None:
    pages = tmp_path / "docs"
    pages.mkdir()
    (pages / "README.md").write_text(f"# A page\n\n{mistake}\n", encoding="utf-8")
    keys = {"docs_dir": str(pages), "site_dir": str(tmp_path / "site"), "nav": [{"A page": "README.md"}], "hooks": []}
    with pytest.raises(Abort):
        build(load_config(str(ROOT / "mkdocs.yml"), **keys))


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, with a training of one epoch in place of ten; its rollout beats the best baseline after five steps."""
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(ROOT / "docs/cloth.ipynb", 4)
    source = next(cell for cell in notebook.cells if "train.epochs" in cell.source)
    assert '"train.epochs": 10' in source.source
    source.source = source.source.replace('"train.epochs": 10', '"train.epochs": 1')
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    table = pd.read_csv(tmp_path / "runs/cloth/evaluate-rollout.csv").set_index("step")
    assert table["mse"][5] < table["ballistic_mse"][5]
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
