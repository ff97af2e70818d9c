"""`bob predict` and the script that is exported: photos in, classes out, without torch."""

import csv
import importlib.metadata
import io
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper
from PIL import Image

from bob.cli import cli
from bob.formats import layout
from bob.formats.files import read_json
from bob.formats.params import Params
from bob.formats.photos import open_image, read_photos
from bob.models import predictor
from bob.models.preprocessing import Preprocessing, normalise, read_pixels
from bob.stages import classify, evaluate, export
from tests.conftest import ROOT, documented
from tests.test_birds import BIRDS
from tests.tiny_project import CLASSES, classify_params, draw, make_project

IMAGENET = Preprocessing(
    (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.875, "center"
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with one classifier, evaluated and exported; tests only read it."""
    root = make_project(tmp_path_factory.mktemp("exported"), train=3, test=14)
    here = Path.cwd()
    os.chdir(root)
    try:
        classify.run(classify_params(epochs=6, seeds=[0]))
        evaluate.run(Params({}, "evaluate"))
        export.run(Params({"export": {"precisions": ["fp32"]}}, "export"))
    finally:
        os.chdir(here)
    return root


@pytest.fixture
def project(exported: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(exported)
    return exported


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    draw("Blue Disc", 600).save(path)
    return path


def predict(*arguments: object, stdin: str | None = None) -> Result:
    """`bob predict` in this process, with its two outputs apart."""
    return CliRunner().invoke(cli, ["predict", *map(str, arguments)], input=stdin)


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# --- what it says is what was measured -----------------------------------------------------------


def bare_packages(folder: Path) -> Path:
    """A folder with the files of numpy, Pillow and ONNX Runtime, and what these require."""
    runtime = next(
        name
        for name in ("onnxruntime", "onnxruntime-gpu")
        if any(importlib.metadata.distributions(name=name))
    )
    waiting, seen = ["numpy", "pillow", runtime], set()
    folder.mkdir()
    while waiting:
        found = importlib.metadata.distribution(waiting.pop())
        if found.name in seen:
            continue
        seen.add(found.name)
        needs = [need for need in found.requires or () if "extra ==" not in need]
        waiting += [re.split(r"[^\w.-]", need)[0] for need in needs]
        for name in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / name).exists():
                (folder / name).symlink_to(Path(str(found.locate_file(name))))
    return folder


def run_alone(packages: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The exported script in a Python that has its standard library and `packages` alone."""
    code = (
        "import runpy, sys\n"
        "packages, script = sys.argv[1:3]\n"
        "sys.path.append(packages)\n"
        "sys.argv = sys.argv[2:]\n"
        "try:\n"
        "    runpy.run_path(script, run_name='__main__')\n"
        "finally:\n"
        "    strange = {'bob', 'click', 'timm', 'torch'} & set(sys.modules)\n"
        "    assert not strange, strange\n"
    )
    command = [sys.executable, "-I", "-S", "-c", code, packages, layout.PREDICT, *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


def test_all_test_photos_are_named_as_they_were_measured_also_by_the_script_alone(
    project: Path, tmp_path: Path
) -> None:
    with (layout.EVALUATE / "predictions/real_and_synthetic.csv").open(newline="") as file:
        measured = {row["image"]: row for row in csv.DictReader(file)}
    said = predict("--top", 1, "--format", "csv", "data/tiny/test")
    alone = run_alone(
        bare_packages(tmp_path / "packages"), "--top", 1, "--format", "csv", "data/tiny/test"
    )
    assert (said.exit_code, alone.returncode, alone.stderr) == (0, 0, "")
    assert said.stdout == alone.stdout
    found = {row["photo"]: row["class"] for row in rows(said.stdout)}
    assert len(found) == len(read_photos(layout.TEST)) == 42
    assert found == {path: row["predicted"] for path, row in measured.items()}
    right = sum(found[path] == row["actual"] for path, row in measured.items())
    top1 = read_json(layout.ACCURACY_METRICS)["real_and_synthetic"]["top1"]
    assert 100 * right / len(found) == pytest.approx(top1, abs=0.005)


def test_the_script_is_the_module_that_bob_runs(project: Path) -> None:
    assert layout.PREDICT.read_bytes() == Path(predictor.__file__).read_bytes()


def test_both_command_lines_have_the_same_options() -> None:
    own = {option.dest: option for option in predictor.command_line()._actions}
    bobs = {option.name: option for option in cli.commands["predict"].params}
    assert own["format"].choices == tuple(bobs["form"].type.choices)  # type: ignore[attr-defined]
    assert own["format"].default == bobs["form"].default
    assert own["top"].default == bobs["top"].default
    flags = [flag for option in bobs.values() for flag in option.opts if flag[0] == "-"]
    assert set(flags) == set(predictor.command_line()._option_string_actions) - {"-h", "--help"}


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(32, 32), (224, 224), (48, 64), (57, 31)])
def test_the_networks_input_is_bobs_to_the_bit(
    crop_mode: str, size: tuple[int, int], tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    mean, std = (0.5, 0.46, 0.41), (0.27, 0.26, 0.28)
    for crop_pct, interpolation in itertools.product(
        (1.0, 0.875, 0.95, 0.5), ("bilinear", "bicubic", "lanczos", "nearest")
    ):
        wanted = Preprocessing(size, mean, std, interpolation, crop_pct, crop_mode)
        for _ in range(4):
            width, height = random.integers(5, 300, 2)
            noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "photo.bmp")
            check_input(tmp_path / "photo.bmp", wanted)


def check_input(path: Path, preprocessing: Preprocessing) -> None:
    """The predictor gives the network what timm's transform and torch do."""
    expected = normalise(read_pixels(path, preprocessing).unsqueeze(0), preprocessing)[0].numpy()
    found = predictor.network_input(predictor.open_photo(path), asdict(preprocessing))
    np.testing.assert_array_equal(found, expected, str(path))


@pytest.mark.slow
@pytest.mark.skipif(not BIRDS.is_dir(), reason=f"no bird photos at {BIRDS} (set BOB_BIRDS)")
def test_the_networks_input_is_bobs_to_the_bit_on_500_photos() -> None:
    photos = sorted((BIRDS / "test").rglob("*.jpg"))[:500]
    assert len(photos) == 500
    for path in photos:
        check_input(path, IMAGENET)


def in_mode(mode: str, folder: Path) -> Path:
    """A photo of that mode on disk."""
    picture = draw("Red Square", 1)
    alpha = Image.linear_gradient("L").resize(picture.size)
    path = folder / ("photo.jpg" if mode.startswith(("CMYK", "upright")) else "photo.png")
    if mode.startswith("upright"):
        exif = Image.Exif()
        exif[0x0112] = int(mode[-1])
        picture.save(path, exif=exif)
    elif mode in ("RGBA", "LA"):
        picture.putalpha(alpha)
        picture.convert(mode).save(path)
    elif mode == "P, one transparent":
        picture.quantize(8).save(path, transparency=3)
    elif mode == "P, alpha each":
        picture.quantize(8).save(path, transparency=bytes(range(0, 256, 32)))
    elif mode == "RGB, one transparent":
        picture.save(path, transparency=picture.getpixel((0, 0)))
    elif mode == "GIF":
        path = folder / "photo.gif"
        frames = [draw(name, 2) for name in CLASSES]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif mode == "WebP":
        path = folder / "photo.webp"
        picture.putalpha(alpha)
        picture.save(path)
    else:
        picture.convert(mode).save(path)
    return path


@pytest.mark.parametrize(
    "mode",
    [
        *("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "GIF", "WebP"),
        *("P, one transparent", "P, alpha each", "RGB, one transparent"),
        *(f"upright {orientation}" for orientation in range(1, 9)),
    ],
)
def test_a_photo_is_decoded_as_for_training(mode: str, tmp_path: Path) -> None:
    """The script that is exported cannot import bob's reader, so it has its own."""
    path = in_mode(mode, tmp_path)
    found, expected = predictor.open_photo(path), open_image(path)
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


# --- what is given and what is told --------------------------------------------------------------

WRONG = {  # what is given -> what is told
    "gone.jpg": "no such file",
    "text.jpg": "not an image (none of JPEG, PNG, WEBP, BMP, TIFF, GIF)",
    "empty.jpg": "not an image (none of JPEG, PNG, WEBP, BMP, TIFF, GIF)",
    "truncated.jpg": "cannot be read as an image (image file is truncated",
    "deep.png": "cannot be read as an image (its pixels are of mode I;16; save it with 8 bits",
    "float.tif": "cannot be read as an image (its pixels are of mode F; save it with 8 bits",
    "bomb.png": "cannot be read as an image (Image size (3600 pixels) exceeds limit",
    "locked.jpg/inside.jpg": "cannot be read as an image (",
    "folder": "a folder without photos",
    "*.heic": "nothing matches",
    "new\nline.jpg": "no such file",
    "-": "standard input lists no photo",
}


@pytest.fixture
def wrong(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that `WRONG` names, as the current one."""
    good = draw("Blue Disc", 1)
    Path("text.jpg").write_text("a text")
    Path("empty.jpg").touch()
    good.save("truncated.jpg")
    Path("truncated.jpg").write_bytes(Path("truncated.jpg").read_bytes()[:-200])
    Image.fromarray(np.full((9, 9), 300, np.uint16)).save("deep.png")
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save("float.tif")
    draw("Blue Disc", 1, size=(60, 60)).save("bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # an error from twice as many
    Path("locked.jpg").touch()
    Path("folder/.hidden").mkdir(parents=True)
    good.save("folder/.hidden/photo.jpg")
    good.save("folder/._photo.jpg")
    Path("folder/notes.txt").touch()
    return workspace


def test_whatever_cannot_be_read_is_one_line_and_no_end(
    exported: Path, wrong: Path, photo: Path
) -> None:
    arguments = [argument for given in WRONG for argument in (photo, given)]
    model = exported / layout.ONNX
    done = predict("--model", model, "--format", "json", *arguments, stdin="\n \n")
    assert (done.exit_code, done.stderr) == (1, "")
    told = json.loads(done.stdout)
    assert [one["photo"] for one in told] == [str(argument) for argument in arguments]
    assert all(len(one["top"]) == 3 for one in told[::2])
    for one in told[1::2]:
        assert one["error"].startswith(WRONG[one["photo"]]), one
        assert len(one["error"].splitlines()) == 1
    # The other formats say the same of each.
    table = predict("--model", model, *arguments, stdin="").stdout
    assert len(table.splitlines()) == len(arguments)
    cells = rows(predict("--model", model, "--format", "csv", *arguments, stdin="").stdout)
    assert [row["error"] for row in cells if row["error"]] == [one["error"] for one in told[1::2]]


def test_what_the_page_tells_of_bad_photos_is_told() -> None:
    page = (ROOT / "docs/use.md").read_text()
    lines = re.findall(r"^\|[^|]+\| `([^`]+)` \|$", page, re.MULTILINE)
    told = [re.split(r" \(\d|\.\.\.|\d", line)[0] for line in lines[:8]]
    assert len(told) == 8
    for beginning in told:
        assert any(line.startswith(beginning) for line in WRONG.values()), beginning


def test_a_model_that_is_none_is_one_line(photo: Path, workspace: Path) -> None:
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "other", [shape], [result])
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), "other.onnx")
    for model, why in {
        "gone.onnx": "gone.onnx is no file",
        str(workspace): f"{workspace} is no file",
        str(photo): f"{photo} cannot be loaded as ONNX (",
        "other.onnx": "other.onnx was not exported by bob",
    }.items():
        done = predict("--model", model, photo)
        assert (done.exit_code, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"Error: {why}")
        script = [sys.executable, predictor.__file__, "--model", model, str(photo)]
        alone = subprocess.run(script, capture_output=True, text=True, check=False)
        assert (alone.returncode, alone.stdout) == (1, "")
        assert alone.stderr == line.replace("Error:", "predict.py:") + "\n"
    done = predict(photo)
    assert "results/export/classifier.onnx is missing; `dvc repro export` makes it" in done.stderr


GOOD = {
    "size": [8, 8],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def save_model(
    path: str, classes: object, how: object, sides: tuple[object, ...] = ("h", "w")
) -> str:
    """A network of two logits, with this metadata; its input has these sides."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, *sides])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2])
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["means", "weight"], ["logits"]),
    ]
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [3, 2], [1, 0, 0, 1, 0, 0])
    graph = helper.make_graph(nodes, "two", [image], [logits], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    said = {"classes": json.dumps(classes), "preprocessing": json.dumps(how)}
    helper.set_model_props(model, said)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("classes", "changed"),
    [
        ("ab", {}),
        ({"a": 0, "b": 1}, {}),
        (["a", 7], {}),
        (["a"], {}),
        (["a", "b", "c"], {}),
        (None, {}),
        (["a", "b"], {"size": [8]}),
        (["a", "b"], {"size": [8, 0]}),
        (["a", "b"], {"size": [8, 10**9]}),
        (["a", "b"], {"size": 8}),
        (["a", "b"], {"crop_pct": 0}),
        (["a", "b"], {"crop_pct": 1e-9}),
        (["a", "b"], {"crop_pct": "x"}),
        (["a", "b"], {"std": [0.2, 0, 0.2]}),
        (["a", "b"], {"mean": [0.5]}),
        (["a", "b"], {"mean": ["x", "y", "z"]}),
        (["a", "b"], {"interpolation": 3}),
        (["a", "b"], {"crop_mode": []}),
    ],
)
def test_metadata_of_another_kind_is_one_line(
    photo: Path, workspace: Path, classes: object, changed: dict[str, object]
) -> None:
    assert predict("--model", save_model("m.onnx", ["a", "b"], GOOD), photo).exit_code == 0
    done = predict("--model", save_model("m.onnx", classes, {**GOOD, **changed}), photo)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: m.onnx was not exported by bob: its metadata")
    assert done.stderr.count("\n") == 1


