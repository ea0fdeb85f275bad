from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray
from scipy import stats

from purejaxppo.experiment.report.curve import plot_learning_curve
from purejaxppo.experiment.report.metrics import mean_interval
from purejaxppo.experiment.report.ranking import importance
from purejaxppo.experiment.report.search_plots import plot_lineage, plot_rungs, plot_schedule, plot_trials
from purejaxppo.experiment.report.sweep_plots import (
    plot_curves,
    plot_heatmap,
    plot_importance,
    plot_parallel,
    plot_sweep,
)

matplotlib.use("Agg")
NUM_SEEDS, NUM_UPDATES = 8, 20
GRID = {"learning_rate": [1e-4, 1e-3, 1e-2], "discount": [0.9, 0.99], "clip": [0.1, 0.2]}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def metrics(heights, **coords):
    """Metrics of settings with these heights [...]: curves that rise to them, with noise, ten episodes an update."""
    heights = np.asarray(heights, np.float64)
    noise = np.random.default_rng(0).normal(size=(*heights.shape, NUM_SEEDS, NUM_UPDATES))
    update = np.arange(1, NUM_UPDATES + 1)
    returns = heights[..., None, None] * update / NUM_UPDATES + noise
    dims = [*coords, "seed", "updates"]
    if coords and isinstance(next(iter(coords.values())), tuple):
        dims = ["setting", "seed", "updates"]
    columns = {"episode_return": returns, "num_episodes": np.full(returns.shape, 10), "value_loss": np.abs(noise)}
    coords = coords | {"seed": range(NUM_SEEDS), "updates": update, "step": ("updates", 500.0 * update)}
    return xarray.Dataset({name: (dims, x) for name, x in columns.items()}, coords)


def grid():
    """The best setting is learning_rate=1e-3, discount=0.99, clip=0.1."""
    rate, discount, clip = np.meshgrid([10, 30, 20], [0, 5], [2, 0], indexing="ij")
    return metrics(rate + discount + clip, **GRID)


def sample(num_settings=30):
    """Settings of three fields that vary together; the last is the best."""
    random = np.random.default_rng(1)
    columns = {
        "learning_rate": 10 ** random.uniform(-4, -2, num_settings),
        "clip": random.uniform(0.1, 0.3, num_settings),
        "widths": random.choice(["64,64", "128,128"], num_settings),
    }
    coords = {name: ("setting", column) for name, column in columns.items()}
    return metrics(np.arange(num_settings) * 10.0, **coords)


def axes_of(figure) -> list[Any]:
    """The axes of a figure, without the types of matplotlib, which know too little of what was drawn."""
    return figure.axes


def texts(ax):
    return [text.get_text() for text in ax.texts]


def legend_of(figure):
    (legend,) = figure.legends
    return legend.get_title().get_text(), [text.get_text() for text in legend.get_texts()]


def heading_of(figure):
    return figure.get_suptitle().replace("\xa0", " ")


def test_a_learning_curve_is_the_mean_of_its_runs_with_its_interval():
    data = metrics(100.0)
    ax = axes_of(plot_learning_curve(data, title="here"))[0]
    line = ax.lines[-1]
    assert len(ax.lines) == NUM_SEEDS + 1 and ax.get_title() == "here"
    np.testing.assert_allclose(line.get_ydata(), data["episode_return"].values.mean(0))
    np.testing.assert_array_equal(line.get_xdata(), data["step"])
    _, low, high = mean_interval(data["episode_return"].values[:, 7])
    band = ax.collections[0].get_paths()[0].vertices
    assert sorted(band[band[:, 0] == 4000, 1].tolist()) == pytest.approx([low, high])


def test_curves_are_drawn_for_the_first_field_with_the_others_at_the_best_setting():
    data = grid()
    figure = plot_curves(data, title="here")
    assert [ax.get_title() for ax in figure.axes] == ["discount = 0.9", "discount = 0.99"]
    assert legend_of(figure) == ("learning rate", ["0.0001", "0.001", "0.01"])
    assert heading_of(figure).split("\n") == [
        "here",
        "interquartile mean with 95 % interval of 8 seeds",
        "at the best clip = 0.1",
    ]
    for j, ax in enumerate(axes_of(figure)):
        assert len(ax.lines) == len(ax.collections) == 3
        for i, line in enumerate(ax.lines):
            middle = np.sort(data["episode_return"].values[i, j, 0], axis=0)[2:6].mean(0)
            np.testing.assert_allclose(line.get_ydata(), middle)
            np.testing.assert_array_equal(line.get_xdata(), data["step"])


