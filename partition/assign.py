"""Assign a part to every node: six methods behind `assign`, and the cost of an assignment (`quality`).

Shapes: x (N, 3); src, dst (E,), an edge runs src→dst; an assignment (N,) int64 with values in 0…parts−1.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import dgl
import numpy as np
import torch
from numpy import ndarray as Array
from scipy import sparse
from scipy.spatial import KDTree

from dist_egnn.data.graphs import morton_order
from dist_egnn.errors import Failure
from dist_egnn.utils import memory, part_weights

MAX_IMBALANCE = 1.05  # of a balanced method: nodes of the largest part / mean
WEIGHT_TOLERANCE = 0.02  # relative error of a weighted part's size; machine and trainer levels together stay within 5%
M_PERTURB = -6  # <malloc.h>: fill memory on malloc (with the value's complement) and on free
LANDMARKS = 2000  # nodes that spectral clustering sees; its eigenvectors cost far more than the rest
_process_wide = threading.Lock()  # standard error and malloc's settings belong to all threads
Weights = Sequence[float] | None  # (parts,) in any unit; None: equal parts


class Problem(NamedTuple):
    """The input of a method."""

    x: Array
    src: Array
    dst: Array
    parts: int
    seed: int
    sizes: Array | None  # nodes of each part (parts,); None: equal parts, or a method that does not force balance


class Method(NamedTuple):
    function: Callable[[Problem], Array]
    balanced: bool  # the size of parts is forced
    needs_edges: bool = False  # otherwise src and dst may be empty


def check_method(method: str, parts: int, weights: Weights = None) -> None:
    """Raise Failure for an unknown method, parts < 1, and weights (not all equal) that the method cannot follow."""
    if method not in METHODS:
        closest = difflib.get_close_matches(method, METHODS, n=1, cutoff=0.0)[0]
        raise Failure(f"partition method={method!r}: unknown; did you mean {closest}? (one of {', '.join(METHODS)})")
    if parts < 1:
        raise Failure(f"parts={parts}: must be at least 1")
    if weights is not None and not METHODS[method].balanced:
        names = ", ".join(name for name, entry in METHODS.items() if entry.balanced)
        raise Failure(f"partition method={method}: does not follow weights; use one of {names}")
    if weights is not None and method == "metis" and importlib.util.find_spec("pymetis") is None:
        raise Failure("partition method=metis: weights need pymetis; pip install pymetis, or use bisection")


def check_size(nodes: int, parts: int, weights: Weights = None) -> None:
    """Raise Failure for more parts than nodes, and for a weight whose share is less than one node."""
    if nodes < parts:
        raise Failure(f"parts={parts}: more parts than the {nodes} nodes; use parts={nodes} or fewer")
    if weights is not None:
        part_weights.sizes(nodes, weights)


def assign(method: str, x: Array, src: Array, dst: Array, parts: int, seed: int = 0, weights: Weights = None) -> Array:
    """The part of every node, (N,) int64. No part is empty, and equal arguments give equal results.

    METIS repeats its result only with GLIBC_TUNABLES=glibc.malloc.tcache_count=0, which `distegnn` sets. The largest
    part of a balanced method has at most ⌈1.05·N/parts⌉ nodes; with weights (parts,), each is within ⌈2%⌉ of its share.
    Raises Failure for an unknown method, invalid weights, N < parts and positions that are not finite.
    """
    unequal = part_weights.validate(weights, parts)
    check_method(method, parts, unequal)
    x = np.asarray(x, dtype=np.float64)
    check_size(len(x), parts)
    if not np.isfinite(x).all():
        raise Failure("positions are NaN or infinite: no partition can be made; correct the source data")
    if parts == 1:  # METIS kills the process (SIGFPE) here
        return np.zeros(len(x), np.int64)
    sizes = None if weights is None else part_weights.sizes(len(x), weights)
    problem = Problem(x, src, dst, parts, seed, sizes if unequal else None)
    part = METHODS[method].function(problem).astype(np.int64)
    fill_empty_parts(x, part, parts)
    if not METHODS[method].balanced:
        return part
    if sizes is None:
        rebalance(x, part, np.full(parts, math.ceil(MAX_IMBALANCE * len(x) / parts)))
    elif (np.abs(np.bincount(part, minlength=parts) - sizes) > np.ceil(WEIGHT_TOLERANCE * sizes)).any():
        rebalance(x, part, sizes)
    return part


def fill_empty_parts(x: Array, part: Array, parts: int) -> None:
    """Give each empty part half of the currently largest part, cut across its longest axis; in place."""
    for empty in np.flatnonzero(np.bincount(part, minlength=parts) == 0):
        largest = np.flatnonzero(part == np.bincount(part).argmax())
        part[split_longest_axis(x, largest, len(largest) // 2)[1]] = empty


def rebalance(x: Array, part: Array, capacity: Array) -> None:
    """Move nodes, in place, until no part exceeds its capacity (parts,). Requires Σ capacity ≥ N and no empty part.

    Each of fewer than 2 · parts rounds moves nodes of the fullest part to the nearest part with room, nearest first.
    """
    parts = len(capacity)
    while ((counts := np.bincount(part, minlength=parts)) > capacity).any():
        centroid = np.stack([np.bincount(part, axis, parts) for axis in x.T], 1) / counts[:, None]
        largest, room = (counts - capacity).argmax(), np.flatnonzero(counts < capacity)
        to = room[((centroid[room] - centroid[largest]) ** 2).sum(1).argmin()]
        moved = min(counts[largest] - capacity[largest], capacity[to] - counts[to])
        nodes = np.flatnonzero(part == largest)
        distance = ((x[nodes] - centroid[to]) ** 2).sum(1)
        part[nodes[np.argsort(distance, kind="stable")[:moved]]] = to


def split_longest_axis(x: Array, nodes: Array, first: int) -> tuple[Array, Array]:
    """Split nodes (n,) across their longest axis into the first ``first`` along it and the rest.

    Nodes on the cut itself (a lattice plane) are ordered by the other axes, then by id: it is straight, sizes exact.
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


