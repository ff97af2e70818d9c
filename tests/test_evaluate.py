"""Stage `evaluate`: the metrics by hand calculation, and the files that plots are made of."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from bob.errors import BobError
from bob.formats import layout
from bob.formats.files import read_json, write_jsonl
from bob.formats.params import Params
from bob.formats.photos import Photo, read_photos, write_photos
from bob.models.device import device_here
from bob.stages import classify, evaluate
from bob.stages.evaluate import accuracy_metrics, shot_groups
from tests.tiny_project import CLASSES, classify_params, make_project, tree

NO_PARAMS = Params({}, "evaluate")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_metrics_are_means_and_sample_deviations_over_seeds_and_the_lift_is_paired() -> None:
    photos = [Photo(f"{i}.png", "a", "") for i in range(10)]

    def named(hits: int) -> list[str]:
        return ["a"] * hits + ["b"] * (10 - hits)

    metrics = accuracy_metrics(
        photos,
        {
            "real_only": {0: named(4), 1: named(6)},
            "real_and_synthetic": {0: named(7), 1: named(9)},
        },
        groups={},
        validation={"real_only": 52.5},
    )
    assert metrics == {
        "real_only": {"top1": 50.0, "top1_std": 14.14, "val_top1": 52.5},
        "real_and_synthetic": {"top1": 80.0, "top1_std": 14.14},
        "lift": 30.0,
        "lift_std": 0.0,
    }


def test_one_seed_has_a_deviation_of_zero() -> None:
    photos = [Photo("0.png", "a", ""), Photo("1.png", "b", ""), Photo("2.png", "b", "")]
    metrics = accuracy_metrics(
        photos,
        {"real_only": {7: ["a", "a", "a"]}, "real_and_synthetic": {7: ["a", "b", "b"]}},
        groups={},
        validation={},
    )
    assert metrics["real_only"] == {"top1": 33.33, "top1_std": 0.0}
    assert (metrics["lift"], metrics["lift_std"]) == (66.67, 0.0)


def shots(**counts: int) -> list[Photo]:
    return [Photo("", name, "") for name, count in counts.items() for _ in range(count)]


@pytest.mark.parametrize(
    ("train", "groups"),
    [
        (shots(a=1, b=2, c=3), {"many": ["c"], "medium": ["b"], "few": ["a"]}),
        (shots(a=1, b=2), {"many": ["b"], "few": ["a"]}),
        (shots(d=2, c=2, b=2, a=9), {"many": ["a"], "medium": ["b", "c"], "few": ["d"]}),
        (
            shots(a=8, b=7, c=6, d=5, e=4, f=3, g=2, h=1),
            {"many": ["a", "b", "c"], "medium": ["d", "e"], "few": ["f", "g", "h"]},
        ),
        (shots(a=3, b=3, c=3), {}),
    ],
)
def test_groups_are_thirds_of_the_classes_by_training_photos(
    train: list[Photo], groups: dict[str, list[str]]
) -> None:
    assert shot_groups(train, {photo.class_name for photo in train}) == groups


def test_classes_that_test_does_not_have_are_in_no_group() -> None:
    assert shot_groups(shots(a=1, b=2, c=3), {"a", "c"}) == {"many": ["c"], "few": ["a"]}


def test_a_group_is_measured_by_the_mean_of_its_classes_and_of_the_seeds() -> None:
    photos = [Photo("", name, "") for name in "aaaabbc"]
    metrics = accuracy_metrics(
        photos,
        {
            "real_only": {0: list("aaccbac"), 1: list("aaaabbb")},
            "real_and_synthetic": {0: list("aaacbbc"), 1: list("aaaabbc")},
        },
        groups={"many": ["a", "b"], "few": ["c"]},
        validation={},
    )
    assert metrics["real_only"] == {
        "top1": round((100 * 4 / 7 + 100 * 6 / 7) / 2, 2),
        "top1_std": 20.2,
        "top1_many": 75.0,  # of 50 and 50, 100 and 100
        "top1_few": 50.0,  # of 100, 0
    }
    assert metrics["lift_many"] == 18.75  # 87.5 and 100 instead of 50 and 100
    assert metrics["lift_few"] == 50.0


def test_the_stage_writes_scalars_only_and_plots_data_that_agree_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path)
    classify.run(classify_params(epochs=2))
    evaluate.run(NO_PARAMS)
    first = tree(layout.EVALUATE), layout.ACCURACY_METRICS.read_bytes()
    evaluate.run(NO_PARAMS)
    assert first == (tree(layout.EVALUATE), layout.ACCURACY_METRICS.read_bytes())
    last_line = capfd.readouterr().out.splitlines()[-1]
    assert last_line.startswith("evaluate: top-1 on 9 test photos")
    assert last_line.endswith(f", on {device_here()}")

    metrics = read_json(layout.ACCURACY_METRICS)
    for variant in ("real_only", "real_and_synthetic"):
        assert {type(value) for value in metrics[variant].values()} == {float}
        predictions = rows(layout.EVALUATE / "predictions" / f"{variant}.csv")
        assert Counter(row["actual"] for row in predictions) == dict.fromkeys(CLASSES, 6)
        hits = sum(row["actual"] == row["predicted"] for row in predictions)
        assert metrics[variant]["top1"] == pytest.approx(100 * hits / 18, abs=0.01)
        per_seed = rows(layout.EVALUATE / "per_seed" / f"{variant}.csv")
        assert [row["seed"] for row in per_seed] == ["0", "1"]
        per_class = rows(layout.EVALUATE / "per_class" / f"{variant}.csv")
        assert [row["class"] for row in per_class] == list(CLASSES)
        mean = sum(float(row["top1"]) for row in per_class) / len(CLASSES)
        assert metrics[variant]["top1"] == pytest.approx(mean, abs=0.01)
    assert metrics["lift"] == pytest.approx(
        metrics["real_and_synthetic"]["top1"] - metrics["real_only"]["top1"], abs=0.011
    )
    assert "null" not in json.dumps(metrics)

    validation = read_json(layout.CLASSIFY / "classifier.json")["validation"]
    for variant, seeds in validation.items():
        mean = sum(result["top1"] for result in seeds.values()) / 2
        assert metrics[variant]["val_top1"] == pytest.approx(mean, abs=0.005)

    write_photos(layout.TRAIN, read_photos(layout.TRAIN)[:-1])  # one less of the last class
    evaluate.run(NO_PARAMS)
    grouped = read_json(layout.ACCURACY_METRICS)
    assert set(grouped) - set(metrics) == {"lift_many", "lift_medium", "lift_few"}
    per_class = rows(layout.EVALUATE / "per_class" / "real_only.csv")
    assert grouped["real_only"] == metrics["real_only"] | {
        f"top1_{group}": float(row["top1"])
        for group, row in zip(("many", "medium", "few"), per_class, strict=True)
    }

    write_jsonl(layout.TEST, [])
    with pytest.raises(BobError, match=r"test\.jsonl lists no photo"):
        evaluate.run(NO_PARAMS)
    (layout.CLASSIFY / "real_only/seed-1/model.safetensors").unlink()
    write_jsonl(layout.TEST, [{"path": "x.png", "class_name": "Red Square", "sha256": ""}])
    with pytest.raises(BobError, match=r"real_only/seed-1 cannot be loaded"):
        evaluate.run(NO_PARAMS)


def test_without_validation_photos_there_is_no_accuracy_on_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path, val=0)
    classify.run(classify_params(epochs=1, seeds=[0]))
    evaluate.run(NO_PARAMS)
    metrics = read_json(layout.ACCURACY_METRICS)
    assert metrics["real_only"].keys() == {"top1", "top1_std"}
