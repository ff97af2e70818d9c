"""What the sections of `bench.gpu` have in common: models, timing, memory, and what plan says."""

import gc
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from bench.speed import seconds
from bob.models.device import computing_device
from bob.models.gpus import GPUS, Gpu, recognise
from bob.models.precision import hardware_here, resolve_precision

ROOT = Path(__file__).resolve().parent.parent
Figures = dict[str, Any]
"""Plain values, as JSON has them; `wrong` lists what is not as it should be."""


@dataclass(frozen=True)
class Setting:
    """Where a section runs, and at which size."""

    scratch: Path
    """A folder of the run; the sections share the models that they build there."""
    tiny: bool
    """Models of some kilobytes, on any machine: the figures mean nothing."""

    @cached_property
    def device(self) -> torch.device:
        """The GPU, or, where it is tiny, also the CPU; raises RuntimeError where there is none."""
        device = computing_device()
        if device.type == "cpu" and not self.tiny:
            raise RuntimeError("torch sees no GPU")
        return device

    @cached_property
    def gpu(self) -> Gpu | None:
        """What its data sheet says, where it is a known one."""
        return recognise(torch.cuda.get_device_name()) if self.device.type == "cuda" else None

    @cached_property
    def auto(self) -> str:
        """The precision that `auto` stands for."""
        return "bf16" if resolve_precision("auto", hardware_here()) == torch.bfloat16 else "fp32"

    def built(self, name: str, build: Callable[[Path], object]) -> Path:
        """The model folder of that name; built where no section before has done it."""
        folder = self.scratch / name
        if not folder.is_dir():
            draft = self.scratch / f"{name}-{os.getpid()}"
            build(draft)
            draft.rename(folder)
        return folder

    def base(self) -> Path:
        """Stable Diffusion 1.5 with random weights; where it is tiny, one of 16 px."""
        from bench.speed import build_sd15
        from tests.builders import build_text_to_image

        return self.built("base", build_text_to_image if self.tiny else build_sd15)

    def median(self, run: Callable[[], object], repeats: int) -> float:
        """Seconds of a call, after one that warms up."""
        run()
        return statistics.median(seconds(run) for _ in range(1 if self.tiny else repeats))

    def reached(self, flops: float, took: float, precision: str) -> Figures:
        """TFLOP/s and, of a known GPU, their share of the peak."""
        tflops = flops / took / 1e12
        peak = self.gpu.peak(precision) if self.gpu else None
        return {"tflops": tflops, "share_of_peak": tflops / peak if peak else None}


def forget_peak() -> None:
    """Let `peak_memory` be that of what follows, and of what is still held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int | None:
    """Bytes of the GPU's memory at the peak, models included; None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def planned_memory(
    setting: Setting, section: str, of: str, changes: Mapping[str, object], *, photos: int = 0
) -> int | None:
    """Bytes that `bob plan` says a stage takes on this GPU; None without DVC, which plan asks.

    `section` of the parameters has these `changes`, and the work is what the function `of` plans.
    """
    try:
        from bob.commands.plan import work
        from bob.formats import params
    except ModuleNotFoundError:
        return None
    values = params.load(ROOT / "params.yaml")
    values["finetune"] |= {"base_model": str(setting.base())}
    values[section] |= changes
    # As much of a project as these functions look at.
    project = SimpleNamespace(
        params=params.Params(values, "plan"),
        gpu=setting.gpu or GPUS["h100"],
        images=1,
        photos=SimpleNamespace(train=[None] * photos),
    )
    more = [["a prompt"]] if of == "generating_work" else []
    return cast(int, getattr(work, of)(project, *more).memory)
