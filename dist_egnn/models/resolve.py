"""From the config's model section to a class and its options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import Failure
from .network import Network, model_class
from .published_baselines import PUBLISHED, PublishedSchNet


def resolve_model(
    settings: Mapping[str, Any], defaults: Mapping[str, Any], radius: float
) -> tuple[type[nn.Module], dict[str, Any]]:
    """The class and the options of the config's model section. radius: of the data's edges, the default of ``cutoff``.

    Raises Failure for a key that is not at its default and no option of the model, except virtual_nodes: a backbone and
    its version with virtual nodes can share a config.
    """
    cls = model_class(settings["name"])
    if settings["as_published"]:
        cls = PUBLISHED.get(cls, cls)
    if not issubclass(cls, Network):
        return cls, {}
    accepted = {"hidden", "layers", "gravity", "precision", "engine", "tile", *cls.layer.options}
    if cls.virtual_nodes:
        accepted |= {"virtual_nodes", "virtual_messages"} if cls.layer.features else {"virtual_nodes"}
    accepted -= set(cls.fixed)
    for key, value in settings.items():
        elsewhere = {"name", "as_published", "predicts", "virtual_nodes", *cls.fixed}
        if key not in elsewhere | accepted and value != defaults[key]:
            raise Failure(f"model.{key}={value}: {cls.__name__} has no such option; leave it at {defaults[key]}")
    options = {key: value for key, value in settings.items() if key in accepted}
    if "cutoff" in options and options["cutoff"] is None:
        options["cutoff"] = radius if math.isfinite(radius) else 1.0 if cls is PublishedSchNet else 10.0
    return cls, options
