"""The native kernels against the same maths in plain torch: values and gradients, every instruction set of this machine."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import build_native
import hypothesis.strategies as st
import pytest
import tiny_runs
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn.functional import silu

from dist_egnn.commands.train import run_training
from dist_egnn.config import Config
from dist_egnn.errors import Failure
from dist_egnn.ops import tiled_layer, tiling
from dist_egnn.ops.linear import linear, products_by
from dist_egnn.ops.native import library
from dist_egnn.ops.native.kernels import EdgeBlock, EdgeKernel, EdgeMeans, PairKernel, PairSums
from dist_egnn.ops.native.library import LEVELS as ALL_LEVELS
from dist_egnn.ops.native.library import Library, load
from dist_egnn.planning import doctor
from dist_egnn.train import trainer

LOADED = load()
if isinstance(LOADED, str):
    pytest.skip(f"native kernels: {LOADED}", allow_module_level=True)
BEST = LOADED.functions.processor_level()
LEVELS = ALL_LEVELS[: BEST + 1]


def draw_weights(draw: torch.Generator, hidden: int, count: int, dtype: torch.dtype) -> list[Tensor]:
    """w2, b2, wx, bx, w of ``count`` coordinate MLPs."""
    shapes = [(hidden, hidden), (hidden,), (count * hidden, hidden), (count * hidden,), (count, hidden)]
    return [(torch.randn(shape, generator=draw, dtype=torch.float64) * 0.3).to(dtype) for shape in shapes]


def coordinate_mlps(m: Tensor, wx: Tensor, bx: Tensor, w: Tensor) -> list[Tensor]:
    hidden = m.shape[-1]
    return [
        silu(m @ wx[k * hidden : (k + 1) * hidden].t() + bx[k * hidden : (k + 1) * hidden]) @ w[k : k + 1].t()
        for k in range(len(w))
    ]


def plain_edges(block: EdgeBlock, normalize: bool, tensors: list[Any]) -> tuple[Tensor, Tensor]:
    """mean dx and mean m of EdgeMeans by whole-graph operations."""
    p, q, x_dst, x_src, e, shift, w_s, w2, b2, *coordinate = tensors
    degree = block.start.diff().long()
    i, j = torch.repeat_interleave(torch.arange(len(p)), degree), block.source.long()
    r = x_dst[i] - x_src[j] - (0 if shift is None else shift)
    squared = (r * r).sum(1, keepdim=True)
    scalars = squared if e is None else torch.cat([squared, e], 1)
    m = silu(silu(p[i] + q[j] + scalars @ w_s.t()) @ w2.t() + b2)
    (scale,) = coordinate_mlps(m, *coordinate)
    if normalize:
        r = r / (squared.detach().sqrt() + 1e-8)
    per_node = degree.clamp(min=1)[:, None]
    return tuple(t.new_zeros(len(p), t.shape[1]).index_add(0, i, t) / per_node for t in (r * scale, m))  # type: ignore[return-value]


def plain_pairs(graph: Tensor | None, tensors: list[Any]) -> tuple[Tensor, ...]:
    """The results of PairSums by whole-graph operations."""
    p, x, z, u, w_d, w2, b2, *coordinate = tensors
    index = torch.zeros(len(x), dtype=torch.long) if graph is None else graph.long()
    r = x[:, None] - z[index]
    distance = torch.linalg.vector_norm(r, dim=2, keepdim=True)
    first = u[index] + distance * w_d.view(-1) + (0 if p is None else p[:, None])
    m = silu(silu(first) @ w2.t() + b2)
    to_x, to_z = coordinate_mlps(m, *coordinate)
    sums = [t.new_zeros(len(z), *t.shape[1:]).index_add(0, index, t) for t in (-r * to_z, m)]
    dx = (r * to_x).sum(1) / z.shape[1]
    return (dx, sums[0]) if p is None else (dx, sums[0], m.sum(1) / z.shape[1], sums[1])


def edge_case(
    seed: int, n: int, sources: int, edges: int, hidden: int, attributes: int, dtype: torch.dtype, periodic: bool
) -> Any:
    """A block with destinations without edges, coincident ends, and leaves for its gradients."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    dst = torch.randint(n, (edges,), generator=draw).sort().values
    start = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(dst, minlength=n).cumsum(0)])
    block = EdgeBlock(start.int(), torch.randint(sources, (edges,), generator=draw).int())
    x = normal(max(n, sources), 3)
    tensors = [normal(n, hidden), normal(sources, hidden), x[:n].clone(), x[:sources].clone()]
    tensors += [normal(edges, attributes) if attributes else None, 0.1 * normal(edges, 3) if periodic else None]
    tensors += [normal(hidden, 1 + attributes) * 0.3, *draw_weights(draw, hidden, 1, dtype)]
    return block, tensors


