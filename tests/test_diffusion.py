"""The text-to-image side on a small random Stable Diffusion."""

import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft.tuners import lora
from PIL import Image
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import CLIPTextConfig, CLIPTextModel

from bob.errors import BobError
from bob.formats.photos import Photo
from bob.models import denoising, diffusion, finetuning, sampling
from bob.models.device import autocast
from bob.models.lora import UNET_LORA_TARGETS, LoraLinear, add_lora, save_lora
from bob.models.precision import hardware_here
from bob.stages import finetune
from tests.builders import (
    ONE_BLOCK,
    SD15_TEXT,
    SD15_UNET,
    SD21_TEXT,
    SD21_UNET,
    TINY_TEXT,
    TINY_UNET,
    build_text_to_image,
)

CPU = torch.device("cpu")
FP32 = torch.float32


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_text_to_image(tmp_path_factory.mktemp("models") / "base")


def settings(**changed):
    values = {
        "seed": 0,
        "batch_size": 2,
        "gradient_accumulation": 1,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "epochs": 3,
    }
    return types.SimpleNamespace(**values | changed)


def photos(count=3):
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (30, 40, 3), np.uint8)) for _ in range(count)]


def fine_tune(base, folder, dtype=FP32, rank=4, compiled=False, **changed):
    pipeline = diffusion.load(base, CPU)
    means, stds = denoising.encode_images(pipeline, photos())
    tokens = diffusion.tokenize(pipeline, ["a bird photo of a wren", "a wren", "a tit"])
    diffusion.cast(pipeline.unet, dtype, CPU)
    diffusion.cast(pipeline.text_encoder, dtype, CPU)
    parameters = add_lora(pipeline, rank, 0)
    losses = denoising.train(
        pipeline, parameters, means, stds, tokens, settings(**changed), dtype, compiled=compiled
    )
    finetune.write_curves(folder / "curves", losses)
    save_lora(pipeline, folder / "lora")
    return pipeline


def trained_weights(base, folder, **changed):
    fine_tune(base, folder, **changed)
    return load_file(folder / "lora/pytorch_lora_weights.safetensors")


def apart(one, other):
    """The greatest of the mean differences of two sets of weights."""
    return max((one[name] - other[name]).abs().mean() for name in one)


def render(pipeline, count=2, prompt="a bird photo of a wren", steps=3, seeds=None):
    embeddings = sampling.encode_prompts(pipeline, ["", prompt])
    return sampling.sample(
        pipeline,
        torch.stack([embeddings[prompt]] * count),
        embeddings[""],
        seeds or list(range(count)),
        steps=steps,
        guidance_scale=2.0,
        dtype=FP32,
    )


def difference(a, b):
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).max()


def test_stock_diffusers_loads_both_parts_of_the_lora(base, tmp_path):
    trained = fine_tune(base, tmp_path).to(CPU)
    stock = StableDiffusionPipeline.from_pretrained(base, dtype=FP32)
    stock.set_progress_bar_config(disable=True)

    def image(pipeline):
        pipeline.unet.eval()
        pipeline.text_encoder.eval()
        random = torch.Generator().manual_seed(1)
        call = pipeline("a bird photo of a wren", num_inference_steps=3, generator=random)
        return call.images[0]

    untouched = image(stock)
    stock.load_lora_weights(str(tmp_path / "lora"))
    assert {"unet", "text_encoder"} == set(stock.get_list_adapters())
    assert difference(image(stock), untouched) > 2
    assert difference(image(stock), image(trained)) <= 1
    # And our own way, fused into the weights, is the same model.
    fused = sampling.load(base, tmp_path / "lora")
    assert difference(image(fused), image(stock)) <= 1


def test_the_text_encoder_is_trained_as_well(base, tmp_path):
    fine_tune(base, tmp_path)
    before, after = (
        sampling.encode_prompts(pipeline, ["a wren"])["a wren"]
        for pipeline in (
            diffusion.load(base, CPU),
            sampling.load(base, tmp_path / "lora"),
        )
    )
    assert (before - after).abs().max() > 1e-3


def test_lora_is_on_every_attention_projection_and_nothing_else(base):
    pipeline = diffusion.load(base, CPU)
    diffusion.cast(pipeline.unet, torch.bfloat16, CPU)
    diffusion.cast(pipeline.text_encoder, torch.bfloat16, CPU)
    parameters = add_lora(pipeline, 4, 0)
    attention_layers = sum(
        name.endswith(("attn1", "attn2")) for name, _ in pipeline.unet.named_modules()
    )
    text_layers = pipeline.text_encoder.config.num_hidden_layers
    assert attention_layers
    assert len(parameters) == 2 * 4 * (attention_layers + text_layers)
    assert all(parameter.dtype == FP32 for parameter in parameters)


