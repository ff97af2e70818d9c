"""Reading a user's folder, and drawing shots from it."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from dvc.repo import Repo
from PIL import Image

from bob.cache.items import ItemCache
from bob.errors import BobError
from bob.formats.files import sha256
from bob.formats.names import class_name_of, folder_of
from bob.formats.params import Params
from bob.formats.photos import open_image, read_photos, read_task
from bob.stages import split
from tests.builders import build_photos
from tests.dvc_project import link_as_here

NAMES = {"Anna_Hummingbird": 8, "Rufous_Hummingbird": 9}


def dataset(repository, classes=NAMES, parts=None):
    folder = repository / "data" / "mine"
    if parts is None:
        build_photos(folder, classes)
    else:
        # Another first class in each part, so that no two parts hold the same noise.
        for number, part in enumerate(parts):
            build_photos(folder / part, {f"Filler{i}": 1 for i in range(3 * number)} | classes)
            for filler in (folder / part).glob("Filler*"):
                shutil.rmtree(filler)
    (folder / "dataset.yaml").write_text("descriptor: bird\n")
    return folder


def draw(**changed):
    values = {
        "name": "mine",
        "shots": 3,
        "imbalance": 1,
        "seed": 0,
        "val_per_class": 2,
        "test_fraction": 0.25,
    } | changed
    split.run(Params({"data": values}, "split"))
    return tuple(
        {photo.path.split("/", 3)[3] for photo in read_photos(split.SPLIT / f"{part}.jsonl")}
        for part in ("train", "val", "test")
    )


def told(**changed):
    with pytest.raises(BobError) as caught:
        draw(**changed)
    message = str(caught.value)
    assert "\n" not in message
    assert not split.SPLIT.exists(), "a failed split must leave nothing behind"
    return message


def test_classes_are_spelled_with_spaces_and_photos_are_copied(repository):
    dataset(repository)
    train, val, test = draw()
    task = read_task()
    assert task.descriptor == "bird"
    assert task.classes == ("Anna Hummingbird", "Rufous Hummingbird")
    assert (len(train), len(val), len(test)) == (6, 4, 4)
    for photo in read_photos(split.TRAIN):
        assert split.sha256(repository / photo.path) == photo.sha256


def test_parts_never_overlap_and_ten_shots_contain_five(repository):
    dataset(repository, {"A": 30, "B": 30})
    five, val_of_five, test_of_five = draw(shots=5)
    shutil.rmtree(split.SPLIT)
    ten, val_of_ten, test_of_ten = draw(shots=10)
    assert five < ten
    assert (val_of_five, test_of_five) == (val_of_ten, test_of_ten)
    assert not ten & val_of_ten and not ten & test_of_ten and not val_of_ten & test_of_ten


def test_another_seed_draws_other_shots_but_tests_on_the_same_photos(repository):
    dataset(repository, {"A": 30, "B": 30})
    first, _, test_of_first = draw(seed=0)
    shutil.rmtree(split.SPLIT)
    second, _, test_of_second = draw(seed=1)
    assert first != second
    assert test_of_first == test_of_second


def test_a_photo_that_is_added_moves_at_most_one_shot(repository):
    folder = dataset(repository, {"A": 30, "B": 30}, parts=["train", "test"])
    before, *_ = draw()
    shutil.rmtree(split.SPLIT)
    Image.new("RGB", (40, 30), "red").save(folder / "train" / "A" / "new.jpg")
    after, *_ = draw()
    assert len(before - after) <= 1


def test_own_train_val_and_test_folders_are_kept_apart(repository):
    dataset(repository, {"A": 4, "B": 5}, parts=["train", "val", "test"])
    train, val, test = draw(shots=4)
    assert (len(train), len(val), len(test)) == (8, 9, 9)


def test_without_a_val_folder_validation_comes_from_train_not_from_test(repository):
    dataset(repository, {"A": 6, "B": 6}, parts=["train", "test"])
    _, val, test = draw(shots=4)
    assert len(val) == 4 and len(test) == 12
    hashes = {p.sha256 for p in read_photos(split.VAL)}
    assert not hashes & {p.sha256 for p in read_photos(split.TEST)}


def test_all_shots_leave_no_validation_and_say_so(repository, capsys):
    dataset(repository)
    train, val, test = draw(shots="all")
    assert not val
    assert len(train) + len(test) == 17
    assert "keep the last epoch" in capsys.readouterr().err


def test_a_long_tail_decays_exponentially_from_the_shots_and_keeps_at_least_one():
    available = dict.fromkeys("abcde", 100)
    counts = split.shots_by_class(available, 81, 81, seed=0)
    assert sorted(counts.values(), reverse=True) == [81, 27, 9, 3, 1]  # 81 * 81^(-i/4)
    counts = split.shots_by_class(available, 10, 100, seed=0)
    assert sorted(counts.values(), reverse=True) == [10, 3, 1, 1, 1]


def test_which_classes_are_rare_follows_from_the_seed_and_the_names_alone():
    available = dict.fromkeys("abcde", 100)
    by_seed = [split.shots_by_class(available, 10, 10, seed) for seed in range(20)]
    assert {max(counts, key=lambda name: counts[name]) for counts in by_seed} == set("abcde")
    others = {"e": 99, "c": 12, "a": 40, "d": 11, "b": 10}
    assert split.shots_by_class(others, 10, 10, 3) == by_seed[3]


def test_all_shots_have_a_long_tail_from_what_the_smallest_class_has():
    available = {"a": 30, "b": 16, "c": 200}
    assert split.shots_by_class(available, "all", 1, seed=0) == available
    assert sorted(split.shots_by_class(available, "all", 16, seed=0).values()) == [1, 4, 16]


@pytest.mark.parametrize("shots", [8, "all"])
@pytest.mark.parametrize("parts", [None, ["train", "val", "test"]])
def test_a_long_tail_is_part_of_the_balanced_split_with_its_validation_and_test(
    repository, shots, parts
):
    dataset(repository, {"A": 20, "B": 20, "C": 20}, parts)
    balanced, *held_out = draw(shots=shots)
    shutil.rmtree(split.SPLIT)
    long_tailed, *still_held_out = draw(shots=shots, imbalance=4)
    assert long_tailed < balanced
    assert still_held_out == held_out
    counts = Counter(photo.class_name for photo in read_photos(split.TRAIN))
    most = {8: 8, "all": 20 if parts else 15}[shots]
    assert sorted(counts.values()) == [round(most / 4), round(most / 2), most]


def test_dataset_yaml_can_name_a_class_otherwise_than_its_folder(repository):
    folder = dataset(repository, {"F%2FA-18": 8, "747": 8, "Tu-134": 8}, parts=["train", "test"])
    (folder / "dataset.yaml").write_text(
        "descriptor: aircraft\nclasses:\n  F%2FA-18: F/A-18\n  747: Boeing  747_8\n"
    )
    train, *_ = draw()
    assert read_task().classes == ("Boeing 747_8", "F/A-18", "Tu-134")
    assert {photo.class_name for photo in read_photos(split.TEST)} == set(read_task().classes)
    assert {path.split("/")[0] for path in train} == {"F%2FA-18", "747", "Tu-134"}


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("{Anna: Anna's}", "dataset.yaml: classes names the folder 'Anna', which is not there"),
        (
            "{Anna_Hummingbird: Rufous Hummingbird}",
            "two folders spell the class 'Rufous Hummingbird'",
        ),
        ("{Anna_Hummingbird: 3}", "classes.Anna_Hummingbird is 3; allowed: the class's name"),
        ("{Anna_Hummingbird: ' '}", 'classes.Anna_Hummingbird is " "; allowed: the class'),
        ("[Anna]", 'classes is ["Anna"]; allowed: a mapping of folders to class names'),
    ],
)
def test_a_mistake_in_the_names_is_told(repository, classes, message):
    folder = dataset(repository)
    (folder / "dataset.yaml").write_text(f"descriptor: bird\nclasses: {classes}\n")
    assert message in told()


def test_every_class_has_a_folder_of_its_own_that_spells_it_where_a_folder_can():
    names = ["Anna Hummingbird", "Anna_Hummingbird", "F/A-18", "F%2FA-18", "F A-18", "..", "."]
    names += ["train", "trai%6E", "a:b", "a%3Ab"]
    folders = [folder_of(name) for name in names]
    assert len(set(folders)) == len(names)
    assert not any("/" in folder or folder.startswith(".") for folder in folders)
    assert folders[0] == "Anna_Hummingbird" and class_name_of(folders[0]) == names[0]


def test_the_same_split_is_the_same_bytes(repository):
    dataset(repository)
    draw()
    first = {p.relative_to(split.SPLIT): p.read_bytes() for p in files(split.SPLIT)}
    shutil.rmtree(split.SPLIT)
    draw()
    assert first == {p.relative_to(split.SPLIT): p.read_bytes() for p in files(split.SPLIT)}


# --- links, and what is known of photos ----------------------------------------------------------


def tracked(repository, **parts):
    """The dataset, given to DVC with files linked as in this project."""
    folder = dataset(repository, **parts)
    link_as_here()
    with Repo() as repo:
        repo.add("data/mine")
    return folder


def sources(folder, part=split.TRAIN):
    """Photo of a split -> where it was copied or linked from."""
    return {
        Path(photo.path): folder.joinpath(*Path(photo.path).parts[3:])
        for photo in read_photos(part)
    }


def test_photos_that_dvc_has_linked_are_linked_and_others_copied(repository):
    folder = tracked(repository)
    own = folder / "Anna_Hummingbird/000.jpg"
    own.unlink()
    Image.new("RGB", (40, 30), "red").save(own)
    own.chmod(0o400)
    inode = own.stat().st_ino
    draw(shots="all")
    linked = {source: source.samefile(copy) for copy, source in sources(folder).items()}
    assert all(
        same != (copy.name == own.name and "Anna" in str(copy)) for copy, same in linked.items()
    )
    with Repo() as repo:
        repo.add("results/split")  # as DVC does it when the stage ends
    found = own.stat()
    assert (found.st_ino, found.st_nlink, found.st_mode & 0o777) == (inode, 1, 0o400)


def test_a_photo_written_through_its_link_has_a_new_hash_or_is_refused(
    repository,
):
    folder = tracked(repository)
    draw(shots="all")
    (copy, source), *_ = sources(folder).items()
    source.chmod(0o644)  # or being root
    with source.open("r+b") as file:
        Image.new("RGB", (40, 30), "red").save(file, "jpeg")
    draw(shots="all")
    assert sha256(copy) in {photo.sha256 for photo in read_photos(split.TRAIN)}
    assert not copy.samefile(source)
    source.chmod(0o444)
    with Repo() as repo:
        repo.checkout(force=True)  # DVC takes the object for what it was
    with pytest.raises(BobError, match=f"{source.relative_to(repository)} is not what DVC"):
        draw(shots="all")


@pytest.fixture
def opened(monkeypatch):
    """The photos that were decoded."""
    paths = []

    def counted(path):
        paths.append(path)
        return open_image(path)

    monkeypatch.setattr(split, "open_image", counted)
    return paths


def test_a_photo_is_decoded_once_however_often_it_is_split(repository, opened):
    folder = dataset(repository)
    draw()
    assert len(opened) == 17
    draw(shots=2, seed=1)
    assert len(opened) == 17
    shutil.copytree(folder, folder.with_name("same"))
    draw(name="same")
    assert len(opened) == 17
    Image.new("RGB", (40, 30), "red").save(folder / "Anna_Hummingbird/000.jpg")
    draw()
    assert opened[17:] == [Path("data/mine/Anna_Hummingbird/000.jpg")]
    with ItemCache() as cache:
        rows = cache.index.all()
        assert len(rows) == 18 and len({row.oid for row in rows}) == 1
    assert not (repository / "results/items").exists()


def test_another_pillow_decodes_the_photos_again(repository, opened, monkeypatch):
    dataset(repository)
    draw()
    monkeypatch.setattr(split, "LIBRARIES", ("numpy",))
    draw()
    assert len(opened) == 2 * 17


def test_an_unreadable_photo_is_never_known(repository):
    folder = dataset(repository)
    photo = folder / "Rufous_Hummingbird/003.jpg"
    photo.write_bytes(photo.read_bytes()[:300])
    assert "Rufous_Hummingbird/003.jpg cannot be read" in told()
    assert "Rufous_Hummingbird/003.jpg cannot be read" in told()
    with ItemCache() as cache:
        assert len(cache.index.all()) == 16


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_too_few_photos_names_the_class_and_what_would_fit(repository):
    dataset(repository, {"A": 8, "B": 30})
    message = told(shots=6)
    assert "class 'A' (6)" in message
    assert "data.shots: 5 fits every class" in message
    draw(shots=5)


def test_a_class_that_is_all_test_cannot_be_helped_by_fewer_shots(repository):
    dataset(repository, {"A": 1, "B": 30})
    assert "no number of shots would fit" in told(shots=1)


def test_a_truncated_image_is_named(repository):
    folder = dataset(repository)
    path = folder / "Anna_Hummingbird" / "001.jpg"
    path.write_bytes(path.read_bytes()[:300])
    assert "data/mine/Anna_Hummingbird/001.jpg cannot be read" in told()


def test_a_text_file_called_jpg_is_named(repository):
    folder = dataset(repository)
    (folder / "Anna_Hummingbird" / "notes.jpg").write_text("not an image")
    assert "notes.jpg cannot be read" in told()


def test_an_empty_class_is_named(repository):
    folder = dataset(repository)
    (folder / "Costa_Hummingbird").mkdir()
    assert "data/mine/Costa_Hummingbird holds no image" in told()


def test_files_of_other_kinds_are_warned_of(repository, capsys):
    folder = dataset(repository)
    (folder / "Anna_Hummingbird" / "phone.heic").write_bytes(b"x")
    draw()
    assert "phone.heic" in capsys.readouterr().err


def test_what_lies_where_it_is_not_read_is_warned_of(repository, capsys):
    folder = dataset(repository)
    photo = folder / "Anna_Hummingbird/000.jpg"
    (folder / "Anna_Hummingbird/more").mkdir()
    (folder / "Anna_Hummingbird/gone.jpg").symlink_to("nowhere.jpg")
    (folder / "Anna_Hummingbird/linked.jpg").symlink_to(repository / "elsewhere.jpg")
    Image.new("RGB", (40, 30), "red").save(repository / "elsewhere.jpg")
    shutil.copy(photo, folder / "loose.jpg")
    (folder / "Costa_Hummingbird").symlink_to("nowhere")
    (folder / "README.md").touch()  # is no photo that somebody would miss
    draw()
    assert capsys.readouterr().err.splitlines() == [
        "split: warning: data/mine/Anna_Hummingbird: not read: gone.jpg (a broken link), more/",
        "split: warning: data/mine: not read: Costa_Hummingbird (a broken link), loose.jpg",
    ]


def test_what_lies_beside_the_parts_is_warned_of(repository, capsys):
    folder = dataset(repository, parts=["train", "test"])
    (folder / "Costa_Hummingbird").mkdir()
    (folder / "Validation").mkdir()
    draw()
    assert capsys.readouterr().err == (
        "split: warning: data/mine: not read: Costa_Hummingbird/, Validation/\n"
    )


def test_an_accent_has_one_spelling(repository):
    composed, decomposed = "Caf\u00e9", "Cafe\u0301"
    folder = dataset(repository, NAMES | {decomposed: 8})
    draw()
    assert composed in read_task().classes
    shutil.rmtree(split.SPLIT)
    build_photos(folder, {composed: 8})
    assert told() == "data/mine: two folders spell the class 'Caf\u00e9'; merge them"


@pytest.mark.parametrize("name", ["_", " ", "__ _", "\u2028"])
def test_a_folder_that_names_no_class_is_told(repository, name):
    folder = dataset(repository)
    (folder / name).mkdir()
    assert told() == (
        f"data/mine: the folder {name!r} names no class; rename it, or name it under classes in "
        "data/mine/dataset.yaml"
    )


@pytest.mark.parametrize("place", ["", "Anna_Hummingbird/"])
def test_a_name_that_is_no_text_is_told(repository, place):
    folder = dataset(repository)
    os.mkdir(os.fsencode(folder) + b"/" + place.encode() + b"\xff.jpg")  # noqa: PTH102 (bytes)
    assert told() == f"data/mine/{place}\\udcff.jpg: its name is not UTF-8; rename it"


def test_names_are_shown_without_what_breaks_a_line(repository, capsys):
    folder = dataset(repository, NAMES | {"evil\x1b[31m\u202ename": 8})
    (folder / "Anna_Hummingbird" / "new\nline\u2028.heic").touch()
    (folder / "Anna_Hummingbird" / ("x" * 250 + ".jpg")).touch()
    message = told()
    assert message.startswith("data/mine/Anna_Hummingbird/xxx") and message.isprintable()
    assert "new\\nline\\u2028.heic" in capsys.readouterr().err


def test_one_content_in_train_and_test_is_an_error_that_names_both(repository):
    folder = dataset(repository, parts=["train", "test"])
    shutil.copy(folder / "train/Anna_Hummingbird/000.jpg", folder / "test/Anna_Hummingbird/x.jpg")
    message = told()
    assert "test/Anna_Hummingbird/x.jpg is the same image" in message
    assert "train/Anna_Hummingbird/000.jpg" in message


def test_one_content_in_two_classes_is_an_error(repository):
    folder = dataset(repository)
    shutil.copy(folder / "Anna_Hummingbird/000.jpg", folder / "Rufous_Hummingbird/x.jpg")
    assert "of another class" in told()


def test_a_second_copy_within_a_class_counts_once(repository, capsys):
    folder = dataset(repository)
    shutil.copy(folder / "Anna_Hummingbird/000.jpg", folder / "Anna_Hummingbird/zz.jpg")
    train, val, test = draw(shots="all")
    assert len(train | val | test) == 17
    assert "zz.jpg" in capsys.readouterr().err


def test_a_test_class_that_train_does_not_have_is_an_error(repository):
    folder = dataset(repository, parts=["train", "test"])
    (folder / "test/Anna_Hummingbird").rename(folder / "test/Costa")
    assert "class 'Costa' is not in" in told()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "dataset.yaml is missing; write one line"),
        ("descriptor:\n", "descriptor is null"),
        ("descriptr: bird\n", "did you mean descriptor?"),
        ("", "the content is null"),
        ("a: [\n", "not YAML"),
    ],
)
def test_a_missing_descriptor_is_told(repository, content, message):
    folder = dataset(repository)
    (folder / "dataset.yaml").unlink()
    if content is not None:
        (folder / "dataset.yaml").write_text(content)
    assert message in told()


def test_a_missing_dataset_says_how_to_bring_photos(repository):
    assert "dvc add data/mine" in told()


def test_transparency_becomes_white_and_exif_rotation_is_applied(repository):
    folder = dataset(repository)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(folder / "Anna_Hummingbird/clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (8, 4)).save(folder / "Anna_Hummingbird/turned.jpg", exif=exif)
    image = split.open_image(folder / "Anna_Hummingbird/clear.png")
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)
    assert split.open_image(folder / "Anna_Hummingbird/turned.jpg").size == (4, 8)
