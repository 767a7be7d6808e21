import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trl_ema.forgetting import (
    bootstrap_mean,
    change,
    forgetting,
    mcnemar,
    paired_bootstrap,
    pareto_front,
    retention,
    seed_interval,
    share,
)


def test_change_by_hand():
    assert change(0.5, 0.4) == pytest.approx({"before": 0.5, "after": 0.4, "absolute": -0.1, "relative": -0.2})
    assert math.isnan(change(0.0, 0.1)["relative"])


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
    assert retention(0.45, 0.35, chance=0.25) == pytest.approx(0.5)
    assert retention(0.45, 0.25, chance=0.25) == 0
    assert retention(0.8, 0.4) == 0.5
    assert math.isnan(retention(0.25, 0.4, chance=0.25))


def test_share_of_nothing_is_not_a_number():
    assert share(0.3, 0.6) == 0.5
    assert math.isnan(share(0.3, 0.0)) and math.isnan(share(0.3, -0.1))


def test_mcnemar_counts_the_questions_that_changed():
    before = [1, 1, 1, 1, 1, 1, 0, 0, 1, 0]
    after = [0, 0, 0, 0, 0, 1, 1, 0, 1, 0]
    # Five lost, one gained: 2 · P(X <= 1), X binomial(6, 1/2).
    assert mcnemar(before, after) == {"lost": 5, "gained": 1, "p_value": pytest.approx(2 * 7 / 64)}
    assert mcnemar(before, before) == {"lost": 0, "gained": 0, "p_value": 1.0}


def test_paired_bootstrap_agrees_with_the_normal_interval():
    g = np.random.default_rng(0)
    before = (g.random(2000) < 0.6).astype(float)
    after = np.where(g.random(2000) < 0.8, before, (g.random(2000) < 0.4))
    found = paired_bootstrap([before], [after])
    differences = after - before
    half = 1.96 * differences.std(ddof=1) / math.sqrt(2000)
    assert found["difference"] == pytest.approx(differences.mean())
    assert found["low"] == pytest.approx(differences.mean() - half, abs=0.002)
    assert found["high"] == pytest.approx(differences.mean() + half, abs=0.002)
    # Pairing pays: the questions' own difficulty cancels.
    apart = math.sqrt(before.var() / 2000 + after.var() / 2000)
    assert found["high"] - found["low"] < 0.75 * 2 * 1.96 * apart


def test_paired_bootstrap_gives_each_task_the_same_weight():
    few, many = np.array([1.0, 1.0]), np.zeros(1000)
    found = paired_bootstrap([few, many], [few - 1, many])
    assert found["difference"] == -0.5
    assert found["low"] == found["high"] == -0.5


def test_bootstrap_is_seeded():
    values = np.random.default_rng(1).random(50)
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values) != bootstrap_mean(values, seed=1)


def test_scores_of_other_questions_are_refused():
    for function in (mcnemar, lambda a, b: paired_bootstrap([a], [b])):
        with pytest.raises(ValueError, match=r"shapes \(3,\) and \(2,\)"):
            function([1, 0, 1], [1, 0])


def test_seed_interval_is_students():
    values = [0.31, 0.35, 0.30]
    found = seed_interval(values)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (found["low"], found["high"], found["n"]) == (pytest.approx(low), pytest.approx(high), 3)
    assert math.isnan(seed_interval([0.3])["low"]) and seed_interval([0.3])["mean"] == 0.3


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=8))
def test_pareto_front_beats_every_other_point_and_no_point_of_its_own(points):
    gains, losses = zip(*points, strict=True)
    front = pareto_front(gains, losses)

    def beats(i, j):
        return gains[i] >= gains[j] and losses[i] <= losses[j] and points[i] != points[j]

    assert not any(beats(i, j) for i in front for j in front)
    assert all(any(beats(i, j) for i in front) for j in range(len(points)) if j not in front)
    assert [losses[i] for i in front] == sorted(losses[i] for i in front)
