"""The same work with this package and with its peers, in turn, each in an environment of its own.

    python tests/benchmarks/compare.py [--works narrow wide] [--peers rejax sb3] [--rounds 3] [--limit 600] [--small]
                                       [--purejaxrl PATH] [--folder .benchmarks]

This package is the one installed beside the Python that runs this; every peer is installed into FOLDER/PEER the
first time. One process per peer does a whole run to warm up and then one in turn with the others (A B A B), never with
compilation in it. stable-baselines3 and sbx, which take minutes, do some 10,000 steps, and brax counts the second half
of its run. A peer that answers nothing for --limit seconds is stopped and left out. Prints a table per work, medians
with the least and the most, as steps per second and as a ratio to this package, and writes all runs, with the versions
of each peer, to FOLDER/comparison.json.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import venv
from pathlib import Path
from typing import Any

from works import WORKS

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PEERS = {
    "rejax": ["rejax==0.1.3", "gymnax<0.1", "jax<0.11", "six"],
    "purejaxrl": ["gymnax<0.1", "distrax", "brax", "jax<0.9", "setuptools", "six"],
    "sbx": ["sbx-rl", "gymnasium"],
    "sb3": ["stable-baselines3", "gymnasium"],
    "brax": ["brax", "gymnax>=1.0.1", "jax<0.9", "six"],
    "jaxnasium": ["jaxnasium[algs]"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=[w for w in WORKS if not w.startswith("long")])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[p for p in PEERS if p != "purejaxrl"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--limit", type=float, default=600, help="seconds that an answer may take before its peer is left out"
    )
    parser.add_argument("--small", action="store_true", help="tiny work, to see that the comparison runs")
    parser.add_argument("--purejaxrl", type=Path, help="a checkout of purejaxrl, which is not packaged")
    parser.add_argument("--folder", type=Path, default=ROOT / ".benchmarks")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds={options.rounds} must be at least 1")
    if not options.limit > 0:
        parser.error(f"--limit={options.limit} must be a positive number of seconds")
    if importlib.util.find_spec("purejaxppo") is None:
        parser.error(f"{sys.executable} has no purejaxppo installed (in its environment: pip install -e .)")
    peers: dict[str, None] = dict.fromkeys([*options.peers, *(["purejaxrl"] if options.purejaxrl else [])])
    if "purejaxrl" in peers and not options.purejaxrl:
        parser.error("--peers purejaxrl needs --purejaxrl PATH, a checkout")
    pythons = {"purejaxppo": Path(sys.executable)} | {peer: install(peer, options.folder / peer) for peer in peers}
    extra = (["small"] if options.small else []) + ([f"checkout={options.purejaxrl}"] if options.purejaxrl else [])
    results = {"machine": describe_machine(), "works": {}}
    for work in options.works:
        results["works"][work] = compare(work, pythons, extra, options.rounds, options.limit)
        (options.folder / "comparison.json").write_text(json.dumps(results, indent=2) + "\n")
        print(table(work, results["works"][work]), flush=True)


def install(peer: str, folder: Path) -> Path:
    """The Python of a peer's environment, made if there is none."""
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        print(f"installing {peer} ...", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEERS[peer]], check=True)
        done.write_text(" ".join(PEERS[peer]) + "\n")
    return python


def compare(work: str, pythons: dict[str, Path], extra: list[str], rounds: int, limit: float) -> dict[str, Any]:
    """What every peer needs for a work; those that do not offer it, or fail, are left out with their reason."""
    workers = {peer: Worker(python, peer, work, extra, limit) for peer, python in pythons.items()}
    runs = {peer: [] for peer in workers}
    for seed in range(rounds + 1):
        for peer, worker in workers.items():
            runs[peer].append(worker.run(seed) if worker.ready else None)
    rows = {}
    for peer, worker in workers.items():
        ready = worker.ready
        if ready is None or None in runs[peer]:
            rows[peer] = {"left_out": worker.problem()}
            continue
        rates = [ready["steps"] / run["seconds"] for run in runs[peer][1:]]  # the first run warms up
        rows[peer] = {
            "steps_per_second": statistics.median(rates),
            "least": min(rates),
            "most": max(rates),
            "compile_seconds": ready["compile_seconds"],
            "steps": ready["steps"],
            "versions": ready["versions"],
            "peak_bytes": runs[peer][-1]["peak_bytes"],
            "runs": rates,
        }
        worker.close()
    return rows


class Worker:
    """A process that does one work with one peer; it has compiled when it is ready."""

    def __init__(self, python: Path, peer: str, work: str, extra: list[str], limit: float):
        self.limit, self.late = limit, False
        self.complaints = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [python, HERE / "worker.py", peer, work, *extra],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complaints, text=True,
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout  # both are pipes
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.ready = self.answer()

    def answer(self) -> dict | None:
        """What the process answers; None where it has stopped, or is stopped because it takes too long."""
        watch = threading.Timer(self.limit, self.stop)
        watch.start()
        try:
            for line in self.stdout:
                if line.startswith("ANSWER "):
                    return json.loads(line.removeprefix("ANSWER "))
            return None
        finally:
            watch.cancel()

    def stop(self):
        self.late = True
        self.process.kill()

    def run(self, seed: int) -> dict | None:
        """What one run took; None where the process has stopped."""
        try:
            self.stdin.write(f"{seed}\n")
            self.stdin.flush()
        except BrokenPipeError:
            return None
        return self.answer()

    def problem(self) -> str:
        if self.late:
            return f"no answer within {self.limit:g} s"
        self.complaints.seek(0)
        lines = self.complaints.read().strip().splitlines()
        return lines[-1] if lines else "no reason given"

    def close(self):
        self.stdin.close()
        self.process.wait()


def table(work: str, rows: dict) -> str:
    ours = rows["purejaxppo"].get("steps_per_second", float("nan"))
    lines = [f"\n{work:<14}{'steps/s':>12}{'least':>12}{'most':>12}{'ratio':>8}{'compile':>10}{'memory':>10}"]
    for peer, row in rows.items():
        if "left_out" in row:
            lines.append(f"  {peer:<12}{row['left_out']}")
            continue
        compiled = "-" if row["compile_seconds"] is None else f"{row['compile_seconds']:.1f} s"
        lines.append(
            f"  {peer:<12}{row['steps_per_second']:>12,.0f}{row['least']:>12,.0f}{row['most']:>12,.0f}"
            f"{row['steps_per_second'] / ours:>8.2f}{compiled:>10}{row['peak_bytes'] / 2**20:>7,.0f} MB"
        )
    return "\n".join(lines)


def describe_machine() -> dict:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line for line in lines if line.startswith("model name")]
    return {
        "processor": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
    }


if __name__ == "__main__":
    main()
