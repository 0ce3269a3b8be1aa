"""Rollouts against closed forms and against plain loops; the file as VTK reads it; what ends early."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from dist_egnn import cli, config
from dist_egnn.data import graphs
from dist_egnn.data.samples import feature_columns
from dist_egnn.data.trajectories import Trajectories, Writer
from dist_egnn.distributed import comm, spawn
from dist_egnn.errors import Failure
from dist_egnn.evaluate import metrics, rollout, sinkhorn
from dist_egnn.evaluate.boundary_conditions import BOUNDS, BoundaryConditions
from dist_egnn.evaluate.repartition import Repartitioner, relabel
from dist_egnn.evaluate.vtkhdf import Rollout, RolloutWriter, finish, partial_path
from dist_egnn.train import checkpoint, trainer
from dist_egnn.utils import filesystem, memory

ROOT = Path(__file__).parents[2]
HORIZON, STEPS = 3, 5
BOX = np.array([[-1.0, -1, -1], [2.0, 2, 2]])
UNIT = np.array([[0.0, 0, 0], [1.0, 1, 1]])  # full of nodes


def write(path: Path, *, velocity: bool = True, box: np.ndarray | None = BOX, dt: float = 0.5, **given: Any) -> Path:
    """A trajectory of 60 nodes, 12 frames, that fall: x = x0 + u t + g t² / 2."""
    draw = np.random.default_rng(5)
    start, u = draw.uniform(size=(60, 3)), 0.05 * draw.normal(size=(60, 3))
    t, g = dt * np.arange(12)[:, None, None], np.array([0.0, -0.02, 0.0])
    attributes = {"mass": draw.uniform(1, 2, 60), "kind": np.arange(60.0) % 3}
    with Writer(path, {}) as out:
        for split in ("train", "valid", "test"):
            out.add(
                start + u * t + g * t**2 / 2,
                split=split,
                dt=dt,
                source="test",
                velocity=np.broadcast_to(u, (12, 60, 3)) + g * t if velocity else None,
                attributes=attributes,
                box=box,
                **given,
            )
    return path


def make_run(
    folder: Path, data: Path, *overrides: str, weights: Callable[[torch.nn.Module], None] | None = None
) -> Path:
    """A run as `distegnn train` leaves it, untrained; ``weights`` may set parameters."""
    settings = config.load(
        None,
        [
            f"data.path={data}",
            f"data.horizon={HORIZON}",
            "data.radius=0.35",
            "model.hidden=16",
            "model.layers=2",
            "data.features=[mass/max,speed/max]",
            "data.node_attributes=[mass]",
            f"run.dir={folder}",
            *overrides,
        ],
    )
    model = trainer.build_model(settings, (2, 1), comm.SingleProcess())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():  # φ_x and its kind start near zero: what they carry would not show
        if name.endswith(("phi_x.2.weight", "phi_xv.2.weight", "phi_z.2.weight")):
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    if weights is not None:
        weights(model)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml(settings))
    checkpoint.save(folder / "best.pt", {"model": model.state_dict()})
    return folder


def linear(t: float) -> Callable[[torch.nn.Module], None]:
    def put(model: torch.nn.Module) -> None:
        model.t.data.fill_(t)  # type: ignore[union-attr, operator]

    return put


def roll(run: Path, out: Path, parts: int | None = None, double: bool = False, **options: Any) -> list[Any]:
    """Frames of a rollout, by way of the library."""
    job, size = rollout.prepare(run, trajectory=0, out=out, parts=parts, **{"steps": STEPS, **options})
    assert spawn.run_ranks(rollout.roll_out, size, replace(job, double=double), timeout_s=60) == [""] * size
    assert finish(out) == job.steps + 1
    with Rollout(out) as found:
        return list(found)


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "differences"])
def test_linear_dynamics_in_closed_form(tmp_path: Path, stored: bool) -> None:
    """x_{k+1} = x_k + t v_k and v_{k+1} = (x_{k+1} − x_k) / τ, so v_k = (t/τ)^k v_0 and x_k = x_0 + t v_0 Σ_{i<k} (t/τ)^i."""
    data = write(tmp_path / "a.h5", velocity=stored)
    tau = HORIZON * 0.5 if stored else HORIZON  # length per time where stored, else per frame
    t = 0.8 * tau
    run = make_run(tmp_path / "run", data, "model.name=Linear", weights=linear(t))
    frames = roll(run, tmp_path / "out.vtkhdf", double=True, start=1)
    with_file = Trajectories(data)
    x0, v0 = with_file.position(0, 1).astype(float), with_file.velocity(0, 1).astype(float)
    for k, frame in enumerate(frames):
        ratio = 0.8
        np.testing.assert_allclose(frame.position, x0 + t * v0 * (1 - ratio**k) / (1 - ratio), atol=1e-7)
        np.testing.assert_allclose(frame.velocity, v0 * ratio**k, atol=1e-7)
        assert (frame.step, frame.frame, frame.time) == (k, 1 + 3 * k, 0.5 * (1 + 3 * k))
        if 1 + 3 * k < 12:
            np.testing.assert_allclose(frame.error, frame.position - with_file.position(0, 1 + 3 * k), atol=1e-7)
        else:
            assert frame.error is None
    assert [frame.error is None for frame in frames] == [False] * 4 + [True] * 2


def plain_loop(run: Path, data: Path, parts: int, repartition: int, method: str) -> list[np.ndarray]:
    """The same in one process on the cut graph, from the pieces: the whole graph, less the edges that cross a cut."""
    settings = config.load(run / "config.yaml")
    model = trainer.build_model(settings, (2, 1), comm.SingleProcess()).double()
    checkpoint.load_weights(model, checkpoint.load(run / "best.pt"), run / "best.pt")
    file = Trajectories(data)
    x, v = file.position(0, 0).astype(float), file.velocity(0, 0).astype(float)
    mass, found = file.attribute(0, "mass").astype(float), [x]
    from dist_egnn.partition import assign

    for step in range(STEPS):
        side = file.sides(0, settings.data.radius) if settings.data.periodic else None
        kept = graphs.sample_edges(x, settings.data.radius, settings.data.edge_drop, side)
        if step % repartition == 0:
            part = assign.assign(method, x if side is None else graphs.wrap(x, side), *kept, parts)
        src, dst = (end[part[kept[0]] == part[kept[1]]] for end in kept)
        speed = np.linalg.norm(v, axis=1)
        fields = {"x": x, "v": v, "f": np.stack([mass / mass.max(), speed / speed.max()], 1), "a": mass[:, None]}
        with torch.no_grad():
            y = model(graphs.build_graph(src, dst, fields, side))[0].numpy()
        v = (y - x) / (HORIZON * 0.5)
        x = y
        found.append(x)
    return found


@pytest.mark.parametrize(
    ("parts", "repartition", "drop", "method", "periodic"),
    [
        (1, 1, 0.0, "metis", False),
        (2, 1, 0.3, "metis", False),
        (3, 2, 0.0, "metis", False),
        (2, 2, 0.3, "bisection", False),
        (1, 1, 0.3, "metis", True),
        (2, 2, 0.3, "bisection", True),
        (3, 2, 0.3, "bisection exchange", True),
    ],
)
def test_processes_equal_one_on_the_same_cut_graphs(
    tmp_path: Path, parts: int, repartition: int, drop: float, method: str, periodic: bool
) -> None:
    data = write(tmp_path / "a.h5", periodic=periodic, box=UNIT if periodic else BOX)
    method, *halo = method.split()
    keys = [f"data.edge_drop={drop}", f"partition.method={method}", f"data.periodic={periodic}"]
    run = make_run(tmp_path / "run", data, *keys, *(f"partition.halo={mode}" for mode in halo))
    frames = roll(run, tmp_path / "out.vtkhdf", parts=parts, double=True, repartition=repartition)
    wanted = plain_loop(run, data, 1 if halo else parts, repartition, method)
    for frame, x in zip(frames, wanted, strict=True):
        np.testing.assert_allclose(frame.position, x, rtol=0, atol=1e-11)
    moved = np.abs(wanted[-1] - wanted[0]).max()
    assert 0.01 < moved < 10  # else nothing would be tested
    assert {len(np.unique(frame.part)) for frame in frames} == {parts}
    if parts > 1:
        # owners change, and only with a new partition; frame k + 1 was computed under the partition of step k
        changed = [(a.part != b.part).any() for a, b in itertools.pairwise(frames[1:])]
        assert any(changed)
        assert not any(changed[k - 1] for k in range(1, STEPS) if k % repartition)


def test_parts_of_a_rollout_follow_the_weights(tmp_path: Path) -> None:
    """Sizes are each process's own, whatever the positions; another number of processes than in training has equal ones."""
    data = write(tmp_path / "a.h5")
    keys = ["partition.parts=3", "partition.weights=[1,3,2]", "partition.method=bisection", "model.name=Linear"]
    run = make_run(tmp_path / "run", data, *keys, weights=linear(HORIZON * 0.5))
    frames = roll(run, tmp_path / "out.vtkhdf")
    assert [np.bincount(frame.part).tolist() for frame in frames] == [[10, 30, 20]] * (STEPS + 1)
    assert any((a.part != b.part).any() for a, b in itertools.pairwise(frames))
    job, size = rollout.prepare(run, trajectory=0, steps=1, out=tmp_path / "o.vtkhdf", parts=2)
    assert (job.part_weights, size) == (None, 2)


