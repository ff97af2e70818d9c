"""Studies: the statistics, the page, what is run and what is not, and a small one run by DVC."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import psutil
import pytest
from dvc_task.proc.manager import ProcessManager
from dvc_task.proc.process import ProcessInfo
from PIL import Image
from scipy import stats

from bench.arms_results import STUDY
from bench.counted import made
from bob.cache.items import TRIALS
from bob.commands import study as studies
from bob.commands.study import banks, page, plan, queue, samples, statistics
from bob.commands.study.results import Row, read_results, write_results
from bob.commands.study.statistics import (
    holm,
    mean_interval,
    p_value,
    paired_interval,
    ratio_interval,
    smallest_visible,
)
from bob.dvc.experiments import Queue
from bob.errors import BobError
from bob.formats.files import write_jsonl
from bob.formats.params import PARAMS, read_yaml
from bob.formats.prompts import Context, Entry, read_bank
from bob.formats.review import Verdict, decide
from bob.miniature.world import BACKGROUNDS, POSES
from tests.conftest import ROOT, told_of
from tests.dvc_project import dvc, environment, made_log, make_project, run

SMALL = """
title: A small study
settings:
  bob: {seeds: [11, 12, 13]}
  none: {seeds: [11, 12, 13], params: {finetune.context: none, generate.context: none}}
  weight: {seeds: [11, 12], params: {classify.real_weight: 0.3}}
  twin: {seeds: [11], params: {classify.real_weight: 0.3}}
claims:
  - id: a
    title: BOB beats DataDream, and it does not leak
    metric: top1
    unit: "%"
    rows:
      - {label: real, setting: bob, metric: real}
      - {label: DataDream, setting: none}
      - {label: BOB, setting: bob}
    expect: [{larger: BOB, smaller: DataDream}]
    show: [{larger: BOB, smaller: real}]
    share: {of: DataDream, from: real, to: BOB}
  - id: e
    title: No leak
    metric: leak
    rows: [{label: BOB, setting: bob}]
    expect_zero: {BOB: 0.05}
    contact_sheets: [{label: DataDream, setting: none}, {label: BOB, setting: bob}]
  - id: f
    title: A curve
    metric: top1
    x: real weight
    rows: [{label: 0.3, setting: weight}, {label: 0.1, setting: bob}]
figure:
  title: The figure
  metric: top1
  unit: "%"
  groups:
    - label: 5 shots
      rows: [{label: DataDream, setting: none}, {label: BOB, setting: bob}]
