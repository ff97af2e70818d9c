"""Stage `classify`: the loss, the two variants, model selection, files."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from bob.cache.lists import read_items
from bob.errors import BobError
from bob.formats import layout
from bob.formats.files import read_json, write_jsonl
from bob.formats.manifest import Generated, read_manifest, write_manifest
from bob.formats.photos import Task, read_photos, read_task, write_photos
from bob.models import classifiers, training
from bob.models.backbones import load_timm, open_backbone
from bob.models.classifiers import load_classifier, read_trained
from bob.models.precision import device_name
from bob.models.preprocessing import Preprocessing, read_inputs
from bob.models.training import (
    Recipe,
    Validation,
    learning_rate,
    mixed,
    parameter_groups,
    weighted_loss,
)
from bob.stages import classify
from tests.conftest import documented
from tests.tiny_project import (
    CLASSES,
    RECIPE,
    add_generated,
    classify_params,
    draw,
    forget_items,
    make_project,
    save_classifier,
    tree,
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_project(tmp_path)


def recipe(**changes: object) -> Recipe:
    values = {k: v for k, v in RECIPE.items() if k not in ("backbone", "seeds")}
    return Recipe(**{**values, **changes})


# --- the loss, the mixing, the schedule ---------------------------------------------------------


def test_the_loss_weighs_the_mean_over_real_against_the_mean_over_synthetic() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.1, 0.9]]))
    targets = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    real = -math.log(0.5)
    synthetic = (-0.5 * math.log(0.25) - 0.5 * math.log(0.75) - math.log(0.9)) / 2
    loss = weighted_loss(logits, targets, real=1, real_weight=0.8)
    assert loss.item() == pytest.approx(0.8 * real + 0.2 * synthetic, rel=1e-6)


def test_without_synthetic_images_the_loss_is_that_of_real_whatever_the_weight() -> None:
    logits, targets = torch.randn(3, 4), F.one_hot(torch.tensor([0, 1, 3]), 4).float()
    expected = F.cross_entropy(logits, targets)
    assert torch.equal(weighted_loss(logits, targets, 3, real_weight=0.1), expected)


@pytest.mark.parametrize("mix", ["cutmix", "mixup"])
def test_mixing_keeps_every_label_mass_at_one_and_the_share_true_to_the_pixels(mix: str) -> None:
    # Image i is all i, so a pixel tells which image it came from.
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    targets = torch.eye(4)
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        result, soft = mixed(images, targets, recipe(mix=mix, mix_probability=1.0), random)
        assert torch.allclose(soft.sum(1), torch.ones(4))
        assert torch.allclose(soft @ torch.arange(4.0), result.mean((1, 2, 3)), atol=1e-5)
    assert torch.equal(images[:, 0, 0, 0], torch.arange(4.0)), "the batch itself was altered"


def test_a_mix_probability_of_zero_or_no_mix_leaves_a_batch_alone() -> None:
    images, targets = torch.randn(4, 3, 8, 8), torch.eye(4)
    for settings in ({"mix_probability": 0.0}, {"mix": "none", "mix_probability": 1.0}):
        result = mixed(images, targets, recipe(**settings), torch.Generator().manual_seed(0))
        assert torch.equal(result[0], images)
        assert torch.equal(result[1], targets)


def test_the_learning_rate_rises_linearly_then_falls_as_a_cosine_to_almost_nothing() -> None:
    rates = [learning_rate(step, 1010, 10, 1.0) for step in range(1010)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[510] == pytest.approx(0.5, abs=1e-6)
    assert 1e-8 < rates[-1] < 1e-5


def layer_scales(architecture: str) -> tuple[dict[str, float], set[str]]:
    """Each weight's share of the learning rate at a layer decay of 0.5, and those that decay."""
    model = timm.create_model(architecture, num_classes=3)
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups = parameter_groups(model, 0.5, weight_decay=0.1)
    listed = [(names[id(weight)], group) for group in groups for weight in group["params"]]
    assert sorted(name for name, _ in listed) == sorted(names.values()), "each weight once"
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    decaying = {name for name, group in listed if group["weight_decay"]}
    return {name: group["lr_scale"] for name, group in listed}, decaying


