"""LoRA on a text-to-image model: put on its attention to be trained, and saved."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners import lora
from safetensors.torch import load_file

LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers names it
# Attention alone, as in the paper's recipe: the four projections of every attention layer.
UNET_LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


class LoraLinear(lora.Linear):
    """PEFT's LoRA layer of one adapter without dropout and alpha = rank, in fewer passes.

    PEFT raises the input to fp32, from which autocast lowers it again, multiplies by a scale that
    is 1, and adds; here the sum is part of the second product. That is 6 % of the miniature's step.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """W x + B A x, for x of shape (..., in)."""
        (name,) = self.active_adapters
        base = self.base_layer(x)
        down = self.lora_A[name](x).flatten(0, -2)
        return torch.addmm(base.flatten(0, -2), down, self.lora_B[name].weight.T).view_as(base)


def add_lora(pipeline: StableDiffusionPipeline, rank: int, seed: int) -> list[torch.nn.Parameter]:
    """Put LoRA of `rank` on the attention of UNet and text encoder; returns what is to be trained.

    alpha = rank, so that the file needs no adapter metadata: diffusers infers the rank and takes it
    for alpha, and the file's bytes do not depend on the process that wrote it.
    """
    parameters = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for model, targets in (
            (pipeline.unet, UNET_LORA_TARGETS),
            (pipeline.text_encoder, TEXT_LORA_TARGETS),
        ):
            config = LoraConfig(
                r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets
            )
            config._register_custom_module({torch.nn.Linear: LoraLinear})
            model.add_adapter(config)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in trained:
                parameter.data = parameter.data.float()
            parameters += trained
    return parameters


def check_lora(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Raise ValueError where the LoRA in `folder` is not what `save_lora` writes of this model.

    diffusers would leave out what is missing or surplus. Raises what safetensors raises, too.
    """
    expected = {
        f"{part}.{name}.{form}.{side}.weight": module
        for part, targets, form in (
            ("unet", UNET_LORA_TARGETS, "lora"),
            ("text_encoder", TEXT_LORA_TARGETS, "lora_linear_layer"),
        )
        for name, module in getattr(pipeline, part).named_modules()
        if isinstance(module, torch.nn.Linear)
        and name.endswith(tuple(f".{target}" for target in targets))
        for side in ("down", "up")
    }
    weights = load_file(folder / LORA_FILE)
    for key in sorted(expected.keys() ^ weights.keys()):
        raise ValueError(f"{key} is {'missing' if key in expected else 'not of this model'}")
    for key, weight in weights.items():
        rank, module = weights[key.replace(".up.", ".down.")].shape[0], expected[key]
        down, up = (rank, module.in_features), (module.out_features, rank)
        if weight.shape != (down if ".down." in key else up):
            raise ValueError(f"{key} has the shape {tuple(weight.shape)}")


def save_lora(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Save the LoRA so that stock diffusers' `pipe.load_lora_weights(folder)` loads both parts."""
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=_weights(pipeline.unet),
        text_encoder_lora_layers=_weights(pipeline.text_encoder),
    )


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    # Without the embeddings, which are not trained: or PEFT looks for the base model's on the Hub.
    return convert_state_dict_to_diffusers(
        get_peft_model_state_dict(model, save_embedding_layers=False)
    )
