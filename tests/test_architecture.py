"""Who may import whom: docs/architecture.md says it, this reads it there and holds the code to it."""

from __future__ import annotations

import ast
import fnmatch
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dist_egnn"
PARTITION = ROOT / "partition"
FOR_PARTITION = {
    "",
    "disk",
    "errors",
    "shares",
    "fields",
    "graphs",
    "inputs",
    "machine",
    "trajectories",
    "store",
    "partition",
}  # "": dist_egnn.__version__
SOURCES = {"numba", "pysplishsplash", "MDAnalysis", "MDAnalysisData", "MDAnalysisTests", "tensorflow", "tfrecord"}


def order() -> dict[str, int]:
    """Module of dist_egnn → its line in the block of docs/architecture.md. A name may be a pattern: bench*."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    (block,) = re.findall(r"^```import-order\n(.*?)^```", text, re.M | re.S)
    return {name: line for line, names in enumerate(block.splitlines()) for name in names.split()}


def place(module: str) -> str:
    """The name in the block that stands for a module; '' if none does."""
    return next((name for name in order() if fnmatch.fnmatch(module, name)), "")


def imported(tree: ast.AST, package: str) -> set[str]:
    """Every module that is imported, in functions too, in full; ``package``: what relative imports start from.

    ``from a import b`` gives a.b, since b may be a module.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            stem = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            parts = [*stem, *([node.module] if node.module else [])]
            found |= {".".join([*parts, alias.name]) for alias in node.names}
    return found


@functools.cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def inner(names: set[str]) -> set[str]:
    """Modules of dist_egnn among the imports, by first name: nn.mlp is nn; a name of dist_egnn itself is ''."""
    places = {*order(), "partition"}
    firsts = {name.split(".")[1] for name in names if name.startswith("dist_egnn.")}
    return {first if first in places or (PACKAGE / f"{first}.py").exists() else "" for first in firsts}


def package_of(file: Path) -> str:
    """What a file's relative imports start from."""
    return "dist_egnn.partition" if file.parent == PARTITION else ".".join(file.relative_to(ROOT).parts[:-1])


def files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def module_of(file: Path) -> str:
    """Its name in the block: nn for all files of nn/."""
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def misplaced(file: Path, tree: ast.Module) -> set[str]:
    """What a file of dist_egnn imports although it stands on its own line or below; a family (nn, bench*) may mix."""
    lines = order()
    own = place(module_of(file))
    names = inner(imported(tree, package_of(file))) - {""}
    if own in ("cli", "runs", "plan_data", "rollout", "bench*"):
        names -= {"partition"}
    mixed = own in ("nn", "launch") or "*" in own
    return {n for n in names if not (mixed and place(n) == own) and lines.get(place(n), len(lines)) >= lines[own]}


def test_every_module_has_its_place():
    found = {module_of(file) for file in files("dist_egnn")} - {"__init__"}
    hint = "docs/architecture.md, block import-order: add or remove the modules that differ"
    assert {name for name in found if not place(name)} == set(), hint
    assert {name for name in order() if "*" not in name} <= found, hint


@pytest.mark.parametrize("file", files("dist_egnn"), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_upwards(file):
    if module_of(file) == "__init__":  # dist_egnn.load; what imports it with the package, test_cli.py would see
        assert inner(imported(tree_of(file), "dist_egnn")) == {"inference"}
    else:
        assert not misplaced(file, tree_of(file))


def test_the_check_sees_what_is_wrong():
    """Relative, absolute, within a function."""
    for line in (
        "from . import train",
        "from .train import train",
        "import dist_egnn.train",
        "from dist_egnn import cli",
    ):
        tree = ast.parse(f"def f():\n    {line}\n")
        assert misplaced(PACKAGE / "models.py", tree) == {line.replace(".", " ").split()[-1]}
    assert misplaced(PACKAGE / "nn" / "mlp.py", ast.parse("from ..models import EGNN")) == {"models"}
    assert misplaced(PACKAGE / "nn" / "egnn.py", ast.parse("from .mlp import mlp")) == set()
    assert misplaced(PACKAGE / "models.py", ast.parse("from .partition import build")) == {"partition"}


def test_partition_stands_on_the_files_alone():
    for file in files("partition"):
        assert inner(imported(tree_of(file), package_of(file))) <= FOR_PARTITION, file


def test_nobody_imports_recipes_or_tools():
    """But the files of one recipe, or of tools/, may import each other."""
    outside = {"recipes", "tools", *(file.stem for file in files("recipes", "tools"))}
    for file in files("dist_egnn", "partition", "recipes", "tools"):
        names = imported(tree_of(file), package_of(file))
        together = file.is_relative_to(ROOT / "recipes") or file.is_relative_to(ROOT / "tools")
        siblings = {other.stem for other in file.parent.glob("*.py")} if together else set()
        assert not {name.split(".")[0] for name in names} & (outside - siblings), file


def test_collectives_stand_in_one_place():
    compares = ROOT / "tools" / "hosts_sums.py"  # gloo's all-reduce with ours
    for file in files("dist_egnn", "partition", "recipes", "tools"):
        if file in (PACKAGE / "comm.py", compares):
            continue
        names = imported(tree_of(file), package_of(file))
        assert not {n for n in names if n == "torch.distributed" or n.startswith("torch.distributed.")}, file
        assert "torch.distributed" not in {
            ast.unparse(n) for n in ast.walk(tree_of(file)) if isinstance(n, ast.Attribute)
        }
    makers = [file.name for file in files("dist_egnn", "partition") if "init_process_group" in file.read_text()]
    assert makers == ["comm.py"]


def test_a_launcher_and_a_config_need_no_torch():
    """Nor DGL, pandas: a wrong key is said at once, and a launcher starts in a tenth of the time."""
    code = (
        "import sys; from dist_egnn import cli, config; from dist_egnn.launch import command; config.load(None, []); "
    )
    code += "print(*sorted({'torch', 'dgl', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_only_recipes_know_their_sources():
    """And the engine of the fluids is imported in a process of its own, which prepare.py starts."""
    users = {
        (str(file.relative_to(ROOT)), name.split(".")[0])
        for file in files("dist_egnn", "partition", "recipes", "tools")
        for name in imported(tree_of(file), package_of(file))
        if name.split(".")[0] in SOURCES
    }
    assert all(file.startswith("recipes/") for file, _ in users)
    assert {file for file, name in users if name == "pysplishsplash"} == {
        "recipes/fluid113k/engine.py",
        "recipes/water3d/engine.py",
    }
