"""The scripts of bench/ that measure speed, at a size where speeds mean nothing."""

import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from bench import finetune_speed, generate_speed, reading, speed
from tests.builders import build_text_to_image
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_text_to_image(tmp_path_factory.mktemp("models") / "base")


def run(script, capsys, monkeypatch, *arguments):
    """Run a script; returns its exit status and what it printed."""
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--peak-tflops", "1", "--repeats", "1"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    return ended.value.code, capsys.readouterr().out


def test_fine_tuning_is_compared_with_and_without_the_text_encoder(base, capsys, monkeypatch):
    arguments = ("--base", str(base), "--photos", "4", "--batch", "2", "--precision", "fp32")
    monkeypatch.setattr(finetune_speed, "BOUND", 0.0)
    status, told = run(finetune_speed, capsys, monkeypatch, *arguments)
    assert status == 0
    assert told.count("times as fast") == told.count("ok ") == 2
    assert told.count("of peak") == 4


def test_generation_that_misses_its_bound_ends_with_status_1(base, capsys, monkeypatch):
    arguments = ("--base", str(base), "--batch", "2", "--calls", "1", "--steps", "2")
    monkeypatch.setattr(generate_speed, "EQUAL", 0.0)
    monkeypatch.setattr(generate_speed, "BATCHED", 1e9)
    status, told = run(generate_speed, capsys, monkeypatch, *arguments, "--default-steps", "4")
    assert status == 1
    assert (told.count("ok "), told.count("BAD ")) == (2, 2)


def test_utilisation_is_of_the_peak_in_the_precision_computed_in(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    side = speed.Side("one", lambda: 1, peak_bytes=2**30, rates=[10.0])
    for dtype, share in ((torch.bfloat16, "0.1%"), (torch.float32, "1.5%")):
        speed.report([side], [1e11], dtype, None)
        assert f" {share} of peak" in capsys.readouterr().out


def test_reading_is_measured_of_every_stage_that_reads_images():
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(
            reading.main, ["--images", "4", "--side", "64", "--photo-side", "80"]
        )
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    told = result.output
    assert all(name in told for name in ("split", "caption", "finetune", "audit", "evaluate"))
    assert told.count("classify") == 2


@pytest.mark.slow
def test_the_scripts_need_no_dvc():
    """A machine with a GPU that has torch and diffusers need have no more."""
    code = (
        "import sys, bench.finetune_speed, bench.generate_speed, bench.gpu, bench.gpu_diffusion,"
        "bench.gpu_captioner;"
        "print([name for name in ('dvc', 'dvclive', 'jsonschema', 'timm') if name in sys.modules])"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert told.strip() == "[]"
