"""Arms against BOB: what they train on, the rule of seeds, going on after a kill, the page."""

import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from dvc.repo import Repo
from PIL import Image
from ruamel.yaml import YAML

from bench import arms, arms_critics, arms_filters, arms_results, arms_sets
from bench.arms import ARMS, Call, arm_of, measure
from bench.arms_page import MINUS, TUNED, page, way_of
from bench.arms_results import BOB, VERDICT, Row, add_row, by_arm, read_rows
from bench.arms_sampling import ArmMaker
from bench.arms_search import SEARCHES, Search
from bench.arms_task import FewShot, Options, few_shot_project
from bob.cache.items import ItemCache
from bob.errors import BobError
from bob.formats.params import read_yaml
from bob.formats.prompts import Context
from bob.miniature.corpus import draw_pictures
from bob.miniature.world import BACKGROUNDS, POSES, TASK
from bob.models.training import Trainer
from bob.stages import classify
from tests.conftest import ROOT
from tests.dvc_project import TINY

pytestmark = pytest.mark.slow  # together

SETTINGS = TINY | {
    "draw": {"classes": 4, "train_per_class": 4, "per_context": 1},
    "generate": {"images_per_class": 4, "steps": 2, "batch_size": 8},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The miniature at a few images, with a cache that the tests share."""
    folder = tmp_path_factory.mktemp("arms")
    values = read_yaml(ROOT / "params.yaml")
    for section, changes in SETTINGS.items():
        values[section].update(changes)
    with (folder / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(values, file)
    shutil.copyfile(ROOT / "dvc.yaml", folder / "dvc.yaml")
    for name in ("bob", "models"):
        (folder / name).symlink_to(ROOT / name)
    Repo.init(str(folder), no_scm=True).close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms_critics, "JUDGE_STEPS", 2)
        patch.setattr(arms_critics, "JUDGE_PICTURES", 1)
        patch.setattr(arms_critics, "CONTEXT_VARIANTS", 2)
        yield folder


@pytest.fixture
def workspace(project, monkeypatch):
    monkeypatch.chdir(project)
    shutil.rmtree(project / "bench", ignore_errors=True)
    return project


@pytest.fixture(scope="module")
def shots(project):
    """The task under data seed 0, as the current folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        with few_shot_project(read_yaml(Path("params.yaml")), 0):
            yield FewShot(read_yaml(project / "params.yaml"), Options(), 0)


def images_of(what):
    assert what.images is not None
    return what.images


def planned(what):
    """Class and context of each image."""
    return [(image.class_name, image.context) for image in images_of(what).about]


# --- what arms train on ------------------------------------------------------------------------


def test_an_arm_trains_on_as_many_images_as_bob(shots):
    whole = len(arms_sets.bob(shots).synthetic)
    assert whole == 4 * 4
    for name in ("shuffled", "foreign", "balanced", "recombined", "where-needed", "clusters"):
        made = FewShot(shots.values, Options(), 0)
        what = ARMS[name].make(made)
        assert len(what.synthetic) == whole, name
        assert made.evaluations == whole * 2 * 2, f"{name}: two steps, with guidance"
        assert set(what.synthetic.labels) <= set(range(4))


def test_bobs_classifier_is_the_pipelines_own(shots):
    """The same recipe, so that the cache has it once."""
    what = arms_sets.bob(shots)
    ours = shots.trainer(what)
    theirs = Trainer(
        shots.backbone,
        shots.task,
        ours._recipe,
        real=what.real,
        synthetic=what.synthetic,
        validation=ours._validation,
    )
    folder = Path(shots.values["classify"]["backbone"])
    with ItemCache("classify") as cache:
        wanted = [
            classify.classifiers_wanted(cache, folder, one, "real_and_synthetic", [0])
            for one in (ours, theirs)
        ]
    assert wanted[0].recipes == wanted[1].recipes and wanted[0].maker.id == wanted[1].maker.id


def test_shuffled_labels_stay_within_the_family(shots):
    bobs, shuffled = arms_sets.bob(shots).synthetic, arms_sets.shuffled(shots).synthetic
    family = [variant.family for variant in TASK]
    assert shuffled.sha256 == bobs.sha256 and shuffled.labels != bobs.labels
    assert Counter(shuffled.labels) == Counter(bobs.labels)
    pairs = zip(bobs.labels, shuffled.labels, strict=True)
    assert all(family[one] == family[other] for one, other in pairs)


def test_the_controls_without_a_generator_cost_no_evaluation(shots):
    made = FewShot(shots.values, Options(), 0)
    drawn, again = arms_sets.drawn(made), arms_sets.again(made)
    assert Counter(drawn.synthetic.labels) == Counter(dict.fromkeys(range(4), 4))
    assert not set(drawn.synthetic.sha256) & set(shots.real.sha256)
    assert again.synthetic == again.real == shots.real and made.evaluations == 0


def test_foreign_images_are_of_no_class_of_the_task(shots):
    images = images_of(arms_sets.foreign(shots))
    assert not {image.class_name for image in images.about} & set(shots.task.classes)
    assert not any(name in images.about[0].prompt for name in shots.task.classes)
    assert set(images.labelled.labels) == {0, 1, 2, 3}


def test_balanced_contexts_are_the_same_for_every_class_and_a_prefix_of_more(shots):
    few = arms_sets.balanced(shots)
    by_class = {
        name: [context for other, context in planned(few) if other == name]
        for name in shots.task.classes
    }
    assert len({tuple(contexts) for contexts in by_class.values()}) == 1
    assert len(shots.bank) == 8
    values = {**shots.values, "generate": {**shots.values["generate"], "images_per_class": 16}}
    more = arms_sets.balanced(FewShot(values, Options(), 0))
    own = [context for name, context in planned(more) if name == shots.task.classes[0]]
    assert own[:4] == by_class[shots.task.classes[0]]
    assert Counter(own) == Counter(
        {e.context: 2 for e in shots.bank}
        | {context: 2 * count for context, count in Counter(e.context for e in shots.bank).items()}
    )


def test_recombined_contexts_are_pairs_that_no_photo_has(shots):
    values = {**shots.values, "generate": {**shots.values["generate"], "images_per_class": 16}}
    made = planned(arms_sets.recombined(FewShot(values, Options(), 0)))
    seen = {entry.context for entry in shots.bank}
    assert {context.background for _, context in made} <= {one.background for one in seen}
    assert {context for _, context in made} - seen


def test_clusters_need_no_captioner(shots, monkeypatch):
    monkeypatch.setattr(FewShot, "contexts_seen", None)
    images = images_of(arms_sets.clusters(shots))
    assert all("number" in image.prompt and "sky" not in image.prompt for image in images.about)


def test_soft_labels_are_a_mean_of_what_was_asked_for_and_what_is_said(shots):
    what = arms_sets.soft_labels(shots)
    assert what.soft is not None and what.soft.shape == (16, 4)
    assert what.soft.sum(1) == pytest.approx(torch.ones(16))
    asked = what.soft[torch.arange(16), torch.tensor(what.synthetic.labels)]
    assert (asked >= 0.5).all() and (asked < 1).any()


def test_the_photos_are_there_twice_once_autoencoded(shots):
    what = arms_sets.autoencoded(shots)
    assert what.real.labels == shots.real.labels * 2
    assert not set(what.real.sha256[:8]) & set(what.real.sha256[8:])


def test_augmentation_and_soft_targets_change_what_is_served_and_nothing_else(shots):
    what = arms_sets.bob(shots)
    indices = torch.arange(8)

    def served(**options):
        trainer = FewShot(shots.values, Options(**options), 0).trainer(what)
        torch.manual_seed(0)
        return trainer._images(what.synthetic).crops(indices, torch.Generator().manual_seed(0))

    plain, targets = served()
    same, smooth = served(smoothing=0.1)
    other, same_targets = served(augment="trivial")
    assert torch.equal(plain, same) and torch.equal(targets, same_targets)
    assert smooth.max().item() == pytest.approx(0.9 + 0.1 / 4)
    assert not torch.equal(plain, other) and other.shape == plain.shape


def test_leakage_is_of_the_contexts_that_are_seen(shots, monkeypatch):
    asked = []

    def seen(self, paths, names):
        asked.append(len(paths))
        return [Context(name, f"pose {number % 2}") for number, name in enumerate(names)]

    monkeypatch.setattr(FewShot, "contexts_seen", seen)
    images = shots.bobs_images()
    leakage = shots.leakage(images, 2)
    assert leakage["leakage_background"] == pytest.approx(1) and leakage["leakage_pose"] < 0.01
    shots.leakage(images, 100)
    assert asked == [8, 16]


# --- filters -----------------------------------------------------------------------------------


def test_a_filter_drops_the_worst_of_each_class():
    belief = np.array([0.9, 0.1, 0.5, 0.4, 0.2, 0.3, 0.8, 0.7, 0.6, 0.05])
    labels = np.array([0] * 5 + [1] * 5)
    assert arms_filters.worst_of_each_class(belief, labels, 20) == {1, 9}
    assert arms_filters.worst_of_each_class(belief, labels, 40) == {1, 4, 5, 9}


@pytest.mark.parametrize("critic", arms_critics.CRITICS)
def test_every_critic_judges_all_images(shots, critic):
    what = arms_filters.filtered(critic, 30)(shots)
    assert len(what.synthetic) == 16 - 4 and len(images_of(what)) == 12
    assert Counter(what.synthetic.labels) == Counter(dict.fromkeys(range(4), 3))
    assert what.figures.keys() == {"wrong", "wrong_dropped", "unfamiliar_dropped"}


def test_the_judge_of_contexts_names_those_of_true_pictures(tmp_path, monkeypatch):
    """Taught by a dozen variants, in a few steps, of one that it has not seen."""
    monkeypatch.setattr(arms_critics, "JUDGES", tmp_path)
    monkeypatch.setattr(arms_critics, "JUDGE_STEPS", 60)
    monkeypatch.setattr(arms_critics, "CONTEXT_VARIANTS", 12)
    monkeypatch.chdir(ROOT)
    drawn = draw_pictures(TASK[:1], range(2))
    paths = [tmp_path / f"{number}.png" for number in range(len(drawn))]
    for path, pixels in zip(paths, drawn.pixels, strict=True):
        Image.fromarray(pixels).save(path)
    named = arms_critics.true_contexts(paths)
    for attribute, names in (("background", BACKGROUNDS), ("pose", POSES)):
        true = [names[number] for number in getattr(drawn, attribute)]
        right = [getattr(one, attribute) == name for one, name in zip(named, true, strict=True)]
        assert np.mean(right) > 0.7, attribute


def test_a_cross_fitted_critic_has_not_seen_what_it_judges(shots, monkeypatch):
    judged, seen = [], []

    def probabilities(self, trainer, paths):
        judged.append(set(paths))
        seen.append(set(trainer._synthetic.paths))
        return torch.full((len(paths), 4), 0.25)

    monkeypatch.setattr(FewShot, "trained", lambda self, trainer, seed: trainer)
    monkeypatch.setattr(FewShot, "probabilities", probabilities)
    images = shots.bobs_images()
    assert arms_critics.cross_fitted(shots, images, (0, 1)).sum(1) == pytest.approx(torch.ones(16))
    assert [len(paths) for paths in judged] == [6, 6, 5, 5, 5, 5]
    pairs = list(zip(judged, seen, strict=True))
    assert all(one | other == set(images.labelled.paths) for one, other in pairs)
    assert not any(one & other for one, other in pairs)


# --- samplers ----------------------------------------------------------------------------------


def maker(solver="", spacing="", interval=(0.0, math.inf)):
    return ArmMaker(
        ROOT / "models/miniature-base",
        Path("results/finetune/lora"),
        sampler="dpmsolver++",
        steps=6,
        guidance_scale=3.0,
        precision="fp32",
        batch_size=2,
        solver=solver,
        spacing=spacing,
        interval=interval,
    )


def test_other_samplers_make_other_images_under_other_names(shots):
    shots.bobs_images()  # there is a LoRA
    prompts = ["a aircraft photo of a Heron 300"] * 2
    makers = {
        "bob": maker(),
        "karras": maker(spacing="karras"),
        "unipc": maker(solver="unipc"),
        "ays": maker(solver="ays"),
        "middle": maker(interval=(0.3, 5.0)),
        "all": maker(interval=(0.0, 1e9)),
    }
    made = {name: one.make(prompts, [0, 1])[0].tobytes() for name, one in makers.items()}
    assert made["all"] == made["bob"], "an interval that holds every step"
    assert len(set(made.values())) == 5
    assert len({str(one.settings) for one in makers.values()}) == 6
    assert "arms" not in makers["bob"].settings
    assert makers["bob"].evaluations == makers["all"].evaluations == 12
    assert 6 < makers["middle"].evaluations < 12


# --- names -------------------------------------------------------------------------------------


def test_an_arm_is_told_settings_by_its_name(workspace):
    arm = arm_of("balanced:classify.real_weight=0.3,smoothing=0.1")
    assert arm.values["classify"]["real_weight"] == 0.3 and arm.options.smoothing == 0.1
    assert arm.make is arms_sets.balanced
    drop = [f"filter-truth-{share}:smoothing=0.1" for share in (10, 20, 30)]
    assert arms.names_of(["filter-truth-*:smoothing=0.1"], [], [0], [0]) == [BOB, *drop]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("balance", "no arm balance.*balanced"),
        ("bob:classify.real_weigth=1", "real_weigth.*real_weight"),
        ("bob:data.seed=3", "data.seed is not an arm's"),
        ("bob:solver=euler", "solver is 'euler'; allowed:.*unipc"),
        ("bob:smoothing=much", "allowed: a number"),
        ("bob:smooth=1", "smooth is no option"),
        ("bob:steps", "write key=value"),
    ],
)
def test_a_wrong_name_is_told(workspace, name, why):
    with pytest.raises(BobError, match=why):
        arm_of(name)


