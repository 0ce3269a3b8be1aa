"""Output that fits a terminal and stays on single lines in a pipe: lines, tables, examples of help texts."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


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
