"""Public benchmarks: small ones in the published layouts, read, converted and tracked."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from ruamel.yaml import YAML
from scipy.io import savemat
from torchvision.datasets import FGVCAircraft, Flowers102

from bob.cli import cli
from bob.commands import datasets
from bob.commands.datasets import BENCHMARKS, dataset
from bob.errors import BobError
from bob.formats.files import sha256
from bob.stages.split import read_dataset
from tests.tiny_project import tree

# What each small benchmark below has: by part and class, the photos' names.
EXPECTED = {
    "aircraft": {
        "train": {"747-300": {"0001.jpg"}, "F/A-18": {"0002.jpg"}},
        "val": {"747-300": {"0003.jpg"}, "F/A-18": {"0004.jpg"}},
        "test": {"747-300": {"0005.jpg"}, "F/A-18": {"0006.jpg", "0007.jpg"}},
    },
    "cars": {
        "train": {
            "AM General Hummer SUV 2000": {"00001.jpg", "00002.jpg"},
            "Ram C/V Cargo Van Minivan 2012": {"00003.jpg"},
        },
        "test": {
            "AM General Hummer SUV 2000": {"00001.jpg"},
            "Ram C/V Cargo Van Minivan 2012": {"00002.jpg"},
        },
    },
    "cub": {
        "train": {"Spotted Catbird": {"Catbird_1.jpg", "Catbird_3.jpg"}, "Tit": {"Tit_1.jpg"}},
        "test": {"Spotted Catbird": {"Catbird_2.jpg"}, "Tit": {"Tit_2.jpg"}},
    },
    "pets": {
        "train": {
            "Abyssinian": {"Abyssinian_1.jpg", "Abyssinian_2.jpg"},
            "American Bulldog": {"american_bulldog_1.jpg"},
        },
        "test": {
            "Abyssinian": {"Abyssinian_10.jpg"},
            "American Bulldog": {"american_bulldog_10.jpg"},
        },
    },
    "flowers": {
        "train": {"pink primrose": {"image_00006.jpg"}, "colt's foot": {"image_00001.jpg"}},
        "val": {"pink primrose": {"image_00004.jpg"}, "colt's foot": {"image_00002.jpg"}},
        "test": {"pink primrose": {"image_00005.jpg"}, "colt's foot": {"image_00003.jpg"}},
    },
}
DESCRIPTORS = {"aircraft": "aircraft", "cars": "car", "cub": "bird", "pets": "pet"}
DESCRIPTORS["flowers"] = "flower"


# --- the published layouts, in small -----------------------------------------------------------


def photo(path):
    """A picture like no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = int.from_bytes(hashlib.sha256(str(path).encode()).digest()[:4], "big")
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 16, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def build_aircraft(folder):
    data = folder / "data"
    write(data / "variants.txt", "747-300", "F/A-18")
    for part, classes in EXPECTED["aircraft"].items():
        listed = [(name, file) for name, files in classes.items() for file in sorted(files)]
        write(
            data / f"images_variant_{part}.txt",
            *(f"{file.removesuffix('.jpg')} {name}" for name, file in listed),
        )
        for _, file in listed:
            photo(data / "images" / file)


def build_cars(folder):
    classes = list(EXPECTED["cars"]["train"])
    boxes = [(f"bbox_{corner}", object) for corner in ("x1", "y1", "x2", "y2")]
    for part, path in (
        ("train", "devkit/cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ):
        rows = [
            (1, 2, 3, 4, classes.index(name) + 1, file)
            for name, files in EXPECTED["cars"][part].items()
            for file in sorted(files)
        ]
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        annotations = np.array(rows, dtype=[*boxes, ("class", object), ("fname", object)])
        savemat(folder / path, {"annotations": annotations})
        for *_, file in rows:
            photo(folder / f"cars_{part}" / file)
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(classes, dtype=object)})


def build_cub(folder):
    images = {
        "018.Spotted_Catbird/Catbird_1.jpg": (1, 1),
        "018.Spotted_Catbird/Catbird_2.jpg": (1, 0),
        "018.Spotted_Catbird/Catbird_3.jpg": (1, 1),
        "019.Tit/Tit_1.jpg": (2, 1),
        "019.Tit/Tit_2.jpg": (2, 0),
    }
    write(folder / "classes.txt", "1 018.Spotted_Catbird", "2 019.Tit")
    write(folder / "images.txt", *(f"{n} {image}" for n, image in enumerate(images, 1)))
    for file, column in (("image_class_labels.txt", 0), ("train_test_split.txt", 1)):
        lines = (f"{n} {values[column]}" for n, values in enumerate(images.values(), 1))
        write(folder / file, *lines)
    write(folder / "bounding_boxes.txt", "1 0.0 0.0 5.0 5.0")
    for image in images:
        photo(folder / "images" / image)


