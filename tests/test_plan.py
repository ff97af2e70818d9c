"""`bob plan`: what it foresees is what DVC and the stages then do."""

import importlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CLIPTextConfig

from bob.cli import cli
from bob.commands.plan import (
    duration,
    forecast_of,
    metric,
    networks,
    notes,
    project_of,
    to_do,
)
from bob.commands.plan.shapes import measure
from bob.commands.plan.work import STAGES, Work
from bob.commands.study.results import Row, write_results
from bob.dvc.forecast import MAY_RUN, RESTORED, RUNS, UP_TO_DATE
from bob.dvc.pipeline import Pipeline
from bob.errors import BobError
from bob.formats import params
from bob.formats.params import Params
from bob.formats.photos import Task
from bob.models import denoising, gpus
from bob.models.backbones import open_backbone
from bob.models.lora import add_lora
from tests.builders import build_clip, build_text_to_image
from tests.conftest import ROOT
from tests.dvc_project import dvc, make_project, ran, restored, set_params

TASK = Task("aircraft", ("747-300", "747-400", "A320", "A330", "MD-80"))
GPU = gpus.GPUS["t4"]  # auto is fp32 there, as on most CPUs
BEFORE = ("draw", "split", "caption", "finetune")


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """A project that has run up to its classifiers."""
    folder = make_project(tmp_path_factory.mktemp("plan") / "project")
    dvc(folder, "repro", "classify")
    return folder


@pytest.fixture
def project(reproduced, monkeypatch):
    """The same as the current folder; its parameters and workspace come back afterwards."""
    monkeypatch.chdir(reproduced)
    original = (reproduced / "params.yaml").read_text()
    yield reproduced
    (reproduced / "params.yaml").write_text(original)


def planned():
    """States and work, by stage."""
    of = Params(params.load(), "plan")
    with Pipeline() as pipeline:
        forecast = forecast_of(pipeline, of)
        with project_of(of, forecast, GPU) as project:
            return forecast.states, to_do(project)


def command(*arguments):
    result = CliRunner().invoke(cli, ["plan", *arguments])
    return result.exit_code, result.output


# --- what is there already ---------------------------------------------------------------------


@pytest.mark.slow
def test_in_a_fresh_clone_everything_is_to_be_done(tmp_path, monkeypatch):
    folder = make_project(tmp_path / "fresh")
    monkeypatch.chdir(folder)
    states, work = planned()
    assert set(states.values()) <= {RUNS, MAY_RUN} and set(work) == set(STAGES)
    assert work["split"].what == "2 classes, 4 train, 72 val, 72 test"
    assert work["caption"].items == "at most 8 new"
    assert work["finetune"].what == "2 steps of 2, 4 photos"
    assert work["generate"].items == "at most 4 new"
    assert work["classify"].items == "at most 2 new"

    # The command itself, without any weights, for a GPU that is too small for it.
    for weights in folder.glob("models/**/*.safetensors"):
        weights.unlink()
    monkeypatch.setitem(gpus.GPUS, "tiny", gpus.Gpu("tiny", 1, 1, 10**6, "none"))
    code, output = command("--gpu", "tiny")
    assert code == 0
    assert re.search(r"^total .* [GT] ", output, re.MULTILINE)
    assert "models/miniature-base holds no weights" in output
    assert "generate does not fit into tiny" in output and "lower generate.batch_size" in output
    assert "set finetune.precision to fp16" not in output  # it is in bf16 there

    # What is asked is about the GPU: fp16 on this machine, which has none, would be an error.
    monkeypatch.setitem(gpus.GPUS, "old", gpus.Gpu("old", 65, 8.1, 10**5, "none", bf16=False))
    small = ["-S", "caption.batch_size=1", "-S", "generate.precision=fp16"]
    code, output = command("--gpu", "old", *small, "-S", "finetune.gradient_checkpointing=true")
    assert code == 0
    auto = "caption.precision, finetune.precision, classify.precision"
    assert f"products in fp16 are 8 times as fast: {auto}" in output
    advice = dict(re.findall(r"^(\w+) does not fit into old: .*; (.*)$", output, re.MULTILINE))
    assert advice["caption"] == "set caption.precision to fp16"
    assert advice["finetune"] == (
        "set finetune.precision to fp16 or raise finetune.gradient_accumulation"
    )
    assert advice["generate"] == "lower generate.batch_size"
    smallest = [*small, "-S", "caption.precision=fp16"]
    assert re.search(
        r"caption does not .*; take a smaller model or", command("--gpu", "old", *smallest)[1]
    )

    # 4 images in batches of 2: two GPUs make them in half the time, more in no less; finetune has
    # one. What is held and does not compute is paid for as well.
    assert [work["generate"].seconds(GPU, count) for count in (2, 3)] == [
        work["generate"].seconds(GPU) / 2
    ] * 2
    assert work["finetune"].seconds(GPU, 8) == work["finetune"].seconds(GPU)
    code, output = command("--gpu", "tiny", "--gpus", "2", "--price", "3600")
    found = re.search(
        r"cost: (\S+) GPU-hours at 3600 are (\S+); the GPUs compute for (\S+)", output
    )
    assert code == 0 and "2 x tiny" in output and found
    held, cost, busy = (float(number.replace(",", "")) for number in found.groups())
    assert cost == pytest.approx(3600 * held, rel=0.05) and held / 2 < busy < held


