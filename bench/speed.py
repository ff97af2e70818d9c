"""Two ways to do the same work, timed in turns; photos and a Stable Diffusion v1.5 to do it on."""

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bob.models.gpus import recognise
from tests.builders import SD15_TEXT, SD15_UNET, SD_VAE, build_text_to_image


@dataclass
class Side:
    """One way to do the work."""

    name: str
    run: Callable[[], int]
    """Does the work once; returns how many images it was."""
    peak_bytes: int
    """GPU memory that its models and one run took; 0 on the CPU."""
    rates: list[float] = field(default_factory=list)
    """Images a second, of every run."""

    @property
    def rate(self) -> float:
        """Median of images a second."""
        return statistics.median(self.rates)


def side(name: str, build: Callable[[], Callable[[], int]]) -> Side:
    """Build a side and run it once, to warm up and to see its memory."""
    if not torch.cuda.is_available():
        run = build()
        run()
        return Side(name, run, 0)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run = build()
    run()
    return Side(name, run, torch.cuda.max_memory_allocated() - before)


def take_turns(sides: Sequence[Side], repeats: int) -> None:
    """Run the sides one after the other, `repeats` times, so that other load meets all alike."""
    for _ in range(repeats):
        for one in sides:
            _synchronize()
            began = time.perf_counter()
            images = one.run()
            _synchronize()
            one.rates.append(images / (time.perf_counter() - began))


def seconds(function: Callable[[], object]) -> float:
    """What a call takes, its work on the GPU included."""
    _synchronize()
    began = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - began


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def report(
    sides: Sequence[Side], flops: Sequence[float], dtype: torch.dtype, peak_tflops: float | None
) -> None:
    """Print rate, model FLOP utilisation and memory; `flops` are each side's for one image."""
    peak_tflops = peak_tflops or _peak_tflops(dtype)
    for one, each in zip(sides, flops, strict=True):
        tflops = one.rate * each / 1e12
        used = f"{tflops / peak_tflops:5.1%} of peak" if peak_tflops else "--peak-tflops not given"
        memory = f", {one.peak_bytes / 2**30:.1f} GiB" if one.peak_bytes else ""
        print(f"{one.name:<42}{one.rate:8.2f} images/s {tflops:8.3f} TFLOP/s, {used}{memory}")
    if not any(one.peak_bytes for one in sides):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(f"peak memory of all together: {peak / 2**30:.1f} GiB")


def _peak_tflops(dtype: torch.dtype) -> float | None:
    """Of products in `dtype` on this machine's GPU, where it is a known one."""
    here = recognise(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if here is None:
        return None
    return here.peak("fp32" if dtype == torch.float32 else "bf16")


def reached(what: str, ours: Side, theirs: Side, bound: float) -> bool:
    """Print the ratio of two sides' rates; whether it is at least `bound`."""
    ratio = ours.rate / theirs.rate
    good = ratio >= bound
    print(f"{'ok  ' if good else 'BAD '} {what}: {ratio:.2f} times as fast ({bound:.3g} wanted)")
    return good


def write_photos(folder: Path, count: int, size: int) -> list[Path]:
    """JPEG files of `size` pixels: the model's own resolution, so as little to decode as can be."""
    random = np.random.default_rng(0)
    paths = [folder / f"{number:03}.jpg" for number in range(count)]
    for path in paths:
        coarse = Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)
    return paths


def build_sd15(folder: Path) -> Path:
    """Stable Diffusion v1.5's architecture with random weights, fp32, some 4 GB."""
    return build_text_to_image(
        folder, unet_config=SD15_UNET, text_config=SD15_TEXT, vae_config=SD_VAE
    )
