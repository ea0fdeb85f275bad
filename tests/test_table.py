from typing import Any, cast

import jax
import numpy as np
import pytest
from scipy import stats

from purejaxppo import choice, grid, integers, log_uniform, paired, sample, uniform


def test_a_grid_holds_every_combination_once_and_the_last_field_varies_fastest():
    rows = grid(learning_rate=[1e-3, 1e-4], num_envs=[2, 4, 8]).rows()
    assert [tuple(row.values()) for row in rows] == [(r, n) for r in (1e-3, 1e-4) for n in (2, 4, 8)]


def test_paired_fields_go_side_by_side_and_a_product_combines_them_with_others():
    table = paired(learning_rate=[1e-3, 1e-4], clip=[0.1, 0.2]) * grid(env=["CartPole-v1", "Acrobot-v1"])
    assert len(table) == 4
    assert table.columns() == {
        "learning_rate": [1e-3, 1e-3, 1e-4, 1e-4],
        "clip": [0.1, 0.1, 0.2, 0.2],
        "env": ["CartPole-v1", "Acrobot-v1"] * 2,
    }


def test_values_are_plain_whatever_they_came_as():
    table = grid(learning_rate=np.geomspace(1e-4, 1e-2, 3), widths=[[8], (8, 8)], clip=jax.numpy.array([0.5]))
    assert {type(value) for value in table.columns()["learning_rate"]} == {float}
    assert table.columns()["widths"][:2] == [(8,), (8, 8)]
    assert table.columns()["clip"][0] == 0.5


@pytest.mark.parametrize("sobol", [False, True])
def test_a_sample_follows_its_distributions(key, sobol):
    table = sample(
        key, 500, sobol=sobol, discount=uniform(0.5, 0.9), learning_rate=log_uniform(1e-5, 1e-1),
        num_envs=integers(2, 5), activation=choice("tanh", "relu"),
    )  # fmt: skip
    columns = table.columns()
    assert stats.kstest(columns["discount"], stats.uniform(0.5, 0.4).cdf).pvalue > 0.01
    assert stats.kstest(columns["learning_rate"], stats.loguniform(1e-5, 1e-1).cdf).pvalue > 0.01
    for name, values in (("num_envs", [2, 3, 4, 5]), ("activation", ["relu", "tanh"])):
        found, counts = np.unique(columns[name], return_counts=True)
        assert found.tolist() == values and stats.chisquare(counts).pvalue > 0.01


def test_a_sample_is_repeatable_and_its_key_matters(key):
    draw = lambda key: sample(key, 8, discount=uniform(0.0, 1.0)).columns()
    assert draw(key) == draw(key) != draw(jax.random.key(1))


def test_sobol_points_are_spread_more_evenly_than_independent_ones(key):
    def largest_gap(sobol):
        drawn = sample(key, 64, sobol=sobol, discount=uniform(0.0, 1.0)).columns()["discount"]
        return np.diff(np.sort([0.0, *drawn, 1.0])).max()

    assert largest_gap(True) < 2.01 / 64 < largest_gap(False)


def test_a_table_prints_its_settings_in_columns():
    lines = str(grid(learning_rate=[1e-3, 1e-4], widths=[(64, 64)])).splitlines()
    assert [line.split() for line in lines] == [["learning_rate", "widths"], ["0.001", "64,64"], ["0.0001", "64,64"]]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: grid(learning_rate=[]), r"learning_rate=\[\] must be a list of one value"),
        (lambda: grid(learning_rate=[1e-3, 1e-3]), "learning_rate=0.001 is given twice"),
        (lambda: grid(learning_rate=[object()]), "learning_rate=<object"),
        (lambda: grid(clip=[0.1]) * grid(clip=[0.2]), "clip is swept twice"),
        (lambda: paired(clip=[0.1], discount=[0.9, 0.99]), "equally many"),
        (lambda: sample(jax.random.key(0), 0, clip=uniform(0.1, 0.2)), "num_settings=0"),
        (lambda: sample(jax.random.key(0), 2, clip=cast(Any, 0.1)), "clip=0.1 must be a distribution"),
        (lambda: sample(jax.random.key(0), 2), "one field or more"),
        (lambda: uniform(0.2, 0.1), "low=0.2 must be a number below high=0.1"),
        (lambda: log_uniform(0, 1), "low=0 of log_uniform"),
        (lambda: integers(0, cast(Any, 1.5)), "whole numbers as bounds"),
        (lambda: choice(), "one value or more"),
    ],
)
def test_what_is_no_table_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
