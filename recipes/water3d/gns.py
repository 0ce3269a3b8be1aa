"""The files of GNS' datasets ("learning to simulate"): fetch them, find the trajectories in them, read one.

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

from dist_egnn.data.trajectories import SPLITS
from dist_egnn.errors import Failure
from dist_egnn.utils import progress

URL = "https://storage.googleapis.com/learning-to-simulate-complex-physics/Datasets/Water-3D"
# tf.train.SequenceExample as far as GNS uses it, message → (field, number, repeated, type); maps as repeated entries
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


class Place(NamedTuple):
    """Where a trajectory lies: a payload's offset and length in a TFRecord file, or a group of an HDF5 file."""

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
    """All trajectories of a folder: train, valid, test. metadata: those keys of metadata.json that we use."""

    metadata: dict[str, Any]
    places: list[Place]

    def __call__(self, number: int) -> Iterator[dict[str, Any]]:
        """Trajectory ``number`` as arguments of ``Writer.add``; Failure if it is damaged or not of GNS' layout."""
        place = self.places[number]
        kind, position = from_group(place) if place.group else from_record(place, self.metadata["sequence_length"] + 1)
        yield {
            "position": position,
            "split": place.split,
            "dt": self.metadata["dt"],
            "source": f"GNS Water-3D, {place.split}, trajectory {place.number}",
            "attributes": {"type": kind},
            "box": np.array(self.metadata["bounds"]).T,
        }


def find(folder: Path, limits: tuple[int, ...], *, whole: bool) -> tuple[Trajectories, dict[str, Any]]:
    """The folder's trajectories, up to ``limits`` of each split, and the settings that identify them.

    Unless the files must be whole, what ``fetch`` has got of one so far will do. Raises Failure for a missing or
    truncated file, or a key that metadata.json lacks.
    """
    records = any(folder.glob("*.tfrecord*"))
    keys = {"bounds": "low and high corner of the box by axis", "dt": "time from frame to frame"}
    metadata = read_metadata(
        folder / "metadata.json", keys | ({"sequence_length": "frames less one"} if records else {})
    )
    places: list[Place] = []
    sizes = {}
    for split, limit in zip(SPLITS, limits, strict=True):
        path = folder / f"{split}.{'tfrecord' if records else 'h5'}"
        if not whole and not path.exists() and partial_of(path).exists():
            path = partial_of(path)
        if not path.is_file():
            raise Failure(f"{path}: no such file; --download fetches GNS' files, --source splishsplash needs none")
        if records:
            found, end = scan(path, limit)
            if len(found) < limit and end < path.stat().st_size:
                raise Failure(f"{path}: truncated within record {len(found)}; fetch it again")
            new = [Place(path, split, k, *record) for k, record in enumerate(found)]
        else:
            with opened(path) as file:
                new = [Place(path, split, k, group=name) for k, name in enumerate(sorted(file)[:limit])]
            end = path.stat().st_size
        if not new:
            raise Failure(f"{path}: holds no trajectory; fetch it again")
        places += new
        sizes[split] = {"trajectories": len(new), "bytes": end}
    return Trajectories(metadata, places), {"form": "tfrecord" if records else "hdf5", "files": sizes} | metadata


def read_metadata(path: Path, keys: Mapping[str, str]) -> dict[str, Any]:
    """These keys of metadata.json; Failure naming the first that is missing or wrong."""
    if not path.is_file():
        raise Failure(f"{path}: no such file; --download fetches GNS' files, --source splishsplash needs none")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise Failure(f"{path}: no JSON ({error}); fetch it again") from None
    for key, meaning in keys.items():
        if not isinstance(found, dict) or key not in found:
            raise Failure(f"{path}: key '{key}' ({meaning}) is missing; fetch the file again")
    if np.shape(found["bounds"]) != (3, 2):
        raise Failure(f"{path}: key 'bounds' has shape {np.shape(found['bounds'])}, expected (3, 2): no 3-D dataset")
    return {key: found[key] for key in keys}


