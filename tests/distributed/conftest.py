"""Emulated hosts for tests (docs/hosts.md)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
from hosts import Hosts, missing


@pytest.fixture
def make_hosts() -> Iterator[Callable[..., Hosts]]:
    """make_hosts("a", "b", **options of Hosts): hosts that are up until the test ends."""
    if reason := missing():
        pytest.skip(reason)
    with contextlib.ExitStack() as up:
        yield lambda *names, **options: up.enter_context(Hosts(names, **options))
