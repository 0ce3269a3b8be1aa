"""Convert a dataset of LagrangeBench, or a stand-in for its 2D TGV, into a trajectories.h5."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vortex

from dist_egnn.commands.import_data import run_import
from dist_egnn.data import prepare as preparation
from dist_egnn.data.importers.series import ImportOptions
from dist_egnn.data.trajectories import SPLITS, Trajectories
from dist_egnn.errors import Failure

WALLS = (1.0, 2.0)  # types of particles: solid and moving wall
# of the stand-in: trajectories of train, valid and test, particles along a side, frames
SIZES = {"tiny": ((4, 1, 1), 20, 41), "small": ((10, 2, 2), 50, 126), "full": ((100, 50, 50), 50, 126)}
SCALES = {
    "tiny": "stand-in: 4 + 1 + 1 trajectories of 400 particles, 41 frames: 1 s of a core",
    "small": "stand-in: 10 + 2 + 2 of 2,500 particles, 126 frames: 10 s",
    "full": "the whole dataset; stand-in: 100 + 50 + 50, as published",
}
EXAMPLE = "python recipes/lagrangebench/prepare.py --source data/2D_TGV_2500_10kevery100 --out data/tgv2d.h5"


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
    text = "folder with train.h5, valid.h5, test.h5 and metadata.json; tgv: a stand-in (default at scale tiny)"
    parser.add_argument("--source", metavar="DIR", help=text)
    options = preparation.parse(parser, arguments)
    source = "tgv" if (options.source, options.scale) == (None, "tiny") else options.source
    if source is None:
        raise Failure(
            f"--scale {options.scale}: give LagrangeBench's folder, --source DIR, or --source tgv; see --help"
        )
    folder = Path(source)
    if source == "tgv":
        counts, side, frames = SIZES[options.scale]
        folder = options.out.with_name(f"{options.out.stem}-stand-in")
        folder.mkdir(parents=True, exist_ok=True)
        vortex.write(folder, dict(zip(SPLITS, counts, strict=True)), options.seed, side, frames)
    run_import([folder], options.out, ImportOptions(format="lagrangebench", fixed=WALLS))
    print(
        f"keys of this dataset for recipes/lagrangebench/simulator.yaml: {' '.join(config_keys(folder, Trajectories(options.out)))}"
    )


if __name__ == "__main__":
    sys.exit(preparation.main(run))