def build_pets(folder):
    for part, published in (("train", "trainval"), ("test", "test")):
        write(
            folder / "annotations" / f"{published}.txt",
            *(
                f"{file.removesuffix('.jpg')} {label} {label} 1"
                for label, files in enumerate(EXPECTED["pets"][part].values(), 1)
                for file in sorted(files)
            ),
        )
        for files in EXPECTED["pets"][part].values():
            for file in files:
                photo(folder / "images" / file)


def build_flowers(folder):
    labels = np.zeros((1, 6), np.uint8)
    ids: dict[str, list[int]] = {}
    for part, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        for name, files in EXPECTED["flowers"][part].items():
            for file in files:
                number = int(file[6:11])
                labels[0, number - 1] = Flowers102.classes.index(name) + 1
                ids.setdefault(key, []).append(number)
                photo(folder / "jpg" / file)
    savemat(folder / "imagelabels.mat", {"labels": labels})
    savemat(folder / "setid.mat", {key: np.array([numbers]) for key, numbers in ids.items()})


BUILD = {
    "aircraft": build_aircraft,
    "cars": build_cars,
    "cub": build_cub,
    "pets": build_pets,
    "flowers": build_flowers,
}


def build(name, parent, monkeypatch):
    """The small benchmark, unpacked, in `parent`."""
    folder = parent / BENCHMARKS[name].folder
    BUILD[name](folder)
    if name == "flowers":  # its reader compares the lists with the published ones
        for kind in ("label", "setid"):
            file = Flowers102._file_dict[kind][0]
            md5 = hashlib.md5((folder / file).read_bytes()).hexdigest()
            monkeypatch.setitem(Flowers102._file_dict, kind, (file, md5))
    return folder


def pack(archive, folder, *members):
    """A gzipped tar of the members, which are paths below `folder`."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for member in members:
            tar.add(folder / member, member)
    return archive


PACKED = {  # archive -> what it holds, from the folder above the benchmark's, or in it
    "aircraft": {"fgvc-aircraft-2013b.tar.gz": ("..", "fgvc-aircraft-2013b")},
    "cars": {
        "cars_train.tgz": (".", "cars_train"),
        "cars_test.tgz": (".", "cars_test"),
        "car_devkit.tgz": (".", "devkit"),
    },
    "cub": {"CUB_200_2011.tgz": ("..", "CUB_200_2011")},
    "pets": {"images.tar.gz": (".", "images"), "annotations.tar.gz": (".", "annotations")},
    "flowers": {"102flowers.tgz": (".", "jpg")},
}


def publish(folder, name, target):
    """The published files of the small benchmark in `folder`, in `target`."""
    for archive, (above, member) in PACKED[name].items():
        pack(target / archive, folder / above, member)
    for file in BENCHMARKS[name].files:
        if file.endswith(".mat"):
            shutil.copyfile(folder / file, target / file)
    assert sorted(path.name for path in target.iterdir()) == sorted(BENCHMARKS[name].files)


@pytest.fixture
def untracked(workspace, monkeypatch):
    """A folder to work in without DVC, whose part is tested by itself."""
    monkeypatch.setattr(datasets, "track", lambda folder: None)
    return workspace


def hashes(files):
    return {file: sha256(file) for file in files}


def listing(folder):
    """What the pipeline reads there: by part and class, the photos' names."""
    read = read_dataset(folder, hashes)
    return {
        part: {
            name: {Path(one.path).name for one in photos}
            for name, photos in getattr(read, part).items()
        }
        for part in ("train", "val", "test")
        if getattr(read, part) is not None
    }


def told(name, source):
    with pytest.raises(BobError) as caught:
        dataset(name, source, Path("data") / name)
    message = str(caught.value)
    assert "\n" not in message
    assert not any(Path("data").iterdir()), "a failure must leave nothing behind"
    return message


