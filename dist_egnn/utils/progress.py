"""The progress display: a bar on a terminal, plain lines elsewhere, JSON events for `distegnn launch`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

LINE_INTERVAL_S = 5.0  # between plain lines; for long work a twentieth of the elapsed time
EVENT_PREFIX = "\x1e"  # starts a line of JSON for a parent process that sets EVENTS_VARIABLE and draws the bar itself
EVENTS_VARIABLE, EVENT_INTERVAL_S = "DISTEGNN_PROGRESS_EVENTS", 0.5


@contextmanager
def progress_bar(title: str, total: int, *, enabled: bool = True, initial: int = 0) -> Iterator[Callable[..., None]]:
    """Yield update(note="", completed=None): advance by one of ``total`` or to ``completed``; the note is displayed."""
    if not enabled:
        yield lambda note="", completed=None: None
    elif os.environ.get(EVENTS_VARIABLE):
        yield _events(title, total, initial)
    elif sys.stderr and sys.stderr.isatty():
        with _terminal_bar(title, total, initial) as update:
            yield update
    else:
        yield _lines(title, total, initial)


@contextmanager
def _terminal_bar(title: str, total: int, initial: int) -> Iterator[Callable[..., None]]:
    from rich import console, progress, text

    class Display(progress.Progress):
        """The note gets its own line: 80 columns are too few to show it beside the bar."""

        def get_renderables(self) -> Iterator[console.RenderableType]:
            yield self.make_tasks_table(self.tasks)
            for task in self.tasks:
                if task.fields["note"]:
                    yield text.Text(f"  {task.fields['note']}", no_wrap=True, overflow="ellipsis")

    columns = [progress.TextColumn(title), progress.BarColumn(20), progress.MofNCompleteColumn()]
    columns += [progress.TimeElapsedColumn(), progress.TimeRemainingColumn(), progress.TextColumn("left")]
    with Display(*columns, console=console.Console(stderr=True)) as display:
        task = display.add_task(title, total=total, completed=initial, note="")

        def update(note: str = "", completed: int | None = None) -> None:
            display.update(task, note=note, advance=1 if completed is None else None, completed=completed)

        yield update


def _lines(title: str, total: int, initial: int) -> Callable[..., None]:
    count, started, last_line = initial, time.monotonic(), 0.0

    def update(note: str = "", completed: int | None = None) -> None:
        nonlocal count, last_line
        previous, count = count, count + 1 if completed is None else completed
        elapsed = time.monotonic() - started
        due = elapsed - last_line >= max(LINE_INTERVAL_S, elapsed / 20)
        if count != previous and (due or (count == total and elapsed >= LINE_INTERVAL_S)):
            last_line = elapsed
            left = elapsed / max(count - initial, 1) * (total - count)
            with suppress(OSError, ValueError):  # lost, or closed: the work goes on
                print(f"{title}: {count}/{total}, {left:.0f} s left  {note}".rstrip(), file=sys.stderr, flush=True)

    return update


def _events(title: str, total: int, initial: int) -> Callable[..., None]:
    count, last_event = initial, 0.0

    def update(note: str = "", completed: int | None = None) -> None:
        nonlocal count, last_event
        count = count + 1 if completed is None else completed
        now = time.monotonic()
        if now - last_event >= EVENT_INTERVAL_S or count == total:
            last_event = now
            event = {"title": title, "total": total, "initial": initial, "done": count, "note": note}
            with suppress(OSError, ValueError):
                print(f"\n{EVENT_PREFIX}{json.dumps(event)}", flush=True)

    return update