def _bisection(problem: Problem) -> Array:
    """Recursive coordinate bisection; equal parts differ by at most one node."""
    x, sizes = problem.x, problem.sizes
    part = np.empty(len(x), np.int64)
    pending = [(np.arange(len(x)), 0, problem.parts)]
    while pending:
        nodes, first, count = pending.pop()
        if count == 1:
            part[nodes] = first
            continue
        half = count // 2
        cut = len(nodes) * half // count if sizes is None else int(sizes[first : first + half].sum())
        low, high = split_longest_axis(x, nodes, cut)
        pending += [(low, first, half), (high, first + half, count - half)]
    return part


def _metis(problem: Problem) -> Array:
    """METIS recursive bisection, the least edge cut; coordinate bisection for a graph without edges. No seed."""
    x, src, dst, parts, _, sizes = problem
    if not len(src):
        return _bisection(problem)
    if sizes is not None:
        return _pymetis(len(x), src, dst, sizes)
    graph = dgl.graph((torch.from_numpy(src), torch.from_numpy(dst)), num_nodes=len(x), idtype=torch.int64)
    try:
        # not k-way: that halves the time, cuts up to a quarter more edges of small graphs and is harder to repeat
        with _silent_and_repeatable(), ThreadPoolExecutor(1) as thread:
            return thread.submit(dgl.metis_partition_assignment, graph, parts, mode="recursive").result().numpy()
    except dgl.DGLError as error:
        reason = str(error).strip().splitlines()[-1]
        raise Failure(f"METIS could not partition {len(x)} nodes into {parts} ({reason}); use bisection") from error


def _pymetis(nodes: int, src: Array, dst: Array, sizes: Array) -> Array:
    """METIS recursive bisection into parts of these sizes, which DGL's binding does not take."""
    import pymetis

    index = pymetis.zero_copy_dtype()
    directed = sparse.csr_array((np.ones(len(src), bool), (src, dst)), (nodes, nodes))
    both = (directed + directed.T).tocsr()  # METIS expects each edge once from each of its ends
    adjacency = pymetis.CSRAdjacency(both.indptr.astype(index), both.indices.astype(index))
    try:
        result = pymetis.part_graph(len(sizes), adjacency, tpwgts=(sizes / nodes).tolist(), recursive=True)
    except RuntimeError as error:
        raise Failure(f"METIS could not partition {nodes} nodes by weights ({error}); use bisection") from error
    return np.array(result.vertex_part)


