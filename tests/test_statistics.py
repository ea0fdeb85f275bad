import numpy as np
import pytest
import xarray
from scipy import stats

from purejaxppo.experiment.report.plot_fields import best_index
from purejaxppo.experiment.report.ranking import as_table, best, importance, rank
from purejaxppo.experiment.report.statistics import (
    aggregate,
    area_under_curve,
    count_scored,
    final_scores,
    lost,
    probability_of_improvement,
    seeds_to_separate,
    swept_fields,
)

NAN = np.nan
# What rliable 1.2.0 (with scipy 1.17.1) made of these: IQM 0.8133333333333334, of the first environment 0.9, mean
# 0.8370833333333333; probability of improvement 0.5694444444444444, in the first environment 0.6979166666666666.
# Its intervals: IQM [0.675, 0.958], of the first environment [0.543, 1.103], probability [0.396, 0.736].
A = xarray.DataArray(
    [
        [1.0, 0.55, 1.03, 0.69, 1.05, 1.35, 0.05, 0.88],
        [1.45, 1.07, 1.97, 1.54, 0.83, 0.63, 0.66, 0.67],
        [0.66, 0.3, 0.55, 0.98, 0.79, 0.57, -0.12, 0.94],
    ],
    dims=("env", "seed"),
)
B = xarray.DataArray(
    [[1.0, 0.58, 0.19, 0.48, 0.79, 0.76], [1.45, 1.08, 0.91, 1.52, 1.45, 1.14], [0.66, 0.65, 0.21, 0.28, 0.37, 0.63]],
    dims=("env", "seed"),
)


def runs(*values, **coords):
    """Scores [setting, seed]."""
    coords = {name: ("setting", list(column)) for name, column in coords.items()}
    return xarray.DataArray(list(values), coords, ("setting", "seed"))


def curves(returns, step, **more):
    """Metrics [seed, update]."""
    more = {name: (("seed", "updates"), x) for name, x in more.items()}
    return xarray.Dataset({"episode_return": (("seed", "updates"), returns), **more}, {"step": ("updates", step)})


def interval(found):
    return [float(found["low"]), float(found["high"])]


def test_the_interquartile_mean_is_that_of_the_middle_half():
    found = aggregate(runs([9000, 1, 2, 3, 4, 5, 6, -9000], [1] * 8))
    assert found["value"].values.tolist() == [3.5, 1]
    assert found["num_runs"].values.tolist() == [8, 8]
    assert aggregate(runs([9, 1, 2]), "mean")["value"] == 4
    assert aggregate(runs([9, 1, 2]), "median")["value"] == 2


def test_aggregates_agree_with_rliable():
    over = ("env", "seed")
    assert float(aggregate(A, over=over)["value"]) == pytest.approx(0.8133333333333334, rel=1e-12)
    assert float(aggregate(A, "mean", over=over)["value"]) == pytest.approx(0.8370833333333333, rel=1e-12)
    assert float(aggregate(A)["value"][0]) == pytest.approx(0.9, rel=1e-12)
    assert interval(aggregate(A, over=over, num_resamples=20_000)) == pytest.approx([0.675, 0.958], abs=0.015)
    assert interval(aggregate(A, num_resamples=20_000).isel(env=0)) == pytest.approx([0.543, 1.103], abs=0.015)


def test_the_bootstrap_is_that_of_scipy_and_about_that_of_theory():
    x = np.random.default_rng(0).normal(size=40)
    found = aggregate(runs(x), "mean", num_resamples=5000, seed=3).isel(setting=0)
    alone = stats.bootstrap((np.sort(x),), np.mean, n_resamples=5000, method="percentile", rng=3).confidence_interval
    assert interval(found) == pytest.approx(list(alone), rel=1e-12)
    theory = x.mean() + np.array([-1.96, 1.96]) * x.std() / np.sqrt(40)
    assert interval(found) == pytest.approx(theory.tolist(), abs=0.02)
    narrow = aggregate(runs(x), "mean", confidence=0.5).isel(setting=0)
    assert found["low"] < narrow["low"] < narrow["high"] < found["high"]


