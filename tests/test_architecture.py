"""Import direction between the folders of dist_egnn, and the three places that are the only ones to do what they do."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# a folder imports from itself and from folders before it
ORDER = [
    "errors",
    "utils",
    "config",
    "distributed",
    "data",
    "partition",
    "ops",
    "models",
    "train",
    "evaluate",
    "planning",
]
ORDER += ["viz", "commands", "launch", "cli"]
FILES = [file for folder in ("dist_egnn", "partition", "recipes", "tools") for file in (ROOT / folder).rglob("*.py")]
SOURCES = {
    "numba",
    "pysplishsplash",
    "MDAnalysis",
    "MDAnalysisData",
    "MDAnalysisTests",
}  # libraries of the recipes alone


def package_of(file: Path) -> tuple[str, ...]:
    parts = file.relative_to(ROOT).parts[:-1]
    return ("dist_egnn", *parts) if parts[:1] == ("partition",) else parts


def imports(source: str, package: tuple[str, ...]) -> set[str]:
    """Full names of what a source imports, inside functions too; ``from a import b`` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else ()
            names |= {".".join([*stem, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return names


def wrong(source: str, package: tuple[str, ...], own: str) -> set[str]:
    used = {name.split(".")[1] for name in imports(source, package) if name.startswith("dist_egnn.")} & set(ORDER)
    return {folder for folder in used if ORDER.index(folder) > ORDER.index(own)}


@pytest.mark.parametrize(
    "file", [f for f in FILES if package_of(f)[:1] == ("dist_egnn",)], ids=lambda f: f"{f.parent.name}/{f.name}"
)
def test_imports_follow_the_order_of_folders(file):
    if file != ROOT / "dist_egnn" / "__init__.py":  # the public API, loaded on demand
        own = [*package_of(file)[1:], file.stem][0]
        assert not wrong(file.read_text(), package_of(file), own)


def test_the_order_is_checked():
    for line in (
        "from ..train import trainer",
        "import dist_egnn.train.trainer",
        "from dist_egnn.train.trainer import f",
    ):
        assert wrong(f"def f():\n    {line}\n", ("dist_egnn", "models"), "models") == {"train"}


def test_collectives_sources_and_scripts_stay_in_their_places():
    outside = {file.stem for file in FILES if file.relative_to(ROOT).parts[0] in ("recipes", "tools")} - {"__main__"}
    for file in FILES:
        source, place = file.read_text(), str(file.relative_to(ROOT))
        names = imports(source, package_of(file))
        firsts = {name.split(".")[0] for name in names}
        if place not in ("dist_egnn/distributed/comm.py", "tools/emulated_hosts/sums.py"):
            assert not any(name.startswith("torch.distributed") for name in names), place
            assert not re.search(r"\btorch\.distributed\.\w+\(", source), place
        assert place.startswith("recipes/") or not firsts & SOURCES, place
        assert place.startswith(("recipes/", "tools/")) or not firsts & outside, place


def test_a_command_line_needs_no_torch():
    code = "import sys; from dist_egnn import cli, config; from dist_egnn.launch import main; config.load(None, []); "
    code += "print(*sorted({'torch', 'dgl', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
