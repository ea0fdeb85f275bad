"""What each detail of PPO is worth: every detail is switched alone, in six environments with 20 seeds.

    python tests/benchmarks/ablations.py [--only CartPole-v1 ...] [--num-seeds 20] [--folder .benchmarks/ablations]

One sweep per environment, whose settings are the preset and the preset with one detail changed. A sweep resumes in
FOLDER. The final scores of all runs are kept in ablations.json beside this file, written after every environment, with
the picture ablations.png: the probability that a run with the changed detail scores higher than one of the preset.
Environments whose preset is still what the file has are left out.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from kept_settings import settings_of

import purejaxppo as pjp
from purejaxppo.experiment.provenance import describe_machine
from purejaxppo.text import show_setting

HERE = Path(__file__).parent
# Environment -> steps of a run, at most those of its preset.
ENVS = {
    "CartPole-v1": 150_000,
    "Catch-bsuite": 100_000,
    "FrozenLake-misc": 150_000,
    "Pendulum-v1": 300_000,
    "Acrobot-v1": 250_000,
    "MountainCarContinuous-v0": 250_000,
}
# Field -> what the switch turns to; if the preset has the first value, then the second.
DETAILS: dict[str, tuple[Any, Any]] = {
    "normalize_advantage": ("off", "minibatch"),
    "clip_value_loss": (False, True),
    "normalize_observation": (True, False),
    "scale_reward": (True, False),
    "bootstrap_on_truncation": (False, True),
    "share_encoder": (True, False),
    "activation": ("relu", "tanh"),
    "num_epochs": (1, 4),
    "learning_rate_annealing": (0.0, 1.0),
    "max_grad_norm": (math.inf, 0.5),
    "clip": (math.inf, 0.2),
    "entropy_coefficient": (0.0, 0.01),
    "gae_lambda": (1.0, 0.95),
    "adam_eps": (1e-8, 1e-5),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ENVS, default=list(ENVS))
    parser.add_argument("--num-seeds", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=HERE.parent.parent / ".benchmarks" / "ablations")
    parser.add_argument("--out", type=Path, default=HERE / "ablations.json")
    options = parser.parse_args()
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    for env in options.only:
        if env in kept and kept[env]["settings"] == settings_of(*pjp.preset(env)):
            continue
        kept[env] = ablate(env, options.num_seeds, options.folder / env)
        options.out.write_text(json.dumps(kept, indent=1) + "\n")
        draw(kept).savefig(options.out.with_suffix(".png"), dpi=120)
        print(env, *describe(kept[env]), sep="\n", flush=True)


def ablate(env: str, num_seeds: int, folder: Path) -> dict[str, Any]:
    """The score of every seed of the preset, and of the preset with each detail changed."""
    config, hyperparams = pjp.preset(env)
    changes = [{}, *({name: other(config, hyperparams, name)} for name in DETAILS)]
    base = {name: value_of(config, hyperparams, name) for name in DETAILS}
    table = pjp.paired(**{name: [(base | change)[name] for change in changes] for name in DETAILS})
    config = config.with_total_steps(ENVS[env])
    sweep = pjp.Sweep(env, table, num_seeds, config=config, hyperparams=hyperparams, seed=1)
    scores = pjp.run_sweep(sweep, folder).scores.transpose("setting", "seed").values
    return {
        "settings": settings_of(config, hyperparams),
        "steps": config.total_steps,
        "versions": describe_machine()["versions"],
        "preset": scores[0].tolist(),
        "changed": {show_setting(change): x.tolist() for change, x in zip(changes[1:], scores[1:])},
    }


def value_of(config: pjp.Config, hyperparams: pjp.Hyperparams, name: str) -> Any:
    """The value of a field, wherever it lies."""
    return getattr(config if hasattr(config, name) else hyperparams, name)


def other(config: pjp.Config, hyperparams: pjp.Hyperparams, name: str) -> Any:
    """What a detail is switched to."""
    first, second = DETAILS[name]
    return second if value_of(config, hyperparams, name) == first else first


def improvement(row: dict[str, Any], label: str) -> tuple[float, float, float]:
    """The probability that a run with a change scores higher than one of the preset, and its 95 % interval.

    A run that turned nan counts as the lowest.
    """
    changed, preset = (np.nan_to_num(np.array(x, float), nan=-np.inf) for x in (row["changed"][label], row["preset"]))
    found = pjp.statistics.probability_of_improvement(changed, preset)
    return float(found["value"]), float(found["low"]), float(found["high"])


def describe(row: dict[str, Any]) -> list[str]:
    """A line for every change."""
    lines = []
    for label, scores in row["changed"].items():
        value, low, high = improvement(row, label)
        means = f"{np.nanmean(row['preset']):.4g} -> {np.nanmean(scores):.4g}"
        lines.append(f"  {label:<36}P(better) {value:.2f} [{low:.2f}, {high:.2f}]   mean {means}")
    return lines


def draw(kept: dict[str, Any]) -> Any:
    """Every change in every environment as a point with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(kept), figsize=(3 + 1.9 * len(kept), 5), sharey=True, layout="constrained", squeeze=False
    )
    names = list(DETAILS)
    for ax, (env, row) in zip(axes[0], kept.items()):
        for label in row["changed"]:
            name, _, value = label.partition("=")
            chance, low, high = improvement(row, label)
            color = "C3" if high < 0.5 else "C0" if low > 0.5 else "0.5"
            ax.plot([low, high], [names.index(name)] * 2, color=color, linewidth=2)
            ax.plot(chance, names.index(name), "o", color=color)
            ax.annotate(value, (chance, names.index(name)), (0, 5), textcoords="offset points", ha="center", fontsize=7)
        ax.axvline(0.5, color="0.7", linewidth=1, zorder=0)
        ax.set(title=f"{env}\n{row['steps'] / 1e3:.0f}k steps", xlim=(-0.05, 1.05))
        ax.title.set_fontsize("small")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes[0, 0].invert_yaxis()
    figure.supxlabel("probability that the change scores higher than the preset, 95 % interval", fontsize="small")
    return figure


if __name__ == "__main__":
    main()
