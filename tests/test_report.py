"""The page of a report: its numbers, what it escapes, and that it needs nothing but itself."""

import base64
import dataclasses
import hashlib
import importlib.util
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import xarray
from test_command_line import TINY, run
from test_records import DEFAULTS, SWEEP_SESSION, make_settings

import purejaxppo as pjp
from probes import SMALL
from purejaxppo.experiment.datasets import save_dataset
from purejaxppo.experiment.files import SWEEP, save_json
from purejaxppo.experiment.runs.settings import write_settings
from purejaxppo.experiment.sweeps.slices import Slice, Slices

HOSTILE = """</script><script>alert(1)</script><img src=http://x onerror=alert(1)>"&'\x1b[31m"""
HEIGHTS = {1e-4: [10, 20, 30, 40], 1e-3: [50, 60, 70, 90], 1e-2: [1, 2, 3, 4]}  # learning rate -> score of every seed
GRID = pjp.grid(learning_rate=list(HEIGHTS), discount=[0.9, 0.99])


class Page(HTMLParser):
    """The elements of a page as (tag, attributes), its texts by the innermost tag, and the rows of all its tables."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.rows, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br", "line"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag != "line":
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))
        if self.texts[-1][0] in ("th", "td"):
            self.rows[-1][-1] += data

    def all(self, tag):
        return [text for inner, text in self.texts if inner == tag]

    def tags(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self):
        return " ".join(text for tag, text in self.texts if tag not in ("script", "style"))

    def figures(self):
        """The data of every plot."""
        return [json.loads(text) for text in self.all("script") if text.startswith('{"data":')]


def page_of(folder):
    path = pjp.write_report(folder)
    assert path == folder / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def store_sweep(
    folder, table=GRID, num_seeds=4, height=None, failed=(), done: Any = SMALL.num_updates, env="CartPole-v1", rungs=()
):
    """Stores a sweep without training it, a slice for every run.

    `height(row, seed)` is its return in all updates; `failed` has the runs that turned nan in update 2, by number;
    `done` are the updates of all runs, or of those of each setting.
    """
    height = height or (lambda row, seed: HEIGHTS[row["learning_rate"]][seed] + (row.get("discount") == 0.99))
    sweep = pjp.Sweep("CartPole-v1", table, num_seeds, config=SMALL, hyperparams=DEFAULTS)
    save_json(
        folder / SWEEP, {"sweep": sweep.to_json() | {"env": env}, "sessions": [SWEEP_SESSION], "rungs": list(rungs)}
    )
    (folder / "slices").mkdir()
    slices = Slices(dataclasses.replace(sweep, env=env), folder)
    for number, (name, (setting, seed)) in enumerate(sweep.runs().items()):
        updates = np.broadcast_to(done, len(table))[setting]
        returns = np.full((1, updates), height(sweep.table.rows()[setting], seed), np.float32)
        losses = np.ones((1, updates), np.float32)
        if number in failed:
            returns[:, 1:], losses[:, 1:] = np.nan, np.nan
        ended = np.where(np.isnan(returns), 0, 40).astype(np.float32)
        failure = np.cumsum(np.isnan(losses), 1, dtype=np.int32) > 0
        metrics = {"learning_rate": np.nan_to_num(losses), "episode_return": returns, "num_episodes": ended}
        metrics |= {"loss": losses, "failure": failure.astype(np.int32)}
        state = {"num_updates": np.array([1 if number in failed else updates], np.int32)}
        slices.write(Slice((name,), metrics, state))
    return folder


def store_run(folder, num_agents=3, num_updates=3, **settings):
    """Stores a run without training it; agent i has the return 10 i in all updates."""
    own = {"num_runs": num_agents, "first_key": [[1, 2]] * num_agents, "notes": {}} | settings
    write_settings(folder, dataclasses.replace(make_settings(), **own))
    returns = np.broadcast_to(10.0 * np.arange(num_agents)[:, None], (num_agents, num_updates))
    columns = {"episode_return": returns, "num_episodes": np.full(returns.shape, 100.0), "loss": returns + 1}
    update = np.arange(1, num_updates + 1)
    coords = {"updates": update, "step": ("updates", 32.0 * update), "seed": np.arange(num_agents)}
    metrics = xarray.Dataset({name: (("seed", "updates"), x) for name, x in columns.items()}, coords)
    zeros = np.zeros(num_agents, np.int32)
    metrics["failed_update"], metrics["failed_metric"] = ("seed", zeros), ("seed", zeros.astype(str))
    save_dataset(folder / "metrics.nc", metrics)
    (folder / "policy.npz").touch()
    return folder


def ranking_of(page):
    """The rows of the ranking as texts by column."""
    names, *rows = page.rows[:7]
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_the_ranking_of_the_page_is_that_of_the_result(tmp_path):
    page = page_of(store_sweep(tmp_path))
    ranked = pjp.load(tmp_path).ranked()  # pyright: ignore[reportAttributeAccessIssue]
    rows = ranking_of(page)
    assert [row["rank"] for row in rows] == list("123456")
    # The interquartile mean of four numbers is the mean of the middle two.
    assert [float(row["IQM"]) for row in rows] == [66, 65, 26, 25, 3.5, 2.5]
    assert [(row["learning_rate"], row["discount"]) for row in rows[:3]] == [
        ("0.001", "0.99"), ("0.001", "0.9"), ("0.0001", "0.99"),
    ]  # fmt: skip
    for i, row in enumerate(rows):
        ends = [float(x) for x in row["95 % interval"].split(" to ")]
        assert ends == pytest.approx([float(ranked["low"][i]), float(ranked["high"][i])], rel=1e-5)
        assert float(row["mean"]) == pytest.approx(float(ranked["mean"][i]), rel=1e-5)


def test_halving_is_ranked_by_its_rungs_which_are_drawn(tmp_path, capsys):
    page = page_of(store_sweep(tmp_path, pjp.grid(learning_rate=list(HEIGHTS)), done=[1, 2, 3], rungs=(1, 2, 3)))
    assert "Successive halving stopped settings early." in page.words
    names, *rows = page.rows[:4]
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    # The lowest scores went on: the rung decides.
    assert [row["learning_rate"] for row in rows] == ["0.01", "0.001", "0.0001"]
    assert [row["updates"] for row in rows] == ["3", "2", "1"]
    assert [row["score there"] for row in rows] == ["2.5", "65", "25"]
    assert "Rungs" in page.all("h2")
    (rungs,) = (figure["data"] for figure in page.figures() if "steps of a run" in str(figure["layout"]["xaxis"]))
    assert [line["name"].split("=")[1] for line in rungs] == ["0.0001", "0.001", "0.01"]  # the best lies on top
    status, printed, _ = run(capsys, "plot", str(tmp_path))
    assert status == 0 and "rungs.png" in printed and (tmp_path / "rungs.png").stat().st_size > 10_000


def test_the_report_and_the_plots_of_a_population_show_its_lineage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space = "--sample learning_rate=log_uniform:1e-4:1e-2 --num-samples 4 --num-updates 6 --every 2".split()
    status, *_ = run(capsys, "search", "CartPole-v1", "--method", "pbt", *TINY, *space, "--out", "pbt")
    assert status == 0
    for name in ("lineage.png", "schedule.png"):
        (tmp_path / "pbt" / name).unlink()
    status, printed, _ = run(capsys, "plot", "pbt")
    assert status == 0 and "learning_curve.png, lineage.png, schedule.png" in printed
    assert (tmp_path / "pbt" / "schedule.png").exists()
    best = json.loads((tmp_path / "pbt" / "best.json").read_text())
    page = pjp.write_report(tmp_path / "pbt").read_text()
    assert f"Member {best['member']} won." in page and "The schedule of the line" in page
    assert "from update" in page and "line of the winner" in page
    (tmp_path / "pbt" / "best.json").unlink()
    assert " won." not in pjp.write_report(tmp_path / "pbt").read_text()


def test_halving_that_has_not_compared_anything_has_no_rungs(tmp_path):
    page = page_of(store_sweep(tmp_path, pjp.grid(learning_rate=list(HEIGHTS)), done=1, rungs=(2, 3)))
    assert "Rungs" not in page.all("h2") and "Ranking" in page.all("h2")


def test_curves_heat_maps_and_scores_have_the_numbers_of_the_sweep(tmp_path):
    curves, rates, discounts, pair = page_of(store_sweep(tmp_path)).figures()
    lines = [trace for trace in curves["data"] if trace.get("fill") != "toself"]
    assert [trace["name"] for trace in lines[:2]] == [
        "learning_rate=0.001 discount=0.99", "learning_rate=0.001 discount=0.9",
    ]  # fmt: skip
    assert [trace["meta"] for trace in lines] == list(range(6))
    np.testing.assert_array_equal(array(lines[0]["y"]), [66] * 3)
    np.testing.assert_array_equal(array(lines[0]["x"]), [32, 64, 96])
    np.testing.assert_array_equal(array(rates["data"][0]["x"])[-2:], [1e-3, 1e-3])
    np.testing.assert_array_equal(array(discounts["data"][0]["y"]), [2.5, 3.5, 25, 26, 65, 66])
    np.testing.assert_array_equal(array(pair["data"][0]["z"]), [[25, 65, 2.5], [26, 66, 3.5]])
    assert rates["layout"]["xaxis"]["type"] == "log" and discounts["layout"]["xaxis"]["type"] == "linear"


def array(packed):
    """The numbers of an array as plotly packs it."""
    if isinstance(packed, list):
        return np.array(packed)
    values = np.frombuffer(base64.b64decode(packed["bdata"]), packed["dtype"])
    return values.reshape([int(x) for x in packed["shape"].split(",")]) if "shape" in packed else values


def test_the_page_needs_nothing_but_itself(tmp_path):
    page = page_of(store_sweep(tmp_path))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    loading = ("link", "img", "iframe", "object", "embed", "base", "video", "audio", "source", "image", "use")
    assert not any(page.tags(tag) for tag in loading) and not any("src" in x for x in page.tags("script"))
    (style,) = page.all("style")
    assert "url(" not in style and "@import" not in style
    anchors = [x["href"] for x in page.tags("a")]
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert anchors and all(x.startswith("#") and x[1:] in ids for x in anchors)
    (policy,) = [x["content"] for x in page.tags("meta") if x.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "http" not in policy
    programs = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in programs]
    assert len(programs) == 2 and all(f"'sha256-{digest}'" in policy for digest in digests)


@pytest.mark.parametrize("store", [store_run, store_sweep])
def test_names_from_files_are_only_text(tmp_path, store):
    page = page_of(store(tmp_path, env=HOSTILE))
    assert len([x for x in page.tags("script") if "type" not in x]) == 2 and not page.tags("img")
    assert any(text.startswith(HOSTILE.replace("\x1b", "\\x1b")) for text in page.all("h1"))


def test_a_hostile_value_of_a_field_is_only_text(tmp_path):
    table = pjp.grid(loss={HOSTILE: None, "default": None})
    page = page_of(store_sweep(tmp_path, table, height=lambda row, seed: seed))
    assert len([x for x in page.tags("script") if "type" not in x]) == 2 and not page.tags("img")
    names = [trace["name"] for trace in page.figures()[0]["data"] if "name" in trace]
    assert any("&lt;img" in name for name in names) and not any("<" in name for name in names)
    (ticks,) = [figure["layout"]["xaxis"]["ticktext"] for figure in page.figures()[1:]]
    assert ticks == ["&lt;/script&gt;&lt;script&gt;...", "default"]


def test_lines_are_chosen_by_few_values_or_by_a_range(tmp_path):
    table = pjp.grid(discount=[0.9, 0.99]) * pjp.paired(
        clip=(clip := np.linspace(0.1, 0.3, 14).tolist()), gae_lambda=clip
    )
    page = page_of(store_sweep(tmp_path, table, 1, height=lambda row, seed: row["clip"] + row["discount"]))
    inputs = [x for x in page.tags("input") if "data-field" in x]
    assert [(x["type"], x["data-field"]) for x in inputs] == [
        ("checkbox", "0 0"), ("checkbox", "0 1"), *[("number", "1")] * 2, *[("number", "2")] * 2,
    ]  # fmt: skip
    items = [x["data-values"].split() for x in page.tags("li") if "data-values" in x]
    assert len(items) == 28 and [float(x) for x in items[0]] == pytest.approx([1, 0.3, 0.3])


def test_failed_runs_are_named_with_their_reasons(tmp_path):
    page = page_of(store_sweep(tmp_path, failed=[0, 4, 5, 6, 7]))
    assert "48 of 48" not in page.words and "24 of 24 runs are complete, 5 of them failed" in page.words
    sentence = "learning_rate=0.0001 discount=0.9 seed=0 turned nan in update 2, where loss was not finite"
    assert any(text.startswith(sentence) for text in page.all("li")) and "5 of 24 runs turned nan" in page.words
    rows = ranking_of(page)
    assert rows[-1]["IQM"] == "failed" and rows[-1]["missing"] == "4" and rows[-1]["learning_rate"] == "0.0001"
    lines = [trace for trace in page.figures()[0]["data"] if trace.get("fill") != "toself"]
    assert len(lines) == 5


@pytest.mark.parametrize(
    "stored, words",
    [
        ({"done": 2}, "0 of 24 runs are complete"),
        ({"failed": range(24)}, "24 of 24 runs turned nan"),
        ({"height": lambda row, seed: np.nan}, "There are no plots, since no run has a score"),
        ({"table": pjp.Table(), "height": lambda row, seed: seed}, "1 setting by the interquartile mean"),
        ({"num_seeds": 1}, "one seed has no interval"),
        ({"table": pjp.Table(), "num_seeds": 1, "height": lambda row, seed: 3}, "the only setting"),
        ({"table": pjp.grid(clip=[0.1, np.inf]), "height": lambda row, seed: seed}, "clip=inf"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_a_sweep_gives_a_page_whatever_it_holds(tmp_path, stored, words):
    page = page_of(store_sweep(tmp_path, **stored))
    texts = [*page.all("td"), page.words, *(x.get("name", "") for f in page.figures() for x in f["data"])]
    assert any(words in text for text in texts)
    assert "Speed and provenance" in page.all("h2")


def test_a_sweep_without_any_run_gives_a_page(tmp_path):
    store_sweep(tmp_path)
    for path in (tmp_path / "slices").iterdir():
        path.unlink()
    page = page_of(tmp_path)
    assert "There are no results: no run of this sweep has been trained yet" in page.words and not page.figures()


def test_environments_have_sections_of_their_own(tmp_path):
    table = pjp.grid(env=["CartPole-v1", "Acrobot-v1"], clip=[0.1, 0.2])
    page = page_of(store_sweep(tmp_path, table, height=lambda row, seed: seed + len(row["env"])))
    assert [x for x in page.all("h2") if x.startswith("Ranking")] == ["Ranking: Acrobot-v1", "Ranking: CartPole-v1"]


def test_of_many_settings_the_best_have_curves(tmp_path):
    values = np.linspace(0.1, 0.3, 60).tolist()
    page = page_of(store_sweep(tmp_path, pjp.grid(clip=values), 1, height=lambda row, seed: row["clip"]))
    lines = [trace for trace in page.figures()[0]["data"] if trace.get("fill") != "toself"]
    assert len(lines) == 40 and lines[0]["name"] == "clip=0.3"
    assert "The page has the best 40 of 60 settings." in page.words


def test_a_run_has_its_scores_curve_and_metrics(tmp_path):
    page = page_of(store_run(tmp_path))
    assert "3 of 3 updates, 96 steps per agent" in page.words
    assert page.all("td")[:6] == ["0", "0.00", "1", "10.00", "2", "20.00"]
    # Student's t for two degrees of freedom is 4.3027; the standard error is 10 / sqrt(3).
    assert "10.00  [-14.84, 34.84] 95 % over agents" in page.words
    curve, *metrics = page.figures()
    mean = next(trace for trace in curve["data"] if trace.get("name") == "mean")
    np.testing.assert_array_equal(array(mean["y"]), [10] * 3)
    assert [figure["layout"]["title"]["text"] for figure in metrics] == ["episode_return", "num_episodes", "loss"]


def test_many_updates_are_thinned(tmp_path):
    page = page_of(store_run(tmp_path, num_agents=1, num_updates=5000))
    longest = max(len(array(trace["x"])) for figure in page.figures() for trace in figure["data"])
    assert 100 <= longest <= 800  # an interval has two ends


def test_a_run_of_which_nothing_is_saved_gives_a_page(tmp_path):
    write_settings(tmp_path, make_settings())
    page = page_of(tmp_path)
    assert "0 of 3 updates" in page.words and "Nothing is saved yet." in page.words


def test_settings_that_differ_are_beside_their_defaults(tmp_path):
    page = page_of(store_run(tmp_path))
    cells = page.all("td")
    start = cells.index("num_steps")
    assert cells[start : start + 3] == ["num_steps", "8", str(pjp.Config().num_steps)]
    assert cells.index("num_steps") < cells.index("gae_lambda")  # which is in the table of all settings alone
    assert f"jax {SWEEP_SESSION['versions']['jax']}" in page.words


def test_what_is_neither_a_run_nor_a_sweep_is_refused(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="holds neither a run nor a sweep"):
            pjp.write_report(folder)
    status, _, complaint = run(capsys, "report", str(tmp_path))
    assert status == 2 and complaint.count("\n") == 1 and f"folder={tmp_path}" in complaint
    assert list(tmp_path.iterdir()) == []


def test_without_plotly_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    store_run(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "plotly" else find(name, *_))
    with pytest.raises(ValueError, match=r"^a report needs plotly \(pip install plotly\)$"):
        pjp.write_report(tmp_path)


def test_the_command_writes_where_it_is_told(tmp_path, capsys):
    store_run(tmp_path)
    out = tmp_path / "page.html"
    status, printed, _ = run(capsys, "report", str(tmp_path), "--out", str(out))
    assert status == 0 and str(out) in printed and out.read_text().startswith("<!DOCTYPE html>")
    assert not (tmp_path / "report.html").exists()
    status, _, complaint = run(capsys, "report", str(tmp_path), "--out", "/dev/null/x")
    assert status == 2 and "--out=/dev/null/x cannot be written" in complaint


@pytest.mark.slow
def test_an_unfinished_run_is_shown_by_its_newest_checkpoint(tmp_path, capsys):
    assert run(capsys, "train", "CartPole-v1", *TINY, "--num-seeds", "2", "--out", str(tmp_path))[0] == 0
    (tmp_path / "policy.npz").unlink()
    page = page_of(tmp_path)
    assert "6 of 6 updates" in page.words and "this is its newest checkpoint" in page.words
    assert "CartPole-v1: a run of 2 agents" in page.words and page.figures()
