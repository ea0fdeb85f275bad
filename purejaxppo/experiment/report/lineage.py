"""The lineage of a population: who was copied when, and the hyperparameters that the winner's line went through."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray

from purejaxppo.experiment.provenance import as_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Lineage:
    """Who was copied in a population, and the line of its winner back to the member that it began as."""

    metrics: xarray.Dataset
    """[R, U]; `parent` says who was copied."""
    fields: tuple[str, ...]
    """The hyperparameters that were explored."""
    winner: int

    @property
    def parents(self) -> np.ndarray:
        """The member from which each continued after each update, [R, U]."""
        return self.metrics["parent"].values.astype(int)

    @property
    def values(self) -> dict[str, np.ndarray]:
        """The explored hyperparameters in each update, [R, U], by name."""
        return {name: self.metrics[name].values for name in self.fields}

    @cached_property
    def line(self) -> np.ndarray:
        """The member that the winner's line was in each update, [U]."""
        return line_of(self.parents, self.winner)

    def schedule(self) -> list[dict[str, Any]]:
        """The explored fields that the line went through: `from_update`, counted from 1, and their values."""
        values = np.stack([x[self.line, np.arange(len(self.line))] for x in self.values.values()], 1)
        # An update in which the run of the line was frozen reports nan; its values are those before.
        known = np.flatnonzero(~np.isnan(values).any(1))
        changed = [i for k, i in enumerate(known) if k == 0 or (values[i] != values[known[k - 1]]).any()]
        return [{"from_update": int(i) + 1, **dict(zip(self.fields, map(as_json, values[i])))} for i in changed]

    def plots(self, title: str = "") -> "dict[str, Figure]":
        """The lineage and the schedule as plots by name."""
        from purejaxppo.experiment.report.search_plots import plot_lineage, plot_schedule

        returns, steps = (self.metrics[name].values for name in ("episode_return", "step"))
        return {
            "lineage": plot_lineage(self.parents, returns, steps, self.line, title),
            "schedule": plot_schedule(self.values, returns, steps, self.line, title),
        }


def line_of(parents: np.ndarray, member: int) -> np.ndarray:
    """The member that a member's line was in each update, [U], back to where it began, from `parents` [R, U]."""
    line = np.empty(parents.shape[1], int)
    for update in reversed(range(len(line))):
        member = line[update] = parents[member, update]
    return line
