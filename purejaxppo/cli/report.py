"""`purejaxppo report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from purejaxppo.cli.options import draw_without_screen, say


@dataclass(frozen=True)
class ReportOptions:
    """Write one page of HTML on a run or a sweep, finished or not, that browsers open without a network."""

    folder: tyro.conf.Positional[Path]
    """The folder that `train`, `sweep` or `search` wrote."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write; report.html in the folder by default."""


def report(arguments: list[str]) -> int:
    """Writes the page and prints its path."""
    options = tyro.cli(ReportOptions, args=arguments, prog="purejaxppo report")
    draw_without_screen()

    from purejaxppo.experiment.agents.report import write_report

    say(f"written to {write_report(options.folder, options.out)}")
    return 0
