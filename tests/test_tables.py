"""The paper's tables: presets, grids, sweeps chosen on validation, the page, and one run by DVC."""

import csv
from pathlib import Path
from statistics import fmean

import pytest
from ruamel.yaml import YAML

from bob.commands import study as studies
from bob.commands.study import page, plan, queue
from bob.commands.study.results import Row, value
from bob.errors import BobError
from bob.formats.params import read_yaml
from bob.formats.presets import read_presets
from tests.conftest import ROOT, told_of
from tests.dvc_project import make_project, run

TABLES = {"table-1": 704, "long-tail": 144, "ablation": 108, "context-sources": 54}
"""The files of the paper's tables, and how many runs fill each."""

PRESETS = """
common: {about: "", params: {classify.epochs: 7, classify.seeds: [0]}}
ten: {about: "", params: {data.shots: 10}}
bob: {about: "", params: {finetune.context: caption, generate.context: bank}}
none: {about: "", params: {finetune.context: none, generate.context: none}}
"""
GRID = """
title: A table
seeds: [1, 2]
use: [common]
params: {classify.epochs: 9, classify.weight_decay: 1e-3}
settings:
  plain: {seeds: [1], use: [none], params: {classify.weight_decay: 1e-4}, sweep: {}}
grids:
  - use: [[ten], [bob, none]]
sweep: {classify.learning_rate: [1e-4, 1e-3], classify.real_weight: [0.3, 0.7]}
tables:
  - title: Shots
    metric: real_and_synthetic.top1
    unit: "%"
    columns: {BOB: bob, DataDream: none}
    mean: true
    rows:
      - {label: both, setting: "ten-{column}", paper: {BOB: 80.25, mean: 75.5}}
      - {label: real, setting: "ten-{column}", metric: real_only.top1}
  - title: Few
    metric: "real_and_synthetic.{column}"
    columns: {all: top1, few: top1_few}
    rows: [{label: plain, setting: plain, paper: {few: 39.72}}]
"""


@pytest.fixture
def project(study_folder):
    """A small study of a grid."""
    (study_folder / "grid.yaml").write_text(GRID)
    (study_folder / "presets.yaml").write_text(PRESETS)
    return study_folder


def grid():
    return plan.read_study(Path("grid.yaml"))


# --- settings --------------------------------------------------------------------------------


def test_a_grid_is_a_setting_for_each_combination_of_its_presets(project):
    study = grid()
    assert list(study.settings) == ["plain", "ten-bob", "ten-none"]
    assert study.settings["ten-none"].overrides == {
        "classify.epochs": 9,
        "classify.seeds": [0],
        "classify.weight_decay": 1e-3,
        "data.shots": 10,
        "finetune.context": "none",
        "generate.context": "none",
    }
    assert study.settings["ten-none"].seeds == (1, 2)


def test_what_is_the_settings_own_wins_over_what_is_common_and_params_over_presets(project):
    plain = grid().settings["plain"]
    assert plain.overrides["classify.weight_decay"] == 1e-4
    assert plain.overrides["classify.epochs"] == 9
    assert plain.seeds == (1,)
    assert not plain.swept


def test_a_sweep_runs_all_combinations_and_the_first_of_every_setting_before_the_others(project):
    runs = grid().runs()
    assert [run.setting.name for run in runs] == (
        ["plain"] + ["ten-bob"] * 2 + ["ten-none"] * 2 + ["ten-bob"] * 6 + ["ten-none"] * 6
    )
    swept = {
        (classify["learning_rate"], classify["real_weight"])
        for run in runs
        if run.setting.name == "ten-bob"
        for classify in [run.values["classify"]]
    }
    assert swept == {(1e-4, 0.3), (1e-4, 0.7), (1e-3, 0.3), (1e-3, 0.7)}
    assert len({run.name for run in runs}) == len(runs) == 17


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[bob, none]]", "[bop, none]]", "ten-bop: presets.yaml has no 'bop'; did you mean bob?"),
        ("use: [common]", "use: [comon]", "has no 'comon'; did you mean common?"),
        ("  plain: {", "  ten-bob: {", "grid.yaml: two settings are called ten-bob"),
        ("seeds: [1, 2]\n", "", "setting ten-bob has no seeds"),
        ("[1e-4, 1e-3]", "[1e-4, -1]", "ten-bob: classify.learning_rate is -1; allowed: a number"),
        ("[1e-4, 1e-3]", "1e-4", "sweep.classify.learning_rate is 0.0001; allowed: a list"),
        ("[ten], [bob", "ten, [bob", 'grids.0.use.0 is "ten"; allowed: a list'),
        ("ten-{column}", "tin-{column}", "table 'Shots' names the setting 'tin-bob'; did you mean"),
        ("metric: real_only.top1", "metric: lift", "'Shots': lift of ten-bob, a sweep, has no"),
        ("paper: {BOB", "paper: {Bob", "has no column 'Bob'; there are BOB, DataDream, mean"),
        ("paper: {few", "paper: {mean", "'Few' has no column 'mean'; there are all, few"),
        ("BOB: 80.25", "BOB: eighty", 'rows.0.paper.BOB is "eighty"; allowed: a number'),
    ],
)
def test_a_mistake_is_told_in_one_line(project, old, new, message):
    told = told_of(Path("grid.yaml"), GRID, old, new)
    assert message in told