# --- measuring ---------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(arms.main, arguments)


def row_of(arm, seed, number, val=80.0, test=math.nan, code="x"):
    return Row(arm, seed, number, code, val, test, 800, 32000, 1.0)


def test_what_is_missing_is_measured_and_a_kill_loses_one(workspace, monkeypatch):
    result = invoke("real", "--seeds", "0", "--classifier-seeds", "1")
    assert result.exit_code == 0, result.output
    rows = read_rows()
    assert [(row.arm, row.data_seed, row.classifier_seed) for row in rows] == [
        ("bob", 0, 0),
        ("real", 0, 0),
    ]
    assert all(math.isnan(row.test_top1) and 0 <= row.val_top1 <= 100 for row in rows)
    assert not math.isnan(rows[0].leakage_pose) and math.isnan(rows[1].leakage_pose)
    assert line_of("real", result.output).count("| 1 |") == 1, "one data seed"

    trained = FewShot.trained

    def killed(self, trainer, seed, with_synthetic=True):
        if seed == 2:
            raise KeyboardInterrupt
        return trained(self, trainer, seed, with_synthetic)

    monkeypatch.setattr(FewShot, "trained", killed)
    assert invoke("real", "--seeds", "0").exit_code
    assert [(row.arm, row.classifier_seed) for row in read_rows()][2:] == [("bob", 1)]
    monkeypatch.setattr(FewShot, "trained", trained)
    assert invoke("real", "--seeds", "0").exit_code == 0
    assert len(read_rows()) == 6
    assert not (workspace / "results").exists(), "nothing of the workspace is touched"


