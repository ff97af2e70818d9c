"""Generation's images a second, against calling the pipeline once for each image or each batch.

The former is what the published scripts do: a `StableDiffusionPipeline` with the LoRA loaded beside
its weights, one prompt a call, each image made a PNG file. Compared at equal steps and precision,
and as both come: ours with as many steps of DPM-Solver++ as `params.yaml` has, theirs with 50 of
PNDM, the models' own. With as many prompts in each of its calls, the pipeline too is almost nothing
but the UNet's products. No prompt is asked for twice, as with the paper's banks of contexts.

On the miniature and the CPU; `--sd15` builds Stable Diffusion v1.5 at 512 px with random weights,
for a GPU. Exits with status 1 where it is less than EQUAL times as fast as one call an image, or
BATCHED times as one call a batch; with other steps, as many times more as the UNet is asked less.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.speed import build_sd15, reached, report, side, take_turns
from bob.formats.params import PARAMS, read_yaml
from bob.models import diffusion
from bob.models.device import computing_device
from bob.models.lora import add_lora, save_lora
from bob.models.precision import dtype_name, resolve_precision
from bob.models.sampling import SAMPLERS, ImageMaker, png

EQUAL, BATCHED = 2.0, 1.0
GUIDANCE = 2.0


def prompts() -> Iterator[str]:
    """A new one each time."""
    for number in count():
        yield f"a aircraft photo of a variant {number % 8} in the sky {number} background"


def build_lora(base: Path, folder: Path) -> Path:
    """A LoRA of rank 16 on UNet and text encoder, as finetune writes it."""
    pipeline = diffusion.load(base, torch.device("cpu"))
    add_lora(pipeline, 16, 0)
    save_lora(pipeline, folder)
    return folder


def plain(
    base: Path, lora: Path, dtype: torch.dtype, sampler: str, steps: int, batch: int, calls: int
) -> Callable[[], int]:
    """`calls` of the pipeline for `batch` images each."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        base, dtype=dtype, safety_checker=None, local_files_only=True
    ).to(computing_device())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(lora))
    pipeline.scheduler = SAMPLERS[sampler](pipeline.scheduler.config)
    asked = prompts()

    def run() -> int:
        for _ in range(calls):
            images = pipeline(
                list(islice(asked, batch)),
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(batch)],
            ).images
            for image in images:
                png(image)
        return calls * batch

    return run


def ours(
    base: Path,
    lora: Path,
    dtype: torch.dtype,
    sampler: str,
    steps: int,
    batch: int,
    batches: int,
    *,
    compiled: bool,
) -> Callable[[], int]:
    """Full batches as the stage makes them: files are written while the next one is made."""
    maker = ImageMaker(
        base,
        lora,
        sampler=sampler,
        steps=steps,
        guidance_scale=GUIDANCE,
        precision=dtype_name(dtype),
        batch_size=batch,
        compile=compiled,
    )
    asked = prompts()

    def run() -> int:
        with ThreadPoolExecutor() as pool:
            for _ in range(batches):
                for image in maker.make(list(islice(asked, batch)), range(batch)):
                    pool.submit(png, image)
        return batches * batch

    return run


def flops_of_step(base: Path) -> float:
    """FLOPs of one step of one image: the UNet twice, for guidance."""
    unet = diffusion.load(base, computing_device()).unet
    latents = torch.randn(
        2, unet.config.in_channels, *[unet.config.sample_size] * 2, device=unet.device
    )
    text = torch.randn(2, 77, unet.config.cross_attention_dim, device=unet.device)
    # The fused kernels of a CPU are not counted; those that they stand for are.
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        unet(latents, 0, text)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sd15", action="store_true", help="Stable Diffusion v1.5, on a GPU")
    parser.add_argument("--base", type=Path, default=Path("models/miniature-base"))
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--batches", type=int, default=2, help="a turn")
    parser.add_argument("--calls", type=int, default=4, help="of one image, a turn")
    own = read_yaml(PARAMS)["generate"]["steps"]
    parser.add_argument("--steps", type=int, default=own, help="ours, and of equal steps")
    parser.add_argument("--default-steps", type=int, default=50, help="of the plain pipeline")
    parser.add_argument("--compile", action="store_true", help="ours with generate.compile")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, help="of the device, dense, in that precision")
    arguments = parser.parse_args()
    steps, default_steps = arguments.steps, arguments.default_steps
    dtype = resolve_precision(arguments.precision)
    with tempfile.TemporaryDirectory() as scratch:
        base = build_sd15(Path(scratch) / "sd15") if arguments.sd15 else arguments.base
        lora = build_lora(base, Path(scratch) / "lora")
        model = (base, lora, dtype)
        one, full = (1, arguments.calls), (arguments.batch, arguments.batches)
        sides = [
            side(
                f"bob, {steps} steps, batch {arguments.batch}"
                + (", compiled" if arguments.compile else ""),
                lambda: ours(*model, "dpmsolver++", steps, *full, compiled=arguments.compile),
            ),
            side(
                f"one call an image, {steps} steps",
                lambda: plain(*model, "dpmsolver++", steps, *one),
            ),
            side(
                f"one call a batch, {steps} steps",
                lambda: plain(*model, "dpmsolver++", steps, *full),
            ),
            side(
                f"one call an image, {default_steps} steps of PNDM",
                lambda: plain(*model, "pndm", default_steps, *one),
            ),
            side(
                f"one call a batch, {default_steps} steps of PNDM",
                lambda: plain(*model, "pndm", default_steps, *full),
            ),
        ]
        take_turns(sides, arguments.repeats)
        flops = flops_of_step(base)
        # PNDM computes its second step twice.
        evaluations = [steps, steps, steps, default_steps + 1, default_steps + 1]
        report(sides, [flops * each for each in evaluations], dtype, arguments.peak_tflops)
    mine, *others = sides
    fewer = evaluations[-1] / steps
    wanted = {
        "equal steps": EQUAL,
        "equal steps and batch": BATCHED,
        "each with its own sampler": EQUAL * fewer,
        "each with its own sampler, equal batch": BATCHED * fewer,
    }
    # All of them, also after one that is missed.
    good = [
        reached(what, mine, other, bound)
        for (what, bound), other in zip(wanted.items(), others, strict=True)
    ]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