# --- what comes of them --------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("given", ["folder", "folder above", "published files"])
def test_a_benchmark_is_read_with_its_official_split_and_names(
    untracked, monkeypatch, capsys, name, given
):
    folder = build(name, untracked / "mine", monkeypatch)
    source = {"folder": folder, "folder above": folder.parent}.get(given)
    if source is None:
        source = untracked / "published"
        publish(folder, name, source)
        shutil.rmtree(folder)
    before = tree(source)
    dataset(name, source, Path("data") / name)

    assert listing(Path("data") / name) == EXPECTED[name]
    assert read_dataset(Path("data") / name, hashes).descriptor == DESCRIPTORS[name]
    assert tree(source) == before, "the user's files are copied, never moved"
    assert "2 classes of" in capsys.readouterr().out
    assert not list(Path("data").rglob(".*")), "nothing of the unpacking stays"


def test_a_single_archive_can_be_given_itself(untracked, monkeypatch):
    folder = build("cub", untracked / "mine", monkeypatch)
    archive = pack(untracked / "birds.tar.gz", folder.parent, "CUB_200_2011")
    dataset("cub", archive, Path("data/cub"))
    assert listing(Path("data/cub")) == EXPECTED["cub"]


def test_names_that_no_folder_can_have_stand_in_dataset_yaml(untracked, monkeypatch):
    dataset("aircraft", build("aircraft", untracked, monkeypatch), Path("data/planes"))
    about = YAML(typ="safe").load(Path("data/planes/dataset.yaml").read_text())
    assert about == {"descriptor": "aircraft", "classes": {"F%2FA-18": "F/A-18"}}
    assert (Path("data/planes/train/F%2FA-18/0002.jpg")).is_file()


def test_a_content_that_comes_twice_is_kept_in_test_alone(untracked, monkeypatch, capsys):
    folder = build("cub", untracked, monkeypatch) / "images"
    shutil.copyfile(folder / "019.Tit/Tit_2.jpg", folder / "018.Spotted_Catbird/Catbird_1.jpg")
    dataset("cub", folder.parent, Path("data/cub"))
    assert listing(Path("data/cub")) == {
        "train": {"Spotted Catbird": {"Catbird_3.jpg"}, "Tit": {"Tit_1.jpg"}},
        "test": EXPECTED["cub"]["test"],
    }
    warning = capsys.readouterr().err
    assert "018.Spotted_Catbird/Catbird_1.jpg of train" in warning and "Tit_2.jpg" in warning


# --- what can be wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("aircraft", "data/images/0004.jpg"),
        ("cars", "cars_test/00002.jpg"),
        ("cub", "images/019.Tit/Tit_2.jpg"),
        ("pets", "images/american_bulldog_1.jpg"),
        ("flowers", "jpg/image_00003.jpg"),
    ],
)
def test_a_photo_that_the_official_list_names_and_is_missing_is_told(
    untracked, monkeypatch, name, file
):
    folder = build(name, untracked, monkeypatch)
    (folder / file).unlink()
    assert f"{BENCHMARKS[name].folder}/{file} is missing, which the official" in told(name, folder)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_is_not_the_benchmark_is_told_with_the_files_it_needs(untracked, name):
    (untracked / "empty").mkdir()
    message = told(name, untracked / "empty")
    assert message.startswith(f"{untracked}/empty has no {BENCHMARKS[name].entries[0]}; ")
    assert all(file in message for file in BENCHMARKS[name].files)


def test_damaged_lists_and_archives_are_told(untracked, monkeypatch):
    cub = build("cub", untracked, monkeypatch)
    write(cub / "train_test_split.txt", "1 1")
    assert f"cub cannot be read from {cub}: '2' is not in every list" in told("cub", cub)

    aircraft = build("aircraft", untracked, monkeypatch)
    (aircraft / "data/images_variant_val.txt").unlink()
    message = told("aircraft", aircraft)
    assert "No such file or directory: 'fgvc-aircraft-2013b/data/images_variant_val" in message

    flowers = build("flowers", untracked, monkeypatch)
    savemat(flowers / "setid.mat", {"trnid": np.array([[1]])})
    assert "not found or corrupted" in told("flowers", flowers)

    archive = pack(untracked / "CUB_200_2011.tgz", untracked, "CUB_200_2011")
    archive.write_bytes(archive.read_bytes()[:500])
    assert f"cub cannot be read from {archive}: " in told("cub", archive)
    archive.write_text("<html>not found</html>")
    assert f"cub cannot be read from {archive}: " in told("cub", archive)