def test_zero_epochs_write_an_adapter_that_changes_nothing(base, tmp_path):
    fine_tune(base, tmp_path, epochs=0)
    plain = render(diffusion.load(base, CPU))[0]
    adapted = render(sampling.load(base, tmp_path / "lora"))[0]
    assert difference(plain, adapted) == 0


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_training_writes_the_same_bytes_twice(base, tmp_path, dtype):
    contents = []
    for name in ("one", "two"):
        fine_tune(base, tmp_path / name, dtype=dtype, epochs=1)
        contents.append((tmp_path / name / "lora/pytorch_lora_weights.safetensors").read_bytes())
    assert contents[0] == contents[1]


def test_a_lora_trained_in_bf16_is_kept_in_fp32(base, tmp_path):
    weights = trained_weights(base, tmp_path, dtype=torch.bfloat16, epochs=1)
    assert {tensor.dtype for tensor in weights.values()} == {FP32}
    assert any((tensor != tensor.bfloat16()).any() for tensor in weights.values())


def test_steps_are_adamws_with_clipped_gradients_at_a_rate_that_warms_up_and_falls(base, request):
    """The published recipe: betas, weight decay and clipping, linear warm-up and half a cosine."""
    pipeline = diffusion.load(base, CPU)
    means, stds = denoising.encode_images(pipeline, photos(4))
    tokens = diffusion.tokenize(pipeline, ["a wren"] * 4)
    parameters = add_lora(pipeline, 4, 0)
    for parameter in parameters:  # so that a gradient is long enough to be clipped
        parameter.data *= 30
    steps, raw = [], []

    def see(optimizer, *_):
        (group,) = optimizer.param_groups
        norm = torch.nn.utils.get_total_norm([p.grad for p in group["params"]])
        steps.append((optimizer, dict(group), float(norm)))

    request.addfinalizer(register_optimizer_step_pre_hook(see).remove)
    # Of every parameter, before it is clipped.
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: raw.append(float(p.grad.norm())))
    given = settings(warmup_steps=3, epochs=5, learning_rate=1e-3)
    denoising.train(pipeline, parameters, means, stds, tokens, given, FP32)
    assert len(steps) == 10
    assert all(type(optimizer) is torch.optim.AdamW for optimizer, *_ in steps)
    assert all(len(group["params"]) == len(parameters) for _, group, _ in steps)
    assert {(group["betas"], group["weight_decay"]) for _, group, _ in steps} == {
        ((0.9, 0.999), 1e-2)
    }
    rates = [group["lr"] for _, group, _ in steps]
    risen = [1e-3 * step / 3 for step in range(3)]
    falling = [1e-3 * (1 + math.cos(math.pi * step / 7)) / 2 for step in range(7)]
    assert rates == pytest.approx(risen + falling)
    assert max(raw) > 1, "nothing to clip: the test says nothing"
    assert max(norm for *_, norm in steps) == pytest.approx(1, abs=1e-4)


def test_accumulated_parts_make_the_step_of_the_whole_batch(base, tmp_path):
    # Small steps, for AdamW's first are of one size and turn rounding of a zero into a sign.
    whole, parts, other = (
        trained_weights(base, tmp_path / name, batch_size=4, learning_rate=1e-4, **changed)
        for name, changed in {
            "whole": {},
            "parts": {"gradient_accumulation": 2},
            "other": {"seed": 1},
        }.items()
    )
    assert apart(whole, parts) < 1e-5 < 1e-4 < apart(whole, other)


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_gradient_checkpointing_changes_no_bit(base, tmp_path, dtype):
    plain, saving = (
        trained_weights(base, tmp_path / str(on), dtype=dtype, gradient_checkpointing=on)
        for on in (False, True)
    )
    assert all(torch.equal(plain[name], saving[name]) for name in plain)


def test_gradient_checkpointing_reaches_both_models(base, tmp_path):
    pipeline = fine_tune(base, tmp_path, epochs=1, gradient_checkpointing=True)
    assert pipeline.unet.is_gradient_checkpointing
    assert pipeline.text_encoder.is_gradient_checkpointing


