"""Files of GNS, written from the format description independently of the recipe; commands of recipes/water3d."""

from __future__ import annotations

import importlib.util
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "water3d"
METADATA = {
    "bounds": [[0.1, 0.9], [0.2, 0.8], [0.0, 1.0]],
    "sequence_length": 5,
    "default_connectivity_radius": 0.035,
    "dim": 3,
    "dt": 0.005,
}
SIZES = {"train": (7, 9, 8, 6, 5), "valid": (6, 4), "test": (10,)}
needs_records = pytest.mark.skipif(
    importlib.util.find_spec("google_crc32c") is None, reason="google-crc32c is not installed (extra water3d)"
)


def crc32c(data: bytes) -> int:
    """Bit by bit from the polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) % 2**32 + 0xA282EAD8) % 2**32)


def framed(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return length + masked(length) + payload + masked(payload)


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number % 128 + 128]), number // 128
    return out + bytes([number])


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protobuf message."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(context: dict[str, bytes], lists: dict[str, list[bytes]]) -> bytes:
    """A tf.train.SequenceExample; values are encoded features."""
    first = b"".join(field(1, field(1, k.encode()) + field(2, v)) for k, v in context.items())
    second = b"".join(
        field(1, field(1, k.encode()) + field(2, b"".join(field(1, v) for v in steps))) for k, steps in lists.items()
    )
    return field(1, first) + field(2, second)


def of_bytes(content: bytes) -> bytes:
    return field(1, field(1, content))


def record(number: int, kind: np.ndarray, position: np.ndarray, *, without: str = "") -> bytes:
    context = {"key": field(3, field(1, varint(number))), "particle_type": of_bytes(kind.astype("<i8").tobytes())}
    steps = {"position": [of_bytes(x.astype("<f4").tobytes()) for x in position]}
    steps["step_context"] = [of_bytes(struct.pack("<f", t)) for t in range(len(position))]
    for content in (context, steps):
        content.pop(without, None)
    return example(context, steps)


def trajectories() -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    draw = np.random.default_rng(3)
    frames = METADATA["sequence_length"] + 1
    return {
        split: [(draw.integers(3, 7, n), draw.uniform(0.2, 0.8, (frames, n, 3)).astype("f4")) for n in sizes]
        for split, sizes in SIZES.items()
    }


def command(*options):
    return [sys.executable, str(RECIPE / "prepare.py"), *map(str, options)]


def run(*options):
    return subprocess.run(command(*options), capture_output=True, text=True, timeout=600)


def moving_positions(draw: np.random.Generator) -> np.ndarray:
    """(40, 2000, 3) float32, a random walk that hardly compresses."""
    steps = draw.normal(0, 1e-3, (40, 2000, 3))
    return (draw.uniform(0.2, 0.8, (2000, 3)) + steps.cumsum(0)).astype(np.float32)
