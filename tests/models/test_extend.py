"""docs/extend.md: the files on the page pass its own test class and are trained by its command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dist_egnn import config
from dist_egnn.data.store import Store
from dist_egnn.errors import Failure
from dist_egnn.evaluate import parallel_check
from dist_egnn.models import network

PAGE = Path(__file__).parents[2] / "docs" / "extend.md"
FILES = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE.read_text(), re.M | re.S))
FOLDER = tempfile.TemporaryDirectory(prefix="dist_egnn-extend-")  # until the last test has run
Path(FOLDER.name, "powers.py").write_text(FILES["powers.py"], encoding="utf-8")
sys.path.append(FOLDER.name)
exec(compile(FILES["test_powers.py"], str(PAGE), "exec"))  # pytest finds its class here


def test_the_page_is_two_short_files() -> None:
    assert list(FILES) == ["powers.py", "test_powers.py"]
    assert len(FILES["powers.py"].splitlines()) < 150
    (suite,) = (value for name, value in globals().items() if name.startswith("Test"))
    assert suite.name == "powers:FastPowers"
    assert network.model_class(suite.name).__name__ == "FastPowers"


def test_it_trains_on_two_processes_by_its_command(small: Path, tmp_path: Path) -> None:
    """As the console script runs, without the working directory on Python's path (-P)."""
    (tmp_path / "powers.py").write_text(FILES["powers.py"])
    data = {"path": str(small), "radius": 0.27, "horizon": 3, "frames": 1}
    sizes = {"model": {"hidden": 8, "layers": 2}, "train": {"epochs": 1}, "partition": {"parts": 2}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"data": data, **sizes}))
    (line,) = re.findall(r"^ *distegnn (train .*)$", PAGE.read_text(), re.M)
    command = [sys.executable, "-P", "-m", "dist_egnn.cli", *line.split()]
    path = os.pathsep.join([str(PAGE.parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert config.load(tmp_path / "runs" / "powers" / "config.yaml").model.name == "powers:FastPowers"


def test_its_processes_equal_one(make_store: Callable[..., Path], tmp_path: Path) -> None:
    overrides = ["model.name=powers:FastPowers", "model.hidden=8", "model.layers=2", "model.normalize=true"]
    errors = parallel_check.compare(config.load(None, overrides), Store(make_store(2)), 1, tmp_path)
    assert max(errors.values()) <= parallel_check.TOLERANCE
    assert "gradient layers.0.k" in errors


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("absent:Model", r"cannot import absent.*install it"),
        ("powers.py:Powers", r"cannot import powers\.py"),
        ("powers:Slow", r"torch\.nn\.Module.*docs/extend\.md"),
        ("powers:torch", r"torch\.nn\.Module.*docs/extend\.md"),
        ("my/powers:Powers", r"write PACKAGE\.MODULE:CLASS"),
        (":Powers", r"write PACKAGE\.MODULE:CLASS"),
        ("Powers", r"MODULE:CLASS of your own"),
    ],
)
def test_wrong_names_are_refused_in_one_line(name: str, remedy: str) -> None:
    with pytest.raises(Failure, match=rf"^model\.name={name}: .*{remedy}") as caught:
        network.model_class(name)
    assert "\n" not in str(caught.value)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(Failure, match=r"model\.attention: FastPowers"):
        network.model_class("powers:FastPowers")(features=3, attention=True)
