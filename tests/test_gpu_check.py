"""`python -m bench.gpu`: every path but the kernels, so that a first run on a GPU ends well."""

import json
import struct
import sys
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench import gpu
from bob.errors import BobError
from bob.models import gpus
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu.SECTIONS)
def test_a_section_runs_to_its_end(scratch, name):
    figures = gpu.run(name, scratch, tiny=True)
    assert (figures["status"], figures["reason"]) == ("ok", "")
    assert json.loads(json.dumps(figures)) == figures
    if name == "fine_tuning":  # GradScaler's path, which needs no GPU
        assert len(figures["fp16"]["losses"]) > 1 and figures["bf16"]["planned_memory"] > 0
    if name == "resume":
        assert figures["fp16"]["same_bytes"]


def test_a_section_that_fails_or_lacks_a_library_does_not_keep_the_others(
    monkeypatch, tmp_path, capsys
):
    def fails(setting):
        raise OSError("no such file: /some/where/weights.safetensors")

    def is_wrong(setting):
        return {"one": {"share": 0.123456}, "wrong": ["too slow", "too large"]}

    for function in (fails, is_wrong):
        monkeypatch.setattr(gpu, function.__name__, function, raising=False)
        section = gpu.Section("bench.gpu", function.__name__, 1)
        monkeypatch.setitem(gpu.SECTIONS, function.__name__, section)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    target = tmp_path / "new/result.json"
    names = ["fails", "onnx", "is_wrong"]
    assert gpu.main(["--tiny", "--only", *names, "--output", str(target)]) == 1
    result = json.loads(target.read_text())
    sections = result["sections"]
    assert [sections[name]["status"] for name in names] == ["failed", "skipped", "wrong"]
    assert sections["fails"]["reason"] == "OSError: no such file: weights.safetensors"
    assert sections["onnx"]["reason"] == "onnxruntime is not installed"
    assert sections["is_wrong"]["reason"] == "too slow; too large"
    assert result["shares"] == {} and result["libraries"]["torch"]
    told = capsys.readouterr().out
    assert "one / share" in told and "0.1235" in told and "fails, is_wrong failed" in told
    assert list(target.parent.iterdir()) == [target]


def test_without_a_gpu_only_tiny_runs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == "torch sees no GPU; --tiny runs on any machine\n"


def test_a_process_that_dies_or_is_too_slow_is_told(monkeypatch, tmp_path):
    slow = gpu.run_apart("resume", tmp_path, tiny=True, seconds=1)
    assert slow == {"status": "failed", "reason": "not ready after 1 s"}
    monkeypatch.setattr(sys, "executable", "/bin/false")
    died = gpu.run_apart("resume", tmp_path, tiny=True, seconds=10)
    assert died == {"status": "failed", "reason": "its process ended with 1"}


@pytest.mark.slow
def test_a_section_runs_in_a_process_of_its_own(tmp_path):
    figures = gpu.run_apart("captioner", tmp_path, tiny=True, seconds=120)
    assert figures["status"] == "ok" and figures["seconds_a_batch"] > 0


def test_a_result_names_no_folder_and_no_machine(monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "box-17")
    told = {"a": ["/home/me/.venv/lib/python3.11/x.so: box-17 has no libcublas.so.13"], "b": 1.5}
    assert gpu.anonymous(told) == {"a": ["x.so: HOST has no libcublas.so.13"], "b": 1.5}
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# --- plan ----------------------------------------------------------------------------------------


MEASURED = {
    "fine_tuning": {one: {"share_of_peak": share} for one, share in (("bf16", 0.2), ("fp32", 0.6))},
    "generation": {
        "precision": "bf16",
        "batch_1": {"denoising": {"share_of_peak": 0.15}, "decoding": {"share_of_peak": 0.5}},
        "batch_8": {"denoising": {"share_of_peak": 0.3}, "decoding": {"share_of_peak": 1.2}},
        "batch_32": gpu.OOM,
    },
    "classifiers": {"status": "failed"},
}


def result(date, sections):
    shares = gpu.shares(sections)
    return {"gpu": "NVIDIA H100 80GB HBM3", "date": date, "shares": shares, "sections": sections}