def test_layer_decay_halves_the_rate_of_every_layer_of_a_vision_transformer() -> None:
    scales, decaying = layer_scales("test_vit")  # of six blocks
    assert scales["head.weight"] == scales["head.bias"] == 1
    for block in range(6):
        assert scales[f"blocks.{block}.attn.qkv.weight"] == 0.5 ** (6 - block)
    assert scales["norm.weight"] == 0.5, "belongs to the last block"
    assert scales["patch_embed.proj.weight"] == scales["pos_embed"] == 0.5**7
    assert {"head.weight", "blocks.0.mlp.fc1.weight"} < decaying
    assert not [name for name in decaying if "bias" in name or "norm" in name]
    assert not decaying & {"pos_embed", "cls_token"}


def test_layer_decay_halves_the_rate_of_every_block_of_a_resnet() -> None:
    scales, decaying = layer_scales("test_resnet")  # of four blocks
    assert scales["fc.weight"] == 1
    for block in range(4):
        assert scales[f"layer{block + 1}.0.conv1.weight"] == 0.5 ** (4 - block)
    assert scales["conv1.0.weight"] == 0.5**5
    assert "fc.weight" in decaying
    assert "layer1.0.bn1.weight" not in decaying


def test_without_layer_decay_all_weights_are_one_group_in_the_networks_order() -> None:
    model = timm.create_model("test_vit", num_classes=3)
    (group,) = parameter_groups(model, 1, weight_decay=0.1)
    assert set(group) == {"params"}
    assert list(map(id, group["params"])) == list(map(id, model.parameters()))


# --- the stage ----------------------------------------------------------------------------------