def test_all_arms_have_the_first_data_seed_before_one_has_the_next(workspace):
    call = Call(["real", "balanced"], range(3), range(1), math.inf, False, Path("none.csv"))
    assert [(seed, arm.name) for seed, arm, _ in call.missing()] == [
        (seed, name) for seed in range(3) for name in (BOB, "real", "balanced")
    ]


def test_rows_of_other_code_are_told_and_measured_again_when_asked(workspace):
    for name in (BOB, "real"):
        add_row(row_of(name, 0, 0))
    assert "2 of 2 rows, of 2 arms, were measured with other code" in invoke("--page").output
    for again, left in ((False, 0), (True, 2)):
        call = Call(["real"], [0], [0], math.inf, again, arms_results.RESULTS)
        assert len(call.missing()) == left


def test_a_mangled_line_is_told(workspace):
    add_row(row_of(BOB, 0, 0))
    arms_results.RESULTS.write_text(arms_results.RESULTS.read_text().replace("bob,0", "bob,zero"))
    assert "line 2 is no result" in invoke("--page").output


# --- the rule of seeds -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["real", "--seeds", "16"], "16 is the study's"),
        (["real", "--seeds", "9-10"], "10 is for nothing"),
        (["real", "--seeds", "21"], "21 is for verdicts"),
        (["real", "--seeds", "a-b"], "no seeds"),
        (["--verdict"], "named one by one"),
        (["filter-*", "--verdict"], "named one by one"),
        (["real-tuned", "--verdict"], "named one by one"),
        (["real", "--verdict", "--again"], "no --again"),
        (["real", "--verdict", "--seeds", "30-31"], "31 is for nothing"),
        (["real", "--verdict", "--seeds", "9"], "9 is for tuning"),
    ],
)
def test_data_seeds_are_for_what_they_are_for(workspace, arguments, why):
    result = invoke(*arguments)
    assert result.exit_code == 1 and why in result.output
    assert not read_rows()


