"""The public names of dist_egnn, and what the package and its command line import at start."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import dist_egnn
from dist_egnn.config import Config

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("code", ["import dist_egnn", "from dist_egnn import cli, config; config.load(None)"])
def test_no_heavy_import_at_start(code: str) -> None:
    code = f"import sys; {code}; import dist_egnn.launch.main; print(*{{'torch', 'dgl', 'pandas'}} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).split() == []


def test_public_names_and_version() -> None:
    assert {*dist_egnn.__all__} <= {*dir(dist_egnn)}
    for name in dist_egnn.__all__:
        assert getattr(dist_egnn, name).__doc__
    assert dist_egnn.load_config(None) == Config()
    assert dist_egnn.load_config(None, ["train.epochs=2"]).train.epochs == 2
    with pytest.raises(AttributeError, match="Absent"):
        dist_egnn.Absent  # noqa: B018
    assert Path(dist_egnn.__file__).with_name("py.typed").is_file()
    assert re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M) == [dist_egnn.__version__]
