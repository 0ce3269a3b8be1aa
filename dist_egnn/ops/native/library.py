"""Load the native library for this processor (tools/build_native.py compiles it, at installation)."""

from __future__ import annotations

import ctypes
import zlib
from functools import cache
from pathlib import Path
from typing import Any

SOURCE, REASON = (Path(__file__).with_name(name) for name in ("message_mlp.cpp", "not_compiled.txt"))
REMEDY = "run pip install -e . with a C++ compiler"
STALE = f"compiled from another version of {SOURCE.name}: {REMEDY}"
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
        loaded = Library(LEVELS[Library(LEVELS[0]).functions.processor_level()])
        return loaded if loaded.functions.source_sum() & 0xFFFFFFFF == zlib.crc32(SOURCE.read_bytes()) else STALE
    except (OSError, AttributeError):  # the tool that compiles them wrote why it failed
        return f"not compiled: {REASON.read_text() if REASON.is_file() else REMEDY}"


def library() -> Library | None:
    """The library, None where there is none."""
    loaded = load()
    return loaded if isinstance(loaded, Library) else None