def judged(arm, code="x", lift=0.0):
    return [
        row_of(arm, seed, number, test=80 + seed % 3 + lift + (seed % 2) * bool(lift), code=code)
        for seed in VERDICT
        for number in range(3)
    ]


def test_an_arm_is_judged_once_and_a_verdict_that_was_killed_goes_on(workspace, monkeypatch):
    measured = []

    def noted(arm, seed, numbers, results):
        measured.append((arm.name, seed, list(numbers)))
        rows = [row_of(arm.name, seed, one, test=81.0, code=arm.code) for one in numbers]
        for row in rows:
            add_row(row, results)
        return rows

    monkeypatch.setattr(arms, "measure", noted)
    for row in [*judged(BOB), *judged("real", code=arm_of("real").code)[:-2]]:
        add_row(row)
    assert "## Verdicts" not in invoke("--page").output, "not before it is complete"
    result = invoke("real", "--verdict")
    assert result.exit_code == 0, result.output
    assert measured == [("real", 30, [1, 2])]
    assert "## Verdicts" in result.output
    result = invoke("real", "--verdict")
    assert result.exit_code == 1 and "judged already" in result.output
    add_row(row_of("balanced", 21, 0, test=80.0, code="other"))
    assert "begun with other code" in invoke("balanced", "--verdict").output


