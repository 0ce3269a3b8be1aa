"""The files of GNS' datasets ("learning to simulate"): fetch them, list their trajectories, read one.

A TFRecord file is a row of records: length (8 bytes), its checksum (4), payload, its checksum (4). Each payload is a
tf.train.SequenceExample with ``particle_type`` (bytes of int64 (N,)) and ``position`` (for each of T frames bytes of
float32 (N, 3)). The HDF5 form has a group per trajectory with datasets of these names, (N,) and (T, N, 3).
"""

from __future__ import annotations

import base64
import functools
import hashlib
import http.client
import json
import os
import struct
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from dist_egnn.data.trajectories import SPLITS, box_sides, periodic_axes, unwrap
from dist_egnn.errors import Failure
from dist_egnn.utils import hdf5, progress

# keys of LagrangeBench, which GNS lacks: by axis, and time steps from frame to frame
PERIODIC, EVERY = "periodic_boundary_conditions", "write_every"
URL = "https://storage.googleapis.com/learning-to-simulate-complex-physics/Datasets/Water-3D"
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


class Location(NamedTuple):
    """The location of a trajectory: a payload's offset and length in a TFRecord file, or a group of an HDF5 file."""

    path: Path
    split: str
    number: int
    offset: int = 0
    length: int = 0
    group: str = ""

    def __str__(self) -> str:
        return f"{self.path}: group {self.group}" if self.group else f"{self.path}: record {self.number}"


