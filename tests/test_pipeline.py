"""The real dvc.yaml, run by DVC at tiny settings with the committed models."""

import ast
import json
import re
import shutil
from collections import Counter

import pytest
from dvc.repo import Repo
from PIL import Image
from ruamel.yaml import YAML

from bob.cli import STAGES
from bob.commands.why import Causes
from bob.dvc.forecast import UP_TO_DATE, Forecast
from bob.dvc.pipeline import Pipeline
from bob.formats.layout import ITEMS
from tests.conftest import ROOT
from tests.dvc_project import (
    dvc,
    make_project,
    ran,
    read_params,
    restored,
    run,
    run_queue,
    set_params,
)

AFTER_GENERATE = {
    *("generate", "audit", "classify", "evaluate", "export", "benchmark", "card", "report"),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project that has been reproduced once; tests leave its parameters as they were."""
    folder = make_project(tmp_path_factory.mktemp("project"))
    output = dvc(folder, "repro")
    assert ran(output) == set(STAGES)
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", "reproduced")
    return folder


# --- what dvc.yaml says, read without running it ---------------------------------------------


def pipeline():
    return YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())


def imported_modules(module):
    """All modules that `bob.<module>` imports, wherever in it, transitively: `models.device`."""
    seen, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse((ROOT / source_of(name)).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "bob":
                wing = str(node.module).partition(".")[2]
                names = [f"{wing}.{alias.name}".strip(".") for alias in node.names]
                waiting += [name for name in (wing, *names) if (ROOT / source_of(name)).is_file()]
            elif isinstance(node, ast.Import):
                waiting += [
                    alias.name.partition(".")[2]
                    for alias in node.names
                    if alias.name.startswith("bob.")
                ]
    return seen


def source_of(module):
    return f"bob/{module.replace('.', '/')}.py"


CHECKING = {"formats.params", "formats.schemas"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_exactly_the_code_it_imports(stage):
    declared = {dep for dep in pipeline()["stages"][stage]["deps"] if dep.startswith("bob/")}
    declared -= {"bob/page"}  # no Python: what the report is made of
    assert declared == {source_of(name) for name in imported_modules(f"stages.{stage}") - CHECKING}


def test_no_stage_depends_on_the_lists_of_items():
    assert not [
        dep
        for stage in pipeline()["stages"].values()
        for dep in stage["deps"]
        if dep.startswith(str(ITEMS))
    ]


def test_the_pipeline_runs_the_command_lines_stages():
    stages = pipeline()["stages"]
    assert list(stages) and set(stages) == set(STAGES)
    for name, stage in stages.items():
        assert stage["cmd"] == f"python -m bob {name}"


def test_no_output_has_a_parameter_in_its_path_and_none_is_persistent():
    for stage in pipeline()["stages"].values():
        for kind in ("outs", "metrics", "plots"):
            assert "$" not in json.dumps(stage.get(kind, []))
            assert "persist" not in json.dumps(stage.get(kind, []))


# --- what reruns when a parameter changes ----------------------------------------------------

# Parameter -> the stages it goes into. All that depend on these may rerun too; no other may.
DIRECT = {
    "draw": {"draw"},
    "data": {"split", "card"},
    "data.seed": {"draw", "split", "card"},
    "caption": {"caption", "audit", "card"},
    "caption.bank": {"caption", "card"},
    "finetune": {"finetune", "card"},
    "finetune.base_model": {"finetune", "generate", "audit", "card"},
    "generate": {"generate", "card"},
    "classify": {"classify", "card"},
    "audit": {"audit"},
    "export": {"export"},
    "benchmark": {"benchmark"},
}
OTHER = {  # values for what is no number
    "name": "other",
    "shots": 1,
    "context": "none",
    "bank": "data/contexts/aircraft.jsonl",
    "precision": "bf16",
    "compile": True,
    "sampler": "ddim",
    "mix": "none",
    "seeds": [7],
    "batch_sizes": [2],
    "precisions": ["fp32"],
    "model": "models/other",
    "base_model": "models/other",
    "backbone": "models/other",
    "feature_model": "models/other",
}


def keys():
    values = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    return [(section, key) for section, entries in values.items() for key in entries]


@pytest.mark.slow
def test_every_parameter_reaches_the_stages_it_must_and_no_others(project):
    """DVC's own judgement of what has changed, for every key in turn."""
    original = (project / "params.yaml").read_text()
    (project / "data/other").mkdir()
    (project / "models/other").mkdir()
    (project / "models/other/config.json").write_text("{}")
    (project / "data/other/dataset.yaml").write_text("descriptor: bird\n")
    try:
        for section, key in keys():
            value = read_params(project)[section][key]
            set_params(project, {section: {key: OTHER.get(key) or value + 1}})
            with Repo(project) as repo:
                changed = {name.split(":")[-1] for name in repo.status()}
            expected = DIRECT.get(f"{section}.{key}", DIRECT[section])
            assert changed == expected, f"{section}.{key}"
            (project / "params.yaml").write_text(original)
    finally:
        (project / "params.yaml").write_text(original)
        shutil.rmtree(project / "data/other")
        shutil.rmtree(project / "models/other")


def foreseen(project, monkeypatch):
    """What is not up to date, and by stage what `bob why` says of it."""
    monkeypatch.chdir(project)
    with Pipeline() as pipeline:
        forecast = Forecast(pipeline)
        causes = Causes(pipeline, forecast)
        stale = {stage for stage, state in forecast.states.items() if state != UP_TO_DATE}
        return stale, {stage: causes.of(stage)[0] for stage in pipeline.stages}


def rows_of_the_readme():
    """(What is changed, the stages that run again) by the table in the README; draw aside."""
    text = (ROOT / "README.md").read_text()
    table = text.partition("| you change | runs again |")[2].partition("\n\n")[0]
    above: set[str] = set()
    for line in table.splitlines()[2:]:
        what, again = (cell.strip() for cell in line.strip("|").split("|"))
        stages = set(re.findall(rf"\b({'|'.join(STAGES)})\b", again.partition(":")[0]))
        if "the above" in again:
            stages |= above
        if what.startswith("`") and what.endswith(".*`"):
            above |= stages
        yield what.strip("`"), stages


CHANGES = {  # for each row a parameter
    "benchmark.*": ("benchmark", "repeats"),
    "export.*": ("export", "precisions"),
    "classify.*": ("classify", "epochs"),
    "generate.*": ("generate", "steps"),
    "finetune.*": ("finetune", "rank"),
    "caption.*": ("caption", "image_side"),
    "data.*": ("data", "shots"),
}


@pytest.mark.slow
def test_why_names_the_cause_of_each_row_of_the_readmes_table(project, monkeypatch):
    original = (project / "params.yaml").read_text()
    rows = dict(rows_of_the_readme())
    assert rows.keys() == {
        *CHANGES,
        "a comment in `bob/stages/caption.py",
        "anything, back to what it was",
    }
    for what, (section, key) in CHANGES.items():
        old = read_params(project)[section][key]
        new = OTHER[key] if isinstance(old, list) else old + 1
        set_params(project, {section: {key: new}})
        stale, causes = foreseen(project, monkeypatch)
        assert stale == rows[what], what
        said = {stage: [cause.text for cause in found] for stage, found in causes.items()}
        direct = {stage for stage, found in causes.items() if any(not c.stage for c in found)}
        assert direct == DIRECT[section], what
        for stage in direct:
            change = f"{json.dumps(old)} -> {json.dumps(new)}"
            assert f"parameter {section}.{key} {change}" in said[stage], what
        for stage in stale - direct:  # down to the stage whose own cause it is
            assert {cause.stage for cause in causes[stage]} <= stale, what
        (project / "params.yaml").write_text(original)
    assert foreseen(project, monkeypatch) == (set(), {stage: [] for stage in STAGES})

    module = project / "bob/stages/caption.py"
    code = module.read_text()
    try:
        module.write_text(code + "# a comment\n")
        _, causes = foreseen(project, monkeypatch)
        own = {stage for stage, found in causes.items() if any(not one.stage for one in found)}
        assert own == rows["a comment in `bob/stages/caption.py"] == {"caption", "audit"}
        for stage in own:
            assert causes[stage][0].text == "bob/stages/caption.py: comments or layout only"
    finally:
        module.write_text(code)


@pytest.mark.slow
def test_a_finished_pipeline_is_clean_and_runs_nothing(project):
    assert "up to date" in dvc(project, "status")
    assert not ran(dvc(project, "repro"))


@pytest.mark.slow
def test_change_and_change_back(project):
    original = (project / "params.yaml").read_text()
    lock = (project / "dvc.lock").read_text()

    set_params(project, {"generate": {"guidance_scale": 2.5}})
    assert ran(dvc(project, "repro")) == AFTER_GENERATE
    set_params(project, {"benchmark": {"batch_sizes": [2]}})
    assert ran(dvc(project, "repro")) == {"benchmark", "card", "report"}

    (project / "params.yaml").write_text(original)
    output = dvc(project, "repro")
    assert not ran(output)
    assert restored(output) == AFTER_GENERATE
    assert (project / "dvc.lock").read_text() == lock


@pytest.mark.slow
def test_a_comment_in_the_code_reruns_its_stage_and_the_wave_stops_there(project):
    module = project / "bob/stages/caption.py"
    original = module.read_text()
    try:
        module.write_text(original + "# a comment\n")
        assert ran(dvc(project, "repro")) == {"caption", "audit"}  # both ask the captioner
    finally:
        module.write_text(original)
        dvc(project, "repro")


# --- what a user reads afterwards ------------------------------------------------------------


@pytest.mark.slow
def test_metrics_are_scalars_and_say_what_the_user_asked(project):
    metrics = json.loads(dvc(project, "metrics", "show", "--json"))[""]["data"]

    def scalars(value):
        if isinstance(value, dict):
            return all(map(scalars, value.values()))
        return isinstance(value, int | float | str)

    assert all(scalars(entry["data"]) for entry in metrics.values())
    accuracy = metrics["metrics/accuracy.json"]["data"]
    assert accuracy["lift"] == pytest.approx(
        accuracy["real_and_synthetic"]["top1"] - accuracy["real_only"]["top1"],
        abs=0.011,  # each of the three is rounded to two decimals
    )
    onnx = metrics["metrics/onnx.json"]["data"]
    assert onnx["top1"] == pytest.approx(onnx["torch_top1"])
    assert metrics["metrics/synthetic.json"]["data"]["images"] == 4


@pytest.mark.slow
def test_plots_and_artifacts_are_all_there(project):
    page = dvc(project, "plots", "show", "--out", "plots")
    assert "index.html" in page
    html = (project / "plots/index.html").read_text()
    titles = [
        plot["title"]
        for entry in pipeline()["plots"]
        if isinstance(entry, dict)
        for plot in entry.values()
    ]
    assert len(titles) == 6
    for name in (*titles, "results/audit/contact_sheets/01.png"):
        assert name in html, name
    for artifact in pipeline()["artifacts"].values():
        assert (project / artifact["path"]).exists()


@pytest.mark.slow
def test_two_datasets_run_side_by_side_from_the_queue(project):
    """One is a user's own, tracked by DVC and not by git; its photos are no drawing's size."""
    for class_name, colour in (("Robin", "red"), ("Blue_Tit", "blue")):
        (project / "data/mine" / class_name).mkdir(parents=True)
        for number in range(8):
            image = Image.new("RGB", (90, 70 + number), colour)
            image.save(project / "data/mine" / class_name / f"{number}.jpg")
    (project / "data/mine/dataset.yaml").write_text("descriptor: bird\n")
    dvc(project, "add", "data/mine")
    run(project, "git", "add", "data")
    run(project, "git", "commit", "--quiet", "--message", "photos")

    sweep = ("-S", "data.name=mine,miniature", "-S", "finetune.context=none")
    dvc(project, "exp", "run", "--queue", *sweep)
    run_queue(project, jobs=2)
    accuracies = {}
    for commit in json.loads(dvc(project, "exp", "show", "--json")):
        for experiment in commit["experiments"] or []:
            data = experiment["revs"][0]["data"]
            name = data["params"]["params.yaml"]["data"]["data"]["name"]
            accuracies[name] = data["metrics"]["metrics/accuracy.json"]["data"]
    assert set(accuracies) == {"mine", "miniature"}
    assert accuracies["mine"]["real_only"]["top1"] >= 50
    assert read_params(project)["data"]["name"] == "miniature"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["finetune", "classify"])
