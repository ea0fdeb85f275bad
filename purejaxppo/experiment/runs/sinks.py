"""Sinks: functions that are given the metrics of every chunk while a run trains, such as loggers.

The metrics have the dimensions (`run`,) `updates`, as `fit` labels them; any function of such a Dataset is a sink. The
sinks here log each number of a vector as a metric, `NAME_0`, `NAME_1` and so on. When a run resumes, they first remove
what they wrote for the updates that are trained again.
"""

import csv
import importlib.util
import json
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray

from purejaxppo.experiment.files import replace_file
from purejaxppo.experiment.report.metrics import split_vectors

Sink = Callable[[xarray.Dataset], None]
SHOWN = ("episode_return", "episode_length", "loss", "approx_kl", "entropy")


def console(every: int = 1, names: Sequence[str] = SHOWN) -> Sink:
    """Prints one line for every `every`-th chunk: the newest values of some metrics, means over runs."""
    chunks = 0

    def sink(metrics):
        nonlocal chunks
        chunks += 1
        if chunks % every == 0:
            row = _last(metrics)
            values = [f"{name}={row[name]:.4g}" for name in names if name in row]
            print(f"update {row['updates']:,}  step {row['step']:,}  {'  '.join(values)}", flush=True)

    sink.__name__ = "console"
    return sink


@dataclass
class TextFile:
    """A sink that appends lines to a text file; its first call removes the lines of updates that come again."""

    path: Path
    append: Callable[[Path, list[dict]], None]
    update_of: Callable[[str], str]
    """The update of a line."""
    header_lines: int = 0
    started: bool = False

    @property
    def __name__(self) -> str:  # in a warning
        """The path of the file."""
        return str(self.path)

    def __call__(self, metrics: xarray.Dataset):
        """Appends the lines of a chunk."""
        rows = list(to_rows(metrics))
        if not self.started:
            self._remove_updates_from(rows[0]["updates"])
            self.started = True
        self.append(self.path, rows)

    def _remove_updates_from(self, first: int):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for line in whole[self.header_lines :] if int(self.update_of(line)) < first]
        text = "".join(whole[: self.header_lines] + kept) if kept else ""
        replace_file(self.path, lambda half: half.write_text(text))  # not through a link


def csv_file(path: str | Path) -> Sink:
    """A CSV file with one row per update and run; a cell without a finite number is empty.

    If a run gains a metric, the file is rewritten with one more column, which is empty in the rows before.
    """

    def append(path, rows):
        with open(path, newline="") as file:
            names = next(csv.reader(file), [])
        added = [name for name in rows[0] if name not in names]
        rows = [{name: "" if value is None else value for name, value in row.items()} for row in rows]
        if added:
            with open(path, newline="") as file:
                rows = [*csv.DictReader(file), *rows]
            replace_file(path, lambda half: _write_csv(half, [*names, *added], rows, header=True))
        else:
            _write_csv(path, names, rows)

    return TextFile(Path(path), append, lambda line: line.split(",", 1)[0], header_lines=1)


def _write_csv(path: Path, names: Sequence[str], rows: Sequence[dict], header: bool = False):
    """Appends rows to a CSV file, after a header if asked; cells that a row lacks are empty."""
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)


def json_lines(path: str | Path) -> Sink:
    """A file of JSON lines, one per update and run; null stands for a value that is not finite."""

    def append(path, rows):
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    return TextFile(Path(path), append, lambda line: json.loads(line)["updates"])


def tensorboard(folder: str | Path, settings: Mapping[str, Any] | None = None) -> Sink:
    """TensorBoard event files over environment steps, one folder per run. Needs tensorboardX.

    `settings` are shown as a text beside the metrics.
    """
    from tensorboardX import SummaryWriter

    writers = {}

    def sink(metrics):
        for row in to_rows(metrics):
            run, step = row.pop("run", None), row.pop("step")
            where = Path(folder) / (f"run-{run}" if run is not None else "")
            if run not in writers:
                writers[run] = SummaryWriter(str(where), purge_step=step)
                if settings:
                    rows = [f"| {name} | {value} |" for name, value in settings.items()]
                    writers[run].add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]), step)
            for name, value in row.items():
                if value is not None:
                    writers[run].add_scalar(name, value, step)
        for writer in writers.values():
            writer.flush()

    sink.__name__ = "tensorboard"
    return sink