def test_a_rollout_in_a_periodic_box_feels_across_its_boundary(tmp_path: Path) -> None:
    data = write(tmp_path / "a.h5", periodic=True, box=UNIT)
    ends = [
        roll(make_run(tmp_path / f"{p}", data, f"data.periodic={p}"), tmp_path / f"{p}.vtkhdf", double=True)[1].position
        for p in (True, False)
    ]
    assert np.abs(ends[0] - ends[1]).max() > 1e-4


def test_cut_edges_matter(tmp_path: Path) -> None:
    """The comparison above can fail: the same rollout on the uncut graph is another one."""
    data = write(tmp_path / "a.h5")
    run = make_run(tmp_path / "run", data)
    cut, whole = plain_loop(run, data, 2, 1, "metis"), plain_loop(run, data, 1, 1, "metis")
    assert np.abs(cut[-1] - whole[-1]).max() > 1e-4


def test_edges_of_equal_length_are_dropped_alike(tmp_path: Path) -> None:
    """On a lattice most edges tie: the order of edges decides, in parts as in the whole."""
    lattice = np.stack(np.meshgrid(*[np.arange(4.0)] * 3), -1).reshape(-1, 3)
    for p, found in enumerate(spawn.run_ranks(_kept, 2, lattice)):
        whole = graphs.drop_longest(lattice, *graphs.radius_edges(lattice, 1.5), 0.37)
        own = found[0]
        inside = np.isin(whole[0], own) & np.isin(whole[1], own)
        np.testing.assert_array_equal(own[found[1]], whole[0][inside])
        np.testing.assert_array_equal(own[found[2]], whole[1][inside])
        assert (p, len(own)) == (p, 32)


