"""Stage `card`: the model card says what the run measured, and its code runs."""

import copy
import csv
import functools
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench.report import CHROMIUM, chromium
from bob.errors import BobError
from bob.formats import layout, params
from bob.formats.files import read_json, sha256, write_json
from bob.formats.manifest import read_manifest, write_manifest
from bob.formats.params import Params
from bob.models import predictor
from bob.stages import benchmark, card, classify, evaluate, export
from tests.conftest import ROOT
from tests.tiny_project import CLASSES, classify_params, draw, make_project


def card_params(**changes: Any) -> Params:
    """The project's own, but for the models, and `section__key=value`."""
    values = copy.deepcopy(params.read_yaml(ROOT / "params.yaml"))
    values["classify"]["backbone"] = "models/tiny"
    values["finetune"]["base_model"] = "models/painter"
    values["caption"]["model"] = "models/teller"
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    return Params(values, "card")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which everything has run that the card tells of."""
    root = make_project(tmp_path_factory.mktemp("measured"), train=3, test=9)
    (root / "models/painter").mkdir()
    (root / "models/painter/README.md").write_text("---\nlicense: openrail\n---\n# A painter\n")
    here = Path.cwd()
    os.chdir(root)
    try:
        classify.run(classify_params(epochs=2, learning_rate=3e-4))  # not always right
        evaluate.run(Params({}, "evaluate"))
        export.run(Params({"export": {"precisions": ["fp32", "fp16", "int8"]}}, "export"))
        settings = {"benchmark": {"batch_sizes": [1, 4], "repeats": 3}}
        benchmark.run(Params(settings, "benchmark"))
    finally:
        os.chdir(here)
    return root


@pytest.fixture
def project(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the current directory, with its card."""
    shutil.copytree(measured, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    card.run(card_params())
    return tmp_path / "project"


def section(title: str) -> str:
    return layout.CARD.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table(title: str) -> list[list[str]]:
    """The rows of a section's table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def predictions() -> list[tuple[str, str]]:
    """(Class, class named) of the test photos, by the classifier that is exported."""
    seed = read_json(layout.CLASSIFY / "classifier.json")["best_seed"]["real_and_synthetic"]
    path = layout.EVALUATE / "predictions/real_and_synthetic.csv"
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["seed"]) == seed]
    return [(row["actual"], row["predicted"]) for row in rows]


def wilson(right: int, count: int) -> list[float]:
    """Wilson 1927, in percent: the shares from which `right` lies 1.96 deviations away at most."""
    z, share = 1.959964, right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / count / 2) ** 2)
    return [round(100 * one, 1) for one in (share, centre - half, centre + half)]


def test_accuracy_by_class_is_that_of_the_exported_classifier(project: Path) -> None:
    named = predictions()
    assert len(named) == 27 and any(actual != said for actual, said in named)
    rows = table("Accuracy")
    assert [row[0] for row in rows] == [*CLASSES, "**all**"]
    for name, count, right, top1 in rows:
        own = [pair for pair in named if name in (pair[0], "**all**")]
        hits = sum(actual == said for actual, said in own)
        assert (int(count), int(right)) == (len(own), hits)
        numbers = [abs(float(number)) for number in re.findall(r"-?\d+\.\d", top1)]
        assert numbers == pytest.approx(wilson(hits, len(own)), abs=0.051)
    assert rows[-1][3] in layout.CARD.read_text().partition("## Data")[0]
    accuracy = read_json(layout.ACCURACY_METRICS)
    for variant in ("real_only", "real_and_synthetic"):
        assert f"{accuracy[variant]['top1']} %" in section("Accuracy")


def test_confusions_are_counted_and_ranked(project: Path) -> None:
    wrong = Counter(pair for pair in predictions() if pair[0] != pair[1])
    rows = table("Confusions")
    assert {(row[0], row[1]): row[2] for row in rows} == {
        pair: f"{count} of 9" for pair, count in wrong.items()
    }
    counts = [int(row[2].split()[0]) for row in rows]
    assert counts == sorted(counts, reverse=True)
    assert f"of {wrong.total()} errors" in section("Confusions")


def test_data_settings_and_latency_are_those_of_the_run(project: Path) -> None:
    assert table("Data") == [
        *([name, "3", "2", "9", "2"] for name in CLASSES),
        ["**all**", "9", "6", "27", "6"],
    ]
    settings = dict(table("Method and settings"))
    assert list(settings) == ["`data`", "`caption`", "`finetune`", "`generate`", "`classify`"]
    assert "images_per_class 100, guidance_scale 2.0" in settings["`generate`"]
    onnx = read_json(layout.ONNX_METRICS)
    columns = ("p50_ms", "p95_ms", "p99_ms", "images_per_second")
    for row, size in zip(table("Latency"), ("1", "4"), strict=True):
        assert row == [size, *(str(onnx[f"batch_{size}"][column]) for column in columns)]
    assert sha256(layout.ONNX) in layout.CARD.read_text()


def test_rejected_images_are_counted_by_the_numbers_that_are_missing(project: Path) -> None:
    assert "rejected" not in layout.CARD.read_text()
    images = read_manifest(layout.GENERATED)
    rest = [image for image in images if image.file != "images/Green_Bar/0000.png"]
    assert len(rest) == len(images) - 1
    write_manifest(layout.GENERATED, rest)
    card.run(card_params())
    assert "a person has rejected and that others replace: 1." in layout.CARD.read_text()


def test_each_precision_has_its_file_and_what_was_measured_of_it(project: Path) -> None:
    onnx = read_json(layout.ONNX_METRICS)
    of = {"fp32": onnx, "fp16": onnx["fp16"], "int8": onnx["int8"]}
    for row, (precision, values) in zip(table("Precisions"), of.items(), strict=True):
        name, file, size, top1, *rates = row
        assert name == precision and (layout.EXPORT / file.strip("`")).is_file()
        assert (size, top1) == (str(values["model_mb"]), f"{values['top1']} %")
        assert rates == [str(values[f"batch_{n}"]["images_per_second"]) for n in (1, 4)]

    onnx["int8"] = {"survived": False, "agreement": 40.0}
    write_json(layout.ONNX_METRICS, onnx)
    card.run(card_params())
    assert table("Precisions")[2] == ["int8", "none: does not survive", *[""] * 4]
    for precision in layout.PRECISIONS:
        del onnx[precision]
    write_json(layout.ONNX_METRICS, onnx)
    card.run(card_params())
    assert "Precisions" not in layout.CARD.read_text()


def test_a_setting_that_the_stage_does_not_declare_is_not_told() -> None:
    declared = params.read_yaml(ROOT / "dvc.yaml")["stages"]["card"]["params"]
    values = params.select(params.read_yaml(ROOT / "params.yaml"), declared, "card")
    assert set(values) == set(card.SETTINGS)
    for name, keys in card.SETTINGS.items():
        assert set(keys) <= set(values[name])


def test_no_photo_and_no_path_of_this_machine_is_in_it(project: Path) -> None:
    text = layout.CARD.read_text()
    assert str(project) not in text and "data/tiny" not in text
    assert text.count("```") % 2 == 0


def test_licences_are_told_as_the_cards_of_the_models_state_them(project: Path) -> None:
    assert table("Licences") == [
        ["backbone", "`models/tiny`", "no card"],
        ["text-to-image", "`models/painter`", "license: openrail"],
        ["captioner", "`models/teller`", "no card"],
    ]
    card.run(card_params(caption__bank="data/contexts/mine.jsonl"))
    assert [row[0] for row in table("Licences")] == ["backbone", "text-to-image"]


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("---\nlicense: mit\n---\n", "license: mit"),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: https://example.org/l\n---\n",
            "license: other, license_name: own, license_link: https://example.org/l",
        ),
        (
            "---\nlicense: [mit, apache-2.0]\nbase_model: a/b\n---\n",
            "license: ['mit', 'apache-2.0'], base_model: a/b",
        ),
        ("---\ntags: [onnx]\n---\nlicense: mit\n", "not stated"),
        ("# A model\n", "not stated"),
        ("", "not stated"),
        ("---\nlicense: [mit\n---\n", "its card's header cannot be read"),
        ("---\n- license\n---\n", "its card's header cannot be read"),
    ],
)
def test_licence_fields_of_a_card(header: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(header)
    assert card.licence_of(tmp_path) == told


def test_what_was_not_done_is_not_claimed(project: Path) -> None:
    assert "was fine-tuned on the training photos, with the background" in section(
        "Method and settings"
    )
    card.run(card_params(finetune__epochs=0, generate__context="none"))
    text = section("Method and settings")
    assert "was taken as it is. It generated images of each class, with no context" in text
    card.run(card_params(generate__context="data/contexts/mine.jsonl"))
    assert "at random from `data/contexts/mine.jsonl`" in section("Method and settings")
    card.run(card_params(generate__images_per_class=0))
    assert "no image was generated" in section("Method and settings")
    trained = read_json(layout.CLASSIFY / "classifier.json")
    assert "the best on validation: seed" in section("Method and settings")
    for result in trained["validation"]["real_and_synthetic"].values():
        result |= {"top1": None, "loss": None}
    write_json(layout.CLASSIFY / "classifier.json", trained)
    card.run(card_params())
    assert "the last epoch of the first seed" in section("Method and settings")


def test_a_classifier_without_errors_has_no_confusions(project: Path) -> None:
    path = layout.EVALUATE / "predictions/real_and_synthetic.csv"
    with path.open(newline="") as file:
        rows = [row | {"predicted": row["actual"]} for row in csv.DictReader(file)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    card.run(card_params())
    assert section("Confusions").strip() == "None."


def test_without_an_evaluation_it_says_what_is_missing(project: Path) -> None:
    before = layout.CARD.read_bytes()
    shutil.rmtree(layout.EVALUATE)
    with pytest.raises(BobError, match=r"real_and_synthetic\.csv is missing; `dvc repro evaluate`"):
        card.run(card_params())
    assert layout.CARD.read_bytes() == before


@pytest.mark.parametrize(
    ("mode", "size", "crop_pct", "words"),
    [
        ("center", [224, 224], 0.875, "just cover 256 x 256 pixels"),
        ("squash", [64, 48], 1.0, "resized to 64 x 48 pixels whatever its shape"),
        ("border", [224, 224], 1.0, "resized to fit into 224 x 224 pixels"),
    ],
)
def test_resizing_in_words(mode: str, size: list[int], crop_pct: float, words: str) -> None:
    about = {"size": size, "crop_pct": crop_pct, "crop_mode": mode, "interpolation": "bicubic"}
    assert words in card.resizing(about)
    assert f"the central {size[0]} x {size[1]} pixels" in card.resizing(about)


# --- its code -----------------------------------------------------------------------------------


def programs(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", layout.CARD.read_text(), re.M | re.S)


def test_its_python_runs_in_its_folder(project: Path) -> None:
    draw("Red Square", 1).save(layout.EXPORT / "photo.jpg")
    code = "\n".join(programs("python"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=layout.EXPORT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("photo.jpg (('")
    assert (layout.EXPORT / "photo.rgb").stat().st_size == 32 * 32 * 3


def test_its_programs_have_the_numbers_of_this_classifier(project: Path) -> None:
    (cpp,), (javascript,) = programs("cpp"), programs("js")
    mean = ", ".join(
        map(str, read_json(layout.CLASSIFY / "classifier.json")["preprocessing"]["mean"])
    )
    assert "height = 32, width = 32" in cpp and f"mean[] = {{{mean}}}" in cpp
    assert "[1, 3, 32, 32]" in javascript and f"mean = [{mean}]" in javascript
    assert '["Blue Disc", "Green Bar", "Red Square"]' in javascript
    assert not re.search(r"\$\w", cpp + javascript)


WEB_RUNTIME = "onnxruntime-web@1.30.0"


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which the files of a folder are served."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: chromium)")
def test_its_javascript_names_the_class_in_a_browser(project: Path, tmp_path: Path) -> None:
    fetched = subprocess.run(
        ["npm", "pack", "--silent", WEB_RUNTIME] if shutil.which("npm") else ["false"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    if fetched.returncode:
        pytest.skip(f"{WEB_RUNTIME} cannot be fetched by npm")
    # Not by shutil, whose safe filter Python has only since 3.11.4.
    subprocess.run(["tar", "-xzf", fetched.stdout.strip()], cwd=tmp_path, check=True)
    for name in ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
        shutil.copy(tmp_path / "package/dist" / name, layout.EXPORT)

    classifier = predictor.Classifier(str(layout.ONNX))
    draw("Red Square", 1).save(layout.EXPORT / "photo.png")
    photo = predictor.open_photo(layout.EXPORT / "photo.png")
    pixels = predictor.resize_and_crop(photo, classifier.preprocessing)
    (layout.EXPORT / "photo.rgb").write_bytes(pixels.tobytes())
    (told,) = classifier.predict([str(layout.EXPORT / "photo.png")], top=1)

    (code,) = programs("js")
    in_a_browser = {
        'import { readFileSync } from "node:fs";\n': "",
        '"onnxruntime-node"': '"./ort.wasm.min.mjs"',
        'readFileSync("photo.rgb")': 'new Uint8Array(await (await fetch("photo.rgb")).bytes())',
    }
    for old, new in in_a_browser.items():
        assert old in code
        code = code.replace(old, new)
    (layout.EXPORT / "index.html").write_text(
        f'<link rel="icon" href="data:,"><script type="module">{code}</script>'
    )
    with served(layout.EXPORT) as address, chromium() as browser:
        page = browser.new_page()
        with page.expect_console_message() as said:
            page.goto(address)
        assert said.value.text == told.top[0][0]
