"""Captioners that transformers loads, in the files that Qwen2.5-VL comes in."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from bob.errors import BobError
from bob.models import vlm
from bob.models.captioner import open_captioner
from bob.models.vlm import VisionLanguageModel
from tests.builders import build_captioner

QUESTION = "describe the background of the bird in as few words as possible."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_captioner(tmp_path_factory.mktemp("models") / "qwen")


def picture(width, height):
    """Blots that are still there when the picture is shrunk."""
    random = np.random.default_rng([width, height])
    blots = random.integers(0, 256, (5, 5, 3)).astype(np.uint8)
    return Image.fromarray(blots).resize((width, height))


PICTURES = [picture(80, 64), picture(240, 72), picture(56, 200)]


def answers(folder, images, precision="fp32", batch_size=1, image_side=768):
    captioner = open_captioner(
        folder, precision=precision, batch_size=batch_size, image_side=image_side
    )
    return [
        answer
        for start in range(0, len(images), batch_size)
        for answer in captioner.answer(images[start : start + batch_size], QUESTION)
    ]


def test_embeddings_that_are_also_the_head_are_loaded_as_such(tmp_path, monkeypatch):
    """As in Qwen2.5-VL-3B, whose files have no weights of a head."""
    folder = build_captioner(tmp_path / "tied", tied=True)
    stored = {n: w for file in folder.glob("*.safetensors") for n, w in load_file(file).items()}
    assert not any("lm_head" in name for name in stored)
    heads = []
    evaluate = Qwen2_5_VLForConditionalGeneration.eval

    def look(model):
        heads.append((model.lm_head.weight, model.get_input_embeddings().weight))
        return evaluate(model)

    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "eval", look)
    assert len(answers(folder, PICTURES, "fp32", batch_size=3)) == len(PICTURES)
    head, embeddings = heads[-1]
    assert head is embeddings
    (name,) = (name for name in stored if "embed_tokens" in name)
    assert torch.equal(head, stored[name].float())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pictures_of_unlike_shapes_are_answered_in_a_batch_as_alone(folder, precision):
    alone = answers(folder, PICTURES, precision)
    assert len(set(alone)) == len(PICTURES)
    assert answers(folder, PICTURES, precision, batch_size=3) == alone
    assert answers(folder, PICTURES, precision, batch_size=2) == alone


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_all_weights_are_in_the_precision_that_is_asked_for(folder, precision, dtype, monkeypatch):
    """From the start: fp32 first would take twice the memory."""
    seen: set[torch.dtype] = set()
    evaluate = Qwen2_5_VLForConditionalGeneration.eval

    def look(model):
        seen.update(parameter.dtype for parameter in model.parameters())
        return evaluate(model)

    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "eval", look)
    answers(folder, PICTURES[:1], precision)
    assert seen == {dtype}


def test_a_larger_picture_is_shrunk_to_the_side_and_a_smaller_one_is_not(folder):
    large = picture(640, 480)
    shrunk = large.resize((112, 84), Image.Resampling.LANCZOS)
    assert answers(folder, [large], image_side=112) == answers(folder, [shrunk])
    assert answers(folder, [large], image_side=112) != answers(folder, [large], image_side=640)
    assert answers(folder, PICTURES, image_side=240) == answers(folder, PICTURES)
    assert large.size == (640, 480)


def test_too_little_memory_is_told_in_one_line(folder, monkeypatch):
    def run_out(*inputs, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(Qwen2_5_VLModel, "forward", run_out)
    with pytest.raises(BobError, match=r"lower caption.batch_size or caption.image_side$") as told:
        answers(folder, PICTURES, batch_size=3)
    assert f"{folder} with 3 images" in str(told.value)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (
            "{% for i in range(50000) %}{% for j in range(999) %}{% endfor %}{% endfor %}",
            "ended in",
        ),
        ("{{ 'x' * 200000 }}", "it gives more than 100,000 characters"),
        ("{{ raise_exception('no images') }}", "no images"),
        ("{{ messages[0]", "unexpected end of template"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
    ],
    ids=["loops", "huge", "raises", "broken", "unsafe"],
)
def test_a_chat_template_that_gives_no_question_is_told(
    folder, tmp_path, monkeypatch, template, told
):
    shutil.copytree(folder, tmp_path / "qwen")
    (tmp_path / "qwen/chat_template.json").write_text(json.dumps({"chat_template": template}))
    monkeypatch.setattr(vlm, "TEMPLATE_S", 0.05 if told == "ended in" else 60)
    with pytest.raises(BobError) as caught:
        answers(tmp_path / "qwen", PICTURES[:1])
    message = str(caught.value)
    assert message.startswith(f"caption.model {tmp_path}/qwen: its chat template does not give a")
    assert told in message


def test_the_item_key_has_the_side_and_what_a_model_stands_on(folder):
    captioner = open_captioner(folder, precision="bf16", batch_size=4, image_side=300)
    assert captioner.settings == {"image_side": 300, "precision": "bf16", "batch_size": 4}
    assert set(VisionLanguageModel.made_by) < set(captioner.made_by)
    assert {"pillow", "torch", "transformers"} <= set(captioner.libraries)


def test_an_endpoint_is_asked_without_torch():
    code = (
        "import sys, bob.stages.caption, bob.models.endpoint, openai;"
        "heavy = {'torch', 'transformers', 'diffusers'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
