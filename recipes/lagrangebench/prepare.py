"""Convert a dataset of LagrangeBench, or a stand-in for its 2D TGV or dam break, into a trajectories.h5."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import dam
import h5py
import numpy as np
import vortex

from dist_egnn.commands.import_data import run_import
from dist_egnn.data import prepare as preparation
from dist_egnn.data.importers.series import ImportOptions
from dist_egnn.data.trajectories import SPLITS, Trajectories
from dist_egnn.errors import Failure

WALLS = (1.0, 2.0)  # types of particles: solid and moving wall
FLOWS = {"tgv": vortex, "dam": dam}
# of the stand-ins: trajectories of train, valid and test; by flow particles per unit of length, and frames
COUNTS = {"tiny": (4, 1, 1), "small": (10, 2, 2), "full": (100, 50, 50)}
SIZES: dict[str, dict[str, tuple[float, int]]] = {
    "tgv": {"tiny": (20, 41), "small": (50, 126), "full": (50, 126)},
    "dam": {"tiny": (12.5, 81), "small": (25, 201), "full": (50, 401)},
}
SCALES = {
    "tiny": "stand-ins: 4 + 1 + 1 trajectories, tgv 400 particles, 41 frames, dam about 500, 81: 2 s of a core",
    "small": "10 + 2 + 2, tgv 2,500 particles, 126 frames: 20 s; dam about 1,600, 201: 1 minute",
    "full": "the whole dataset; stand-ins: 100 + 50 + 50, tgv 2,500 particles, dam about 5,700, as published",
}
EXAMPLE = "python recipes/lagrangebench/prepare.py --source data/2D_TGV_2500_10kevery100 --out data/tgv2d.h5"


def write_dataset(folder: Path, flow: ModuleType, scale: str, size: tuple[float, int], seed: int) -> None:
    """Write metadata.json and a file for each split in LagrangeBench's layout. size: as in SIZES."""
    (cells, frames), number, most = size, 0, 0
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in zip(SPLITS, COUNTS[scale], strict=True):
        with h5py.File(folder / f"{split}.h5", "w") as file:
            for k in range(count):
                position, kind = flow.trajectory(seed, number, cells, frames)
                position = position % np.ptp(flow.metadata(cells)["bounds"], axis=1)
                file.create_dataset(f"{k:05d}/position", data=position, dtype=np.float32, compression="gzip")
                file[f"{k:05d}/particle_type"] = kind
                number, most = number + 1, max(most, len(kind))
    radius = float(f"{1.45 / cells:.2g}")  # two digits, as published
    metadata = flow.metadata(cells) | {"dim": 2, "dx": 1 / cells, "default_connectivity_radius": radius}
    metadata |= {"periodic_boundary_conditions": [True, True], "num_particles_max": most}
    for name, count in (("train", COUNTS[scale][0]), ("test", COUNTS[scale][2])):
        metadata |= {f"sequence_length_{name}": frames - 1, f"num_trajs_{name}": count}
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")


def config_keys(folder: Path, data: Trajectories) -> list[str]:
    """The keys of simulator.yaml that a dataset sets, as KEY=VALUE. data: what it was converted into."""
    metadata: dict[str, Any] = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    radius = metadata.get("default_connectivity_radius") or float(f"{1.45 * metadata['dx']:.2g}")
    walls, axes = data.attribute(0, "fixed").any(), metadata.get("periodic_boundary_conditions", [False])
    keys = [f"data.radius={radius}"] + (["data.fixed=fixed", "data.features=[type/max]"] if walls else [])
    if str(metadata.get("case", "")).upper() in ("DB", "DAM"):
        keys.append(f"data.gravity=[0,{-abs(metadata.get('g_ext_magnitude', 1.0))},0]")
    keys += [] if any(axes) else ["data.periodic=false"]
    return keys + ([] if all(axes) or walls else ["data.walls=box"])


def run(arguments: Sequence[str] | None = None) -> None:
    """Convert the dataset, or write the stand-in and convert it."""
    parser = preparation.parser(__doc__ or "", SCALES, EXAMPLE)
    text = "folder with train.h5, valid.h5, test.h5 and metadata.json; tgv, dam: stand-ins (tgv at scale tiny)"
    parser.add_argument("--source", metavar="DIR", help=text)
    options = preparation.parse(parser, arguments)
    source = "tgv" if (options.source, options.scale) == (None, "tiny") else options.source
    if source is None:
        raise Failure(
            f"--scale {options.scale}: give LagrangeBench's folder, --source DIR, or --source tgv or dam; see --help"
        )
    folder = Path(source)
    if source in FLOWS:
        folder = options.out.with_name(f"{options.out.stem}-stand-in")
        write_dataset(folder, FLOWS[source], options.scale, SIZES[source][options.scale], options.seed)
    run_import([folder], options.out, ImportOptions(format="lagrangebench", fixed=WALLS))
    print(
        f"keys of this dataset for recipes/lagrangebench/simulator.yaml: {' '.join(config_keys(folder, Trajectories(options.out)))}"
    )


if __name__ == "__main__":
    sys.exit(preparation.main(run))
