import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trl_ema.comparison.statistics import (
    forgetting,
    gain_at_loss,
    hypervolume,
    interval,
    loss_at_gain,
    mcnemar,
    mean_interval,
    paired_interval,
    pareto_front,
    ratio_interval,
    resampling_weights,
    retention,
    scores_by_resample,
    share,
)


def test_forgetting_is_the_mean_relative_drop_in_percent():
    # Two tasks: 0.50 -> 0.40 loses 20 %, 0.80 -> 0.84 gains 5 %.
    assert forgetting([0.5, 0.8], [0.4, 0.84]) == pytest.approx(7.5)


def test_forgetting_needs_scores_of_the_same_tasks_above_zero():
    with pytest.raises(ValueError, match="Got 1 scores before and 2 after"):
        forgetting([0.5], [0.4, 0.3])
    with pytest.raises(ValueError, match="Got 0 scores before"):
        forgetting([], [])
    with pytest.raises(ValueError, match=r"A score before is zero.*\[0.0, 0.5\]"):
        forgetting([0.0, 0.5], [0.0, 0.5])


def test_retention_is_of_the_score_above_chance():
    assert retention([0.45], [0.35], [0.25]) == pytest.approx(0.5)
    assert retention([0.45], [0.25], [0.25]) == 0
    assert retention([0.8], [0.4]) == 0.5
    assert math.isnan(retention([0.25], [0.4], [0.25]))
    # A task near chance does not outweigh the others.
    assert retention([0.26, 0.75], [0.22, 0.70], [0.25, 0.25]) == pytest.approx((-0.03 + 0.45) / (0.01 + 0.50))
    draws = retention(np.full((2, 3), 0.5), np.full((2, 3), 0.4), [0.25, 0.3])
    assert draws == pytest.approx(np.full(3, 0.25 / 0.45))


def test_share_of_nothing_is_not_a_number():
    assert share(0.3, 0.6) == 0.5
    assert math.isnan(share(0.3, 0.0)) and math.isnan(share(0.3, -0.1))


def test_mcnemar_counts_the_questions_that_changed():
    before = [1, 1, 1, 1, 1, 1, 0, 0, 1, 0]
    after = [0, 0, 0, 0, 0, 1, 1, 0, 1, 0]
    # Five lost, one gained: 2 · P(X <= 1), X binomial(6, 1/2).
    assert mcnemar(before, after) == {"lost": 5, "gained": 1, "p_value": pytest.approx(2 * 7 / 64)}
    assert mcnemar(before, before) == {"lost": 0, "gained": 0, "p_value": 1.0}


def test_paired_interval_agrees_with_scipys_bootstrap():
    g = np.random.default_rng(0)
    before = (g.random(2000) < 0.6).astype(float)
    after = np.where(g.random(2000) < 0.8, before, (g.random(2000) < 0.4))
    found = paired_interval(before, after)
    theirs = stats.bootstrap((after - before,), np.mean, method="percentile", rng=1).confidence_interval
    assert found["mean"] == pytest.approx((after - before).mean())
    assert (found["low"], found["high"]) == (
        pytest.approx(theirs.low, abs=0.001),
        pytest.approx(theirs.high, abs=0.001),
    )
    # Pairing pays: the questions' own difficulty cancels.
    apart = math.sqrt(before.var() / 2000 + after.var() / 2000)
    assert found["high"] - found["low"] < 0.75 * 2 * 1.96 * apart


@pytest.mark.parametrize(
    "found",
    [
        paired_interval([1.0], [0.0]),  # one question
        paired_interval([1.0, 0.0, 1.0], [0.0, -1.0, 0.0]),  # all alike: no resample differs
        mean_interval([0.1] * 50),
        interval(np.subtract, {0: np.full(2, 0.7)}, {0: np.full(2, 0.4), 1: np.full(2, 0.1)}),  # one common seed
        interval(lambda x: x, {0: np.full(11, 0.5), 1: np.full(11, 0.5)}),
        interval(lambda x: x / x, np.random.default_rng(0).random(11)),  # constant by construction
    ],
    ids=["one question", "equal changes", "equal scores", "one common seed", "equal seeds", "constant"],
)
def test_where_nothing_varies_there_is_no_interval(found):
    assert math.isfinite(found["mean"])
    assert math.isnan(found["low"]) and math.isnan(found["high"])


def test_resamples_without_a_value_are_not_left_out():
    scores = np.array([0.5, 0.0, 1.0, 2.0, 3.0])
    found = interval(lambda x: share(1.0, x), scores)
    assert found["mean"] == 2.0 and math.isnan(found["low"]) and math.isnan(found["high"])


