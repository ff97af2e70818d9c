"""Prompts, the caption bank, and where contexts are drawn from."""

from collections import Counter
from pathlib import Path
from random import Random

import pytest

from bob.errors import BobError
from bob.formats.files import write_jsonl
from bob.formats.manifest import passed_over_of, read_manifest, write_manifest
from bob.formats.photos import Task
from bob.formats.prompts import (
    Context,
    Entry,
    drawn_from,
    prompt,
    read_bank,
    read_contexts,
    write_bank,
)
from bob.miniature.world import CONTEXTS
from bob.stages.generate import plan as plan_images
from tests.conftest import ROOT

LEAVES, SKY = Context("green leaves", "perched"), Context("blue sky", "flying")
BANK = [
    Entry("a", "Wren", LEAVES),
    Entry("b", "Wren", LEAVES),
    Entry("c", "Tit", SKY),
    Entry("d", "Tit", None),
]
TASK = Task("bird", ("Tit", "Wren"))


def test_the_prompt_is_the_papers_template():
    assert prompt("bird", "Wren", LEAVES) == (
        "a bird photo of a Wren in the green leaves background with the perched pose"
    )
    assert prompt("aircraft", "747-300") == "a aircraft photo of a 747-300"


def test_the_bank_reads_back_as_written(tmp_path):
    write_bank(tmp_path / "bank.jsonl", BANK)
    assert read_bank(tmp_path / "bank.jsonl") == BANK


def test_sources_of_context():
    assert drawn_from("bank", BANK, "Wren") == [LEAVES, LEAVES, SKY]
    assert drawn_from("class", BANK, "Tit") == [SKY]
    assert drawn_from("none", BANK, "Tit") == [None]
    with pytest.raises(BobError, match="class 'Robin' has no context"):
        drawn_from("class", BANK, "Robin")
    with pytest.raises(BobError, match="the caption bank has no context"):
        drawn_from("bank", [Entry("d", "Tit", None)], "Tit")


def test_a_users_contexts_are_read_and_mistakes_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    write_jsonl(path, [{"background": " snow ", "pose": "standing", "class": "Wren"}])
    assert read_contexts(path) == [Context("snow", "standing")]
    for content, told in (
        ('\n{"background": "snow"}', "line 2: pose is missing; allowed: a text that is not blank"),
        ('{"background": "snow", "pose": null}', "line 1: pose is null; allowed: a text"),
        ('{"background": 7, "pose": "standing"}', "line 1: background is 7; allowed: a text"),
        ('{"background": "snow", "pose": " \u2003"}', "line 1: pose is"),
        ("snow", "line 1: not JSON"),
        ("", "holds no context"),
    ):
        path.write_text(content)
        with pytest.raises(BobError, match=told):
            read_contexts(path)


def test_the_contexts_that_come_with_the_project_can_be_used():
    files = sorted((ROOT / "data/contexts").glob("*.jsonl"))
    assert files
    for path in files:
        known = {Context(background, pose) for background, pose in CONTEXTS}
        assert set(read_contexts(path)) <= known


def plan(*arguments, **settings):
    return plan_images(*arguments, common={"steps": 20}, **settings)


def test_a_plan_is_a_prefix_of_a_longer_one_and_ignores_the_other_classes():
    def of_wren(task, count, seed=42):
        images = plan(task, BANK, source="bank", images_per_class=count, seed=seed)
        return [image for image in images if image.class_name == "Wren"]

    assert of_wren(TASK, 200)[:50] == of_wren(TASK, 50)
    assert of_wren(Task("bird", ("Robin", "Wren")), 50) == of_wren(TASK, 50)
    assert of_wren(TASK, 50) != of_wren(TASK, 50, seed=43)


def test_marginalization_draws_whole_pairs_as_often_as_the_bank_has_them_whatever_the_class():
    images = plan(TASK, BANK, source="bank", images_per_class=3000, seed=0)
    for class_name in TASK.classes:
        counts = Counter(image.context for image in images if image.class_name == class_name)
        assert set(counts) == {LEAVES, SKY}
        assert counts[LEAVES] / 3000 == pytest.approx(2 / 3, abs=0.03)
    assert len({image.seed for image in images}) == len(images)
    assert len({image.file for image in images}) == len(images)