SETTINGS = config.load(None)


def _kept(group: comm.Comm, x: np.ndarray) -> tuple[np.ndarray, ...]:
    class Fake:
        repartition, method, method_seed, part_weights = 1, "bisection", 0, None

        class spec:
            radius, edge_drop = 1.5, 0.37

        config = SETTINGS

    return Repartitioner(group, Fake, len(x)).local_graph(x, 0)  # type: ignore[arg-type]


def test_parts_keep_their_names() -> None:
    before = np.repeat([0, 1, 2], 10)
    shifted = np.repeat([2, 0, 1], 10)
    shifted[9] = 0
    np.testing.assert_array_equal(relabel(shifted, before, 3), np.r_[[0] * 9, [1] * 11, [2] * 10])
    kept = relabel(shifted, before, 3, [1.0, 2.0, 2.0])  # only 1 and 2 may change places
    np.testing.assert_array_equal(kept, np.r_[[1] * 9, [0] * 11, [2] * 10])


def test_features_follow_the_velocity() -> None:
    v = np.array([[3.0, 4, 0], [0, 0, 1]])
    mass = np.array([1.0, 2])
    found = feature_columns(["speed", "speed/max", "mass/max", "mass"], v, {"mass": mass}.__getitem__)
    np.testing.assert_array_equal(found, [[5, 1, 0.5, 1], [1, 0.2, 1, 2]])


