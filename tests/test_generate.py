"""The generate stage on a small random Stable Diffusion, and what the item cache saves it."""

import io
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from bob.cache.index import Index
from bob.cache.lists import read_items
from bob.errors import BobError
from bob.formats.layout import BANK, CLASSES, GENERATE, GENERATED, GENERATED_ITEMS, LORA, REVIEW
from bob.formats.manifest import check_files, read_manifest
from bob.formats.params import Params
from bob.formats.photos import Task, write_task
from bob.formats.prompts import Context, Entry, read_bank, write_bank
from bob.formats.review import KEEP, REJECT, Verdict, decide
from bob.models import diffusion
from bob.models.lora import add_lora, save_lora
from bob.models.precision import device_name, hardware_here
from bob.models.sampling import ImageMaker, png
from bob.stages import generate
from tests.builders import ONE_BLOCK, TINY_UNET, build_text_to_image
from tests.conftest import documented
from tests.tiny_project import tree

SETTINGS = {
    "context": "bank",
    "images_per_class": 2,
    "guidance_scale": 2.0,
    "steps": 2,
    "sampler": "ddim",
    "batch_size": 3,
    "compile": False,
    "precision": "fp32",
    "seed": 42,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base model and a LoRA that changes it."""
    folder = tmp_path_factory.mktemp("models")
    base = build_text_to_image(folder / "base")
    pipeline = diffusion.load(base, torch.device("cpu"))
    for parameter in add_lora(pipeline, 2, 0):
        torch.nn.init.normal_(parameter, std=0.1)
    save_lora(pipeline, folder / "lora")
    return folder


@pytest.fixture
def project(repository, models):
    """What the stage reads."""
    for path in (CLASSES, BANK, LORA):
        path.parent.mkdir(parents=True, exist_ok=True)
    Path("base").symlink_to(models / "base")
    LORA.symlink_to(models / "lora")
    write_task(CLASSES, Task("bird", ("Tit", "Wren")))
    contexts = [Context("green leaves", "perched"), Context("sky", "flying")]
    write_bank(BANK, [Entry(*one) for one in zip("01", ("Tit", "Wren"), contexts, strict=True)])
    return repository


def run(capsys, **changed):
    """Run the stage; returns its output, and how many images were reused and made."""
    values = {"finetune": {"base_model": "base"}, "generate": SETTINGS | changed}
    generate.run(Params(values, "generate"))
    reused, made = re.findall(r"(\d+) reused, (\d+) made", capsys.readouterr().out)[0]
    return tree(GENERATE), int(reused), int(made)


def test_more_images_make_the_missing_ones_and_fewer_make_none(project, capsys):
    few, *counts = run(capsys)
    assert counts == [0, 4]
    many, *counts = run(capsys, images_per_class=4)
    assert counts == [4, 4]
    assert all(many[name] == few[name] for name in few if name.endswith(".png"))
    again, *counts = run(capsys)
    assert counts == [4, 0]
    assert again == few


def test_a_class_with_fewer_photos_gets_more_images(project, capsys):
    before, *_ = run(capsys)
    bank = read_bank(BANK)
    write_bank(BANK, [*bank, Entry("2", "Tit", bank[0].context)])
    images, *counts = run(capsys, context="none")
    assert set(images) - set(before) == {"images/Wren/0002.png"}
    assert counts == [0, 5]


def test_the_model_is_not_loaded_where_no_image_is_missing(project, capsys, monkeypatch):
    run(capsys)
    run(capsys, guidance_scale=3.0)
    monkeypatch.setattr(diffusion, "load", None)
    assert run(capsys)[1:] == (4, 0)
    assert run(capsys, guidance_scale=2)[1:] == (4, 0)
    with pytest.raises(TypeError):
        run(capsys, guidance_scale=4.0)


@pytest.mark.parametrize(
    "changed",
    [
        {"guidance_scale": 3.0},
        {"steps": 3},
        {"sampler": "euler"},
        {"batch_size": 2},
        {"precision": "bf16"},
        {"seed": 43},
    ],
)
def test_what_decides_an_image_makes_it_anew(project, capsys, changed):
    run(capsys)
    assert run(capsys, **changed)[1:] == (0, 4)


def test_another_lora_makes_every_image_anew(project, capsys, models, tmp_path):
    run(capsys)
    weights = (models / "lora/pytorch_lora_weights.safetensors").read_bytes()
    LORA.unlink()
    LORA.mkdir()
    (LORA / "pytorch_lora_weights.safetensors").write_bytes(weights)
    assert run(capsys)[1:] == (4, 0), "the same bytes elsewhere"
    base = diffusion.load(Path("base"), torch.device("cpu"))
    add_lora(base, 2, 1)
    save_lora(base, LORA)
    assert run(capsys)[1:] == (0, 4)


def test_a_plan_that_draws_other_contexts_reuses_the_prompts_it_shares(project, capsys):
    """An image is known by its prompt and seed, and not by how it came to be planned."""
    run(capsys)
    prompts = [image.prompt for image in read_manifest()]
    leaves = Context("green leaves", "perched")
    write_bank(BANK, [Entry("0", "Tit", leaves), Entry("1", "Wren", leaves)])
    shared = sum("green leaves" in prompt for prompt in prompts)
    assert 0 < shared < 4
    assert run(capsys)[1:] == (shared, 4 - shared)


def test_a_damaged_image_in_the_cache_is_made_again_to_the_same_bytes(project, capsys):
    before, *_ = run(capsys)
    row = Index(Path(".dvc/cache/bob/items.sqlite")).all()[0]
    path = Path(".dvc/cache/files/md5", row.oid[:2], row.oid[2:])
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:50])
    assert run(capsys) == (before, 3, 1)


def test_the_list_of_items_and_the_manifest_name_every_image_and_its_recipe(project, capsys):
    run(capsys)
    listed, planned = read_items(GENERATED_ITEMS), read_manifest()
    assert [item.file for item in listed] == [str(GENERATE / image.file) for image in planned]
    assert [item.recipe for item in listed] == [image.recipe for image in planned]


def reject(*images, verdict=REJECT):
    decide(
        {one.recipe: Verdict(one.recipe, verdict, one.class_name, one.file) for one in images},
        REVIEW / "birds.jsonl",
    )


def test_of_a_rejected_image_the_next_of_its_class_is_made(project, capsys):
    before, *_ = run(capsys)
    tit, *_ = read_manifest()
    assert tit.file == "images/Tit/0000.png"
    reject(tit)
    after, *counts = run(capsys)
    assert counts == [3, 1]
    assert after.keys() - before.keys() == {"images/Tit/0002.png"}
    assert before.keys() - after.keys() == {"images/Tit/0000.png"}
    decide({tit.recipe: None}, REVIEW / "birds.jsonl")
    assert run(capsys) == (before, 4, 0)


def test_the_last_line_says_how_many_were_rejected_and_a_warning_of_too_many(project, capsys):
    def said():
        values = {"finetune": {"base_model": "base"}, "generate": SETTINGS}
        generate.run(Params(values, "generate"))
        return capsys.readouterr()

    run(capsys)
    reject(read_manifest()[0])
    assert said().out.endswith(f" made on {device_name()}; 1 rejected by data/review\n")
    reject(*read_manifest()[:2])
    out, err = said()
    assert out.endswith(f" made on {device_name()}; 3 rejected by data/review\n")
    assert err.count("\n") == 1 and "of Tit (3 and 2)" in err


def test_an_image_to_keep_changes_nothing(project, capsys):
    before, *_ = run(capsys)
    reject(*read_manifest(), verdict=KEEP)
    assert run(capsys) == (before, 4, 0)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads the generated set as docs/use.md says."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    def load():
        names: dict[str, Any] = {}
        exec(documented("use.md", using="load_dataset"), names)
        return names["images"]

    return load


def columns(image):
    context = image.context
    return {
        "class": image.class_name,
        "background": context.background if context else None,
        "pose": context.pose if context else None,
        "prompt": image.prompt,
        "seed": image.seed,
        "recipe": image.recipe,
    }


@pytest.mark.parametrize("context", ["bank", "none"])
def test_datasets_loads_the_set_with_what_was_asked_for_as_columns(project, capsys, load, context):
    run(capsys, context=context)
    images, planned = load(), read_manifest()
    assert images.remove_columns("image").to_list() == [columns(image) for image in planned]
    for row, image in zip(images, planned, strict=True):
        assert row["image"].tobytes() == Image.open(GENERATE / image.file).tobytes()


def test_datasets_loads_every_class_whatever_its_name(project, capsys, load):
    """Also one that is the name of a split, or means something in a path."""
    names = {word for words in datasets.data_files.SPLIT_KEYWORDS.values() for word in words}
    names |= {"a val", "Test", "test-eval", "in 5test"}
    names |= {"a::b", "$HOME", "a\\b", "F/A-18", ".x", "[a]*"}
    write_task(CLASSES, Task("bird", tuple(sorted(names))))
    write_bank(BANK, [Entry(name, name, Context("sky", "flying")) for name in sorted(names)])
    run(capsys, images_per_class=1, batch_size=10)
    assert load().remove_columns("image").to_list() == [columns(image) for image in read_manifest()]


def test_no_images_need_no_model(project, capsys):
    Path("base").unlink()
    Path("base").mkdir()
    assert run(capsys, images_per_class=0)[1:] == (0, 0)
    assert not read_manifest()
    assert not read_items(GENERATED_ITEMS)


def test_manifest_and_files_must_agree(project, capsys):
    run(capsys)
    check_files(GENERATED)
    extra = GENERATED.parent / "images/Wren/9999.png"
    extra.touch()
    with pytest.raises(BobError, match=r"differ: images/Wren/9999\.png"):
        check_files(GENERATED)
    extra.unlink()
    (GENERATED.parent / "images/Tit/0000.png").unlink()
    with pytest.raises(BobError, match=r"differ: images/Tit/0000\.png"):
        check_files(GENERATED)


def image_maker(base, lora, **changed):
    given: dict[str, Any] = {
        "sampler": "ddim",
        "steps": 2,
        "guidance_scale": 2,
        "precision": "fp32",
    }
    return ImageMaker(base, lora, **given | changed)


@pytest.mark.slow
@pytest.mark.skipif(not hardware_here().compiles, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_makes_the_same_images_but_for_rounding(tmp_path):
    base = build_text_to_image(tmp_path / "base", unet_config=TINY_UNET | ONE_BLOCK)
    pipeline = diffusion.load(base, torch.device("cpu"))
    add_lora(pipeline, 2, 0)
    save_lora(pipeline, tmp_path / "lora")
    made = {}
    for compile in (False, True):
        maker = image_maker(base, tmp_path / "lora", batch_size=2, compile=compile)
        assert ("compile" in maker.settings) == compile, "images keep the names that they have"
        images = maker.make(["a bird photo of a wren", "a tit"], [0, 1])
        made[compile] = np.stack([np.asarray(image, int) for image in images])
    assert abs(made[True] - made[False]).max() <= 1
    assert made[False].std() > 10, "which an empty image would be too"


def test_an_image_does_not_depend_on_place_neighbours_or_how_many_are_made(models):
    maker = image_maker(models / "base", models / "lora", batch_size=3, sampler="dpmsolver++")
    prompts = ["a bird photo of a wren", "a bird photo of a tit", "green leaves"]

    def files(prompts, seeds):
        return [png(image) for image in maker.make(prompts, seeds)]

    together = files(prompts, [5, 6, 7])
    assert len(set(together)) == 3
    assert files(prompts[::-1], [7, 6, 5]) == together[::-1]
    assert [files([text], [seed])[0] for text, seed in zip(prompts, [5, 6, 7], strict=True)] == (
        together
    )
    assert Image.open(io.BytesIO(together[0])).size == (16, 16)