"""


# --- statistics ------------------------------------------------------------------------------


def test_an_interval_is_students_t():
    interval = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval.mean == 3
    # 2.776 is the table's t for 4 degrees of freedom, two-sided, 95 %.
    half = 2.776445 * np.sqrt(2.5 / 5)
    assert (interval.low, interval.high) == pytest.approx((3 - half, 3 + half), abs=1e-5)


def test_pairing_takes_out_what_the_seeds_have_in_common():
    hard_and_easy = np.array([20.0, 50.0, 80.0])
    larger = hard_and_easy + np.array([1, 2, 3])
    paired = paired_interval(list(larger), list(hard_and_easy))
    expected = stats.ttest_rel(larger, hard_and_easy).confidence_interval(0.95)
    assert (paired.low, paired.high) == pytest.approx((expected.low, expected.high))
    assert paired.high - paired.low < 6, "unpaired it would be more than a hundred"


def test_one_value_has_a_mean_and_no_interval_and_equal_values_an_empty_one():
    assert mean_interval([2.0]).mean == 2
    assert np.isnan(mean_interval([2.0]).low)
    assert mean_interval([2.0, 2.0, 2.0]) == (2, 2, 2)


def test_the_interval_of_a_ratio_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = []
    for _ in range(2000):
        denominator = random.normal(10, 1, 5)
        interval = ratio_interval(
            list(0.6 * denominator + random.normal(0, 1, 5)), list(denominator)
        )
        covered.append(interval.low <= 0.6 <= interval.high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_a_ratio_to_something_near_zero_is_unbounded():
    interval = ratio_interval([5.0, 6.0, 7.0], [0.5, -0.4, 0.3])
    assert np.isnan(interval.low)


def test_holms_correction_is_the_textbooks():
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert str(holm([float("nan"), 0.02])) == str([float("nan"), 0.02]), "which is no test"


def test_the_smallest_visible_difference_is_seen_with_80_percent():
    # Table: with 5 pairs an effect of 1.68 standard deviations has a power of 80 %, with 10 of 1.0.
    assert smallest_visible([1, 2, 3, 4, 5]) / np.std([1, 2, 3, 4, 5], ddof=1) == pytest.approx(
        1.6823, abs=1e-3
    )
    random = np.random.default_rng(0)
    sample = random.normal(0, 1, 10)
    sample /= np.std(sample, ddof=1)
    seen = random.normal(smallest_visible(list(sample)), 1, (4000, 10))
    assert np.mean(stats.ttest_1samp(seen, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.02)


def test_a_test_of_one_value_says_nothing():
    assert np.isnan(p_value([1.0])) and np.isnan(smallest_visible([1.0]))
    assert p_value([1.0, 1.0]) == 0 and p_value([0.0, 0.0]) == 1


# --- the file --------------------------------------------------------------------------------


@pytest.fixture
def project(study_folder):
    """A small study."""
    write_jsonl(study_folder / "data/contexts/mine.jsonl", [{"background": "sky", "pose": "left"}])
    (study_folder / "small.yaml").write_text(SMALL)
    return study_folder


def small():
    return plan.read_study(Path("small.yaml"))


def test_runs_with_rejected_images_are_others_and_those_with_kept_ones_are_not(project):
    def named():
        plan._content.cache_clear()
        return {run.name for run in small().runs()}

    before, recipe = named(), "0" * 64
    for word, others in (("keep", False), ("reject", True)):
        decide({recipe: Verdict(recipe, word, "Wren", "a.png")}, Path("data/review/birds.jsonl"))
        assert bool(named() - before) == others
    decide({recipe: None}, Path("data/review/birds.jsonl"))
    assert named() == before


def test_settings_of_the_same_params_are_run_once(project):
    runs = small().runs()
    assert [(run.setting.name, run.data_seed) for run in runs] == [
        *(("bob", seed) for seed in (11, 12, 13)),
        *(("none", seed) for seed in (11, 12, 13)),
        *(("weight", seed) for seed in (11, 12)),
    ]
    assert len({run.name for run in runs}) == len(runs)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: A small study", "titel: A small study", "titel is not a known key; did you mean"),
        ("seeds: [11, 12, 13]}", "seeds: []}", "settings.bob.seeds is []; allowed: a list of at"),
        ("bob: {", "Bob!: {", "allowed: a name of small letters, digits and hyphens"),
        ("classify.real_weight: 0.3", "classify.weight: 0.1", "did you mean classify.real_weight?"),
        ("classify.real_weight: 0.3", "classify.real_weight: 2", "allowed: a number from 0 to 1"),
        ("classify.real_weight: 0.3", "clasify.x: 2", "clasify is not a known key; did you mean"),
        ("setting: none}", "setting: nothing}", "names the setting 'nothing'; there are bob, none"),
        ("{larger: BOB, smaller: D", "{larger: BOB, smaller: d", "no row 'dataDream'; its rows"),
        ("expect_zero: {BOB", "expect_zero: {Bob", "claim e has no row 'Bob'; its rows are BOB"),
        ("{label: 0.1,", "{label: low,", "is a curve over real weight: its labels have to be num"),
        (
            "rows: [{label: BOB, s",
            "rows: [{label: BOB, setting: none}, {label: BOB, s",
            "has two rows",
        ),
        ("none: {seeds: [11, 12, 13]", "none: {seeds: [21]", "have no data seed in common"),
        ("DataDream, setting: none}, {label: B", "x, setting: no}, {label: B", "the setting 'no'"),
        ("title: A small study", "title: [", "not YAML"),
    ],
)
def test_a_mistake_in_a_study_is_told_in_one_line(project, old, new, message):
    told = told_of(Path("small.yaml"), SMALL, old, new)
    assert message in told
    assert told.startswith("small.yaml")


def test_the_study_of_the_miniature_is_valid_and_its_claims_can_be_decided(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = plan.read_study(Path("experiments/miniature.yaml"))
    assert [claim.id for claim in study.claims][:7] == ["a", "b", "c", "c2", "c3", "d", "e"]
    for setting in study.settings.values():
        assert setting.seeds == tuple(STUDY)


def test_a_point_of_a_curve_that_is_the_default_is_labelled_with_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    study, params = plan.read_study(Path("experiments/miniature.yaml")), read_yaml(PARAMS)
    curves = [claim for claim in study.claims if claim.x]
    assert len(curves) == 2
    for claim in curves:
        (key,) = {key for arm in claim.arms for key in arm.setting.overrides}
        section, name = key.split(".")
        told = {
            float(a.label): a.setting.overrides.get(key, params[section][name]) for a in claim.arms
        }
        assert all(label == value for label, value in told.items())


# --- what is run -----------------------------------------------------------------------------


def measured(runs, change=None):
    """Rows of `runs`: BOB at 80, DataDream at 70, real at 60, a little apart from seed to seed."""
    top1 = {"bob": 80.0, "none": 70.0, "weight": 75.0} | (change or {})
    return [
        Row.of(
            run,
            {
                "top1": top1[run.setting.name] + run.data_seed % 3,
                "real": 60.0 + run.data_seed % 2,
                "leak": [-0.01, 0.02, 0.0][run.data_seed % 3],
            },
        )
        for run in runs
    ]


def queued(monkeypatch, change=None, killed_after=None, **options):
    """The names of the settings and the seeds that a study puts into the queue.

    `change` is what the settings measure other than usual; after `killed_after` runs it is killed.
    """
    asked: list[plan.Run] = []

    def run_all(runs, jobs, keep):
        assert all(run.strict == (os.environ.get(TRIALS) == "strict") for run in runs)
        for one in runs:
            if len(asked) == killed_after:
                raise KeyboardInterrupt
            asked.append(one)
            keep([(one, measured([one], change)[0].metrics)])
        return []

    monkeypatch.setattr(queue, "run_all", run_all)
    monkeypatch.setattr(queue, "contact_sheet", lambda name: None)
    with suppress(KeyboardInterrupt):
        studies.study(Path("small.yaml"), **options)
    assert TRIALS not in os.environ
    return [(run.setting.name, run.data_seed) for run in asked]


def test_a_run_that_is_in_the_csv_is_not_repeated(project, monkeypatch):
    study = small()
    write_results(study.results, measured(study.runs()[:5]))
    assert queued(monkeypatch) == [("none", 13), ("weight", 11), ("weight", 12)]
    assert [row.run for row in read_results(study.results)] == [run.key for run in study.runs()]
    assert queued(monkeypatch) == []


def test_a_run_of_other_params_models_or_code_is_repeated_only_on_demand(
    project, monkeypatch, capsys
):
    assert len(queued(monkeypatch)) == 8
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("guidance_scale: 2.0", "guidance_scale: 3.0"))
    capsys.readouterr()
    assert queued(monkeypatch) == []
    assert "8 of the measured runs are of other code, models or params" in capsys.readouterr().out
    assert "**8 of these runs were measured with other models or params" in page_text()
    assert len(queued(monkeypatch, again=True)) == 8
    assert queued(monkeypatch, again=True) == []
    assert "were measured with other" not in page_text()

    (project / "models/miniature-base/weights").write_text("retrained")
    plan._content.cache_clear()
    assert len(queued(monkeypatch, again=True)) == 8
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("repeats: 30", "repeats: 31"))
    assert queued(monkeypatch, again=True) == [], "no metric of the study depends on it"


def test_what_was_measured_with_other_params_is_never_compared_with_what_was_with_these(
    project, monkeypatch
):
    assert len(queued(monkeypatch)) == 8
    (small().plots / "bob-11.jpg").write_bytes(b"of then")
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("guidance_scale: 2.0", "guidance_scale: 3.0"))
    studies.study(Path("small.yaml"), page_only=True)
    assert "8 of 8 runs are measured" in page_text() and "bob-11.jpg" in page_text()
    assert len(queued(monkeypatch, only=["none"], again=True)) == 3
    text = page_text()
    assert "3 of 8 runs are measured" in text and "bob-11.jpg" not in text
    assert "5 more were measured with other models or params" in text
    assert verdicts(read_results(small().results)) == ["not measured yet"] * 3


def test_of_the_contexts_only_a_file_that_is_named_decides(project):
    def inputs():
        plan._content.cache_clear()
        return {run.setting.name: run.inputs for run in small().runs()}

    contexts = project / "data/contexts"
    contexts.mkdir(parents=True, exist_ok=True)
    (contexts / "mine.jsonl").write_text("")
    before = inputs()
    (contexts / "other.jsonl").write_text("")
    assert inputs() == before
    text = SMALL.replace("generate.context: none", "generate.context: data/contexts/mine.jsonl")
    (project / "small.yaml").write_text(text)
    before = inputs()
    (contexts / "mine.jsonl").write_text("another")
    assert {name for name, now in inputs().items() if now != before[name]} == {"none"}


def test_runs_with_another_number_of_threads_are_not_mixed(project, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert len(queued(monkeypatch, only=["none"])) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with pytest.raises(BobError, match=r"measured up to now had 1 threads each .* 2 now"):
        queued(monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert len(queued(monkeypatch)) == 5


def test_params_that_git_does_not_have_are_refused(project, monkeypatch):
    git(project, "init", "--quiet")
    git(project, "add", "bob", "dvc.yaml", "params.yaml")
    git(project, "commit", "--quiet", "--message", "first")
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("shots: 5", "shots: 10"))
    with pytest.raises(BobError, match=r"params.yaml has changes that are not committed"):
        queued(monkeypatch)
    (project / "params.yaml").write_text(text)
    assert len(queued(monkeypatch)) == 8


def test_a_contact_sheet_is_taken_when_its_run_is_measured(project, monkeypatch):
    def sheet(name):
        assert not any(row.setting == "bob" for row in read_results(small().results))
        return Image.new("RGB", (8, 8)) if name.startswith("study-bob-11") else None

    def killed_then(runs, jobs, keep):
        keep([(runs[0], measured(runs)[0].metrics)])
        raise KeyboardInterrupt

    monkeypatch.setattr(queue, "contact_sheet", sheet)
    monkeypatch.setattr(queue, "run_all", killed_then)
    with pytest.raises(KeyboardInterrupt):
        studies.study(Path("small.yaml"))
    assert Image.open(small().plots / "bob-11.jpg").format == "JPEG"
    assert [row.run[1] for row in read_results(small().results)] == [11]


# --- after a change of code ------------------------------------------------------------------


def change_code(project, dep="bob/cli.py"):
    """Commit another dependency on code, as a change of code does to the hash of a run's code."""
    pipeline = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(
        pipeline.replace(
            "      - bob/stages/evaluate.py", f"      - {dep}\n      - bob/stages/evaluate.py"
        )
    )
    git(project, "commit", "--quiet", "--all", "--message", dep)


