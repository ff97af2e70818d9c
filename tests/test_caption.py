"""The caption stage: what becomes of a captioner's answers, and a real small captioner."""

import itertools
from dataclasses import replace

import pytest

from bob.errors import BobError
from bob.formats.files import sha256
from bob.formats.layout import BANK, CLASSES, TRAIN
from bob.formats.params import Params
from bob.formats.photos import Photo, Task, read_photos, write_photos, write_task
from bob.formats.prompts import Context, read_bank, write_bank
from bob.miniature.world import POSES, TASK, draw
from bob.models.precision import device_name
from bob.stages import caption
from tests.conftest import ROOT

CAPTIONER = ROOT / "models" / "miniature-captioner"
AIRLINERS = Task("aircraft", ("747-300", "747-400"))


@pytest.mark.parametrize(
    ("answer", "phrase"),
    [
        ("Clear sky", "clear sky"),
        ("A clear, blue sky.", "clear, blue sky"),
        ("The background is a grassy field. It is daytime.", "grassy field"),
        ("The background of the aircraft is cloudy sky", "cloudy sky"),
        ("Background: runway", "runway"),
        ('"Tarmac background"', "tarmac"),
        ("Sunset\nThe sun is low.", "sunset"),
        ("", ""),
        ("\n\n", ""),
        (" ".join(["word"] * 40), " ".join(["word"] * caption.MAX_WORDS)),
    ],
)
def test_an_answer_is_cleaned_to_a_short_phrase(answer, phrase):
    assert caption.clean(answer, "background") == phrase


@pytest.mark.parametrize(
    ("answer", "leaks"),
    [
        ("a Boeing 747-300 on a runway", True),
        ("747 300", True),
        ("two 747-400s in the sky", True),
        ("level, facing left", False),
        ("1747-300", False),
        ("in front of gate 747", False),
    ],
)
def test_an_answer_that_names_a_class_is_recognised(answer, leaks):
    assert caption.names_class(answer, AIRLINERS.classes) is leaks


class Talker:
    """Answers from a list, whatever it is shown; remembers the questions."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def ask(self, photos, question):
        self.asked.append(question)
        return [self.answers.pop(0)] * len(photos)


PHOTO = Photo("000.jpg", "747-300", "0" * 64)


def test_a_refused_answer_is_asked_again_in_other_words_without_the_class():
    talker = Talker("a 747-300 on a runway", "Runway.")
    found = caption.accepted_answers(talker.ask, [PHOTO], "background", AIRLINERS)
    assert found == {0: "runway"}
    assert talker.asked[0] == (
        "describe the background of the aircraft in as few words as possible. "
        "Refer to the aircraft as simply 'a aircraft'"
    )
    assert talker.asked[1] != talker.asked[0]
    assert not any("747" in question for question in talker.asked)


def test_a_photo_whose_answers_are_all_refused_is_left_out():
    talker = Talker(*["747-300"] * len(caption.INSISTENCE))
    assert caption.accepted_answers(talker.ask, [PHOTO], "pose", AIRLINERS) == {}


CONTEXTS = [Context("ocean", "level facing left"), Context("sunset", "climbing facing right")]


def caption_photos(workspace, model=CAPTIONER, batch_size=3, bank="captioner", image_side=768):
    """Caption drawings of two task variants in two contexts each, none of which it has seen."""
    photos = []
    for number, (variant, context) in enumerate(itertools.product(TASK[:2], CONTEXTS)):
        path = workspace / f"{number}.png"
        draw(variant, context.background, context.pose, index=0, seed=5).save(path)
        photos.append(Photo(path.name, variant.name, sha256(path)))
    write_photos(TRAIN, photos)
    write_task(CLASSES, Task("aircraft", tuple(variant.name for variant in TASK[:2])))
    settings = {
        "bank": bank,
        "model": str(model),
        "batch_size": batch_size,
        "precision": "fp32",
        "image_side": image_side,
    }
    caption.run(Params({"caption": settings}, "caption"))
    return read_bank(BANK)


def test_the_stage_writes_an_entry_for_every_photo_in_order(repository):
    bank = caption_photos(repository)
    assert [entry.image for entry in bank] == [photo.sha256 for photo in read_photos(TRAIN)]
    found = [entry.context for entry in bank if entry.context]
    assert [context.background for context in found] == ["ocean", "sunset"] * 2
    assert all(context.pose in POSES for context in found)


def test_what_is_said_of_a_photo_does_not_depend_on_how_many_are_asked_with_it(repository):
    assert caption_photos(repository, batch_size=3) == caption_photos(repository, batch_size=1)


def test_photos_are_asked_about_again_at_another_size(repository, capsys):
    caption_photos(repository)
    caption_photos(repository)
    assert "(answers: 8 reused, 0 made)" in capsys.readouterr().out
    caption_photos(repository, image_side=32)
    assert f"(answers: 0 reused, 8 made on {device_name()})" in capsys.readouterr().out


def test_a_folder_that_is_no_captioner_is_told_in_one_line(repository):
    (repository / "models" / "none").mkdir(parents=True)
    with pytest.raises(BobError, match=r"models/none is no image-text-to-text model") as caught:
        caption_photos(repository, model="models/none")
    assert "\n" not in str(caught.value)
    assert not BANK.exists()


def test_a_bank_corrected_by_hand_takes_the_captioners_place(repository):
    corrected = [
        replace(entry, context=Context("my own words", "upside down"))
        for entry in caption_photos(repository)
    ]
    write_bank(repository / "mine.jsonl", reversed(corrected))
    assert caption_photos(repository, model="models/none", bank="mine.jsonl") == corrected


def test_a_photo_that_a_corrected_bank_lacks_is_named(repository):
    bank = caption_photos(repository)
    write_bank(repository / "mine.jsonl", bank[:2])
    with pytest.raises(BobError, match=r"mine.jsonl has no line for 2.png; add one with"):
        caption_photos(repository, bank="mine.jsonl")
