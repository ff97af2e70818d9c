"""CLIP as a backbone: zero-shot at first, LoRA on both towers, folded into an image classifier."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModelWithProjection,
)

from bob.errors import BobError
from bob.formats import layout
from bob.formats.files import read_json
from bob.formats.params import Params
from bob.formats.photos import Task, open_image, read_photos, read_task, write_task
from bob.models import classifiers
from bob.models.backbones import load_network, open_backbone
from bob.models.classifiers import load_classifier, read_trained
from bob.models.clip import ImageTextScorer, add_lora
from bob.models.precision import device_name
from bob.models.preprocessing import read_inputs
from bob.models.training import Validation, parameter_groups
from bob.stages import benchmark, classify, evaluate, export
from tests.builders import build_clip
from tests.conftest import documented
from tests.tiny_project import (
    CLASSES,
    classify_params,
    draw,
    forget_items,
    make_project,
    save_classifier,
    tree,
)

FOLDER = Path("models/clip")
TASK = Task("shape", CLASSES)
LORA = {"backbone": str(FOLDER), "lora_rank": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture
def project(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path)
    shutil.copytree(built, FOLDER)
    return tmp_path


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trainable(lora_rank: int, seed: int = 0) -> ImageTextScorer:
    torch.manual_seed(seed)
    network = open_backbone(FOLDER).trainable(TASK, lora_rank)
    assert isinstance(network, ImageTextScorer)
    return network


# --- the network --------------------------------------------------------------------------------


@pytest.mark.parametrize("lora_rank", [0, 4])
@torch.no_grad()
def test_the_first_logits_are_those_of_zero_shot_clip(project: Path, lora_rank: int) -> None:
    clip = CLIPModel.from_pretrained(FOLDER)
    texts = [f"a photo of a {name}, a type of shape." for name in CLASSES]
    tokens = AutoTokenizer.from_pretrained(FOLDER)(texts, padding=True, return_tensors="pt")
    expected = clip(**tokens, pixel_values=images()).logits_per_image
    torch.testing.assert_close(trainable(lora_rank)(images()), expected)
    assert expected.std() > 1e-3, "all images look the same to it"


def test_a_lora_is_on_the_attention_of_both_towers_and_nothing_else_is_trained(
    project: Path,
) -> None:
    def trained(seed: int) -> dict[str, Tensor]:
        named = trainable(4, seed).named_parameters()
        return {name: weight.detach() for name, weight in named if weight.requires_grad}

    one, same, other = trained(0), trained(0), trained(1)
    assert {weight.dtype for weight in one.values()} == {torch.float32}
    for tower in ("text_model", "vision_model"):
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            pairs = [name for name in one if tower in name and f"{projection}.lora_" in name]
            assert len(pairs) == 2 * 2, "A and B in each of two layers"
    assert all("lora_" in name for name in one)
    for name in one:
        assert torch.equal(one[name], same[name])
        assert torch.equal(one[name], other[name]) == ("lora_B" in name), "B is zero, A is drawn"


def test_a_lora_of_rank_16_on_clip_vit_b_16_has_two_million_weights() -> None:
    with torch.device("meta"):
        clip = add_lora(CLIPModel(CLIPConfig(vision_config={"patch_size": 16})), 16)
    counts = {True: 0, False: 0}
    for weight in clip.parameters():
        counts[weight.requires_grad] += weight.numel()
    layers, projections = 12, 4
    assert counts[True] == layers * projections * 16 * ((768 + 768) + (512 + 512)) == 1_966_080
    assert round(counts[False] / 1e6, 1) == 149.6


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_folding_keeps_the_logits_and_leaves_the_trained_network_as_it_is(
    project: Path, lora_rank: int
) -> None:
    backbone, network = open_backbone(FOLDER), trainable(lora_rank)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():  # as if it had been trained
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=random))
        before = {name: weight.clone() for name, weight in network.state_dict().items()}
        expected = network(images())
        classifier = backbone.classifier(network)
        torch.testing.assert_close(classifier(images()), expected, rtol=1e-4, atol=1e-5)
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not [name for name in classifier.state_dict() if "text" in name or "lora" in name]


def test_a_tokenizer_in_clips_two_old_files_is_read_as_well(project: Path, built: Path) -> None:
    tokens = trainable(0).tokens
    (FOLDER / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(built.with_name("clip-tokenizer") / name, FOLDER)
    assert torch.equal(trainable(0).tokens, tokens)


def test_logits_are_scored_in_full_precision_whatever_the_towers_compute_in(project: Path) -> None:
    network = trainable(0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = network.clip.get_image_features(pixel_values=images()).pooler_output
        texts = network.clip.get_text_features(input_ids=network.tokens).pooler_output
        logits = network(images())
    scale = network.clip.logit_scale.exp()
    expected = scale * normalize(features.float(), dim=-1) @ normalize(texts.float(), dim=-1).T
    torch.testing.assert_close(logits, expected)


@torch.no_grad()
def test_the_features_are_the_projected_ones_of_the_image_tower(project: Path) -> None:
    expected = CLIPModel.from_pretrained(FOLDER).get_image_features(images()).pooler_output
    assert torch.equal(open_backbone(FOLDER).features()(images()), expected)


@pytest.mark.parametrize("legacy", [False, True])
def test_images_are_prepared_as_clips_own_processor_does(project: Path, legacy: bool) -> None:
    processor = CLIPImageProcessor.from_pretrained(FOLDER)
    if legacy:  # as in the folders of OpenAI's models
        path = FOLDER / "preprocessor_config.json"
        values = {**read_json(path), "size": 36, "crop_size": 32}
        del values["image_processor_type"]
        path.write_text(json.dumps(values))
    photo = read_photos(layout.TRAIN)[0].path
    (found,) = read_inputs([photo], open_backbone(FOLDER).preprocessing)
    expected = processor(open_image(photo), return_tensors="pt").pixel_values
    step = 1 / 255 / min(processor.image_std)
    assert (found - expected).abs().max() < 1.01 * step, "but for rounding of uint8"


# --- the stages ---------------------------------------------------------------------------------


def test_training_learns_the_task_and_the_other_stages_take_what_it_keeps(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_project(project, train=8, val=10, test=10, generated=8)
    classify.run(classify_params(**LORA, epochs=12, mix_probability=0.2, batch_size=8, seeds=[0]))
    shutil.rmtree(FOLDER)  # nothing needs it any more
    trained = read_trained()
    validation = Validation.read(
        classify.labelled(read_photos(layout.VAL), read_task()), trained.preprocessing
    )
    for variant in classifiers.VARIANTS:
        recorded = trained.validation[variant]["0"]
        model = load_classifier(variant, 0)
        top1, loss = validation.measure(model, torch.device("cpu"))
        assert top1 == recorded["top1"]
        assert top1 > 80  # chance is 33
        assert loss == pytest.approx(recorded["loss"], rel=1e-5)

    evaluate.run(Params({}, "evaluate"))
    export.run(Params({"export": {"precisions": ["fp32", "fp16", "int8"]}}, "export"))
    benchmark.run(Params({"benchmark": {"batch_sizes": [1, 3], "repeats": 2}}, "benchmark"))
    accuracy, onnx = read_json(layout.ACCURACY_METRICS), read_json(layout.ONNX_METRICS)
    assert onnx["top1"] == onnx["torch_top1"] == accuracy["real_and_synthetic"]["top1"] > 80
    session = onnxruntime.InferenceSession(layout.ONNX, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]


def test_the_same_inputs_give_the_same_bytes_and_no_path_of_this_machine(project: Path) -> None:
    classify.run(classify_params(**LORA, epochs=2))
    first = tree(layout.CLASSIFY)
    forget_items()
    classify.run(classify_params(**LORA, epochs=2, seeds=[1]))
    second = tree(layout.CLASSIFY)
    for variant in classifiers.VARIANTS:
        name = f"{variant}/seed-1/model.safetensors"
        assert first[name] == second[name]
        assert first[name] != first[f"{variant}/seed-0/model.safetensors"]
    assert not [name for name, content in first.items() if str(project).encode() in content]
    assert not [name for name, content in first.items() if str(FOLDER).encode() in content]


def test_all_weights_can_be_trained_and_in_bf16(project: Path) -> None:
    before = load_file(FOLDER / "model.safetensors")
    settings = {**LORA, "lora_rank": 0, "learning_rate": 1e-3, "precision": "bf16"}
    classify.run(classify_params(**settings, epochs=2, seeds=[0]))
    after = load_file(layout.CLASSIFY / "real_only/seed-0/model.safetensors")
    name = "vision_model.embeddings.patch_embedding.weight"
    assert after[name].dtype == torch.float32
    assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize("what", ["class name", "descriptor", "lora_rank"])
def test_the_prompts_and_the_rank_decide_a_clip_and_the_prompts_no_timm_network(
    project: Path, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    def made(**changes: object) -> str:
        classify.run(classify_params(**{**changes, "epochs": 1, "seeds": [0]}))
        last_line = capfd.readouterr().out.splitlines()[-1]
        return last_line.rpartition("; ")[2].removesuffix(f" on {device_name()}")

    def both(**changes: object) -> tuple[str, str]:
        return made(**{**LORA, **changes}), made()

    assert both() == ("0 reused, 2 made", "0 reused, 2 made")
    assert both() == ("2 reused, 0 made", "2 reused, 0 made")
    changes = {}
    if what == "lora_rank":
        changes = {"lora_rank": 2}
    elif what == "descriptor":
        write_task(layout.CLASSES, replace(TASK, descriptor="form"))
    else:
        for path in (layout.TRAIN, layout.VAL, layout.GENERATED, layout.CLASSES):
            path.write_text(path.read_text().replace("Red Square", "Red Tile"))
    assert both(**changes) == ("0 reused, 2 made", "2 reused, 0 made")


# --- what stock libraries open -------------------------------------------------------------------


def test_transformers_opens_a_classifier_as_the_page_says(project: Path) -> None:
    classify.run(classify_params(**LORA))
    draw("Red Square", 5, (70, 50)).save("photo.jpg")
    names: dict[str, Any] = {}
    exec(documented("use.md", using="CLIPVisionModelWithProjection"), names)
    (inputs,) = read_inputs(["photo.jpg"], read_trained().preprocessing)
    expected = load_classifier("real_and_synthetic", 0)(inputs)
    features = names["tower"](inputs).image_embeds
    assert torch.equal(normalize(features, dim=-1) @ names["classes"].T, expected)
    torch.testing.assert_close(names["logits"], expected, rtol=0, atol=0.1)  # of rounded pixels
    assert names["name"] == CLASSES[expected.argmax()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_the_tower_has_full_precision_whatever_the_backbones_files_have(
    project: Path, dtype: torch.dtype
) -> None:
    CLIPModel.from_pretrained(FOLDER).to(dtype).save_pretrained(FOLDER)
    backbone = open_backbone(FOLDER)
    classifier = backbone.classifier(trainable(4))
    folder = save_classifier(project / "classifier", backbone, classifier)
    tower = CLIPVisionModelWithProjection.from_pretrained(folder)
    classes = load_file(folder / "model.safetensors")["classes.weight"]
    logits = normalize(tower(images()).image_embeds, dim=-1) @ classes.T
    assert torch.equal(logits, classifier(images()))
    assert torch.equal(load_network(folder)(images()), logits)


# --- what users get wrong -----------------------------------------------------------------------


def told(**changes: object) -> str:
    with pytest.raises(BobError) as error:
        classify.run(classify_params(**{**LORA, **changes}))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_lora_is_refused_for_a_timm_model_and_a_layer_decay_for_clip(project: Path) -> None:
    assert "classify.lora_rank is 4" in (message := told(backbone="models/tiny"))
    assert "models/tiny is a timm model; set it to 0" in message
    assert "classify.layer_decay is 0.7" in (message := told(layer_decay=0.7))
    assert "set it to 1" in message
    with pytest.raises(BobError, match=r"classify\.layer_decay is 0\.5"):
        parameter_groups(trainable(0), 0.5, 0.01)


def test_a_clip_folder_that_lacks_something_is_one_line_that_names_it(project: Path) -> None:
    def without(file: str) -> str:
        content = (FOLDER / file).read_bytes()
        (FOLDER / file).unlink()
        message = told()
        (FOLDER / file).write_bytes(content)
        assert "models/clip" in message
        return message

    assert "model.safetensors missing" in without("model.safetensors")
    assert "preprocessor_config.json" in without("preprocessor_config.json")
    assert "neither tokenizer.json nor vocab.json" in without("tokenizer.json")


def test_weights_that_do_not_fit_are_not_left_random(project: Path) -> None:
    weights = load_file(FOLDER / "model.safetensors")
    for unfit in (None, torch.zeros(3, 3)):
        changed = {**weights, "visual_projection.weight": unfit}
        save_file({k: v for k, v in changed.items() if v is not None}, FOLDER / "model.safetensors")
        assert "have no fitting visual_projection.weight" in told()
    (FOLDER / "model.safetensors").write_bytes(b"no weights")
    assert "models/clip cannot be loaded as a CLIP model" in told()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_center_crop": False}, "does not resize the shorter side, crop the centre"),
        ({"size": {"height": 32, "width": 32}}, "does not resize the shorter side"),
        ({"crop_size": {"height": 24, "width": 24}}, "config.json wants images of 32 pixels"),
    ],
)
def test_preprocessing_that_is_not_clips_is_refused(
    project: Path, change: dict[str, object], message: str
) -> None:
    path = FOLDER / "preprocessor_config.json"
    path.write_text(json.dumps({**read_json(path), **change}))
    assert message in told()
