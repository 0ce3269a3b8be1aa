"""What is printed fits a terminal, of 80 columns say, and stays whole in a pipe: lines, tables, the examples of help."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any


def columns() -> int | None:
    """Of the terminal that standard output is; None if it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_line(text: str, indent: int = 2) -> None:
    """A line; on a terminal that is narrower broken between words, what follows moved to the right."""
    width = columns()
    if width:
        later = " " * indent
        text = textwrap.fill(text, width, subsequent_indent=later, break_long_words=False, break_on_hyphens=False)
    print(text)


def print_table(title: str, header: list[str], rows: list[list[Any]], labels: int = 1) -> None:
    """A table. One too wide for a terminal comes in pieces, each with the first ``labels`` columns, which name the row."""
    cells = [header, *[[str(c) for c in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    if title:
        print_line(title)
    for k, picked in enumerate(_pieces(widths, labels, columns())):
        if k:
            print()
        for line, row in enumerate(cells):
            words = [row[i].rjust(widths[i]) if i else row[i].ljust(widths[i]) for i in picked]
            print("  " + "  ".join(words))
            if not line:
                print("  " + "  ".join("-" * widths[i] for i in picked))


def _pieces(widths: list[int], labels: int, width: int | None) -> Iterator[list[int]]:
    """Columns of a table by piece: as many as fit beside the labels, at least one."""
    first = list(range(min(labels, len(widths))))
    piece = list(first)
    for i in range(len(first), len(widths)):
        if width and len(piece) > len(first) and sum(widths[j] + 2 for j in [*piece, i]) > width:
            yield piece
            piece = list(first)
        piece.append(i)
    yield piece


def example(command: str) -> str:
    """A help's last paragraph: the command in lines that no terminal breaks, joined by backslashes, as a shell takes them."""
    lines = textwrap.wrap(
        f"Example: {command}", 74, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return "\b\n" + " \\\n".join(lines)