def test_a_mistake_in_the_presets_is_told_with_their_file(project):
    (project / "presets.yaml").write_text("bob: [finetune.context]")
    with pytest.raises(BobError, match=r"^presets\.yaml: bob is .*allowed: a section of param"):
        grid()


def test_a_study_of_nothing_is_an_error(project):
    (project / "grid.yaml").write_text("title: Nothing")
    with pytest.raises(BobError, match=r"grid\.yaml measures nothing; give it settings or grids"):
        grid()


# --- what is run -----------------------------------------------------------------------------


def measured(runs):
    """Rows of `runs` in which the run that is best on test is never the one best on validation.

    Of each sweep, real only is best on validation with the learning rate 1e-4 and real plus
    synthetic with 1e-3, both with the weight 0.7.
    """
    rows = []
    for one in runs:
        classify = one.values["classify"]
        slow, heavy = classify["learning_rate"] < 5e-4, classify["real_weight"] > 0.5
        none = one.values["generate"]["context"] == "none"
        rows.append(
            Row.of(
                one,
                {
                    "real_only.top1": 60.0 + 5 * (not slow) + 2 * one.data_seed,
                    "real_only.val_top1": 50.0 + slow,
                    "real_and_synthetic.top1": 80.0 - 10 * none + 5 * slow - heavy + one.data_seed,
                    "real_and_synthetic.val_top1": 70.0 + 2 * (not slow) + heavy,
                },
            )
        )
    return rows


def queued(monkeypatch, **options):
    """The names of the settings and the seeds that a study puts into the queue."""
    asked = []

    def run_all(runs, jobs, keep):
        asked.extend(runs)
        keep((one, measured([one])[0].metrics) for one in runs)
        return []

    monkeypatch.setattr(queue, "run_all", run_all)
    studies.study(Path("grid.yaml"), **options)
    return [(one.setting.name, one.data_seed) for one in asked]


def test_a_part_is_run_alone_and_every_run_of_a_sweep_is_a_row(project, monkeypatch):
    assert set(queued(monkeypatch, only=["ten-n*", "plain"])) == {
        ("ten-none", 1),
        ("ten-none", 2),
        ("plain", 1),
    }
    with Path("docs/grid-study.csv").open() as file:
        rows = [row["setting"] for row in csv.DictReader(file)]
    assert rows == ["plain"] + ["ten-none"] * 8
    assert set(queued(monkeypatch)) == {("ten-bob", 1), ("ten-bob", 2)}
    assert queued(monkeypatch) == []
    with pytest.raises(BobError, match=r"grid\.yaml has no setting 'clip-\*'; there are plain, te"):
        studies.study(Path("grid.yaml"), only=["clip-*"])


def test_what_runs_wait_for_is_named_before_any_is_run_and_hinders_no_page(project, monkeypatch):
    text = PRESETS.replace(
        "{data.shots", "{data.name: cars, finetune.base_model: models/sd21, data.shots"
    )
    text = text.replace("generate.context: bank", "generate.context: data/contexts/mine.jsonl")
    (project / "presets.yaml").write_text(text)
    with pytest.raises(BobError) as caught:
        queued(monkeypatch)
    assert str(caught.value).startswith("data/cars, data/contexts/mine.jsonl, models/sd21: not her")
    assert queued(monkeypatch, only=["plain"]) == [("plain", 1)]
    assert queued(monkeypatch, page_only=True) == []


# --- what is reported ------------------------------------------------------------------------


def cell(metric, seed, rows):
    setting = grid().settings["ten-bob"]
    return value(plan.Arm("", setting, metric), seed, {row.run: row for row in rows})


