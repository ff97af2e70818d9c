"""One loop that trains all of the miniature's models, and goes on where it was killed."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from bob.errors import BobError
from bob.formats.files import replacing_file
from bob.miniature.recipes import SEED, Recipe
from bob.miniature.world import CONTEXTS, TASK, corpus_variants
from bob.models.device import autocast
from bob.models.precision import hardware_here, resolve_precision

CHECKPOINT_SECONDS = 60
# Any: of what class a network is, the loss knows and `fit` need not.
Loss = Callable[[Any, torch.Generator, int], Tensor]


def fit(name: str, module: nn.Module, loss: Loss, recipe: Recipe, work: Path) -> Any:
    """Minimize `loss(module, generator, count)`, the mean over `count` examples it draws.

    Returns the averaged weights, or the last without EMA. Goes on from `work/<name>.pt`. The
    generator is seeded by the step, so that a run taken up again draws what it would have drawn.

    Raises BobError where that file is of another recipe or network, and where nothing is compiled.
    """
    path = work / f"{name}.pt"
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
    optimizer = torch.optim.AdamW(
        module.parameters(), recipe.lr, recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    shapes = [(key, tuple(value.shape)) for key, value in module.state_dict().items()]
    of = hashlib.sha256(repr((asdict(recipe), shapes)).encode()).hexdigest()
    state: dict[str, Any] = {"step": 0, "seconds": 0.0}
    stateful: dict[str, Any] = {"module": module, "average": average, "optimizer": optimizer}
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state.get("of") != of:
            raise BobError(f"{path} is of another recipe or network; delete it to begin anew")
        for key, owner in stateful.items():
            owner.load_state_dict(state[key])

    started = time.monotonic()

    def save(step: int) -> None:
        nonlocal started
        state["seconds"] += time.monotonic() - started
        started = time.monotonic()
        parts = {key: owner.state_dict() for key, owner in stateful.items()}
        with replacing_file(path) as draft:
            torch.save({**parts, "of": of, "step": step, "seconds": state["seconds"]}, draft)

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // recipe.shards))
    pool = ThreadPoolExecutor(recipe.shards)
    module.train()
    if recipe.compile and state["step"] < recipe.steps:
        if not hardware_here().compiles:
            raise BobError(f"{name}: torch.compile needs a C++ compiler and Python's headers")
        module.compile()  # in place, so that the weights keep their names
        _shard(module, loss, 0, recipe, 0)  # two threads that compile at once wait for ever
    running = 0.0
    progress = tqdm(
        range(state["step"], recipe.steps),
        desc=name,
        initial=state["step"],
        total=recipe.steps,
        mininterval=5,
    )
    for step in progress:
        share = step / recipe.steps
        warm = min(1.0, (step + 1) / recipe.warmup)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * share))
        value = _backward(module, loss, step, recipe, pool)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(module)
        running = value if step == state["step"] else 0.98 * running + 0.02 * value
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
        if time.monotonic() - started > CHECKPOINT_SECONDS:
            save(step + 1)
    if state["step"] < recipe.steps:
        save(recipe.steps)
    pool.shutdown()
    torch.set_num_threads(threads)
    # Batch norm statistics are not averaged: without EMA the trained module itself is right.
    return (average.module if recipe.ema else module).eval().requires_grad_(False)


def _backward(
    module: nn.Module, loss: Loss, step: int, recipe: Recipe, pool: ThreadPoolExecutor
) -> float:
    """Set the gradients of one batch; returns the mean loss.

    The batch is split over threads rather than every product over cores: they wait for each other
    once a step and not thousands of times, which is twice as fast alone and ten times as fast on
    cores that others use too.
    """
    shard = partial(_shard, module, loss, step, recipe)
    values, gradients = zip(*pool.map(shard, range(recipe.shards)), strict=True)
    for parameter, *parts in zip(module.parameters(), *gradients, strict=True):
        # In the parameter's own memory format: the fused optimizer walks both in memory order.
        parameter.grad = torch.empty_like(parameter).copy_(torch.stack(parts).mean(0))
    return sum(values) / recipe.shards


def _shard(
    module: nn.Module, loss: Loss, step: int, recipe: Recipe, number: int
) -> tuple[float, tuple[Tensor, ...]]:
    """The loss of one part of a batch, and its gradients."""
    generator = torch.Generator().manual_seed((SEED * 1_000_000 + step) * 16 + number)
    precision = resolve_precision(recipe.precision, hardware_here())
    with autocast(torch.device("cpu"), precision):
        value = loss(module, generator, recipe.batch // recipe.shards)
    return value.item(), torch.autograd.grad(value, list(module.parameters()))


def write_card(
    folder: Path,
    title: str,
    about: str,
    trainings: dict[str, Recipe],
    measured: dict[str, str],
    work: Path,
    earlier: Sequence[str] = (),
) -> None:
    """The README.md of a model folder: what it is, how it was trained, how good it is.

    `earlier` are the lines of the trainings that these go on from.
    """
    lines = [f"# {title}", "", about, "", "## Training", ""]
    lines.append(
        f"Corpus: {len(corpus_variants())} drawn aircraft variants (`bob/miniature/world.py`), "
        f"each in {len(CONTEXTS)} contexts; the {len(TASK)} task classes are not among them. "
        f"Seed {SEED}. Command: `python -m bob miniature{' --further' if earlier else ''}`."
    )
    lines += ["", *earlier]
    for name, recipe in trainings.items():
        settings = ", ".join(f"{key} {value}" for key, value in asdict(recipe).items())
        minutes = torch.load(work / f"{name}.pt", weights_only=True)["seconds"] / 60
        lines.append(f"* {name}: {settings}; {minutes:.0f} minutes on a machine that was shared")
    lines += ["", "## Measured", "", "With `python -m bob miniature --measure`:", ""]
    lines += [f"* {what}: {value}" for what, value in measured.items()]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def trainings_of(folder: Path) -> list[str]:
    """The lines of a model's card that say how it was trained."""
    card = (folder / "README.md").read_text("utf-8")
    training = card.split("\n## Training\n")[1].split("\n## ")[0]
    return [line for line in training.splitlines() if line.startswith("* ")]
