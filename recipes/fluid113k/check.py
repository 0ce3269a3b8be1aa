"""Hold the trajectories of a file to their physics, in a table, and draw one of them.

It reads what prepare.py wrote, a frame at a time. Exit code 1 if a particle is outside its box, the density of a last
frame is off by more than 5%, or an energy rises by more than 1% of its first value.
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
SHOWN = 20_000  # particles that are drawn: more only paint over one another


@dataclass(frozen=True)
class Course:
    """What a trajectory does in its box (2, 3). energy: J, (T,), or (T − 1,) from forward differences; gap: the least
    distance from a wall in m, below 0 outside; fastest: m/s; density: kg/m³ inside the fluid at the end."""

    box: np.ndarray
    energy: np.ndarray
    gap: float
    fastest: float
    density: float


def follow(data: Trajectories, k: int) -> Course:
    """Read trajectory k once."""
    trajectory, box = data[k], data.box(k)
    if box is None:
        raise Failure(f"{data.path}: trajectory {k} has no box; this is no file of fluid113k's prepare.py")
    mass, floor = data.attribute(k, "mass"), float(box[0, 1])
    energies, gap, fastest, before = [], np.inf, 0.0, None
    with progress_bar(f"trajectory {k}", trajectory.frames) as tick:
        for t in range(trajectory.frames):
            x = data.position(k, t)
            gap = min(gap, float((x - box[0]).min()), float((box[1] - x).min()))
            if trajectory.velocity:
                place, v = x, data.velocity(k, t)
            elif before is not None:
                place, v = (before + x) / 2, (x - before) / trajectory.dt
            if trajectory.velocity or before is not None:
                energies.append(physics.energy(place[None], v[None], mass, floor)[0])
                fastest = max(fastest, float(np.linalg.norm(v, axis=1).max()))
            before = x
            tick()
    return Course(box, np.array(energies), gap, fastest, physics.inner_density(x, mass, box, RADIUS))


def picture(out: Path, data: Trajectories, k: int, course: Course) -> None:
    """Trajectory k at its start, at the impact, in the splash and at its end, coloured by height, above its energy."""
    plt = plots.pyplot()
    last, box, dt = data[k].frames - 1, course.box, data[k].dt
    lost = course.energy[0] - course.energy
    impact = int(np.argmax(lost >= 0.05 * lost.max()))
    shown = sorted({0, impact, impact + (last - impact) // 8, impact + (last - impact) // 3, last})
    rows = np.sort(np.random.default_rng(0).permutation(data[k].nodes)[:SHOWN])
    figure = plt.figure(figsize=(2.5 * len(shown), 6.0))
    grid = figure.add_gridspec(
        2, len(shown), height_ratios=(3.2, 1), left=0.06, right=0.98, top=0.93, bottom=0.09, wspace=0, hspace=0.05
    )
    for place, t in enumerate(shown):
        axes = figure.add_subplot(grid[0, place], projection="3d")
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
        axes.patch.set_visible(False)  # it would hide the neighbour's numbers
        axes.set_title(f"t = {t * dt:.2f} s", fontsize=10, y=1.18)
    axes = figure.add_subplot(grid[1, :])
    axes.plot(np.arange(len(course.energy)) * dt, course.energy / course.energy[0])
    axes.set(xlabel="t [s]", ylabel="energy / first", ylim=(0, 1.05), xlim=(0, last * dt))
    for t in shown:
        axes.axvline(t * dt, color="0.8", lw=0.8, zorder=0)
    note = f", {len(rows):,} drawn" if len(rows) < data[k].nodes else ""
    figure.suptitle(f"{data.path.name}, trajectory {k}: {data[k].nodes:,} particles{note}", fontsize=11)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    plt.close(figure)
    filesystem.write_atomically(out, content.getvalue())


def check(options: argparse.Namespace) -> int:
    """Print the table; how many things are wrong."""
    data = Trajectories(options.file)
    courses = [follow(data, k) for k in range(len(data))]
    gains = [physics.energy_gain(course.energy) for course in courses]
    table = {
        "split": [t.split for t in data],
        "particles": [t.nodes for t in data],
        "frames": [t.frames for t in data],
        "seconds": [f"{(t.frames - 1) * t.dt:.3f}" for t in data],
        "mm to a wall": [f"{1e3 * course.gap:.1f}" for course in courses],
        "density, last": [f"{course.density:.1f}" for course in courses],
        "energy, last": [f"{course.energy[-1] / course.energy[0]:.1%}" for course in courses],
        "largest rise": [f"{gain:.3%}" for gain in gains],
        "fastest, m/s": [f"{course.fastest:.1f}" for course in courses],
    }
    print(pd.DataFrame(table).to_string())
    wrong = [
        f"trajectory {k}: {doubt}"
        for k, (course, gain) in enumerate(zip(courses, gains, strict=True))
        for doubt in ["a particle is outside the box"] * (course.gap < 0) + physics.doubts(course.density, gain)
    ]
    for line in wrong:
        print(f"warning: {line}", file=sys.stderr)
    if options.picture:
        picture(options.picture, data, 0, courses[0])
        print(f"picture of trajectory 0: {options.picture}")
    return len(wrong)


def run(arguments: Sequence[str] | None) -> None:
    parser = prepare.Parser(description=__doc__, epilog=f"example:\n  {EXAMPLE}")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, help="a trajectories.h5 that prepare.py wrote")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw the first trajectory, and its energy")
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    if check(parser.parse_args(arguments)):
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(prepare.main(run))
