"""docs/extend.md: the files on the page pass its own test class. test_docs_commands.py runs its commands."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_egnn import config
from dist_egnn.data.store import Store
from dist_egnn.errors import Failure
from dist_egnn.evaluate import parallel_check
from dist_egnn.models import network

PAGE = Path(__file__).parents[2] / "docs" / "extend.md"
FILES = dict(re.findall(r"^```python (\w+\.py)\n(.*?)^```", PAGE.read_text(), re.M | re.S))
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
