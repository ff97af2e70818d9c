"""`bob plan`: what `dvc repro` would do now, what of it is there already, and what it would cost.

Nothing is run and no weights are read: the state of the stages comes from DVC, that of single items
from the item cache, and the costs from the networks' config files (`bob.commands.plan.shapes`).
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import click
from dvc.exceptions import DvcException
from dvc.repo import Repo

from bob.cache.items import ItemCache
from bob.commands.plan.forecast import MAY_RUN, RESTORED, RUNS, Forecast
from bob.commands.plan.networks import ANSWER_TOKENS
from bob.commands.plan.work import STAGES, Project, Work, model_folder
from bob.errors import BobError
from bob.formats import params
from bob.formats.params import Params
from bob.models import gpus
from bob.models.captioner import MAX_NEW_TOKENS
from bob.models.device import best_device, dtype_name, resolve_precision
from bob.models.endpoint import is_endpoint

MODELS = (
    ("caption", "model"),
    ("finetune", "base_model"),
    ("classify", "backbone"),
    ("audit", "feature_model"),
)
HEADER = ("stage", "dvc", "to do", "item cache", "FLOPs", "memory", "disk", "time")
FIRST_NUMBER = 4  # of the columns
USABLE = 0.9  # of a GPU's memory; the rest is CUDA's own, and gaps that its allocator leaves
PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def plan(gpu_name: str | None = None) -> None:
    """Print the plan for the parameters as they are.

    Raises BobError where something that it is made of is missing.
    """
    gpu = gpus.choose(gpu_name)
    with opened(gpu) as project:
        states, work = project.forecast.states, to_do(project)
    for line in (*table(states, work, gpu), "", *notes(project.params, states, work, gpu)):
        click.echo(line)


@contextmanager
def opened(gpu: gpus.Gpu) -> Iterator[Project]:
    """The project in the current folder; raises BobError naming a model that is missing."""
    project_params = Params(params.load(), "plan")
    for section, key in MODELS:
        folder = model_folder(project_params, section, key)
        if not folder.is_dir():
            raise BobError(
                f"{section}.{key}: {folder} is missing; `dvc pull` or `bob fetch` brings it"
            )
    with ItemCache() as cache, Repo() as repo:
        try:
            forecast = Forecast(repo)
        except DvcException as error:
            raise BobError(f"DVC: {' '.join(str(error).split())}") from None
        yield Project(project_params, forecast, cache, gpu)


def to_do(project: Project) -> dict[str, Work]:
    """What each stage has to do that DVC will run, or may."""
    states = project.forecast.states
    return {stage: of(project) for stage, of in STAGES.items() if states[stage] in (RUNS, MAY_RUN)}


def table(states: Mapping[str, str], work: Mapping[str, Work], gpu: gpus.Gpu) -> list[str]:
    """The lines of the table: a stage each, and the total."""
    rows = [HEADER]
    for stage in STAGES:
        one = work.get(stage)
        rows.append((stage, states[stage], *(_cells(one, gpu) if one else "-" * 6)))
    total = (
        metric(sum(sum(one.flops.values()) for one in work.values())),
        metric(max((one.memory for one in work.values()), default=0), "B"),
        metric(sum(one.disk for one in work.values()), "B"),
        duration(sum(seconds(one, gpu) for one in work.values())),
    )
    rows.append(("total", "", "", "", *total))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number >= FIRST_NUMBER else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _cells(work: Work, gpu: gpus.Gpu) -> tuple[str, ...]:
    return (
        work.what,
        work.items or "-",
        metric(sum(work.flops.values())),
        metric(work.memory, "B"),
        metric(work.disk, "B"),
        duration(seconds(work, gpu)),
    )


def seconds(work: Work, gpu: gpus.Gpu) -> float:
    """How long the products take; reading, drawing and writing are not counted."""
    return sum(gpu.seconds(flops, precision) for precision, flops in work.flops.items())


def notes(
    of: Params, states: Mapping[str, str], work: Mapping[str, Work], gpu: gpus.Gpu
) -> list[str]:
    """What the numbers stand on, what is not known, and what does not fit."""
    if not work:
        return ["nothing to do: `dvc repro` will compute nothing"]
    lines = [
        f"time, memory: {gpu.name}, {gpu.half:g} TFLOP/s in {'bf16' if gpu.bf16 else 'fp16'} and "
        f"{gpu.single:g} in fp32, of which {gpus.UTILISATION:.0%} is taken to be reached, "
        f"{metric(gpu.memory, 'B')}; only products are timed"
    ]
    if RESTORED in states.values():
        lines.append("restored: DVC's run cache has the outputs, nothing is computed")
    if MAY_RUN in states.values():
        lines.append(
            "may run: what it depends on is being made; DVC skips it where that comes out the same"
        )
    if any("at most" in one.items for one in work.values()):
        lines.append("at most: what decides these items is being made, so all may be new")
    if any(work[stage].flops for stage in ("caption", "audit") if stage in work):
        lines.append(
            f"answers are taken to have {ANSWER_TOKENS} tokens (at most {MAX_NEW_TOKENS}) and to "
            "be usable; one that names a class is asked for again"
        )
    for stage in ("caption", "generate"):
        setting = getattr(of, stage).precision
        here, there = dtype_name(resolve_precision(setting, best_device())), gpu.precision(setting)
        if stage in work and work[stage].flops and here != there:
            lines.append(
                f"{stage}: the item cache was asked for what this machine makes, in {here}; on "
                f"{gpu.name} it is {there}"
            )
    for folder in dict.fromkeys(model_folder(of, *model) for model in MODELS):
        if not is_endpoint(folder) and not any(folder.rglob("*.safetensors")):
            lines.append(f"{folder} holds no weights: nothing that was made with them is found")
    lines += [
        f"{stage} does not fit into {gpu.name}: about {metric(one.memory, 'B')} are needed, of "
        f"{metric(USABLE * gpu.memory, 'B')}" + (f"; {one.relief}" if one.relief else "")
        for stage, one in work.items()
        if one.memory > USABLE * gpu.memory
    ]
    return lines


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
