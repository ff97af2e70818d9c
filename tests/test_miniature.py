"""The miniature's models: what is committed, and that the command which trains them works."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from torch import nn

from bob.errors import BobError
from bob.formats.prompts import Context, prompt
from bob.miniature import build, measures, training, world
from bob.miniature.corpus import Pictures, draw_pictures, load_corpus
from bob.miniature.measures import answer
from bob.miniature.recipes import SCALES, Recipe
from bob.models.precision import hardware_here

MODELS = Path(__file__).parents[1] / "models"
BASE, CAPTIONER, BACKBONE = (
    MODELS / f"miniature-{part}" for part in ("base", "captioner", "backbone")
)
PER_CLASS = len(world.CONTEXTS)


def task_pictures() -> Pictures:
    """Variants that no model was trained on, each once in every context."""
    return draw_pictures(world.TASK, range(1))


# --- what is committed


def test_all_models_together_take_twenty_megabytes_at_most():
    files = [path for path in MODELS.rglob("*") if path.is_file() and "miniature" in str(path)]
    assert sum(path.stat().st_size for path in files) <= 20_000_000


@pytest.mark.parametrize("folder", [BASE, CAPTIONER, BACKBONE], ids=lambda folder: folder.name)
def test_weights_are_safetensors_in_half_precision_with_a_card(folder):
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt")]
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            kinds = {weights.get_tensor(key).dtype for key in weights.keys()}  # noqa: SIM118
        assert kinds <= {torch.float16, torch.int64}
    assert "task classes are not among them" in (folder / "README.md").read_text("utf-8")


def test_stock_diffusers_loads_the_base_and_generates_the_same_image_twice():
    pipeline = StableDiffusionPipeline.from_pretrained(BASE)
    pipeline.set_progress_bar_config(disable=True)
    text = prompt("aircraft", "Heron 900", Context("ocean", "level facing left"))

    def generate(seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        image = pipeline(text, num_inference_steps=3, generator=generator).images[0]
        return np.asarray(image)

    assert generate(0).shape == (64, 64, 3)
    assert (generate(0) == generate(0)).all()
    assert (generate(0) != generate(1)).any()


def test_the_tokenizer_encodes_any_text():
    tokenizer = StableDiffusionPipeline.from_pretrained(BASE).tokenizer
    for text in ("747-400", "zürich 漢字 🙂", "ruby-throated hummingbird"):
        ids = tokenizer(text).input_ids
        assert tokenizer.eos_token_id not in ids[1:-1]
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded.replace(" ", "") == text.replace(" ", "")


def test_the_autoencoder_keeps_what_a_picture_shows():
    pictures = task_pictures()
    pixels = pictures.tensor(slice(None))
    assert measures.psnr(measures.reconstructed(BASE, pixels), pixels) > 27


def test_latents_have_about_unit_variance():
    vae = StableDiffusionPipeline.from_pretrained(BASE).vae
    with torch.inference_mode():
        latents = vae.encode(task_pictures().tensor(slice(0, 288, 4))).latents
    assert abs((latents * vae.config.scaling_factor).std().item() - 1) < 0.1


@pytest.mark.slow
def test_generated_images_show_the_background_the_pose_and_the_class_of_their_prompt():
    wanted = measures.wanted_pictures(world.corpus_variants(), 72, index=0)
    images = measures.generate(BASE, [wanted.caption(row) for row in range(len(wanted))])
    network = timm.create_model(f"local-dir:{BACKBONE}", pretrained=True).eval()
    obeyed = measures.obedience(images, wanted, CAPTIONER, network)
    assert obeyed["background"] > 0.9
    assert obeyed["pose"] > 0.9
    assert obeyed["class"] > 0.7


def test_the_captioner_names_background_and_pose_of_variants_it_has_not_seen():
    pictures = task_pictures()
    images = [Image.fromarray(pixels) for pixels in pictures.pixels]
    backgrounds = answer(CAPTIONER, images, "background")
    poses = answer(CAPTIONER, images, "pose")
    true = zip(pictures.background, pictures.pose, strict=True)
    right = [
        (background, pose) == (world.BACKGROUNDS[b], world.POSES[p])
        for background, pose, (b, p) in zip(backgrounds, poses, true, strict=True)
    ]
    assert np.mean(right) > 0.9


def test_the_captioner_reads_photos_of_any_size_alike():
    pictures = task_pictures()
    rows = range(0, len(pictures), 7)
    images = [Image.fromarray(pictures.pixels[row]).resize((200, 200)) for row in rows]
    true = [world.BACKGROUNDS[pictures.background[row]] for row in rows]
    answers = answer(CAPTIONER, images, "background")
    assert np.mean([a == b for a, b in zip(answers, true, strict=True)]) > 0.9


def test_stock_timm_loads_the_backbone_which_knows_the_corpus():
    network = timm.create_model(f"local-dir:{BACKBONE}", pretrained=True).eval()
    assert network.pretrained_cfg["input_size"] == (3, 64, 64)
    variants = world.corpus_variants()
    assert network.num_classes == len(variants)
    fresh = draw_pictures(variants[:20], range(99, 100))
    with torch.inference_mode():
        named = network(fresh.tensor(slice(None))).argmax(1).numpy()
    assert (named == fresh.variant).mean() > 0.5


# --- the training


@pytest.mark.slow
def test_the_tiny_training_writes_three_folders_that_stock_libraries_load(tmp_path):
    out, work = tmp_path / "models", tmp_path / "work"
    build.train(out, work, "tiny")
    pipeline = StableDiffusionPipeline.from_pretrained(out / "miniature-base")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a aircraft", num_inference_steps=1).images[0].size == (64, 64)
    assert timm.create_model(f"local-dir:{out / 'miniature-backbone'}", pretrained=True)
    image = Image.new("RGB", (64, 64))
    assert len(answer(out / "miniature-captioner", [image], "pose")) == 1

    weights = sorted(out.rglob("*.safetensors"))
    before = [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights]
    build.train(out, work, "tiny")  # from finished checkpoints: nothing trains, same bytes
    assert before == [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights]

    card = out / "miniature-base/README.md"
    trainings = training.trainings_of(card.parent)
    build.train_further(out, work, "tiny")  # the UNet, and nothing else
    after = [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights]
    assert [w.parent.name for w, a, b in zip(weights, before, after, strict=True) if a != b] == [
        "unet"
    ]
    assert training.trainings_of(card.parent)[:-1] == trainings
    assert "_name_or_path" not in (card.parent / "unet/config.json").read_text("utf-8")


def test_a_training_that_was_killed_ends_as_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1)
    recipe = Recipe(steps=8, batch=4, lr=1e-2, ema=0.9, shards=2)

    def train(work: Path, killed_at: int | None = None) -> torch.Tensor:
        steps = 0

        def loss(module: nn.Module, generator: torch.Generator, count: int) -> torch.Tensor:
            nonlocal steps
            steps += 1
            if steps == killed_at:
                raise KeyboardInterrupt
            return module(torch.randn(count, 3, generator=generator)).square().mean()

        torch.manual_seed(0)
        return training.fit("line", nn.Linear(3, 1), loss, recipe, work).weight

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", killed_at=5)
    assert torch.equal(train(tmp_path / "killed"), whole)


def test_a_checkpoint_of_another_recipe_is_told(tmp_path):
    def train(recipe: Recipe, width: int = 1) -> None:
        def loss(module: nn.Module, generator: torch.Generator, count: int) -> torch.Tensor:
            return module(torch.ones(1, width)).sum()

        training.fit("line", nn.Linear(width, 1), loss, recipe, tmp_path)

    train(Recipe(steps=1, batch=1, lr=1e-2))
    for changed in ({"recipe": Recipe(steps=2, batch=1, lr=1e-2)}, {"width": 2}):
        given = {"recipe": Recipe(steps=1, batch=1, lr=1e-2)} | changed
        with pytest.raises(BobError, match=r"line\.pt is of another recipe or network; delete it"):
            train(**given)


@pytest.mark.slow
@pytest.mark.skipif(not hardware_here().compiles, reason="torch.compile needs a C++ compiler")
def test_a_compiled_training_on_two_threads_comes_to_the_same_but_for_rounding(tmp_path):
    def train(*, compile: bool) -> torch.Tensor:
        recipe = Recipe(steps=3, batch=4, lr=1e-2, shards=2, precision="fp32", compile=compile)

        def loss(module: nn.Module, generator: torch.Generator, count: int) -> torch.Tensor:
            return module(torch.randn(count, 3, generator=generator)).square().mean()

        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        return training.fit(f"line-{compile}", network, loss, recipe, tmp_path)[0].weight

    plain, compiled = train(compile=False), train(compile=True)
    assert torch.allclose(plain, compiled, atol=1e-5)


def test_no_checkpoint_is_left_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1)
    recipe = Recipe(steps=2, batch=1, lr=1e-2)

    def disk_full(value: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    def loss(module: nn.Module, generator: torch.Generator, count: int) -> torch.Tensor:
        return module(torch.ones(1, 1)).sum()

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="disk full"):
        training.fit("line", nn.Linear(1, 1), loss, recipe, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_corpus_is_drawn_once(tmp_path, monkeypatch):
    scale = SCALES["tiny"]
    first = load_corpus(scale, tmp_path)
    monkeypatch.setattr(world, "draw", None)
    again = load_corpus(scale, tmp_path)
    assert (first.pixels == again.pixels).all()
    assert len(first) == scale.variants * PER_CLASS


def test_a_training_goes_alike_in_either_memory_format(tmp_path):
    # The fused optimizer walks memory: a gradient laid out unlike its weight goes astray unseen.
    recipe = Recipe(steps=60, batch=4, lr=3e-2, warmup=1)

    def losses(layout: torch.memory_format) -> list[float]:
        seen: list[float] = []

        def loss(module: nn.Module, generator: torch.Generator, count: int) -> torch.Tensor:
            image = torch.randn(count, 4, 8, 8, generator=generator)
            value = (module(image) - image).square().mean()
            seen.append(value.item())
            return value

        torch.manual_seed(0)
        network = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=layout)
        training.fit(str(layout), network, loss, recipe, tmp_path)
        return seen

    plain, channels_last = losses(torch.contiguous_format), losses(torch.channels_last)
    assert plain[-1] < 0.3 * plain[0]
    assert np.allclose(plain, channels_last, rtol=0.05)
