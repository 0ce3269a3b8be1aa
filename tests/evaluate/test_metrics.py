"""Each measure against its formula written out; over partitions; its symmetries."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from dist_egnn.distributed import comm, spawn
from dist_egnn.errors import Failure
from dist_egnn.evaluate import metrics, sinkhorn


def clouds(n: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Positions, true positions, velocities (n, 3) and masses (n,)."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(n, 3)) + 3
    return x, x + 0.3 * draw.normal(size=(n, 3)), draw.normal(size=(n, 3)), draw.uniform(0.5, 2, n)


def values(x: Any, y: Any, v: Any, m: Any, group: comm.Comm | None = None) -> dict[str, float]:
    errors = (metrics.position_mse, metrics.mean_absolute_error, metrics.displacement_error, metrics.rmsd)
    result = {function.__name__: function(x, y, comm=group) for function in errors}
    result["static"], result["linear"] = metrics.baselines(x, v, 0.7, y, group)
    return result | {
        "energy": metrics.kinetic_energy(v, m, group),
        "energy of ones": metrics.kinetic_energy(v, comm=group),
        "gyration": metrics.radius_of_gyration(x, m, group),
        "weighted rmsd": metrics.rmsd(x, y, m, group),
    }


def test_formulas_written_out() -> None:
    x, y, v, m = clouds()
    n, nodes, axes = len(x), range(len(x)), range(3)
    every = list(itertools.product(nodes, axes))
    squares = sum((x[i, k] - y[i, k]) ** 2 for i, k in every)
    centre = sum(m[i] * x[i] for i in nodes) / sum(m)
    expected = {
        "position_mse": squares / (3 * n),
        "mean_absolute_error": sum(abs(x[i, k] - y[i, k]) for i, k in every) / (3 * n),
        "displacement_error": sum(np.sqrt(sum((x[i, k] - y[i, k]) ** 2 for k in axes)) for i in nodes) / n,
        "static": squares / (3 * n),
        "linear": sum((x[i, k] + 0.7 * v[i, k] - y[i, k]) ** 2 for i, k in every) / (3 * n),
        "energy": sum(m[i] * v[i, k] ** 2 for i, k in every) / 2,
        "energy of ones": sum(v[i, k] ** 2 for i, k in every) / 2,
        "gyration": np.sqrt(sum(m[i] * (x[i, k] - centre[k]) ** 2 for i, k in every) / sum(m)),
    }
    result = values(x, y, v, m)
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def aligned(x: np.ndarray, y: np.ndarray, m: np.ndarray) -> float:
    """RMSD by SciPy's own solver of Wahba's problem."""
    x, y = x - m @ x / m.sum(), y - m @ y / m.sum()
    return float(Rotation.align_vectors(y, x, weights=m)[1] / np.sqrt(m.sum()))


@pytest.mark.parametrize("seed", range(5))
def test_rmsd_is_the_best_of_all_rotations(seed: int) -> None:
    x, y, _, m = clouds(seed=seed)
    assert metrics.rmsd(x, y, m) == pytest.approx(aligned(x, y, m), rel=1e-9)
    turned = Rotation.random(random_state=seed).apply(x) + np.array([5.0, -2, 1])
    assert metrics.rmsd(turned, y, m) == pytest.approx(metrics.rmsd(x, y, m), rel=1e-9)
    assert metrics.rmsd(turned, x) < 1e-6
    mirror = x * [1, 1, -1]  # no rotation makes it x
    assert metrics.rmsd(mirror, x, m) == pytest.approx(aligned(mirror, x, m), rel=1e-9)
    assert metrics.rmsd(mirror, x, m) > 0.1
    flat = x * [1, 1, 0]
    assert metrics.rmsd(flat * [-1, 1, 1], flat) < 1e-6  # a turn about an axis in the plane does that
    assert metrics.rmsd(flat[:1], flat[1:2]) == 0


def test_tensors_and_arrays_alike() -> None:
    arrays = clouds()
    assert values(*map(torch.from_numpy, arrays)) == values(*arrays)
    x = arrays[0].astype(np.float32)
    assert metrics.position_mse(torch.tensor(x, requires_grad=True), arrays[1]) == metrics.position_mse(x, arrays[1])


def _shares(group: comm.Comm) -> dict[str, float]:
    return values(*(array[group.rank :: group.size] for array in clouds(41)), group)


def test_partitions_give_the_value_of_the_whole() -> None:
    whole = values(*clouds(41))
    assert spawn.run_ranks(_shares, 3) == [pytest.approx(whole, rel=1e-12)] * 3
    parts = values(*(array[0::3] for array in clouds(41)))
    assert all(parts[name] != pytest.approx(whole[name], rel=1e-3) for name in whole)  # so it took all three


def test_density_by_all_pairs() -> None:
    draw = np.random.default_rng(0)
    x, m, support = draw.uniform(size=(150, 3)), draw.uniform(0.5, 2, 150), 0.3

    def kernel(r: float) -> float:
        q, k = r / support, 8 / (np.pi * support**3)
        return k * (6 * (q**3 - q**2) + 1) if q <= 0.5 else k * 2 * (1 - q) ** 3 if q <= 1 else 0.0

    expected = [sum(m[j] * kernel(float(np.linalg.norm(x[i] - x[j]))) for j in range(150)) for i in range(150)]
    np.testing.assert_allclose(metrics.density(x, m, support), expected, rtol=1e-12)
    r = np.linspace(0, support, 2001)
    w = [kernel(a) for a in r]
    assert np.trapezoid(4 * np.pi * r**2 * w, r) == pytest.approx(1, rel=1e-5)  # the kernel is a density itself


def test_density_of_a_lattice_is_its_own() -> None:
    x = 0.05 * np.array(list(itertools.product(range(11), repeat=3)))
    inner = (np.abs(x - 0.25) < 0.04).all(1)
    np.testing.assert_allclose(metrics.density(x, np.full(len(x), 1000 * 0.05**3), 0.1)[inner], 1000, rtol=0.03)
    support = metrics.density(x, None, 0.1)
    np.testing.assert_allclose(metrics.density(x, np.full(len(x), 2.0), 0.1), 2 * support)


def dense(x: np.ndarray, y: np.ndarray, blur: float, a: np.ndarray, b: np.ndarray) -> float:
    """OT_ε with its matrix: Σ π C + ε KL(π | a bᵀ) of Sinkhorn's plan π."""
    epsilon = blur**2
    cost = np.square(x[:, None] - y[None]).sum(2)
    kernel = np.exp(-cost / epsilon) * np.outer(a, b)
    u, w = np.ones(len(x)), np.ones(len(y))
    for _ in range(5000):
        u = a / (kernel @ w)
        w = b / (kernel.T @ u)
    plan = u[:, None] * kernel * w
    np.testing.assert_allclose(plan.sum(1), a, rtol=1e-8)
    return float((plan * cost).sum() + epsilon * (plan * np.log(plan / np.outer(a, b))).sum())


