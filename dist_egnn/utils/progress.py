"""One progress display for all long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY_S = 5.0  # plain lines; of long work every twentieth of what has passed
MARK = "\x1e"  # begins a line of JSON for `distegnn launch`, which sets MARKED and draws the bar
MARKED, MARK_EVERY_S = "DISTEGNN_MARKED", 0.5


@contextmanager
def bar(title: str, total: int, *, shown: bool = True, done: int = 0) -> Iterator[Callable[..., None]]:
    """Yields tick(note="", to=None): one more of ``total`` done, or ``to`` of them, with a note to show beside it."""
    count = done
    if not shown:
        yield lambda note="", to=None: None
        return
    if os.environ.get(MARKED):
        yield _marking(title, total, done)
        return
    if sys.stderr.isatty():
        from rich.console import Console, RenderableType
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        class Display(Progress):
            """The note has a line of its own: beside the bar 80 columns would cut it."""

            def get_renderables(self) -> Iterator[RenderableType]:
                yield self.make_tasks_table(self.tasks)
                for task in self.tasks:
                    if task.fields["note"]:
                        yield Text(f"  {task.fields['note']}", no_wrap=True, overflow="ellipsis")

        columns = (TextColumn(title), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Display(*columns, TextColumn("left"), console=Console(stderr=True)) as progress:
            task = progress.add_task(title, total=total, completed=done, note="")

            def on_terminal(note: str = "", to: int | None = None) -> None:
                progress.update(task, note=note, advance=1 if to is None else None, completed=to)

            yield on_terminal
        return
    started = spoken = time.monotonic()

    def plainly(note: str = "", to: int | None = None) -> None:
        nonlocal count, spoken
        reached = count + 1 if to is None else to
        if reached == count:
            return
        count = reached
        now = time.monotonic()
        if now - spoken >= max(LINE_EVERY_S, (now - started) / 20) or (
            count == total and now - started >= LINE_EVERY_S
        ):
            spoken = now
            left = (now - started) / max(count - done, 1) * (total - count)
            print(f"{title}: {count}/{total}, {left:.0f} s left  {note}".rstrip(), file=sys.stderr, flush=True)

    yield plainly


def _marking(title: str, total: int, done: int) -> Callable[..., None]:
    count, spoken = done, 0.0

    def mark(note: str = "", to: int | None = None) -> None:
        nonlocal count, spoken
        count = count + 1 if to is None else to
        now = time.monotonic()
        if now - spoken >= MARK_EVERY_S or count == total:
            spoken = now
            said = {"title": title, "total": total, "begun": done, "done": count, "note": note}
            print(f"\n{MARK}{json.dumps(said)}", flush=True)

    return mark
