"""The table of scores (scores.md), from the data of scores.py, the published scores and the bounds.

python tests/benchmarks/score_table.py    # writes it again
"""

import json
from pathlib import Path

from purejaxppo.experiment.report.metrics import mean_interval
from purejaxppo.experiment.report.statistics import STATISTICS
from purejaxppo.text import show_value

HERE = Path(__file__).parent
HEAD = """# Scores

Every seed trains as its preset says and then plays 128 fresh episodes, whose mean return is the score of the seed. No
preset was tuned on these seeds. A score that led to another preset is replaced by one of other seeds (`first_seed` in
`scores.json`), but not yet for GaussianBandit and PointRobot, whose scores may therefore be a little too high. IQM is
the mean of the middle half of the seeds; brackets hold the 95 % interval of the mean over seeds (Student's t, which
can exceed a bound). A mean of finitely many episodes can exceed an optimum, where returns are as random as in
UmbrellaChain and the bandits. "Of the way" is where the mean lies between untrained agents (0 %) and the bound (100
%), blank where untrained agents score the same. Actions are sampled, but under "greedy", where the most likely one is
taken. "Original": the same policies, played in the game that gymnax's environment reimplements, in Gymnasium or in the
package `minatar`, with gymnax's time limit and no sticky actions; "difference" is that score less the one here, paired
by seed. Seconds are those of training all seeds together on two CPU cores, on which other programs ran too: they do
not compare. `scores.json` has the return of every seed, learning curves, settings and versions. Of rows without a
score of untrained agents the seeds are not recorded, most of them are from version 0.1.0. `python
tests/benchmarks/scores.py --again` trains everything again. Seaquest is missing, whose environment takes an hour and
more; Asterix has five seeds. CleanRL's settings and A2C were trained in three environments. Of the suites the presets
that two cores can train in two hours are here, but brax/hopper, brax/walker2d and pgx/2048, which were not tried yet,
and brax/swimmer, which brax cannot make with this jax.
"""
COLUMNS = (
    "environment",
    "steps",
    "seeds",
    "IQM",
    "mean",
    "worst",
    "greedy",
    "original",
    "difference",
    "untrained",
    "seconds",
    "bound",
    "of the way",
    "published",
)
PARTS = {
    "gymnax": lambda name: "/" not in name and " with" not in name,
    "The same with other settings, or less to see": lambda name: " with" in name and "/" not in name,
    "Suites": lambda name: "/" in name,
}


def main():
    (HERE / "scores.md").write_text(table(json.loads((HERE / "scores.json").read_text())))


def table(scores: dict) -> str:
    """The whole page."""
    published, bounds = (json.loads((HERE / f"{name}.json").read_text()) for name in ("published", "bounds"))
    parts = [HEAD]
    for title, belongs in PARTS.items():
        chosen = {name: score for name, score in scores.items() if belongs(name)}
        rows = [row(name, x, bounds.get(name), published["scores"].get(name, [])) for name, x in chosen.items()]
        if rows:
            parts.append(f"\n## {title}\n\n{line(COLUMNS)}{line(['---'] * len(COLUMNS))}{''.join(rows)}")
    parts.append("\n## How the bounds are known\n\n")
    parts += [f"- {name}: {x['why']}\n" for name, x in bounds.items() if name in scores]
    parts.append("\n## Where the others are published\n\n")
    parts += [f"- {name}: {source}\n" for name, source in published["sources"].items()]
    return "".join(parts)


def row(name: str, score: dict, bound: dict | None, published: list[dict]) -> str:
    """The line of an environment."""
    sampled, greedy = (interval(score[kind]) for kind in ("sampled", "greedy"))
    limit = "" if bound is None or bound["value"] is None else f"{show_value(bound['value'])} ({bound['kind']})"
    others = "; ".join(f"{x['score']}{at(x)} ({x['by']})" for x in published)
    iqm = show_value(float(STATISTICS["iqm"](score["sampled"], axis=0)))
    seeds, worst = len(score["sampled"]), show_value(min(score["sampled"]))
    untrained = show_value(score["untrained"]) if "untrained" in score else ""
    played = score["original"]["sampled"] if "original" in score else []
    original = interval(played) if played else ""
    difference = interval([x - y for x, y in zip(played, score["sampled"])]) if played else ""
    cells = name, millions(score["steps"]), seeds, iqm, sampled, worst, greedy, original, difference, untrained
    return line([*cells, round(score["train_seconds"]), limit, of_the_way(score, bound), others])


def of_the_way(score: dict, bound: dict | None) -> str:
    """Where the mean lies between untrained agents and the bound, if it is known and the two differ."""
    mean, low, high = mean_interval(score["sampled"])
    if bound is None or bound["value"] is None or low <= score["untrained"] <= high:
        return ""
    return f"{(mean - score['untrained']) / (bound['value'] - score['untrained']):.0%}"


def interval(values: list[float]) -> str:
    """Mean and interval, to four digits."""
    mean, low, high = (show_value(x) for x in mean_interval(values))
    return mean if low == high else f"{mean} [{low}, {high}]"


def at(published: dict) -> str:
    """After how many steps a published score was reached, if that is known."""
    return f" at {millions(published['steps'])}" if published["steps"] else ""


def millions(steps: int) -> str:
    """A number of steps in short."""
    return f"{steps / 1e6:.3g}M" if steps >= 1e6 else f"{steps / 1e3:.3g}k"


def line(cells) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(map(str, cells))} |\n"


if __name__ == "__main__":
    main()