def test_no_draft_gets_into_an_experiment(project, stage):
    """One that git knows of is in the way of the next `dvc exp run` if this one is killed."""
    as_in_an_experiment = {"DVC_ROOT": str(project), "DVC_EXP_BASELINE_REV": "HEAD"}
    before = run(project, "git", "status", "--porcelain")
    run(
        project, "env", *map("=".join, as_in_an_experiment.items()), *("python", "-m", "bob", stage)
    )
    assert run(project, "git", "status", "--porcelain") == before
    left = project / f"results/.{stage}.4711.x/curves"
    left.mkdir(parents=True)
    try:
        (left / "loss.tsv").write_text("")
        assert run(project, "git", "status", "--porcelain") == before
    finally:
        shutil.rmtree(left.parent)


@pytest.mark.slow
def test_a_long_tail_is_balanced_by_generated_images_and_reported_by_frequency(project):
    original = (project / "params.yaml").read_text()
    try:
        set_params(project, {"data": {"imbalance": 2}})
        dvc(project, "repro", "evaluate")
        real, generated = (
            Counter(json.loads(line)[key] for line in (project / file).read_text().splitlines())
            for file, key in (
                ("results/split/train.jsonl", "class_name"),
                ("results/generate/metadata.jsonl", "class"),
            )
        )
        assert sorted(real.values()) == [1, 2]
        assert sorted(generated.values()) == [2, 3]
        assert len(set((real + generated).values())) == 1
        accuracy = json.loads((project / "metrics/accuracy.json").read_text())
        for variant in ("real_only", "real_and_synthetic"):
            groups = [accuracy[variant][f"top1_{group}"] for group in ("many", "few")]
            assert accuracy[variant]["top1"] == pytest.approx(sum(groups) / 2, abs=0.011)
        assert {"lift_many", "lift_few"} < accuracy.keys()  # of two classes none is medium
    finally:
        (project / "params.yaml").write_text(original)
        dvc(project, "repro")


@pytest.mark.slow
def test_no_synthetic_images_and_no_fine_tuning_still_write_every_output(project):
    original = (project / "params.yaml").read_text()
    try:
        set_params(project, {"generate": {"images_per_class": 0}, "finetune": {"epochs": 0}})
        dvc(project, "repro")
        accuracy = json.loads((project / "metrics/accuracy.json").read_text())
        assert accuracy["lift"] == 0
        assert "up to date" in dvc(project, "status")
    finally:
        (project / "params.yaml").write_text(original)
        dvc(project, "repro")
