"""Check the physics of the trajectories of a file, print a table, and plot one of them.

Reads a file of prepare.py frame by frame. Exit code 1 if a particle is outside its box, the density of a last frame is
wrong by more than 5%, or an energy rises by more than 1% of its first value.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import physics
from prepare import RADIUS

from dist_egnn.data import prepare
from dist_egnn.data.trajectories import Trajectories
from dist_egnn.errors import Failure
from dist_egnn.utils import filesystem
from dist_egnn.utils.progress import progress_bar
from dist_egnn.viz import plots

EXAMPLE = "python recipes/fluid113k/check.py recipes/fluid113k/sample.h5 --picture splash.png"
MAX_DRAWN = 20_000  # particles in the picture


@dataclass(frozen=True)
class Measurements:
    """Of a trajectory in its box (2, 3): energy in J, (T,), or (T − 1,) from forward differences; gap, the smallest distance
    from a wall in m, negative outside; fastest in m/s; density in kg/m³ inside the fluid in the last frame."""

    box: np.ndarray
    energy: np.ndarray
    gap: float
    fastest: float
    density: float


def measure(data: Trajectories, k: int) -> Measurements:
    """Measure trajectory k, reading it once."""
    trajectory, box = data[k], data.box(k)
    if box is None:
        raise Failure(f"{data.path}: trajectory {k} has no box; the file is not from recipes/fluid113k/prepare.py")
    mass, floor = data.attribute(k, "mass"), float(box[0, 1])
    energies, gap, fastest, before = [], np.inf, 0.0, None
    with progress_bar(f"trajectory {k}", trajectory.frames) as tick:
        for t in range(trajectory.frames):
            x = data.position(k, t)
            gap = min(gap, float((x - box[0]).min()), float((box[1] - x).min()))
            if trajectory.velocity:
                middle, v = x, data.velocity(k, t)
            elif before is not None:
                middle, v = (before + x) / 2, (x - before) / trajectory.dt
            if trajectory.velocity or before is not None:
                energies.append(physics.energy(middle[None], v[None], mass, floor)[0])
                fastest = max(fastest, float(np.linalg.norm(v, axis=1).max()))
            before = x
            tick()
    return Measurements(box, np.array(energies), gap, fastest, physics.inner_density(x, mass, box, RADIUS))


def plot_trajectory(out: Path, data: Trajectories, k: int, measurements: Measurements) -> None:
    """Plot trajectory k at the start, the impact, the splash and the end, coloured by height, and its energy."""
    plt = plots.pyplot()
    last, box, dt = data[k].frames - 1, measurements.box, data[k].dt
    lost = measurements.energy[0] - measurements.energy
    impact = int(np.argmax(lost >= 0.05 * lost.max()))
    times = sorted({0, impact, impact + (last - impact) // 8, impact + (last - impact) // 3, last})
    rows = np.sort(np.random.default_rng(0).permutation(data[k].nodes)[:MAX_DRAWN])
    figure = plt.figure(figsize=(2.5 * len(times), 6.0))
    grid = figure.add_gridspec(
        2, len(times), height_ratios=(3.2, 1), left=0.06, right=0.98, top=0.93, bottom=0.09, wspace=0, hspace=0.05
    )
    for column, t in enumerate(times):
        axes = figure.add_subplot(grid[0, column], projection="3d")
        plots.view(axes, box[0], box[1], zoom=1.45)
        axes.set(xlabel="", ylabel="", zlabel="", xticklabels=[], yticklabels=[])
        x = data.position(k, t)[rows]
        size = 450 / len(rows) ** (2 / 3)  # about the spacing of particles that fill the view
        axes.scatter(
            *x[:, [0, 2, 1]].T,
            c=x[:, 1],
            vmin=box[0, 1],
            vmax=box[:, 1].mean(),
            s=size,
            linewidths=0,
            depthshade=False,
        )
        axes.patch.set_visible(False)  # it would cover the neighbour's labels
        axes.set_title(f"t = {t * dt:.2f} s", fontsize=10, y=1.18)
    axes = figure.add_subplot(grid[1, :])
    axes.plot(np.arange(len(measurements.energy)) * dt, measurements.energy / measurements.energy[0])
    axes.set(xlabel="t [s]", ylabel="energy / first", ylim=(0, 1.05), xlim=(0, last * dt))
    for t in times:
        axes.axvline(t * dt, color="0.8", lw=0.8, zorder=0)
    note = f", {len(rows):,} drawn" if len(rows) < data[k].nodes else ""
    figure.suptitle(f"{data.path.name}, trajectory {k}: {data[k].nodes:,} particles{note}", fontsize=11)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    plt.close(figure)
    filesystem.write_atomically(out, content.getvalue())


def check_file(options: argparse.Namespace) -> int:
    """Print the table and warnings; returns the number of violations."""
    data = Trajectories(options.file)
    measured = [measure(data, k) for k in range(len(data))]
    gains = [physics.energy_gain(measurements.energy) for measurements in measured]
    table = {
        "split": [t.split for t in data],
        "particles": [t.nodes for t in data],
        "frames": [t.frames for t in data],
        "seconds": [f"{(t.frames - 1) * t.dt:.3f}" for t in data],
        "mm to a wall": [f"{1e3 * measurements.gap:.1f}" for measurements in measured],
        "density, last": [f"{measurements.density:.1f}" for measurements in measured],
        "energy, last": [f"{measurements.energy[-1] / measurements.energy[0]:.1%}" for measurements in measured],
        "largest rise": [f"{gain:.3%}" for gain in gains],
        "fastest, m/s": [f"{measurements.fastest:.1f}" for measurements in measured],
    }
    print(pd.DataFrame(table).to_string())
    violations = [
        f"trajectory {k}: {violation}"
        for k, (measurements, gain) in enumerate(zip(measured, gains, strict=True))
        for violation in ["a particle is outside the box"] * (measurements.gap < 0)
        + physics.violations(measurements.density, gain)
    ]
    for line in violations:
        print(f"warning: {line}", file=sys.stderr)
    if options.picture:
        plot_trajectory(options.picture, data, 0, measured[0])
        print(f"picture of trajectory 0: {options.picture}")
    return len(violations)


def run(arguments: Sequence[str] | None) -> None:
    parser = prepare.Parser(description=__doc__, epilog=f"example:\n  {EXAMPLE}")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, help="a trajectories.h5 that prepare.py wrote")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="plot the first trajectory and its energy")
    parser.add_argument("--debug", action="store_true", help="print a traceback after an error")
    if check_file(parser.parse_args(arguments)):
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(prepare.main(run))