def test_an_archive_cannot_write_outside_its_folder(untracked):
    archive = untracked / "CUB_200_2011.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../../../../outside"), io.BytesIO())
    assert "outside the destination" in told("cub", archive)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("member", ["images/019.Tit/Tit_2.jpg", "images.txt"])
def test_links_and_pipes_of_an_archive_are_not_made(untracked, monkeypatch, kind, member):
    """What they stand for is missing then."""
    (untracked / "private").write_text("of the user")
    cub = build("cub", untracked / "mine", monkeypatch)
    (cub / member).unlink()
    archive = untracked / "CUB_200_2011.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cub, "CUB_200_2011")
        link = tarfile.TarInfo(f"CUB_200_2011/{member}")
        link.type, link.linkname = kind, str(untracked / "private")
        tar.addfile(link)
    assert member.rpartition("/")[2] in told("cub", archive)


@pytest.mark.parametrize("listed", ["{private}", "../../private", "019.Tit/../../../private"])
def test_a_list_cannot_name_what_lies_outside(untracked, monkeypatch, listed):
    (untracked / "private").write_text("of the user")
    cub = build("cub", untracked, monkeypatch)
    lines = (cub / "images.txt").read_text().splitlines()
    write(cub / "images.txt", *lines[:-1], f"5 {listed.format(private=untracked / 'private')}")
    message = told("cub", cub)
    assert "private, which the official list of test names, is or leads outside of" in message


def test_a_link_cannot_lead_outside(untracked, monkeypatch):
    (untracked / "private").write_text("of the user")
    cub = build("cub", untracked, monkeypatch)
    (cub / "images/019.Tit/Tit_2.jpg").unlink()
    (cub / "images/019.Tit/Tit_2.jpg").symlink_to(untracked / "private")
    assert "images/019.Tit/Tit_2.jpg, which the official list of test names" in told("cub", cub)


def test_the_users_own_link_to_the_folder_is_followed(untracked, monkeypatch):
    cub = build("cub", untracked / "mine", monkeypatch)
    (cub / "images").rename(untracked / "elsewhere")
    (cub / "images").symlink_to(untracked / "elsewhere")
    dataset("cub", cub, Path("data/cub"))
    assert listing(Path("data/cub")) == EXPECTED["cub"]


def test_two_photos_of_one_name_are_both_kept(untracked, monkeypatch):
    cub = build("cub", untracked, monkeypatch)
    lines = (cub / "images.txt").read_text().replace("Catbird_3.jpg", "more/Catbird_1.jpg")
    (cub / "images.txt").write_text(lines)
    photo(cub / "images/018.Spotted_Catbird/more/Catbird_1.jpg")
    dataset("cub", cub, Path("data/cub"))
    read = listing(Path("data/cub"))
    assert read["train"]["Spotted Catbird"] == {"Catbird_1.jpg", "Catbird_1-2.jpg"}


@pytest.mark.parametrize(
    ("name", "told_of"),
    [
        ("018.\x00", r"name a class '\x00'"),
        ("018.___", "name a class ''"),
        (f"018.{'x' * 300}", "name a class 'xxx"),
        ("018.\u202e", r"name a class '\u202e'"),
        ("018.T\u0131t", None),
        ("018.TI\u0301T", "two"),
    ],
)
def test_a_class_of_a_list_is_one_that_split_reads(untracked, monkeypatch, name, told_of):
    cub = build("cub", untracked, monkeypatch)
    other = "019.T\u00cdT" if told_of == "two" else "019.Tit"
    write(cub / "classes.txt", f"1 {name}", f"2 {other}")
    if told_of is None:
        dataset("cub", cub, Path("data/cub"))
        assert "T\u0131t" in listing(Path("data/cub"))["train"]
    else:
        assert ("spell one class twice" if told_of == "two" else told_of) in told("cub", cub)


def test_a_bomb_is_not_unpacked(untracked, monkeypatch):
    cub = build("cub", untracked / "mine", monkeypatch)
    archive = pack(untracked / "CUB_200_2011.tgz", cub.parent, "CUB_200_2011")
    monkeypatch.setattr(datasets, "FILES", 5)
    assert "it unpacks to over 20,000,000,000 bytes or 5 files" in told("cub", archive)
    monkeypatch.setattr(datasets, "FILES", 999)
    monkeypatch.setattr(datasets, "UNPACKED", 1000)
    assert "it unpacks to over 1,000 bytes or 999 files" in told("cub", archive)
    monkeypatch.setattr(datasets, "LIST", 20)
    assert "images.txt has more than 20 bytes" in told("cub", cub)