def test_the_band_of_a_curve_is_the_interval_over_seeds():
    data = metrics([10.0], learning_rate=[1e-3])
    ax = axes_of(plot_curves(data, statistic="mean", confidence=0.5))[0]
    returns = data["episode_return"].values[0, :, 7]
    half = stats.norm.ppf(0.75) * returns.std() / np.sqrt(NUM_SEEDS)
    band = ax.collections[0].get_paths()[0].vertices
    low, high = np.sort(band[band[:, 0] == 4000, 1])
    assert [low, high] == pytest.approx([returns.mean() - half, returns.mean() + half], abs=0.05)


def test_lines_and_panels_are_those_asked_for():
    figure = plot_curves(grid(), line="clip", panel="learning_rate", statistic="median")
    assert [len(ax.lines) for ax in figure.axes] == [2, 2, 2]
    assert legend_of(figure) == ("clip", ["0.1", "0.2"])
    assert heading_of(figure).endswith("at the best discount = 0.99")
    figure = plot_curves(grid(), panel="learning_rate")
    assert legend_of(figure)[0] == "discount"


def test_one_seed_has_lines_without_a_band():
    figure = plot_curves(grid().isel(seed=[0], discount=0, clip=0))
    (ax,) = figure.axes
    assert len(ax.lines) == 3 and heading_of(figure) == "one seed"
    assert not any(len(band.get_paths()) for band in ax.collections)


def test_where_nothing_was_swept_there_is_one_curve():
    figure = plot_curves(metrics(100.0))
    assert len(figure.axes[0].lines) == 1 and not figure.legends


def test_a_value_that_is_an_empty_text_has_a_name_in_the_legend():
    data = metrics(np.arange(2.0), memory=["", "gru"])
    assert legend_of(plot_curves(data)) == ("memory", ["none", "gru"])


def test_of_many_values_some_are_drawn():
    data = metrics(np.arange(20.0), learning_rate=np.geomspace(1e-4, 1e-2, 20))
    title, labels = legend_of(plot_curves(data))
    assert title == "learning rate\n(8 of 20)" and labels[0] == "0.0001" and labels[-1] == "0.01" and len(labels) == 8
    assert len(legend_of(plot_curves(data, max_lines=3))[1]) == 3


def test_of_a_sample_the_best_settings_are_drawn():
    data = sample()
    title, labels = legend_of(plot_curves(data))
    assert title == "learning rate / clip / widths\n(5 best of 30)" and len(labels) == 5
    first = data.isel(setting=29)
    assert labels[0] == f"{first['learning_rate']:.4g} / {first['clip']:.4g} / {first['widths'].item()}"
    _, labels = legend_of(plot_curves(data, line="learning_rate"))
    assert [float(x) for x in labels] == pytest.approx(np.sort(data["learning_rate"][25:]).tolist(), rel=1e-3)


def test_a_run_that_turned_nan_goes_on_at_the_lowest_score():
    data = metrics([100.0, 50.0], learning_rate=[1e-4, 1e-3])
    gone = (data["updates"] > 10) & (data["seed"] < 6) & (data["learning_rate"] == 1e-4)
    data = data.where(~gone).assign(num_episodes=data["num_episodes"].where(~gone, 0))
    figure = plot_curves(data)
    assert heading_of(figure).endswith("runs without a score, counted as the lowest: 6 of 16")
    assert axes_of(figure)[0].lines[0].get_ydata()[10:] == pytest.approx(np.full(10, 38), abs=3)
    figure = plot_heatmap(data.expand_dims(clip=[0.1]), "learning_rate", "clip")
    assert texts(axes_of(figure)[0])[0].endswith("\n6 missing")


def test_a_setting_whose_runs_all_turned_nan_is_drawn_as_failed():
    data = grid()
    failed = xarray.where(data["learning_rate"] == 1e-2, 11, 0)
    failed = failed.broadcast_like(data["episode_return"].isel(updates=0, drop=True))
    gone = (failed > 0) & (data["updates"] >= failed)
    data = data.where(~gone).assign(num_episodes=data["num_episodes"].where(~gone, 0), failed_update=failed)
    figure = plot_curves(data)
    assert legend_of(figure)[1] == ["0.0001", "0.001", "0.01 (failed)"]
    assert heading_of(figure).endswith("failed, without any score: 4 settings")
    crosses = [line for line in axes_of(figure)[0].lines if line.get_marker() == "x"]
    assert [line.get_xdata().tolist() for line in crosses] == [[11 * 500]]
    assert axes_of(figure)[0].lines[2].get_xdata().max() == 10 * 500
    assert [text for text in texts(axes_of(plot_heatmap(data))[0]) if text == "failed"] == ["failed"] * 2
    parallel = axes_of(plot_parallel(data))[0]
    assert sum(line.get_linestyle() == "--" for line in parallel.lines) == 4 and "failed" in texts(parallel)
    assert all(np.isfinite(line.get_ydata()).all() for line in parallel.lines)
    runs = data.isel(discount=0, clip=0, learning_rate=2)
    (ax,) = axes_of(plot_learning_curve(runs))
    assert ax.legend_.get_texts()[-1].get_text() == "turned nan: 8"
    (ax,) = axes_of(plot_learning_curve(runs.isel(updates=slice(10, None))))
    assert texts(ax) == ["all runs turned nan"]