@contextlib.contextmanager
def _silent_and_repeatable() -> Iterator[None]:
    """Drop what DGL prints and the process's standard error; make malloc return zeroed memory (glibc only).

    When it drops edges of a coarse graph, DGL's METIS takes a median beyond the end of what it wrote. Blocks in a
    thread's cache (tcache) are not zeroed: `cli.console` switches it off, and a new thread's is almost empty.
    """
    with _process_wide, open(os.devnull, "wb") as sink:
        if sys.stderr:
            sys.stderr.flush()
        stderr = os.dup(2)
        dgl.partition.print = lambda *_: None  # other threads may print
        try:
            os.dup2(sink.fileno(), 2)
            memory.mallopt(M_PERTURB, 255)
            yield
        finally:
            memory.mallopt(M_PERTURB, 0)
            os.dup2(stderr, 2)
            os.close(stderr)


def _random(problem: Problem) -> Array:
    """Random parts: the worst case, cuts nearly every edge."""
    x, _, _, parts, seed, sizes = problem
    labels = np.arange(len(x)) % parts if sizes is None else np.repeat(np.arange(parts), sizes)
    return np.random.default_rng(seed).permutation(labels)


def _morton(problem: Problem) -> Array:
    """Ranges along a Z-order curve."""
    x, _, _, parts, _, sizes = problem
    part = np.empty(len(x), np.int64)
    part[morton_order(x)] = np.arange(len(x)) * parts // len(x) if sizes is None else np.repeat(np.arange(parts), sizes)
    return part


def _kmeans(problem: Problem) -> Array:
    """Lloyd's k-means; mini-batches would be slower and worse at 10⁵ to 10⁶ nodes in 8 parts."""
    from sklearn.cluster import KMeans

    with _deterministic_sklearn():  # warns of fewer distinct points than parts; fill_empty_parts handles them
        return KMeans(problem.parts, n_init=1, max_iter=50, random_state=problem.seed).fit_predict(problem.x)


def _spectral(problem: Problem) -> Array:
    """Spectral clustering of landmarks (all nodes, or a random sample); other nodes join their nearest landmark."""
    from sklearn.cluster import SpectralClustering

    x, parts, seed = problem.x, problem.parts, problem.seed
    size = min(len(x), max(LANDMARKS, 10 * parts))
    if size == parts:  # as many eigenvectors as nodes, which ARPACK refuses
        return np.arange(size)
    landmarks = x[np.sort(np.random.default_rng(seed).choice(len(x), size, replace=False))]
    # cluster_qr: better balanced than k-means on the eigenvectors, and not random
    model = SpectralClustering(
        parts, affinity="nearest_neighbors", n_neighbors=min(10, size), assign_labels="cluster_qr", random_state=seed
    )
    with _deterministic_sklearn():  # warns of landmarks in several components, which are clustered all the same
        label = model.fit_predict(landmarks)
    return label[KDTree(landmarks).query(x)[1]]


@contextlib.contextmanager
def _deterministic_sklearn() -> Iterator[None]:
    """One thread, because scikit-learn sums in the order in which its threads finish; and no warnings."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        yield


METHODS = {
    "metis": Method(_metis, balanced=True, needs_edges=True),
    "random": Method(_random, balanced=True),
    "kmeans": Method(_kmeans, balanced=False),
    "spectral": Method(_spectral, balanced=False),
    "bisection": Method(_bisection, balanced=True),
    "morton": Method(_morton, balanced=True),
}


@dataclass(frozen=True)
class Quality:
    """The cost of an assignment."""

    edge_cut: float  # share of directed edges whose ends lie in different parts; 0 without edges
    balance: float  # nodes of the largest part / mean; with weights: largest ratio of a part's nodes to its share
    halo: int  # number of (part, source node in another part) pairs: the nodes that all parts together receive
    halo_share: float  # halo / N


def quality(part: Array, src: Array, dst: Array, parts: int, weights: Weights = None) -> Quality:
    """Edge cut, balance and halo of an assignment (N,) under the edges src→dst (E,)."""
    n = len(part)
    cut = part[src] != part[dst]
    halo = len(np.unique(part[dst[cut]] * n + src[cut]))
    balance = float((np.bincount(part, minlength=parts) / part_weights.fractions(weights, parts)).max() / n)
    return Quality(float(cut.mean()) if len(cut) else 0.0, balance, halo, halo / n)