@dataclass(frozen=True)
class Trajectories:
    """All trajectories of a folder: train, valid, test. metadata: the keys of metadata.json that are used."""

    metadata: dict[str, Any]
    locations: list[Location]

    def __call__(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield arguments of ``Writer.add``. Raises Failure if the trajectory is damaged or not in GNS' layout."""
        location = self.locations[number]
        kind, position = (
            from_group(location) if location.group else from_record(location, self.metadata["sequence_length"] + 1)
        )
        box, periodic = np.array(self.metadata["bounds"]).T, periodic_axes(self.metadata.get(PERIODIC, False), PERIODIC)
        if any(periodic):
            position = np.array(position)
            unwrap(position, box_sides(box, periodic))
        yield {
            "position": position,
            "split": location.split,
            "dt": self.metadata["dt"] * self.metadata.get(EVERY, 1),
            "periodic": periodic,
            "source": f"GNS Water-3D, {location.split}, trajectory {location.number}",
            "attributes": {"type": kind},
            "box": box,
        }


def find(folder: Path, limits: tuple[int, ...], *, whole: bool) -> tuple[Trajectories, dict[str, Any]]:
    """The trajectories of a folder, up to ``limits`` of each split, and the settings that identify them.

    Unless ``whole``, a partly fetched file suffices. Raises Failure for a missing or truncated file, and for a key that is
    missing in metadata.json.
    """
    records = any(folder.glob("*.tfrecord*"))
    keys = {"bounds": "low and high corner of the box by axis", "dt": "time from frame to frame"}
    metadata = read_metadata(
        folder / "metadata.json", keys | ({"sequence_length": "number of frames − 1"} if records else {})
    )
    locations: list[Location] = []
    sizes = {}
    for split, limit in zip(SPLITS, limits, strict=True):
        path = folder / f"{split}.{'tfrecord' if records else 'h5'}"
        if not whole and not path.exists() and partial_of(path).exists():
            path = partial_of(path)
        if not path.is_file():
            raise Failure(f"{path}: no such file; --download fetches GNS' files, --source splishsplash needs none")
        if records:
            scanned, end = scan(path, limit)
            if len(scanned) < limit and end < path.stat().st_size:
                raise Failure(f"{path}: truncated within record {len(scanned)}; fetch it again")
            new = [Location(path, split, k, *record) for k, record in enumerate(scanned)]
        else:
            with opened(path) as file:
                new = [Location(path, split, k, group=name) for k, name in enumerate(sorted(file)[:limit])]
            end = path.stat().st_size
        if not new:
            raise Failure(f"{path}: holds no trajectory; fetch it again")
        locations += new
        sizes[split] = {"trajectories": len(new), "bytes": end}
    return Trajectories(metadata, locations), {"form": "tfrecord" if records else "hdf5", "files": sizes} | metadata


def read_metadata(path: Path, keys: Mapping[str, str]) -> dict[str, Any]:
    """Read keys of metadata.json. Raises Failure for the first that is missing or invalid."""
    if not path.is_file():
        raise Failure(f"{path}: no such file; --download fetches GNS' files, --source splishsplash needs none")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Failure(f"{path}: not JSON ({error}); fetch it again") from None
    for key, meaning in keys.items():
        if not isinstance(content, dict) or key not in content:
            raise Failure(f"{path}: key '{key}' ({meaning}) is missing; fetch the file again")
    if np.shape(content["bounds"]) != (3, 2):
        raise Failure(
            f"{path}: key 'bounds' has shape {np.shape(content['bounds'])}, expected (3, 2); only 3-D datasets are supported"
        )
    periodic_axes(content.get(PERIODIC, False), f"{path}: key '{PERIODIC}'")
    return {key: content[key] for key in (*keys, PERIODIC, EVERY) if key in content}


def masked_crc(data: bytes) -> bytes:
    """The checksum in TFRecord files: CRC-32C, rotated, plus a constant; 4 bytes."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def scan(path: Path, limit: int) -> tuple[list[tuple[int, int]], int]:
    """Offset and length of the payloads of complete records of a file, at most ``limit``, and the end of the last."""
    records: list[tuple[int, int]] = []
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
            records.append((position + 12, count))
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


def from_record(location: Location, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Particle types (N,) and positions (frames, N, 3) of a record."""
    from google.protobuf.message import DecodeError

    with location.path.open("rb") as file:
        file.seek(location.offset)
        payload, crc = file.read(location.length), file.read(4)
    if masked_crc(payload) != crc:
        raise Failure(f"{location}: wrong checksum; the file is damaged, fetch it again")
    example = sequence_example()()
    try:
        example.ParseFromString(payload)
    except DecodeError as error:
        raise Failure(f"{location}: not a tf.train.SequenceExample ({error}); is it a file of GNS?") from None
    features = {entry.key: [entry.value] for entry in example.context.feature}
    features |= {entry.key: entry.value.feature for entry in example.feature_lists.feature_list}
    for key in ("particle_type", "position"):
        if key not in features:
            have = ", ".join(sorted(features)) or "nothing"
            raise Failure(f"{location}: feature '{key}' is missing (existing: {have}); is it a file of GNS?")
    data = {key: b"".join(b for step in steps for b in step.bytes_list.value) for key, steps in features.items()}
    kind, shape = data["particle_type"], (frames, len(data["particle_type"]) // 8, 3)
    if len(kind) % 8 or len(data["position"]) != 4 * np.prod(shape):
        raise Failure(
            f"{location}: feature 'particle_type' has {len(kind):,} bytes and 'position' {len(data['position']):,}: expected int64 "
            f"(N,) and float32 ({frames}, N, 3); check sequence_length in metadata.json (frames − 1)"
        )
    return np.frombuffer(kind, "<i8"), np.frombuffer(data["position"], "<f4").reshape(shape)


def from_group(location: Location) -> tuple[np.ndarray, np.ndarray]:
    """Particle types (N,) and positions (T, N, 3) of a group."""
    with opened(location.path) as file:
        group = file[location.group]
        for key in ("particle_type", "position"):
            if not isinstance(group, h5py.Group) or key not in group:
                raise Failure(f"{location}: dataset '{key}' is missing; is it the HDF5 form of a file of GNS?")
        try:
            return group["particle_type"][()], group["position"][()]
        except OSError as error:
            raise Failure(
                f"{location}: cannot be read ({error}); the file is damaged; convert or fetch it again"
            ) from None


def opened(path: Path) -> Any:
    try:
        return hdf5.open_file(path)
    except OSError as error:
        raise Failure(f"{path}: not a readable HDF5 file ({error}); convert or fetch it again") from None


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def fetch(folder: Path, name: str, limit: int | None = None) -> None:
    """Fetch URL/name into the folder, continuing an interrupted fetch. limit: stop after this many complete records.

    The file is NAME.partial until it is complete and has the server's hash. Raises Failure without a network.
    """
    target, partial, url = folder / name, partial_of(folder / name), f"{URL}/{name}"

    def enough() -> bool:
        return limit is not None and partial.exists() and len(scan(partial, limit)[0]) == limit

    if target.exists() or enough():
        return
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60) as answer:
            size = int(answer.headers["Content-Length"])
            hashes = ",".join(answer.headers.get_all("x-goog-hash", [])).replace(" ", "").split(",")
        done = partial.stat().st_size if partial.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"})
        if done < size:
            with (
                urllib.request.urlopen(request, timeout=60) as answer,
                partial.open("ab" if answer.status == http.HTTPStatus.PARTIAL_CONTENT else "wb") as file,
                progress.progress_bar(f"{name} (MB)", size // 10**6, initial=done // 10**6) as tick,
            ):
                while chunk := answer.read(1 << 22):
                    file.write(chunk)
                    file.flush()
                    tick(completed=file.tell() // 10**6)
                    if enough():
                        return
    except (OSError, http.client.HTTPException) as error:
        raise Failure(
            f"{url}: cannot be fetched ({error}); run the same command with a network to continue, "
            "or use --source splishsplash"
        ) from None
    if partial.stat().st_size < size:
        raise Failure(
            f"{url}: ended after {partial.stat().st_size:,} of {size:,} bytes; run the same command to continue"
        )
    verify_hash(partial, dict(entry.split("=", 1) for entry in hashes if entry), url)
    os.replace(partial, target)


def verify_hash(path: Path, hashes: Mapping[str, str], url: str) -> None:
    """Compare with the server's md5, or crc32c without an md5. Removes a wrong file and raises Failure."""
    import google_crc32c

    kind = "md5" if "md5" in hashes else "crc32c"
    digest: Any = hashlib.md5(usedforsecurity=False) if kind == "md5" else google_crc32c.Checksum()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    if base64.b64encode(digest.digest()).decode() != hashes.get(kind):
        path.unlink()
        raise Failure(
            f"{url}: the fetched file differs from the server's {kind} and was removed; run the command again"
        )
