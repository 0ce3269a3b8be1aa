"""Output that fits a terminal and stays on single lines in a pipe: lines, tables, examples of help texts."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from ..errors import Failure

WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


class _LenientFile(io.FileIO):
    """A standard stream that may lose its reader or its disk: what cannot be written is dropped, the error is kept."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            if (written := super().write(data)) is not None:
                return written
        except OSError as error:
            self.error = error
        return memoryview(data).nbytes


def guard_streams() -> None:
    """Let this process go on when its standard streams are closed, broken or full, or lack a character."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream: Any = getattr(sys, name)
        try:
            os.fstat(number)
        except OSError:  # closed: another file would get this number, and with it what libraries print
            while (null := os.open(os.devnull, os.O_RDWR)) < number:
                pass
            os.set_inheritable(null, True)
        if number and (stream is None or stream is getattr(sys, f"__{name}__")):  # not a test's or a notebook's
            with suppress(OSError, ValueError):
                print(end="", file=stream, flush=True)
            modes: Any = {mode: getattr(stream, mode, False) for mode in ("line_buffering", "write_through")}
            encoding = getattr(stream, "encoding", "utf-8")
            buffer = io.BufferedWriter(_LenientFile(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(buffer, encoding, "replace", **modes))
            setattr(sys, f"__{name}__", getattr(sys, name))


def check_output() -> None:
    """Raise Failure if standard output, where a command's result goes, was lost. `| head` is no loss."""
    sys.stdout.flush()
    error = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "error", None)
    if error and error.errno != errno.EPIPE:
        raise Failure(f"standard output: cannot be written ({error.strerror}); redirect it to another file")


def terminal_width() -> int | None:
    """Columns of the terminal on standard output; None if standard output is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_line(text: str, indent: int = 2) -> None:
    """Print a line, wrapped between words if the terminal is too narrow; later rows are indented."""
    if width := terminal_width():
        text = textwrap.fill(text, width, subsequent_indent=" " * indent, **WHOLE_WORDS)
    print(text)


def print_table(title: str, header: list[str], rows: list[list[Any]], labels: int = 1) -> None:
    """Print a table. A table too wide for the terminal is split; each block repeats the first ``labels`` columns."""
    cells = [header, *[[str(c) for c in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    if title:
        print_line(title)
    for k, columns in enumerate(_column_blocks(widths, labels, terminal_width())):
        if k:
            print()
        for line, row in enumerate(cells):
            print("  " + "  ".join(row[i].rjust(widths[i]) if i else row[i].ljust(widths[i]) for i in columns))
            if not line:
                print("  " + "  ".join("-" * widths[i] for i in columns))


def _column_blocks(widths: list[int], labels: int, width: int | None) -> Iterator[list[int]]:
    """Column numbers of each block of a table: the labels and as many others as fit, at least one."""
    first = list(range(min(labels, len(widths))))
    block = list(first)
    for i in range(len(first), len(widths)):
        if width and len(block) > len(first) and sum(widths[j] + 2 for j in [*block, i]) > width:
            yield block
            block = list(first)
        block.append(i)
    yield block


def example(command: str) -> str:
    """The last paragraph of a help text: the command in short lines joined by backslashes, ready for a shell."""
    lines = textwrap.wrap(f"Example: {command}", 74, subsequent_indent="    ", **WHOLE_WORDS)
    return "\b\n" + " \\\n".join(lines)
