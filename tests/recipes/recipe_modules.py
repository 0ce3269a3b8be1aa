"""Load a file of a recipe as a module, or start its prepare.py so that it can be killed at work."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
FIRST_PART_ONLY = """
import runpy, sys, time
from concurrent.futures import ProcessPoolExecutor
submit = ProcessPoolExecutor.submit
ProcessPoolExecutor.submit = lambda pool, make, k: submit(pool, make, k) if k == 0 else submit(pool, time.sleep, 600)
del sys.argv[0]
sys.path.insert(0, sys.argv.pop(0))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_first_part(recipe: str, *options: object) -> subprocess.Popen:
    """prepare.py in a session of its own; after the first part its worker does nothing until it is killed."""
    folder = RECIPES / recipe
    words = map(str, (folder, folder / "prepare.py", *options))
    return subprocess.Popen([sys.executable, "-c", FIRST_PART_ONLY, *words], start_new_session=True)


def load(recipe: str, file: str, name: str) -> ModuleType:
    """recipes/RECIPE/FILE.py as sys.modules[name]; files beside it can be imported meanwhile."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / recipe / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPES / recipe)
        spec.loader.exec_module(module)
    return module