def test_walls_by_hand(tmp_path: Path) -> None:
    data = write(tmp_path / "a.h5", box=np.array([[0.0, 0, 0], [1, 1, 1]]))
    run = make_run(tmp_path / "run", data, "model.name=Linear")
    x = np.tile([0.9, 0.5, 0.5], (60, 1))
    to = np.tile([0.9, 0.5, 0.5], (60, 1))
    to[0, 0], to[1, 0], to[2, 0], to[3, 0] = 1.3, -0.2, 2.4, 0.7
    wanted = {"none": [1.3, -0.2, 2.4, 0.7], "clamp": [1, 0, 1, 0.7], "reflect": [0.7, 0.2, 0.4, 0.7]}
    speeds = {"none": [0.4, -1.1, 1.5, -0.2], "clamp": [0.1, -0.9, 0.1, -0.2], "reflect": [-0.4, 1.1, 1.5, -0.2]}
    for bounds in BOUNDS:
        job, _ = rollout.prepare(run, trajectory=0, steps=1, out=tmp_path / "o.vtkhdf", bounds=bounds, fixed="kind=1")
        conditions = BoundaryConditions(Trajectories(data), job)
        after, v = conditions.apply(x, to)
        moving = [0, 2, 3]  # node 1 is of kind 1: it stays
        np.testing.assert_allclose(after[moving, 0], np.array(wanted[bounds])[moving], atol=1e-12)
        np.testing.assert_allclose(v[moving, 0] * HORIZON * 0.5, np.array(speeds[bounds])[moving], atol=1e-12)
        np.testing.assert_array_equal(after[1::3], x[1::3])
        assert (v[1::3] == 0).all()


def test_what_vtk_reads(tmp_path: Path) -> None:
    """Each step as vtkHDFReader assembles an UnstructuredGrid of one part, from the offsets of Steps."""
    run = make_run(tmp_path / "run", write(tmp_path / "a.h5"))
    frames = roll(run, tmp_path / "out.vtkhdf", parts=2)
    with h5py.File(tmp_path / "out.vtkhdf") as file:
        root, steps = file["VTKHDF"], file["VTKHDF/Steps"]
        assert root.attrs["Type"] == b"UnstructuredGrid"
        kind = root.attrs.get_id("Type").get_type()
        assert (kind.is_variable_str(), kind.get_cset()) == (False, h5py.h5t.CSET_ASCII)
        assert root.attrs["Version"].tolist() == [2, 0]
        assert steps.attrs["NSteps"] == len(steps["Values"]) == STEPS + 1  # VTK copies all of Values
        assert root["Types"].dtype == np.uint8
        for k, frame in enumerate(frames):
            part, pieces = int(steps["PartOffsets"][k]), int(steps["NumberOfParts"][k])
            assert pieces == 1
            n, cells, ids = (
                int(root[name][part]) for name in ("NumberOfPoints", "NumberOfCells", "NumberOfConnectivityIds")
            )
            assert (n, cells, ids) == (60, 60, 60)
            first, cell, link = (
                int(np.ravel(steps[name][k])[0]) for name in ("PointOffsets", "CellOffsets", "ConnectivityIdOffsets")
            )
            np.testing.assert_array_equal(root["Points"][first : first + n], frame.position)
            np.testing.assert_array_equal(root["Types"][cell : cell + cells], 1)
            np.testing.assert_array_equal(root["Connectivity"][link : link + ids], np.arange(n))
            np.testing.assert_array_equal(root["Offsets"][cell + part : cell + part + cells + 1], np.arange(n + 1))
            for name in root["PointData"]:
                at = int(steps["PointDataOffsets"][name][k])
                assert len(root["PointData"][name][at : at + n]) == n
            at = int(steps["PointDataOffsets"]["velocity"][k])
            np.testing.assert_array_equal(root["PointData/velocity"][at : at + n], frame.velocity)
            assert int(steps["PointDataOffsets"]["mass"][k]) == 0
            assert (frame.virtual is None) == (k == 0)
            assert k == 0 or frame.virtual.shape == (3, 3)
        assert set(root["PointData"]) == {"velocity", "error", "part", "mass", "kind"}


