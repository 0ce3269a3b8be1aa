"""Samples from trajectories: which frames are selected, which features they have, and errors for bad settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_egnn.data.graphs import radius_edges
from dist_egnn.data.samples import SampleSpec, Snapshot, node_fields, read_sample, select_snapshots
from dist_egnn.data.trajectories import Trajectories, Writer
from dist_egnn.errors import Failure


def write(path: Path, *positions: np.ndarray, **more: object) -> Trajectories:
    with Writer(path, {}) as out:
        for position in positions:
            out.add(position, split="train", dt=0.5, source="test", **more)
    return Trajectories(path)


def test_every_frame_that_has_a_target(small):
    splits = ("train", "train", "valid", "test")
    every = [Snapshot(split, k, t) for k, split in enumerate(splits) for t in range(11)]
    assert select_snapshots(Trajectories(small), 3, 0, 0, -1, 0) == every


RANGES = [(1, 0, -1, range(13)), (13, 0, -1, range(1)), (3, 4, -1, range(4, 11)), (3, 2, 5, range(2, 6))]


@pytest.mark.parametrize(("horizon", "first", "last", "allowed"), [*RANGES, (3, 9, 99, (9, 10))])
def test_frames_stay_in_range(small, horizon, first, last, allowed):
    data = Trajectories(small)
    assert {s.frame for s in select_snapshots(data, horizon, 0, first, last, 0)} == set(allowed)
    for count in range(1, len(allowed) + 3):
        for k in range(4):
            drawn = [s.frame for s in select_snapshots(data, horizon, count, first, last, 7) if s.trajectory == k]
            assert len(drawn) == min(count, len(allowed))
            assert drawn == sorted(set(drawn))
            assert set(drawn) <= set(allowed)


def test_frames_depend_on_seed_and_trajectory_number_only(small, tmp_path):
    def drawn(data: Trajectories, seed: int) -> list[list[int]]:
        selected = select_snapshots(data, 2, 4, 0, -1, seed)
        return [[s.frame for s in selected if s.trajectory == k] for k in range(len(data))]

    data = Trajectories(small)
    assert drawn(data, 0) == drawn(data, 0) != drawn(data, 1)
    assert len(set(map(tuple, drawn(data, 0)))) > 1  # trajectories have different draws
    assert (
        drawn(write(tmp_path / "t.h5", *np.zeros((2, 14, 3, 3)), velocity=np.zeros((14, 3, 3))), 0)
        == drawn(data, 0)[:2]
    )


@pytest.mark.parametrize(("horizon", "first", "last"), [(14, 0, -1), (3, 11, -1), (3, 6, 5), (0, 0, -1)])
def test_no_frame_is_left(small, horizon, first, last):
    message = rf"trajectory 0 has 14 frames.*{horizon} frames ahead.*lower data\.horizon|data\.horizon=0"
    with pytest.raises(Failure, match=message):
        select_snapshots(Trajectories(small), horizon, 0, first, last, 0)


def test_sample_has_the_fields_of_its_frames(tmp_path):
    draw = np.random.default_rng(0)
    position, velocity = draw.uniform(size=(2, 9, 30, 3)).astype(np.float32)
    charge, mass = (draw.normal(size=(2, 30)) * [[3], [1]]).astype(np.float32)
    data = write(tmp_path / "t.h5", position, velocity=velocity, attributes={"charge": charge, "mass": mass})
    spec = SampleSpec(0.4, 5, ("speed", "charge/max", "charge", "speed/max"), ("mass", "charge"), 0.25)
    graph = read_sample(data, Snapshot("train", 0, 2), spec)
    speed = np.linalg.norm(velocity[2], axis=1)
    expected = {
        "x": position[2],
        "v": velocity[2],
        "y": position[7],
        "f": np.stack([speed, charge / np.abs(charge).max(), charge, speed / speed.max()], 1),
        "a": np.stack([mass, charge], 1),
        "gid": np.arange(30),
    }
    assert set(graph.ndata) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(graph.ndata[name], value, rtol=1e-6, err_msg=name)
        assert graph.ndata[name].dtype == (torch.int64 if name == "gid" else torch.float32)
    assert graph.num_edges() == round(0.75 * len(radius_edges(position[2], 0.4)[0]))
    assert float(graph.edata["e"].max()) <= 0.4


def test_features_are_optional_and_a_zero_scale_is_harmless(tmp_path):
    x = np.random.default_rng(0).normal(size=(6, 5, 3))
    data, snapshot = write(tmp_path / "t.h5", x, attributes={"charge": np.zeros(5)}), Snapshot("train", 0, 1)
    graph = read_sample(data, snapshot, SampleSpec(1.0, 1, ()))
    assert graph.ndata["f"].shape == graph.ndata["a"].shape == (5, 0)
    fields = node_fields(data, snapshot, SampleSpec(1.0, 1, ("charge/max",)))
    np.testing.assert_array_equal(fields["f"], np.zeros((5, 1)))


def test_unknown_features(small):
    for features, attributes, message in (
        (("charge",), (), "no node attribute 'charge' .*mass, viscosity"),
        ((), ("masss",), "no node attribute 'masss'"),
        (("mass/min",), (), "feature 'mass/min': .*'/max'"),
        (("",), (), "no node attribute ''"),
    ):
        with pytest.raises(Failure, match=message):
            read_sample(Trajectories(small), Snapshot("train", 0, 0), SampleSpec(0.3, 1, features, attributes))