def test_a_network_that_takes_no_such_images_is_one_line(photo: Path, workspace: Path) -> None:
    done = predict("--model", save_model("m.onnx", ["a", "b"], GOOD, sides=(9, 9)), photo)
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: m.onnx cannot be run (")
    assert done.stderr.count("\n") == 1


def test_a_folder_that_may_not_be_read_is_told_of_beside_the_photos(
    workspace: Path, bound_by_modes: None
) -> None:
    draw("Blue Disc", 1).save(workspace / "a.png")
    (workspace / "closed").mkdir(mode=0)
    found = list(predictor.find_photos(["."]))
    assert [(one.photo, one.error) for one in found] == [
        ("a.png", ""),
        ("./closed", "cannot be read (Permission denied)"),
    ]


def test_photos_come_from_folders_globs_and_a_list_in_order(
    project: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["b.jpg", "a/z.PNG", "a/deeper/y.webp", "[odd] name.jpg", "ä.jpg"]
    for number, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        draw(CLASSES[number % 3], 600 + number).save(name)
    monkeypatch.setattr(predictor, "BATCH", 2)
    given = ["[odd] name.jpg", "a", "*.jpg", "**/*.webp", "-"]
    model = project / layout.ONNX
    done = predict(
        "--model", model, "--format", "csv", "--top", 9, *given, stdin="ä.jpg\r\n\na/z.*"
    )
    found = rows(done.stdout)
    order = list(dict.fromkeys(row["photo"] for row in found))
    assert done.exit_code == 0
    assert order == ["[odd] name.jpg", "a/deeper/y.webp", "a/z.PNG", "b.jpg", "ä.jpg"]
    photos = [*given[:1], *order[1:3], *sorted(["[odd] name.jpg", "b.jpg", "ä.jpg"])]
    photos += ["a/deeper/y.webp", "ä.jpg", "a/z.PNG"]
    assert [row["photo"] for row in found] == [photo for photo in photos for _ in CLASSES]
    for start in range(0, len(found), 3):
        three = found[start : start + 3]
        assert [row["rank"] for row in three] == ["1", "2", "3"]
        assert {row["class"] for row in three} == set(CLASSES)
        shares = [float(row["probability"]) for row in three]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-5)
    # A photo's classes do not depend on what else is in its batch.
    alone = rows(predict("--model", model, "--format", "csv", "b.jpg").stdout)
    assert alone == [row for row in found if row["photo"] == "b.jpg"]


def test_the_table_is_read_at_a_glance(project: Path) -> None:
    photo = "data/tiny/test/Red_Square/0.png"
    done = predict("--top", 2, photo, "gone")
    first, second = done.stdout.splitlines()
    cell = r"(Red Square|Green Bar |Blue Disc ) +\d+\.\d%"
    assert re.fullmatch(rf"{photo}  {cell}   {cell}", first)
    assert second == f"{'gone':<{len(photo)}}  no such file"


def test_a_name_that_is_no_text_is_told_all_the_same(exported: Path, photo: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(photo.parent) + b"/\xff.png"))
    photo.rename(odd)
    script = [sys.executable, predictor.__file__, "--model", exported / layout.ONNX]
    for form in predictor.FORMATS:
        command = [*map(str, script), "--format", form, "-"]
        environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
        done = subprocess.run(
            command, input=os.fsencode(odd), env=environment, capture_output=True, check=True
        )
        assert b"\\udcff.png" in done.stdout and not done.stderr
        if form == "json":
            assert json.loads(done.stdout)[0]["photo"] == str(odd)