def test_test_is_measured_for_a_verdict_alone(workspace, monkeypatch):
    monkeypatch.setattr(FewShot, "tested", lambda self, weights: 12.5)
    for seed, test in ((1, math.nan), (21, 12.5)):
        with few_shot_project(read_yaml(Path("params.yaml")), seed):
            (row,) = measure(arm_of("real"), seed, [0], workspace / arms_results.RESULTS)
        assert str(row.test_top1) == str(test)


# --- the page ----------------------------------------------------------------------------------


def line_of(arm, text):
    (line,) = [one for one in text.splitlines() if one.startswith(f"| `{arm}` |")]
    return line


def test_differences_are_paired_and_validation_alone_is_shown_of_tuning(workspace):
    rows = []
    for seed in range(5):
        for number in range(3):
            bob = 70.0 + 10 * seed + number
            rows += [row_of(BOB, seed, number, bob), row_of("real", seed, number, bob - 4 - number)]
    rows += [row_of("real", 7, number, 1.0) for number in range(3)]
    rows += [row_of(arm, 8, 0, 50.0) for arm in (BOB, "real")]
    text = page(rows, {}, {})
    line = line_of("real", text)
    assert f"| `real` | 86.00 | {MINUS}5.00 | {MINUS}5.00 to {MINUS}5.00 | 5 |" in line, (
        "data seed 7 is not BOB's, and 8 is not whole"
    )
    assert "## Verdicts" not in text
    text = page([*rows, *judged(BOB), *judged("real", lift=2.0)], {}, {}).split("## Verdicts")[1]
    line = line_of("real", text)
    assert "| 10 |" in line and "+2.50" in line and line.count("| < 0.001 |") == 1


