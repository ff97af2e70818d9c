"""The exported classifier in fp16 and int8: as good as fp32's file, or not there and told of."""

import csv
import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnxruntime.quantization.shape_inference import quant_pre_process
from safetensors.torch import load_file
from torch import nn

from bob.formats import layout
from bob.formats.files import read_json
from bob.formats.params import Params
from bob.formats.photos import read_photos
from bob.models import quantization
from bob.models.classifiers import (
    REAL_AND_SYNTHETIC,
    Trained,
    read_trained,
    weights_file,
    weights_path,
)
from bob.models.predictor import Classifier
from bob.models.preprocessing import Preprocessing
from bob.models.quantization import compare, logits_of, reduce, spread
from bob.stages import benchmark, classify, export
from tests.tiny_project import classify_params, make_project, tree

MEGABYTES = {"fp16": 1 / 2, "int8": 1 / 4}  # of fp32's


def export_params(*precisions: str) -> Params:
    return Params({"export": {"precisions": ["fp32", *precisions]}}, "export")


BENCHMARK = Params({"benchmark": {"batch_sizes": [1, 3], "repeats": 2}}, "benchmark")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after `classify` and an export of all precisions."""
    root = make_project(tmp_path_factory.mktemp("trained"), train=3, val=8)
    here = Path.cwd()
    os.chdir(root)
    try:
        classify.run(classify_params(epochs=8))
        export.run(export_params("fp16", "int8"))
    finally:
        os.chdir(here)
    return root


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current directory."""
    shutil.copytree(trained, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def session_of(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def metadata_of(path: Path) -> dict[str, str]:
    return session_of(path).get_modelmeta().custom_metadata_map


# --- files that survive -------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "close"), [("fp16", 0.02), ("int8", 0.2)])
def test_each_file_is_used_as_the_fp32_one_and_says_the_same(
    project: Path, precision: str, close: float
) -> None:
    path = layout.reduced_onnx(precision)
    onnx.checker.check_model(path, full_check=True)
    assert metadata_of(path) == metadata_of(layout.ONNX)
    for ours, theirs in zip(
        (*session_of(path).get_inputs(), *session_of(path).get_outputs()),
        (*session_of(layout.ONNX).get_inputs(), *session_of(layout.ONNX).get_outputs()),
        strict=True,
    ):
        assert (ours.name, ours.type, ours.shape) == (theirs.name, theirs.type, theirs.shape)

    photos = [photo.path for photo in read_photos(layout.TEST)]
    inputs = export._inputs(photos, read_trained())
    expected, logits = logits_of(layout.ONNX, inputs), logits_of(path, inputs)
    distance = np.sqrt(np.mean((logits - expected) ** 2)) / expected.std()
    assert 0 < distance < close
    said = [one.top[0][0] for one in Classifier(path).predict(photos)]
    fp32_said = [one.top[0][0] for one in Classifier(layout.ONNX).predict(photos)]
    assert sum(a == b for a, b in zip(said, fp32_said, strict=True)) >= len(photos) - 1


def test_each_file_is_as_much_smaller_as_its_weights(project: Path) -> None:
    # Most of this network's fp32 file is its graph, so sizes are of the tensors.
    def tensors(path: Path) -> int:
        return sum(len(one.raw_data) for one in onnx.load(path).graph.initializer)

    for precision, share in MEGABYTES.items():
        ratio = tensors(layout.reduced_onnx(precision)) / tensors(layout.ONNX)
        assert share * 0.9 < ratio < share * 1.25, precision


def logits_without_overflow(path: Path, images: torch.Tensor) -> np.ndarray:
    """By int8 products where they are exact, else, on x86 without VNNI, by what they stand for.

    See docs/precisions.md.
    """
    can = torch.cpu.get_capabilities()
    if can["architecture"] != "x86_64" or can["avx512_vnni"] or can["avx_vnni"]:
        return logits_of(path, images)
    options = onnxruntime.SessionOptions()  # not optimized: products of what is dequantized
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"image": images.numpy()})[0])