def test_context_from_the_same_class_stays_there():
    images = plan(TASK, BANK, source="class", images_per_class=20, seed=0)
    assert {(image.class_name, image.context) for image in images} == {
        ("Wren", LEAVES),
        ("Tit", SKY),
    }


def test_rare_classes_get_as_many_more_images_as_they_have_fewer_photos():
    def of_each(bank, count, source="bank"):
        images = plan(TASK, bank, source=source, images_per_class=count, seed=0)
        return Counter(image.class_name for image in images)

    one_wren = BANK[1:]  # and two tits
    assert of_each(one_wren, 100) == {"Tit": 100, "Wren": 101}
    assert of_each(one_wren, 1, source="class") == {"Tit": 1, "Wren": 2}
    assert of_each(BANK, 100) == {"Tit": 100, "Wren": 100}
    assert not of_each(one_wren, 0)


def test_an_image_is_the_same_whatever_the_balance_of_the_classes():
    def of_wren(bank):
        images = plan(TASK, bank, source="none", images_per_class=5, seed=0)
        return [image for image in images if image.class_name == "Wren"]

    assert of_wren(BANK[1:])[:5] == of_wren(BANK)
    assert len(of_wren(BANK[1:])) == 6


@pytest.mark.parametrize("seed", range(5))
def test_rejected_images_are_replaced_by_the_next_of_their_class(seed):
    """Whatever is rejected: what is left is the longer plan without it, and nothing else moves."""
    random = Random(seed)
    longer = plan(TASK, BANK, source="bank", images_per_class=60, seed=seed)
    rejected = {image.recipe for image in random.sample(longer, random.randrange(1, 40))}
    chosen = plan(TASK, BANK, source="bank", images_per_class=20, seed=seed, rejected=rejected)
    for class_name in TASK.classes:
        of_class = [image for image in longer if image.class_name == class_name]
        left = [image for image in of_class if image.recipe not in rejected]
        assert [image for image in chosen if image.class_name == class_name] == left[:20]
        last = of_class.index(left[19])
        assert passed_over_of(chosen)[class_name] == last + 1 - 20
    assert not passed_over_of(longer)


def test_what_was_rejected_of_another_lora_rejects_nothing():
    rejected = {
        image.recipe
        for image in plan_images(
            TASK, BANK, source="bank", images_per_class=9, seed=0, common={"lora": "another"}
        )
    }
    chosen = plan(TASK, BANK, source="bank", images_per_class=9, seed=0, rejected=rejected)
    assert chosen == plan(TASK, BANK, source="bank", images_per_class=9, seed=0)


def test_a_plan_ends_though_thousands_are_rejected():
    longer = plan(TASK, BANK, source="bank", images_per_class=5000, seed=0)
    rejected = frozenset(image.recipe for image in longer)
    (one, *_) = plan(TASK, BANK, source="bank", images_per_class=1, seed=0, rejected=rejected)
    assert one.file == "images/Tit/5000.png"


def test_a_class_name_that_no_folder_can_have_gets_a_folder_of_its_own():
    names = ("../x", "F/A-18", "F_A-18")
    bank = [Entry(name, name, SKY) for name in names]
    images = plan(Task("aircraft", names), bank, source="bank", images_per_class=1, seed=0)
    folders = {Path(image.file).parent for image in images}
    assert len(folders) == 3
    assert {folder.parent for folder in folders} == {Path("images")}
    assert images[1].prompt.startswith("a aircraft photo of a F/A-18 in the")


def test_no_images_need_no_contexts(tmp_path):
    assert plan(TASK, [], source="bank", images_per_class=0, seed=0) == []
    write_manifest(tmp_path / "metadata.jsonl", [])
    assert read_manifest(tmp_path / "metadata.jsonl") == []


def test_the_manifest_reads_back_as_written(tmp_path):
    images = plan(TASK, BANK, source="bank", images_per_class=5, seed=0)
    images += plan(TASK, BANK, source="none", images_per_class=1, seed=0)
    write_manifest(tmp_path / "metadata.jsonl", images)
    assert read_manifest(tmp_path / "metadata.jsonl") == images