def test_a_line_begins_where_half_of_its_runs_have_ended_an_episode():
    data = metrics([100.0], learning_rate=[1e-4])
    data["episode_return"][0, :4, :3] = data["episode_return"][0, :5, :2] = np.nan
    data["num_episodes"][0, :4, :3] = data["num_episodes"][0, :5, :2] = 0
    assert axes_of(plot_curves(data))[0].lines[0].get_xdata()[0] == 1500


def test_settings_with_other_steps_per_update_have_their_own_steps():
    data = metrics([10.0, 10.0], num_steps=[64, 128])
    step = np.stack([64.0 * np.arange(1, 21), np.where(np.arange(20) < 10, 128.0 * np.arange(1, 21), np.nan)])
    data = data.assign_coords(step=(("num_steps", "updates"), step))
    data = data.where(data["step"].notnull())
    few, many = axes_of(plot_curves(data))[0].lines
    assert len(few.get_xdata()) == 20 and len(many.get_xdata()) == 10
    assert few.get_xdata()[-1] == many.get_xdata()[-1] == 1280


def test_a_heatmap_says_the_final_scores():
    data = grid()
    ax = axes_of(plot_heatmap(data, "learning_rate", "discount"))[0]
    final = data["episode_return"].isel(clip=0).values[..., -10:].mean(-1)
    expected = stats.trim_mean(final, 0.25, axis=-1).T
    np.testing.assert_allclose(ax.images[0].get_array(), expected)
    assert [float(text) for text in texts(ax)] == pytest.approx(expected.ravel().tolist(), rel=0.01)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.0001", "0.001", "0.01"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("learning rate", "discount")
    assert ax.get_title().replace("\xa0", " ").endswith("at the best clip = 0.1")
    assert ax.patches[0].get_xy() == (0.5, 0.5)


def test_parallel_lines_are_settings_with_the_best_on_top():
    data = sample()
    ax = axes_of(plot_parallel(data))[0]
    (
        *others,
        best,
    ) = [line for line in ax.lines if len(line.get_ydata()) == 4]
    assert len(others) == 29
    ends = [line.get_ydata()[-1] for line in others]
    assert ends == sorted(ends) and best.get_ydata()[-1] == 1
    low, high = np.log(np.sort(data["learning_rate"])[[0, -1]])
    assert best.get_ydata()[0] == pytest.approx((np.log(data["learning_rate"][29]) - low) / (high - low))
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels == ["learning rate", "clip", "widths", "episode return\nat the end"]
    assert {"64,64", "128,128", "0.001"} <= set(texts(ax))


def test_parallel_lines_of_a_grid_leave_out_what_does_not_vary():
    ax = axes_of(plot_parallel(grid().isel(clip=[0])))[0]
    assert [label.get_text() for label in ax.get_xticklabels()][:2] == ["learning rate", "discount"]
    assert len([line for line in ax.lines if len(line.get_ydata()) == 3]) == 6


def test_infinity_and_truth_values_have_a_place_on_a_parallel_axis():
    coords = {"target_kl": ("setting", [0.1, np.inf, 0.2]), "anneal": ("setting", [True, False, True])}
    ax = axes_of(plot_parallel(metrics([1.0, 2.0, 3.0], **coords)))[0]
    assert {"0.1", "0.2", "inf", "True", "False"} <= set(texts(ax))
    assert all(np.isfinite(line.get_ydata()).all() for line in ax.lines)


