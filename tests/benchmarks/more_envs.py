"""Whether more environments lift a plateau of PPO, as in arXiv 2603.06009: the minibatch and the rate stay as they are.

    python tests/benchmarks/more_envs.py [--num-seeds 10] [--out tests/benchmarks/more_envs.json]

Trains Breakout-MinAtar for 2M steps with 64 and with 256 environments, whose rollouts are cut into minibatches of 1,024
steps. The curves are kept after every number of environments, and what is kept is not trained again; the picture
beside them shows all.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

import purejaxppo as pjp
from purejaxppo.experiment.report.curve import draw_line, tidy
from purejaxppo.experiment.report.metrics import learning_curve, mean_interval

HERE = Path(__file__).parent
ENV, TOTAL_STEPS, FIRST_SEED, NUM_POINTS = "Breakout-MinAtar", 2_000_000, 3000, 50
NUM_ENVS, MINIBATCH = (64, 256), 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=HERE / "more_envs.json")
    options = parser.parse_args()
    matplotlib.use("Agg")
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    for num_envs in NUM_ENVS:
        if len(kept.get(str(num_envs), {"final": []})["final"]) != options.num_seeds:
            kept[str(num_envs)] = train(num_envs, options.num_seeds)
            options.out.write_text(json.dumps(kept, indent=1) + "\n")
        mean, low, high = mean_interval(kept[str(num_envs)]["final"])
        print(f"{num_envs:>4} environments: {mean:.1f} [{low:.1f}, {high:.1f}]", flush=True)
    draw(kept).savefig(options.out.with_suffix(".png"), dpi=120)


def train(num_envs: int, num_seeds: int, total_steps: int = TOTAL_STEPS) -> dict[str, Any]:
    """Learning curves and the return of the last 100 episodes of every seed."""
    config, hyperparams = pjp.preset(ENV)
    config = replace(config, num_envs=num_envs, num_minibatches=num_envs * config.num_steps // MINIBATCH)
    ppo = pjp.batched(pjp.make_ppo(ENV, config.with_total_steps(total_steps)))
    keys = jax.vmap(jax.random.key)(FIRST_SEED + np.arange(num_seeds))
    metrics = pjp.fit(ppo, pjp.first_state(ppo, keys, hyperparams), progress=False).metrics
    curve = learning_curve(metrics, NUM_POINTS)
    rows = curve.transpose(..., "updates").values.astype(float)
    return {
        "steps": curve["step"].values.tolist(),
        "curve": [[None if np.isnan(x) else round(x, 3) for x in row] for row in rows.tolist()],
        "final": pjp.statistics.final_scores(metrics).values.tolist(),
    }


def draw(kept: dict[str, Any]) -> Figure:
    """The curves of all seeds, thin, and their means."""
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, (num_envs, row) in enumerate(kept.items()):
        curve = np.array(row["curve"], float)
        for seed in curve:
            ax.plot(row["steps"], seed, color=f"C{i}", linewidth=0.6, alpha=0.5)
        draw_line(ax, row["steps"], np.nanmean(curve, 0), f"C{i}", f"{num_envs} environments")
    ax.set(xlabel="environment steps", ylabel="return", title=f"{ENV}, minibatches of {MINIBATCH:,}", ylim=(0, None))
    ax.legend(loc="upper left", frameon=False)
    tidy(ax)
    return figure


if __name__ == "__main__":
    main()