def git(project, *arguments):
    return run(project, "git", *arguments).strip()


@pytest.fixture
def changed(project, monkeypatch):
    """A project whose study was measured at one commit, and whose code has changed in another."""
    git(project, "init", "--quiet")
    git(project, "add", "bob", "dvc.yaml")
    git(project, "commit", "--quiet", "--message", "first")
    assert len(queued(monkeypatch)) == 8
    change_code(project)
    return project


def rows_of(study):
    return {row.run: row for row in read_results(study.results)}


def test_a_sample_that_comes_out_the_same_confirms_the_others(changed, monkeypatch, capsys):
    study = small()
    before = rows_of(study)
    assert "**8 of these runs were measured with other code than the project" not in page_text()
    studies.study(Path("small.yaml"), page_only=True)
    told = "8 of these runs were measured with other code than the project has now"
    assert told in page_text() and told in capsys.readouterr().out

    repeated = queued(monkeypatch, again=True, sample=3)
    assert len(repeated) == 3
    assert {name for name, _ in repeated} == {"bob", "none", "weight"}
    assert len({seed for _, seed in repeated}) > 1
    after = rows_of(study)
    first, second = git(changed, "rev-parse", "HEAD~1", "HEAD").split()
    for one in study.runs():
        row = after[one.key]
        assert row.metrics == before[one.key].metrics and row.is_of(one)
        if (one.setting.name, one.data_seed) in repeated:
            assert (row.code, row.commit) == (one.code, second[:10])
            assert (row.repeats, row.differs, row.confirmed) == (before[one.key].code, "", "")
        else:
            assert (row.code, row.commit) == (before[one.key].code, first[:10])
            assert row.confirmed == one.code
            names = ", ".join(f"{name} {seed}" for name, seed in repeated)
            assert row.confirmed_by == f"{names} at {second[:10]}"
    text = page_text()
    assert "With the code that the project has now, 3 of these runs were measured. " in text
    assert f"With earlier code: 5 of commit {first[:10]}, confirmed by a sample. " in text
    assert f"Its runs ({names} at {second[:10]}) were repeated with the present code" in text
    assert "than the project has now" not in text
    assert queued(monkeypatch, again=True, sample=3) == []


