"""Weights that are missing, surplus, of another shape or not finite are an error in every loader.

The libraries would leave such a weight random, or compute with it.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bob.errors import BobError
from bob.models import diffusion, sampling
from bob.models.backbones import open_backbone
from bob.models.captioner import open_captioner
from bob.models.lora import LORA_FILE, add_lora, save_lora
from tests.builders import build_captioner, build_clip, build_text_to_image

CPU = torch.device("cpu")


def caption(folder):
    captioner = open_captioner(folder, precision="fp32", batch_size=1, image_side=64)
    captioner.answer([Image.new("RGB", (56, 56))], "what is it?")


def load_base(folder):
    diffusion.load(folder, CPU)


def features(folder):
    open_backbone(folder).features()


def build_timm(folder):
    model = timm.create_model("test_resnet", num_classes=3)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


LOADERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], None], str]] = {
    "captioner": (build_captioner, caption, "."),
    "unet": (build_text_to_image, load_base, "unet"),
    "text_encoder": (build_text_to_image, load_base, "text_encoder"),
    "vae": (build_text_to_image, load_base, "vae"),
    "clip": (build_clip, features, "."),
    "timm": (build_timm, features, "."),
}


def without(weights, name):
    del weights[name]


def with_another(weights, name):
    weights["another.weight"] = torch.zeros(2)


def of_another_shape(weights, name):
    weights[name] = torch.zeros(2, 3)


def with_a_nan(weights, name):
    weights[name].view(-1)[0] = torch.nan


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of each loader's model, whole."""
    root = tmp_path_factory.mktemp("models")
    return {name: build(root / name) for name, (build, _, _) in LOADERS.items()}


@pytest.mark.parametrize("break_", [without, with_another, of_another_shape, with_a_nan])
@pytest.mark.parametrize("name", LOADERS)
def test_what_is_broken_is_one_line_that_names_the_folder(models, tmp_path, name, break_):
    _, load, part = LOADERS[name]
    folder = tmp_path / "model"
    shutil.copytree(models[name], folder)
    load(folder)
    path = min((folder / part).glob("*.safetensors"))  # a captioner's are in several files
    weights = load_file(path)
    # Not the last: it may be a head, which a backbone gets anew.
    break_(weights, min(key for key, weight in weights.items() if weight.ndim > 1))
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(BobError) as caught:
        load(folder)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    assert break_ is not with_another or "another.weight" in message


@pytest.mark.parametrize("name", LOADERS)
def test_a_file_that_is_cut_off_is_one_line_that_names_the_folder(models, tmp_path, name):
    _, load, part = LOADERS[name]
    folder = tmp_path / "model"
    shutil.copytree(models[name], folder)
    path = min((folder / part).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BobError) as caught:
        load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_lora_that_is_not_finite_makes_no_black_images(models, tmp_path):
    pipeline = diffusion.load(models["unet"], CPU)
    add_lora(pipeline, rank=2, seed=0)
    save_lora(pipeline, tmp_path)
    sampling.load(models["unet"], tmp_path)
    weights = load_file(tmp_path / LORA_FILE)
    next(iter(weights.values())).fill_(torch.nan)
    save_file(weights, tmp_path / LORA_FILE)
    with pytest.raises(BobError, match=r"holds a NaN or an infinity; lower finetune.learning_rate"):
        sampling.load(models["unet"], tmp_path)


def test_peft_warns_of_nothing_when_a_lora_is_saved(models, tmp_path, recwarn):
    pipeline = diffusion.load(models["unet"], CPU)
    add_lora(pipeline, rank=2, seed=0)
    save_lora(pipeline, tmp_path)
    assert not [one for one in recwarn if "peft" in one.filename]


@pytest.mark.parametrize("break_", [without, with_another, of_another_shape])
def test_a_lora_of_another_model_is_told(models, tmp_path, break_):
    pipeline = diffusion.load(models["unet"], CPU)
    add_lora(pipeline, rank=2, seed=0)
    save_lora(pipeline, tmp_path)
    weights = load_file(tmp_path / LORA_FILE)
    name = min(weights)
    break_(weights, name)
    save_file(weights, tmp_path / LORA_FILE)
    with pytest.raises(BobError) as caught:
        sampling.load(models["unet"], tmp_path)
    assert str(caught.value).startswith(f"{tmp_path} is no LoRA of {models['unet']} (")
    assert (name if break_ is not with_another else "another.weight") in str(caught.value)


@pytest.mark.parametrize("kind", ["timm", "clip"])
@pytest.mark.parametrize("std", [[0.2, 0, 0.2], [0.2, -1, 0.2], [0.2], "x"])
def test_a_backbone_whose_preprocessing_divides_by_nothing_is_told(models, tmp_path, kind, std):
    """Not: lower the learning rate, as the loss would be no number."""
    folder = tmp_path / "model"
    shutil.copytree(models[kind], folder)
    path = folder / ("config.json" if kind == "timm" else "preprocessor_config.json")
    config = json.loads(path.read_text())
    config.get("pretrained_cfg", config)["std" if kind == "timm" else "image_std"] = std
    path.write_text(json.dumps(config))
    with pytest.raises(BobError) as caught:
        _ = open_backbone(folder).preprocessing
    assert str(caught.value).startswith(f"{folder} cannot be loaded as a ")


def test_a_buffer_that_is_not_finite_is_told(models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models["timm"], folder)
    weights = load_file(folder / "model.safetensors")
    weights[min(name for name in weights if name.endswith("running_mean"))][0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BobError, match="running_mean holds a NaN or an infinity"):
        features(folder)
