"""Positions and edges → the part of every node: six methods behind `assign`, and what an assignment costs (`quality`).

Shapes: x (N, 3); src, dst (E,), an edge runs src→dst; a part vector (N,) int64 with values in 0…parts−1.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import dgl
import numpy as np
import torch
from scipy import sparse
from scipy.spatial import KDTree

from dist_egnn.data.graphs import morton_order
from dist_egnn.errors import Failure
from dist_egnn.utils import part_weights, resources

SLACK = 1.05  # the largest part of a balanced method, in mean parts
OFF = 0.02  # how far from its weight's share a part may be, of that: machines and their trainers together within 5%
M_PERTURB = -6  # <malloc.h>: fill memory on malloc (with the value's complement) and on free
LANDMARKS = 2000  # nodes that spectral clustering itself sees; its eigenvectors cost far more than the rest


Run = Callable[[np.ndarray, np.ndarray, np.ndarray, int, int, np.ndarray | None], np.ndarray]


class Method(NamedTuple):
    """One way to partition: its function (x, src, dst, parts, seed, sizes) → part, whether balance is forced, a help line,
    whether it reads the edges (src and dst may be empty else).

    sizes: wanted nodes of each part (parts,); None: equal ones, and always for a method that does not force balance.
    """

    run: Run
    balanced: bool
    help: str
    edges: bool = False


def check(method: str, parts: int, weights: Sequence[float] | None = None) -> None:
    """Raise Failure for an unknown method, parts < 1, and weights (as `shares.of` gives them) that the method cannot
    follow: what can be told before there are positions."""
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=1, cutoff=0.0)[0]
        raise Failure(f"partition method={method!r}: unknown; did you mean {near}? (one of {', '.join(METHODS)})")
    if parts < 1:
        raise Failure(f"parts={parts}: must be at least 1")
    if weights is None:
        return
    if not METHODS[method].balanced:
        able = [name for name, one in METHODS.items() if one.balanced]
        raise Failure(f"partition method={method}: does not follow weights; use {', '.join(able[:-1])} or {able[-1]}")
    if method == "metis" and importlib.util.find_spec("pymetis") is None:
        raise Failure(
            "partition method=metis: weights need pymetis, which is missing; pip install pymetis, or use bisection"
        )


def fits(nodes: int, parts: int, weights: Sequence[float] | None = None) -> None:
    """Raise Failure for more parts than nodes, and for a weight whose share is less than one node."""
    if nodes < parts:
        raise Failure(f"parts={parts}: more parts than the {nodes} nodes; use parts={nodes} or fewer")
    if weights is not None:
        part_weights.sizes(nodes, weights)


def assign(
    method: str,
    x: np.ndarray,
    src: np.ndarray,
    dst: np.ndarray,
    parts: int,
    seed: int = 0,
    weights: Sequence[float] | None = None,
) -> np.ndarray:
    """The part of every node, (N,) int64; no part is empty, and the same arguments give the same answer (METIS: with
    GLIBC_TUNABLES=glibc.malloc.tcache_count=0, as under `distegnn`; without, another one for some small graphs, now and then).

    The largest part of a balanced method (METHODS) has at most ⌈1.05·N/parts⌉ nodes. With weights, one a part, each part
    of a balanced method is within ⌈2%⌉ of its share of the nodes; equal weights change nothing else. Raises Failure where
    `check`, `shares.of` and `shares.sizes` do, for N < parts and for positions that are not finite.
    """
    unequal = part_weights.of(weights, parts)
    check(method, parts, unequal)
    x = np.asarray(x, dtype=np.float64)
    fits(len(x), parts)
    if not np.isfinite(x).all():
        raise Failure("positions are NaN or infinite: no partition can be made; mend the source data")
    if parts == 1:  # METIS kills the process (SIGFPE) here
        return np.zeros(len(x), np.int64)
    sizes = None if weights is None else part_weights.sizes(len(x), weights)
    part = METHODS[method].run(x, src, dst, parts, seed, sizes if unequal else None).astype(np.int64)
    fill_empty(x, part, parts)
    if not METHODS[method].balanced:
        return part
    if sizes is None:
        level(x, part, np.full(parts, math.ceil(SLACK * len(x) / parts)))
    elif (np.abs(np.bincount(part, minlength=parts) - sizes) > np.ceil(OFF * sizes)).any():
        level(x, part, sizes)
    return part


def fill_empty(x: np.ndarray, part: np.ndarray, parts: int) -> None:
    """Give each empty part half of the part that is largest by then, cut across its longest axis; in place."""
    counts = np.bincount(part, minlength=parts)
    for empty in np.flatnonzero(counts == 0):
        largest = counts.argmax()
        _, given = halves(x, np.flatnonzero(part == largest), counts[largest] // 2)
        part[given] = empty
        counts[largest] -= len(given)
        counts[empty] = len(given)


def level(x: np.ndarray, part: np.ndarray, caps: np.ndarray) -> None:
    """Move nodes out of parts larger than their caps (parts,) until none is, in place; given Σ caps ≥ N and no empty part.

    Each round takes the part furthest above its cap and the nearest one with room, and moves the nodes nearest to the
    latter's centroid. A round mends its part or fills its neighbour, so there are fewer than 2 · parts rounds.
    """
    parts = len(caps)
    counts = np.bincount(part, minlength=parts)
    while (counts > caps).any():
        centroid = np.stack([np.bincount(part, axis, parts) for axis in x.T], 1) / counts[:, None]
        largest, room = (counts - caps).argmax(), np.flatnonzero(counts < caps)
        to = room[((centroid[room] - centroid[largest]) ** 2).sum(1).argmin()]
        moved = min(counts[largest] - caps[largest], caps[to] - counts[to])
        nodes = np.flatnonzero(part == largest)
        distance = ((x[nodes] - centroid[to]) ** 2).sum(1)
        part[nodes[np.argsort(distance, kind="stable")[:moved]]] = to
        counts[largest] -= moved
        counts[to] += moved


def halves(x: np.ndarray, nodes: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the nodes across their longest axis: the first `first` along it, and the rest.

    Nodes level with the cut (a lattice plane) are taken in the order of the other axes, then of their ids, so that
    the cut stays straight and the sizes exact.
    """
    box = x[nodes]
    axis = int(np.ptp(box, 0).argmax())
    along = box[:, axis]
    cut = np.partition(along, first)[first]
    left = along < cut
    tied = np.flatnonzero(along == cut)
    order = np.lexsort((box[tied, axis - 2], box[tied, axis - 1]))
    left[tied[order[: first - np.count_nonzero(left)]]] = True
    return nodes[left], nodes[~left]