def test_an_endpoint_is_asked_and_a_long_tail_is_filled_up(tmp_path, monkeypatch):
    folder = make_project(tmp_path / "fresh")
    set_params(
        folder,
        {
            "data": {"shots": 4, "imbalance": 4},
            "caption": {"model": "models/served"},
            "generate": {"images_per_class": 10},
        },
    )
    (folder / "models/served").mkdir()
    (folder / "models/served/endpoint.json").write_text('{"url": "http://no/v1", "model": "m"}')
    monkeypatch.chdir(folder)
    _, work = planned()
    assert work["caption"].items == "at most 10 new"  # two of each of 4 + 1 photos
    assert not work["caption"].flops and not work["caption"].memory
    assert work["generate"].what.startswith("23 images")  # 10 and 10 + 4 - 1
    assert "models/served" not in command()[1]


@pytest.mark.slow
def test_after_a_run_there_is_nothing_to_do(project):
    states, work = planned()
    assert {states[stage] for stage in (*BEFORE, "generate", "classify")} == {UP_TO_DATE}
    assert "classify" not in work
    code, output = command()
    assert code == 0
    assert re.search(r"^generate +up to date +- +-", output, re.MULTILINE)


@pytest.mark.slow
def test_of_more_images_only_the_missing_ones_are_new(project):
    set_params(project, {"generate": {"images_per_class": 5}})
    states, work = planned()
    assert {states[stage] for stage in BEFORE} == {UP_TO_DATE}
    assert (states["generate"], work["generate"].items) == (RUNS, "4 reused, 6 new")
    assert (states["classify"], work["classify"].items) == (MAY_RUN, "1 reused, at most 1 new")


@pytest.mark.slow
def test_of_more_shots_only_the_missing_answers_are_new(project):
    set_params(project, {"data": {"shots": 3}})
    states, work = planned()
    assert states["split"] == RUNS
    assert (states["caption"], work["caption"].items) == (MAY_RUN, "8 reused, 4 new")
    assert work["generate"].items == "at most 4 new"


@pytest.mark.slow
def test_what_the_run_cache_has_is_restored(project):
    """Also the stages after it, which read what is not in the workspace yet."""
    set_params(project, {"generate": {"guidance_scale": 2.5}})
    states, work = planned()
    assert (states["generate"], work["generate"].items) == (RUNS, "0 reused, 4 new")
    assert ran(dvc(project, "repro", "classify")) == {"generate", "classify"}

    set_params(project, {"generate": {"guidance_scale": 2.0}, "classify": {"seeds": [0, 1]}})
    states, work = planned()
    assert states["generate"] == RESTORED and "generate" not in work
    # The images are in DVC's cache alone, and the classifiers of seed 0 were trained on them.
    assert (states["classify"], work["classify"].items) == (RUNS, "2 reused, 2 new")

    set_params(project, {"classify": {"seeds": [0]}})
    states, _ = planned()
    assert {states["generate"], states["classify"]} == {RESTORED}
    assert restored(dvc(project, "repro", "classify")) == {"generate", "classify"}


@pytest.mark.slow
def test_an_output_that_dvc_does_not_link_is_twice_on_the_disk(project):
    set_params(project, {"generate": {"images_per_class": 5}, "data": {"shots": 3}})
    _, once = planned()
    assert once["split"].disk == 0  # photos of the stage draw, which are linked
    assert "disk: twice" not in command()[1]
    dvc(project, "config", "--local", "cache.type", "copy")
    try:
        _, twice = planned()
        assert "disk: twice, in the workspace and in DVC's cache" in command()[1]
    finally:
        dvc(project, "config", "--local", "--unset", "cache.type")
    photos = project / "data/miniature"
    assert 0 < twice["split"].disk < sum(path.stat().st_size for path in photos.rglob("*.png"))
    assert twice["generate"].disk == 2 * once["generate"].disk > 0