@pytest.mark.slow
@pytest.mark.skipif(not hardware_here().compiles, reason="torch.compile needs a C++ compiler")
def test_compiled_training_comes_to_the_same_weights_but_for_rounding(tmp_path):
    base = build_text_to_image(tmp_path / "base", unet_config=TINY_UNET | ONE_BLOCK)
    # With all that shares the step with it.
    given = {"learning_rate": 1e-4, "gradient_accumulation": 2, "gradient_checkpointing": True}
    compiled = trained_weights(base, tmp_path / "compiled", compiled=True, **given)
    plain = trained_weights(base, tmp_path / "plain", **given)
    other = trained_weights(base, tmp_path / "other", seed=1, **given)
    assert apart(plain, compiled) < 1e-5 < 1e-4 < apart(plain, other)


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_our_lora_layer_computes_what_pefts_does(base, dtype):
    pipeline = diffusion.load(base, CPU)
    diffusion.cast(pipeline.unet, dtype, CPU)
    for parameter in add_lora(pipeline, 4, 0):
        torch.nn.init.normal_(parameter, std=0.1)
    layer = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    assert isinstance(layer, LoraLinear)
    x = torch.randn(2, 5, 32)
    with autocast(CPU, dtype):
        ours, theirs = layer(x), lora.Linear.forward(layer, x)
        without = layer.base_layer(x)
    tolerance = 1e-5 if dtype == FP32 else 3e-2
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    assert (ours - without).abs().max() > 10 * tolerance


def test_fine_tuning_lowers_the_loss(base, tmp_path):
    fine_tune(base, tmp_path, epochs=60, batch_size=4)
    rows = (tmp_path / "curves/plots/metrics/loss.tsv").read_text().splitlines()[1:]
    losses = [float(row.split("\t")[1]) for row in rows]
    assert len(losses) == 60
    assert np.mean(losses[-15:]) < np.mean(losses[:15])


def test_divergence_is_told_in_one_line(base, tmp_path):
    with pytest.raises(BobError, match=r"diverged.*finetune\.learning_rate"):
        fine_tune(base, tmp_path, learning_rate=float("inf"))


def test_latents_have_the_models_resolution_and_scale(base):
    pipeline = diffusion.load(base, CPU)
    assert diffusion.resolution(pipeline) == 16
    mean, std = denoising.encode_images(pipeline, photos(2))
    assert mean.shape == std.shape == (2, 4, 8, 8)
    assert std.min() > 0
    square = pipeline.image_processor.preprocess(photos(1), 16, 16, resize_mode="crop")
    expected = pipeline.vae.encode(square).latent_dist.mean * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(mean[:1], expected, atol=1e-5, rtol=1e-4)


def test_target_of_v_prediction_is_that_of_the_paper():
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    timestep = torch.tensor([10, 900])
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    share = scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
    target = denoising.prediction_target(scheduler, latents, noise, timestep)
    torch.testing.assert_close(target, share.sqrt() * noise - (1 - share).sqrt() * latents)

    epsilon = DDPMScheduler(prediction_type="epsilon")
    assert denoising.prediction_target(epsilon, latents, noise, timestep) is noise
    with pytest.raises(BobError, match="sample"):
        denoising.prediction_target(
            DDPMScheduler(prediction_type="sample"), latents, noise, timestep
        )


def test_a_v_prediction_base_trains_and_samples(tmp_path):
    base = build_text_to_image(tmp_path / "base", "v_prediction")
    fine_tune(base, tmp_path, epochs=1)
    pipeline = sampling.load(base, tmp_path / "lora")
    for sampler in sampling.SAMPLERS.values():
        pipeline.scheduler = sampler(pipeline.scheduler.config)
        assert pipeline.scheduler.config.prediction_type == "v_prediction"
        assert render(pipeline)[0].size == (16, 16)


SD21_LIKE_UNET = TINY_UNET | {
    "cross_attention_dim": 48,
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
}
SD21_LIKE_TEXT = TINY_TEXT | {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "hidden_act": "gelu",
    "projection_dim": 16,
}


def test_the_classes_of_stable_diffusion_2_train_and_sample(tmp_path):
    base = build_text_to_image(
        tmp_path / "base", unet_config=SD21_LIKE_UNET, text_config=SD21_LIKE_TEXT
    )
    plain = render(diffusion.load(base, CPU), 1)[0]
    fine_tune(base, tmp_path, epochs=1, gradient_checkpointing=True)
    assert difference(render(sampling.load(base, tmp_path / "lora"), 1)[0], plain) > 0