def test_a_transformer_has_its_linear_layers_in_int8_and_all_else_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3).eval()
    size = model.pretrained_cfg["input_size"][1:]
    preprocessing = Preprocessing(tuple(size), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
    source, target = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    export.write_onnx(model, Trained("bird", ("a", "b", "c"), preprocessing, (0,), {}), source)
    images = torch.randn(6, 3, *size)
    labels = torch.from_numpy(logits_of(source, images).argmax(1))
    for precision in layout.PRECISIONS:
        check = reduce(precision, source, target, images, images, labels)
        assert check.survived, check.reason
        expected = logits_of(source, images)
        logits = logits_without_overflow(target, images)
        distance = np.sqrt(np.mean((logits - expected) ** 2)) / expected.std()
        assert distance < 0.1
    graph = onnx.load(target).graph
    quantized = {
        node.output[0]: node.op_type for node in graph.node if node.op_type == "DequantizeLinear"
    }
    inputs = {
        kind: [[name in quantized for name in node.input] for node in graph.node
               if node.op_type == kind]
        for kind in ("MatMul", "Add", "LayerNormalization", "Gelu", "Softmax")
    }  # fmt: skip
    linear_layers = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert inputs["MatMul"].count([True, True]) in (linear_layers, linear_layers - 1)  # a Gemm head
    attention = sum(module.__class__.__name__ == "Attention" for module in model.modules())
    assert inputs["MatMul"].count([False, False]) == 2 * attention > 0
    for kind in ("LayerNormalization", "Gelu", "Softmax"):
        assert inputs[kind] and not any(map(any, inputs[kind])), kind


# --- calibration --------------------------------------------------------------------------------


def test_nothing_of_test_is_read(project: Path) -> None:
    before = tree(layout.EXPORT)
    layout.TEST.unlink()
    shutil.rmtree("data/tiny/test")
    export.run(export_params("fp16", "int8"))
    assert tree(layout.EXPORT) == before


def test_real_and_synthetic_images_of_training_decide_the_ranges(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = read_photos(layout.TRAIN)
    chosen = export.calibration_images(train)
    assert chosen[: len(train)] == [photo.path for photo in train]
    assert len(chosen) == len(train) + 6 and all("generate" in one for one in chosen[len(train) :])
    before = layout.reduced_onnx("int8").read_bytes()
    for dropped in (slice(len(train)), slice(len(train), None)):
        monkeypatch.setattr(export, "calibration_images", lambda train, kept=dropped: chosen[kept])
        export.run(export_params("int8"))
        assert layout.reduced_onnx("int8").read_bytes() != before


def test_the_images_are_spread_over_the_list() -> None:
    assert spread(range(10), 3) == [0, 3, 6]
    assert spread(range(2), 3) == [0, 1]
    assert spread([], 3) == []


# --- files that do not --------------------------------------------------------------------------


STEM = ("bn1", "blocks.0.0.conv")
LATER = ("blocks.1.0.bn1", "blocks.1.0.conv_pwl")


def break_activations(layers: tuple[str, str], factor: float) -> None:
    """Make one channel `factor` times the others and its use as much smaller: for float32 nearly
    the same network, but in 256 steps or in float16 nothing is left of the other channels.
    """
    normalisation, convolution = layers
    seed = read_trained().best_seed(REAL_AND_SYNTHETIC)
    path = weights_path(layout.CLASSIFY, REAL_AND_SYNTHETIC, seed)
    weights = load_file(path)
    channel = int(weights[f"{normalisation}.weight"].abs().argmax())
    weights[f"{normalisation}.weight"][channel] *= factor
    weights[f"{normalisation}.bias"][channel] *= factor
    weights[f"{convolution}.weight"][:, channel] /= factor
    path.write_bytes(weights_file(weights, "test_efficientnet", {}))


def test_what_does_not_survive_is_told_and_not_written(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_activations(LATER, 1e6)
    export.run(export_params("fp16", "int8"))
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 2
    assert warnings[0].startswith("warning: this network does not survive fp16 (an activation ")
    assert warnings[1].startswith("warning: this network does not survive int8 (right on ")
    assert list(tree(layout.REDUCED)) == ["checks.json"]

    benchmark.run(BENCHMARK)
    metrics = read_json(layout.ONNX_METRICS)
    assert metrics["fp16"] == {"survived": False}  # it was never compared
    assert metrics["int8"].pop("agreement") < 96
    assert metrics["int8"] == {"survived": False}
    assert metrics["top1"] == metrics["torch_top1"]


def test_int8_is_tried_again_with_the_first_convolutions_in_float32(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_activations(STEM, 3e3)  # which float16 holds
    export.run(export_params("fp16", "int8"))
    assert "warning" not in capsys.readouterr().out
    graph = onnx.load(layout.reduced_onnx("int8")).graph
    weights = {tensor.name for tensor in graph.initializer}
    in_float = [
        any(name in weights for name in node.input) for node in graph.node if node.op_type == "Conv"
    ]
    assert in_float[:2] == [True, True] and not any(in_float[2:])
    monkeypatch.setitem(quantization.CONVERSIONS, "int8", quantization.CONVERSIONS["int8"][:1])
    export.run(export_params("int8"))
    assert "does not survive int8" in capsys.readouterr().out


def logits_naming(*classes: int) -> Any:
    return np.eye(3, dtype=np.float32)[list(classes)]


@pytest.mark.parametrize("free", ["bytes", "files"])
def test_a_full_disk_is_not_taken_for_a_network_that_does_not_fit(
    project: Path, monkeypatch: pytest.MonkeyPatch, free: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("SystemError : 28")  # as ONNX Runtime tells of it

    images = torch.zeros(1, 3, 32, 32)
    target = project / "results/small.onnx"
    sizes = list(os.statvfs(project))
    sizes[4 if free == "bytes" else 7] = 0  # f_bavail, f_favail
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(sizes))
    monkeypatch.setitem(quantization.CONVERSIONS, "int8", [fail])
    full = os.strerror(errno.ENOSPC)
    with pytest.raises(OSError, match=full):
        reduce("int8", layout.ONNX, target, images, images, torch.zeros(1))
    logger = logging.getLogger(quant_pre_process.__module__)
    with pytest.raises(OSError, match=full), quantization.full_disk_raised(1):
        logger.error("Optimization Failed!")
    assert not target.exists()


def test_a_drop_of_top1_is_allowed_up_to_half_a_point_or_one_photo() -> None:
    labels = np.zeros(600, np.int64)
    right = logits_naming(*labels)
    for wrong, survives in ((3, True), (4, False)):  # 0.5 points of 600 photos are 3
        check = compare(logits_naming(*[1] * wrong, *labels[wrong:]), right, labels)
        assert check.survived == survives
        assert check.top1 == round(100 * (600 - wrong) / 600, 2)
        assert check.fp32_top1 == 100.0
    few = np.zeros(5, np.int64)
    assert compare(logits_naming(1, 0, 0, 0, 0), right[:5], few).survived
    two = compare(logits_naming(1, 1, 0, 0, 0), right[:5], few)
    assert not two.survived and two.reason == "right on 3 of 5 photos, fp32 on 5"


def test_other_classes_and_numbers_that_are_none_do_not_survive() -> None:
    labels = np.full(20, 2)
    check = compare(logits_naming(*[1] * 20), logits_naming(*[0] * 20), labels)
    assert check.reason == "another class than fp32's for 20 of 20 photos"
    broken = logits_naming(*labels)
    broken[3, 1] = np.nan
    assert compare(broken, logits_naming(*labels), labels).reason == "logits are not finite"


# --- the stages ---------------------------------------------------------------------------------


def test_fp32_alone_leaves_no_other_file_and_reads_no_other_image(project: Path) -> None:
    shutil.rmtree(layout.GENERATE)
    export.run(export_params())
    assert {name: content.strip() for name, content in tree(layout.REDUCED).items()} == {
        "checks.json": b"{}"
    }
    benchmark.run(BENCHMARK)
    metrics = read_json(layout.ONNX_METRICS)
    assert not metrics.keys() & set(layout.PRECISIONS)
    for precision in layout.PRECISIONS:  # `dvc plots` wants the file
        lines = (layout.BENCHMARK / f"onnxruntime_{precision}.csv").read_text().splitlines()
        assert lines == ["batch_size,p50_ms,p95_ms,p99_ms,images_per_second"]


def test_each_precision_is_measured_beside_fp32(project: Path) -> None:
    benchmark.run(BENCHMARK)
    metrics = read_json(layout.ONNX_METRICS)
    for precision in layout.PRECISIONS:
        measured = metrics[precision]
        assert measured["survived"] is True and measured["agreement"] >= 90
        assert abs(measured["top1"] - metrics["top1"]) < 100 / 9 + 0.01  # of nine photos one
        assert measured["model_mb"] < metrics["model_mb"]
        with (layout.BENCHMARK / f"onnxruntime_{precision}.csv").open(newline="") as file:
            table = {row["batch_size"]: row for row in csv.DictReader(file)}
        for size in ("1", "3"):
            timing = measured[f"batch_{size}"]
            assert set(timing) == {"p50_ms", "p95_ms", "images_per_second", "speedup"}
            assert timing["p50_ms"] == float(table[size]["p50_ms"])
            fp32 = metrics[f"batch_{size}"]["p50_ms"]
            assert timing["speedup"] == pytest.approx(fp32 / timing["p50_ms"], abs=0.01)
