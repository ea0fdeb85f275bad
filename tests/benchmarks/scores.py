"""Trains presets with several seeds each and evaluates what they learned; the data is kept beside this file.

    python tests/benchmarks/scores.py [--only brax/reacher navix/Navix-Empty-5x5-v0] [--num-seeds 10]
                                      [--first-seed 1000] [--again] [--folder .benchmarks/scores]
                                      [--out tests/benchmarks/scores.json]

Trains what the data does not have, or with --again everything, with the seeds that it has. All seeds of an environment
train in one batch, and each plays 128 fresh episodes, once sampled and once greedy, and once in the game that gymnax's
environment reimplements: in Gymnasium, or in the package minatar if it is installed (pip install -e ".[scores]"). The
data, and the table beside it (scores.md), are written after every environment, and what is trained of one is kept in
FOLDER until then: after an interrupt the same command goes on. A mean that leaves the interval that was kept is named.
Prints means over seeds with 95 % intervals, and the worst seed. Environments of a suite that is not installed are left
out, and named.
"""

import argparse
import json
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from kept_settings import settings_of
from originals import play_original
from score_table import table

import purejaxppo as pjp
from purejaxppo.experiment.agents.load import Agents
from purejaxppo.experiment.presets import PRESETS
from purejaxppo.experiment.provenance import describe_machine
from purejaxppo.experiment.report.metrics import learning_curve, mean_interval
from purejaxppo.experiment.runs.settings import read_settings
from purejaxppo.experiment.suite_presets import UNTRIED

sys.path.insert(0, str(Path(__file__).parents[1]))
from variants import VARIANTS, Variant

HERE = Path(__file__).parent
NUM_POINTS = 50  # of a learning curve


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [*PRESETS, *(name for name in UNTRIED if "*" not in name), *VARIANTS]
    parser.add_argument("--only", nargs="+", default=everything)
    few = "by default as many as the file has, or else 10, or 5 of suites, whose steps take longer"
    parser.add_argument("--num-seeds", type=int, help=few)
    first = "by default that of the file, or else 1000; give none that settings were tuned on, or chosen by"
    parser.add_argument("--first-seed", type=int, help=first)
    parser.add_argument("--again", action="store_true", help="environments that are in the file already, too")
    parser.add_argument("--folder", type=Path, default=HERE.parent.parent / ".benchmarks" / "scores")
    parser.add_argument("--out", type=Path, default=HERE / "scores.json")
    options = parser.parse_args()
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    if not find_spec("minatar"):
        print(
            'MinAtar\'s games are not played in minatar, which is not installed (pip install -e ".[scores]")',
            flush=True,
        )
    for env in options.only:
        try:
            trained, config, _ = variant(env)
            pjp.make_ppo(trained, config)
        except ValueError as error:  # its suite is not installed, or cannot make it
            print(f"{env} is left out: {error}", flush=True)
            continue
        before, folder = kept.get(env), options.folder / env.replace("/", "-")
        done = folder.with_name(f"{folder.name}.done")  # in this round of --again
        if (options.again and not done.exists()) or not is_current(env, before, options.first_seed, options.num_seeds):
            kept[env] = score(env, *seeds(env, before, options.first_seed, options.num_seeds), folder)
            kept = dict(sorted(kept.items()))
            options.out.write_text(json.dumps(kept, indent=1) + "\n")
            options.out.with_suffix(".md").write_text(table(kept))
            shutil.rmtree(folder, ignore_errors=True)
            if options.again:
                options.folder.mkdir(parents=True, exist_ok=True)
                done.touch()
            print(describe(env, kept[env]), *changes(before, kept[env]), sep="\n", flush=True)
    if options.again:
        for done in options.folder.glob("*.done"):
            done.unlink()
    print("\n".join(describe(env, kept[env]) for env in options.only if env in kept))