@pytest.mark.slow
def test_other_parameters_are_planned_without_writing_them(project):
    before = (project / "params.yaml").read_bytes()
    overrides = ["-S", "generate.images_per_class=5", "-S", "classify.seeds=[0,1]"]
    _, output = command(*overrides)
    assert (project / "params.yaml").read_bytes() == before
    assert "parameter generate.images_per_class 2 -> 5" in output
    assert re.search(r"^generate +runs +10 images .* 4 reused, 6 new ", output, re.MULTILINE)

    # The same as with the file so changed, down to what DVC reads of it: paths of dependencies too.
    set_params(project, {"generate": {"images_per_class": 5}, "classify": {"seeds": [0, 1]}})
    assert command()[1] == output
    # On another GPU it would be made in another precision.
    (project / "params.yaml").write_bytes(before)
    set_params(project, {"generate": {"precision": "bf16", "images_per_class": 5}})
    assert " 0 reused, 10 new " in command("--gpu", "t4", "-S", "generate.precision=fp16")[1]
    (project / "params.yaml").write_bytes(before)
    shutil.copytree(project / "models/miniature-backbone", project / "models/other")
    try:
        (project / "models/other/README.md").write_text("another")
        _, output = command("-S", "classify.backbone=models/other")
    finally:
        shutil.rmtree(project / "models/other")
    assert re.search(r"^generate +up to date ", output, re.MULTILINE)
    assert re.search(r"^classify +runs .* models/other", output, re.MULTILINE)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("generate.steps=1,2", r"-S generate.steps=1,2 stands for several experiments; .*"),
        ("generate.stepz=1", r"-S generate.stepz=1: Could not override 'generate.stepz'.*"),
        ("generate.steps", r"-S generate.steps: .*"),
        ("other.yaml:steps=1", r"-S other.yaml:steps=1: parameters of params.yaml can be set, .*"),
        ("generate.steps=0", r"params.yaml: generate.steps is 0; allowed: .*"),
        ("+generate.stepz=1", r"params.yaml: generate.stepz is not a known key; did you mean .*"),
    ],
)
def test_a_wrong_override_is_one_line(monkeypatch, override, said):
    monkeypatch.chdir(ROOT)
    code, output = command("-S", override)
    assert code == 1 and re.fullmatch(f"Error: {said}\n", output)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "key"),
    [("finetune", "base_model"), ("caption", "model"), ("classify", "backbone")],
)
def test_a_model_that_is_missing_or_another_is_one_line(project, section, key):
    set_params(project, {section: {key: "models/none"}})
    code, output = command()
    assert code == 1
    assert output == (
        f"Error: {section}.{key}: models/none is missing; `dvc pull` or `bob fetch` brings it\n"
    )
    (project / "models/none").mkdir()
    try:
        (project / "models/none/config.json").write_text("{}")
        code, output = command()
    finally:
        shutil.rmtree(project / "models/none")
    assert code == 1
    assert re.fullmatch(r"Error: models/none: no .* by its config files \(.*\)\n", output)


# --- FLOPs -------------------------------------------------------------------------------------


def flops_of(call):
    """Counted while it runs; with the formulas of a GPU's fused attention for the CPU's."""
    aten = torch.ops.aten

    def forward(query, key, value, *_, out_shape=None, **__):
        return sdpa_flop_count(query, key, value)

    def backward(grad, query, key, value, *_, out_shape=None, **__):
        return sdpa_backward_flop_count(grad, query, key, value)

    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("caption", {"data": {"shots": 3}, "caption": {"batch_size": 3}}),
        ("finetune", {"finetune": {"epochs": 2, "batch_size": 3, "rank": 3}}),
        ("generate", {"generate": {"images_per_class": 3, "sampler": "pndm", "steps": 3}}),
        ("generate", {"generate": {"guidance_scale": 1}}),
        ("classify", {"classify": {"epochs": 12, "batch_size": 3, "seeds": [5]}}),
    ],
)
def test_flops_are_those_of_the_stage(project, tmp_path, monkeypatch, stage, changes):
    copy = tmp_path / "copy"
    shutil.copytree(project, copy)
    monkeypatch.chdir(copy)
    set_params(copy, changes)
    if stage == "caption":
        importlib.import_module("bob.stages.split").run(params.for_stage("split"))
    _, work = planned()
    module = importlib.import_module(f"bob.stages.{stage}")
    counted = flops_of(lambda: module.run(params.for_stage(stage)))
    assert counted > 0
    assert sum(work[stage].flops.values()) == pytest.approx(counted, rel=0.05)


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """The config files of Stable Diffusion 1.5, no weights."""
    folder = tmp_path_factory.mktemp("sd")
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
    unet.save_config(folder / "unet")
    vae.save_config(folder / "vae")
    CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    ).save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}'
    )
    return networks.text_to_image(folder)