def test_environments_are_resampled_apart():
    """Seeds of two constants can only ever give the mean of the two."""
    scores = xarray.DataArray([[0.0] * 5, [10.0] * 5], dims=("env", "seed"))
    assert interval(aggregate(scores, "mean", over=("env", "seed"))) == [5, 5]
    assert aggregate(scores.rename(env="setting"), "mean").sizes == {"setting": 2}


def test_runs_without_a_score_are_counted():
    found = aggregate(runs([1, 2, NAN, 3], [5, NAN, NAN, NAN], [NAN] * 4, [1, 2, 3, 6]), "mean")
    np.testing.assert_array_equal(found["value"], [2, 5, NAN, 3])
    assert found["num_runs"].values.tolist() == [3, 1, 0, 4]
    assert found["num_missing"].values.tolist() == [1, 3, 4, 0]
    assert found["low"].isnull().values.tolist() == [False, True, True, False]


def test_an_environment_without_a_score_leaves_no_value():
    found = aggregate(A.where(A["env"] != 1), over=("env", "seed"))
    assert np.isnan(found["value"]) and found["num_missing"] == 8


def test_a_setting_is_what_it_is_alone():
    scores = xarray.DataArray(np.random.default_rng(1).normal(size=(3, 4, 6)), dims=("x", "seed", "y"))
    scores[0, 0, :3] = NAN
    together = aggregate(scores, num_resamples=200)
    for i in range(3):
        for j in range(6):
            alone = aggregate(scores.isel(x=i, y=j), num_resamples=200)
            xarray.testing.assert_allclose(together.isel(x=i, y=j), alone)


def test_the_probability_of_improvement_counts_pairs():
    """Of (3, 2), (3, 1), (1, 2), (1, 1) two are won and one is tied."""
    assert probability_of_improvement([3, 1], [2, 1])["value"] == 2.5 / 4
    assert probability_of_improvement([1, 1], [1, 1])["value"] == 0.5
    assert probability_of_improvement([NAN, 1, 1], [-5, -5])["value"] == pytest.approx(2 / 3)
    assert np.isnan(probability_of_improvement([3], [2, 1])["low"])


def test_the_probability_of_improvement_agrees_with_rliable():
    found = probability_of_improvement(A, B, num_resamples=5000)
    assert float(found["value"]) == pytest.approx(0.5694444444444444, rel=1e-12)
    assert interval(found) == pytest.approx([0.396, 0.736], abs=0.02)
    first = probability_of_improvement(A.isel(env=0), B.isel(env=0), num_resamples=0)
    assert float(first["value"]) == pytest.approx(0.6979166666666666, rel=1e-12)


def test_as_many_seeds_as_said_tell_settings_apart():
    """Simulated: normal scores that differ by half a standard deviation, P(a > b) = 0.64."""
    quantiles = stats.norm.ppf((np.arange(500) + 0.5) / 500)
    found = seeds_to_separate(quantiles + 0.5, quantiles, power=0.8)
    assert found.probability == pytest.approx(stats.norm.cdf(0.5 / np.sqrt(2)), abs=0.002)
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 4000, int(found.num_seeds)))
    power = (stats.mannwhitneyu(a + 0.5, b, axis=1).pvalue < 0.05).mean()
    assert power == pytest.approx(0.8, abs=0.03)


def test_seeds_to_separate_says_how_many_more():
    """Noether: (1.960 + 0.842)^2 / (6 / 4) = 5.2 where every run of one is better."""
    assert seeds_to_separate([3, 4, 5], [0, 1]) == (6, 4, 1)
    assert seeds_to_separate([0, 1], [3, 4, 5] * 9) == (6, 4, 0)
    assert seeds_to_separate([1, 2], [1, 2]) == (np.inf, np.inf, 0.5)


def test_the_area_under_a_curve_is_its_mean_height_over_steps():
    """Held at 2 up to the first episode, straight across the gap: (20 x 2 + 20 x 3 + 10 x 4) / 50."""
    found = area_under_curve(curves([[NAN, 2, NAN, 4, NAN], [NAN] * 5, [7] * 5], [10.0, 30, 40, 50, 60]))
    np.testing.assert_allclose(found, [140 / 50, NAN, 7])


def test_the_area_under_a_curve_ends_where_the_run_does():
    metrics = curves([[0.0, 2, NAN]], [10.0, 20, NAN], value_loss=[[1, 1, NAN]])
    assert area_under_curve(metrics).item() == 1


