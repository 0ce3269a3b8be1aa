"""Which frames of the series become training, validation and test."""

from __future__ import annotations

import itertools

import numpy as np

from ...errors import Failure
from ..trajectories import SPLITS
from .convert import Summary
from .series import ImportOptions, Series


def ranges(summary: Summary, series: Series, options: ImportOptions) -> list[tuple[str, int, int]]:
    """The split, first and last + 1 frame of each trajectory that a single series becomes: split by time."""
    ends = np.rint(np.cumsum([0.0, *options.splits]) / sum(options.splits) * summary.frames).astype(int).tolist()
    result = [(split, lo, hi) for split, (lo, hi) in zip(SPLITS, itertools.pairwise(ends), strict=True) if hi > lo]
    if short := [split for split, lo, hi in result if hi - lo < 2]:
        raise Failure(f"{series.name}: {summary.frames} frames leave split '{short[0]}' with one frame; change --split")
    return result


def assign_splits(
    series: list[Series], summaries: list[Summary], options: ImportOptions
) -> list[tuple[int, str, int, int]]:
    """For each trajectory to write: number of the series, split, first and last + 1 frame.

    Several series are divided as wholes, in their order, unless the source has splits; a single one by time.
    """
    if all(one.split for one in series):
        return [(k, one.split or "", 0, summaries[k].frames) for k, one in enumerate(series)]
    if len(series) == 1:
        return [(0, *span) for span in ranges(summaries[0], series[0], options)]
    shares = np.array(options.splits) / sum(options.splits)
    counts = np.floor(shares * len(series) + 1e-9).astype(int)
    for k in (1, 2):  # validation and test get a trajectory each if there are enough
        counts[k] = max(counts[k], 1) if shares[k] > 0 and len(series) > k else counts[k]
    counts[0] = len(series) - counts[1:].sum()
    names = np.repeat(SPLITS, counts)
    return [(k, str(name), 0, summaries[k].frames) for k, name in enumerate(names)]