def test_stable_diffusion_has_its_published_size(stable_diffusion):
    def millions(part):
        return sum(parameter.numel() for parameter in part.parameters()) / 1e6

    assert millions(stable_diffusion.unet) == pytest.approx(859.52, abs=0.01)
    assert millions(stable_diffusion.text_encoder) == pytest.approx(123.06, abs=0.01)
    assert millions(stable_diffusion.vae) == pytest.approx(83.65, abs=0.01)
    denoise = networks.denoise(stable_diffusion, 1)
    # 339 GMAC without attention's own two products, which are another 62 at 64 x 64 latents.
    assert denoise.flops == pytest.approx(2 * (339e9 + 62e9), rel=0.01)
    assert networks.denoise(stable_diffusion, 4).flops == 4 * denoise.flops


def test_another_pipeline_is_refused_as_the_stages_refuse_it(tmp_path):
    folder = build_text_to_image(tmp_path / "base")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionXLPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(BobError, match=r"base: no Stable Diffusion \(1\.x or 2\.x\) .*XLPipeline"):
        networks.text_to_image(folder)


# --- memory ------------------------------------------------------------------------------------


def test_the_peak_is_what_is_alive_at_once():
    network = nn.Sequential(nn.Linear(100, 1000), nn.ReLU(), nn.Linear(1000, 10)).to("meta")
    images = torch.empty(64, 100, device="meta")
    with torch.no_grad():  # the hidden layer before and after the ReLU
        assert measure(lambda: network(images)).peak == 4 * 64 * (1000 + 1000)
    # At the last: what the ReLU saved, its gradient before and after, and the second layer's.
    step = measure(lambda: network(images).sum().backward()).peak
    assert 4 * (3 * 64 * 1000 + 10 * 1000) <= step < 1.1 * 4 * (3 * 64 * 1000 + 10 * 1000)


def test_the_peak_on_meta_is_that_on_real_tensors():
    folder = ROOT / "models/miniature-backbone"
    real = open_backbone(folder).trainable(TASK, 0).train()
    step = measure(lambda: real(torch.randn(8, 3, 64, 64)).sum().backward())
    meta = networks.Classifier(folder, TASK).training_step(8)
    assert meta.flops == step.flops
    assert meta.peak == pytest.approx(step.peak, rel=0.05)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_clip_is_counted_with_its_texts_and_its_lora(tmp_path, lora_rank):
    folder = build_clip(tmp_path / "clip")
    backbone = open_backbone(folder)
    real = backbone.trainable(TASK, lora_rank).train()
    side = backbone.preprocessing.size[0]
    flops = flops_of(lambda: real(torch.randn(8, 3, side, side)).sum().backward())
    network = networks.Classifier(folder, TASK, lora_rank)
    assert network.training_step(8).flops == pytest.approx(flops, rel=0.05)
    held, changing = network.weights_in_training
    trained = sum(w.nbytes for w in real.parameters() if w.requires_grad)
    assert changing == trained
    assert (held > 2 * changing) == bool(lora_rank)
    kept = backbone.classifier(real).state_dict().values()
    assert network.weights == pytest.approx(sum(w.nbytes for w in kept), rel=0.01)


def test_attention_needs_no_memory_for_its_matrix(stable_diffusion):
    # Eight heads of 4096 x 4096 alone would be 537 MB.
    assert networks.denoise(stable_diffusion, 1).peak < 200e6


def test_gradient_checkpointing_is_counted(tmp_path):
    """Every base has attention in the layers that are computed again in backward()."""

    def step(checkpointing):
        pipeline = networks.text_to_image(build_text_to_image(tmp_path / "base"))
        with networks.META:
            add_lora(pipeline, 2, seed=0)
        if checkpointing:
            denoising.checkpoint_gradients(pipeline)
        return networks.fine_tuning_step(pipeline, 8)

    usual, twice = step(False), step(True)
    assert twice.peak < usual.peak
    assert 1.1 * usual.flops < twice.flops < 1.5 * usual.flops