def test_a_run_that_turned_nan_has_no_score():
    """The second run turned nan; the first only ended no episode in its last update."""
    more = {"num_episodes": [[1, 1, 0], [1, 0, 0]], "value_loss": [[3.0, 2, 1], [3, NAN, NAN]]}
    metrics = curves([[5, 7, NAN], [9, NAN, NAN]], [1.0, 2, 3], **more)
    assert lost(metrics).values.tolist() == [[False] * 3, [False, True, True]]
    np.testing.assert_array_equal(final_scores(metrics), [6, NAN])
    np.testing.assert_array_equal(area_under_curve(metrics), [6.5, NAN])
    assert not lost(metrics.drop_vars("value_loss")).any()
    said = metrics.assign_coords(updates=[1, 2, 3]).drop_vars("value_loss").assign(failed_update=("seed", [0, 2]))
    assert lost(said).values.tolist() == [[False] * 3, [False, True, True]]


def test_settings_are_ranked_best_first_with_their_fields():
    coords = {"learning_rate": [1e-4, 1e-3], "widths": ["32", "64,64"]}
    scores = xarray.DataArray([[[1, 1], [4, 6]], [[2, 4], [NAN, NAN]]], coords, (*coords, "seed"))
    ranked = rank(scores)
    assert ranked["setting"].values.tolist() == [1, 2, 0, 3]
    assert ranked["learning_rate"].values.tolist() == [1e-4, 1e-3, 1e-4, 1e-3]
    assert ranked["widths"].values.tolist() == ["64,64", "32", "32", "64,64"]
    assert ranked["iqm"].values.tolist()[:3] == [5, 3, 1]
    assert np.isnan(ranked[["iqm", "mean", "median", "low", "high"]].isel(setting=3).to_array()).all()  # no score
    assert as_table(ranked).splitlines()[4].split()[2:] == ["none"] * 5 + ["0", "2"]
    assert ranked["num_missing"].values.tolist() == [0, 0, 0, 2]
    assert best(scores) == {"learning_rate": 1e-4, "widths": "64,64"}


def test_the_mean_decides_between_settings_whose_interquartile_means_are_equal():
    scores = runs([0, 5, 5, 5], [5, 5, 5, 5], [NAN, NAN, NAN, NAN], [5, 5, 5, 4], x=[1, 2, 3, 4])
    assert rank(scores)["x"].values.tolist() == [2, 4, 1, 3]
    assert best(scores) == {"x": 2}
    assert best_index(scores, "iqm") == {"setting": 1} and best_index(scores.isel(setting=1), "iqm") == {}


def test_a_lucky_survivor_does_not_win():
    scores = runs([100, NAN, NAN, NAN], [8, 9, 10, 11], x=[1, 2])
    assert best(scores) == {"x": 2}
    assert rank(scores)["iqm"].values.tolist() == [9.5, 8]


def test_paired_fields_share_a_dimension_with_or_without_a_grid():
    paired = runs([1, 2], [3, 4], x=[5, 6], y=["a", "b"])
    assert swept_fields(paired) == {"x": "setting", "y": "setting"}
    assert best(paired) == {"x": 6, "y": "b"}
    mixed = xarray.concat([paired, paired - 2], "z").assign_coords(z=[7, 8])
    assert swept_fields(mixed) == {"z": "z", "x": "setting", "y": "setting"}
    assert best(mixed) == {"z": 7, "x": 6, "y": "b"}
    double = paired.rename(setting="setting_1").assign_coords(setting_1=[0, 1])
    assert best(double) == {"x": 6, "y": "b"}
    assert best(runs([1.0], [2.0])) == {"setting": 1}
    assert rank(xarray.DataArray([1.0, 2.0], dims="seed"))["iqm"].values.tolist() == [1.5]


