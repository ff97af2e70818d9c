"""The finetune stage on a small random Stable Diffusion: killed, resumed, and refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from bob.cache import checkpoints
from bob.cache.checkpoints import Checkpoint
from bob.cache.work import Hardware
from bob.cli import cli
from bob.errors import BobError
from bob.formats import params
from bob.formats.files import sha256
from bob.formats.layout import BANK, CLASSES, FINETUNE, TRAIN
from bob.formats.params import Params
from bob.formats.photos import Photo, Task, write_photos, write_task
from bob.formats.prompts import Context, Entry, write_bank
from bob.models import denoising
from bob.models.precision import device_name
from bob.stages import finetune
from tests.builders import build_photos, build_text_to_image
from tests.conftest import ROOT
from tests.tiny_project import forget_items, tree

SETTINGS = {
    "base_model": "base",
    "context": "caption",
    "rank": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "epochs": 4,
    "batch_size": 2,
    "gradient_accumulation": 1,
    "gradient_checkpointing": False,
    "compile": False,
    "precision": "fp32",
    "seed": 0,
}
STEPS = 2  # an epoch: three photos in full batches of two, so one is left for the next epoch
KEPT = Path(".dvc/cache/bob/checkpoints")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_text_to_image(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def project(repository, base, monkeypatch):
    """What the stage reads, and a checkpoint after every epoch."""
    monkeypatch.setattr(checkpoints, "SECONDS_BETWEEN", 0.0)
    Path("base").symlink_to(base)
    folder = build_photos(Path("photos"), {"Tit": 1, "Wren": 2})
    photos = [
        Photo(str(path), path.parent.name, sha256(path)) for path in sorted(folder.rglob("*.jpg"))
    ]
    write_task(CLASSES, Task("bird", ("Tit", "Wren")))
    write_photos(TRAIN, photos)
    write_bank(
        BANK,
        [Entry(photo.sha256, photo.class_name, Context("sky", "flying")) for photo in photos],
    )
    return repository


def run(**changed):
    finetune.run(Params({"finetune": SETTINGS | changed}, "finetune"))
    return tree(FINETUNE)


@pytest.fixture
def steps(monkeypatch):
    """Grows by one with every step of training."""
    made: list[int] = []
    target = denoising.prediction_target

    def counted(*given):
        made.append(1)
        return target(*given)

    monkeypatch.setattr(denoising, "prediction_target", counted)
    return made


@pytest.mark.parametrize(
    ("compile", "epochs", "able", "compiled"),
    [
        ("auto", 1499, True, False),
        ("auto", 1500, True, True),
        ("auto", 1500, False, False),
        (True, 1, False, True),
        (False, 10_000, True, False),
    ],
)
def test_a_long_run_is_compiled_where_it_can_be(compile, epochs, able, compiled, monkeypatch):
    there = Hardware("cpu", bf16=False, compiles=able)
    monkeypatch.setattr(finetune, "hardware", lambda: there)
    settings = Params(SETTINGS | {"compile": compile, "epochs": epochs}, "finetune")
    assert finetune.is_compiled(settings, 3) == compiled


class Killed(BaseException):
    """Ends a run as a signal does: nothing handles it."""


def kill_after(epochs, monkeypatch, **changed):
    """Run the stage and kill it once the checkpoint of the given epoch is written."""
    save = Checkpoint.save

    def save_and_die(self, state):
        save(self, state)
        if len(state["losses"]) == epochs:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            run(**changed)


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{}, {"precision": "bf16", "gradient_accumulation": 2}])
def test_a_process_that_is_killed_goes_on_to_the_same_bytes(project, steps, changed):
    given = {"epochs": 60} | changed
    undisturbed = run(**given)
    all_steps = len(steps)
    forget_items()
    code = (
        "import json, sys; from bob.cache import checkpoints; from bob.stages import finetune;"
        "from bob.formats.params import Params;"
        "checkpoints.SECONDS_BETWEEN = 0.0;"
        "finetune.run(Params({'finetune': json.loads(sys.argv[1])}, 'finetune'))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(SETTINGS | given)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    while not list(KEPT.glob("*.pt")):
        assert process.poll() is None, "it ended before it had a checkpoint"
        time.sleep(0.01)
    time.sleep(0.2)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    steps.clear()
    assert run(**given) == undisturbed
    assert 0 < len(steps) < all_steps
    assert list(KEPT.glob("*.pt")) == []


def test_a_killed_run_goes_on_to_the_same_bytes(project, steps, monkeypatch):
    undisturbed = run()
    assert len(steps) == 4 * STEPS
    assert list(KEPT.iterdir()) == [], "a finished run leaves no checkpoint"
    forget_items()
    kill_after(3, monkeypatch)
    assert len(list(KEPT.glob("*.pt"))) == 1
    steps.clear()
    assert run() == undisturbed
    assert len(steps) == 1 * STEPS
    assert list(KEPT.iterdir()) == []


def test_a_lora_that_was_trained_before_is_loaded(project, steps):
    """Also by a run to whose code only comments were added, and on another branch."""
    first = run()
    run(learning_rate=1e-3)
    steps.clear()
    assert run() == first
    assert steps == []


def test_another_run_does_not_go_on_from_the_checkpoint(project, steps, monkeypatch):
    kill_after(3, monkeypatch)
    steps.clear()
    run(learning_rate=1e-3)
    assert len(steps) == 4 * STEPS
    assert len(list(KEPT.iterdir())) == 1, "that of the killed run is still there"


def test_a_damaged_checkpoint_is_named_and_the_run_begins_anew(project, steps, monkeypatch, capsys):
    undisturbed = run()
    forget_items()
    kill_after(1, monkeypatch)
    (path,) = KEPT.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    steps.clear()
    assert run() == undisturbed
    assert len(steps) == 4 * STEPS
    assert re.search(rf"warning: {path.name}.*begins anew", capsys.readouterr().err)


def test_old_checkpoints_of_other_runs_are_removed(tmp_path):
    now = time.time()
    for name, days in (("old.pt", 8), ("young.pt", 6), ("own.pt", 8)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now, now - days * 86400))
    Checkpoint(tmp_path, "own")
    assert {path.name for path in tmp_path.iterdir()} == {"young.pt", "own.pt"}


def test_a_checkpoint_is_due_after_its_time(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path, "key")
    assert not checkpoint.is_due()
    monkeypatch.setattr(checkpoints, "SECONDS_BETWEEN", 0.0)
    assert checkpoint.is_due()


def test_the_last_line_says_on_what_the_lora_was_trained(project, capsys):
    run()
    assert f" trained on {device_name()}, " in capsys.readouterr().out
    mode = (FINETUNE / "lora/pytorch_lora_weights.safetensors").stat().st_mode
    mask = os.umask(0)
    os.umask(mask)
    assert mode & 0o777 == 0o666 & ~mask  # a file as any other, for whom it is passed on to


def test_a_batch_that_cannot_be_cut_is_told_in_one_line(project):
    with pytest.raises(BobError, match=r"batch_size 2 .*gradient_accumulation 3.*multiple"):
        run(gradient_accumulation=3)


def test_experiments_that_run_at_once_share_no_file_of_dvclives(
    project, tmp_path_factory, monkeypatch
):
    """Its signal to VS Code, in the root that DVC names to all queued experiments."""
    root = tmp_path_factory.mktemp("repository")
    monkeypatch.setenv("DVC_ROOT", str(root))
    given = Params({"finetune": SETTINGS | {"epochs": 1}}, "finetune")
    monkeypatch.setattr(params, "for_stage", lambda _: given)
    CliRunner().invoke(cli, ["finetune"], catch_exceptions=False)
    assert (FINETUNE / "curves").exists()
    assert list(root.iterdir()) == []
