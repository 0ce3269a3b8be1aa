"""What a store was made with, and whether a config asks for the same. Without torch and DGL: a launcher needs neither."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import Failure

# inputs that older stores do not name, and what they were made with
DEFAULT_INPUTS: dict[str, Any] = {"periodic": False, "trainers": 1, "weights": None}
COMPARED = (
    *("radius", "horizon", "features", "node_attributes", "edge_drop", "periodic"),
    *("frames", "first_frame", "last_frame", "frame_seed"),
)


def check_settings(found: Mapping[str, Any], path: str, data: Any) -> None:
    """Raise Failure where the config names other data settings than the store at path was made with. found: its inputs.

    data: the config's section of that name.
    """
    for name in COMPARED:
        wanted = getattr(data, name)
        if wanted != found[name] and not (name == "features" and wanted is None):
            raise Failure(
                f"data.{name}={wanted} in the config, but {path} was made with {found[name]}; "
                f"set data.{name} to that or partition again"
            )
