"""Learns with the matrix products of an accelerator's lower precisions, rounded on the CPU, beside exact ones.

    python tests/benchmarks/precision.py [--works CartPole-v1 Pendulum-v1] [--num-seeds 32] [--scale 1] [--out FILE]

Every factor of every product is rounded to the bits that TF32 or bfloat16 keep, in rollouts, losses and gradients
alike; sums stay in float32, as on a GPU. Prints the mean return of the last 100 episodes over seeds with its 95 %
interval, and the difference from exact products seed by seed: all precisions train the same seeds from the
same parameters. --scale multiplies the number of updates, and --out saves the returns of every seed as JSON.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

KEPT_BITS = {"exact": 23, "TF32": 10, "bfloat16": 7}
UPDATES = {"CartPole-v1": 1.0, "Pendulum-v1": 1.0, "Breakout-MinAtar": 0.25}  # of the preset's


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=UPDATES, default=list(UPDATES))
    parser.add_argument("--num-seeds", type=int, default=32)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--train", nargs=2, metavar=("PRECISION", "ENV"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:  # this is a process that the one below started
        print("ANSWER " + json.dumps(train(*options.train, options.num_seeds, options.scale)))
        return
    found = {}
    for env in options.works:
        for precision in KEPT_BITS:
            sizes = ["--num-seeds", str(options.num_seeds), "--scale", str(options.scale)]
            command = [sys.executable, __file__, "--train", precision, env, *sizes]
            lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
            answer = next(line for line in lines if line.startswith("ANSWER "))
            found.setdefault(env, {})[precision] = json.loads(answer.removeprefix("ANSWER "))
            print(describe(env, precision, found[env]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


def train(precision: str, env: str, num_seeds: int, scale: float) -> list[float]:
    """The return of the last 100 episodes of every seed."""
    import jax

    import purejaxppo as pjp

    if precision != "exact":
        round_factors(KEPT_BITS[precision])
    config, hyperparams = pjp.preset(env)
    config = replace(config, num_updates=max(int(config.num_updates * UPDATES[env] * scale), 1))
    ppo = pjp.batched(pjp.make_ppo(env, config))
    state = pjp.first_state(ppo, jax.random.split(jax.random.key(0), num_seeds), hyperparams)
    result = pjp.fit(ppo, state, progress=False)
    return pjp.statistics.final_scores(result.metrics).values.astype(float).tolist()


def round_factors(bits: int):
    """Has CPU programs round both factors of every matrix product to so many bits behind the leading one."""
    from jax._src.lax import lax  # no public interface has the lowering of a primitive
    from jax._src.lib.mlir.dialects import hlo
    from jax.interpreters import mlir

    def rounded(context: Any, left: Any, right: Any, **settings: Any):
        kept = {"exponent_bits": mlir.ir.IntegerAttr.get(mlir.ir.IntegerType.get_signless(32), 8)}
        kept["mantissa_bits"] = mlir.ir.IntegerAttr.get(mlir.ir.IntegerType.get_signless(32), bits)
        left, right = (hlo.reduce_precision(factor, **kept) for factor in (left, right))
        return lax._dot_general_lower(context, left, right, **settings)

    mlir.register_lowering(lax.dot_general_p, rounded, platform="cpu")


def describe(env: str, precision: str, found: dict[str, list[float]]) -> str:
    """A line on the returns of a precision, and on what it changes."""
    from purejaxppo.experiment.report.metrics import mean_interval

    returns, exact = (np.array(found[name]) for name in (precision, "exact"))
    means = [mean_interval(values) for values in (returns, returns - exact)]
    texts = [f"{mean:8.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in means]
    return f"{env:<18}{precision:<10}{texts[0]:<32}" + ("" if precision == "exact" else f"difference {texts[1]}")


if __name__ == "__main__":
    main()
