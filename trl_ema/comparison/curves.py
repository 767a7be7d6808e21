"""Curves of gain against drift over the scales of an adapter, and the front that several of them make. Plain numbers in, numbers out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


# Drifts at which fronts are read, as shares of the reference's: even in their root up to it, and coarser up to four times of it.
LEVELS = np.concatenate([np.linspace(0, 1, 101), np.linspace(1, 2, 21)[1:]]) ** 2


@dataclass(frozen=True, eq=False)
class Curve:
    """
    One setting over the scales of its adapter, from the base at the origin.

    Locally gain rises as 2α − α² and drift as α², so gain is nearly straight in the root of drift: it is interpolated so, and flat
    beyond the last point.

    Args:
        gains, drifts (arrays of shape `(points, resamples)`): By rising scale.
        scalable (`bool`): Or else its one point is all there is: no gain below its drift.
    """

    gains: np.ndarray
    drifts: np.ndarray
    scalable: bool = True

    def at(self, levels: np.ndarray) -> np.ndarray:
        """Gain at each level of drift, `(levels, resamples)`; NaN where what cannot be scaled drifts more than that."""
        if not self.scalable:
            return np.where(self.drifts[0] <= levels[:, None], self.gains[0], np.nan)
        x, roots = np.sqrt(levels)[:, None], _root(self.drifts)
        found = np.broadcast_to(self.gains[-1], (len(levels), self.gains.shape[1]))
        for i in reversed(range(len(roots))):
            root, gain = (roots[i - 1], self.gains[i - 1]) if i else (np.zeros_like(roots[0]), 0.0)
            width = roots[i] - root
            part = np.clip((x - root) / np.where(width > 0, width, 1), 0, 1)
            found = np.where(x < roots[i], gain + part * (self.gains[i] - gain), found)
        return found

    def rising(self) -> list[int]:
        """
        Points of the first column that make the curve: the concave hull, in the root of drift, up to the largest gain.

        A point below the line of two others is passed over as noise, so that no further point lowers a curve.
        """
        if not self.scalable:
            return [0] if self.gains[0, 0] > 0 else []
        roots, gains = _root(self.drifts[:, 0]), self.gains[:, 0]
        hull = [(0.0, 0.0, -1)]
        for i in np.lexsort((-gains, roots)):
            point = (float(roots[i]), float(gains[i]), int(i))
            if point[0] <= 0 or not point[1] > hull[-1][1]:
                continue
            while len(hull) > 1 and _slope(hull[-2], point) >= _slope(hull[-2], hull[-1]):
                hull.pop()
            hull.append(point)
        return [i for _, _, i in hull[1:]]

    def only(self, points: Sequence[int]) -> "Curve":
        """The curve of these points alone."""
        return Curve(self.gains[points], self.drifts[points], self.scalable)


def _root(drifts: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(drifts, 0))


def _slope(a: tuple, b: tuple) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def choose(curves: Sequence[Curve]) -> tuple[np.ndarray, list[list[int]]]:
    """
    The front of several curves, by their first column: at each of [`LEVELS`] the curve that gains most.

    Returns:
        `tuple`: index of the curve at each level, −1 where none gains anything (the base itself); and the points of each curve
        that it was read from.
    """
    points = [curve.rising() for curve in curves]
    gains = np.full((len(curves) + 1, len(LEVELS)), -np.inf)
    gains[0] = 0.0
    for i, (curve, kept) in enumerate(zip(curves, points, strict=True)):
        if kept:
            gains[i + 1] = np.nan_to_num(curve.only(kept).at(LEVELS)[:, 0], nan=-np.inf)
    return gains.argmax(0) - 1, points


def follow(chosen: tuple[np.ndarray, list[list[int]]], curves: Sequence[Curve]) -> np.ndarray:
    """
    Gains of what was chosen at each level of drift, read from other measurements of the same curves: no choice is made here.

    Where a setting that cannot be scaled drifts more than the level, the gain is that of the level below.

    Returns:
        `(levels, resamples)`.
    """
    choice, points = chosen
    found = np.zeros((len(LEVELS), curves[0].gains.shape[1]))
    stepped = np.zeros(len(LEVELS), dtype=bool)
    for i, (curve, kept) in enumerate(zip(curves, points, strict=True)):
        here = choice == i
        if here.any():
            found[here] = curve.only(kept).at(LEVELS[here])
            stepped |= here & (not curve.scalable)
    for level in np.flatnonzero(stepped):
        below = found[level - 1] if level else 0.0
        found[level] = np.where(np.isnan(found[level]), below, found[level])
    return found


def hypervolume(gains: np.ndarray) -> np.ndarray:
    r"""
    Area under a front up to the reference's drift: the mean gain over all drifts that one may accept up to there.

        HV = ∫_0^1 gain(x) dx

    Args:
        gains (array of shape `(levels, ...)`): At [`LEVELS`].

    Source: Zitzler & Thiele 1998, *Multiobjective optimization using evolutionary algorithms*, section 4; there of points, without
    anything between them.
    """
    widths = np.diff(LEVELS[LEVELS <= 1])
    weights = np.zeros(len(LEVELS))
    weights[: len(widths)] += widths / 2
    weights[1 : len(widths) + 1] += widths / 2
    return np.tensordot(weights, gains, 1)


def gain_at(gains: np.ndarray, drift: float) -> np.ndarray:
    """Gain of a front, `(levels, ...)`, at a drift."""
    roots, root = np.sqrt(LEVELS), drift**0.5
    i = int(np.clip(np.searchsorted(roots, root), 1, len(roots) - 1))
    part = (root - roots[i - 1]) / (roots[i] - roots[i - 1])
    return gains[i - 1] + part * (gains[i] - gains[i - 1])


def drift_at(gains: np.ndarray, gain: float) -> np.ndarray:
    """Least drift at which a front, `(levels, ...)`, has a gain above 0; infinite where it has it at none of [`LEVELS`]."""
    reached = gains >= gain
    i = np.maximum(reached.argmax(0), 1)
    before, after = (np.take_along_axis(gains, k[None], 0)[0] for k in (i - 1, i))
    roots = np.sqrt(LEVELS)
    rise = np.where(after > before, after - before, 1)
    found = (roots[i - 1] + (gain - before) / rise * (roots[i] - roots[i - 1])) ** 2
    return np.where(reached.any(0), found, np.inf)
