"""Sinks: every run apart or aggregated; a failure is a warning."""

import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from probes import SMALL
from purejaxppo.experiment.report.metrics import label
from purejaxppo.experiment.runs.sinks import console, csv_file, guarded, json_lines, make_sink, mean_over_runs, to_rows


@pytest.fixture
def metrics():
    """Two runs, three updates after the fourth."""
    loss = np.array([[1.0, 2.0, np.nan], [3.0, np.inf, 5.0]], np.float32)
    others = {"num_episodes": np.arange(6).reshape(2, 3), "learning_rate": np.zeros_like(loss)}
    return label({"loss": loss, **others}, SMALL, 4)


def test_rows_are_plain_numbers_of_every_update_and_run(metrics):
    rows = list(to_rows(metrics))
    assert [(row["updates"], row["run"], row["loss"]) for row in rows] == [
        (5, 0, 1.0), (5, 1, 3.0), (6, 0, 2.0), (6, 1, None), (7, 0, None), (7, 1, 5.0),
    ]  # fmt: skip
    assert rows[0]["step"] == 5 * SMALL.steps_per_update and rows[5]["num_episodes"] == 5
    alone = list(to_rows(metrics.isel(run=0, drop=True)))
    assert "run" not in alone[0] and [row["loss"] for row in alone] == [1.0, 2.0, None]


def test_the_numbers_of_a_vector_are_columns_of_their_own(metrics, tmp_path, capsys):
    parts = np.arange(12.0).reshape(2, 3, 2)
    metrics = label({"learning_rate": np.zeros((2, 3)), "parts": parts}, SMALL)
    assert [(row["parts_0"], row["parts_1"]) for row in to_rows(metrics)] == [
        (0, 1), (6, 7), (2, 3), (8, 9), (4, 5), (10, 11),
    ]  # fmt: skip
    csv_file(tmp_path / "log.csv")(metrics)
    assert (tmp_path / "log.csv").read_text().startswith("updates,step,run,learning_rate,parts_0,parts_1\n")
    console(names=("parts_1",))(metrics)
    assert "parts_1=8" in capsys.readouterr().out


def test_means_are_over_the_numbers_that_there_are(metrics, tmp_path):
    mean_over_runs(json_lines(tmp_path / "log.jsonl"))(metrics)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [2.0, None, 5.0] and "run" not in rows[0]


def test_a_line_cut_short_by_a_kill_is_written_anew(metrics, tmp_path):
    path = tmp_path / "log.csv"
    csv_file(path)(metrics)
    whole = path.read_text()
    path.write_text(whole[:-9])
    csv_file(path)(metrics.isel(updates=[2]))
    assert path.read_text() == whole


def test_a_file_of_other_columns_is_not_mixed_up(metrics, tmp_path):
    path = tmp_path / "log.csv"
    csv_file(path)(metrics.isel(updates=[0]))
    whole = path.read_text()
    csv_file(path)(metrics.isel(updates=[1])[["learning_rate", "loss"]])  # fewer, in another order
    row = path.read_text().removeprefix(whole).splitlines()[0]
    assert dict(zip(whole.splitlines()[0].split(","), row.split(",")))["loss"] == "2.0"


def test_a_csv_file_gains_a_column_with_a_metric(metrics, tmp_path):
    path = tmp_path / "log.csv"
    csv_file(path)(metrics.isel(updates=[0]))
    log = csv_file(path)
    log(metrics.isel(updates=[1]).assign(more=metrics["loss"] * 2))
    log(metrics.isel(updates=[2]))
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["updates"], row["loss"], row["more"]) for row in rows] == [
        ("5", "1.0", ""), ("5", "3.0", ""), ("6", "2.0", "4.0"), ("6", "", ""), ("7", "", ""), ("7", "5.0", ""),
    ]  # fmt: skip


def test_folders_of_one_name_have_separate_wandb_runs_with_their_settings(metrics, tmp_path, monkeypatch):
    begun = []

    def init(**options):
        begun.append(options)
        return SimpleNamespace(log=lambda *_, **__: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=object()))
    for parent in ("a", "b", "a"):  # the third resumes the first
        (tmp_path / parent / "seed0").mkdir(parents=True, exist_ok=True)
        make_sink("wandb", tmp_path / parent / "seed0", {"learning_rate": 3e-4})(metrics)
    first, second, third = [[options["id"] for options in begun[i : i + 2]] for i in (0, 2, 4)]
    assert first == third and len({*first, *second}) == 4
    assert len({options["group"] for options in begun}) == 2 and begun[0]["name"] == "seed0-0"
    assert begun[1]["config"] == {"learning_rate": 3e-4, "run": 1}


def test_the_console_shows_the_newest_numbers(metrics, capsys):
    sink = console(every=2, names=("loss",))
    sink(metrics)
    assert capsys.readouterr().out == ""
    sink(metrics)
    assert capsys.readouterr().out == f"update 7  step {7 * SMALL.steps_per_update:,}  loss=5\n"


def test_a_sink_that_fails_warns_once_and_gets_no_more(metrics):
    calls = []

    def broken(metrics):
        calls.append(metrics)
        raise OSError("No space left on device")

    sink = guarded(broken)
    with pytest.warns(UserWarning, match="broken.*failed.*the run continues.*No space left"):
        sink(metrics)
    sink(metrics)
    assert len(calls) == 1


def test_tensorboard_has_every_run_in_a_folder_of_its_own(metrics, tmp_path):
    pytest.importorskip("tensorboardX")
    from purejaxppo.experiment.runs.sinks import tensorboard

    tensorboard(tmp_path, {"num_envs": 2})(metrics)
    assert {path.name for path in tmp_path.iterdir()} == {"run-0", "run-1"}
    for run in ("run-0", "run-1"):
        (events,) = (tmp_path / run).iterdir()
        assert b"loss" in events.read_bytes() and b"| num_envs | 2 |" in events.read_bytes()