def test_an_arm_stands_against_the_tuned_recipe_where_it_has_its_settings():
    rows = [*judged(BOB), *judged(TUNED, lift=1.0)]
    alike = [f"balanced:{TUNED.partition(':')[2]}", "real", "drawn:classify.real_weight=0.1"]
    others = ["balanced", "drawn", "bob:classify.real_weight=0.1"]
    for arm in alike + others:
        rows += judged(arm, lift=2.0)
    text = page(rows, {}, {}).split("## Verdicts")[1]
    assert all("| +2.50 |" in line_of(arm, text) for arm in alike + others)
    assert all("| +1.00 |" in line_of(arm, text) for arm in alike)
    assert not any("| +1.00 |" in line_of(arm, text) for arm in others)


def test_of_a_verdict_that_is_not_complete_nothing_is_shown():
    rows = [*judged(BOB), *judged("real", lift=1.0), *judged(TUNED, lift=3.0)[:-1]]
    text = page(rows, {}, {}).split("## Verdicts")[1]
    assert TUNED not in text and "+1.50" not in text.replace("| +1.50 |", "", 1)


def test_the_way_to_the_ceiling_is_over_data_seeds_that_all_three_have():
    rows = [row_of(arm, seed, n, 99.0) for arm, seed in (("drawn", 3), (BOB, 4)) for n in range(3)]
    for seed, spread in enumerate((-1.0, 0.0, 1.0)):
        for arm, accuracy in (("real", 60.0), (BOB, 78.0 + spread), ("drawn", 80.0)):
            rows += [row_of(arm, seed, number, accuracy) for number in range(3)]
    way = way_of(BOB, by_arm(rows), "val_top1", range(10))
    assert way.mean == pytest.approx(90) and way.low < 90 < way.high
    assert "| 90 (" in page(rows, {}, {})
    assert math.isnan(way_of(BOB, by_arm(rows[:6]), "val_top1", range(10)).mean)


# --- searches ----------------------------------------------------------------------------------


def test_a_search_goes_on_from_the_best_of_each_stage():
    search = Search("real", "", ({"classify.mix": ("none", "mixup")}, {"smoothing": ("0", "0.1")}))
    first = ["real:classify.mix=none", "real:classify.mix=mixup"]

    def rows(values):
        return [row_of(name, seed, 0, val) for name, val in values.items() for seed in (0, 1)]

    assert search.arms({}, [0, 1], [0]) == first
    some = rows(dict(zip(first, (70.0, 75.0), strict=True)))
    assert search.arms(by_arm(some[:-1]), [0, 1], [0]) == first, "one data seed is missing"
    second = [f"real:classify.mix=mixup,smoothing={value}" for value in ("0", "0.1")]
    assert search.arms(by_arm(some), [0, 1], [0]) == first + second


def test_every_point_of_every_search_is_an_arm(workspace):
    def best_first(names):
        return [row_of(name, 0, 0, 90.0 - place) for place, name in enumerate(names)]

    for search in SEARCHES.values():
        names: list[str] = []
        for _ in search.stages:
            names = search.arms(by_arm(best_first(names)), [0], [0])
        assert all(arm_of(name).name == name for name in names)


def test_an_arm_has_one_name_in_whatever_order_its_settings_are_told(workspace):
    told = "real:smoothing=0.1,classify.epochs=2"
    assert arm_of(told).name == "real:classify.epochs=2,smoothing=0.1"
    for row in judged("real:classify.epochs=2,smoothing=0.1", code=arm_of(told).code):
        add_row(row)
    result = invoke(told, "--verdict")
    assert result.exit_code == 1 and "judged already" in result.output


def test_all_arms_are_listed(workspace):
    told = invoke("--list").output
    assert all(name in told for name in (*ARMS, "real-tuned"))
    assert replace(ARMS[BOB], name="x").code == ARMS["balanced"].code, "of one module"