def compare(results: Any, expected: Any, leaves: list[Tensor], reference: list[Tensor], tolerance: float) -> None:
    """Values and gradients of a random functional, relative to the largest of each kind."""
    draw = torch.Generator().manual_seed(9)
    weights = [torch.randn(t.shape, generator=draw, dtype=torch.float64) for t in expected]
    for found, right in zip(results, expected, strict=True):
        assert (
            (found.double() - right).abs().max() <= tolerance * right.abs().max().clamp(min=1e-3)
            if right.numel()
            else True
        )
    ours = torch.autograd.grad([(t.double() * w).sum() for t, w in zip(results, weights, strict=True)], leaves)
    theirs = torch.autograd.grad([(t * w).sum() for t, w in zip(expected, weights, strict=True)], reference)
    largest = max(float(g.abs().max()) for g in theirs if g.numel())
    for g, right in zip(ours, theirs, strict=True):
        if g.numel():
            assert (g.double() - right).abs().max() <= tolerance * largest


def leaves_of(tensors: list[Any], *, skip: int | None = None) -> tuple[list[Any], list[Any]]:
    """The tensors as leaves, and copies in float64 as leaves; tensor ``skip`` has no gradient."""
    ours = [t if t is None or k == skip else t.detach().requires_grad_() for k, t in enumerate(tensors)]
    reference = [t if t is None or k == skip else t.detach().double().requires_grad_() for k, t in enumerate(tensors)]
    return ours, [t.double() if k == skip and t is not None else t for k, t in enumerate(reference)]


def check_edges(library: Library, case: Any, normalize: bool, tolerance: float, low: bool = False) -> None:
    block, tensors = case
    ours, reference = leaves_of(tensors, skip=5)
    kernel = EdgeKernel(library, block, normalize, low, True)
    wanted = [k for k, t in enumerate(ours) if t is not None and t.requires_grad]
    results = EdgeMeans.apply(kernel, *ours)
    compare(
        results,
        plain_edges(block, normalize, reference),
        [ours[k] for k in wanted],
        [reference[k] for k in wanted],
        tolerance,
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", [16, 48, 64, 112, 256])
def test_edges(level: str, dtype: torch.dtype, hidden: int) -> None:
    case = edge_case(hidden, 40, 60, 500, hidden, 2, dtype, periodic=hidden == 48)
    check_edges(Library(level), case, normalize=hidden == 64, tolerance=1e-12 if dtype == torch.float64 else 1e-5)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    n=st.integers(1, 30),
    sources=st.integers(1, 30),
    edges=st.integers(0, 300),
    hidden=st.sampled_from(range(16, 257, 16)),
    attributes=st.integers(0, 4),
    periodic=st.booleans(),
    normalize=st.booleans(),
)
def test_edges_of_any_shape(seed, n, sources, edges, hidden, attributes, periodic, normalize):
    """Also no edge, one node, isolated nodes, coincident nodes."""
    assert isinstance(LOADED, Library)
    check_edges(
        LOADED, edge_case(seed, n, sources, edges, hidden, attributes, torch.float64, periodic), normalize, 1e-11
    )


