"""What a fine-tuned model gained and forgot: plain numbers in, numbers out."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def change(before: float, after: float) -> dict[str, float]:
    """`before`, `after`, and the `absolute` and `relative` change from one to the other."""
    relative = (after - before) / before if before else math.nan
    return {"before": before, "after": after, "absolute": after - before, "relative": relative}


def forgetting(before: Sequence[float], after: Sequence[float]) -> float:
    r"""
    Mean relative drop over tasks, in percent; positive is forgetting.

        FG = 100 / N · Σ_i (before_i − after_i) / before_i

    Raises:
        ValueError: The two have different lengths, or a score before is zero.

    Source: Luo et al. 2023, https://arxiv.org/abs/2308.08747, section 3.3.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"Got {len(before)} scores before and {len(after)} after; expected as many, at least one.")
    if not all(before):
        raise ValueError(f"A score before is zero, so it has no relative drop: {list(before)}. Leave that task out.")
    return 100 * sum((b - a) / b for b, a in zip(before, after, strict=True)) / len(before)


def retention(before: float, after: float, chance: float = 0.0) -> float:
    """
    Share of the score above chance that is kept.

        (after − chance) / (before − chance)

    Returns:
        `float`: 1 nothing lost, 0 down to guessing; NaN if the model before was no better than chance.
    """
    return (after - chance) / (before - chance) if before > chance else math.nan


def share(value: float, reference: float) -> float:
    """
    `value / reference`: a method's gain as a share of plain SFT's. NaN if SFT has none.

    The share of SFT's forgetting that a method avoids is `1 - share(method's, SFT's)`.
    """
    return value / reference if reference > 0 else math.nan


def mcnemar(before: ArrayLike, after: ArrayLike) -> dict[str, float]:
    """
    Exact McNemar test of two models' hits on the same questions.

    Args:
        before, after (array of 0 and 1, shape `(questions,)`): Hits of the two models.

    Returns:
        `dict`: `lost` (right before, wrong after), `gained`, and `p_value`, two-sided, of the two being equally likely.

    Source: McNemar 1947, *Note on the sampling error of the difference between correlated proportions*.
    """
    from scipy.stats import binomtest

    before, after = _pair(before, after)
    lost, gained = int(((before > 0.5) & (after <= 0.5)).sum()), int(((before <= 0.5) & (after > 0.5)).sum())
    p_value = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    return {"lost": lost, "gained": gained, "p_value": float(p_value)}


def paired_bootstrap(
    before: Sequence[ArrayLike],
    after: Sequence[ArrayLike],
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> dict[str, float]:
    """
    Mean change of score over tasks, with the percentile interval of resampling each task's questions.

        difference = 1 / tasks · Σ_tasks mean_questions(after − before)

    Args:
        before, after (list of arrays of shape `(questions,)`): For each task the scores on the same questions, in the same
            order. With several seeds: the mean over them, so that a question stays one unit.

    Returns:
        `dict`: `difference`, `low`, `high`.

    Source: Efron & Tibshirani 1993, *An Introduction to the Bootstrap*, chapter 13.
    """
    pairs = [_pair(b, a) for b, a in zip(before, after, strict=True)]
    differences = [a - b for b, a in pairs]
    return {"difference": float(_mean_of_means(*differences))} | _percentiles(differences, confidence, resamples, seed)


def bootstrap_mean(
    values: ArrayLike, confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> dict[str, float]:
    """Percentile interval `low`, `high` of the mean of `values`, of shape `(questions,)`."""
    return _percentiles([np.asarray(values, dtype=np.float64)], confidence, resamples, seed)


def _mean_of_means(*samples: np.ndarray, axis: int = -1):
    return sum(sample.mean(axis=axis) for sample in samples) / len(samples)


def _percentiles(samples: list[np.ndarray], confidence: float, resamples: int, seed: int) -> dict[str, float]:
    from scipy.stats import bootstrap

    if all(np.ptp(sample) == 0 for sample in samples):  # every resample is the same
        mean = float(_mean_of_means(*samples))
        return {"low": mean, "high": mean}
    interval = bootstrap(
        samples,
        _mean_of_means,
        n_resamples=resamples,
        batch=500,
        confidence_level=confidence,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return {"low": float(interval.low), "high": float(interval.high)}


def seed_interval(values: ArrayLike, confidence: float = 0.95) -> dict[str, float]:
    """
    Mean over seeds with Student's t interval; `low` and `high` are NaN for a single seed.

    Returns:
        `dict`: `mean`, `low`, `high`, `std` (of the sample), `n`.
    """
    from scipy.stats import t

    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    std = float(values.std(ddof=1)) if n > 1 else math.nan
    half = t.ppf((1 + confidence) / 2, n - 1) * std / math.sqrt(n) if n > 1 else math.nan
    mean = float(values.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half, "std": std, "n": n}


def pareto_front(gains: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Indices of the points that no other beats: gain at least as high and loss at least as low, one of them better."""
    points = list(zip(gains, losses, strict=True))

    def beaten(i: int) -> bool:
        gain, loss = points[i]
        return any(g >= gain and f <= loss and (g, f) != (gain, loss) for g, f in points)

    return sorted((i for i in range(len(points)) if not beaten(i)), key=lambda i: (points[i][1], points[i][0]))


def _pair(before: ArrayLike, after: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise ValueError(
            f"Scores before and after have shapes {before.shape} and {after.shape}; expected one score for each of the same "
            "questions."
        )
    return before, after
