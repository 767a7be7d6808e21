"""What a fine-tuned model gained and forgot: plain numbers in, numbers out."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


# Of sums over many questions, relative: no spread at all.
_ROUNDING = 1e-9
# Share of a denominator at which the lower end of its interval must lie: its own noise stretches no ratio more than fourfold.
CLEARLY = 0.25
# A ratio that no reader would take for one.
_FAR = 1e6
# What a test may say of a change that is none, and how often it shall find one that is.
_LEVEL, _POWER = 0.05, 0.8


def forgetting(before: ArrayLike, after: ArrayLike) -> Any:
    r"""
    Mean relative drop over tasks, in percent; positive is forgetting.

        FG = 100 / N · Σ_i (before_i − after_i) / before_i

    Args:
        before, after (arrays of shape `(tasks,)` or `(tasks, resamples)`): Scores.

    Raises:
        ValueError: The two have different shapes, or a score before is zero.

    Source: Luo et al. 2023, https://arxiv.org/abs/2308.08747, section 3.3.
    """
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if before.shape != after.shape or not len(before):
        raise ValueError(f"Got {len(before)} scores before and {len(after)} after; expected as many, at least one.")
    if not before.all():
        raise ValueError(f"A score before is zero, so it has no relative drop: {before.tolist()}. Leave that task out.")
    return 100 * ((before - after) / before).mean(0)


def retention(before: ArrayLike, after: ArrayLike, chance: ArrayLike = 0.0) -> Any:
    """
    Share of the score above chance that is kept, over all tasks together.

        Σ_i (after_i − chance_i) / Σ_i (before_i − chance_i)

    Leave out tasks on which the model before is no better than chance: there is nothing to keep.

    Args:
        before, after (arrays of shape `(tasks,)` or `(tasks, resamples)`): Scores.
        chance (array of shape `(tasks,)`): Scores of guessing.

    Returns:
        1 nothing lost, 0 down to guessing; NaN if the model before was no better than chance.
    """
    before, after, chance = (np.asarray(x, dtype=np.float64) for x in (before, after, chance))
    chance = chance.reshape(chance.shape + (1,) * (before.ndim - chance.ndim))
    above = (before - chance).sum(0)
    return share((after - chance).sum(0), above)


def share(value: ArrayLike, reference: ArrayLike) -> Any:
    """
    `value / reference`: a method's gain as a share of plain SFT's. NaN if SFT has none. With its interval: [`ratio_interval`].
    """
    value, reference = np.asarray(value, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    # `+ 0.0` makes a number of a 0-dimensional array.
    return np.divide(value, reference, out=np.full_like(reference, np.nan), where=reference > 0) + 0.0


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


def paired_bootstrap(before: ArrayLike, after: ArrayLike, resamples: int = 2000, seed: int = 0) -> float:
    """
    p-value, two-sided, of the mean score being unchanged on the same questions, for scores of any kind.

        p = (1 + #{resamples: |mean of (d − mean d)*| ≥ |mean d|}) / (1 + resamples)          d = after − before

    Args:
        before, after (arrays of shape `(questions,)`): Scores, in the same order.

    Source: Efron & Tibshirani 1993, *An Introduction to the Bootstrap*, section 16.4 (differences shifted to a mean of zero); the 1
    counts the sample itself, so that p is never 0 (Davison & Hinkley 1997, equation 4.11).
    """
    before, after = _pair(before, after)
    difference = after - before
    weights = resampling_weights(len(difference), resamples, seed)[1:]
    drawn = np.abs(weights @ (difference - difference.mean())) / len(difference)
    return float((1 + (drawn >= abs(difference.mean()) - _ROUNDING).sum()) / (1 + resamples))


def paired_test(before: ArrayLike, after: ArrayLike) -> dict[str, Any]:
    """
    Whether the mean score changed on the same questions: [`mcnemar`] where every score is 0 or 1, else [`paired_bootstrap`].

    Returns:
        `dict`: `test` (its name), `lost` and `gained` (questions with a lower, and with a higher score), `p_value`, and `detectable`,
        the [`detectable_change`] of as many questions.
    """
    before, after = _pair(before, after)
    if np.isin([before, after], (0, 1)).all():
        found = mcnemar(before, after)
        changed = int(found["lost"] + found["gained"])
        return {"test": "McNemar", **found, "detectable": detectable_share(len(before), changed)}
    return {
        "test": "bootstrap",
        "lost": int((after < before).sum()),
        "gained": int((after > before).sum()),
        "p_value": paired_bootstrap(before, after),
        "detectable": detectable_change(before, after),
    }


def detectable_share(questions: int, changed: int) -> float:
    """
    The smallest change of a share of hits that McNemar's test at 5 % would find in 80 of 100 cases, on so many questions.

        n = (z_{α/2}·√ψ + z_β·√(ψ − δ²))² / δ²                         ψ = changed / questions, the discordant share
        δ = √ψ · c,   c = (z_{α/2}·√n + z_β·√(n + z_β² − z_{α/2}²)) / (n + z_β²)          solved for δ

    A change cannot be larger than the share of questions that changed. Where this δ is, so many questions as would have to change
    count, all in one direction (ψ = δ): δ = c². It is an approximation by the normal distribution.

    Args:
        questions (`int`): n.
        changed (`int`): Questions on which one model is right and the other wrong.

    Returns:
        δ in (0, 1]; 1 where no change could be shown on so few questions.

    Source: Connor 1987, *Sample size for testing differences in proportions for the paired-sample design*, Biometrics 43:207-211.
    """
    alpha, beta = _normal_quantiles()
    room = questions + beta**2 - alpha**2
    if room <= 0:
        return 1.0
    factor = (alpha * math.sqrt(questions) + beta * math.sqrt(room)) / (questions + beta**2)
    return min(1.0, max(factor * math.sqrt(changed / questions), factor**2))


def detectable_change(before: ArrayLike, after: ArrayLike) -> float:
    """
    The smallest change of a mean score that a paired test at 5 % would find in 80 of 100 cases, on as many questions.

        δ = (z_{α/2} + z_β) · s / √n                                             s: standard deviation of after − before

    Returns:
        δ in units of the score; NaN of one question, or if no score changed.

    Source: Miller 2024, *Adding Error Bars to Evals*, https://arxiv.org/abs/2411.00640, its power analysis with one answer to each
    question.
    """
    before, after = _pair(before, after)
    spread = np.std(after - before, ddof=1) if len(before) > 1 else 0.0
    return float(sum(_normal_quantiles()) * spread / math.sqrt(len(before))) if spread > 0 else math.nan


def _normal_quantiles() -> tuple[float, float]:
    """z_{α/2} and z_β."""
    from scipy.stats import norm

    return float(norm.ppf(1 - _LEVEL / 2)), float(norm.ppf(_POWER))


def discoveries(p_values: Sequence[float], rate: float = _LEVEL) -> list[bool]:
    """
    Which of several tests still count when there are so many of them: of those, on average at most `rate` are false.

    Source: Benjamini & Hochberg 1995, *Controlling the false discovery rate*; SciPy's `false_discovery_control`.
    """
    from scipy.stats import false_discovery_control

    return [bool(p <= rate) for p in false_discovery_control(p_values)] if len(p_values) else []


def resampling_weights(n: int, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """
    How often each of `n` questions is drawn in each resample, `(1 + resamples, n)`; the first is each question once.

    Comparisons share the weights of a task, so that they stay paired.
    """
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.concatenate([np.ones((1, n), dtype=draws.dtype), draws])


def interval(
    statistic: Callable[..., ArrayLike], *quantities: ArrayLike | Mapping[int, ArrayLike], confidence: float = 0.95
) -> dict[str, Any]:
    """
    A statistic of resampled quantities with its interval, over questions and, where there are several, over seeds.

        low  = estimate − √((estimate − q_low)² + h²)        q_low, q_high: percentiles over resampled questions
        high = estimate + √((q_high − estimate)² + h²)       h = t_{n−1} · s / √n over the statistics of n seeds

    A few seeds are too few to resample (three of them would cover 95 % but 80 % of the time); Student's t is exact for
    normal ones. With one seed the interval is over questions alone. Where neither varies there is no interval: of one seed
    and no resampled questions, of a statistic that is constant by construction, of a score that every question has.

    Args:
        statistic (callable): Of the quantities, elementwise over resamples; finite in each, or there is no interval. For the
            ratio of two quantities see [`ratio_interval`].
        quantities: Arrays `(1 + resamples,)`, the first element of the sample itself, such as a score by
            [`resampling_weights`]; or a mapping of those by seed. The seeds that all mappings have are used, and averaged
            before the statistic.

    Returns:
        `dict`: `mean` (the estimate), `low`, `high`, `seeds` and `by_seed` (the statistic of each). `low` and `high` are NaN
        where there is no interval, and `mean` too without a common seed.

    Sources: Efron & Tibshirani 1993, *An Introduction to the Bootstrap*, chapter 13; Student 1908.
    """
    from scipy.stats import t

    mappings = [set(quantity) for quantity in quantities if isinstance(quantity, Mapping)]
    seeds = sorted(set.intersection(*mappings)) if mappings else []
    if mappings and not seeds:
        return {"mean": math.nan, "low": math.nan, "high": math.nan, "seeds": [], "by_seed": []}

    def of(chosen: Sequence[int]) -> np.ndarray:
        values = (
            np.mean([np.asarray(quantity[seed]) for seed in chosen], axis=0)
            if isinstance(quantity, Mapping)
            else quantity
            for quantity in quantities
        )
        return np.asarray(statistic(*values), dtype=np.float64)

    draws = of(seeds)
    by_seed = [float(of([seed])[0]) for seed in seeds]
    n, estimate = len(seeds), float(draws[0])
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    # NaN if one draw is: what is left without it would be another distribution.
    low, high = np.quantile(draws[1:], tails)
    half = t.ppf(tails[1], n - 1) * np.std(by_seed, ddof=1) / math.sqrt(n) if n > 1 else 0.0
    low, high = estimate - math.hypot(estimate - low, half), estimate + math.hypot(high - estimate, half)
    if high - low <= _ROUNDING * max(1.0, abs(estimate)):
        low = high = math.nan
    return {"mean": estimate, "low": low, "high": high, "seeds": seeds, "by_seed": by_seed}


def ratio_interval(
    numerator: ArrayLike | Mapping[int, ArrayLike],
    denominator: ArrayLike | Mapping[int, ArrayLike],
    confidence: float = 0.95,
) -> dict[str, Any] | None:
    """
    A ratio with its interval: every ratio r for which the interval of `numerator − r · denominator` holds zero.

    Unlike the quantiles of resampled ratios it needs no resample to be left out, and one seed whose denominator happens to
    be near zero does not stretch it.

    Args:
        numerator, denominator: As the quantities of [`interval`].

    Returns:
        `dict` as of [`interval`], or `None` unless the denominator, over the seeds that both have, is clearly above zero: the
        lower end of its own interval at least a quarter of it. At zero no finite interval exists, and the ratio means nothing.

    Source: Fieller 1954, *Some problems in interval estimation*.
    """
    from scipy.optimize import brentq

    def gap(ratio: float) -> dict:
        return interval(lambda over, under: over - ratio * under, numerator, denominator, confidence=confidence)

    def bound(side: str, direction: int) -> float:
        step = 1.0
        while direction * gap(found["mean"] + direction * step)[side] >= 0:
            step *= 2
            if step > _FAR:
                return direction * math.inf
        return brentq(lambda ratio: gap(ratio)[side], found["mean"], found["mean"] + direction * step, xtol=1e-5)

    own = interval(lambda over, under: under, numerator, denominator, confidence=confidence)
    if not (own["low"] > 0 and own["low"] >= CLEARLY * own["mean"]):  # NaN too
        return None
    found = interval(share, numerator, denominator, confidence=confidence)
    none = math.isnan(gap(found["mean"])["low"])  # such as of a quantity to itself
    low, high = (math.nan, math.nan) if none else (bound("low", -1), bound("high", 1))
    return found | {"low": low, "high": high}


def scores_by_resample(scores: ArrayLike, weights: np.ndarray) -> np.ndarray:
    """Mean score of each resample, `(1 + resamples,)`, of `scores` `(questions,)`."""
    return weights @ np.asarray(scores, dtype=np.float64) / weights.sum(1)


def backward_transfer(scores: ArrayLike) -> Any:
    r"""
    What later stages did to the domains of earlier ones, at the end; below 0 they were forgotten.

        BWT = 1/(T − 1) · Σ_{j<T} (R_{T,j} − R_{j,j})

    Args:
        scores (array of shape `(T + 1, T, ...)`): R_{i,j}, the score on the domain of stage j after stage i. Row 0 is of the model before
            the first. Higher is better: of a loss its negative.

    Raises:
        ValueError: The scores have another shape, or there are less than two stages.

    Source: Lopez-Paz & Ranzato 2017, https://arxiv.org/abs/1706.08840, section 2.
    """
    scores = _of_stages(scores)
    learned = np.array([scores[j + 1, j] for j in range(scores.shape[1] - 1)])
    return (scores[-1, :-1] - learned).mean(0)


def stage_forgetting(scores: ArrayLike) -> Any:
    r"""
    How far the domains of earlier stages have fallen below their best, at the end; positive is forgetting.

        F = 1/(T − 1) · Σ_{j<T} max_{1≤l<T} (R_{l,j} − R_{T,j})

    Args:
        scores: As of [`backward_transfer`].

    Source: Chaudhry et al. 2018, https://arxiv.org/abs/1801.10112, section 3. As there the best is one after some stage: the model
    before all of them does not count.
    """
    scores = _of_stages(scores)
    return (scores[1:-1, :-1].max(0) - scores[-1, :-1]).mean(0)


def forward_transfer(scores: ArrayLike) -> Any:
    r"""
    What earlier stages did for the domain of a stage before it was learned; positive is a better start.

        FWT = 1/(T − 1) · Σ_{j>1} (R_{j−1,j} − R_{0,j})

    Args:
        scores: As of [`backward_transfer`].

    Source: Lopez-Paz & Ranzato 2017, section 2, against the model before all stages where theirs is a random one.
    """
    scores = _of_stages(scores)
    before = np.array([scores[j, j] for j in range(1, scores.shape[1])])
    return (before - scores[0, 1:]).mean(0)


def _of_stages(scores: ArrayLike) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim < 2 or scores.shape[0] != scores.shape[1] + 1 or scores.shape[1] < 2:
        raise ValueError(
            f"Scores of stages have shape {scores.shape}; expected (T + 1, T, ...) with T of at least two stages: a row before the "
            "first and one after each, a column for the domain of each."
        )
    return scores


def paired_interval(before: ArrayLike, after: ArrayLike, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """
    Change of the mean score on the same questions, with its paired bootstrap interval: [`interval`] of one seed.

    Args:
        before, after (arrays of shape `(questions,)`): Scores, in the same order.

    Raises:
        ValueError: The two do not have one score for each of the same questions.
    """
    before, after = _pair(before, after)
    return interval(lambda x: x, scores_by_resample(after - before, resampling_weights(len(before), resamples, seed)))


def mean_interval(values: ArrayLike, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Mean of `values`, `(questions,)`, with its bootstrap interval."""
    weights = resampling_weights(len(np.asarray(values)), resamples, seed)
    return interval(lambda x: x, scores_by_resample(values, weights))


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