def test_resampling_is_seeded():
    values = np.random.default_rng(1).random(50)
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values) != mean_interval(values, seed=1)
    weights = resampling_weights(50)
    assert weights.shape == (2001, 50) and (weights.sum(1) == 50).all() and (weights[0] == 1).all()


def test_scores_of_other_questions_are_refused():
    for function in (mcnemar, paired_interval):
        with pytest.raises(ValueError, match=r"shapes \(3,\) and \(2,\)"):
            function([1, 0, 1], [1, 0])


def test_interval_without_question_noise_is_students():
    values = [0.31, 0.35, 0.30]
    found = interval(lambda x: x, {seed: np.full(101, value) for seed, value in enumerate(values)})
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (found["low"], found["high"], found["seeds"]) == (pytest.approx(low), pytest.approx(high), [0, 1, 2])
    assert found["by_seed"] == pytest.approx(values)


def test_interval_uses_the_seeds_that_all_have_and_pairs_them():
    noisy = {seed: np.full(11, 0.1 * seed) for seed in range(4)}
    shifted = {seed: noisy[seed] + 0.5 + 1e-3 * (seed - 2) for seed in (1, 2, 3)}
    found = interval(np.subtract, shifted, noisy)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.5, 0.5, 0.5), abs=0.003)
    assert found["seeds"] == [1, 2, 3]
    assert math.isnan(interval(np.subtract, {0: noisy[0]}, {1: noisy[1]})["mean"])


def test_interval_covers_over_questions_and_seeds():
    """Three seeds whose true drops differ by 3 points, on 200 questions: the interval of questions alone covers 63 %."""
    g = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        difficulty = g.random(200)
        scores = {
            s: (g.random(200) < np.clip(difficulty - 0.05 + g.normal(0, 0.03), 0, 1)).astype(float) for s in range(3)
        }
        weights = resampling_weights(200, resamples=200, seed=int(g.integers(10**6)))
        found = interval(lambda x: x, {s: scores_by_resample(x, weights) for s, x in scores.items()})
        covered += found["low"] <= 0.4512 <= found["high"]  # E max(u - 0.05 + e, 0) for uniform u
    assert covered >= 0.93 * 200


# Ratios


def simulated(g, over, under, spread=0.3, n=300, seeds=3, noise=0.02):
    """Resampled quantities by seed, of rows whose means are about `over` and `under`."""
    rows = g.normal(0, spread, (2, n))
    weights = resampling_weights(n, resamples=200, seed=int(g.integers(10**6)))
    shift = g.normal(0, noise, (seeds, 2))
    return tuple(
        {s: scores_by_resample(rows[i] + mean + shift[s, i], weights) for s in range(seeds)}
        for i, mean in enumerate((over, under))
    )


def test_ratio_is_given_only_where_the_denominator_is_clearly_above_zero():
    g = np.random.default_rng(2)
    for under in (0.5, 0.05, 0.0, -0.3):
        numerator, denominator = simulated(g, 0.3, under)
        found = ratio_interval(numerator, denominator)
        own = interval(lambda x: x, denominator)
        above = own["low"] > 0 and own["low"] > own["mean"] / 4
        assert (found is not None) == above
        if above:
            assert found["mean"] == pytest.approx(
                np.mean([numerator[s][0] for s in range(3)]) / np.mean([denominator[s][0] for s in range(3)])
            )
            assert found["low"] < found["mean"] < found["high"]
    # Over the seeds that both have: one of which, negative, has no ratio of its own.
    seed = {0: np.linspace(0.9, 1.1, 101), 1: np.linspace(-0.3, -0.1, 101)}
    assert ratio_interval({1: seed[1]}, seed) is None
    assert ratio_interval({0: seed[0]}, seed)["seeds"] == [0]
    assert ratio_interval({2: seed[0]}, seed) is None


def test_ratio_of_a_quantity_to_itself_has_no_interval():
    _, denominator = simulated(np.random.default_rng(3), 0.3, 0.5)
    found = ratio_interval(denominator, denominator)
    assert found["mean"] == 1.0 and math.isnan(found["low"]) and math.isnan(found["high"])


def test_ratio_of_normal_quantities_is_fiellers():
    """Without question noise, and so few degrees of freedom that the interval is far from symmetric."""
    over, under = np.array([0.50, 0.62, 0.41, 0.58]), np.array([0.9, 1.3, 0.7, 1.2])
    found = ratio_interval(
        {s: np.full(2, x) for s, x in enumerate(over)}, {s: np.full(2, x) for s, x in enumerate(under)}
    )
    t = stats.t.ppf(0.975, 3)
    (v11, v12), (_, v22) = np.cov(over, under) / 4
    a, b = over.mean(), under.mean()
    g = t**2 * v22 / b**2
    root = t / b * math.sqrt(v11 - 2 * a / b * v12 + (a / b) ** 2 * v22 - g * (v11 - v12**2 / v22))
    middle = a / b - g * v12 / v22
    assert (found["low"], found["high"]) == pytest.approx(
        ((middle - root) / (1 - g), (middle + root) / (1 - g)), abs=1e-4
    )