def is_current(name: str, row: dict | None, first_seed: int | None = None, num_seeds: int | None = None) -> bool:
    """Whether a kept row has the seeds that are asked for, and the settings and the steps of the preset now."""
    if row is None or seeds(name, row, first_seed, num_seeds) != seeds(name, row):
        return False
    _, config, hyperparams = variant(name)
    return (row.get("settings"), row["steps"]) == (settings_of(config, hyperparams), config.total_steps)


def seeds(name: str, row: dict | None, first_seed: int | None = None, num_seeds: int | None = None) -> tuple[int, int]:
    """The first seed and how many: what is asked for, or else what the kept row has."""
    kept: dict[str, Any] = row or {}
    first = kept.get("first_seed", 1000) if first_seed is None else first_seed
    return first, num_seeds or len(kept.get("sampled", ())) or (5 if "/" in name else 10)


def variant(name: str) -> Variant:
    """A preset or a variant."""
    return VARIANTS[name]() if name in VARIANTS else Variant(pjp.make_env(name), *pjp.preset(name))


def score(name: str, first_seed: int, num_seeds: int, folder: Path) -> dict:
    """The returns of every seed of a preset or a variant: of the last 100 training episodes, and of 128 fresh ones.

    Training resumes in `folder`; its seconds are those of the whole at the rate of the last session.
    """
    env, config, hyperparams = variant(name)
    single = pjp.make_ppo(env, config)
    ppo = pjp.batched(single)
    keys = jax.vmap(jax.random.key)(first_seed + np.arange(num_seeds))
    start = time.perf_counter()
    state = pjp.first_state(ppo, keys, hyperparams)
    program = pjp.compile_training(ppo, state, -(-config.num_updates // 100))
    compiled = time.perf_counter()
    play = jax.jit(ppo.evaluate, static_argnames="greedy")
    untrained = play(keys, state.policy)
    result = pjp.fit(ppo, state, progress=False, program=program, folder=folder)
    rate = read_settings(folder).steps_per_second
    assert rate is not None
    played = {name: play(keys, result.state.policy, greedy=name == "greedy") for name in ("sampled", "greedy")}
    original = play_original(name, Agents(single, result.state.policy, result.state.env_params, name))
    curve = learning_curve(result.metrics, NUM_POINTS).values.astype(float)
    return {
        "settings": settings_of(config, hyperparams),
        "first_seed": first_seed,
        "steps": config.total_steps,
        "untrained": float(np.mean(untrained.episode_return)),
        "training": pjp.statistics.final_scores(result.metrics).values.tolist(),
        **{name: np.asarray(x.episode_return).mean(1).tolist() for name, x in played.items()},
        **({"original": original} if original else {}),
        "unfinished": {name: int((~np.asarray(x.finished)).sum()) for name, x in played.items()},
        "curve": [[None if np.isnan(x) else round(x, 3) for x in row] for row in curve.tolist()],
        "compile_seconds": round(compiled - start, 1),
        "train_seconds": round(config.total_steps * num_seeds / rate, 1),
        "versions": describe_machine()["versions"],
    }


def changes(before: dict | None, row: dict) -> list[str]:
    """A sentence for every mean that is outside the interval that was kept."""
    found = []
    if before is None:
        return found
    for name in ("sampled", "greedy"):
        (old, low, high), (new, *_) = mean_interval(before[name]), mean_interval(row[name])
        if not low <= new <= high:
            found.append(f"  {name}: {new:.2f} is outside of what was kept, {old:.2f} [{low:.2f}, {high:.2f}]")
    return found


def describe(env: str, row: dict) -> str:
    """A line on the returns of an environment."""
    cells = []
    for name in ("training", "sampled", "greedy"):
        mean, low, high = mean_interval(row[name])
        cells.append(f"{name} {mean:9.2f} [{low:.2f}, {high:.2f}] worst {np.nanmin(row[name]):.2f}")
    rate = row["steps"] * len(row["greedy"]) / row["train_seconds"]
    return f"{env:<36}{row['steps']:>10,} steps  " + "   ".join(cells) + f"   {rate:,.0f} steps/s"


if __name__ == "__main__":
    main()
