"""`bob fetch` against a real HTTP server that speaks the Hub's protocol, on this machine."""

import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import constants
from ruamel.yaml import YAML

from bob.cli import cli
from bob.commands import fetch as fetching
from bob.commands.fetch.hub import parse
from bob.commands.fetch.tracked import read_origin
from bob.commands.fetch.wanted import wanted
from bob.errors import BobError
from bob.formats import params
from tests.conftest import ROOT
from tests.hub import Hub, commit_of, serving

PLAIN = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"p"}
PICKLED = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
INDEX = b"""{
  "_class_name": "StableDiffusionPipeline",
  "_diffusers_version": "0.6.0",
  "feature_extractor": ["transformers", "CLIPImageProcessor"],
  "image_encoder": [null, null],
  "requires_safety_checker": true,
  "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
  "scheduler": ["diffusers", "PNDMScheduler"],
  "text_encoder": ["transformers", "CLIPTextModel"],
  "tokenizer": ["transformers", "CLIPTokenizer"],
  "unet": ["diffusers", "UNet2DConditionModel"],
  "vae": ["diffusers", "AutoencoderKL"]
}"""
# As in the published Stable Diffusion 1.5, with a few more.
OF_A_PIPELINE = {
    *("model_index.json", "README.md", "LICENSE", "scheduler/scheduler_config.json"),
    *("text_encoder/config.json", "text_encoder/model.safetensors"),
    *("tokenizer/merges.txt", "tokenizer/vocab.json", "tokenizer/tokenizer_config.json"),
    *("tokenizer/special_tokens_map.json", "unet/config.json", "vae/config.json"),
    *("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
}
NOT_OF_A_PIPELINE = {
    *(".gitattributes", "v1-inference.yaml", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors"),
    *("feature_extractor/preprocessor_config.json", "safety_checker/config.json"),
    *("safety_checker/model.safetensors", "safety_checker/pytorch_model.bin"),
    *("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"),
    *("unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_flax_model.msgpack"),
    *("text_encoder/model.fp16.safetensors", "text_encoder/openvino_model.xml"),
    *("unet/model.onnx", "vae_decoder/model.onnx", "vae/openvino_model.bin"),
    *("unet/diffusion_pytorch_model.safetensors.index.fp16.json", "sd.gguf"),
}
OF_A_CLIP = {
    *("config.json", "merges.txt", "model.safetensors", "preprocessor_config.json", "README.md"),
    *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
}
NOT_OF_A_CLIP = {
    *(
        "flax_model.msgpack",
        "pytorch_model.bin",
        "tf_model.h5",
        "onnx/model.onnx",
        ".gitattributes",
    ),
    *("onnx/config.json", "model.fp16.safetensors", "open_clip_model.safetensors"),
}
OF_A_QWEN = {
    *("config.json", "generation_config.json", "chat_template.jinja", "preprocessor_config.json"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json"),
    *("model.safetensors.index.json", "LICENSE", "merges.txt", "vocab.json"),
}
NOT_OF_A_QWEN = {
    *("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "figures/bench.png"),
    *("model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json", "q4.gguf"),
    *("consolidated.safetensors", "original/params.json", "modeling_qwen.py"),
}


def repository(names):
    return {name: INDEX if name == "model_index.json" else name.encode() for name in names}


@pytest.fixture
def hub(monkeypatch):
    """A server with a small model, as the Hub of this process."""
    hub = Hub()
    hub.add("org/plain", PLAIN)
    with serving(hub):
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(time, "sleep", lambda _: None)  # before it asks again
        yield hub


@pytest.fixture(scope="module")
def empty_project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, check=True, cwd=folder)
    (folder / "models").mkdir()
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    return folder


@pytest.fixture
def project(empty_project, workspace, monkeypatch):
    """A DVC repository as the current folder, and as the home of the Hub's client."""
    shutil.copytree(empty_project, workspace, dirs_exist_ok=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(workspace / "home"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(workspace / "home/token"))
    return workspace


@pytest.fixture
def untracked(project, monkeypatch):
    """A project in which `dvc add`, which takes a second, writes its file and does nothing else."""

    def add(folder):
        path = Path(f"{folder}.dvc")
        kept = params.read_yaml(path) if path.exists() else {}
        with path.open("w") as file:
            YAML().dump(kept | {"outs": [{"path": folder.name, "size": 9}]}, file)

    monkeypatch.setattr(fetching, "add", add)
    return project


def fetch(*arguments):
    return CliRunner().invoke(cli, ["fetch", *arguments])


def fetched(*arguments):
    result = fetch(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def told(*arguments):
    """The one line of a failure."""
    result = fetch(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1
    return result.stderr


def origin_of(name):
    origin = read_origin(Path("models") / name)
    assert origin is not None
    return origin


def listing(folder="models"):
    return {
        path.relative_to(folder).as_posix()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != ".lock"
    }


# --- what comes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("comes", "stays"),
    [
        (OF_A_PIPELINE, NOT_OF_A_PIPELINE),
        (OF_A_CLIP, NOT_OF_A_CLIP),
        (OF_A_QWEN, NOT_OF_A_QWEN),
        ({"config.json", "model.safetensors"}, {"pytorch_model.bin"}),
    ],
    ids=["Stable Diffusion", "CLIP", "Qwen", "timm"],
)
def test_what_the_loaders_read_comes_and_nothing_else(hub, untracked, comes, stays):
    hub.add("org/model", repository(comes | stays))
    output = fetched("org/model")
    assert listing("models/model") == comes
    assert set(hub.asked) == comes, "nothing else was asked for"
    assert f": {len(comes)} files (" in output
    assert f"{len(stays)} file{'s' * (len(stays) > 1)} (" in output
    assert origin_of("model").left_out == tuple(sorted(stays))


def test_a_fetched_model_is_tracked_with_the_commit_that_its_revision_was(hub, project):
    output = fetched("org/plain@main", "models/mine")
    commit = commit_of(PLAIN)
    assert f"org/plain@main is commit {commit}" in output
    assert listing("models/mine") == {"config.json", "model.safetensors"}
    assert Path("models/mine/model.safetensors").read_bytes() == b"weights"
    kept = params.read_yaml(Path("models/mine.dvc"))
    assert kept["outs"][0]["path"] == "mine"
    assert kept["meta"]["hub"] == {
        "repository": "org/plain",
        "revision": "main",
        "commit": commit,
        "left_out": ["pytorch_model.bin"],
    }
    assert "/mine" in (project / "models/.gitignore").read_text()
    subprocess.run(
        [sys.executable, "-m", "dvc", "add", "--quiet", "models/mine"], check=True, cwd=project
    )
    assert origin_of("mine").commit == commit, "DVC keeps it"


def test_a_branch_a_tag_a_pull_request_and_a_commit_short_or_full_are_revisions(hub, untracked):
    other = {"v1": PLAIN | {"README.md": b"v1"}, "refs/pr/3": PLAIN | {"README.md": b"3"}}
    main = hub.add("org/plain", PLAIN, **other)
    for n, (revision, commit) in enumerate(
        {
            "v1": commit_of(other["v1"]),
            "refs/pr/3": commit_of(other["refs/pr/3"]),
            commit_of(other["v1"]): commit_of(other["v1"]),
            main[:7]: main,
        }.items()
    ):
        assert f"is commit {commit}" in fetched(f"org/plain@{revision}", f"models/{n}")
        origin = origin_of(f"{n}")
        assert (origin.revision, origin.commit) == (revision, commit)
    assert "no commits of main begin with 1234567" in told("org/plain@1234567", "models/x")


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "models/qwen2.5-vl-7b-instruct"),
        ("timm/resnet50.tv_in1k", "models/resnet50.tv_in1k"),
        ("gpt2", "models/gpt2"),
    ],
)
def test_a_folders_default_name_is_the_models_and_one_for_params(model, folder):
    named = fetching.default_folder(parse(f"{model}@main")[0])
    assert named == Path(folder)
    values = params.load(ROOT / "params.yaml")
    values["classify"]["backbone"] = str(named)
    params.check(Path("params.yaml"), values, params.schema())


# --- what does not come ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "folder", "said"),
    [
        ("org/plain@", "models/x", "'org/plain@' is not ID or ID@REVISION"),
        ("org//plain", "models/x", "is not ID or ID@REVISION"),
        ("org/plain", "elsewhere/x", "models live in models/<name>"),
        ("org/plain", "models/.x", "take a name that does not begin with a dot"),
        ("org/plain", "models/taken", "models/taken exists"),
        ("org/plain", "models/away", "models/away.dvc tracks one; `dvc pull models/away.dvc`"),
        ("org/plain@mian", "models/x", "org/plain has no revision 'mian'; it has main, and"),
        ("org/plane", "models/x", "the Hub has no model org/plane that is public; else set HF_"),
        ("org/plane", "models/x", "/models?search=plane finds how it is spelt"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing(hub, untracked, model, folder, said):
    Path("models/taken").mkdir()
    Path("models/away.dvc").touch()
    assert said in told(model, folder)
    assert listing() == {"away.dvc"}
    assert hub.asked == []


def of_a_pipeline(**changed):
    files = repository(OF_A_PIPELINE)
    half = "unet/diffusion_pytorch_model.fp16.safetensors"
    del files["unet/diffusion_pytorch_model.safetensors"]
    return files | {half: b"half"} | {name.replace("__", "/"): c for name, c in changed.items()}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (PICKLED, "has no safetensors weights, and pickled ones are not loaded; http"),
        (PICKLED, "/org/x/discussions may have a pull request with them: bob fetch org/x@refs/pr"),
        ({"x.gguf": b"", "README.md": b""}, "is no model in the format of diffusers, transformer"),
        (
            of_a_pipeline(),
            "org/x@main has of its unet only the variant "
            "unet/diffusion_pytorch_model.fp16.safetensors, which nothing here loads; take a "
            "revision or a repository that has unet/diffusion_pytorch_model.safetensors (http",
        ),
        (
            PICKLED | {"model.fp16-00001-of-00002.safetensors": b""},
            "org/x@main has only the variant model.fp16-00001-of-00002.safetensors, which",
        ),
        (
            {"model_index.json": b'{"_class_name": "StableDiffusionXLPipeline"}'},
            "org/x@main is a StableDiffusionXLPipeline, and bob loads a StableDiffusionPipeline",
        ),
        ({"model_index.json": b"[]"}, "org/x@main: its model_index.json is no JSON object"),
    ],
)
def test_what_bob_does_not_load_is_told_before_any_of_it_comes(hub, untracked, files, said):
    hub.add("org/x", files)
    assert said in told("org/x")
    assert listing() == set()
    assert set(hub.asked) <= {"model_index.json"}


def test_safetensors_on_a_pull_request_are_pointed_to(hub, untracked):
    converted = {"refs/pr/2": PICKLED | {"a": b""}, "refs/pr/11": PLAIN, "refs/pr/9": PLAIN}
    hub.add("org/x", PICKLED, **converted)
    assert "refs/pr/11, refs/pr/9 have them: bob fetch org/x@refs/pr/11 models/x\n" in told("org/x")
    assert fetched("org/x@refs/pr/11")


def test_a_gated_model_wants_its_terms_accepted_and_a_token_which_is_kept_nowhere(
    hub, untracked, monkeypatch
):
    hub.repositories["org/plain"].needs = "GatedRepo"
    line = told("org/plain")
    assert f"org/plain is gated: accept its terms on {hub.url}/org/plain and set HF_TOKEN" in line
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "with the account that HF_TOKEN is of" in told("org/plain")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert "hf_mine" not in fetched("org/plain")
    for file in listing("."):
        assert b"hf_mine" not in Path(file).read_bytes(), file


def test_a_private_model_is_told_like_one_that_is_missing(hub, untracked, monkeypatch):
    hub.repositories["org/plain"].needs = "RepoNotFound"
    assert "no model org/plain that is public; else set HF_TOKEN to a" in told("org/plain")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "no model org/plain that the account of HF_TOKEN may see" in told("org/plain")


def test_a_token_that_the_hub_does_not_know_is_told(hub, untracked, monkeypatch):
    hub.repositories["org/plain"].needs = "Invalid credentials in Authorization header"
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    assert "org/plain@main: the Hub does not know the token in HF_TOKEN; set HF_TOKEN to" in told(
        "org/plain"
    )


def test_a_limit_of_requests_is_told_with_how_long_to_wait(hub, untracked):
    hub.limited = True
    assert "run it again in 55 seconds, or set HF_TOKEN" in told("org/plain")


def test_no_network_by_wish_or_not_is_told(hub, untracked, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    line = told("org/plain")
    assert "org/plain@main could not be fetched: " in line
    assert "the same command goes on" in line
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; unset it" in told("org/plain")


def test_a_full_disk_is_told_before_anything_comes(hub, untracked, monkeypatch):
    usage = shutil.disk_usage(".")
    Path(".dvc/config").write_text("[cache]\n    type = copy\n")
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: usage._replace(free=5))
    line = told("org/plain")
    assert "models/.fetch/plain/" in line
    assert "has 5 bytes free, and 18 bytes are needed, of which 9 bytes are DVC's copy" in line
    assert hub.asked == []
    assert not Path("models/plain").exists()
    Path(".dvc/config").write_text("[cache]\n    type = hardlink\n")
    assert "and 9 bytes are needed; free space" in told("org/plain")


# --- breaks ----------------------------------------------------------------------------------


def test_a_download_that_breaks_off_goes_on_with_what_is_missing(hub, untracked):
    hub.broken.add("model.safetensors")
    assert "the same command goes on with what is missing" in told("org/plain")
    assert not Path("models/plain").exists()
    hub.broken.clear()
    hub.asked.clear()
    assert "; 2 bytes are here from a call before" in fetched("org/plain")
    assert hub.asked == ["model.safetensors"]
    assert listing("models/plain") == {"config.json", "model.safetensors"}
    assert listing("models/.fetch") == set()


def test_a_download_that_is_killed_goes_on_with_what_is_missing(hub, untracked):
    hub.waiting.add("model.safetensors")
    hub_of_it = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    of_tests = {key: value for key, value in os.environ.items() if "PROGRESS_BARS" not in key}
    process = subprocess.Popen(
        [sys.executable, "-m", "bob", "fetch", "org/plain"],
        env=of_tests | hub_of_it | {"HF_HOME": "home", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    draft = Path("models/.fetch/plain") / commit_of(PLAIN)
    deadline = time.monotonic() + 60
    noted = draft / ".cache/huggingface/download/config.json.metadata"  # that it is complete
    while "model.safetensors" not in hub.asked or not noted.is_file():
        assert time.monotonic() < deadline
        assert process.poll() is None
        threading.Event().wait(0.02)  # `sleep` returns at once here
    process.kill()
    output, _ = process.communicate()
    assert output.startswith("org/plain@main is commit ")
    assert output.count("\n") == 1, output
    hub.waiting.clear()
    hub.asked.clear()
    fetched("org/plain")
    assert hub.asked == ["model.safetensors"]
    assert listing("models/plain") == {"config.json", "model.safetensors"}


def test_bytes_that_are_not_those_of_the_hub_are_told_and_fetched_again(hub, untracked):
    hub.damaged.update(["model.safetensors", "config.json"])
    line = told("org/plain")
    assert "config.json and 1 more did not arrive as the Hub's checksums say" in line
    assert not Path("models/plain").exists()
    hub.damaged.clear()
    fetched("org/plain")
    assert Path("models/plain/model.safetensors").read_bytes() == b"weights"


def test_a_model_that_dvc_does_not_take_is_not_downloaded_again(hub, untracked, monkeypatch):
    with monkeypatch.context() as patch:

        def add(_):
            raise BobError("`dvc add models/plain` failed: no")

        patch.setattr(fetching, "add", add)
        assert "failed: no" in told("org/plain")
    assert not Path("models/plain").exists()
    fetched("org/plain")
    assert hub.asked.count("model.safetensors") == 1


# --- update and list -------------------------------------------------------------------------

NEWER = PLAIN | {"model.safetensors": b"better"}


def test_an_update_brings_what_the_revision_is_now(hub, project):
    fetched("org/plain")
    old = commit_of(PLAIN)
    assert f"nothing new; org/plain@main is still {old}" in fetched("--update", "models/plain")
    new = hub.add("org/plain", NEWER)
    assert f"models/plain: {old} -> {new}" in fetched("--update")
    assert Path("models/plain/model.safetensors").read_bytes() == b"better"
    assert origin_of("plain").commit == new
    subprocess.run([sys.executable, "-m", "dvc", "status", "-q"], check=True)
    assert listing("models/.fetch") == set()


def test_an_update_that_fails_leaves_the_old_model(hub, untracked, monkeypatch):
    fetched("org/plain")
    before = Path("models/plain.dvc").read_text()
    hub.add("org/plain", NEWER)

    def add(folder):
        assert Path("models/.fetch/plain/old/model.safetensors").read_bytes() == b"weights"
        Path("models/plain.dvc").write_text("half done")
        raise BobError("no")

    monkeypatch.setattr(fetching, "add", add)
    assert told("--update") == "Error: no\n"
    assert Path("models/plain/model.safetensors").read_bytes() == b"weights"
    assert Path("models/plain.dvc").read_text() == before


@contextmanager
def killed_at(moment, monkeypatch):
    """At a step of the placing of a model, by its number, its process ends and tidies nothing."""
    steps = iter(range(4))

    def unless_killed(function):
        def call(*arguments):
            if next(steps) == moment:
                raise SystemExit(9)
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(fetching, "_recover", lambda _: None)
        patch.setattr(Path, "rename", unless_killed(Path.rename))
        for step in ("add", "write_origin"):
            patch.setattr(fetching, step, unless_killed(getattr(fetching, step)))
        yield


@pytest.mark.parametrize("moment", range(3))
def test_a_fetch_that_is_killed_when_all_is_there_downloads_no_weights_again(
    hub, untracked, monkeypatch, moment
):
    with killed_at(moment, monkeypatch):
        assert fetch("org/plain").exit_code == 9
    assert "DVC tracks models/plain" in fetched("org/plain")
    assert hub.asked.count("model.safetensors") == 1
    assert origin_of("plain").commit == commit_of(PLAIN)
    assert listing("models/.fetch") == set()


@pytest.mark.parametrize("moment", range(4))
def test_an_update_that_is_killed_at_any_moment_goes_on(hub, untracked, monkeypatch, moment):
    fetched("org/plain")
    new = hub.add("org/plain", NEWER)
    with killed_at(moment, monkeypatch):
        assert fetch("--update").exit_code == 9
    assert "->" in fetched("--update")
    assert hub.asked.count("model.safetensors") == 2, "once of each commit"
    assert Path("models/plain/model.safetensors").read_bytes() == b"better"
    assert origin_of("plain").commit == new
    assert listing("models/.fetch") == set()


def test_what_is_not_from_the_hub_is_not_updated(hub, untracked):
    assert "no model here is from the Hub; `bob fetch ID` brings one" in told("--update")
    fetched("org/plain")
    assert "models/x is not from the Hub by `bob fetch`; those that are: models/pl" in told(
        "--update", "models/x"
    )


def test_the_list_says_where_each_model_is_from_and_what_names_it(hub, untracked):
    fetched("org/plain", "models/mine")
    Path("models/miniature-backbone").mkdir()
    Path("models/miniature-backbone/weights").write_bytes(bytes(1500))
    Path("models/away.dvc").write_text("outs:\n- size: 5200000000\n  path: away\n")
    rows = [line.split("  ") for line in fetched("--list").splitlines()]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert rows == [
        ["folder", "id", "revision", "commit", "size", "used by"],
        ["models/away", "-", "-", "-", "5.2 GB (not here: dvc pull)", "-"],
        ["models/mine", "org/plain", "main", commit_of(PLAIN)[:12], "9 bytes", "-"],
        [
            *("models/miniature-backbone", "-", "-", "-", "1.5 kB"),
            "classify.backbone, audit.feature_model",
        ],
    ]


@pytest.mark.parametrize(
    "arguments", [[], ["--update", "--list"], ["org/x", "--list"], ["--update", "a", "models/b"]]
)
def test_a_call_that_is_none_is_told(arguments):
    result = fetch(*arguments)
    assert result.exit_code == 2
    assert "give ID[@REVISION], or --update, or --list" in result.output


def test_a_pipelines_index_decides_its_parts():
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "X"], "vae": None}
    found = wanted({"unet/config.json", "unet/model.safetensors", "vae/config.json"}, index)
    assert found.files == {"model_index.json", "unet/config.json", "unet/model.safetensors"}