def _bisection(
    x: np.ndarray, src: np.ndarray, dst: np.ndarray, parts: int, seed: int, sizes: np.ndarray | None
) -> np.ndarray:
    """Recursive coordinate bisection; without sizes, those of parts differ by at most one node. No seed."""
    part = np.empty(len(x), np.int64)
    pending = [(np.arange(len(x)), 0, parts)]
    while pending:
        nodes, first, count = pending.pop()
        if count == 1:
            part[nodes] = first
            continue
        half = count // 2
        cut = len(nodes) * half // count if sizes is None else int(sizes[first : first + half].sum())
        low, high = halves(x, nodes, cut)
        pending += [(low, first, half), (high, first + half, count - half)]
    return part


def _metis(
    x: np.ndarray, src: np.ndarray, dst: np.ndarray, parts: int, seed: int, sizes: np.ndarray | None
) -> np.ndarray:
    """METIS recursive bisection of the graph, least edge cut. METIS takes no seed here.

    Without edges (edge dropping p = 1) METIS would scatter nodes regardless of place: bisection stands in.
    """
    if not len(src):
        return _bisection(x, src, dst, parts, seed, sizes)
    if sizes is not None:
        return _pymetis(len(x), src, dst, sizes)
    graph = dgl.graph((torch.from_numpy(src), torch.from_numpy(dst)), num_nodes=len(x), idtype=torch.int64)
    try:
        # not k-way: that halves the time, cuts up to a quarter more edges of small graphs and is harder to repeat
        with _silence(), _clean_heap(), ThreadPoolExecutor(1) as fresh:
            return fresh.submit(dgl.metis_partition_assignment, graph, parts, mode="recursive").result().numpy()
    except dgl.DGLError as error:
        reason = str(error).strip().splitlines()[-1]
        raise Failure(f"METIS could not partition {len(x)} nodes into {parts} ({reason}); use bisection") from error