def test_importance_is_drawn_from_the_most_to_the_least():
    data = grid()
    ax = axes_of(plot_importance(data))[0]
    shares = importance(data)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "learning rate", "discount", "clip", "seeds", "interactions and rest",
    ]  # fmt: skip
    expected = shares.sel(field=["learning_rate", "discount", "clip", "seeds", "rest"]).values
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(expected.tolist())
    assert texts(ax) == [f"{100 * x:.0f} %" for x in expected]


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (
            lambda: plot_curves(grid(), line="learning"),
            "'learning' was not swept .did you mean 'learning_rate'. Swept: ",
        ),
        (lambda: plot_curves(grid(), panel="x"), "'x' was not swept .swept: learning_rate, discount, clip"),
        (lambda: plot_curves(grid(), line="clip", panel="clip"), "line='clip' and panel='clip' vary together"),
        (lambda: plot_curves(sample(), line="clip", panel="widths"), "vary together"),
        (lambda: plot_curves(sample(), panel="setting"), "more than 12"),
        (lambda: plot_curves(grid(), max_lines=11), "max_lines=11 must be from 1 to 10"),
        (lambda: plot_curves(grid(), statistic="max"), "statistic='max' is unknown"),
        (lambda: plot_heatmap(sample(), "clip", "widths"), "'clip' varies together .*use plot_parallel"),
        (lambda: plot_heatmap(grid(), "clip", "clip"), "must be two fields"),
        (lambda: plot_parallel(grid().rename(seed="run")), "metrics have no dimension seed"),
        (lambda: plot_importance(metrics([1.0, 2.0], env=["a", "b"])), "several environments cannot be compared"),
        (lambda: plot_curves(grid() * np.nan), "no run has a score"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        wrong()


def test_a_sweep_is_drawn_by_what_was_swept():
    assert set(plot_sweep(grid())) == {"learning_curves", "heatmap", "parallel", "importance"}
    assert set(plot_sweep(sample())) == {"learning_curves", "parallel", "importance"}
    assert set(plot_sweep(grid().isel(clip=0, discount=0))) == {"learning_curves"}


def test_rungs_show_where_settings_stop_and_name_the_best():
    nan = np.nan
    scores = np.array([[1.0, nan, nan], [3.0, 7.0, 9.0], [2.0, 8.0, nan], [-np.inf, nan, nan], [3.5, 6.0, 9.0]])
    figure = plot_rungs(scores, [100, 300, 900], [{"clip": x} for x in (0.1, 0.2, 0.3, 0.4, 0.5)], "CartPole-v1")
    (ax,) = axes_of(figure)
    thick = [line for line in ax.lines if line.get_linewidth() == 2.5]
    assert len(thick) == 1 and thick[0].get_ydata().tolist() == [3.0, 7.0, 9.0]  # of equals the first, as in `ranked`
    assert legend_of(figure)[1] == ["clip=0.2", "failed: 1"] or legend_of(figure)[1] == ["failed: 1", "clip=0.2"]
    assert [text.get_text() for text in ax.get_xticklabels()] == [
        "100 steps\n5 settings", "300 steps\n3 settings", "900 steps\n2 settings",
    ]  # fmt: skip


def test_a_lineage_shows_every_copy_and_the_line_of_the_winner():
    parents = np.array([[0, 0, 0], [1, 0, 1], [2, 2, 1]])  # 1 continues from 0 after update 2, 2 from 1 after update 3
    returns = np.array([[1, 2, 3.0], [1, np.nan, 2], [0, 0, 0]])
    figure = plot_lineage(parents, returns, np.array([10, 20, 30]), np.array([0, 0, 1]), "CartPole-v1")
    ax, _ = axes_of(figure)
    mesh, arrows = ax.collections
    np.testing.assert_array_equal(mesh.get_array(), [[1, 2, 3], [1, 1, 2], [0, 0, 0]])
    assert [arrow.tolist() for arrow in arrows.get_segments()] == [[[20, 0], [20, 1]], [[30, 1], [30, 2]]]
    (line,) = (line for line in ax.lines if line.get_linewidth() == 2.5)
    assert line.get_xydata().tolist() == [[0, 0], [10, 0], [10, 0], [20, 0], [20, 1], [30, 1]]


def test_a_schedule_is_that_of_the_line_of_the_winner():
    values = np.array([[1e-4, 1e-4, 1e-4], [1e-2, 1e-2, 5e-3]])
    returns = np.array([[1, np.nan, 3.0], [4, 5, 6]])
    figure = plot_schedule({"learning_rate": values}, returns, np.array([10, 20, 30]), np.array([0, 1, 1]))
    top, below = axes_of(figure)
    mine = [line.get_ydata().tolist() for ax in (top, below) for line in ax.lines if line.get_linewidth() == 2]
    assert mine == [[1, 5, 6], [], [1e-4, 1e-2, 5e-3]]  # the empty one is the entry of the legend
    assert below.get_yscale() == "log" and below.get_ylabel() == "learning rate"


@pytest.mark.full
def test_a_study_is_drawn_by_optuna_without_its_style(tmp_path):
    optuna = pytest.importorskip("optuna")
    before = dict(matplotlib.rcParams)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    assert plot_trials(study) == {}
    study.optimize(lambda trial: trial.suggest_float("clip", 0, 1) + 0 * trial.suggest_int("seed", 0, 9), n_trials=8)
    figures = plot_trials(study, "CartPole-v1")
    assert list(figures) == ["history", "slices", "importances"] and dict(matplotlib.rcParams) == before
    assert all(heading_of(figure) == "CartPole-v1" for figure in figures.values())
    single = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    single.optimize(lambda trial: trial.suggest_float("clip", 0, 1), n_trials=4)
    for name, figure in (figures | plot_trials(single)).items():
        figure.savefig(tmp_path / f"{name}.png")
