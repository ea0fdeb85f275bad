"""Where metrics go while a run trains: functions of a Dataset with the updates of a chunk, called by the host.

A sink takes metrics with the dimensions (`run`,) `update`, as `fit` labels them, and may be any function of one's own.
For those here each number of a vector is a metric of its own, `NAME_0`, `NAME_1` and so on. They begin with the first
update that they are given: what is there of later ones, from before a resumption, goes.
"""

import csv
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xarray

from purejaxppo.experiment.report.metrics import split_vectors

Sink = Callable[[xarray.Dataset], None]


def console(every: int = 1, names=("episode_return", "episode_length", "loss", "approx_kl", "entropy")) -> Sink:
    """Prints a line of some metrics, means over runs, for every `every`-th chunk."""
    chunks = 0

    def sink(metrics):
        nonlocal chunks
        chunks += 1
        if chunks % every == 0:
            row = _last(metrics)
            values = [f"{name}={row[name]:.4g}" for name in names if name in row]
            print(f"update {row['update']:,}  step {row['step']:,}  {'  '.join(values)}", flush=True)

    return sink


def csv_file(path) -> Sink:
    """A CSV file, a row per update and run; an empty cell where there is no number."""

    def write(file, rows):
        begun = file.tell() > 0
        names = Path(path).read_text().partition("\n")[0].split(",") if begun else list(rows[0])
        writer = csv.DictWriter(file, names, lineterminator="\n")  # a row of other columns is refused
        if not begun:
            writer.writeheader()
        writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in rows)

    return _file(path, write, lambda line: line.split(",", 1)[0], header_lines=1)


def json_lines(path) -> Sink:
    """A file of JSON lines, one per update and run; null where there is no number."""

    def write(file, rows):
        file.writelines(json.dumps(row) + "\n" for row in rows)

    return _file(path, write, lambda line: json.loads(line)["update"])


def tensorboard(folder) -> Sink:
    """TensorBoard's event files, over environment steps; every run has a folder of its own. Needs tensorboardX."""
    from tensorboardX import SummaryWriter

    writers = {}

    def sink(metrics):
        for row in to_rows(metrics):
            run, step = row.pop("run", None), row.pop("step")
            where = Path(folder) / (f"run-{run}" if run is not None else "")
            if run not in writers:
                writers[run] = SummaryWriter(str(where), purge_step=step)
            for name, value in row.items():
                if value is not None:
                    writers[run].add_scalar(name, value, step)
        for writer in writers.values():
            writer.flush()

    return sink


def wandb(project: str, **options) -> Sink:
    """Weights & Biases, each run as a run of its own in one group; `mode="offline"` needs no network. Needs wandb.

    `options` are those of `wandb.init`; with an `id`, to which the number of the run is added, a resumed run goes on.
    """
    import wandb

    runs = {}

    def sink(metrics):
        for row in to_rows(metrics):
            run, update = row.pop("run", 0), row["update"]
            if run not in runs:
                named = {"id": f"{options['id']}-{run}", "resume": "allow"} if "id" in options else {}
                runs[run] = wandb.init(project=project, reinit="create_new", **{**options, **named})
            runs[run].log({name: value for name, value in row.items() if value is not None}, step=update)

    return sink


def mean_over_runs(sink: Sink) -> Sink:
    """A sink that is given the means over all runs, of those numbers that there are."""

    def mean(metrics):
        sink(metrics.mean("run") if "run" in metrics.dims else metrics)

    return mean


def to_rows(metrics: xarray.Dataset) -> Iterator[dict]:
    """Every update of every run as plain Python numbers, updates first; None for what is no finite number."""
    runs = metrics["run"].values.tolist() if "run" in metrics.dims else [None]
    numbers = split_vectors(metrics).items()
    values = {name: x.transpose("update", ...).values.reshape(-1, len(runs)).tolist() for name, x in numbers}
    updates, steps = metrics["update"].values.tolist(), metrics["step"].values.tolist()
    for i, (update, step) in enumerate(zip(updates, steps)):
        for j, run in enumerate(runs):
            row = {"update": update, "step": int(step)} | ({} if run is None else {"run": run})
            yield row | {name: x[i][j] if np.isfinite(x[i][j]) else None for name, x in values.items()}


def guarded(sink: Sink) -> Sink:
    """A sink whose failure is a warning, once, and ends its own work only."""
    failed = False

    def guard(metrics):
        nonlocal failed
        if failed:
            return
        try:
            sink(metrics)
        except Exception as error:
            failed = True
            name = getattr(sink, "__qualname__", repr(sink)).removesuffix(".<locals>.sink").split("<locals>.")[-1]
            warnings.warn(f"the sink {name} failed and gets no more metrics; the run goes on ({error})")

    return guard


def _file(path, write, update_of, header_lines: int = 0) -> Sink:
    """A sink that appends rows to a text file; the first call drops the lines of later updates."""
    path, begun = Path(path), False

    def sink(metrics):
        nonlocal begun
        rows = list(to_rows(metrics))
        if not begun:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            first, whole = rows[0]["update"], [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole[header_lines:] if int(update_of(line)) < first]
            path.write_text("".join(whole[:header_lines] + kept) if kept else "")
            begun = True
        with open(path, "a", newline="") as file:
            write(file, rows)

    # The name in a warning.
    sink.__qualname__ = str(path)
    return sink


def _last(metrics) -> dict:
    """The newest number of each metric, the mean over runs."""
    row = {"update": int(metrics["update"][-1]), "step": int(metrics["step"][-1])}
    for name, x in split_vectors(metrics).items():
        means = x.mean("run").values if "run" in x.dims else x.values
        there = means[np.isfinite(means)]
        row |= {name: float(there[-1])} if there.size else {}
    return row


def make_sink(name: str, folder: Path) -> Sink:
    """What `--log` names, in the folder of a run. Raises ValueError where a package is missing."""
    package = {"tensorboard": "tensorboardX", "wandb": "wandb"}.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(f"log={name} needs {package} (pip install {package})")
    return {
        "console": console,
        "csv": lambda: csv_file(folder / "log.csv"),
        "json": lambda: json_lines(folder / "log.jsonl"),
        "tensorboard": lambda: tensorboard(folder / "tensorboard"),
        "wandb": lambda: wandb("purejaxppo", dir=folder, group=folder.name, id=folder.name),
    }[name]()
