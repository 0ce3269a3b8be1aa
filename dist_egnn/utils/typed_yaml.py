"""YAML whose scalars stay text until the type of their key reads them: 010 is ten, `on` is a name, 1:30 is no number."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import yaml

NULL = ("", "~", "null")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class _TextLoader(yaml.BaseLoader):
    """Builds mappings and lists of text. Raises yaml.YAMLError for a key that stands twice in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [str(key) for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(problem=f"key '{twice[0]}' stands twice")
        return super().construct_mapping(node, deep)


def read(text: str | bytes) -> Any:
    """Nested dicts and lists of text. Raises yaml.YAMLError or ValueError for text that is no YAML."""
    return yaml.load(text, _TextLoader)


def describe(kind: Any) -> str:
    """What a value of this type is, in words."""
    options = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    name = f"a list [{KINDS[get_args(options[0])[0]]}, …]" if get_origin(options[0]) is list else KINDS[options[0]]
    return name + " or null" * (NoneType in options)


def convert(value: Any, kind: Any) -> Any:
    """The value of text, or of a list of text, for a key of type ``kind``: int, float, bool, str, list[…], or one | None.

    Raises ValueError that says what is expected.
    """
    options = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if isinstance(value, str) and value in NULL and NoneType in options:
        return None
    wrong = ValueError(f"must be {describe(kind)}")
    if get_origin(options[0]) is list:
        if not isinstance(value, list):
            raise wrong
        return [convert(item, get_args(options[0])[0]) for item in value]
    if not isinstance(value, str):
        raise wrong
    if options[0] is str:
        if value in NULL[1:] or "${" in value:
            raise ValueError("must be text, and null, ~ and ${…} have no meaning here")
        return value
    if options[0] is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if options[0] is int and re.fullmatch(r"[+-]?\d+", value):
        return int(value)
    if options[0] is float and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", value, re.IGNORECASE):
        return float(value)
    if options[0] is float and (found := re.fullmatch(r"([+-]?)\.?(inf|nan)", value, re.IGNORECASE)):
        return math.copysign(float(found[2]), -1 if found[1] == "-" else 1)
    raise wrong