def pair_case(seed: int, n: int, graphs: int, count: int, hidden: int, dtype: torch.dtype, features: bool) -> Any:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    graph = torch.randint(graphs, (n,), generator=draw).sort().values.int() if graphs > 1 else None
    x, z = normal(n, 3), normal(graphs, count, 3)
    if n:
        z[0, 0] = x[0]  # a node that coincides with a virtual node
    tensors = [normal(n, hidden) if features else None, x, z, normal(graphs, count, hidden), normal(hidden, 1)]
    return graph, [*tensors, *draw_weights(draw, hidden, 2, dtype)]


def check_pairs(library: Library, case: Any, features: bool, tolerance: float) -> None:
    graph, tensors = case
    ours, reference = leaves_of(tensors)
    wanted = [k for k, t in enumerate(ours) if t is not None]
    results = PairSums.apply(PairKernel(library, graph, False, features), *ours)
    compare(
        results, plain_pairs(graph, reference), [ours[k] for k in wanted], [reference[k] for k in wanted], tolerance
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", [16, 64, 80])
def test_pairs(level: str, dtype: torch.dtype, hidden: int) -> None:
    case = pair_case(hidden, 150, 3, 3, hidden, dtype, True)
    check_pairs(Library(level), case, True, 1e-12 if dtype == torch.float64 else 1e-5)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    n=st.integers(0, 80),
    graphs=st.integers(1, 4),
    count=st.integers(1, 16),
    hidden=st.sampled_from([16, 32, 64, 96]),
    features=st.booleans(),
)
def test_pairs_of_any_shape(seed: int, n: int, graphs: int, count: int, hidden: int, features: bool) -> None:
    assert isinstance(LOADED, Library)
    check_pairs(LOADED, pair_case(seed, n, graphs, count, hidden, torch.float64, features), features, 1e-11)


def test_gradients_alone_need_no_other_results() -> None:
    assert isinstance(LOADED, Library)
    graph, tensors = pair_case(1, 50, 2, 3, 16, torch.float64, True)
    both = []
    for gradients_only in (False, True):
        leaves = [t.detach().requires_grad_() for t in tensors]
        results = PairSums.apply(PairKernel(LOADED, graph, False, True, gradients_only), *leaves)
        assert [t.isnan().all().item() for t in results] == [gradients_only, gradients_only, False, gradients_only]
        weights = [torch.ones_like(t) for t in results]
        both.append([results[2], *torch.autograd.grad(results, leaves, weights)])
    assert all(map(torch.equal, *both))


@pytest.mark.parametrize("where", range(12))
@pytest.mark.parametrize("low", [False, True])
def test_nan_in_is_nan_out(where: int, low: bool) -> None:
    """In results and in gradients, whichever input it is."""
    assert isinstance(LOADED, Library)
    block, tensors = edge_case(3, 5, 5, 40, 16, 1, torch.float32, True)
    _, pairs = pair_case(3, 5, 1, 3, 16, torch.float32, True)
    kernels = EdgeKernel(LOADED, block, False, low, True), PairKernel(LOADED, None, low, True)
    for function, kernel, inputs in zip((EdgeMeans, PairSums), kernels, (tensors, pairs), strict=True):
        if where < len(inputs):
            inputs[where].view(-1)[3 if function is PairSums or where < 4 else 0] = float("nan")
            results = function.apply(kernel, *[t.requires_grad_() for t in inputs])  # type: ignore[attr-defined]
            assert results[0].isnan().any()
            sum(t.sum() for t in results).backward()
            assert any(t.grad.isnan().any() for t in inputs[-3:])


@pytest.mark.skipif(not getattr(LOADED, "bfloat16", False), reason="the processor multiplies no bfloat16")
def test_products_in_bfloat16_are_near_those_in_float() -> None:
    assert isinstance(LOADED, Library)
    case = edge_case(5, 40, 60, 500, 64, 2, torch.float32, periodic=False)
    check_edges(LOADED, case, False, 2e-2, low=True)
    with pytest.raises(AssertionError):
        check_edges(LOADED, case, False, 1e-5, low=True)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("widths", [(5,), (32,), (32, 16, 2)])
