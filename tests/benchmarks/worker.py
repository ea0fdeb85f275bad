"""A process that does one work with one peer, a whole run per line on its input, and answers in JSON.

    python worker.py PEER WORK [small] [checkout=PATH]

The first answer tells the seconds of compiling and the steps of a run. Every line `SEED` is answered with the seconds
of that run and the highest resident memory so far, in bytes.
"""

import importlib
import json
import resource
import sys
from importlib import metadata

from works import WORKS, small

PACKAGES = "purejaxppo", "rejax", "sbx-rl", "stable-baselines3", "brax", "jaxnasium", "jax", "gymnax", "torch"


def main(peer: str, name: str, *options: str):
    work = small(WORKS[name]) if "small" in options else WORKS[name]
    for option in options:
        if option.startswith("checkout="):
            sys.path.insert(1, option.removeprefix("checkout="))
    program = importlib.import_module(f"peers.{peer}").prepare(work)
    versions = {name: metadata.version(name) for name in PACKAGES if installed(name)}
    answer(compile_seconds=program.compile_seconds, steps=program.steps, versions=versions)
    for line in sys.stdin:
        seconds = program.run(int(line))
        unit = 1 if sys.platform == "darwin" else 1024
        answer(seconds=seconds, peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def answer(**values):
    print("ANSWER " + json.dumps(values), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