def test_plan_goes_by_the_newest_figures_of_that_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert gpus.choose("h100").seconds(0.35 * 989e12, "bf16", "finetune") == pytest.approx(1)
    gpu.write(result("2026-11-27", MEASURED), gpus.RESULTS / "new.json")
    gpu.write(result("2026-11-26", {}), gpus.RESULTS / "old.json")
    h100 = gpus.choose("h100")
    assert h100.shares == {
        "finetune": {"bf16": 0.2, "fp32": 0.6},
        "generate": {"fp32": 1.2, "bf16": 0.3},
    }
    assert h100.measured == "NVIDIA H100 80GB HBM3, 2026-11-27, bench/results/new.json"
    assert h100.seconds(0.3 * 989e12, "bf16", "generate") == pytest.approx(1)
    assert h100.seconds(1.2 * 67e12, "fp32", "generate") == pytest.approx(1)
    # Of what was not measured on it, and of other GPUs, as without.
    assert h100.seconds(0.35 * 989e12, "bf16", "classify") == pytest.approx(1)
    assert gpus.choose("h200").shares == {}


@pytest.mark.parametrize(
    "broken",
    [
        "[]",
        '{"gpu": "NVIDIA H100", "date": "2026-11-26"}',
        '{"gpu": "NVIDIA H100", "date": "2026-11-26", "shares": {"finetune": {"bf16": 0.0}}}',
        '{"gpu": "NVIDIA H100", "date": "2026-11-26", "shares": {"finetune": 0.3}}',
        '{"gpu": null, "date": "2026-11-26", "shares": {}}',
    ],
)
def test_a_result_that_is_none_is_one_line(tmp_path, monkeypatch, broken):
    monkeypatch.chdir(tmp_path)
    gpus.RESULTS.mkdir(parents=True)
    (gpus.RESULTS / "one.json").write_text(broken)
    with pytest.raises(BobError, match=r"^bench/results/one.json is no result of `make gpu-check`"):
        gpus.choose("h100")


# --- ONNX Runtime and torch on one CUDA ----------------------------------------------------------


def needed(path: Path) -> set[str]:
    """The shared libraries that a 64-bit ELF file is linked against (DT_NEEDED)."""
    data = path.read_bytes()
    start, size, count = *struct.unpack_from("<Q", data, 0x28), *struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQI", data, start + size * n) for n in range(count)]
    names = set()
    for _, kind, _, _, offset, length, link in sections:
        if kind == 6:  # SHT_DYNAMIC
            strings = sections[link][4]
            for tag, value in struct.iter_unpack("<qQ", data[offset : offset + length]):
                if tag == 1:  # DT_NEEDED
                    end = data.index(b"\0", strings + value)
                    names.add(data[strings + value : end].decode())
    return names


RUNTIME = Path(find_spec("onnxruntime").origin).parent / "capi"  # type: ignore[union-attr,arg-type]
PROVIDER = RUNTIME / "libonnxruntime_providers_cuda.so"


@pytest.mark.skipif(not PROVIDER.exists(), reason="ONNX Runtime for the CPU alone")
@pytest.mark.skipif(torch.version.cuda is None, reason="torch for the CPU alone")
def test_onnx_runtime_is_linked_against_the_cuda_that_torch_brings():
    """Nothing else on a machine with a driver has these libraries."""
    major = str(torch.version.cuda).split(".")[0]
    cuda = {name for name in needed(PROVIDER) if name.startswith("libcu")} - {"libcuda.so.1"}
    assert {f"libcudart.so.{major}", f"libcublas.so.{major}"} <= cuda
    site = Path(torch.__file__).parent.parent
    assert cuda <= {path.name for path in (site / "nvidia").rglob("lib*.so.*")}
    # The pinned ones are those of the same CUDA.
    pins = (ROOT / "constraints.txt").read_text()
    assert f"cuda-toolkit=={major}." in pins and f"nvidia-cudnn-cu{major}==" in pins
    assert any(f"nvidia-cudnn-cu{major}" in one for one in requires("onnxruntime-gpu") or ())
