"""The pipeline at real size, with random weights and a few steps: does it run, and what it takes.

    python -m bench.rehearsal [--size full|small] [--folder FOLDER] [--output FILE]

Models are built in the files that the Hub has them in: Stable Diffusion 1.5 (860 M weights in the
UNet, 512 px), Qwen2.5-VL-3B, CLIP ViT-B/16 with LoRA, ResNet-50 for the audit; `small` are the same
classes with a few weights. DVC tracks them. Then a copy of this project runs stage by stage on a
few photos, and each stage's seconds, peak memory beyond its imports and bytes on disk are printed
beside what `bob plan` said just before. `full` needs 40 GB of disk, 16 GB of memory and no GPU.

What a library says on the way is shown: nothing should be. Exit status 1 where something was, where
a stage fails, or where the plan's memory for finetune or generate at full size is a quarter below
what is the process's own at the peak, or a quarter above all that is resident. Between the two are
mapped files: weights that are used where they lie, and those that were copied into another layout,
which the system can take back.
"""

import importlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import psutil
import timm
import torch

from bob.commands import plan
from bob.dvc.pipeline import Pipeline
from bob.formats import params
from bob.formats.files import write_json
from bob.models import gpus
from tests import builders
from tests.dvc_project import dvc, environment, make_project, run

STAGES = (
    *("draw", "split", "caption", "finetune", "generate", "audit"),
    *("classify", "evaluate", "export", "benchmark", "card", "report"),
)
HELD = ("finetune", "generate")
"""The stages whose memory the plan must know to a quarter, at full size."""
QUARTER = 0.25
LOOK = 0.02  # seconds between two looks at a stage's memory


@dataclass(frozen=True)
class Size:
    """What is built."""

    models: dict[str, Callable[[Path], object]]
    photo: tuple[int, int]
    """Width and height in pixels."""
    rank: int


def _resnet(folder: Path, name: str = "resnet50", **options: Any) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=1000, **options)
    timm.models.save_for_hf(network, folder, safe_serialization=True)


SIZES = {
    "small": Size(
        {
            "base": builders.build_text_to_image,
            "captioner": builders.build_captioner,
            "clip": builders.build_clip,
            "features": lambda folder: _resnet(folder, "test_resnet"),
        },
        (64, 48),
        2,
    ),
    "full": Size(
        {
            "base": lambda folder: builders.build_text_to_image(
                folder,
                unet_config=builders.SD15_UNET,
                text_config=builders.SD15_TEXT,
                vae_config=builders.SD_VAE,
            ),
            "captioner": lambda folder: builders.build_captioner(
                folder,
                tied=True,
                text_config=builders.QWEN_3B,
                vision_config=builders.QWEN_3B_VISION,
                shard="5GB",
            ),
            "clip": lambda folder: builders.build_clip(
                folder,
                vision_config=builders.CLIP_B16_VISION,
                text_config=builders.CLIP_B16_TEXT,
                projection_dim=512,
                resized=224,
            ),
            "features": _resnet,
        },
        (1600, 1200),
        16,
    ),
}
CLASSES = {"Carolina Wren": 6, "House Wren": 6}


def settings(size: Size) -> dict[str, dict[str, Any]]:
    """The fewest steps that make every stage do its work, in fp32 where it is compared."""
    return {
        "draw": {"classes": 2, "train_per_class": 4, "per_context": 1},
        "data": {"name": "wrens", "shots": 2, "val_per_class": 1},
        "caption": {
            **{"model": "models/captioner", "batch_size": 1, "precision": "bf16"},
            "image_side": 224,  # few tokens, because a CPU reads them slowly
        },
        "finetune": {
            **{"base_model": "models/base", "epochs": 1, "batch_size": 2, "rank": size.rank},
            "precision": "fp32",
        },
        "generate": {
            **{"images_per_class": 1, "steps": 2, "batch_size": 1, "precision": "fp32"},
            "context": "data/contexts/aircraft.jsonl",  # random captioners say nothing of use
        },
        "classify": {
            **{"backbone": "models/clip", "lora_rank": size.rank, "epochs": 2, "seeds": [0]},
            **{"batch_size": 4, "warmup_epochs": 1, "precision": "fp32"},
        },
        "audit": {"feature_model": "models/features", "captioned_per_class": 1},
        "export": {"precisions": ["fp32", "int8"]},
        "benchmark": {"batch_sizes": [1], "repeats": 2},
    }


@dataclass(frozen=True)
class Figures:
    """Of one stage; bytes and seconds."""

    stage: str
    seconds: float
    memory: int
    """Resident at the peak, beyond what its imports take."""
    own: int
    """The same without mapped files."""
    planned_memory: int
    disk: int
    """More blocks in use under the project than before, links counted once."""
    planned_disk: float
    said: list[str]
    """Lines that are neither DVC's nor the stage's."""


@dataclass(frozen=True)
class Ran:
    """What a command has printed and taken."""

    memory: int
    """Resident bytes at the peak of the largest of its processes."""
    own: int
    """The same without mapped files."""
    output: str
    errors: str


