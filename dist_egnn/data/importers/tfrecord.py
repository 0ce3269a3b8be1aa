"""TFRecord files of GNS' datasets ("Learning to simulate complex physics with graph networks", arXiv 2002.09405).

A file is a row of records: length (8 bytes), its checksum (4), payload, its checksum (4). Each payload is a
tf.train.SequenceExample with ``particle_type`` (bytes of int64 (N,)) and ``position`` (for each of T frames bytes of
float32 (N, d)).
"""

from __future__ import annotations

import functools
import importlib.util
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import Failure

# the part of tf.train.SequenceExample that GNS uses, message → (field, number, repeated, type); maps as repeated entries
MESSAGES = {
    "Bytes": [("value", 1, True, "bytes")],
    "Feature": [("bytes_list", 1, False, "Bytes")],
    "Context": [("key", 1, False, "string"), ("value", 2, False, "Feature")],
    "Features": [("feature", 1, True, "Context")],
    "Steps": [("feature", 1, True, "Feature")],
    "List": [("key", 1, False, "string"), ("value", 2, False, "Steps")],
    "Lists": [("feature_list", 1, True, "List")],
    "SequenceExample": [("context", 1, False, "Features"), ("feature_lists", 2, False, "Lists")],
}


class Record(NamedTuple):
    """The payload of a record in a file."""

    path: Path
    number: int
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.path}: record {self.number}"


def masked_crc(data: bytes) -> bytes:
    """The checksum in TFRecord files: CRC-32C, rotated, plus a constant; 4 bytes."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def scan(path: Path, limit: int) -> tuple[list[Record], int]:
    """The complete records of a file, at most ``limit``, and the end of the last. Raises Failure for a damaged length."""
    for module in ("google_crc32c", "google.protobuf"):
        if importlib.util.find_spec(module.partition(".")[0]) is None or importlib.util.find_spec(module) is None:
            raise Failure(f"{path}: needs {module}, which is not installed; pip install 'dist_egnn[import]'")
    records: list[Record] = []
    position, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while len(records) < limit and position + 16 <= size:
            file.seek(position)
            length, crc = file.read(8), file.read(4)
            if masked_crc(length) != crc:
                raise Failure(f"{path}: record {len(records)}: wrong checksum of its length; damaged, fetch it again")
            (count,) = struct.unpack("<Q", length)
            if position + 16 + count > size:
                break
            records.append(Record(path, len(records), position + 12, count))
            position += 16 + count
    return records, position


@functools.cache
def sequence_example() -> Any:
    """The message class SequenceExample, built from MESSAGES."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="gns.proto", package="gns", syntax="proto3")
    for message, entries in MESSAGES.items():
        made = file.message_type.add(name=message)
        for name, number, repeated, kind in entries:
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            plain = {"bytes": field.TYPE_BYTES, "string": field.TYPE_STRING}.get(kind)
            of = {"type": plain} if plain else {"type": field.TYPE_MESSAGE, "type_name": f".gns.{kind}"}
            made.field.add(name=name, number=number, label=label, **of)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("gns.SequenceExample"))


def read_record(record: Record, frames: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Particle types (N,) and positions (frames, N, dim) of a record. Raises Failure if it is damaged."""
    from google.protobuf.message import DecodeError

    with record.path.open("rb") as file:
        file.seek(record.offset)
        payload, crc = file.read(record.length), file.read(4)
    if masked_crc(payload) != crc:
        raise Failure(f"{record}: wrong checksum; the file is damaged, fetch it again")
    example = sequence_example()()
    try:
        example.ParseFromString(payload)
    except DecodeError as error:
        raise Failure(f"{record}: not a tf.train.SequenceExample ({error}); is it a file of GNS?") from None
    features = {entry.key: [entry.value] for entry in example.context.feature}
    features |= {entry.key: entry.value.feature for entry in example.feature_lists.feature_list}
    for key in ("particle_type", "position"):
        if key not in features:
            have = ", ".join(sorted(features)) or "nothing"
            raise Failure(f"{record}: feature '{key}' is missing (existing: {have}); is it a file of GNS?")
    data = {key: b"".join(b for step in steps for b in step.bytes_list.value) for key, steps in features.items()}
    kind, position = data["particle_type"], data["position"]
    shape = frames, len(kind) // 8, dim
    if len(kind) % 8 or len(position) != 4 * np.prod(shape):
        actual = f"feature 'particle_type' has {len(kind):,} bytes and 'position' {len(position):,}"
        remedy = "check sequence_length in metadata.json (frames − 1)"
        raise Failure(f"{record}: {actual}: expected int64 (N,) and float32 ({frames}, N, {dim}); {remedy}")
    return np.frombuffer(kind, "<i8"), np.frombuffer(position, "<f4").reshape(shape)
