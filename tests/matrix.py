"""Checks every environment of every suite that needs no download, and trains one update of it.

    python tests/matrix.py [--suite SUITE ...] [--out tests/matrix-py311.json] [--limit SECONDS] [--again]

Each environment has a process of its own. The file is the table; a run leaves out what is in it already of the same
version of the suite and did not fail, so it may be interrupted; --again repeats all. Several runs must not write one
file at the same time.
"""

import argparse
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

SUITES = ("pgx", "xland", "navix", "jumanji", "brax", "playground", "craftax")  # the fastest first
DOWNLOADS = "downloads", "no goal", "mujoco_menagerie", "Menagerie"


def main():
    parser = argparse.ArgumentParser(description="Check and train every environment of every suite.")
    parser.add_argument("--suite", nargs="+", default=SUITES, choices=SUITES)
    default = Path(__file__).parent / f"matrix-py{sys.version_info.major}{sys.version_info.minor}.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--limit", type=float, default=600, help="seconds for one environment")
    parser.add_argument("--again", action="store_true", help="environments that are in the table already, too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(check_one(options.one)))
        return
    table = json.loads(options.out.read_text()) if options.out.exists() else {}
    for suite in options.suite:
        for env in list_names(suite):
            row = table.get(env, {})
            if options.again or "error" in row or row.get("version") != version_of(suite):
                table[env] = run_one(env, options.limit)
                options.out.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
                show(env, table[env])
    print(f"{sum(row['update'] == 'finite' for row in table.values())} of {len(table)} make a finite update")
    for env, row in sorted(table.items()):
        for fault in row.get("faults", ()):
            print(f"  {env}: {fault}")


def list_names(suite):
    program = f"from purejaxppo.envs import env_names; print(*env_names({suite!r}), sep='\\n')"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    if done.returncode:
        print(f"{suite}: {last_line(done.stderr)}")
    return [line for line in done.stdout.splitlines() if line.startswith(f"{suite}/")]


def version_of(suite):
    """The installed version of a suite's package."""
    return importlib.metadata.version("xminigrid" if suite == "xland" else suite)


def run_one(env, limit):
    begin = time.time()
    command = [sys.executable, "-W", "ignore", __file__, "--one", env]
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # most of the time is compilation
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=os.environ | flags)
    except subprocess.TimeoutExpired:
        return {"update": "failed", "error": f"not within {limit:.0f} s"}
    if done.returncode:
        return {"update": "failed", "error": last_line(done.stderr)}
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds": round(time.time() - begin)}


def last_line(text):
    """The last line of what a process wrote to its standard error, or "killed"."""
    return (text.strip() or "killed").splitlines()[-1][:300]


def check_one(name):
    import jax
    import numpy as np

    import purejaxppo as pjp
    from purejaxppo.envs.base import action_space, observation_space

    version = version_of(name.partition("/")[0])
    try:
        env = pjp.make_env(name)
    except ValueError as error:
        if not any(word in str(error) for word in DOWNLOADS):
            raise
        return {"version": version, "update": "needs a download or a ruleset"}
    ppo = pjp.make_ppo(env, pjp.Config(num_envs=4, num_steps=8, num_updates=1, num_epochs=1))
    state, metrics = jax.jit(ppo.step)(jax.jit(ppo.init)(jax.random.key(0)))
    finite = all(np.isfinite(x).all() for x in jax.tree.leaves(state.policy)) and np.isfinite(metrics["loss"])
    return {
        "version": version,
        "update": "finite" if finite else "not finite",
        "observations": str(observation_space(env))[:200],
        "actions": str(action_space(env, env.params))[:80],
        "faults": list(pjp.check_env(env)),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def show(env, row):
    faults = f"{len(row['faults'])} faults" if row.get("faults") else ""
    print(f"{env:44} {row['update']:30} {row.get('seconds', ''):>4} s {faults} {row.get('error', '')}", flush=True)


if __name__ == "__main__":
    main()
