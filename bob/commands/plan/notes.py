"""What the numbers of a plan stand on, what is not known, and what does not fit."""

import math
from collections.abc import Mapping

from bob.commands.configuration import MODELS, model_folder
from bob.commands.plan import Machine, metric
from bob.commands.plan.networks import ANSWER_TOKENS
from bob.commands.plan.work import Work
from bob.commands.study.curve import half_as_many
from bob.dvc.forecast import MAY_RUN, RESTORED
from bob.formats.params import Params
from bob.models import gpus
from bob.models.captioner import MAX_NEW_TOKENS
from bob.models.endpoint import is_endpoint
from bob.models.precision import dtype_name, resolve_precision

USABLE = 0.9  # of a GPU's memory; the rest is CUDA's own, and gaps that its allocator leaves


def notes(
    of: Params,
    states: Mapping[str, str],
    work: Mapping[str, Work],
    machine: Machine,
    copies: int,
) -> list[str]:
    """Lines to print below the table; an output is on the disk in so many copies."""
    gpu, many = machine.gpu, f"{machine.count} x " if machine.count > 1 else ""
    lines = [
        f"time, memory: {many}{gpu.name}, {gpu.half:g} TFLOP/s in "
        f"{'bf16' if gpu.bf16 else 'fp16'} and {gpu.single:g} in fp32, "
        f"{metric(gpu.memory, 'B')}; only products are timed",
        _shares(gpu),
    ]
    if copies > 1 and any(one.disk for one in work.values()):
        lines.append(
            "disk: twice, in the workspace and in DVC's cache; `dvc config --local cache.type "
            "hardlink,symlink` would link them"
        )
    if machine.count > 1:
        lines.append("answers, images and classifiers are spread over the GPUs; finetune takes one")
    if machine.price is not None:
        lines.append(_cost(work, machine, machine.price))
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
        here, there = dtype_name(resolve_precision(setting)), gpu.precision(setting)
        if stage in work and work[stage].flops and here != there:
            lines.append(
                f"{stage}: the item cache was asked for what this machine makes, in {here}; on "
                f"{gpu.name} it is {there}"
            )
    for folder in dict.fromkeys(model_folder(of, *model) for model in MODELS):
        if not is_endpoint(folder) and not any(folder.rglob("*.safetensors")):
            lines.append(f"{folder} holds no weights: nothing that was made with them is found")
    if "generate" in work and work["generate"].flops:
        lines += _half(of.generate.images_per_class)
    return lines + _slow(of, work, gpu) + _too_large(work, gpu)


def _shares(gpu: gpus.Gpu) -> str:
    """What part of the peak is reckoned with, and who says so."""
    if not gpu.measured:
        return (
            f"of the TFLOP/s {gpus.UTILISATION:.0%} is assumed to be reached; `make gpu-check` on "
            "such a GPU measures it"
        )
    reached = ", ".join(
        f"{work} {share:.0%} in {precision}"
        for work, by_precision in gpu.shares.items()
        for precision, share in by_precision.items()
    )
    return (
        f"of the TFLOP/s reached, measured on {gpu.measured}: {reached}; {gpus.UTILISATION:.0%} is "
        "assumed of other work"
    )


def _half(per_class: int) -> list[str]:
    """What half of generate's cost would lose, by the study that is in the project."""
    found = half_as_many(per_class)
    if found is None:
        return []
    mean, low, high = found.gain
    interval = "" if math.isnan(low) else f", {low:+.1f} to {high:+.1f} with 95 %"
    return [
        f"half the images take half of generate's time; on the miniature {found.half} a class "
        f"instead of {found.whole} came to {mean:+.1f} points of top-1{interval}"
    ]


def _slow(of: Params, work: Mapping[str, Work], gpu: gpus.Gpu) -> list[str]:
    """What `precision: auto` means on a GPU without bf16."""
    auto = [
        f"{stage}.precision"
        for stage in ("caption", "finetune", "generate", "classify")
        if getattr(of, stage).precision == "auto" and stage in work and work[stage].flops
    ]
    if gpu.bf16 or not auto:
        return []
    return [
        f"{gpu.name} has no bf16, so auto is fp32 there; products in fp16 are "
        f"{gpu.half / gpu.single:.0f} times as fast: {', '.join(auto)}"
    ]


def _too_large(work: Mapping[str, Work], gpu: gpus.Gpu) -> list[str]:
    """What does not fit, and what would help."""
    usable = USABLE * gpu.memory
    return [
        f"{stage} does not fit into {gpu.name}: about {metric(one.memory, 'B')} are needed, of "
        f"{metric(usable, 'B')}; "
        + (" or ".join(one.relief) or "take a smaller model or a larger GPU")
        for stage, one in work.items()
        if one.memory > usable
    ]


def _cost(work: Mapping[str, Work], machine: Machine, price: float) -> str:
    hours = sum(one.seconds(machine.gpu, machine.count) for one in work.values()) / 3600
    busy = sum(one.seconds(machine.gpu) for one in work.values()) / 3600
    held = machine.count * hours
    return (
        f"cost: {held:.3g} GPU-hours at {price:g} are {held * price:,.2f}; the GPUs compute for "
        f"{busy:.3g} of them"
    )
