"""Imports: their direction between the folders of dist_egnn, and modules that only one place may import."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# a folder imports from itself and from the folders before it
ORDER = [*("errors", "utils", "config", "distributed", "data", "partition", "ops", "models", "train", "evaluate")]
ORDER += ["planning", "viz", "commands", "launch", "cli", "__init__"]
TOPS = ("dist_egnn", "partition", "recipes", "tools")
FILES = {str(file.relative_to(ROOT)): file for top in TOPS for file in (ROOT / top).rglob("*.py")}
RECIPE_LIBRARIES = {"numba", "pysplishsplash", "MDAnalysisData", "MDAnalysisTests"}
COLLECTIVES = ("dist_egnn/distributed/comm.py", "tools/emulated_hosts/sums.py")


def imports(source: str, path: str) -> set[str]:
    """Full names of all imports of a source file, also inside functions; ``from a import b`` gives a.b."""
    package = ("dist_egnn/" * path.startswith("partition/") + path).split("/")[:-1]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            names |= {".".join([*parents, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return names


def later_folders(source: str, path: str) -> set[str]:
    """Folders after that of the file which it imports from."""
    own = path.removeprefix("dist_egnn/").removesuffix(".py").split("/")[0]
    folders = {name.split(".")[1] for name in imports(source, path) if name.startswith("dist_egnn.")}
    return folders & {*ORDER[ORDER.index(own) + 1 :]}


@pytest.mark.parametrize("path", [path for path in FILES if path.startswith(TOPS[:2])])
def test_imports_follow_the_order_of_folders(path: str) -> None:
    assert not later_folders(FILES[path].read_text(), path)


@pytest.mark.parametrize("line", ["from ..train import x", "import dist_egnn.train.x", "from dist_egnn.train import x"])
def test_an_import_against_the_order_is_found(line: str) -> None:
    assert later_folders(f"def f():\n    {line}\n", "dist_egnn/models/x.py") == {"train"}


def test_modules_that_only_one_place_imports() -> None:
    scripts = {file.stem for path, file in FILES.items() if path.startswith(("recipes/", "tools/"))} - {"__main__"}
    for path, file in FILES.items():
        names = imports(file.read_text(), path)
        if path not in COLLECTIVES:
            assert not any(name.startswith("torch.distributed") for name in names), path
            assert not re.search(r"\btorch\.distributed\.\w+\(", file.read_text()), path
        roots = {name.split(".")[0] for name in names}
        assert path.startswith("recipes/") or not roots & RECIPE_LIBRARIES, path
        assert path.startswith(("recipes/", "tools/")) or not roots & scripts, path