def test_products_with_columns_in_parts(widths: tuple[int, ...], biased: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(200, width) for width in widths] + [(48, sum(widths)), (48,)]
    tensors = [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]
    *parts, weight, bias = tensors
    inputs = parts[:1] + [part.detach() for part in parts[1:2]] + parts[2:]  # the second needs no gradient
    results = []
    for kernels in (None, LOADED):
        with products_by(kernels):
            y = linear(inputs, weight, bias if biased else None)
        results.append([y, *torch.autograd.grad(y.square().sum(), tensors, allow_unused=True)])
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-11)


def test_a_compiler_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves no library of another source."""
    for command, says in (("false", "false failed: exit code 1"), ("/nowhere/c++", "/nowhere/c\\+\\+: ")):
        (tmp_path / "message_mlp.base.so").touch()
        monkeypatch.setenv("CXX", command)
        with pytest.raises(RuntimeError, match=says) as failed:
            build_native.build(tmp_path)
        assert "\n" not in str(failed.value)
        assert [file.name for file in tmp_path.iterdir()] == [build_native.REASON]


def test_libraries_of_another_source_are_reported_and_not_used(tmp_path: Path, monkeypatch, capsys) -> None:
    changed = tmp_path / "message_mlp.cpp"
    changed.write_text(build_native.SOURCE.read_text() + "// changed")
    monkeypatch.setattr(library, "SOURCE", changed)
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    assert library.load() == library.STALE
    trainer.resolve_device(Config())
    assert re.search(r"warning: .*message_mlp\.cpp: run pip", capsys.readouterr().err)
    with pytest.raises(Failure, match=r"another version of message_mlp\.cpp"):
        doctor.try_native()


def test_training_with_any_number_of_threads_gives_the_same_bits(small, tmp_path, monkeypatch):
    monkeypatch.setattr(tiling, "MAX_UNTILED_BLOCKS", 0)
    counts, pool = [], tiled_layer._pool
    monkeypatch.setattr(tiled_layer, "_pool", lambda threads: (counts.append(threads), pool(threads))[1])
    keys = ["model.hidden=16", "model.layers=2", "model.tile=32", "model.engine=native", "train.epochs=2"]
    for threads in (1, 2, 3):
        run_training(tiny_runs.settings(small, tmp_path / str(threads), *keys, f"train.threads={threads}"))
    assert set(counts) == {2, 3}
    for threads in (2, 3):
        tiny_runs.assert_same(tmp_path / "1", tmp_path / str(threads))


def test_memory_errors_and_undefined_behaviour(tmp_path: Path) -> None:
    """The kernels in a program of its own, on buffers of exactly their size, under the sanitisers."""
    compiler = build_native.compiler()
    if not shutil.which(compiler[0]):
        pytest.skip(f"{compiler[0]}: not found")
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        f"-I{build_native.SOURCE.parent}",
    ]
    program = [str(Path(__file__).with_name("native_sanitizer.cpp")), "-o", str(tmp_path / "program")]
    compiled = subprocess.run([*compiler, *flags, *program], capture_output=True, text=True, check=False)
    if compiled.returncode and "sanitize" in compiled.stderr + "asan" * ("asan" in compiled.stderr):
        pytest.skip("the compiler has no sanitisers")
    assert compiled.returncode == 0, compiled.stderr
    ran = subprocess.run([tmp_path / "program"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == "done"


def test_structures_have_the_compilers_sizes() -> None:
    assert isinstance(LOADED, Library)
    from dist_egnn.ops.native import kernels

    LOADED.functions.size_of_arguments.restype = ctypes.c_int64
    for which, structure in enumerate((kernels.EDGES, kernels.PAIRS, kernels.LINEAR)):
        assert LOADED.functions.size_of_arguments(which) == ctypes.sizeof(structure)