def test_validation_chooses_among_the_runs_of_a_sweep_for_each_seed_and_variant(project):
    rows = measured(grid().runs())
    assert cell("real_and_synthetic.top1", 1, rows) == 80 - 1 + 1
    assert cell("real_and_synthetic.top1", 2, rows) == 80 - 1 + 2
    assert cell("real_only.top1", 2, rows) == 60 + 4
    rows = [
        Row(r.setting, r.run, r.code, r.inputs, r.metrics | {"real_and_synthetic.top1_few": few})
        for few, r in enumerate(rows)
    ]
    chosen = next(
        row
        for row in rows
        if row.run[1] == 1
        and "learning_rate=0.001 classify.real_weight=0.7" in row.run[0]
        and row.setting == "ten-bob"
    )
    few = cell("real_and_synthetic.top1_few", 1, rows)
    assert few == chosen.metrics["real_and_synthetic.top1_few"]


def test_nothing_is_reported_of_a_sweep_that_is_not_finished(project):
    rows = measured(grid().runs())
    last = next(row for row in reversed(rows) if row.setting == "ten-bob")
    rows.remove(last)
    assert cell("real_and_synthetic.top1", last.run[1], rows) is None
    assert cell("real_and_synthetic.top1", 3 - last.run[1], rows) is not None


def test_a_sweep_without_validation_photos_is_an_error_that_says_what_to_do(project):
    rows = [
        Row(r.setting, r.run, r.code, r.inputs, {"real_only.top1": 50.0})
        for r in measured(grid().runs())
    ]
    with pytest.raises(BobError, match=r"ten-bob has .*real_only\.val_top1.*data\.val_per_class"):
        cell("real_only.top1", 1, rows)