def _pymetis(nodes: int, src: np.ndarray, dst: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """METIS recursive bisection into parts of these sizes, which DGL's binding does not take."""
    import pymetis

    kind = pymetis.zero_copy_dtype()
    one = sparse.csr_array((np.ones(len(src), bool), (src, dst)), (nodes, nodes))
    both = (one + one.T).tocsr()  # METIS wants each edge from both of its ends, and once
    adjacent = pymetis.CSRAdjacency(both.indptr.astype(kind), both.indices.astype(kind))
    try:
        found = pymetis.part_graph(len(sizes), adjacent, tpwgts=(sizes / nodes).tolist(), recursive=True)
    except RuntimeError as error:
        raise Failure(f"METIS could not partition {nodes} nodes by weights ({error}); use bisection") from error
    return np.array(found.vertex_part)


@contextlib.contextmanager
def _clean_heap() -> Iterator[None]:
    """Let malloc zero what it hands out (glibc only).

    DGL's METIS, when it drops edges of a coarse graph, takes a median beyond the end of what it wrote, so that its
    answer would depend on what the heap held before. The small blocks that a thread recycles (malloc's tcache) are handed
    out as they are all the same: `cli.console` turns that off, and where that was not done a new thread has few of them.
    """
    resources.mallopt(M_PERTURB, 255)
    try:
        yield
    finally:
        resources.mallopt(M_PERTURB, 0)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drop what Python prints to standard output and what C writes to standard error (the whole process's, briefly)."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
            os.dup2(sink.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _random(
    x: np.ndarray, src: np.ndarray, dst: np.ndarray, parts: int, seed: int, sizes: np.ndarray | None
) -> np.ndarray:
    """Parts drawn at random, without sizes equal ones (to one node)."""
    one_each = np.arange(len(x)) % parts if sizes is None else np.repeat(np.arange(parts), sizes)
    return np.random.default_rng(seed).permutation(one_each)


def _morton(
    x: np.ndarray, src: np.ndarray, dst: np.ndarray, parts: int, seed: int, sizes: np.ndarray | None
) -> np.ndarray:
    """Ranges along a Z-order curve, without sizes equal ones (to one node). No seed."""
    part = np.empty(len(x), np.int64)
    part[morton_order(x)] = np.arange(len(x)) * parts // len(x) if sizes is None else np.repeat(np.arange(parts), sizes)
    return part


def _kmeans(
    x: np.ndarray, src: np.ndarray, dst: np.ndarray, parts: int, seed: int, sizes: np.ndarray | None
) -> np.ndarray:
    """Lloyd's k-means on the positions; mini-batches would be slower and worse at 10⁵ to 10⁶ nodes in 8 parts."""
    from sklearn.cluster import KMeans

    with warnings.catch_warnings(), _one_thread():
        warnings.simplefilter("ignore")  # fewer distinct points than parts: fill_empty's business
        return KMeans(parts, n_init=1, max_iter=50, random_state=seed).fit_predict(x)


def _spectral(
    x: np.ndarray, src: np.ndarray, dst: np.ndarray, parts: int, seed: int, sizes: np.ndarray | None
) -> np.ndarray:
    """Spectral clustering of landmarks (all nodes, or LANDMARKS of them at random); others join their nearest one."""
    from sklearn.cluster import SpectralClustering

    size = min(len(x), max(LANDMARKS, 10 * parts))
    if size == parts:  # as many eigenvectors as nodes: ARPACK refuses, and any answer is one node a part
        return np.arange(size)
    landmarks = x[np.sort(np.random.default_rng(seed).choice(len(x), size, replace=False))]
    model = SpectralClustering(
        parts,
        affinity="nearest_neighbors",
        n_neighbors=min(10, size),
        assign_labels="cluster_qr",  # better balanced than k-means on the eigenvectors, and draws nothing at random
        random_state=seed,
    )
    with warnings.catch_warnings(), _one_thread():
        warnings.simplefilter("ignore")  # landmarks in several components: clustered all the same
        label = model.fit_predict(landmarks)
    return label[KDTree(landmarks).query(x)[1]]


def _one_thread() -> contextlib.AbstractContextManager:
    """scikit-learn sums in the order in which its threads finish: one thread gives the same answer every time."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    return threadpool_limits(1)


METHODS: dict[str, Method] = {
    "metis": Method(_metis, True, "METIS on the edges: fewest cut edges; bisection where there are no edges", True),
    "random": Method(_random, True, "balanced random parts: the worst case, cuts nearly every edge"),
    "kmeans": Method(_kmeans, False, "k-means on the positions: round parts, balance not forced"),
    "spectral": Method(
        _spectral,
        False,
        f"spectral clustering of {LANDMARKS} landmarks (more beyond {LANDMARKS // 10} parts), every other node takes "
        "its nearest landmark's part; balance not forced",
    ),
    "bisection": Method(_bisection, True, "recursive coordinate bisection: boxes of equal size, no edges needed"),
    "morton": Method(_morton, True, "equal ranges along a Z-order curve: the fastest, no edges needed"),
}


@dataclass(frozen=True)
class Quality:
    """What an assignment costs."""

    edge_cut: float  # share of directed edges whose ends lie in different parts; 0 without edges
    balance: float  # nodes of the largest part / mean; with weights: of the fullest part / its share
    halo: int  # (part, source node elsewhere) pairs: the nodes that all parts together must receive
    halo_share: float  # halo / N


def quality(
    part: np.ndarray, src: np.ndarray, dst: np.ndarray, parts: int, weights: Sequence[float] | None = None
) -> Quality:
    """Edge cut, balance and halo of a part vector (N,) under the edges src→dst (E,)."""
    n = len(part)
    cut = part[src] != part[dst]
    halo = len(np.unique(part[dst[cut]] * n + src[cut]))
    balance = float((np.bincount(part, minlength=parts) / part_weights.fractions(weights, parts)).max() / n)
    return Quality(float(cut.mean()) if len(cut) else 0.0, balance, halo, halo / n)