def masked_crc(data: bytes) -> bytes:
    """The checksum in TFRecord files: CRC-32C, rotated, plus a constant; 4 bytes."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def scan(path: Path, limit: int) -> tuple[list[tuple[int, int]], int]:
    """Offset and length of the payloads of the whole records of a file, at most ``limit``, and where these end."""
    found: list[tuple[int, int]] = []
    at, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while len(found) < limit and at + 16 <= size:
            file.seek(at)
            length, crc = file.read(8), file.read(4)
            if masked_crc(length) != crc:
                raise Failure(f"{path}: record {len(found)}: wrong checksum of its length; damaged, fetch it again")
            (count,) = struct.unpack("<Q", length)
            if at + 16 + count > size:
                break
            found.append((at + 12, count))
            at += 16 + count
    return found, at


@functools.cache
def sequence_example() -> Any:
    """The message class SequenceExample, made from MESSAGES."""
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


def from_record(place: Place, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Particle types (N,) and positions (frames, N, 3) of a record."""
    from google.protobuf.message import DecodeError

    with place.path.open("rb") as file:
        file.seek(place.offset)
        payload, crc = file.read(place.length), file.read(4)
    if masked_crc(payload) != crc:
        raise Failure(f"{place}: wrong checksum; the file is damaged, fetch it again")
    example = sequence_example()()
    try:
        example.ParseFromString(payload)
    except DecodeError as error:
        raise Failure(f"{place}: no tf.train.SequenceExample ({error}); is it one of GNS' files?") from None
    features = {entry.key: [entry.value] for entry in example.context.feature}
    features |= {entry.key: entry.value.feature for entry in example.feature_lists.feature_list}
    for key in ("particle_type", "position"):
        if key not in features:
            have = ", ".join(sorted(features)) or "nothing"
            raise Failure(f"{place}: feature '{key}' is missing (it has: {have}); is it one of GNS' files?")
    data = {key: b"".join(b for step in steps for b in step.bytes_list.value) for key, steps in features.items()}
    kind, shape = data["particle_type"], (frames, len(data["particle_type"]) // 8, 3)
    if len(kind) % 8 or len(data["position"]) != 4 * np.prod(shape):
        raise Failure(
            f"{place}: feature 'particle_type' has {len(kind):,} bytes and 'position' {len(data['position']):,}: no int64 "
            f"(N,) and float32 ({frames}, N, 3); check sequence_length in metadata.json (frames less one)"
        )
    return np.frombuffer(kind, "<i8"), np.frombuffer(data["position"], "<f4").reshape(shape)


def from_group(place: Place) -> tuple[np.ndarray, np.ndarray]:
    """Particle types (N,) and positions (T, N, 3) of a group."""
    with opened(place.path) as file:
        group = file[place.group]
        for key in ("particle_type", "position"):
            if not isinstance(group, h5py.Group) or key not in group:
                raise Failure(f"{place}: dataset '{key}' is missing; is it the HDF5 form of one of GNS' files?")
        try:
            return group["particle_type"][()], group["position"][()]
        except OSError as error:
            raise Failure(f"{place}: cannot be read ({error}); the file is damaged, make or fetch it again") from None


def opened(path: Path) -> Any:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise Failure(f"{path}: not a readable HDF5 file ({error}); make or fetch it again") from None


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def fetch(folder: Path, name: str, limit: int | None = None) -> None:
    """Fetch URL/name into the folder, going on where the last try stopped; limit: until it has so many whole records.

    A file is NAME.partial until it is whole and agrees with the server's hash. Raises Failure without a network.
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
            f"{url}: cannot be fetched ({error}); the same command goes on where it stopped once there is a network, "
            "--source splishsplash needs none"
        ) from None
    if partial.stat().st_size < size:
        raise Failure(f"{url}: ended after {partial.stat().st_size:,} of {size:,} bytes; the same command goes on")
    check(partial, dict(entry.split("=", 1) for entry in hashes if entry), url)
    os.replace(partial, target)


def check(path: Path, hashes: Mapping[str, str], url: str) -> None:
    """Compare with the server's md5, or its crc32c where it has no md5; Failure for a wrong file, which is removed."""
    import google_crc32c

    kind = "md5" if "md5" in hashes else "crc32c"
    digest: Any = hashlib.md5(usedforsecurity=False) if kind == "md5" else google_crc32c.Checksum()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    if base64.b64encode(digest.digest()).decode() != hashes.get(kind):
        path.unlink()
        raise Failure(f"{url}: what came disagrees with the server's {kind} and was removed; run the command again")
