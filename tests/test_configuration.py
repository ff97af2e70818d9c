"""Mistakes that a later stage would meet stop the first one, and `bob plan`."""

import os
import shutil
import subprocess

import pytest
from ruamel.yaml import YAML

from bob.commands.configuration import check
from bob.errors import BobError
from bob.formats.files import write_jsonl
from bob.formats.layout import CLASSES
from bob.formats.photos import Task, write_task
from tests.builders import build_clip, build_text_to_image
from tests.conftest import ROOT
from tests.dvc_project import environment, make_project, set_params


@pytest.fixture
def values(tmp_path, monkeypatch):
    """The default parameters, in a folder with the models that they name and a CLIP."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    return YAML(typ="safe").load((ROOT / "params.yaml").read_text())


def told(values):
    with pytest.raises(BobError) as caught:
        check(values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_parameters_of_the_project_are_right(values):
    check(values)


def test_what_is_not_there_yet_is_let_be(values):
    values["classify"] |= {"backbone": "models/none", "lora_rank": 4}
    values["finetune"]["base_model"] = "models/none"
    check(values)


def test_a_batch_is_cut_into_equal_parts(values):
    values["finetune"] |= {"batch_size": 8, "gradient_accumulation": 3}
    assert told(values).startswith("finetune.batch_size 8 cannot be cut into")


def test_what_is_for_clip_is_not_for_timm_and_the_other_way_round(values, tmp_path):
    values["classify"]["lora_rank"] = 4
    assert "lora_rank is 4, which is for CLIP, and models/miniature-backbone is" in told(values)

    clip = str(build_clip(tmp_path / "clip"))
    values["classify"] |= {"backbone": clip, "layer_decay": 0.9}
    assert "layer_decay is 0.9, which is for timm's networks" in told(values)
    values["classify"]["layer_decay"] = 1.0
    check(values)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_of_a_variant_alone_are_none(values, tmp_path, part):
    base = build_text_to_image(tmp_path / "base")
    (plain,) = (base / part).glob("*.safetensors")
    half = plain.with_suffix(".fp16.safetensors")
    shutil.copy(plain, half)
    values["finetune"]["base_model"] = str(base)
    check(values)
    plain.unlink()
    assert told(values) == (
        f"finetune.base_model: {base / part} has weights of another variant alone ({half.name}), "
        f"which nothing here loads; put the plain {plain.name} there"
    )


@pytest.mark.parametrize(
    ("kind", "told_of"),
    [("pipe", "is no file, but a pipe"), ("link", "is no file, but a broken link"), ("ignore", "")],
)
def test_a_model_folder_holds_files_and_nothing_that_hides_them(values, tmp_path, kind, told_of):
    """DVC would wait at a pipe, and its hash would be of other files than those that are loaded."""
    backbone = tmp_path / "backbone"
    shutil.copytree(ROOT / "models/miniature-backbone", backbone)
    values["classify"]["backbone"] = str(backbone)
    check(values)
    odd = backbone / (".dvcignore" if kind == "ignore" else "odd")
    if kind == "pipe":
        os.mkfifo(odd)
    elif kind == "link":
        odd.symlink_to("nowhere")
    else:
        odd.write_text("*.json")
    assert told(values).startswith(
        f"classify.backbone: {odd} {told_of or 'hides files from DVC, which would not notice'}"
    )


@pytest.mark.parametrize(("section", "key"), [("caption", "bank"), ("generate", "context")])
def test_a_prompt_that_the_text_encoder_would_cut_is_named(values, tmp_path, section, key):
    path = "data/contexts/mine.jsonl"
    row = {"image": "0", "class": "747-300", "background": "blue sky", "pose": "on the ground"}
    write_task(CLASSES, Task("aircraft", ("747-300", "747-400")))
    values[section][key] = path
    write_jsonl(tmp_path / path, [row])
    check(values)
    write_jsonl(tmp_path / path, [row, row | {"image": "1", "pose": "on the ground " * 40}])
    message = told(values)
    assert message.startswith(f"{path}: the prompt 'a aircraft photo of a 747-")
    assert "models/miniature-base reads 40; shorten it" in message


@pytest.mark.slow
def test_dvc_repro_stops_before_the_first_stage_has_done_anything(tmp_path):
    project = make_project(tmp_path / "project")
    set_params(project, {"classify": {"lora_rank": 4}})
    done = subprocess.run(
        ["python", "-m", "dvc", "repro"],
        cwd=project,
        env=environment(project),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode and "Error: classify.lora_rank is 4" in done.stdout + done.stderr
    assert not (project / "data/miniature").exists()