@pytest.mark.parametrize("n", [20, 150])
def test_sinkhorn_against_the_matrix(n: int) -> None:
    """Also where a cloud is one block, and with clouds of two sizes and weights."""
    draw = np.random.default_rng(n)
    x, y = draw.uniform(size=(n, 3)), 0.8 * draw.uniform(size=(2 * n - 3, 3)) ** 2
    a, b = draw.uniform(0.5, 2, len(x)), draw.uniform(0.5, 2, len(y))
    p, q = a / a.sum(), b / b.sum()
    expected = dense(x, y, 0.3, p, q) - (dense(x, x, 0.3, p, p) + dense(y, y, 0.3, q, q)) / 2
    assert sinkhorn.divergence(x, y, 0.3, (a, b), tolerance=1e-5) == pytest.approx(expected, rel=1e-5)
    assert sinkhorn.divergence(y, x, 0.3, (b, a)) == pytest.approx(expected, rel=1e-3)
    again = sinkhorn.divergence(torch.from_numpy(x), x[::-1].copy(), 0.3, tolerance=1e-4)
    assert again == pytest.approx(0, abs=1e-6 * expected)


def test_sinkhorn_leaves_out_only_what_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blur, 94 blocks: most pairs are left out, and the sums are those of all pairs."""
    draw = np.random.default_rng(1)
    clouds = (draw.uniform(size=(n, 3)) for n in (3000, 2800))
    one, two = (sinkhorn._cloud(x, None, np.zeros(3), torch.device("cpu")) for x in clouds)
    g, epsilon = 0.1 * two.x[:, 0] ** 2, 0.02**2  # smooth, as potentials are
    computed: list[int] = []
    plain = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda c, x, y: (computed.append(x.shape[0] * y.shape[1]), plain(c, x, y))[1])
    result = sinkhorn._softmin(one, two, g, epsilon, comm.SingleProcess())
    cost = torch.cdist(one.x, two.x, compute_mode="donot_use_mm_for_euclid_dist").square()
    expected = -epsilon * torch.logsumexp(two.log_weight + (g - cost) / epsilon, 1)
    assert float((result - expected).abs().max()) < 1e-6 * epsilon
    assert sum(computed) < 0.5 * 3000 * 2800


@pytest.mark.parametrize("blur", [0.1, 0.5])
def test_sinkhorn_of_a_shift_is_its_square(blur: float) -> None:
    x = np.random.default_rng(2).uniform(size=(400, 3))
    distance = sinkhorn.divergence(x, x + np.array([0.03, 0, 0.04]), blur, tolerance=1e-4)
    assert distance == pytest.approx(0.05**2, rel=1e-3)


def _shared(group: comm.Comm) -> float:
    x, y, *_ = clouds(100)
    return sinkhorn.divergence(x, y, 0.5, comm=group)


def test_sinkhorn_shares_its_work() -> None:
    alone = _shared(comm.SingleProcess())
    assert spawn.run_ranks(_shared, 2) == [pytest.approx(alone, rel=1e-9)] * 2


def test_sinkhorn_says_when_it_has_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinkhorn, "LIMIT", 3)
    x, y, *_ = clouds(100)
    with pytest.warns(UserWarning, match=r"after 3 iterations .*larger blur"):
        sinkhorn.divergence(x, y, 0.05, tolerance=1e-6)


def test_wrong_shapes_are_refused() -> None:
    x, y, v, m = clouds()
    for call, message in (
        (lambda: metrics.position_mse(x, y[1:]), r"shapes \(40, 3\) and \(39, 3\)"),
        (lambda: metrics.rmsd(x, y, m[1:]), r"mass has shape \(39,\), expected \(40,\)"),
        (lambda: metrics.kinetic_energy(v, m[:, None]), "mass has shape"),
        (lambda: metrics.density(x, m, 0.0), "support=0"),
        (lambda: sinkhorn.divergence(x, y, 0.0), "blur=0"),
        (lambda: sinkhorn.divergence(x[:0], y, 1.0), r"shape \(0, 3\)"),
        (lambda: sinkhorn.divergence(x * np.nan, y, 1.0), "NaN"),
        (lambda: sinkhorn.divergence(x, y, 1.0, (m - 1, m)), "positive"),
    ):
        with pytest.raises(Failure, match=message):
            call()
