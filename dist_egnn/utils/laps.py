"""How the time of a repeated step divides into phases."""

from __future__ import annotations

import time


class Laps:
    """Seconds by phase: a call gives the time since the call before to a phase. wall: elapsed; cpu: of this process."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._last = time.perf_counter(), time.process_time()

    def __call__(self, phase: str) -> None:
        now = time.perf_counter(), time.process_time()
        for seconds, start, end in zip((self.wall, self.cpu), self._last, now, strict=True):
            seconds[phase] = seconds.get(phase, 0.0) + end - start
        self._last = now

    def without(self, phase: str) -> float:
        """The elapsed seconds of all other phases."""
        return sum(seconds for name, seconds in self.wall.items() if name != phase)