def test_one_difference_repeats_all_and_is_told(changed, monkeypatch, capsys):
    study = small()
    repeated = queued(monkeypatch, {"weight": 75.5}, again=True, sample=2, killed_after=2)
    assert len(repeated) == 2, "killed before the others"
    assert "weight" in {name for name, _ in repeated}
    seed = dict(repeated)["weight"]
    value = 75.5 + seed % 3
    told = f"weight, data seed {seed}: top1 was {value - 0.5}, is {value} (1 of 3 figures differ)"
    assert told in capsys.readouterr().out
    studies.study(Path("small.yaml"), page_only=True)
    assert f"repeats them, since one came out otherwise ({told})" in page_text()

    others = queued(monkeypatch, {"weight": 75.5}, again=True, sample=2)
    assert f"study: {told}; all runs of that earlier code are repeated" in capsys.readouterr().out
    assert sorted(others + repeated) == sorted((r.setting.name, r.data_seed) for r in study.runs())
    assert {row.code for row in rows_of(study).values()} == {study.runs()[0].code}
    assert not any(row.confirmed for row in rows_of(study).values())
    assert "than the project has now" not in page_text()


def test_a_sample_needs_as_many_threads_as_the_runs_had(changed, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    queued(monkeypatch, again=True, sample=2)
    assert {row.threads for row in rows_of(small()).values()} == {"1"}, "confirmed: so had they"
    change_code(changed, "bob/parent.py")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = small().results.read_bytes()
    with pytest.raises(BobError, match=r"had 1 threads each and would have 2 now.*OMP_NUM_THREADS"):
        queued(monkeypatch, again=True, sample=2)
    assert small().results.read_bytes() == before
    assert len(queued(monkeypatch, again=True, sample=0)) == 8


def test_a_sample_that_was_killed_is_not_chosen_anew(changed, monkeypatch):
    study = small()
    kept = study.results.read_bytes()
    whole = queued(monkeypatch, again=True, sample=4)
    assert len(whole) == 4
    study.results.write_bytes(kept)
    assert queued(monkeypatch, again=True, sample=4) == whole, "the same code, the same sample"
    study.results.write_bytes(kept)
    begun = queued(monkeypatch, again=True, sample=4, killed_after=2)
    assert not any(row.confirmed for row in rows_of(study).values())
    assert begun + queued(monkeypatch, again=True, sample=4) == whole
    assert sum(row.confirmed != "" for row in rows_of(study).values()) == 4


def test_a_failed_run_of_the_sample_confirms_nothing(changed, monkeypatch):
    monkeypatch.setattr(queue, "run_all", lambda runs, jobs, keep: [run.name for run in runs])
    with pytest.raises(BobError, match=r"2 runs failed: study-.*-strict"):
        studies.study(Path("small.yaml"), again=True, sample=2)
    assert not any(row.confirmed for row in rows_of(small()).values())
    assert "8 of these runs were measured with other code" in page_text()


def test_a_later_change_of_code_needs_another_sample(changed, monkeypatch):
    study = small()
    first = {row.code for row in rows_of(study).values()}
    assert len(queued(monkeypatch, again=True, sample=2)) == 2
    change_code(changed, "bob/parent.py")
    studies.study(Path("small.yaml"), page_only=True)
    assert "8 of these runs were measured with other code" in page_text()
    again = queued(monkeypatch, again=True, sample=2)
    assert len(again) == 2
    code = study.runs()[0].code
    confirmed = [row for row in rows_of(study).values() if row.confirmed]
    assert len(confirmed) == 6 and {row.confirmed for row in confirmed} == {code}
    assert {row.code for row in confirmed} >= first, "a row keeps the code that measured it"


def test_a_sample_says_nothing_of_other_params_and_all_can_be_repeated(changed, monkeypatch):
    text = (changed / "params.yaml").read_text()
    (changed / "params.yaml").write_text(text.replace("real_weight: 0.1", "real_weight: 0.2"))
    repeated = queued(monkeypatch, again=True, sample=1)
    assert len(repeated) == 1 + 6
    assert {name for name, _ in repeated[:1]} == {"weight"}, "whose real_weight is its own"
    assert {name for name, _ in repeated[1:]} == {"bob", "none"}
    change_code(changed, "bob/parent.py")
    assert len(queued(monkeypatch, again=True, sample=0)) == 8
    assert not any(row.repeats or row.confirmed for row in rows_of(small()).values())


def test_dvc_restores_no_stage_of_a_strict_run(project):
    one = small().runs()[0]
    both = [one, replace(one, strict=True)]
    dvcs = MagicMock()
    dvcs.states.return_value = {}
    queue._fill(dvcs, {run.name: run for run in both})
    asked = dvcs.put.call_args_list
    assert [(call.args[0], call.kwargs["force"]) for call in asked] == [
        (one.name, False),
        (f"{one.name}-strict", True),
    ]


def test_strict_runs_wait_for_workers_of_another_environment():
    def worker(seconds):
        code = f"import time; print(flush=True); time.sleep({seconds})"
        process = psutil.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        process.stdout.readline()  # until then its environment may not be in place
        return process

    lax = worker(2)
    with queue.strict():
        strict = worker(30)
    try:
        dvcs = MagicMock()
        dvcs.workers.return_value = [lax, strict]
        queue._wait_for_lax_workers(dvcs)
        assert not lax.is_running()
        assert strict.is_running()
    finally:
        strict.kill()
        strict.wait()


def test_a_process_that_has_the_number_of_a_dead_one_is_not_killed(tmp_path):
    stranger = psutil.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    manager = ProcessManager(str(tmp_path))
    (tmp_path / "rev").mkdir()
    manager["rev"] = ProcessInfo(stranger.pid, None, None, None, None)
    dvcs = Queue.__new__(Queue)  # without a repository
    dvcs._queue = MagicMock(proc=manager)
    dvcs._queue.iter_active.return_value = [SimpleNamespace(name="study-bob-11", stash_rev="rev")]
    dvcs._queue.kill = lambda names, force: manager.kill("rev")
    try:
        with pytest.raises(ProcessLookupError):
            dvcs.kill(["study-bob-11"])
        assert stranger.is_running() and manager["rev"].returncode == -1
    finally:
        stranger.kill()
        stranger.wait()


def test_each_earlier_code_has_a_run_in_the_sample(changed, monkeypatch):
    queued(monkeypatch, again=True, sample=0, only=["none"])
    change_code(changed, "bob/parent.py")
    study, rows = small(), rows_of(small())
    assert [len(group) for group in samples.groups(study.runs(), rows).values()] == [5, 3]
    chosen = samples.choose(study.runs(), rows, 1)
    assert len({rows[run.key].code for run in chosen}) == len(chosen) == 2
    queued(monkeypatch, {"none": 71.0}, again=True, sample=1)
    confirmed = {row.setting for row in rows_of(study).values() if row.confirmed}
    assert confirmed == {"bob", "weight"}, "the code of the others came out otherwise"


def test_a_sample_needs_code_that_is_committed(changed, monkeypatch):
    (changed / "dvc.yaml").write_text((changed / "dvc.yaml").read_text() + "# a change\n")
    with pytest.raises(BobError, match=r"changes that are not committed.*--sample 0"):
        queued(monkeypatch, again=True)
    assert len(queued(monkeypatch, again=True, sample=0)) == 8
    assert all(row.commit.endswith("-dirty") for row in rows_of(small()).values())


def test_the_sample_of_the_miniatures_study_goes_through_other_code_each_time(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = plan.read_study(Path("experiments/miniature.yaml"))
    runs = study.runs()
    rows = {run.key: replace(Row.of(run, {}), code=f"earlier {run.code}") for run in runs}
    chosen = samples.choose(runs, rows, 5)
    assert len({run.setting.name for run in chosen}) == 5
    assert len({run.data_seed for run in chosen}) >= 3
    assert any(run.setting.drawn for run in chosen), "another generator's code"
    assert {run.values["finetune"]["context"] for run in chosen} == {"caption", "none"}
    assert {run.values["generate"]["sampler"] for run in chosen} == {"dpmsolver++", "pndm"}


def test_results_from_before_there_were_samples_are_read(project):
    study = small()
    rows = measured(study.runs())
    write_results(study.results, rows)
    with study.results.open(newline="") as file:
        lines = list(csv.DictReader(file))
    new = ("commit", "repeats", "differs", "confirmed", "confirmed_by")
    with study.results.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, [name for name in lines[0] if name not in new], extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(lines)
    assert read_results(study.results) == rows


def test_a_failed_run_is_named_after_the_page_is_written(project, monkeypatch):
    monkeypatch.setattr(queue, "run_all", lambda runs, jobs, keep: [runs[0].name])
    monkeypatch.setattr(queue, "contact_sheet", lambda name: None)
    with pytest.raises(
        BobError, match=r"1 runs failed: study-bob-11-.*dvc queue logs study-bob-11"
    ):
        studies.study(Path("small.yaml"))
    assert "not measured yet" in page_text()


def test_a_csv_that_was_mangled_is_told_with_its_line(project):
    study = small()
    write_results(study.results, measured(study.runs()[:2]))
    study.results.write_text(study.results.read_text().replace("bob,12", "bob,twelve"))
    with pytest.raises(BobError, match=r"small-study.csv, line 3 is no result of a study"):
        read_results(study.results)


# --- the page --------------------------------------------------------------------------------


def page_text():
    """Without the spaces that align a table's columns."""
    return re.sub(" +", " ", Path("docs/small-study.md").read_text())


def verdicts(rows):
    page.write(small(), rows)
    return [line.split("**")[1] for line in page_text().splitlines() if line.startswith("| [")]


def test_a_claim_holds_where_the_paired_interval_lies_above_zero(project):
    runs = small().runs()
    assert verdicts(measured(runs)) == ["holds", "holds", "shown, not judged"]
    text = page_text()
    assert "| BOB | 81.00 | 78.52 to 83.48 | 3 |" in text
    assert (
        f"| BOB {page.MINUS} DataDream | 10.00 | 10.00 to 10.00 | yes | < 0.001 | 0.000 |" in text
    )
    assert "not claimed" in text
    assert "8 of 8 runs are measured" in text


def test_p_values_are_corrected_for_all_claims_and_one_difference_counts_once(project):
    study, claim = SMALL.split("  - id: f")[0], SMALL.split("claims:\n")[1].split("  - id: e")[0]
    both = "expect: [{larger: BOB, smaller: DataDream}, {larger: BOB, smaller: real}]"
    twice = f"{study}{claim.replace('id: a', 'id: b')}"
    (project / "small.yaml").write_text(re.sub(r"expect: \[{.*", both, twice))
    rows = measured(small().runs())
    for row in rows:
        row.metrics["top1"] -= row.metrics["leak"] * 100 if row.setting == "none" else 0.0
    page.write(small(), rows)
    bob, none, real = ([80.0 + n for n in (2, 0, 1)], [72.0, 71.0, 69.0], [61.0, 60.0, 61.0])
    two = [statistics.p_value(np.subtract(bob, other).tolist()) for other in (none, real)]
    corrected = statistics.holm(two)
    assert corrected == [two[0], 2 * two[1]] and two[0] > 0.001
    lines = [line for line in page_text().splitlines() if f"BOB {page.MINUS} DataDream" in line]
    assert len(lines) == 2 and all(f"| yes | {two[0]:.3f} |" in line for line in lines)


def test_a_claim_does_not_hold_where_the_interval_reaches_zero(project):
    rows = measured(small().runs(), {"none": 80.0})
    assert verdicts(rows)[0] == "does not hold"
    leaking = [Row(r.setting, r.run, r.code, r.inputs, r.metrics | {"leak": 0.4}) for r in rows]
    assert verdicts(leaking)[1] == "does not hold"
    noise = [replace(row, metrics=row.metrics | {"leak": 0.2 * (row.run[1] - 12)}) for row in rows]
    assert verdicts(noise)[1] == "does not hold", "not seeing is not showing that there is none"
    assert "| BOB | 0.050 | no |" in page_text()


def test_what_is_not_measured_is_said_and_never_judged(project):
    runs = small().runs()
    assert verdicts([]) == ["not measured yet"] * 3
    assert verdicts(measured(runs[:5])) == ["not measured yet", "holds", "not measured yet"]
    assert "(1 of 3 data seeds missing)" in page_text()


def test_the_page_and_its_plots_are_the_same_bytes_every_time(project):
    rows = measured(small().runs())
    page.write(small(), rows)
    first = {path: path.read_bytes() for path in Path("docs").rglob("*") if path.is_file()}
    page.write(small(), rows)
    assert {path.name for path in first} == {"small-study.md", "a.png", "e.png", "f.png"} | {
        "figure.png"
    }
    assert all(path.read_bytes() == content for path, content in first.items())
    for path in first:
        assert "png" not in path.suffix or f"{path.parent.name}/{path.name}" in page_text()


def test_contact_sheets_stay_when_the_page_is_written_from_the_results_alone(project):
    rows = measured(small().runs())
    page.write(small(), rows)
    assert "none-11.jpg" not in page_text()
    sheet = small().plots / "none-11.jpg"
    sheet.write_bytes(b"taken from the experiment")
    page.write(small(), rows)
    assert sheet.read_bytes() == b"taken from the experiment"
    assert "![Contact sheet, DataDream](small-study/none-11.jpg)" in page_text()
    assert "bob-11.jpg" not in page_text()


# --- banks with and without errors -----------------------------------------------------------


def test_the_share_of_wrong_contexts_is_wrong_in_both_attributes():
    true = [
        Entry(str(number), "Heron 300", Context(BACKGROUNDS[number % 6], POSES[number % 5]))
        for number in range(40)
    ]
    wrong = banks.with_errors(true, 0.3, seed=11)
    changed = [(a.context, b.context) for a, b in zip(true, wrong, strict=True) if a != b]
    assert len(changed) == 12
    for one, other in changed:
        assert one and other
        assert one.background != other.background and other.background in BACKGROUNDS
        assert one.pose != other.pose and other.pose in POSES
    assert wrong == banks.with_errors(true, 0.3, seed=11)


@pytest.mark.slow
def test_the_committed_banks_are_of_the_shots_that_the_study_draws(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = plan.read_study(Path("experiments/miniature.yaml"))
    seeds = study.settings["captions-true"].seeds
    true = read_bank(ROOT / banks.TRUE)
    assert len(true) == len(seeds) * 8 * 5
    assert true[:40] == banks.true_entries(seeds[0])
    assert read_bank(ROOT / banks.WRONG)[:40] == banks.with_errors(true[:40], 0.3, seeds[0])


# --- run by DVC ------------------------------------------------------------------------------

RUN = """
title: A small study
settings:
  bob: {seeds: [11]}
  guided: {seeds: [11], params: {generate.guidance_scale: 2.0}}
  drawn: {seeds: [11], drawn: true}
claims:
  - id: g
    title: The ceiling
    metric: real_and_synthetic.top1
    rows: [{label: BOB, setting: bob}, {label: guided, setting: guided}, {label: c, setting: drawn}]
    contact_sheets: [{label: guided, setting: guided}]
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_small_study_is_killed_goes_on_and_is_confirmed_after_a_change_of_code(tmp_path):
    project = make_project(tmp_path / "project", counted=True)
    (project / "experiments/small.yaml").write_text(RUN)
    run(project, "git", "add", "--all")
    run(project, "git", "commit", "--quiet", "--message", "study")
    params = (project / "params.yaml").read_text()
    command = ["python", "-m", "bob", "study", "experiments/small.yaml"]

    first = subprocess.Popen(
        command, cwd=project, env=environment(project), stdout=subprocess.DEVNULL
    )
    for _ in range(300):
        time.sleep(1)
        if "Running" in dvc(project, "queue", "status"):
            break
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = dvc(project, "queue", "status")
    assert before.count("study-") == 2

    output = run(project, *command)
    assert "3 runs, 1 measured" in output, "the drawn one, before the queue"
    assert dvc(project, "queue", "status").count("study-") == 2, "nothing was queued twice"
    with (project / "docs/small-study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["setting"] for row in rows] == ["bob", "guided", "drawn"]
    assert len({row["real_only.top1"] for row in rows}) == 1, "the same shots in all three"
    assert rows[0]["leakage.pictures.background"] != ""
    page = (project / "docs/small-study.md").read_text()
    assert "3 of 3 runs are measured" in page
    assert "](small-study/guided-11.jpg)" in page
    with Image.open(project / "docs/small-study/guided-11.jpg") as sheet:
        assert sheet.width > sheet.height
    assert (project / "params.yaml").read_text() == params
    assert "3 runs, 3 measured" in run(project, *command)

    code = project / "bob/models/device.py"  # in every item's making
    code.write_text(f"{code.read_text()}\nUNUSED = 1\n")
    run(project, "git", "commit", "--quiet", "--all", "--message", "code")
    made_log(project).unlink()
    output = run(project, *command, "--again", "--sample", "2")
    assert "the sample came out the same to the last digit, which confirms other runs: 1" in output
    assert made(made_log(project))["generate"] == [2, 2], "no image that other code has made"
    with (project / "docs/small-study.csv").open() as file:
        again = list(csv.DictReader(file))
    assert [[row[name] for name in rows[0] if "." in name] for row in again] == [
        [row[name] for name in rows[0] if "." in name] for row in rows
    ]
    assert again[2]["repeats"] == rows[2]["code"] != again[2]["code"], "the only one that is drawn"
    assert sum(row["confirmed"] != "" for row in again[:2]) == 1
    assert (
        "With the code that the project has now, 2 of these runs were measured"
        in (project / "docs/small-study.md").read_text()
    )
