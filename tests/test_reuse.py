"""What DVC and the item cache do together, in copies of this project: runs, kills, queues, clones.

Most of it is what the scripts in bench/ measure, with fewer repetitions.
"""

import re
import subprocess
from dataclasses import replace

import pytest

from bench import kills, reuse
from bench.project import batches_made, clear_log
from bob.cache.index import Index
from bob.cache.lists import read_items
from bob.cli import STAGES
from tests.dvc_project import dvc, environment, make_project, ran, read_params, run, set_params

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


# A rename, which changes nothing, and a change of the latents by a hundredth, which shows in bytes
# (one ulp there shows in a few of 32 images, but not in the two of a batch at these settings).
RENAMED = ("bob/models/sampling.py", "latents = latents.float()", "decoded = latents.float()")
RENAMED_USE = ("for part in latents.split(", "for part in decoded.split(")
BRIGHTER = (
    "bob/models/sampling.py",
    "latents = latents.float() / pipeline",
    "latents = 1.01 * latents.float() / pipeline",
)
# The same, of prompts without context alone; the empty one is that of guidance.
BARE_OTHERWISE = (
    "bob/models/sampling.py",
    "        text: pipeline.encode_prompt(text, pipeline.device, 1, False)[0][0]\n",
    "        text: pipeline.encode_prompt(text, pipeline.device, 1, False)[0][0]\n"
    "        * (1.01 if text and ' background ' not in text else 1)\n",
)
ANSWERS = ("bob/models/vlm.py", "do_sample=False", "do_sample=bool(0)")


def edited(project, module, *replacements):
    """Change a module; returns what it was."""
    path = project / module
    text = changed = path.read_text()
    for old, new in replacements:
        assert old in changed
        changed = changed.replace(old, new)
    path.write_text(changed)
    return text


def made_after(project, module, *replacements):
    """What a run of all stages makes after an edit, which is taken back then; and what it says."""
    original = edited(project, module, *replacements)
    try:
        clear_log(project)
        output = dvc(project, "repro")
        stages = ("caption", "finetune", "generate", "audit", "classify")
        return {stage: sum(batches_made(project, stage)) for stage in stages}, output
    finally:
        (project / module).write_text(original)


NOTHING = {"caption": 0, "finetune": 0, "generate": 0, "audit": 0, "classify": 0}


def images(project):
    return len(list((project / "results/generate/images").rglob("*.png")))


def test_of_code_that_makes_the_same_images_one_batch_is_made(project):
    dvc(project, "repro")
    batch = read_params(project)["generate"]["batch_size"]
    module, *rename = RENAMED
    made, output = made_after(project, module, tuple(rename), RENAMED_USE)
    assert made == NOTHING | {"generate": batch}
    old = images(project) - batch
    assert f"{old} reused (made by earlier code, same bytes in a trial" in output
    assert not ran(output) & {"evaluate", "export", "benchmark"}


def test_of_code_that_changes_images_all_are_made_anew(project):
    dvc(project, "repro")
    module, *change = BRIGHTER
    made, output = made_after(project, module, tuple(change))
    assert made["generate"] == images(project)
    assert "on trial came out otherwise (PSNR" in output


def test_a_change_for_prompts_without_context_is_found_though_those_with_context_are_the_same(
    project,
):
    """A trial of the ones must not speak for the others."""
    for context in ("none", "bank"):
        set_params(project, {"generate": {"context": context}})
        dvc(project, "repro", "generate")
    module, *change = BARE_OTHERWISE
    original = edited(project, module, tuple(change))
    try:
        made = {}
        for context in ("bank", "none"):
            set_params(project, {"generate": {"context": context}})
            clear_log(project)
            output = dvc(project, "repro", "generate")
            made[context] = sum(batches_made(project, "generate"))
    finally:
        (project / module).write_text(original)
        set_params(project, {"generate": {"context": "bank"}})
    assert made == {"bank": read_params(project)["generate"]["batch_size"], "none": images(project)}
    assert "on trial came out otherwise (PSNR" in output


def test_a_check_names_and_forgets_what_the_present_code_makes_otherwise(project):
    dvc(project, "repro")
    count = images(project)

    def check():
        return subprocess.run(
            ["python", "-m", "bob", "cache", "check", "--share", "1", "caption", "generate"],
            cwd=project,
            env=environment(project),
            capture_output=True,
            text=True,
            check=False,
        )

    whole = check()
    assert whole.returncode == 0, whole.stderr
    assert f"generate: {count} of {count} items made again, all the same" in whole.stdout

    index = Index(project / ".dvc/cache/bob/items.sqlite")
    listed = {item.oid: item for item in read_items(project / "results/items/generate.jsonl")}
    one, other = list(listed.values())[:2]
    rows = index.find([one.recipe])
    (row,) = (row for row in rows if row.maker == one.maker)
    index.drop(rows)  # also what the code of other tests has made, which may be the same
    index.add([replace(row, oid=other.oid, inode=None)])
    wrong = check()
    assert wrong.returncode == 1
    assert f"generate: {count} of {count} items made again, 1 came out otherwise" in wrong.stdout
    assert re.search(
        rf"generate: {re.escape(str(one.file))} differs \(PSNR .*\) and is forgotten", wrong.stdout
    )
    assert index.find([one.recipe], one.maker) == []

    clear_log(project)
    dvc(project, "repro", "--force", "--single-item", "generate")
    assert batches_made(project, "generate") == [1]
    assert check().returncode == 0


def test_comments_in_every_module_make_no_item(project):
    dvc(project, "repro")
    modules = sorted((project / "bob").rglob("*.py"))
    before = {module: module.read_text() for module in modules}
    try:
        for module, text in before.items():
            module.write_text(f"{text}\n# A comment.\n")
        clear_log(project)
        output = dvc(project, "repro")
    finally:
        for module, text in before.items():
            module.write_text(text)
    # draw comes out as it was, so all that DVC runs is what depends on the modules themselves.
    assert ran(output) == set(STAGES)
    assert {stage: sum(batches_made(project, stage)) for stage in NOTHING} == NOTHING


def test_other_code_that_gives_the_same_answers_stops_the_wave(project):
    dvc(project, "repro")
    module, *change = ANSWERS
    made, output = made_after(project, module, tuple(change))
    batch = read_params(project)["caption"]["batch_size"]
    assert 0 < made["caption"] <= 2 * batch  # one trial for each question
    assert ran(output) == {"caption", "audit"}


def test_a_clone_that_pulls_adopts_the_items(project, tmp_path):
    dvc(project, "repro", "generate")
    dvc(project, "remote", "add", "--default", "--force", "storage", str(tmp_path / "storage"))
    dvc(project, "push", "--with-deps", "generate")
    run(project, "git", "add", "--all")
    run(project, "git", "commit", "--quiet", "--message", "pushed")
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "--quiet", str(project), str(clone))
    dvc(clone, "pull", "--with-deps", "generate")
    output = run(clone, "python", "-m", "bob", "cache", "adopt")
    images = sum(1 for _ in (project / "results/generate/images").rglob("*.png"))
    answers = len((project / "results/items/caption.jsonl").read_text().splitlines())
    assert re.findall(r"(\w+)\.jsonl: (\d+) items adopted\n", output) == [
        ("caption", str(answers)),
        ("finetune", "2"),  # the LoRA and its losses
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