def test_a_pipe_is_no_source(untracked):
    os.mkfifo(untracked / "pipe")
    assert told("cub", untracked / "pipe").startswith(f"{untracked}/pipe is neither a folder nor")


@settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(file=st.sampled_from(("classes.txt", "images.txt", "train_test_split.txt")), data=st.data())
def test_whatever_a_list_holds_is_one_line_or_a_dataset(untracked, monkeypatch, file, data):
    for folder in ("data", "CUB_200_2011"):
        shutil.rmtree(untracked / folder, ignore_errors=True)
    cub = build("cub", untracked, monkeypatch)
    content = (cub / file).read_bytes()
    place = data.draw(st.integers(0, len(content)))
    (cub / file).write_bytes(content[:place] + data.draw(st.binary(max_size=9)) + content[place:])
    try:
        dataset("cub", cub, Path("data/cub"))
    except BobError as error:
        assert "\n" not in str(error)
        assert not any(Path("data").iterdir())
    else:
        assert read_dataset(Path("data/cub"), hashes).train


def test_the_folder_has_to_be_free_and_in_data(untracked):
    Path("data/cub").mkdir(parents=True)
    with pytest.raises(BobError, match="data/cub exists"):
        dataset("cub", untracked, Path("data/cub"))
    with pytest.raises(BobError, match="data live in data/<name>"):
        dataset("cub", untracked, Path("elsewhere/cub"))


# --- downloads, from a real HTTP server on this machine ------------------------------------------


@pytest.fixture
def server(workspace):
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    (workspace / "web").mkdir()
    handler = partial(Handler, directory=str(workspace / "web"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_without_from_the_archive_is_downloaded(untracked, server, monkeypatch):
    cub = build("cub", untracked, monkeypatch)
    archive = pack(untracked / "web/CUB_200_2011.tgz", cub.parent, "CUB_200_2011")
    monkeypatch.setattr(datasets, "CUB_URL", f"{server}/CUB_200_2011.tgz")
    assert "cub could not be downloaded (File not found or corrupted.)" in told("cub", None)
    monkeypatch.setattr(datasets, "CUB_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    dataset("cub", None, Path("data/cub"))
    assert listing(Path("data/cub")) == EXPECTED["cub"]

    aircraft = build("aircraft", untracked, monkeypatch)
    pack(untracked / "web/planes.tar.gz", aircraft.parent, "fgvc-aircraft-2013b")
    monkeypatch.setattr(FGVCAircraft, "_URL", f"{server}/planes.tar.gz")
    dataset("aircraft", None, Path("data/aircraft"))
    assert listing(Path("data/aircraft")) == EXPECTED["aircraft"]


def test_a_download_that_fails_is_one_line_that_says_which_files_to_bring(
    untracked, server, monkeypatch
):
    monkeypatch.setattr(FGVCAircraft, "_URL", "http://127.0.0.1:9/planes.tar.gz")
    message = told("aircraft", None)
    assert "Connection refused" in message
    assert message.endswith("into a folder and say: bob dataset aircraft --from FOLDER")
    monkeypatch.setattr(FGVCAircraft, "_URL", f"{server}/absent.tar.gz")
    assert "404" in told("aircraft", None)
    message = told("cars", None)
    assert "cannot be downloaded anymore" in message
    assert "cars_train.tgz, cars_test.tgz, car_devkit.tgz and cars_test_annos_with" in message


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_writes_and_tracks_the_folder(workspace, monkeypatch):
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, check=True)
    source = build("cub", workspace / "mine", monkeypatch)
    result = subprocess.run(
        [sys.executable, "-m", "bob", "dataset", "cub", "--from", source, "--to", "data/birds"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert listing(Path("data/birds")) == EXPECTED["cub"]
    assert Path("data/birds.dvc").is_file()
    assert "/birds" in Path("data/.gitignore").read_text()
    assert "git add data/birds.dvc data/.gitignore" in result.stdout


def test_the_command_knows_every_benchmark():
    listed = CliRunner().invoke(cli, ["dataset", "--help"]).output
    assert "{" + "|".join(BENCHMARKS) + "}" in listed