def test_errors_by_their_definitions(tmp_path: Path) -> None:
    data = write(tmp_path / "a.h5")
    run = make_run(tmp_path / "run", data)
    frames = roll(run, tmp_path / "out.vtkhdf")
    table = rollout.error_table(tmp_path / "out.vtkhdf").set_index("step")
    file, mass = Trajectories(data), Trajectories(data).attribute(0, "mass")
    x0, v0 = file.position(0, 0), file.velocity(0, 0)
    for k in range(4):
        y, x, row = file.position(0, 3 * k).astype(float), frames[k].position, table.loc[k]
        close = {"rel": 1e-4, "abs": 1e-9}
        assert row["mse"] == pytest.approx(((x - y) ** 2).mean(), **close)
        assert row["mae"] == pytest.approx(np.abs(x - y).mean(), **close)
        assert row["static_mse"] == pytest.approx(((x0 - y) ** 2).mean(), **close)
        assert row["linear_mse"] == pytest.approx(((x0 + v0 * 1.5 * k - y) ** 2).mean(), **close)
        assert row["kinetic_energy"] == pytest.approx((mass[:, None] * frames[k].velocity ** 2).sum() / 2, **close)
        v = (y - file.position(0, 3 * k - 3)) / 1.5 if k else v0
        assert row["true_kinetic_energy"] == pytest.approx((mass[:, None] * v**2).sum() / 2, **close)
    assert table.loc[4:, ["mse", "mae", "static_mse", "rmsd", "true_kinetic_energy"]].isna().all(None)
    assert table.loc[:, ["kinetic_energy", "radius_of_gyration", "time"]].notna().all(None)


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def distegnn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """distegnn(arguments): the command line in tmp_path, in this process."""

    def ran(*arguments: object) -> Ran:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["distegnn", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Ran(code, *capsys.readouterr())

    return ran


@pytest.mark.parametrize("parts", [1, 2])
def test_a_rollout_that_explodes_is_stopped(tmp_path: Path, distegnn: Callable[..., Ran], parts: int) -> None:
    """x_k − x_0 grows by a factor of 20 a step."""
    run = make_run(tmp_path / "run", write(tmp_path / "a.h5"), "model.name=Linear", weights=linear(30.0))
    arguments = ("--trajectory", 0, "--steps", 50, "--parts", parts, "--out", "out.vtkhdf")
    ran = distegnn("rollout", "run", *arguments)
    assert ran.code == 2, ran.err
    (line,) = ran.err.splitlines()
    assert line.startswith("error: ")
    told = re.search(
        r"out\.vtkhdf: stopped at step (\d+): node \d+ is .* the file has the (\d+) frames before it", line
    )
    assert told, line
    table = pd.read_csv(tmp_path / "out.csv")
    with Rollout(tmp_path / "out.vtkhdf") as found:
        assert len(found) == len(table) == int(told[2]) == int(told[1])
        for frame in found:
            assert np.abs(frame.position - 0.5).max() <= 30
        steps = found.file["VTKHDF/Steps"]
        assert steps.attrs["NSteps"] == len(steps["Values"]) == len(found)
        assert len(found.file["VTKHDF/Points"]) == 60 * len(found)
    assert f"{len(table)} of 51 frames" in ran.out
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.h5", "out.csv", "out.vtkhdf", "run"]
    assert run.is_dir()


def test_one_that_explodes_in_a_periodic_box_is_stopped(tmp_path: Path) -> None:
    data = write(tmp_path / "a.h5", periodic=True, box=UNIT)
    run = make_run(tmp_path / "run", data, "model.name=Linear", "data.periodic=true", weights=linear(30.0))
    with pytest.raises(Failure, match=r"stopped at step \d+: node \d+ moves by .*, over 10 times the box's size"):
        rollout.run_rollout(run, trajectory=0, steps=50, out=tmp_path / "out.vtkhdf")
    assert len(pd.read_csv(tmp_path / "out.csv")) > 1


def test_nan_is_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", write(tmp_path / "a.h5"), "model.name=Linear", weights=linear(float("nan")))
    with pytest.raises(Failure, match=r"out.vtkhdf: stopped at step 1: 60 positions are NaN or infinite"):
        rollout.run_rollout(run, trajectory=0, steps=3, out=tmp_path / "out.vtkhdf")
    assert [frame.step for frame in Rollout(tmp_path / "out.vtkhdf")] == [0]
    assert "1 of 4 frames" in capsys.readouterr().out


def test_an_interrupted_rollout_keeps_its_frames(
    tmp_path: Path, distegnn: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = RolloutWriter.add

    def add(self: RolloutWriter, *frame: Any) -> None:
        if self.count == 3 and not self.path.name.startswith("out.vtkhdf.short"):
            raise KeyboardInterrupt
        plain(self, *frame)

    monkeypatch.setattr(RolloutWriter, "add", add)
    make_run(tmp_path / "run", write(tmp_path / "a.h5"), "model.name=Linear")
    partial_path(tmp_path / "out.vtkhdf").write_text("of a rollout that was killed")
    ran = distegnn("rollout", "run", "--trajectory", 0, "--steps", 9, "--out", "out.vtkhdf")
    assert ran == (130, "out.vtkhdf: 3 of 10 frames\n", "interrupted\n")
    assert [frame.step for frame in Rollout(tmp_path / "out.vtkhdf")] == [0, 1, 2]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.h5", "out.vtkhdf", "run"]


def _dying(group: comm.Comm, job: rollout.RolloutJob) -> str:
    plain, calls = rollout._predict, 0

    def predict(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 and group.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args)

    rollout._predict = predict
    return rollout.roll_out(group, job)


def test_a_killed_process_leaves_the_frames_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", write(tmp_path / "a.h5"))
    out, run_in_processes = tmp_path / "out.vtkhdf", spawn.run_ranks
    monkeypatch.setattr(
        spawn, "run_ranks", lambda _, size, *args, **options: run_in_processes(_dying, size, *args, **options)
    )
    with pytest.raises(Failure, match="process 1 of 2 died"):
        rollout.run_rollout(run, parts=2, trajectory=0, steps=5, out=out)
    assert [frame.step for frame in Rollout(out)] == [0, 1, 2]
    assert not partial_path(out).exists()


KILLED = """
import sys, numpy as np
from pathlib import Path
from dist_egnn.evaluate.vtkhdf import RolloutWriter
n, x = 5000, np.zeros((5000, 3), np.float32)
meta = {"start": 0, "horizon": 1, "dt": 1.0, "true_frames": 10**6}
out = RolloutWriter(Path(sys.argv[1]), 100_000, n, meta, {}, None, 2, np.dtype(np.float32))
k = 0
while True:
    out.add(x + k, x - k, np.full(n, k), x + k, np.full((2, 3), k))
    k += 1
    if k == 5: print("going", flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.013, 0.05, 0.11])
def test_a_killed_writer_leaves_its_whole_frames(tmp_path: Path, delay: float) -> None:
    out = tmp_path / "out.vtkhdf"
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"going\n"
        time.sleep(delay)
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    with pytest.raises(Failure, match=r"no such file; .*out\.vtkhdf\.partial was left"):
        Rollout(out)
    with Rollout(partial_path(out)) as found:
        count = len(found)
        assert count >= 5
        for k in (0, 1, count // 2, count - 1):
            frame = found[k]
            assert (frame.position == k).all()
            assert (frame.velocity == -k).all()
            assert (frame.part == k).all()
            assert k == 0 or (frame.virtual == k).all()
            assert frame.error is not None
            assert (frame.error == k).all()
    assert finish(out) == count
    with Rollout(out) as found:
        assert len(found) == count
        assert (found[count - 1].position == count - 1).all()
    assert out.stat().st_size < 5000 * 40 * count + 10**6


def test_from_the_command_line(tmp_path: Path, distegnn: Callable[..., Ran]) -> None:
    """With relative paths; on a run that was trained on a store; the table."""
    data = write(tmp_path / "a.h5")
    arguments = ["--trajectory", 2, "--steps", 4, "--bounds", "reflect", "--fixed", "kind=2", "--out", "new/out.vtkhdf"]
    ran = distegnn("partition", "a.h5", f"data.horizon={HORIZON}", "--radius", 0.35, "--out", "store")
    assert ran.code == 0, ran.err
    run = make_run(tmp_path / "run", tmp_path / "store")
    ran = distegnn("rollout", "run", *arguments)
    assert ran.code == 2
    assert re.fullmatch(
        r"error: run: was trained on .*store, which was made from a file a\.h5; name .* --data\n", ran.err
    )
    ran = distegnn("rollout", "run", *arguments, "--data", "a.h5")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0] == "new/out.vtkhdf: 5 frames; the whole table is new/out.csv"
    assert [line.split()[0] for line in lines[3:]] == ["1", "2", "3", "4"]
    file = Trajectories(data)
    held = file.attribute(2, "kind") == 2
    with Rollout(tmp_path / "new" / "out.vtkhdf") as found:
        assert found.meta["trajectory"] == 2
        assert found.meta["fixed"] == ["kind", 2.0]
        np.testing.assert_array_equal(found.box, BOX)
        np.testing.assert_array_equal(found.attributes["mass"], file.attribute(2, "mass"))
        assert {len(np.unique(frame.part)) for frame in found} == {2}  # as many processes as the store has parts
        np.testing.assert_array_equal(found[4].position[held], file.position(2, 0)[held])
        assert (found[4].position[~held] != file.position(2, 0)[~held]).any()
    assert sorted(f.name for f in (tmp_path / "new").iterdir()) == ["out.csv", "out.vtkhdf"]
    assert run.is_dir()


def test_mistakes_are_told_before_any_work(tmp_path: Path) -> None:
    data = write(tmp_path / "a.h5", velocity=False, box=None)
    periodic = write(tmp_path / "p.h5", periodic=True)
    run = make_run(tmp_path / "run", data, "model.name=Linear")
    (tmp_path / "there.vtkhdf").touch()
    good: dict[str, Any] = {"trajectory": 0, "steps": 2, "out": tmp_path / "o.vtkhdf"}
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"trajectory": 3}, r"--trajectory 3: .*a\.h5 has trajectories 0 to 2"),
        ({"start": 11}, r"--start 11: .* can start at frames 0 to 10"),
        ({"steps": 0}, r"--steps 0: must be at least 1"),
        ({"repartition": 0}, r"--repartition 0: must be at least 1"),
        ({"bounds": "bounce"}, r"--bounds bounce: use one of none, reflect, clamp"),
        ({"bounds": "clamp"}, r"--bounds clamp: .* has no box"),
        ({"bounds": "clamp", "data": periodic}, r"--bounds clamp: .* is in a periodic box"),
        ({"fixed": "kind"}, r"--fixed kind: write ATTRIBUTE=VALUE"),
        ({"fixed": "kind=7"}, r"--fixed kind=7: .* has no such node"),
        ({"fixed": "sort=1"}, r"no node attribute 'sort'"),
        ({"out": tmp_path / "o.h5"}, r"must end in \.vtkhdf"),
        ({"out": tmp_path / "there.vtkhdf"}, r"there\.vtkhdf: exists"),
        ({"data": tmp_path / "b.h5"}, r"b\.h5: no such file"),
        ({"parts": 0}, r"parts=0: must be at least 1"),
        ({"parts": 61}, r"parts=61: more parts than the 60 nodes"),
    ]
    for wrong, says in mistakes:
        with pytest.raises(Failure, match=says):
            rollout.prepare(run, **{**good, **wrong})
    with pytest.raises(Failure, match="not a run"):
        rollout.prepare(tmp_path, **good)
    few = make_run(
        tmp_path / "few", data, "partition.parts=2", "partition.weights=[1,1000]", "partition.method=bisection"
    )
    with pytest.raises(Failure, match=r"partition\.weights=\[1,1000\]: process 0 would get 0\.06 of 60 nodes"):
        rollout.prepare(few, **good)
    assert rollout.prepare(run, **good, start=10)[0].start == 10
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.h5", "few", "p.h5", "run", "there.vtkhdf"]


def test_too_little_memory_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", write(tmp_path / "a.h5"))
    monkeypatch.setattr(memory, "available_memory", lambda *_: 0.3e9)
    with pytest.raises(Failure, match=r"a\.h5: a step .* takes about .* GB, 0\.3 GB are free; raise --parts"):
        rollout.run_rollout(run, trajectory=0, steps=1, out=tmp_path / "o.vtkhdf")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.h5", "run"]


def test_two_rollouts_to_one_file(tmp_path: Path) -> None:
    """The second is refused and harms nothing; a lock that a killed one left holds nobody up."""
    run, out = make_run(tmp_path / "run", write(tmp_path / "a.h5")), tmp_path / "new" / "out.vtkhdf"
    with filesystem.lock_output(out, "busy"):
        partial_path(out).write_text("of the first")
        with pytest.raises(
            Failure, match=r"out\.vtkhdf: another rollout is writing it; wait for it, or choose another"
        ):
            rollout.run_rollout(run, trajectory=0, steps=1, out=out)
        assert partial_path(out).read_text() == "of the first"
    out.with_name("out.vtkhdf.lock").touch()
    rollout.run_rollout(run, trajectory=0, steps=1, out=out)
    assert sorted(f.name for f in out.parent.iterdir()) == ["out.csv", "out.vtkhdf"]


def test_damaged_rollouts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.vtkhdf"
    path.write_bytes(b"text")
    with pytest.raises(Failure, match="not a readable HDF5 file"):
        Rollout(path)
    with h5py.File(path, "w") as file:
        file.create_group("VTKHDF")
    with pytest.raises(Failure, match="None version None"):
        Rollout(path)
    meta = {"start": 0, "horizon": 1, "dt": 1.0, "true_frames": 1}
    with pytest.raises(Failure, match="attribute 'part'"):
        RolloutWriter(path, 1, 2, meta, {"part": np.zeros(2)}, None, 0, np.dtype(np.float32))
    with h5py.File(partial_path(path), "r+") as file:
        del file["VTKHDF/NumberOfPoints"]
    with pytest.raises(Failure, match="damaged"):
        Rollout(partial_path(path))


@pytest.mark.parametrize("parts", [1, 2])
def test_vtk_itself_reads_every_step(tmp_path: Path, parts: int) -> None:
    """With vtkHDFReader, which is what ParaView opens such a file with: times, points, cells, every array."""
    vtk = pytest.importorskip("vtkmodules.vtkIOHDF", reason="vtk is not installed (pip install vtk)")
    from vtkmodules.util.numpy_support import vtk_to_numpy
    from vtkmodules.vtkCommonExecutionModel import vtkStreamingDemandDrivenPipeline as Pipeline

    run, path = make_run(tmp_path / "run", write(tmp_path / "a.h5")), tmp_path / "out.vtkhdf"
    frames = roll(run, path, parts=parts, start=3)  # so the data end before the rollout
    reader = vtk.vtkHDFReader()
    assert reader.CanReadFile(str(path))
    reader.SetFileName(str(path))
    reader.UpdateInformation()
    info = reader.GetOutputInformation(0)
    times = [info.Get(Pipeline.TIME_STEPS(), k) for k in range(info.Length(Pipeline.TIME_STEPS()))]
    assert times == [frame.time for frame in frames]
    assert [frame.error is None for frame in frames] == [False] * 3 + [True] * 3
    with Rollout(path) as found:
        attributes = found.attributes
    for k, frame in enumerate(frames):
        reader.SetStep(k)
        reader.Update()
        grid = reader.GetOutputDataObject(0)
        assert grid.GetClassName() == "vtkUnstructuredGrid"
        assert {grid.GetCellType(i) for i in range(grid.GetNumberOfCells())} == {1}  # vertices
        assert grid.GetNumberOfCells() == grid.GetNumberOfPoints() == 60
        np.testing.assert_array_equal(vtk_to_numpy(grid.GetPoints().GetData()), frame.position)
        data = grid.GetPointData()
        arrays = {data.GetArrayName(a): vtk_to_numpy(data.GetArray(a)) for a in range(data.GetNumberOfArrays())}
        nothing = np.full((60, 3), np.nan)
        wanted = {"velocity": frame.velocity, "part": frame.part, **attributes}
        wanted["error"] = nothing if frame.error is None else frame.error
        assert arrays.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_array_equal(arrays[name], value, err_msg=name)
    assert set(np.unique(frames[-1].part)) == set(range(parts))


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """docs/rollout.md's Python, its blocks one after the other, on a rollout of the name that the page gives it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rollout.md").read_text(), re.S)
    blocks = [block for block in blocks if "pyvista" not in block]
    frames = roll(make_run(tmp_path / "run", write(tmp_path / "a.h5")), tmp_path / "runs" / "rollout.vtkhdf")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec("\n".join(blocks), {})
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(said) == STEPS + 1 + 4  # frames 0, 3, 6 and 9 have a true one
    for k, (step, apart, densest, true) in enumerate(said[STEPS + 1 :]):
        frame = frames[k]
        y = frame.position - frame.error
        assert int(step) == k
        assert float(apart) == pytest.approx(sinkhorn.divergence(frame.position, y, blur=0.05), rel=1e-3)
        mass = Trajectories(tmp_path / "a.h5").attribute(0, "mass")
        for found, x in ((densest, frame.position), (true, y)):
            assert float(found) == pytest.approx(metrics.density(x, mass, 0.1).max(), rel=1e-3)
    assert float(said[-1][1]) > 0


def test_the_pages_pictures_by_pyvista(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One a step, none of them empty, each another; without a screen."""
    pytest.importorskip("pyvista", reason="pyvista is not installed (pip install pyvista)")
    (block,) = re.findall(r"```python\n(import pyvista.*?)```", (ROOT / "docs" / "rollout.md").read_text(), re.S)
    roll(make_run(tmp_path / "run", write(tmp_path / "a.h5")), tmp_path / "runs" / "rollout.vtkhdf")
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    pictures = sorted((tmp_path / "runs").glob("step-*.png"))
    assert len(pictures) == STEPS + 1
    assert len({picture.read_bytes() for picture in pictures}) == STEPS + 1
    assert all(picture.stat().st_size > 5000 for picture in pictures)