def test_the_same_inputs_give_the_same_bytes_and_no_path_of_this_machine(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    classify.run(classify_params())
    first = tree(layout.CLASSIFY)
    forget_items()
    classify.run(classify_params())
    assert tree(layout.CLASSIFY) == first
    assert not [name for name, content in first.items() if str(project).encode() in content]
    assert {"classifier.json", "real_only/seed-0/model.safetensors"} < set(first)
    last_line = capfd.readouterr().out.splitlines()[-1]
    assert last_line.startswith("classify: top-1 on validation, 2 seeds: real_only ")


def test_real_only_is_bit_identical_whatever_the_synthetic_set(project: Path) -> None:
    def trained_on(generated: int, first_seed: int) -> dict[str, bytes]:
        add_generated(project, generated, first_seed)
        forget_items()
        classify.run(classify_params(epochs=2))
        return {k: v for k, v in tree(layout.CLASSIFY).items() if "seed-" in k}

    one, other = trained_on(2, 900), trained_on(5, 2000)
    for name in one:
        same = one[name] == other[name]
        either = name.endswith(("val_top1.tsv", "config.json"))
        assert same == ("real_only" in name) or either, name


def test_a_classifier_is_rebuilt_without_its_backbone_and_performs_as_recorded(
    project: Path,
) -> None:
    classify.run(classify_params())
    for file in (project / "models/tiny").iterdir():
        file.unlink()
    trained = read_trained()
    photos = classify.labelled(read_photos(layout.VAL), read_task())
    validation = Validation.read(photos, trained.preprocessing)
    for variant in classifiers.VARIANTS:
        for seed in trained.seeds:
            model = load_classifier(variant, seed)
            top1, loss = validation.measure(model, torch.device("cpu"))
            assert top1 == trained.validation[variant][str(seed)]["top1"]
            assert loss == pytest.approx(trained.validation[variant][str(seed)]["loss"], rel=1e-5)


def test_training_learns_the_task(project: Path) -> None:
    make_project(project, train=8, val=10, generated=8)
    classify.run(classify_params(epochs=12, mix_probability=0.2, batch_size=8, seeds=[0]))
    trained = read_trained()
    for variant in classifiers.VARIANTS:
        assert (trained.validation[variant]["0"]["top1"] or 0) > 80  # chance is 33


def test_with_an_empty_synthetic_set_both_variants_are_the_same(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(layout.GENERATED, [])
    classify.run(classify_params(epochs=1, seeds=[3]))
    files = tree(layout.CLASSIFY)
    name = "seed-3/model.safetensors"
    assert files[f"real_only/{name}"] == files[f"real_and_synthetic/{name}"]
    assert "no synthetic images: real_and_synthetic is real_only" in capfd.readouterr().out


def test_without_validation_the_last_epoch_is_kept_and_said(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(layout.VAL, [])
    classify.run(classify_params(epochs=2))
    trained = read_trained()
    assert trained.validation["real_only"]["0"] == {"epoch": 1, "top1": None, "loss": None}
    assert trained.best_seed("real_only") == 0
    assert "the last epoch of every run is kept" in capfd.readouterr().out


def test_the_best_seed_has_the_best_top1_then_the_lower_loss_then_comes_first(
    project: Path,
) -> None:
    def best(*results: tuple[float | None, float | None]) -> int:
        validation = {
            str(seed): {"epoch": 0, "top1": top1, "loss": loss}
            for seed, (top1, loss) in enumerate(results)
        }
        preprocessing = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
        seeds = tuple(range(len(results)))
        return classifiers.Trained(
            "shape", ("a", "b"), preprocessing, seeds, {"real_only": validation}
        ).best_seed("real_only")

    assert best((50.0, 0.1), (60.0, 0.9)) == 1
    assert best((60.0, 0.9), (60.0, 0.1)) == 1
    assert best((60.0, 0.1), (60.0, 0.1)) == 0
    assert best((None, None), (None, None)) == 0


def test_learning_curves_have_a_row_per_epoch_and_a_mean_over_seeds(project: Path) -> None:
    classify.run(classify_params(epochs=3))
    folder = layout.CLASSIFY / "curves/plots/metrics/real_only"
    columns = []
    for name in ("seed-0/train_loss", "seed-1/train_loss", "train_loss"):
        header, *rows = (folder / f"{name}.tsv").read_text().splitlines()
        assert header == "step\ttrain_loss"
        assert [row.split("\t")[0] for row in rows] == ["0", "1", "2"]
        columns.append([float(row.split("\t")[1]) for row in rows])
    assert columns[2] == pytest.approx([(a + b) / 2 for a, b in zip(*columns[:2], strict=True)])
    assert (folder / "val_top1.tsv").exists()


def test_long_runs_are_validated_ten_times_and_at_the_end(project: Path) -> None:
    write_jsonl(layout.GENERATED, [])
    classify.run(classify_params(epochs=41, seeds=[0]))
    file = layout.CLASSIFY / "curves/plots/metrics/real_only/seed-0/val_top1.tsv"
    steps = [int(line.split("\t")[0]) for line in file.read_text().splitlines()[1:]]
    assert steps == [*range(4, 41, 5), 40]


def test_images_beyond_the_memory_limit_are_read_again_to_the_same_result(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classify.run(classify_params(epochs=2, seeds=[0]))
    kept = tree(layout.CLASSIFY)
    monkeypatch.setattr(training, "KEPT_BYTES", 10_000)  # two images
    forget_items()
    classify.run(classify_params(epochs=2, seeds=[0]))
    assert tree(layout.CLASSIFY) == kept


def test_automatic_precision_is_fp32_on_the_cpu_and_bf16_can_be_asked_for(project: Path) -> None:
    def weights(precision: str) -> bytes:
        forget_items()
        classify.run(classify_params(precision=precision, epochs=1, seeds=[0]))
        return (layout.CLASSIFY / "real_only/seed-0/model.safetensors").read_bytes()

    assert weights("fp32") != weights("bf16")
    if not torch.cuda.is_available():
        assert weights("auto") == weights("fp32")


def test_a_backbone_keeps_its_batch_statistics_in_training(project: Path) -> None:
    before = timm.create_model("local-dir:models/tiny", pretrained=True).state_dict()
    classify.run(classify_params(epochs=2, seeds=[0]))
    after = load_classifier("real_and_synthetic", 0).state_dict()
    for name in before:
        if "running" in name:
            assert torch.equal(before[name], after[name])
    assert not torch.equal(before["conv_stem.weight"], after["conv_stem.weight"])


def test_a_vision_transformer_with_its_own_input_size_trains_and_is_rebuilt(project: Path) -> None:
    model = timm.create_model("test_vit", img_size=48)
    timm.models.save_for_hf(
        model,
        "models/vit",
        safe_serialization=True,
        data_config={"input_size": (3, 48, 48)},
    )
    classify.run(classify_params(backbone="models/vit", epochs=1, seeds=[0]))
    trained = read_trained()
    assert trained.preprocessing.size == (48, 48)
    load_classifier("real_only", 0)


@pytest.mark.parametrize(
    ("network", "given"),
    [("test_resnet", {}), ("test_vit", {"layer_decay": 0.75, "learning_rate": 1e-3})],
    ids=["as ResNet-50", "as MAE"],
)
def test_networks_of_the_papers_kinds_learn_the_task(
    project: Path, network: str, given: dict[str, float]
) -> None:
    make_project(project, train=8, val=10, generated=8)
    torch.manual_seed(0)
    headless = timm.create_model(network, num_classes=0)
    size = {"input_size": (3, 32, 32)} if network == "test_resnet" else {}
    timm.models.save_for_hf(headless, "models/kind", safe_serialization=True, data_config=size)
    classify.run(classify_params(backbone="models/kind", epochs=20, seeds=[0], **given))
    trained = read_trained()
    assert (trained.validation["real_and_synthetic"]["0"]["top1"] or 0) > 80  # chance is 33
    load_classifier("real_and_synthetic", 0)


def test_layer_decay_holds_back_the_layers_far_from_the_head(project: Path) -> None:
    before = timm.create_model("local-dir:models/tiny", pretrained=True).state_dict()

    def change(layer_decay: float) -> float:
        classify.run(classify_params(layer_decay=layer_decay, epochs=2, seeds=[0]))
        model = load_classifier("real_only", 0)
        return float((model.state_dict()["conv_stem.weight"] - before["conv_stem.weight"]).norm())

    assert 0 < change(0.1) < 1e-3 * change(1)


def test_a_classifier_does_not_depend_on_those_trained_before_it(project: Path) -> None:
    """With dropout, which draws from the one generator of the process."""
    timm.models.save_for_hf(
        timm.create_model("test_vit", img_size=32),
        "models/vit",
        model_args={"drop_rate": 0.5, "img_size": 32},
        safe_serialization=True,
        data_config={"input_size": (3, 32, 32)},
    )
    settings = {"backbone": "models/vit", "epochs": 1}
    classify.run(classify_params(**settings, seeds=[0, 1]))
    name = "real_only/seed-1/model.safetensors"
    third = tree(layout.CLASSIFY)[name]
    forget_items()
    classify.run(classify_params(**settings, seeds=[1]))
    assert tree(layout.CLASSIFY)[name] == third


# --- what stock libraries open -------------------------------------------------------------------


def test_timm_and_transformers_open_a_classifier_as_the_page_says(project: Path) -> None:
    classify.run(classify_params())
    draw("Red Square", 5, (70, 50)).save("photo.jpg")
    names: dict[str, Any] = {}
    exec(documented("use.md", using="import timm"), names)
    (inputs,) = read_inputs(["photo.jpg"], read_trained().preprocessing)
    expected = load_classifier("real_and_synthetic", 0)(inputs)
    assert torch.equal(names["logits"], expected)
    assert names["name"] == CLASSES[expected.argmax()]
    exec(documented("use.md", using="pipeline"), names)
    scores = {row["label"]: row["score"] for row in names["scores"]}
    assert scores == pytest.approx(
        dict(zip(CLASSES, expected.softmax(1)[0].tolist(), strict=True)), rel=1e-5
    )


@pytest.mark.parametrize("architecture", timm.list_models("test_*"))
@torch.no_grad()
def test_timm_opens_a_classifier_of_every_kind_with_the_same_logits(
    tmp_path: Path, architecture: str
) -> None:
    source = timm.create_model(architecture, num_classes=5)
    timm.models.save_for_hf(source, tmp_path / "source", safe_serialization=True)
    backbone = open_backbone(tmp_path / "source")
    classifier = backbone.trainable(Task("shape", CLASSES), 0).eval()
    folder = save_classifier(tmp_path / "classifier", backbone, classifier)
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, *backbone.preprocessing.size)
    assert torch.equal(opened(images), classifier(images))
    assert opened.pretrained_cfg["label_names"] == list(CLASSES)
    assert Preprocessing.of(opened) == backbone.preprocessing


def test_a_head_loses_no_class_to_a_backbone_that_had_one_for_the_background(
    project: Path,
) -> None:
    config = Path("models/tiny/config.json")
    settings = read_json(config)
    settings["pretrained_cfg"]["label_offset"] = 1
    config.write_text(json.dumps(settings))
    weights = load_file("models/tiny/model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = torch.cat([weights[name][:1], weights[name]])
    save_file(weights, "models/tiny/model.safetensors")
    backbone = open_backbone("models/tiny")
    classifier = backbone.trainable(Task("shape", CLASSES), 0)
    folder = save_classifier(project / "classifier", backbone, classifier)
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(
        opened.get_parameter("classifier.bias"), classifier.get_parameter("classifier.bias")
    )


# --- what was trained before ---------------------------------------------------------------------


def reused_and_made(capfd: pytest.CaptureFixture[str], **changes: object) -> str:
    classify.run(classify_params(epochs=2, **changes))
    last_line = capfd.readouterr().out.splitlines()[-1]
    return last_line.rpartition("; ")[2].removesuffix(f" on {device_name()}")


def test_only_the_classifiers_that_a_change_concerns_are_trained(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert reused_and_made(capfd) == "0 reused, 4 made"
    first = tree(layout.CLASSIFY)
    assert reused_and_made(capfd, real_weight=0.3) == "2 reused, 2 made"  # not real_only
    assert reused_and_made(capfd, layer_decay=0.5) == "0 reused, 4 made"
    assert reused_and_made(capfd, seeds=[1, 2, 0]) == "4 reused, 2 made"
    add_generated(project, 3)
    assert reused_and_made(capfd) == "2 reused, 2 made"
    write_jsonl(layout.GENERATED, [])
    assert reused_and_made(capfd, real_weight=0.1) == "4 reused, 0 made"
    add_generated(project, 2)
    assert reused_and_made(capfd) == "4 reused, 0 made"
    assert tree(layout.CLASSIFY) == first


@pytest.mark.parametrize("what", ["backbone", "training photo", "validation photo", "label"])
def test_whatever_decides_a_classifier_has_it_trained_again(
    project: Path, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    reused_and_made(capfd)
    if what == "backbone":
        torch.manual_seed(7)
        timm.models.save_for_hf(
            timm.create_model("test_efficientnet", num_classes=5),
            "models/tiny",
            safe_serialization=True,
            data_config={"input_size": (3, 32, 32)},
        )
    else:
        listing = layout.VAL if what == "validation photo" else layout.TRAIN
        first, *others = read_photos(listing)
        if what == "label":
            other = next(p.class_name for p in others if p.class_name != first.class_name)
            changed = replace(first, class_name=other)
        else:
            changed = replace(first, path=others[-1].path, sha256=others[-1].sha256)
        write_photos(listing, [changed, *others])
    assert reused_and_made(capfd) == "0 reused, 4 made"


def test_the_list_of_items_names_every_file_of_weights(project: Path) -> None:
    classify.run(classify_params(epochs=1))
    listed = {item.file: item.oid for item in read_items(layout.CLASSIFY_ITEMS)}
    files = {str(path): path for path in layout.CLASSIFY.glob("*/seed-*/model.safetensors")}
    assert listed == {
        name: hashlib.md5(path.read_bytes()).hexdigest() for name, path in files.items()
    }


# --- what users get wrong -----------------------------------------------------------------------


def test_a_backbone_with_as_many_classes_as_the_task_still_gets_a_new_head(project: Path) -> None:
    timm.models.save_for_hf(
        timm.create_model("test_efficientnet", num_classes=3),
        "models/three",
        safe_serialization=True,
    )
    torch.manual_seed(0)
    one = load_timm(Path("models/three"), 3)
    torch.manual_seed(1)
    other = load_timm(Path("models/three"), 3)
    assert not torch.equal(
        one.state_dict()["classifier.weight"], other.state_dict()["classifier.weight"]
    )
    assert load_timm(Path("models/three"), 0)(torch.zeros(2, 3, 32, 32)).ndim == 2


def test_a_backbone_without_a_head_as_maes_is_gets_one(project: Path) -> None:
    model = timm.create_model("test_vit", num_classes=0)
    timm.models.save_for_hf(model, "models/mae", safe_serialization=True)
    network = load_timm(Path("models/mae"), 3)
    assert network(torch.zeros(2, 3, 160, 160)).shape == (2, 3)
    assert torch.equal(network.state_dict()["pos_embed"], model.state_dict()["pos_embed"])


def test_a_broken_backbone_folder_is_one_line_that_names_it(project: Path) -> None:
    folder = project / "models/tiny"
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, settings = weights.read_bytes(), config.read_text()

    def message() -> str:
        with pytest.raises(BobError) as error:
            open_backbone("models/tiny").features()
        assert "models/tiny" in str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot be loaded" in message()
    save_file({"other": torch.zeros(2)}, weights)  # another network's weights
    assert "cannot be loaded" in message()
    weights.write_bytes(whole)
    config.write_text("{")
    assert "config.json: not JSON" in message()
    config.write_text('{"model_type": "vit"}')
    assert "neither a timm nor a CLIP model folder: its config.json has no" in message()
    config.write_text(json.dumps({**json.loads(settings), "architecture": "no_such_network"}))
    assert "no_such_network" in message()
    weights.unlink()
    assert "model.safetensors missing" in message()
    config.unlink()
    assert "config.json and model.safetensors missing" in message()


def test_a_failed_run_leaves_the_old_output_whole(project: Path) -> None:
    classify.run(classify_params(epochs=1, seeds=[0]))
    before = tree(layout.CLASSIFY)
    (layout.GENERATE / read_manifest()[0].file).write_bytes(b"no image")
    with pytest.raises(BobError, match="cannot be read as an image"):
        classify.run(classify_params(epochs=9, seeds=[0]))
    assert tree(layout.CLASSIFY) == before
    assert [path.name for path in layout.CLASSIFY.parent.glob(".classify*")] == []


def test_a_generated_image_of_an_unknown_class_and_an_empty_training_set_are_refused(
    project: Path,
) -> None:
    write_manifest(layout.GENERATED, [Generated("Grey Blob", None, "a photo", 0, "images/a/0.png")])
    with pytest.raises(BobError, match=r"metadata\.jsonl has images of 'Grey Blob'"):
        classify.run(classify_params())
    write_jsonl(layout.TRAIN, [])
    with pytest.raises(BobError, match="lists no photo"):
        classify.run(classify_params())


def test_a_learning_rate_that_ends_in_no_number_is_said(project: Path) -> None:
    with pytest.raises(BobError, match=r"lower classify\.learning_rate"):
        classify.run(classify_params(learning_rate=1e30, warmup_epochs=0, epochs=5))