@pytest.mark.parametrize(
    ("unet_config", "text_config", "unet_size", "unet_lora", "text_lora"),
    [
        (SD15_UNET, SD15_TEXT, 859_520_964, 3_188_736, 12 * 4 * 2 * 16 * 768),
        (SD21_UNET, SD21_TEXT, 865_910_724, 3_319_808, 23 * 4 * 2 * 16 * 1024),
    ],
    ids=["v1.5", "v2.1-base"],
)
def test_lora_at_full_size_is_that_of_the_papers_recipe(
    unet_config, text_config, unet_size, unet_lora, text_lora
):
    """Shapes alone: on the meta device there are no weights."""
    with torch.device("meta"):
        models = types.SimpleNamespace(
            unet=UNet2DConditionModel(**unet_config),
            text_encoder=CLIPTextModel(CLIPTextConfig(**text_config)),
        )
        for model in (models.unet, models.text_encoder):
            model.requires_grad_(False)
        assert models.unet.num_parameters() == unet_size
        parameters = add_lora(models, 16, 0)
    assert sum(parameter.numel() for parameter in parameters) == unet_lora + text_lora
    adapted = [name for name, part in models.unet.named_modules() if hasattr(part, "lora_A")]
    assert len(adapted) == 16 * 2 * 4
    assert {name.split(".attn")[1][2:] for name in adapted} == set(UNET_LORA_TARGETS)


def sizes_given_to(network, method, monkeypatch):
    """A list that grows with each batch's size."""
    sizes: list[int] = []
    original = getattr(network, method)

    def counted(batch):
        sizes.append(len(batch))
        return original(batch)

    monkeypatch.setattr(network, method, counted)
    return sizes


def test_large_images_are_decoded_in_equal_parts_to_the_same_pixels(base, monkeypatch):
    pipeline = diffusion.load(base, CPU)
    together = render(pipeline, 6)
    sizes = sizes_given_to(pipeline.vae, "decode", monkeypatch)
    monkeypatch.setattr(diffusion, "AUTOENCODED_PIXELS", 4 * 16**2)
    assert all(difference(*pair) <= 1 for pair in zip(together, render(pipeline, 6), strict=True))
    assert sizes == [3, 3]


def test_large_photos_are_encoded_one_by_one(base, monkeypatch, tmp_path):
    pipeline = diffusion.load(base, CPU)
    kept = []
    for number in range(9):
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
        kept.append(Photo(str(tmp_path / f"{number}.png"), "wren", ""))
    together, _ = finetuning.encode_photos(pipeline, kept)
    sizes = sizes_given_to(pipeline.vae, "encode", monkeypatch)
    assert torch.equal(finetuning.encode_photos(pipeline, kept)[0], together)
    assert sizes == [8, 1]
    monkeypatch.setattr(diffusion, "AUTOENCODED_PIXELS", 16**2)
    assert torch.allclose(finetuning.encode_photos(pipeline, kept)[0], together, atol=1e-5)
    assert sizes == [8, 1] + [1] * 9


def test_an_image_does_not_depend_on_its_place_or_its_neighbours(base):
    pipeline = diffusion.load(base, CPU)
    first = render(pipeline, 3, seeds=[5, 6, 7])
    second = render(pipeline, 3, seeds=[8, 9, 5])
    assert first[0].tobytes() == second[2].tobytes()
    assert first[0].tobytes() != first[1].tobytes()


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_every_sampler_comes_to_the_same_image(base, sampler):
    """All solve the same differential equation, so with many steps they agree."""
    pipeline = diffusion.load(base, CPU)
    pipeline.scheduler = sampling.SAMPLERS["ddim"](pipeline.scheduler.config)
    reference = render(pipeline, 1, steps=200)[0]
    pipeline.scheduler = sampling.SAMPLERS[sampler](pipeline.scheduler.config)
    image = render(pipeline, 1, steps=100)[0]
    gap = np.abs(np.asarray(image, float) - np.asarray(reference, float)).mean()
    assert gap < 8, gap


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "holds no text-to-image model"),
        ({"model_index.json": '{"_class_name": "StableDiffusionXLPipeline"}'}, "XLPipeline"),
        ({"model_index.json": '{"_class_name": "StableDiffusionPipeline"}'}, "does not load"),
    ],
)
def test_a_folder_that_is_no_stable_diffusion_is_told_in_one_line(tmp_path, files, told):
    folder = Path(tmp_path / "base")
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(BobError, match=told) as caught:
        diffusion.load(folder, CPU)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
