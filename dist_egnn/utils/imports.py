"""Code of the user that a config names as PACKAGE.MODULE:NAME."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from ..errors import Failure


def import_named(key: str, name: str) -> Any:
    """The object PACKAGE.MODULE:NAME from the working folder or installed; None if the module has no such name.

    Raises Failure that names the key if the module cannot be imported.
    """
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in module.split(".")):
        kind = "CLASS" if key == "model.name" else "FUNCTION"
        raise Failure(f"{key}={name}: '{module}' is not a module name; write PACKAGE.MODULE:{kind}, without .py")
    if os.getcwd() not in sys.path:  # a console script has its own folder on the path instead
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever the module does when it is imported
        remedy = f"run this in the folder of {module.split('.')[0]}, or install it"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Failure(f"{key}={name}: cannot import {module} ({reason}); {remedy}") from error
