"""The files of GNS' dataset Water-3D: fetch them, list their trajectories; `distegnn import` has the readers."""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dist_egnn.data.importers.read_lagrangebench import EVERY, PERIODIC, open_group, opened, read_metadata
from dist_egnn.data.importers.tfrecord import Record, read_record, scan
from dist_egnn.data.trajectories import SPLITS, box_sides, periodic_axes, unwrap
from dist_egnn.errors import Failure
from dist_egnn.utils import progress

ABSENT = "no such file; --download fetches GNS' files, --source splishsplash needs none"
URL = "https://storage.googleapis.com/learning-to-simulate-complex-physics/Datasets/Water-3D"


class Location(NamedTuple):
    """A trajectory: a record of a TFRecord file, or a group of an HDF5 file."""

    split: str
    number: int
    path: Path
    item: Record | str


@dataclass(frozen=True)
class Trajectories:
    """All trajectories of a folder: train, valid, test. metadata: the keys of metadata.json that are used."""

    metadata: dict[str, Any]
    locations: list[Location]

    def __call__(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield arguments of ``Writer.add``. Raises Failure if the trajectory is damaged or not in GNS' layout."""
        location = self.locations[number]
        if isinstance(location.item, Record):
            kind, position = read_record(location.item, self.metadata["sequence_length"] + 1, 3)
        else:
            with open_group(location.path, location.item) as (kind, dataset):
                position = dataset[()]
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
    path = folder / "metadata.json"
    if not path.is_file():
        raise Failure(f"{path}: {ABSENT}")
    metadata = read_metadata(path, records)
    if np.shape(metadata["bounds"]) != (3, 2):
        raise Failure(
            f"{path}: key 'bounds' has shape (2, 2), expected (3, 2); import 2-D datasets with distegnn import"
        )
    periodic_axes(metadata.get(PERIODIC, False), f"{path}: key '{PERIODIC}'")
    locations: list[Location] = []
    sizes = {}
    for split, limit in zip(SPLITS, limits, strict=True):
        path = folder / f"{split}.{'tfrecord' if records else 'h5'}"
        if not whole and not path.exists() and partial_of(path).exists():
            path = partial_of(path)
        if not path.is_file():
            raise Failure(f"{path}: {ABSENT}")
        if records:
            scanned, end = scan(path, limit)
            if len(scanned) < limit and end < path.stat().st_size:
                raise Failure(f"{path}: truncated within record {len(scanned)}; fetch it again")
            new = [Location(split, record.number, path, record) for record in scanned]
        else:
            with opened(path) as file:
                new = [Location(split, k, path, name) for k, name in enumerate(sorted(file)[:limit])]
            end = path.stat().st_size
        if not new:
            raise Failure(f"{path}: holds no trajectory; fetch it again")
        locations += new
        sizes[split] = {"trajectories": len(new), "bytes": end}
    return Trajectories(metadata, locations), {"form": "tfrecord" if records else "hdf5", "files": sizes} | metadata


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
