"""Load the native library for this processor."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from .build import file_name, levels

FOLDER = Path(__file__).parent


class Library:
    """The functions of one instruction set. level: its name; bfloat16: whether it multiplies in bfloat16."""

    def __init__(self, level: str, folder: Path = FOLDER) -> None:
        self.level = level
        self.functions = ctypes.CDLL(str(folder / file_name(level)))
        self.bfloat16 = bool(self.functions.has_bfloat16_products())

    def call(self, name: str, arguments: ctypes.Structure) -> None:
        """Run a kernel; ctypes releases the interpreter's lock meanwhile. Raises MemoryError if its buffers do not fit."""
        if self.functions[name](ctypes.byref(arguments)):
            raise MemoryError(f"native kernel {name}: no memory for its buffers")


@cache
def load() -> Library | str:
    """The library of the best instruction set that this processor has, or the reason why there is none, in one line."""
    names = list(levels())
    if not (FOLDER / file_name(names[0])).is_file():
        return "not compiled: install a C++ compiler, then run `pip install -e .` again"
    try:
        best = ctypes.CDLL(str(FOLDER / file_name(names[0]))).processor_level()
        return Library(names[min(best, len(names) - 1)])
    except (OSError, AttributeError) as error:
        return f"the library does not load ({error}): run `pip install -e .` again"


def library() -> Library | None:
    """The library, None where there is none."""
    loaded = load()
    return loaded if isinstance(loaded, Library) else None