def test_ratio_interval_covers_also_where_the_denominator_is_near_zero():
    g = np.random.default_rng(4)
    found = [ratio_interval(*simulated(g, 0.1, 0.08, seeds=1, noise=0.0)) for _ in range(150)]
    shown = [x for x in found if x is not None]
    assert len(shown) > 100
    assert sum(x["low"] <= 0.1 / 0.08 <= x["high"] for x in shown) >= 0.92 * len(shown)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=8))
def test_pareto_front_beats_every_other_point_and_no_point_of_its_own(points):
    gains, losses = zip(*points, strict=True)
    front = pareto_front(gains, losses)

    def beats(i, j):
        return gains[i] >= gains[j] and losses[i] <= losses[j] and points[i] != points[j]

    assert not any(beats(i, j) for i in front for j in front)
    assert all(any(beats(i, j) for i in front) for j in range(len(points)) if j not in front)
    assert [losses[i] for i in front] == sorted(losses[i] for i in front)


POINTS = st.lists(st.tuples(st.integers(-3, 9), st.integers(0, 12)), min_size=1, max_size=7)


@given(POINTS)
def test_hypervolume_is_the_share_of_the_plane_that_is_dominated(points):
    """Against counting: the points lie on a grid of tenths, and so does every cell."""
    gains, losses = np.array(points).T / 10
    cells = [(g + 0.5, loss + 0.5) for g in range(10) for loss in range(10)]
    dominated = sum(any(10 * g > y and 10 * f < x for g, f in zip(gains, losses, strict=True)) for y, x in cells)
    assert hypervolume(gains, losses) == pytest.approx(dominated / 100)


def test_hypervolume_by_hand():
    # Half of the reference's gain at a tenth of its drift, all of it at its own: 0.5 · 0.9.
    assert hypervolume([0.5, 1.0], [0.1, 1.0]) == pytest.approx(0.45)
    assert hypervolume([0.5, 1.2, 0.3], [0.1, 0.6, 0.2]) == pytest.approx(0.5 * 0.5 + 1.2 * 0.4)
    assert hypervolume([0.5], [0.2], bound=0.1) == hypervolume([-0.5], [0.2]) == 0
    assert hypervolume(np.zeros((0, 3)), np.zeros((0, 3))).tolist() == [0, 0, 0]
    g = np.random.default_rng(0)
    gains, losses = g.normal(0.6, 0.4, (5, 40)), g.uniform(0, 1.4, (5, 40))
    each = [hypervolume(*pair) for pair in zip(gains.T, losses.T, strict=True)]
    assert hypervolume(gains, losses) == pytest.approx(each)


@given(POINTS)
def test_gain_and_loss_along_a_front_are_those_of_its_lines(points):
    gains, losses = np.array(points).T / 10
    front = [(0.0, 0.0)] + [(losses[i], gains[i]) for i in pareto_front(gains, losses) if gains[i] > 0]
    front = sorted({y: (x, y) for x, y in sorted(front, reverse=True)}.values())
    for level in (0.05, 0.3, 0.75):
        lines = [
            y + (level - x) * (y_next - y) / (x_next - x)
            for (x, y), (x_next, y_next) in itertools.pairwise(front)
            if x <= level < x_next
        ]
        assert gain_at_loss(gains, losses, level) == pytest.approx(lines[0] if lines else front[-1][1])
        found = loss_at_gain(gains, losses, level)
        if level > max(gains):
            assert found == math.inf
        else:
            assert gain_at_loss(gains, losses, found) == pytest.approx(level) or found in losses
            assert all(loss >= found or gain < level for gain, loss in zip(gains, losses, strict=True))


def test_along_fronts_by_hand():
    gains, losses = [0.6, 1.0, 0.5, 0.9], [0.1, 0.5, 0.3, 0.6]
    assert gain_at_loss(gains, losses, 0.05) == pytest.approx(0.3)
    assert gain_at_loss(gains, losses, 0.3) == pytest.approx(0.8)
    assert gain_at_loss(gains, losses, 0.9) == 1
    assert loss_at_gain(gains, losses, 0.8) == pytest.approx(0.3)
    assert loss_at_gain(gains, losses, 1.1) == math.inf
    both = gain_at_loss(np.array([gains, gains]).T, np.array([losses, losses]).T, 0.3)
    assert both == pytest.approx([0.8, 0.8])