# --- GPUs and numbers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", "t4"),
    ],
)
def test_a_gpu_is_recognised(device, name):
    assert gpus.recognise(device) == gpus.GPUS[name]


def test_other_gpus_are_not_taken_for_these():
    for device in ("NVIDIA L40", "NVIDIA GeForce GTX 1080", "NVIDIA A10", "Tesla V100-SXM2-16GB"):
        assert gpus.recognise(device) is None


def test_an_unknown_gpu_is_one_line():
    assert gpus.choose("H100") == gpus.GPUS["h100"]
    with pytest.raises(BobError, match=r"^--gpu h10 is not .*; did you mean h100\?$"):
        gpus.choose("h10")
    with pytest.raises(BobError, match=r"known are h100, "):
        gpus.choose("xyz")


def test_a_plan_says_where_its_share_of_the_peak_is_from(tmp_path, monkeypatch):
    """Measured of the kind of work that it is, and else assumed."""
    assert "of the TFLOP/s 35% is assumed to be reached" in notes._shares(gpus.choose("l4"))
    monkeypatch.chdir(tmp_path)
    gpus.RESULTS.mkdir(parents=True)
    shares = {"generate": {"bf16": 0.14, "fp32": 0.7}, "classify": {"bf16": 0.07}}
    measured = {"gpu": "NVIDIA L4", "date": "2026-11-26", "shares": shares}
    (gpus.RESULTS / "nvidia-l4.json").write_text(json.dumps(measured))
    l4 = gpus.choose("l4")
    assert notes._shares(l4) == (
        "of the TFLOP/s reached, measured on NVIDIA L4, 2026-11-26, bench/results/nvidia-l4.json: "
        "generate 14% in bf16, generate 70% in fp32, classify 7% in bf16; 35% is assumed of other "
        "work"
    )
    flops = {"bf16": 121e12}
    for kind, seconds in (("generate", 1 / 0.14), ("classify", 1 / 0.07), ("", 1 / 0.35)):
        assert Work("", flops=flops, kind=kind).seconds(l4) == pytest.approx(seconds)


def test_what_half_the_images_lose_is_told_from_the_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert notes._half(100) == []
    found = {25: (80.0, 82.0), 50: (81.0, 85.0), 100: (83.0, 85.0)}
    rows = [
        Row(
            f"images-{count}",
            ("" if count == 50 else f"generate.images_per_class={count}", seed),
            "",
            "",
            {"images": 8.0 * count, "real_and_synthetic.top1": top1},
        )
        for count, tops in found.items()
        for seed, top1 in enumerate(tops, start=11)
    ]
    stale = Row("images-50", ("", 13), "earlier", "", rows[2].metrics)
    rows += [stale, replace(rows[4], run=(rows[4].run[0], 13))]
    rows.append(Row("other", ("generate.images_per_class=100 data.shots=2", 11), "", "", {}))
    unpaired = ("generate.images_per_class=200", 11)
    rows.append(Row("images-200", unpaired, "earlier", "", rows[2].metrics | {"images": 1600.0}))
    Path("docs").mkdir()
    write_results(Path("docs/miniature-study.csv"), rows)
    for asked, whole in {1: 50, 60: 50, 80: 100, 5000: 100}.items():
        (line,) = notes._half(asked)
        assert f"{whole // 2} a class instead of {whole} came to" in line
    assert "-1.0 points of top-1, -13.7 to +11.7 with 95 %" in notes._half(100)[0]
    assert "-2.0 points of top-1, -14.7 to +10.7 with 95 %" in notes._half(50)[0]
    write_results(Path("docs/miniature-study.csv"), rows[::2])
    assert notes._half(100)[0].endswith("-2.0 points of top-1")


def test_time_follows_precision_and_numbers_have_units():
    assert gpus.GPUS["h100"].precision("auto") == "bf16" and GPU.precision("auto") == "fp32"
    flops = 0.35 * 67e12 * 3600
    assert gpus.GPUS["h100"].seconds(flops, "fp32") == pytest.approx(3600)
    assert [duration(s) for s in (0, 0.1, 45, 600, 9000)] == [
        *("-", "< 1 s", "45 s", "10 min", "2.5 h")
    ]
    assert [metric(n) for n in (0, 7, 999_999, 1234567)] == ["-", "7", "1 M", "1.23 M"]
    assert metric(80e9, "B") == "80 GB"