def wandb(project: str, **options: Any) -> Sink:
    """Weights & Biases, with one W&B run per run. Needs wandb; `mode="offline"` needs no network.

    `options` are those of `wandb.init`; the number of the run is appended to `id` and `name`, and added to `config`.
    With an `id`, which no other run of the project may have, a resumed run continues its W&B run.
    """
    import wandb

    runs = {}

    def sink(metrics):
        for row in to_rows(metrics):
            run, update = row.pop("run", 0), row["updates"]
            if run not in runs:
                own = {name: f"{options[name]}-{run}" for name in ("id", "name") if name in options}
                own |= {"resume": "allow"} if "id" in options else {}
                own |= {"config": {**options["config"], "run": run}} if "config" in options else {}
                runs[run] = wandb.init(project=project, reinit="create_new", **options | own)
            runs[run].log({name: value for name, value in row.items() if value is not None}, step=update)

    sink.__name__ = "wandb"
    return sink


def mean_over_runs(sink: Sink) -> Sink:
    """A sink that is given means over runs, without the runs that have no number."""

    def mean(metrics):
        sink(metrics.mean("run") if "run" in metrics.dims else metrics)

    return mean


def to_rows(metrics: xarray.Dataset) -> Iterator[dict]:
    """Every update of every run as plain Python numbers, runs varying fastest; None for values that are not finite."""
    runs = metrics["run"].values.tolist() if "run" in metrics.dims else [None]
    numbers = _per_update(metrics).items()
    values = {name: x.transpose("updates", ...).values.reshape(-1, len(runs)).tolist() for name, x in numbers}
    updates, steps = metrics["updates"].values.tolist(), metrics["step"].values.tolist()
    for i, (update, step) in enumerate(zip(updates, steps)):
        for j, run in enumerate(runs):
            row = {"updates": update, "step": int(step)} | ({} if run is None else {"run": run})
            yield row | {name: x[i][j] if np.isfinite(x[i][j]) else None for name, x in values.items()}


def _per_update(metrics: xarray.Dataset) -> dict[str, xarray.DataArray]:
    """The metrics of updates, without those of whole runs, such as `failed_update`."""
    return {name: x for name, x in split_vectors(metrics).items() if "updates" in x.dims}


def guarded(sink: Sink) -> Sink:
    """The sink, but if it fails it raises one warning and is not called again; training continues."""
    failed = False

    def guard(metrics):
        nonlocal failed
        if failed:
            return
        try:
            sink(metrics)
        except Exception as error:
            failed = True
            name = getattr(sink, "__name__", repr(sink))
            warnings.warn(f"the sink {name} failed and gets no more metrics; the run continues ({error})")

    return guard


def _last(metrics) -> dict:
    """The newest number of each metric, the mean over runs."""
    row = {"updates": int(metrics["updates"][-1]), "step": int(metrics["step"][-1])}
    for name, x in _per_update(metrics).items():
        means = x.mean("run").values if "run" in x.dims else x.values
        there = means[np.isfinite(means)]
        row |= {name: float(there[-1])} if there.size else {}
    return row


def check_package(name: str):
    """Raises ValueError if the package is missing that the sink of this name needs (see `make_sink`)."""
    package = {"tensorboard": "tensorboardX", "wandb": "wandb"}.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(f"the sink {name!r} needs {package} (pip install {package})")


def make_sink(name: str, folder: Path, settings: Mapping[str, Any]) -> Sink:
    """The sink of a name ("console", "csv", "json", "tensorboard", "wandb"), which writes into the folder of a run.

    `settings` go to the loggers that show some. Raises ValueError if a package is missing.
    """
    check_package(name)
    return {
        "console": console,
        "csv": lambda: csv_file(folder / "log.csv"),
        "json": lambda: json_lines(folder / "log.jsonl"),
        "tensorboard": lambda: tensorboard(folder / "tensorboard", settings),
        "wandb": lambda: _wandb_of(folder, settings),
    }[name]()


def _wandb_of(folder: Path, settings: Mapping[str, Any]) -> Sink:
    """W&B for the run of a folder, under an id that the folder keeps: names of folders are not unique."""
    path = folder / "wandb-id"
    if not path.exists():
        replace_file(path, lambda half: half.write_text(secrets.token_hex(8)))
    own_id = path.read_text().strip()
    group = f"{folder.resolve().name}-{own_id}"
    return wandb("purejaxppo", dir=folder, group=group, id=own_id, name=folder.resolve().name, config=dict(settings))
