"""The miniature dataset: what every picture and every split promises."""

import csv
import hashlib
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bob.errors import BobError
from bob.miniature import world
from bob.stages import draw


def pixels(*arguments, **named) -> np.ndarray:
    return np.asarray(world.draw(*arguments, **named)).astype(float)


def run(folder: Path, monkeypatch, seed: int = 0, classes: int = 8, **changed) -> Path:
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    settings = {"classes": classes, "train_per_class": 6, "per_context": 1, **changed}
    draw.run(SimpleNamespace(data=SimpleNamespace(seed=seed), draw=SimpleNamespace(**settings)))
    return folder / "data/miniature"


def truth(dataset: Path) -> list[dict[str, str]]:
    with (dataset / "contexts.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def hashes(dataset: Path) -> dict[str, str]:
    files = sorted(path for path in dataset.rglob("*") if path.is_file())
    return {
        str(path.relative_to(dataset)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


# --- the catalogue


def test_task_has_four_families_of_two_that_differ_in_exactly_one_part():
    families = defaultdict(list)
    for variant in world.TASK:
        families[variant.family].append(variant)
    assert [len(members) for members in families.values()] == [2, 2, 2, 2]
    for one, other in families.values():
        assert one.body == other.body
        assert world.differing_fields(one.parts, other.parts) == 1


def test_each_task_family_differs_in_another_part():
    parts = set()
    for one, other in zip(world.TASK[::2], world.TASK[1::2], strict=True):
        parts |= {
            name
            for name in world.PART_VALUES
            if getattr(one.parts, name) != getattr(other.parts, name)
        }
    assert parts == {"winglet", "tail", "wing", "engines"}


def test_corpus_holds_no_task_variant_by_name_or_by_shape():
    corpus = world.corpus_variants()
    assert not {v.name for v in corpus} & {v.name for v in world.TASK}
    assert not {(v.body, v.parts) for v in corpus} & {(v.body, v.parts) for v in world.TASK}


def test_corpus_holds_other_variants_of_every_task_family():
    corpus = Counter(variant.family for variant in world.corpus_variants())
    assert all(corpus[variant.family] == 4 for variant in world.TASK)


def test_corpus_names_and_shapes_are_unique():
    corpus = world.corpus_variants()
    assert len(corpus) == 204
    assert len({v.name for v in corpus}) == len({(v.body, v.parts) for v in corpus}) == 204


def test_corpus_covers_every_value_of_every_part_and_body():
    corpus = world.corpus_variants()
    for name, values in world.PART_VALUES.items():
        assert {getattr(v.parts, name) for v in corpus} == set(values)
    for name, values in world.BODY_VALUES.items():
        assert {getattr(v.body, name) for v in corpus} == set(values)


# --- one picture


def test_same_arguments_give_the_same_bytes_in_another_process():
    script = (
        "import hashlib; from bob.miniature import world;"
        "image = world.draw(world.TASK[0], 'ocean', 'climbing facing left', 3, 7);"
        "print(hashlib.sha256(image.tobytes()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    here = world.draw(world.TASK[0], "ocean", "climbing facing left", 3, 7)
    assert found == {hashlib.sha256(here.tobytes()).hexdigest() + "\n"}


@pytest.mark.parametrize("changed", [{"index": 1}, {"seed": 1}, {"variant": world.TASK[1]}])
def test_index_seed_and_variant_each_change_the_picture(changed):
    first = {
        "variant": world.TASK[0],
        "background": "grass",
        "pose": world.POSES[0],
        "index": 0,
        "seed": 0,
    }
    assert np.abs(pixels(**first) - pixels(**{**first, **changed})).mean() > 2


def test_a_picture_is_rgb_of_64_pixels():
    image = world.draw(world.TASK[0], "sunset", "level facing right", 0, 0)
    assert (image.mode, image.size) == ("RGB", (64, 64))


def test_an_unknown_background_or_pose_is_an_error():
    with pytest.raises(ValueError, match="not in tuple"):
        world.draw(world.TASK[0], "desert", world.POSES[0], 0, 0)
    with pytest.raises(ValueError, match="not in tuple"):
        world.draw(world.TASK[0], "ocean", "upside down", 0, 0)


def aircraft_alone(variant: world.Variant, pose: str) -> np.ndarray:
    return np.asarray(world._draw_aircraft(variant, pose, np.random.default_rng(0)))


@pytest.mark.parametrize("family", range(4))
def test_the_one_part_of_a_family_covers_twelve_pixels_or_more(family):
    one, other = world.TASK[2 * family : 2 * family + 2]
    for pose in world.POSES:
        difference = aircraft_alone(one, pose).astype(int) - aircraft_alone(other, pose)
        assert (np.abs(difference).max(-1) > 40).sum() >= 12


def test_facing_left_is_the_mirror_image_of_facing_right():
    left = aircraft_alone(world.TASK[0], "level facing left")[..., 3] > 128
    right = aircraft_alone(world.TASK[0], "level facing right")[..., 3] > 128
    # The place is jittered alike, not mirrored: compare shapes about their own middles.
    columns = [np.flatnonzero(mask.any(0)) for mask in (left, right)]
    widths = [inside[-1] - inside[0] for inside in columns]
    assert abs(widths[0] - widths[1]) <= 1
    weights = [
        mask.sum(0)[inside[0] : inside[-1] + 1]
        for mask, inside in zip((left, right), columns, strict=True)
    ]
    n = min(map(len, weights))
    mirrored = np.abs(weights[0][:n] - weights[1][::-1][:n]).sum()
    assert mirrored < np.abs(weights[0][:n] - weights[1][:n]).sum()


@pytest.mark.parametrize("side", ["left", "right"])
def test_climbing_raises_the_nose_and_descending_lowers_it(side):
    def slope(attitude: str) -> float:
        rows, columns = np.nonzero(
            aircraft_alone(world.TASK[6], f"{attitude} facing {side}")[..., 3]
        )
        forward = columns if side == "right" else -columns
        return -float(np.polyfit(forward, rows, 1)[0])  # image rows count downwards

    assert slope("climbing") > slope("level") + 0.2 > slope("descending") + 0.4


def test_backgrounds_are_told_apart_by_their_mean_colours_alone():
    def features(background: str, index: int) -> np.ndarray:
        image = pixels(world.TASK[index % 8], background, world.POSES[index % 6], index, 5)
        return np.concatenate([image[:10].mean((0, 1)), image[-10:].mean((0, 1))])

    centres = {
        background: np.mean([features(background, i) for i in range(20)], 0)
        for background in world.BACKGROUNDS
    }
    right = [
        min(centres, key=lambda name: np.linalg.norm(centres[name] - features(background, i)))
        == background
        for background in world.BACKGROUNDS
        for i in range(20, 40)
    ]
    assert np.mean(right) > 0.9


# --- ties


@pytest.mark.parametrize("seed", range(5))
def test_each_class_is_tied_to_two_backgrounds_and_two_poses(seed):
    tied = world.ties(seed)
    assert set(tied) == {variant.name for variant in world.TASK}
    for backgrounds, poses in tied.values():
        assert len(set(backgrounds) & set(world.BACKGROUNDS)) == 2
        assert len(set(poses) & set(world.POSES)) == 2


@pytest.mark.parametrize("seed", range(5))
def test_two_of_a_family_share_no_context_and_no_two_classes_have_the_same(seed):
    tied = world.ties(seed)
    assert len(set(tied.values())) == 8
    for one, other in zip(world.TASK[::2], world.TASK[1::2], strict=True):
        for mine, theirs in zip(tied[one.name], tied[other.name], strict=True):
            assert not set(mine) & set(theirs)


def test_ties_follow_the_seed():
    assert world.ties(0) == world.ties(0) != world.ties(1)


# --- the stage


def test_training_pictures_keep_to_the_ties(tmp_path, monkeypatch):
    rows = truth(run(tmp_path, monkeypatch, seed=3))
    tied = world.ties(3)
    for row in rows:
        if row["path"].startswith("train/"):
            backgrounds, poses = tied[row["class"]]
            assert row["background"] in backgrounds
            assert row["pose"] in poses


@pytest.mark.parametrize(("split", "each"), [("test", 2), ("val", 1)])
def test_validation_and_test_hold_every_class_in_every_context_equally(
    tmp_path, monkeypatch, split, each
):
    rows = truth(run(tmp_path, monkeypatch, classes=2, per_context=2))
    counts = Counter(
        (row["class"], row["background"], row["pose"])
        for row in rows
        if row["path"].startswith(f"{split}/")
    )
    assert len(counts) == 2 * 36
    assert set(counts.values()) == {each}


def test_only_the_training_pictures_follow_the_seed(tmp_path, monkeypatch):
    one = hashes(run(tmp_path / "one", monkeypatch, seed=0, classes=2))
    other = hashes(run(tmp_path / "other", monkeypatch, seed=1, classes=2))
    assert one.keys() == other.keys()
    changed = {path for path in one if one[path] != other[path]}
    assert changed == {path for path in one if path.startswith("train/")} | {"contexts.csv"}


def test_the_same_parameters_give_the_same_files(tmp_path, monkeypatch):
    one = hashes(run(tmp_path / "one", monkeypatch, classes=2))
    assert one == hashes(run(tmp_path / "other", monkeypatch, classes=2))


def test_a_rerun_with_fewer_classes_leaves_nothing_of_the_others(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, classes=4)
    dataset = run(tmp_path, monkeypatch, classes=2)
    assert sorted(path.name for path in (dataset / "test").iterdir()) == ["Heron_300", "Heron_500"]


def test_the_truth_names_every_picture_once_in_order(tmp_path, monkeypatch):
    dataset = run(tmp_path, monkeypatch, classes=2)
    paths = [row["path"] for row in truth(dataset)]
    assert paths == sorted(str(path.relative_to(dataset)) for path in dataset.rglob("*.png"))


def test_splits_share_no_picture(tmp_path, monkeypatch):
    found = hashes(run(tmp_path, monkeypatch, classes=2))
    images = [digest for path, digest in found.items() if path.endswith(".png")]
    assert len(images) == len(set(images)) == 2 * (6 + 36 + 36)


def test_the_descriptor_names_no_class(tmp_path, monkeypatch):
    dataset = run(tmp_path, monkeypatch, classes=2)
    assert (dataset / "dataset.yaml").read_text() == "descriptor: aircraft\n"


@pytest.mark.parametrize("classes", [0, 9])
def test_a_number_of_classes_that_does_not_exist_is_an_error(tmp_path, monkeypatch, classes):
    with pytest.raises(BobError, match=r"draw\.classes: [09]"):
        run(tmp_path, monkeypatch, classes=classes)


def test_drawing_needs_no_torch():
    script = "import sys, bob.miniature.world; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
