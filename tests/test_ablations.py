"""The table of ablations: what is switched, and what it says of the scores."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
from ablations import DETAILS, ENVS, ablate, describe, draw, improvement, other, value_of

import purejaxppo as pjp

BETTER, WORSE = "clip=inf", "gae_lambda=1"
ROW = {"steps": 100, "preset": [1.0, 2.0, 3.0, 4.0], "changed": {BETTER: [5.0, 6.0, 7.0, 8.0], WORSE: [0.0] * 4}}


@pytest.mark.parametrize("env", ENVS)
def test_every_detail_is_switched_to_something_else_that_the_algorithm_takes(env):
    config, hyperparams = pjp.preset(env)
    for name in DETAILS:
        changed = other(config, hyperparams, name)
        assert changed != value_of(config, hyperparams, name)
        pjp.Sweep(env, pjp.paired(**{name: [changed]}), config=config, hyperparams=hyperparams)
    assert ENVS[env] <= config.total_steps + config.steps_per_update


def test_a_change_that_is_always_better_has_a_probability_of_one_and_a_run_that_turned_nan_counts_as_the_lowest():
    assert improvement(ROW, BETTER) == (1, 1, 1) and improvement(ROW, WORSE) == (0, 0, 0)
    failed = ROW | {"changed": {BETTER: [math.nan, 5.0, 6.0, 7.0]}}
    assert improvement(failed, BETTER)[0] == 0.75
    assert "mean 2.5 -> 6.5" in describe(ROW)[0]


def test_every_change_is_drawn_in_every_environment():
    figure = draw({"one": ROW, "two": ROW})
    assert len(figure.axes) == 2 and all(len(ax.lines) == 2 * 2 + 1 for ax in figure.axes)
    plt.close(figure)


@pytest.mark.slow
def test_an_environment_is_ablated(tmp_path, monkeypatch):
    monkeypatch.setitem(ENVS, "Catch-bsuite", 4_000)
    row = ablate("Catch-bsuite", 2, tmp_path)
    assert len(row["changed"]) == len(DETAILS) and np.shape(list(row["changed"].values())) == (len(DETAILS), 2)
