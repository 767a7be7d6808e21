import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from trl_ema.comparison.curves import LEVELS, Curve, choose, drift_at, follow, gain_at, hypervolume
from trl_ema.comparison.statistics import (
    detectable_change,
    detectable_share,
    discoveries,
    forgetting,
    interval,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    paired_interval,
    paired_test,
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


def test_the_paired_bootstrap_agrees_with_students_test_on_many_scores():
    g = np.random.default_rng(0)
    before = g.random(400)
    for shift in (0.0, 0.01, 0.02):
        after = before + g.normal(shift, 0.15, 400)
        assert paired_bootstrap(before, after) == pytest.approx(stats.ttest_rel(after, before).pvalue, abs=0.03)
    assert paired_bootstrap(before, before) == 1.0
    assert paired_bootstrap(before, before + 1 + g.normal(0, 0.1, 400)) == 1 / 2001  # never 0


def test_the_paired_bootstrap_finds_what_is_not_there_as_often_as_it_says():
    g = np.random.default_rng(1)
    found = [paired_bootstrap(g.random(60), g.random(60), resamples=199, seed=i) <= 0.05 for i in range(300)]
    assert 0.02 < np.mean(found) < 0.10


def test_scores_are_tested_by_what_they_are():
    before, after = [1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]
    found = paired_test(before, after)
    assert found == {"test": "McNemar", **mcnemar(before, after), "detectable": detectable_share(4, 2)}
    found = paired_test([0.5, *before], [0.25, *after])
    assert (found["test"], found["lost"], found["gained"]) == ("bootstrap", 2, 1)
    assert found["p_value"] == paired_bootstrap([0.5, *before], [0.25, *after])
    assert math.isnan(paired_test([0.5, 0.5], [0.5, 0.5])["detectable"]) and math.isnan(detectable_change([0.1], [0.9]))


@pytest.mark.parametrize(("questions", "changed"), [(200, 40), (1000, 100), (10042, 700)])
def test_the_detectable_share_solves_connors_formula(questions, changed):
    share, found = changed / questions, detectable_share(questions, changed)
    alpha, beta = stats.norm.ppf(0.975), stats.norm.ppf(0.8)
    needed = ((alpha * math.sqrt(share) + beta * math.sqrt(share - found**2)) / found) ** 2
    assert found < share and needed == pytest.approx(questions)
    # And McNemar's exact test finds a change of that size about as often as it should.
    g, lost = np.random.default_rng(0), (share + found) / 2
    draws = g.multinomial(questions, [lost, share - lost, 1 - share], size=400)[:, :2]
    power = np.mean([stats.binomtest(int(a), int(a + b)).pvalue <= 0.05 for a, b in draws])
    assert 0.7 < power < 0.87


def test_a_change_takes_at_least_as_many_questions_as_change():
    # Of 100 questions 8 have to change, all in one direction, however few did; and of three none can show anything.
    assert detectable_share(100, 0) == detectable_share(100, 2) == pytest.approx(0.0767, abs=1e-4)
    assert detectable_share(100, 30) == pytest.approx(0.1516, abs=1e-4) and detectable_share(3, 1) == 1.0
    assert all(0 < detectable_share(n, changed) <= 1 for n in (4, 5, 10) for changed in range(n + 1))


def test_the_detectable_change_of_scores_is_millers():
    g = np.random.default_rng(0)
    before, after = g.random(500), g.random(500)
    spread = np.std(after - before, ddof=1)
    assert detectable_change(before, after) == pytest.approx((1.959964 + 0.841621) * spread / math.sqrt(500))


def test_discoveries_are_those_of_benjamini_and_hochberg():
    assert discoveries([0.01, 0.02, 0.03, 0.04, 0.05]) == [True] * 5  # each below its share of 5 %
    assert discoveries([0.04, 0.5, 0.9]) == [False] * 3  # 0.04 is not below a third of 5 %
    assert discoveries([0.9, 0.001]) == [False, True] and discoveries([0.05]) == [True] and discoveries([]) == []


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


# Curves and the front that they make


SCALES = (0.25, 0.5, 0.75, 1.0)
# Points of one setting: root of the drift and gain in tenths.
POINTS = st.lists(st.tuples(st.integers(-3, 12), st.integers(0, 13)), min_size=1, max_size=5)
SETTINGS = st.lists(POINTS, min_size=1, max_size=4)


def curve(points):
    gains, roots = np.array(sorted(points, key=lambda point: point[1]), dtype=float).T / 10
    return Curve(gains[:, None], roots[:, None] ** 2)


def front(settings):
    """At the levels, of one column."""
    curves = [curve(points) for points in settings]
    return follow(choose(curves), curves)[:, 0]


def brute_force(settings, roots):
    """The largest gain up to a drift, on any line of two points of one setting or of a point and the origin."""
    best = np.zeros(len(roots))
    for points in settings:
        ends = [(0.0, 0.0), *((root / 10, gain / 10) for gain, root in points if root > 0)]
        for (x, y), (x_1, y_1) in itertools.product(ends, ends):
            if x <= x_1:
                part = np.clip((roots - x) / (x_1 - x), 0, 1) if x_1 > x else (roots >= x).astype(float)
                line = np.where(roots >= x, y + part * (y_1 - y), 0)
                best = np.maximum(best, np.maximum.accumulate(line))
    return best


@given(SETTINGS)
def test_a_front_is_the_upper_envelope_of_its_settings_own_curves(settings):
    assert front(settings) == pytest.approx(brute_force(settings, np.sqrt(LEVELS)), abs=1e-9)
    fine = np.linspace(0, 1, 4001)
    area = integrate.trapezoid(brute_force(settings, fine), fine**2)
    assert hypervolume(front(settings)) == pytest.approx(area, abs=2e-4)


@given(SETTINGS, POINTS, st.integers(0, 3))
def test_a_further_setting_or_scale_never_makes_a_front_worse(settings, points, where):
    wider = [*settings, points]
    denser = [[*own, points[0]] if i == where % len(settings) else own for i, own in enumerate(settings)]
    for more in (wider, denser):
        before, after = front(settings), front(more)
        assert (after >= before - 1e-12).all() and hypervolume(after) >= hypervolume(before) - 1e-12
        for level in (0.1, 0.25, 0.5, 0.98):
            assert gain_at(after, level) >= gain_at(before, level) - 1e-12
            assert drift_at(after, level) <= drift_at(before, level) + 1e-12


@given(SETTINGS)
def test_the_drift_at_a_gain_is_where_the_front_has_it(settings):
    found = front(settings)
    for level in (0.05, 0.31, 0.98):
        drift = float(drift_at(found, level))
        if math.isinf(drift):
            assert found.max() < level
        else:
            assert gain_at(found, drift) == pytest.approx(level, abs=1e-9)


@pytest.mark.parametrize(("gain", "drift"), [(1.0, 1.0), (1.0, 0.1), (0.77, 0.28)], ids=["sft", "rehearsal", "frozen"])
def test_three_scales_are_enough_for_a_curve_of_theory(gain, drift):
    """Gain g·(2α − α²) and drift d·α²: the area is g·(1 − d/6)."""
    gains, drifts = zip(*((gain * (2 * a - a**2), drift * a**2) for a in SCALES), strict=True)
    curves = [Curve(np.array(gains)[:, None], np.array(drifts)[:, None])]
    found = follow(choose(curves), curves)[:, 0]
    area = float(hypervolume(found))
    truth = gain * (1 - drift / 6)
    assert truth - 0.02 < area <= truth
    a = (0.05 / drift) ** 0.5
    assert gain_at(found, 0.05) == pytest.approx(gain * (2 * a - a**2), abs=0.07)
    assert drift_at(found, 0.9375 * gain) == pytest.approx(
        drift * 0.75**2, rel=0.02
    )  # a point, but not one of the levels


def test_what_is_followed_was_chosen_before():
    """The second setting looks better when it is chosen and is worse when it is measured: no choice is made again."""
    chosen_on = [curve([(5, 5)]), curve([(6, 5)])]
    measured_on = [curve([(5, 5)]), curve([(3, 5)])]
    chosen = choose(chosen_on)
    assert set(chosen[0][1:]) == {1} and chosen[0][0] == -1
    assert gain_at(follow(chosen, measured_on), 0.5) == pytest.approx(0.3)


def test_what_cannot_be_scaled_is_a_step():
    def step(gain, drift):
        return Curve(np.array([[gain]]), np.array([[drift]]), scalable=False)

    curves = [step(0.8, 0.5), curve([(5, 4)])]
    found = follow(choose(curves), curves)[:, 0]
    assert gain_at(found, 0.45) == pytest.approx(0.5) and gain_at(found, 0.6) == pytest.approx(0.8)
    assert hypervolume(found) == pytest.approx(0.5 * (1 - 0.16 / 3) - 0.5 * 0.5 + 0.8 * 0.5, abs=0.005)
    # Where it drifts more than when it was chosen, the level below is taken.
    measured = follow(choose(curves), [step(0.8, 0.7), curve([(5, 4)])])[:, 0]
    assert gain_at(measured, 0.6) == pytest.approx(0.5) and gain_at(measured, 0.8) == pytest.approx(0.8)
    worthless = [step(-0.1, 0.2)]
    assert not follow(choose(worthless), worthless).any()