def test_a_reader_that_goes_away_ends_it_quietly(exported: Path, photo: Path) -> None:
    script = [sys.executable, predictor.__file__, "--model", exported / layout.ONNX, "--", photo]
    command = [*map(str, script), *[str(photo)] * 3000]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line(exported: Path, photo: Path) -> None:
    script = [sys.executable, predictor.__file__, "--model", exported / layout.ONNX, photo]
    command = [*map(str, script)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "predict.py: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("top", ["0", "-1", "x", "1.5"])
def test_a_number_of_classes_that_is_none_is_refused(top: str, photo: Path) -> None:
    assert predict(f"--top={top}", photo).exit_code == 2
    with pytest.raises(SystemExit):
        predictor.command_line().parse_args([f"--top={top}", str(photo)])


# --- starting ------------------------------------------------------------------------------------


def test_it_starts_in_under_a_second_without_torch(project: Path) -> None:
    code = (
        "import sys; from bob.__main__ import main\n"
        "try:\n    main()\n"
        "finally:\n    assert not {'torch', 'timm', 'dvc', 'scipy'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "predict", "data/tiny/test/Red_Square/0.png"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Other processes on the machine make it wait; they do not add to the time it computes.
    subprocess.run(command, check=True, capture_output=True, cwd=project, env=on_path())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def on_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_without_a_package_it_says_which(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", predictor.__file__, "photo.jpg"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "predict.py: No module named 'numpy'; it needs: pip install numpy pillow onnxruntime\n"
    )


def test_the_page_shows_how_to_use_it_from_python(
    project: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (photo.parent / "classifier.onnx").symlink_to(project / layout.ONNX)
    draw("Blue Disc", 600).save(photo.parent / "photo.jpg")
    monkeypatch.chdir(photo.parent)
    monkeypatch.syspath_prepend(project / layout.EXPORT)
    try:
        exec(documented("use.md", using="from predict import"), {})
    finally:
        sys.modules.pop("predict", None)
    assert re.match(r"photo.jpg \(\('Blue Disc', 0\.\d+\), ", capsys.readouterr().out)


def test_warnings_of_pillow_are_not_printed(
    exported: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # a warning: the photo has 1440
    with warnings.catch_warnings(record=True) as told:
        assert predict("--model", exported / layout.ONNX, photo).exit_code == 0
    assert not told
