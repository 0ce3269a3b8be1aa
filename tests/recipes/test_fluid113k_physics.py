"""recipes/fluid113k: the physical checks of a trajectory and check.py."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from fluid113k import BOX, MASS, RADIUS, RECIPE, block, check, physics, prepare

from dist_egnn.data.trajectories import Writer


def test_density_of_a_block_and_of_one_too_dense():
    position, velocity = block()
    mass = np.full(len(position[0]), MASS)
    assert physics.inner_density(position[0], mass, BOX, RADIUS) == pytest.approx(1000, rel=0.01)
    assert physics.trajectory_violations(position, velocity, mass, BOX, RADIUS) == []
    (violation,) = physics.trajectory_violations(position, velocity, 1.1 * mass, BOX, RADIUS)
    assert violation.startswith("density 11")
    thin = position[0][position[0][:, 1] < 1.65]
    assert np.isnan(physics.inner_density(thin, mass[: len(thin)], BOX, RADIUS))


def test_energy_gain():
    position, velocity = block()
    mass = np.full(len(position[0]), MASS)
    energies = physics.energy(position, velocity, mass, 0.5)
    height = position[0, :, 1].mean() - 0.5
    np.testing.assert_allclose(energies, mass.sum() * 9.81 * height, rtol=1e-5)
    assert physics.energy_gain(np.array([10.0, 4.0, 4.5, 3.0, 3.8])) == pytest.approx(0.08)
    (violation,) = physics.trajectory_violations(position, 1.5 * velocity, mass, BOX, RADIUS)
    assert violation.startswith("energy rises by")


def test_first_outside():
    position = block()[0]
    assert physics.first_outside(position, BOX) is None
    position[3, 17, 1] = 2.6
    position[5, 2, 0] = -9
    assert physics.first_outside(position, BOX) == (3, 17)


def test_the_sample_passes():
    with h5py.File(RECIPE / "sample.h5") as file:
        for group in file["trajectories"].values():
            position, box, mass = group["position"][()], group["box"][()], group["attributes/mass"][()]
            assert physics.first_outside(position, box) is None
            for t in (0, 30, 45, 59):
                assert physics.inner_density(position[t], mass, box, RADIUS) == pytest.approx(1000, rel=0.01)
            velocity = np.diff(position, axis=0) / group.attrs["dt"]
            fall = np.diff(velocity[:6].mean(1, dtype=float), axis=0).mean(0) / group.attrs["dt"]
            np.testing.assert_allclose(fall, group.attrs["gravity"], atol=0.2)  # rounded positions
            middle = (position[1:] + position[:-1]) / 2
            assert physics.energy_gain(physics.energy(middle, velocity, mass, 0.0)) < 0.001


@pytest.fixture
def checked(tmp_path, capsys):
    """checked(position, velocity, mass=…): exit code, output and warnings of check.py for this file."""

    def run_on(position, velocity, mass=MASS, *options):
        path = tmp_path / "x.h5"
        with Writer(path, {}) as out:
            masses = {"mass": np.full(position.shape[1], mass)}
            out.add(position, velocity=velocity, attributes=masses, box=BOX, dt=0.02, split="train", source="test")
        try:
            code = prepare.preparation.main(check.run, [str(word) for word in (path, *options)])
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run_on


def test_check_passes_a_valid_file(checked, tmp_path):
    position, velocity = block()
    for given in (velocity, None):
        code, output, warnings = checked(position, given, MASS, "--picture", tmp_path / "x.png")
        assert (code, warnings) == (0, "")
        row = output.splitlines()[1].split()
        assert row[1:5] == ["train", "1728", "20", "0.380"]
        assert float(row[5]) == pytest.approx(1e3 * (position - BOX[0]).min(), abs=0.1)
        assert float(row[6]) == pytest.approx(1000, rel=0.01)
        assert row[7:9] == ["100.0%", "0.000%"]
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "x.png").unlink()


def test_check_reports_violations(checked):
    position, velocity = block()
    position[7, 3] = -1
    code, _, warnings = checked(position, 1.5 * velocity, 1.1 * MASS)
    assert code == 1
    outside, density, energy = warnings.splitlines()
    assert outside == "warning: trajectory 0: a particle is outside the box"
    assert density.startswith("warning: trajectory 0: density 11")
    assert energy.startswith("warning: trajectory 0: energy rises by")


def test_a_file_of_another_recipe_is_one_line(tmp_path, capsys):
    with Writer(tmp_path / "x.h5", {}) as out:
        out.add(np.zeros((3, 2, 3)), dt=1.0, split="train", source="test")
    assert prepare.preparation.main(check.run, [str(tmp_path / "x.h5")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'x.h5'}: trajectory 0 has no box")