def table(text, title):
    """The lines of one table on a page: label and kind -> cells."""
    lines = text.split(f"## {title}\n")[1].split("\n\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    cells, label = {}, ""
    for first, kind, *rest in rows[2:]:
        label = first or label
        cells[label, kind] = rest
    return rows[0][2:], cells


def test_the_page_shows_ours_the_papers_and_the_difference(project):
    study = grid()
    page.write(study, measured(study.runs()))
    text = study.page.read_text()
    columns, cells = table(text, "Shots")
    assert columns == ["BOB", "DataDream", "mean"]
    # The seeds' 80 and 81: a mean of 80.5, and t(0.975, 1) * 0.7071 / sqrt(2) = 6.35.
    assert cells["both", "ours"] == ["80.50 ± 6.35", "70.50 ± 6.35", "75.50 ± 6.35"]
    assert cells["both", "paper"] == ["80.25", "not known", "75.50"]
    assert cells["both", "difference"] == ["+0.25", page.DASH, "+0.00"]
    assert cells["real", "paper"] == ["not known"] * 3
    columns, cells = table(text, "Few")
    assert cells["plain", "ours"] == ["76.00", page.DASH], "one seed, and no long tail"
    assert cells["plain", "paper"] == ["not known", "39.72"]
    assert "17 of 17 runs are measured" in text
    assert "claim" not in text


def test_where_a_run_is_missing_there_is_a_dash_and_no_mean(project):
    study = grid()
    rows = [row for row in measured(study.runs()) if (row.setting, row.run[1]) != ("ten-none", 2)]
    page.write(study, rows)
    _, cells = table(study.page.read_text(), "Shots")
    assert cells["both", "ours"] == ["80.50 ± 6.35", page.DASH, page.DASH]
    assert cells["both", "difference"] == ["+0.25", page.DASH, page.DASH]
    assert cells["both", "paper"] == ["80.25", "not known", "75.50"]


# --- the paper's tables ----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "runs"), TABLES.items())
def test_a_table_of_the_paper_can_be_planned_and_its_page_written(
    tmp_path, monkeypatch, name, runs
):
    monkeypatch.chdir(ROOT)
    study = plan.read_study(Path(f"experiments/{name}.yaml"))  # checks every override
    planned = study.runs()
    assert len(planned) == runs
    used = {arm.setting.name for table in study.tables for line in table.lines for arm in line.arms}
    assert used == set(study.settings), "every setting stands in a table"
    assert {len(setting.sweep) for setting in study.settings.values()} <= {8, 18}
    monkeypatch.setattr(plan, "DOCS", tmp_path)
    monkeypatch.setattr(type(study), "runs", lambda self: planned)
    page.write(study, measured(planned))
    text = study.page.read_text()
    assert f"{runs} of {runs} runs are measured" in text
    for shown in study.tables:
        _, cells = table(text, shown.title)
        for line in shown.lines:
            paper = cells[line.label, "paper"]
            figures = [f"{figure:.2f}" for figure in line.published.values()]
            assert [one for one in paper if one != page.UNKNOWN] == figures
            assert cells[line.label, "ours"][0] != page.DASH


def test_full_is_the_recipe_of_the_published_scripts():
    full = read_presets(ROOT / "experiments/presets.yaml")["full"].params
    recipe = {
        "finetune.rank": 16,
        "finetune.learning_rate": 1e-4,
        "finetune.warmup_steps": 100,
        "finetune.epochs": 400,
        "finetune.batch_size": 8,
        "finetune.precision": "fp32",
        "generate.images_per_class": 100,
        "generate.guidance_scale": 2.0,
        "generate.steps": 50,
        "generate.sampler": "pndm",
        "generate.seed": 42,
        "classify.mix_probability": 0.2,
    }
    assert {key: full[key] for key in recipe} == recipe


def test_the_papers_means_are_those_of_its_figures():
    lines = [
        row["paper"]
        for table in read_yaml(ROOT / "experiments/table-1.yaml")["tables"]
        for row in table["rows"]
        if "mean" in row.get("paper", {})
    ]
    assert len(lines) == 7
    for paper in lines:
        figures = [figure for column, figure in paper.items() if column != "mean"]
        assert paper["mean"] == pytest.approx(fmean(figures), abs=0.0051)


# --- run by DVC ------------------------------------------------------------------------------


def make_small(project, name, points):
    """Let every preset be the miniature, and every sweep `points` values of the real weight."""
    presets = read_presets(project / "experiments/presets.yaml")
    switches = {"finetune.context", "generate.context", "data.imbalance"}
    small = {
        name: {"about": "", "params": {k: one.params[k] for k in switches & one.params.keys()}}
        for name, one in presets.items()
    }
    content = read_yaml(project / f"experiments/{name}.yaml")
    content["sweep"] = {"classify.real_weight": points}
    for one in content.get("grids", []):
        one.pop("params", None)  # more shots than the miniature has
        one.pop("sweep", None)
    yaml = YAML()
    for path, values in (("presets", small), (name, content)):
        with (project / f"experiments/{path}.yaml").open("w") as file:
            yaml.dump(values, file)
    contexts = project / "data/contexts/gpt-aircraft.jsonl"
    contexts.parent.mkdir(parents=True, exist_ok=True)
    contexts.write_text('{"background": "fog", "pose": "left"}\n')
    run(project, "git", "add", "--all")
    run(project, "git", "commit", "--quiet", "--message", "small")


def fill(project, name, setting):
    """Run one setting of a table; returns the rows of its CSV, its page and what was printed."""
    command = ["-m", "bob", "study", f"experiments/{name}.yaml", "--only", setting]
    output = run(project, "python", *command)
    with (project / f"docs/{name}-study.csv").open() as file:
        rows = list(csv.DictReader(file))
    return rows, (project / f"docs/{name}-study.md").read_text(), output


@pytest.fixture(scope="module")
def real_project(tmp_path_factory):
    """One for all tables: what their runs share is made once."""
    return make_project(tmp_path_factory.mktemp("tables"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_part_of_the_papers_main_table_is_filled_by_dvc(real_project):
    project = real_project
    make_small(project, "table-1", [0.2, 0.8])
    rows, text, output = fill(project, "table-1", "clip-aircraft-sd21-bob")
    assert "study: 2 runs, 0 measured" in output
    assert len(rows) == 2
    best = max(rows, key=lambda row: float(row["real_and_synthetic.val_top1"]))
    _, cells = table(text, "Stable Diffusion 2.1-base")
    top1 = f"{float(best['real_and_synthetic.top1']):.2f}"
    assert cells["CLIP, BOB", "ours"] == [top1] * 5, "all datasets are the miniature"
    assert cells["CLIP, DataDream", "ours"] == [page.DASH] * 5
    printed = table(output.split("\n\nstudy: ")[0], "Stable Diffusion 2.1-base")
    assert printed == table(text, "Stable Diffusion 2.1-base")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("name", "setting", "title", "label"),
    [
        ("long-tail", "cub-lt-10-bob", "CUB-LT", "10, BOB"),
        ("context-sources", "gpt-contexts", "Contexts from", "100 written by GPT"),
    ],
)
def test_a_part_of_the_papers_other_tables_is_filled_by_dvc(
    real_project, name, setting, title, label
):
    project = real_project
    make_small(project, name, [0.5])
    (row,), text, _ = fill(project, name, setting)
    columns, cells = table(text, title)
    metrics = read_yaml(project / f"experiments/{name}.yaml")["tables"][0]["columns"].values()
    keys = [metric if "." in metric else f"real_and_synthetic.{metric}" for metric in metrics]
    measured = [f"{float(row[key]):.2f}" if row.get(key) else page.DASH for key in keys]
    assert cells[label, "ours"] == measured
    assert cells[label, "ours"][0] != page.DASH
    assert len(columns) == len(keys)