def test_a_table_has_aligned_columns():
    table = as_table(rank(runs([1, 1], [2.5, 2.5], [0, 0], x=[3e-4, 1e-3, 0.5])), max_rows=2).split("\n")
    assert table[0].split() == ["x", "iqm", "low", "high", "mean", "median", "num_runs"]
    assert table[1].split() == ["0.001", "2.5", "2.5", "2.5", "2.5", "2.5", "2"]
    assert table[2].split() == ["0.0003", "1", "1", "1", "1", "1", "2"]
    assert table[3] == "... and 1 more"
    assert len({len(line) for line in table[:3]}) == 1
    assert "num_missing" in as_table(rank(runs([1, NAN])))


def test_importance_is_the_share_of_a_main_effect():
    """Scores x + y with x in 0, 2 and y in 0, 1: variances 1 and 1/4. Then x y alone, which is half interaction."""
    grid = {"x": [0.0, 2.0], "y": [0.0, 1.0]}
    x, y = (xarray.DataArray(values, {name: values}, (name,)) for name, values in grid.items())
    seeds = xarray.DataArray([0.0, 0.0], dims="seed")
    shares = importance(x + y + seeds).to_series()
    assert shares.to_dict() == pytest.approx({"x": 0.8, "y": 0.2, "seeds": 0, "rest": 0})
    shares = importance((x - 1) * (y - 0.5) + 0 * x + seeds).to_series()
    assert shares.to_dict() == pytest.approx({"x": 0, "y": 0, "seeds": 0, "rest": 1})
    assert importance(0 * (x + y) + seeds).values.tolist() == [0, 0, 0, 0]


def test_importance_calls_luck_luck():
    random = np.random.default_rng(0)
    noise = xarray.DataArray(random.normal(size=(6, 6, 8)), {"x": range(6), "y": range(6)}, ("x", "y", "seed"))
    shares = importance(noise).to_series().to_dict()
    assert shares["seeds"] > 0.9 and max(shares[name] for name in ("x", "y", "rest")) < 0.06
    shares = importance(noise + 2 * noise["x"]).to_series().to_dict()
    assert shares["x"] == pytest.approx(4 * 35 / 12 / (4 * 35 / 12 + 1), abs=0.03)


def test_importance_finds_the_field_of_a_sample_that_mattered():
    """A hump, which no rank correlation sees."""
    random = np.random.default_rng(0)
    x, y = random.uniform(size=(2, 60))
    scores = -((x - 0.5) ** 2)[:, None] + random.normal(scale=0.01, size=(60, 3))
    shares = importance(runs(*scores.tolist(), x=x, y=y, z=["a", "b"] * 30)).to_series().to_dict()
    assert shares["x"] > 0.75 and max(shares["y"], shares["z"]) < 0.1


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (lambda: aggregate(A, "max"), r"statistic='max' is unknown \(known: iqm, mean, median\)"),
        (lambda: aggregate(A, over="env"), r"over=\('env',\) must name seed"),
        (lambda: aggregate(A.rename(seed="run")), r"the scores have no dimension seed \(theirs: env, run\)"),
        (lambda: rank(A.rename(seed="run")), "the scores have no dimension seed"),
        (lambda: probability_of_improvement(A, B.isel(env=0)), "a has runs in 3 environments, b in 1"),
        (lambda: probability_of_improvement(A.rename(env="x"), A), "a has dimensions .* select one setting"),
        (lambda: seeds_to_separate(A, B), "a and b have several environments"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        wrong()


@pytest.mark.parametrize(
    "ended, failed, words",
    [
        ([[40, 70], [0, 0]], [0, 1], "100 episodes"),  # the agent that turned nan is left out
        ([[3, 1], [9, 0]], [0, 0], "4 to 9 episodes"),
        ([[1, 0]], [0], "1 episode"),
        ([[0, 0]], [0], "episodes"),
        ([[5, 5]], [1], "episodes"),
    ],
)
def test_it_is_said_how_many_episodes_a_return_is_the_mean_of(ended, failed, words):
    shape, loss = np.shape(ended), np.zeros(np.shape(ended))
    loss[np.array(failed) > 0] = NAN
    data = {"episode_return": (("seed", "updates"), np.ones(shape)), "num_episodes": (("seed", "updates"), ended)}
    data |= {"loss": (("seed", "updates"), loss), "failed_update": ("seed", failed)}
    metrics = xarray.Dataset(data, {"step": ("updates", np.arange(shape[1])), "updates": np.arange(shape[1]) + 1})
    assert count_scored(metrics) == words
