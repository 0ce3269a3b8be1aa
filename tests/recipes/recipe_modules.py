"""Load a file of a recipe as a module."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


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
