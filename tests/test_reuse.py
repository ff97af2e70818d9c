"""What DVC and the item cache do together, in copies of this project: runs, kills, queues, clones.

Most of it is what the scripts in bench/ measure, with fewer repetitions.
"""

import re
import sys

import pytest

from bench import kills, reuse
from bench.project import batches_made, clear_log
from tests.dvc_project import dvc, make_project, ran, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("reuse") / "project", reuse.SETTINGS, counted=True)


@pytest.mark.parametrize(
    "measure",
    [
        lambda project: reuse.more_images(project, timed=False),
        reuse.one_shot_more,
        reuse.guidance,
        reuse.queue,
    ],
    ids=["more_images", "one_shot_more", "guidance", "queue"],
)
def test_nothing_is_made_twice(project, measure):
    findings = list(measure(project))
    assert findings
    assert [finding.what for finding in findings if not finding.good] == []


def test_other_code_that_gives_the_same_answers_stops_the_wave(project):
    """The answers are made again, because the code might give others; the bank is the same."""
    dvc(project, "repro", "generate")
    module = project / "bob/models/vlm.py"
    original = module.read_text()
    try:
        clear_log(project)
        module.write_text(original.replace("do_sample=False", "do_sample=bool(0)"))
        assert ran(dvc(project, "repro", "generate")) == {"caption"}
        assert sum(batches_made(project, "caption")) > 0
    finally:
        module.write_text(original)
    clear_log(project)
    module.write_text(original + "\n# A comment.\n")
    assert ran(dvc(project, "repro", "generate")) == {"caption"}
    assert batches_made(project, "caption") == []


def test_a_clone_that_pulls_adopts_the_items(project, tmp_path):
    dvc(project, "repro", "generate")
    dvc(project, "remote", "add", "--default", "--force", "storage", str(tmp_path / "storage"))
    dvc(project, "push", "--with-deps", "generate")
    run(project, "git", "add", "--all")
    run(project, "git", "commit", "--quiet", "--message", "pushed")
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "--quiet", str(project), str(clone))
    dvc(clone, "pull", "--with-deps", "generate")
    output = run(clone, sys.executable, "-m", "bob", "cache", "adopt")
    images = sum(1 for _ in (project / "results/generate/images").rglob("*.png"))
    answers = len((project / "results/items/caption.jsonl").read_text().splitlines())
    assert re.findall(r"(\w+)\.jsonl: (\d+) items adopted\n", output) == [
        ("caption", str(answers)),
        ("generate", str(images)),
    ]
    clear_log(clone)
    dvc(clone, "repro", "--force", "--single-item", "generate")
    assert batches_made(clone, "generate") == []


@pytest.mark.timeout(1800)
def test_kills_at_random_moments_leave_the_same_output_and_little_work(tmp_path):
    project = make_project(tmp_path / "project", kills.SETTINGS, counted=True)
    done = list(kills.kills(project, count=5, seed=1))
    assert len(done) == 5
    assert [kill for kill in done if kill.faults] == []
