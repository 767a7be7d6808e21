import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trl_ema.forgetting import (
    forgetting,
    interval,
    mcnemar,
    mean_interval,
    paired_interval,
    pareto_front,
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


def test_a_single_question_has_an_interval_of_no_width():
    assert paired_interval([1.0], [0.0])["low"] == paired_interval([1.0], [0.0])["high"] == -1


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
    shifted = {seed: noisy[seed] + 0.5 for seed in (1, 2, 3)}
    found = interval(np.subtract, shifted, noisy)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.5, 0.5, 0.5))
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


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=8))
def test_pareto_front_beats_every_other_point_and_no_point_of_its_own(points):
    gains, losses = zip(*points, strict=True)
    front = pareto_front(gains, losses)

    def beats(i, j):
        return gains[i] >= gains[j] and losses[i] <= losses[j] and points[i] != points[j]

    assert not any(beats(i, j) for i in front for j in front)
    assert all(any(beats(i, j) for i in front) for j in range(len(points)) if j not in front)
    assert [losses[i] for i in front] == sorted(losses[i] for i in front)
