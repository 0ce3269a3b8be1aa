"""The example of each help runs as it is printed, one after the other, on small files of the same names."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import yaml
from small_data import falling_swirl
from test_published_weights import published
from typer.testing import CliRunner

from dist_egnn import cli
from dist_egnn.data.trajectories import Writer

ROOT = Path(__file__).parents[1]
# in the order of `distegnn --help`: an example may need the files of those before
COMMANDS = list(typer.main.get_command(cli.app).commands)
MARKS = {"launch": [pytest.mark.servers]}
MADE = {
    **{
        "import": "mine.h5",
        "partition": "store/manifest.yaml",
        "train": "runs/fluid/best.pt",
        "evaluate": "runs/fluid/evaluate.csv",
    },
    **{"rollout": "runs/fluid/rollout.csv", "report": "runs/fluid/report.html", "render": "runs/fluid/rollout.gif"},
    **{
        "export": "fluid.pt2",
        "import-checkpoint": "runs/published/best.pt",
        "sweep": "runs/sweep/plot.png",
        "config": "my.yaml",
    },
}


def example_of(command: str) -> str:
    """The example at the end of a help of 80 columns."""
    ran = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "80"})
    assert ran.exit_code == 0
    assert all(len(line) <= 80 for line in ran.output.splitlines())
    return ran.output.partition("Example: ")[2].strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small data, configs and weights under the names that the examples use."""
    here = tmp_path_factory.mktemp("examples")
    fluid, nbody = here / "recipes" / "fluid113k", here / "recipes" / "nbody"
    for made in (fluid, nbody):
        made.mkdir(parents=True)
    with Writer(fluid / "sample.h5", {}) as out:
        for seed, split in enumerate(["train"] * 3 + ["valid"] + ["test"] * 2):
            x, v, attributes = falling_swirl(80, seed)
            attributes["viscosity"] = np.linspace(0.1, 1, 80)
            out.add(x, split=split, dt=1.0, source="test", velocity=v, attributes=attributes)
    x = x[0] + 0.01 * np.arange(30)[:, None, None]
    np.savez(here / "frames.npz", position=x, type=np.arange(80) % 2)
    config = {
        "include": str(ROOT / "recipes" / "fluid113k" / "config.yaml"),
        "data": {"radius": 0.35, "horizon": 1, "frames": 2, "last_frame": -1, "features": ["viscosity", "speed"]},
        "model": {"hidden": 8, "layers": 1},
    }
    (fluid / "config.yaml").write_text(yaml.safe_dump(config))
    (nbody / "sweep.yaml").write_text(
        "config: recipes/fluid113k/config.yaml\nout: runs/sweep\nset: {train.epochs: 1}\n"
        "grids: [{keys: {model.name: [EGNN], data.edge_drop: [0, 1]}}]\nseeds: [0]\nplot: {x: data.edge_drop}\n"
    )
    settings = {"data": {"dataset_name": "protein", "radius": 10, "delta_t": 15}, "model": {"normalize": False}}
    torch.save({"model_state_dict": published(node=0), "config": settings}, here / "best_model.pth")
    # the installed program does not look for modules in the working folder, and nothing that it starts may
    (here / "dgl.py").write_text("raise SystemExit('a file of the user, not DGL')\n")
    return here


@pytest.mark.parametrize("command", [pytest.param(name, marks=MARKS.get(name, [])) for name in COMMANDS])
def test_example(folder: Path, distegnn: Path, command: str) -> None:
    line = example_of(command)
    assert line.startswith(f"distegnn {command}")
    path = os.pathsep.join([str(distegnn.parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if command == "launch":
        store = example_of("partition").replace("--parts 2", "--parts 1 --trainers 2 --shard-nodes 0")
        line = f"{store.replace('--out store', '--out served')} && {line}"
    ran = subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True, timeout=500)
    if command == "doctor":  # the machine may have a problem
        assert "ok      dgl: " in ran.stdout
    else:
        assert ran.returncode == 0, ran.stderr
    if command in MADE:
        assert (folder / MADE[command]).stat().st_size > 0
    else:
        assert ran.stdout.strip()
