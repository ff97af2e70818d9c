"""Stages `export` and `benchmark`: the ONNX file stands for the torch model, and is measured."""

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from transformers import CLIPVisionConfig

from bob.errors import BobError
from bob.formats import layout
from bob.formats.files import read_json
from bob.formats.params import Params
from bob.formats.photos import read_photos
from bob.models.backbones import predict
from bob.models.classifiers import Trained, load_classifier, read_trained
from bob.models.clip import build_classifier
from bob.models.preprocessing import Preprocessing, read_inputs
from bob.stages import benchmark, classify, export
from tests.tiny_project import CLASSES, classify_params, make_project, tree

EVERY_PRECISION = Params({"export": {"precisions": ["fp32", "fp16", "int8"]}}, "export")


def benchmark_params(batch_sizes: list[int], repeats: int = 7) -> Params:
    return Params({"benchmark": {"batch_sizes": batch_sizes, "repeats": repeats}}, "benchmark")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after `classify` and `export`; tests only read it."""
    root = make_project(tmp_path_factory.mktemp("exported"), train=3)
    here = Path.cwd()
    os.chdir(root)
    try:
        classify.run(classify_params(epochs=4))
        export.run(EVERY_PRECISION)
    finally:
        os.chdir(here)
    return root


@pytest.fixture
def project(exported: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(exported)
    return exported


def test_the_export_is_the_classifier_of_both_sources_that_is_best_on_validation(
    project: Path,
) -> None:
    trained = read_trained()
    model = load_classifier("real_and_synthetic", trained.best_seed("real_and_synthetic"))
    paths = [photo.path for photo in read_photos(layout.VAL)]
    inputs = torch.cat(list(read_inputs(paths, trained.preprocessing)))
    session = onnxruntime.InferenceSession(layout.ONNX, providers=["CPUExecutionProvider"])
    expected = predict(model, [inputs], torch.device("cpu")).numpy()
    for size in (1, 3, len(paths)):
        (logits,) = session.run(["logits"], {"image": inputs[:size].numpy()})
        np.testing.assert_allclose(logits, expected[:size], atol=1e-3)


def test_the_file_alone_tells_how_to_use_it(project: Path) -> None:
    session = onnxruntime.InferenceSession(layout.ONNX, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert json.loads(metadata["descriptor"]) == "shape"
    preprocessing = json.loads(metadata["preprocessing"])
    assert preprocessing["size"] == [32, 32]
    assert set(preprocessing) == {
        *("orientation", "size", "mean", "std", "interpolation", "crop_pct", "crop_mode"),
    }
    assert preprocessing["orientation"] == "exif"
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(float)", ["batch", 3, 32, 32])
    assert (logits.name, logits.shape) == ("logits", ["batch", 3])
    assert sorted(path.name for path in layout.EXPORT.iterdir()) == [
        "classifier.onnx",
        "predict.py",
        "reduced",
    ]


def test_no_path_of_this_machine_is_in_the_file(project: Path) -> None:
    for name, content in tree(layout.EXPORT).items():
        for folder in (
            str(project),
            str(Path(classify.__file__).parent),
            str(Path(torch.__file__).parent),
            tempfile.gettempdir(),
        ):
            assert folder.encode() not in content, name
    graph = onnx.load(layout.ONNX).graph
    assert not any(node.metadata_props or node.doc_string for node in graph.node)


@pytest.mark.slow
def test_another_process_in_another_folder_writes_the_same_bytes(
    project: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "a folder elsewhere"
    elsewhere.mkdir()
    for name in ("data", "results"):
        (elsewhere / name).mkdir()
    for source in ("data/tiny", "results/split", "results/classify", "results/generate"):
        (elsewhere / source).symlink_to(project / source)
    code = (
        "from bob.stages import export; from bob.formats.params import Params;"
        "precisions = ['fp32', 'fp16', 'int8'];"
        "export.run(Params({'export': {'precisions': precisions}}, 'export'))"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        check=True,
        capture_output=True,
    )
    assert tree(elsewhere / layout.EXPORT) == tree(layout.EXPORT)


def test_logits_that_differ_are_refused_and_nothing_is_left(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(layout.EXPORT)

    def write_an_older_one(model: torch.nn.Module, trained: object, path: Path) -> None:
        path.write_bytes(before["classifier.onnx"])
        with torch.no_grad():
            next(model.parameters()).add_(1.0)

    monkeypatch.setattr(export, "write_onnx", write_an_older_one)
    with pytest.raises(BobError, match="logits differ from torch's"):
        export.run(EVERY_PRECISION)
    assert tree(layout.EXPORT) == before


def test_a_model_over_the_limit_of_one_file_is_refused_before_the_export(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MAX_BYTES", 1000)
    with pytest.raises(BobError, match="smaller network"):
        export.run(EVERY_PRECISION)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "millions"),
    [("resnet50", 23.7), ("vit_base_patch16_224", 85.9), ("clip", 86.2)],
)
def test_the_papers_networks_survive_the_export_at_their_size(
    tmp_path: Path, network: str, millions: float
) -> None:
    torch.manual_seed(0)
    if network == "clip":
        model: Any = build_classifier(CLIPVisionConfig(patch_size=16, num_labels=100))
        with torch.no_grad():  # as long as CLIP's class vectors, whose scale is 100
            model.classes.weight.copy_(100 * torch.nn.functional.normalize(torch.randn(100, 512)))
    else:
        model = timm.create_model(network, num_classes=100)
    names = tuple(f"class {number}" for number in range(100))
    preprocessing = Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
    path = tmp_path / "classifier.onnx"
    export.write_onnx(model, Trained("bird", names, preprocessing, (0,), {}), path)
    assert export.check_onnx(path, model, torch.randn(2, 3, 224, 224)) < 1e-4
    parameters = sum(weight.numel() for weight in model.parameters())
    assert round(parameters / 1e6, 1) == millions
    assert path.stat().st_size == pytest.approx(4 * parameters, rel=0.01)


def test_the_benchmark_records_accuracy_timings_and_what_they_were_taken_on(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    benchmark.run(benchmark_params([1, 4]))
    output = capfd.readouterr()
    assert output.out.splitlines()[-1].startswith("benchmark: ")
    assert "rror" not in output.err
    metrics = read_json(layout.ONNX_METRICS)
    assert metrics["top1"] == metrics["torch_top1"]
    timings = [metrics.pop("batch_1"), metrics.pop("batch_4")]
    for precision in layout.PRECISIONS:  # tests/test_precisions.py
        metrics.pop(precision)
    for timing in timings:
        assert 0 < timing["p50_ms"] <= timing["p95_ms"] <= timing["p99_ms"]
        assert 0 < timing["torch_p50_ms"] <= timing["torch_p95_ms"] <= timing["torch_p99_ms"]
        expected = timing["torch_p50_ms"] / timing["p50_ms"]
        assert timing["speedup"] == pytest.approx(expected, abs=0.01)
    assert all(isinstance(value, (str, int, float)) for value in metrics.values())
    assert all(isinstance(value, float) for timing in timings for value in timing.values())
    assert metrics["processor"]
    assert metrics["provider"].endswith("ExecutionProvider")
    with (layout.BENCHMARK / "onnxruntime.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["batch_size"] for row in table] == ["1", "4"]
    assert float(table[0]["p50_ms"]) == timings[0]["p50_ms"]
    assert (layout.BENCHMARK / "torch.csv").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_session_is_on_the_cpu_and_nothing_is_complained_of(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    session = benchmark.best_session(layout.ONNX)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert capfd.readouterr().err == ""


def test_on_a_gpu_that_no_provider_starts_on_it_is_said_why(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "computing_device", lambda: torch.device("cuda", 0))
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    session = benchmark.best_session(layout.ONNX)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: classifier.onnx runs on the CPU: TensorrtExecutionProvider ")
    assert "; CUDAExecutionProvider " in line


def test_every_runtime_gets_all_repeats_in_turns() -> None:
    calls: list[str] = []

    def runtime(name: str) -> benchmark.Run:
        def run_batch(batch: Any) -> Any:
            calls.append(name)
            return batch

        return run_batch

    times = benchmark.measure({"a": runtime("a"), "b": runtime("b")}, np.zeros((1,), np.float32), 7)
    assert {name: len(values) for name, values in times.items()} == {"a": 7, "b": 7}

    assert calls.count("a") == calls.count("b") == 7 + benchmark.ROUNDS
    assert "".join(calls).count("ba") == benchmark.ROUNDS - 1


def test_latency_percentiles_and_throughput_by_hand() -> None:
    result = benchmark.summarise([1.0, 2.0, 3.0, 4.0, 10.0], batch_size=8)
    assert result == {
        "p50_ms": 3.0,
        "p95_ms": 8.8,
        "p99_ms": 9.76,
        "images_per_second": 2000.0,
    }
