"""What `bench.arms` makes images with: bob's maker, and samplers that bob does not have."""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UniPCMultistepScheduler
from diffusers.schedulers import AysSchedules

from bob.cache.recipe import bare, item_key
from bob.models.sampling import ImageMaker

SOLVERS: Mapping[str, Callable[..., Any]] = {
    "dpmsolver++": lambda config, **spacing: DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="dpmsolver++", solver_order=2, **spacing
    ),
    "unipc": UniPCMultistepScheduler.from_config,
    "ays": lambda config: AlignYourSteps.from_config(config, algorithm_type="dpmsolver++"),
}
"""The first two can have Karras' noise levels (arXiv 2206.00364, eq. 5)."""


class AlignYourSteps(DPMSolverMultistepScheduler):
    """The ten timesteps found best for Stable Diffusion 1.5 (arXiv 2404.14507).

    For other numbers of steps, timesteps are interpolated between these.
    """

    def set_timesteps(
        self, num_inference_steps: int = 10, device: str | torch.device | None = None, **_: Any
    ) -> None:
        found = AysSchedules["StableDiffusionTimesteps"]
        places = np.linspace(0, len(found) - 1, num_inference_steps)
        timesteps = np.interp(places, range(len(found)), found).round().astype(int).tolist()
        super().set_timesteps(device=device, timesteps=timesteps)


class MiddleGuided(StableDiffusionPipeline):
    """Guidance only where the noise level is within `interval` (arXiv 2404.07724).

    The level is sigma = sqrt((1 - a) / a) for a signal's share a; both ends of the interval belong
    to it. Elsewhere the UNet is asked once for an image, without the empty prompt.
    """

    interval = (0.0, math.inf)

    def __call__(
        self,
        *,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor,
        guidance_scale: float,
        **options: Any,
    ) -> Any:
        both = torch.cat([negative_prompt_embeds, prompt_embeds])

        def before_step(number: int) -> torch.Tensor:
            guided = number < len(self.guided) and self.guided[number]
            self._guidance_scale = guidance_scale if guided else 1.0
            return both if guided else prompt_embeds

        def callback(_: Any, number: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            return tensors | {"prompt_embeds": before_step(number + 1)}

        self.scheduler.set_timesteps(options["num_inference_steps"])
        # The first step has the highest level of all; if that is guided, so the call begins.
        first = self.guided[0]
        return super().__call__(
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds if first else None,
            guidance_scale=guidance_scale if first else 1.0,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
            **options,
        )

    @property
    def guided(self) -> list[bool]:
        """Of each step of the scheduler, whether it has guidance."""
        signal = self.scheduler.alphas_cumprod[self.scheduler.timesteps.cpu().long()]
        low, high = self.interval
        return [low <= level <= high for level in ((1 - signal) / signal).sqrt().tolist()]


class ArmMaker(ImageMaker):
    """A maker of images by another solver, other noise levels, or guidance in an interval."""

    def __init__(
        self,
        base_model: Path,
        lora: Path,
        *,
        solver: str,
        spacing: str,
        interval: tuple[float, float],
        **settings: Any,
    ) -> None:
        super().__init__(base_model, lora, **settings)
        self._solver, self._spacing, self._interval = solver, spacing, interval

    @property
    def settings(self) -> dict[str, object]:
        """What decides an image; bob's own where there is nothing else to it."""
        own: dict[str, object] = {}
        if self._solver:
            own["solver"] = self._solver
        if self._spacing:
            own["spacing"] = self._spacing
        if self._guides_in_part:
            own["interval"] = [str(end) for end in self._interval]  # JSON has no infinity
        if own:
            own["arms"] = item_key(code=bare(Path(__file__).read_text("utf-8")))
        return super().settings | own

    @property
    def _guides_in_part(self) -> bool:
        return self._interval != (0.0, math.inf)

    @cached_property
    def _pipeline(self) -> StableDiffusionPipeline:
        pipeline = super()._pipeline
        if self._solver or self._spacing:
            levels = {"use_karras_sigmas": True} if self._spacing == "karras" else {}
            solver = SOLVERS[self._solver or self._sampler]
            pipeline.scheduler = solver(pipeline.scheduler.config, **levels)
        if self._guides_in_part:
            pipeline = MiddleGuided(**pipeline.components, requires_safety_checker=False)
            pipeline.set_progress_bar_config(disable=True)
            pipeline.interval = self._interval
        return pipeline

    @property
    def evaluations(self) -> int:
        """How often the UNet is asked for one image; an even pair of prompts counts as two."""
        if not self._guides_in_part:
            return self._steps * (2 if self._guidance_scale > 1 else 1)
        self._pipeline.scheduler.set_timesteps(self._steps)
        return self._steps + sum(self._pipeline.guided)
