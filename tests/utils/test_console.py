"""What a terminal of 80 columns shows, by way of a pseudo-terminal, and what a pipe gets."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from small import DATA

from dist_egnn.utils import console, progress

ESCAPE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


def on_screen(command: list[str], columns: int = 80) -> tuple[int, list[str], str]:
    """Exit code, what stands on the terminal in the end, and all that was written. A line is as long as the program wrote it."""
    child, terminal_ = pty.fork()
    if not child:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        os.execvpe(command[0], command, {**env, "TERM": "xterm-256color"})
    raw = b""
    try:
        while piece := os.read(terminal_, 65536):
            raw += piece
    except OSError:  # the other side is closed
        pass
    finally:
        os.close(terminal_)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    rows, row, place, text = [""], 0, 0, raw.decode()
    while text:
        if found := ESCAPE.match(text):
            count, what = found[1], found[2]
            if what == "A":
                row -= int(count or 1)
            if what == "K" and count == "2":
                rows[row] = ""
            text = text[found.end() :]
            continue
        letter, text = text[0], text[1:]
        if letter == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif letter == "\r":
            place = 0
        else:
            rows[row] = rows[row].ljust(place)[:place] + letter + rows[row][place + 1 :]
            place += 1
    return code, [line.rstrip() for line in rows if line.strip()], raw.decode()


@pytest.fixture
def train(tmp_path: Path, make_store) -> list[str]:
    config = {
        "data": {**DATA, "path": str(make_store(2))},
        "model": {"hidden": 4, "layers": 1},
        "train": {"epochs": 2},
        "run": {"dir": "run"},
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    return [sys.executable, "-m", "dist_egnn.cli", "train", "my.yaml"]


def test_training_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: list[str]) -> None:
    """A bar, the note whole on a line of its own, the result; nothing of what was drawn before is left."""
    monkeypatch.chdir(tmp_path)
    code, screen, raw = on_screen(train)
    assert code == 0, screen
    bar, note, result = screen
    assert re.fullmatch(r"training ━+ 12/12 \d:\d\d:\d\d 0:00:00 left", bar)
    assert re.fullmatch(r"  loss \S+  \S+ s/step  epoch 2/2  valid \d\.\de-\d\d", note)
    assert re.match(r"run: best validation MSE \S+, \S+ s a step on 2 processes", result)
    assert all(len(line) <= 80 for line in screen)
    assert "\x1b[?25h" in raw  # the cursor is back


def test_training_in_a_pipe(tmp_path: Path, train: list[str]) -> None:
    ran = subprocess.run(train, cwd=tmp_path, capture_output=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", ran.stdout + ran.stderr)  # no escapes, no \r
    assert ran.stdout.decode().count("\n") == 1
    for line in ran.stderr.decode().splitlines():  # none where it takes less than five seconds
        assert re.match(r"training: \d+/12, \d+ s left  loss ", line)


def test_doctor_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentences go on below themselves, broken between words."""
    monkeypatch.chdir("/")  # it names the folder, and a name is not broken
    command = [sys.executable, "-m", "dist_egnn.cli", "doctor"]
    code, screen, raw = on_screen(command)
    whole = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert code == whole.returncode
    assert max(map(len, screen)) <= 80 < max(map(len, whole.stdout.splitlines()))
    assert "\x1b" not in raw
    starts = ("ok ", "note ", "PROBLEM ", "        ", "all well", "1 problem", "2 problems")
    assert all(line.startswith(starts) for line in screen)

    def words(lines: list[str]) -> list[str]:
        return [re.sub(r"[\d.]+", "#", word) for word in " ".join(lines).split()]

    assert words(screen) == words(whole.stdout.splitlines())  # but for numbers: free memory, seconds


HEADER, ROWS = ["name", "parts", "test MSE", "seconds"], [["EGNN", 1, "1.0e-2", 3], ["FastEGNN", 2, "5.0e-3", 14]]
NARROW = """\
a title that is
  longer than that
  name      parts
  --------  -----
  EGNN          1
  FastEGNN      2

  name      test MSE
  --------  --------
  EGNN        1.0e-2
  FastEGNN    5.0e-3

  name      seconds
  --------  -------
  EGNN            3
  FastEGNN       14
"""


def test_a_table_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "terminal_width", lambda: 20)
    console.print_table("a title that is longer than that", HEADER, ROWS)
    assert capsys.readouterr().out == NARROW
    monkeypatch.setattr(console, "terminal_width", lambda: 27)
    console.print_table("", HEADER, ROWS, labels=2)
    assert capsys.readouterr().out.splitlines()[::5] == [
        "  name      parts  test MSE",
        "  name      parts  seconds",
    ]
    wide = "  name      parts  test MSE  seconds"
    for columns in (len(wide), None):
        monkeypatch.setattr(console, "terminal_width", lambda columns=columns: columns)
        console.print_table("", HEADER, ROWS)
        assert capsys.readouterr().out.splitlines()[0] == wide


def test_lines_of_long_work_get_rarer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every five seconds at first, then every twentieth of the time that has passed."""
    now = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    with progress.progress_bar("work", 2000) as tick:
        for _ in range(2000):
            now += 1
            tick()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["work: 5/2000, 1995 s left", "work: 10/2000, 1990 s left"]
    assert lines[-1].startswith("work: 2000/2000, 0 s left")
    assert 60 < len(lines) < 90