def build(folder: Path, size: Size) -> Path:
    """The project, its models and photos."""
    project = make_project(folder / "project", settings(size))
    for name, make in size.models.items():
        make(folder / name)
        shutil.move(folder / name, project / "models" / name)
        shutil.rmtree(folder / f"{name}-tokenizer", ignore_errors=True)
    builders.build_photos(project / "data/wrens", CLASSES, size.photo)
    (project / "data/wrens/dataset.yaml").write_text("descriptor: bird\n")
    dvc(project, "add", "--quiet", "data/wrens", *(f"models/{name}" for name in size.models))
    run(project, "git", "add", "--all")
    run(project, "git", "commit", "--quiet", "--message", "models and photos")
    return project


def rehearse(project: Path, stage: str) -> Figures:
    """Run a stage with DVC."""
    called = f"import bench.rehearsal as bench; bench.{{}}({stage!r})"
    planned = json.loads(measured(project, "-c", called.format("print_plan")).output)
    imports = measured(project, "-c", called.format("imports"))
    before = blocks(project)
    began = time.monotonic()
    ran = measured(project, "-m", "dvc", "repro", "--single-item", stage)
    return Figures(
        stage,
        time.monotonic() - began,
        max(0, ran.memory - imports.memory),
        max(0, ran.own - imports.own),
        planned["memory"],
        blocks(project) - before,
        planned["disk"],
        not_ours(ran.errors),
    )


def not_ours(errors: str) -> list[str]:
    """The lines on standard error that no stage has said."""
    ours = tuple(f"{stage}: " for stage in STAGES)
    return [line for line in errors.splitlines() if line and not line.startswith(ours)]


def measured(project: Path, *arguments: str) -> Ran:
    """Run Python in the project; raises ClickException with what was said where it fails."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = psutil.Popen(
            ["python", *arguments],
            cwd=project,
            env=environment(project),
            stdout=output,
            stderr=errors,
        )
        peak = own = 0
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                for one in (process, *process.children(recursive=True)):
                    now = one.memory_info()
                    peak, own = max(peak, now.rss), max(own, now.rss - now.shared)
            time.sleep(LOOK)
        said = []
        for file in (output, errors):
            file.seek(0)
            said.append(file.read())
    if process.returncode:
        raise click.ClickException("\n".join([f"python {' '.join(arguments)} failed", *said]))
    return Ran(peak, own, *said)


def print_plan(stage: str) -> None:
    """Of the current folder: what `bob plan` knows of a stage, as JSON."""
    of = params.Params(params.load(), "plan")
    with Pipeline() as pipeline:
        forecast = plan.forecast_of(pipeline, of)
        with plan.project_of(of, forecast, gpus.GPUS[gpus.DEFAULT]) as project:
            work = plan.to_do(project).get(stage)
    click.echo(
        json.dumps(
            {"memory": work.memory if work else 0, "disk": work.disk if work else 0},
        )
    )


def imports(stage: str) -> None:
    """Import what a stage does, and what it imports late."""
    importlib.import_module(f"bob.stages.{stage}")
    importlib.import_module("transformers").AutoModelForImageTextToText  # noqa: B018


def blocks(folder: Path) -> int:
    """Bytes on the disk of all files below, each counted once however many links it has."""
    files = {}
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            status = path.lstat()
            files[status.st_ino] = status.st_blocks * 512
    return sum(files.values())


def table(figures: Sequence[Figures]) -> list[str]:
    """A line a stage."""
    heads = " ".join(f"{head:>10}" for head in ("memory", "own", "plan", "disk", "plan"))
    lines = [f"{'stage':10} {'seconds':>8} {heads}"]
    for one in figures:
        sizes = (one.memory, one.own, one.planned_memory, one.disk, one.planned_disk)
        cells = " ".join(f"{plan.metric(max(0, size), 'B'):>10}" for size in sizes)
        lines.append(f"{one.stage:10} {one.seconds:8.1f} {cells}")
    return lines


def missed(figures: Sequence[Figures]) -> list[str]:
    """The stages whose memory the plan did not know."""
    return [
        f"{one.stage}: the plan's {plan.metric(one.planned_memory, 'B')} are not within a quarter "
        f"of {plan.metric(one.own, 'B')} to {plan.metric(one.memory, 'B')}"
        for one in figures
        if one.stage in HELD
        and not (1 - QUARTER) * one.own <= one.planned_memory <= (1 + QUARTER) * one.memory
    ]


@click.command(help=__doc__)
@click.option("--size", type=click.Choice(list(SIZES)), default="full", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Kept; by default a temporary one.")
@click.option("--output", type=click.Path(path_type=Path), help="Figures as JSON.")
def main(size: str, folder: Path | None, output: Path | None) -> None:
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())  # one, where it is tests that import this
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as root:
        project = Path(root) / "project"
        if not project.exists():
            build(Path(root), SIZES[size])
        figures = []
        for stage in STAGES:
            figures.append(rehearse(project, stage))
            click.echo("\n".join(figures[-1].said), err=True, nl=bool(figures[-1].said))
            click.echo(table(figures)[-1] if len(figures) > 1 else "\n".join(table(figures)))
    if output is not None:
        write_json(output, [asdict(one) for one in figures])
    said = [
        f"{one.stage} said {len(one.said)} lines that are not its own"
        for one in figures
        if one.said
    ]
    if wrong := said + (missed(figures) if size == "full" else []):
        raise click.ClickException("; ".join(wrong))


if __name__ == "__main__":
    main()
