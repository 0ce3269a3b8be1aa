"""Load the native library for this processor (tools/build_native.py compiles it, at installation)."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

LEVELS = ("base", "avx2", "avx512", "avx512bf16")  # in ascending order; other processors than x86 have the first alone


class Library:
    """The functions for one instruction set. bfloat16: whether it multiplies in bfloat16."""

    def __init__(self, level: str) -> None:
        self.level = level
        self.functions = ctypes.CDLL(str(Path(__file__).with_name(f"message_mlp.{level}.so")))
        self.bfloat16 = bool(self.functions.has_bfloat16_products())

    def call(self, name: str, arguments: Any) -> None:
        """Run a kernel, without the interpreter's lock. Raises MemoryError if its buffers do not fit."""
        if self.functions[name](ctypes.byref(arguments)):
            raise MemoryError(f"native kernel {name}: no memory for its buffers")


@cache
def load() -> Library | str:
    """The library for the best instruction set of this processor, or one line that says why there is none."""
    try:
        return Library(LEVELS[Library(LEVELS[0]).functions.processor_level()])
    except (OSError, AttributeError):
        return "not compiled: install a C++ compiler, then `pip install -e .` again"


def library() -> Library | None:
    """The library, None where there is none."""
    loaded = load()
    return loaded if isinstance(loaded, Library) else None
