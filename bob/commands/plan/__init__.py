"""`bob plan`: what `dvc repro` would do now, what of it is there already, and what it would cost.

Nothing is run and no weights are read: the state of the stages comes from DVC, that of single items
from the item cache, and the costs from the networks' config files (`bob.commands.plan.shapes`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING
from unittest.mock import patch

import click
from tqdm import tqdm

from bob.commands import configuration
from bob.commands.configuration import MODELS, model_folder
from bob.commands.why import Causes
from bob.dvc.forecast import MAY_RUN, RUNS, Forecast
from bob.dvc.overrides import overridden
from bob.dvc.pipeline import Pipeline
from bob.errors import LINE, BobError, shown
from bob.formats import params
from bob.formats.params import Params
from bob.models import gpus

# Late where there is something to do: torch, and what stands on it, take seconds to import.
if TYPE_CHECKING:
    from bob.commands.plan.work import Project, Work

HEADER = ("stage", "dvc", "to do", "item cache", "FLOPs", "memory", "disk", "time", "because")
NUMBERS = range(4, 8)  # of the columns
PREFIXES = ("", "k", "M", "G", "T", "P", "E")


@dataclass(frozen=True)
class Machine:
    """What the stages would run on."""

    gpu: gpus.Gpu
    count: int = 1
    """GPUs, over which the items are spread."""
    price: float | None = None
    """Of a GPU for an hour."""


def plan(
    gpu_name: str | None = None,
    count: int | None = None,
    price: float | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Print the plan for the parameters with `overrides`, on `count` GPUs at a `price` an hour.

    Raises BobError where something that it is made of is missing.
    """
    with overridden(params.PARAMS, overrides) as file:
        values = params.load(file)
        configuration.check(values)
        of = Params(values, "plan")
        with Pipeline(params=file if overrides else None) as pipeline:
            _print(of, pipeline, gpu_name, count, price)


def _print(
    of: Params, pipeline: Pipeline, gpu_name: str | None, count: int | None, price: float | None
) -> None:
    forecast = forecast_of(pipeline, of)
    states, because = forecast.states, reasons(pipeline, forecast)
    work: dict[str, Work] = {}
    lines = ["nothing to do: `dvc repro` will compute nothing"]
    machine = Machine(gpus.choose(gpu_name) if gpu_name else gpus.GPUS[gpus.DEFAULT])
    if _running(forecast):
        from bob.cache.executors.chosen import executor
        from bob.commands.plan.notes import notes

        machine = Machine(gpus.choose(gpu_name), count or executor().workers(), price)
        with (
            _made_on(machine.gpu) if gpu_name else nullcontext(),
            project_of(of, forecast, machine.gpu) as project,
        ):
            work = to_do(project)
            lines = notes(of, states, work, machine, project.copies)
    for line in (*table(states, work, because, machine), "", *lines):
        click.echo(shown(line, LINE))


@contextmanager
def _made_on(gpu: gpus.Gpu) -> Iterator[None]:
    """Have the item cache asked for what `gpu` makes, which this machine need not have."""
    from bob.cache.executors.chosen import executor
    from bob.cache.work import Hardware
    from bob.models.precision import hardware

    on = Hardware("cuda", gpu.bf16, gpu.name, compiles=True)
    hardware.cache_clear()
    try:
        with patch.object(executor(), "hardware", lambda look: on):
            yield
    finally:
        hardware.cache_clear()


def forecast_of(pipeline: Pipeline, of: Params) -> Forecast:
    """What DVC will do; raises BobError naming a model or another dependency that is missing."""
    for section, key in MODELS:
        folder = model_folder(of, section, key)
        if not folder.is_dir():
            raise BobError(
                f"{section}.{key}: {folder} is missing; `dvc pull` or `bob fetch` brings it"
            )
    forecast = Forecast(pipeline)
    for path in forecast.missing:
        raise BobError(f"{path} is missing; `dvc pull` or, for a model, `bob fetch` brings it")
    return forecast


@contextmanager
def project_of(of: Params, forecast: Forecast, gpu: gpus.Gpu) -> Iterator["Project"]:
    """What the work of the stages is found by."""
    from bob.cache.items import ItemCache
    from bob.commands.plan.work import Project

    with ItemCache() as cache:
        yield Project(of, forecast, cache, gpu)


def reasons(pipeline: Pipeline, forecast: Forecast) -> dict[str, str]:
    """Why DVC runs or restores a stage, by stage: one cause of its own, or the stages before it."""
    causes = Causes(pipeline, forecast)
    short = {}
    for stage in pipeline.stages:
        found, _ = causes.of(stage)
        own = [cause.short for cause in found if not cause.stage]
        others = f" (and {len(own) - 1} more)" if len(own) > 1 else ""
        before = dict.fromkeys(cause.stage for cause in found if cause.stage)
        short[stage] = f"{own[0]}{others}" if own else ", ".join(before)
    return short


def _running(forecast: Forecast) -> list[str]:
    return [stage for stage, state in forecast.states.items() if state in (RUNS, MAY_RUN)]


def to_do(project: "Project") -> dict[str, "Work"]:
    """What each stage has to do that DVC will run, or may."""
    from bob.commands.plan.work import STAGES

    running = _running(project.forecast)
    work = {}
    with tqdm([stage for stage in STAGES if stage in running], leave=False, disable=None) as bar:
        for stage in bar:
            bar.set_description(f"planning {stage}")
            work[stage] = STAGES[stage](project)
    return work


def table(
    states: Mapping[str, str],
    work: Mapping[str, "Work"],
    because: Mapping[str, str],
    machine: Machine,
) -> list[str]:
    """The lines of the table: a stage each, and the total."""
    rows = [HEADER]
    for stage, state in states.items():
        one = work.get(stage)
        cells = _cells(one, machine) if one else "-" * 6
        rows.append((stage, state, *cells, because[stage] or "-"))
    total = (
        metric(sum(sum(one.flops.values()) for one in work.values())),
        metric(max((one.memory for one in work.values()), default=0), "B"),
        metric(sum(one.disk for one in work.values()), "B"),
        duration(sum(one.seconds(machine.gpu, machine.count) for one in work.values())),
    )
    rows.append(("total", "", "", "", *total, ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in NUMBERS else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _cells(work: "Work", machine: Machine) -> tuple[str, ...]:
    return (
        work.what,
        work.items or "-",
        metric(sum(work.flops.values())),
        metric(work.memory, "B"),
        metric(work.disk, "B"),
        duration(work.seconds(machine.gpu, machine.count)),
    )


def metric(value: float, unit: str = "") -> str:
    """A number with a metric prefix: 1234567 is 1.23 M; nothing is a dash."""
    if not value:
        return "-"
    value = float(f"{value:.3g}")  # first, or 999,999 would be 1e+03 k
    power = max(0, min(len(PREFIXES) - 1, int(math.log10(value) // 3)))
    return f"{value / 1000**power:.3g} {PREFIXES[power]}{unit}".rstrip()


def duration(value: float) -> str:
    """Seconds as a person says them."""
    if not value:
        return "-"
    if value < 1:
        return "< 1 s"
    if value < 90:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 90 * 60 else f"{value / 3600:.1f} h"
