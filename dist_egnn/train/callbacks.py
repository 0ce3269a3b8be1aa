"""`train.callbacks`: functions of the user that a training calls at the end of each epoch, see docs/training.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import Module

from ..errors import Failure
from ..utils.imports import import_named

KEY = "train.callbacks"
Callback = Callable[[dict[str, float], Module], object]


def load(names: Sequence[str]) -> dict[str, Callback]:
    """The functions by name. Raises Failure for one that cannot be imported."""
    functions = {name: import_named(KEY, name) for name in names}
    for name, function in functions.items():
        if not callable(function):
            raise Failure(f"{KEY}={name}: {name.partition(':')[0]} has no function of that name; write MODULE:FUNCTION")
    return functions


def call(functions: Mapping[str, Callback], row: Mapping[str, float], model: Module, run: str) -> None:
    """Call each with a copy of the epoch's row of metrics.csv and the model. Keeps torch's random state.

    Raises Failure for one that raises; the epoch is saved by then.
    """
    for name, function in functions.items():
        try:
            with torch.random.fork_rng(devices=[]):
                function(dict(row), model)
        except Exception as error:  # whatever the user's function raises
            reason = " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
            remedy = f"correct it, and go on: distegnn train --resume {run}"
            raise Failure(
                f"{KEY}={name}: {reason} (at the end of epoch {row['epoch']}, which is saved); {remedy}"
            ) from error
