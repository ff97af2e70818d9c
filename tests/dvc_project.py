"""A copy of this project, run by DVC at tiny settings.

In tests its `python` is a warm one (see warm_python.py), except where an environment is asked for
with `real_python()`.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path

from dvc.config import Config
from dvc.repo import Repo
from ruamel.yaml import YAML

from bench.counted import LOG
from bob.dvc.experiments import Queue
from tests.conftest import ROOT

TINY = {
    "draw": {"classes": 2, "train_per_class": 4, "per_context": 1},
    "data": {"shots": 2},
    "finetune": {"epochs": 1, "batch_size": 2, "rank": 2},
    "generate": {"images_per_class": 2, "steps": 2, "batch_size": 2},
    "classify": {"epochs": 2, "seeds": [0], "batch_size": 4, "warmup_epochs": 1},
    "benchmark": {"batch_sizes": [1], "repeats": 2},
}


def read_params(project):
    return YAML(typ="safe").load((project / "params.yaml").read_text())


def set_params(project, changes):
    yaml = YAML()
    values = yaml.load((project / "params.yaml").read_text())
    for section, section_changes in changes.items():
        values[section].update(section_changes)
    with (project / "params.yaml").open("w") as file:
        yaml.dump(values, file)


def made_log(project):
    """Where the stages of a counted project log what they make."""
    return project.with_name(f"{project.name}.made")


def real_python():
    """The folder of the `python` that DVC and its stages are run with."""
    return Path(sys.executable).parent


SECONDS_OF_A_QUEUE = 400  # less than pytest-timeout has, so that it says why
IDLE_LOOKS = 4  # of 5 s each, in which workers have begun on a slow machine too

python_folder = real_python  # conftest.py sets another


def environment(project, python=None):
    """For DVC in a project; `python` is the folder of another than the usual one."""
    folders = [str(python or python_folder()), str(real_python()), os.environ["PATH"]]
    return os.environ | {
        LOG: str(made_log(project).absolute()),
        "PATH": os.pathsep.join(folders),
        "DVC_NO_ANALYTICS": "1",
        "GIT_AUTHOR_NAME": "t",
        "GIT_AUTHOR_EMAIL": "t@example.org",
        "GIT_COMMITTER_NAME": "t",
        "GIT_COMMITTER_EMAIL": "t@example.org",
    }


def run(project, *command):
    result = subprocess.run(
        command,
        cwd=project,
        env=environment(project),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr


def link_as_here():
    """Have DVC link files in the current repository as it does in this project."""
    with Repo() as repo, repo.config.edit() as config:
        config["cache"]["type"] = Config(str(ROOT / ".dvc"))["cache"]["type"]


def dvc(project, *arguments):
    return run(project, "python", "-m", "dvc", *arguments)


def run_queue(project, jobs):
    """`dvc exp run --run-all`, and again if DVC's workers die, as docs/experiments.md says."""
    until = time.monotonic() + SECONDS_OF_A_QUEUE
    while _outlives_its_workers(project, jobs, until):
        pass


def _outlives_its_workers(project, jobs, until):
    """Whether `--run-all` was left waiting where no worker is."""
    idle = 0
    with subprocess.Popen(
        ["python", "-m", "dvc", "exp", "run", "--run-all", "--jobs", str(jobs)],
        cwd=project,
        env=environment(project),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as running:
        output = None
        while output is None:
            try:
                output, _ = running.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                with chdir(project), Queue() as queue:
                    idle = 0 if queue.workers() else idle + 1
                if idle == IDLE_LOOKS or time.monotonic() > until:
                    running.send_signal(signal.SIGINT)
                    output, _ = running.communicate()
    logs = (project / ".dvc/tmp/exps/celery").glob("dvc-exp-worker-*.out")
    told = "\n".join([output, *(log.read_text() for log in logs)])
    assert running.returncode == 0, told
    assert time.monotonic() < until, f"the queue stands still\n{told}"
    return idle == IDLE_LOOKS


def ran(output):
    return set(re.findall(r"Running stage '(\w+)'", output))


def restored(output):
    return set(re.findall(r"Stage '(\w+)' is cached - skipping run", output))


def make_project(folder, settings=TINY, counted=False):
    """A copy of what git tracks (and will track) here, as its own repository, at these settings.

    If `counted`, its stages log what they make.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    folder.mkdir(parents=True, exist_ok=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    set_params(folder, settings)
    if counted:
        pipeline = folder / "dvc.yaml"
        pipeline.write_text(pipeline.read_text().replace("-m bob ", "-m bench.counted "))
    run(folder, "git", "init", "--quiet")
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", "tiny")
    return folder
