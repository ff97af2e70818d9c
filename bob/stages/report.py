"""Stage `report`: a page on the generated set and what came of it, that needs only a browser.

`results/report/index.html` has all in it but the pictures, which are thumbnails beside it. It opens
from a disk and asks nothing of a network; `bob look` serves the same page with decisions.
"""

import csv
import json
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
import jinja2
from markupsafe import Markup
from PIL import Image, ImageOps

from bob.formats import layout
from bob.formats.files import read_json, read_jsonl, replacing
from bob.formats.manifest import read_manifest
from bob.formats.params import Params
from bob.formats.photos import Task, open_image, read_photos, read_task
from bob.formats.prompts import Context, read_bank
from bob.formats.review import read_verdicts
from bob.models.backbones import predict
from bob.models.classifiers import (
    REAL_AND_SYNTHETIC,
    REAL_ONLY,
    VARIANTS,
    Trained,
    load_classifier,
    read_trained,
)
from bob.models.device import computing_device
from bob.models.preprocessing import read_inputs
from bob.models.threads import in_threads

PAGE = Path(__file__).parent.parent / "page"
SCRIPTS = ("model", "gallery", "contexts", "results", "decisions", "app")
KINDS = ("generated", "shot", "validation", "test")  # as page/model.js knows them by number
THUMBNAIL = 256  # pixels of the longer side, at most
PIXEL_ART = 128  # the longer side of images that a browser is not to smooth
TOP = 3
CONFUSIONS = 50


@dataclass
class Entry:
    """One image as the page shows it."""

    kind: str
    file: str
    """From the project's root."""
    class_name: str
    key: str
    """What decisions name it by: its item's recipe, or the SHA-256 of a real photo."""
    context: Context | None = None
    """Asked for of a generated image, in the caption bank of a shot."""
    seen: Context | None = None
    """What the captioner saw in a generated image."""
    prompt: str | None = None
    seed: int | None = None
    shot: str | None = None
    """The file of the nearest shot, and how alike they are: cosine similarity of features."""
    similarity: float | None = None
    alike: Sequence[str] = ()
    """Files of the generated images most like it."""
    says: list[tuple[int, float]] = field(default_factory=list)
    """The most probable classes, by number, and their probabilities."""
    doubt: float | None = None
    """1 - the probability of its own class."""


TEXTS: dict[str, Callable[[Entry], str | None]] = {
    "background": lambda entry: entry.context.background if entry.context else None,
    "pose": lambda entry: entry.context.pose if entry.context else None,
    "seenBackground": lambda entry: entry.seen.background if entry.seen else None,
    "seenPose": lambda entry: entry.seen.pose if entry.seen else None,
    "prompt": lambda entry: entry.prompt,
}


def run(params: Params) -> None:
    """Write `results/report`: index.html, and a thumbnail of each image, in the page's order."""
    task, trained = read_task(), read_trained()
    entries = [*_generated(), *_photos()]
    _ask_classifiers(entries, trained)
    with replacing(layout.REPORT) as folder:
        (folder / "thumbs").mkdir()
        longest = _write_thumbnails(entries, folder / "thumbs")
        data = {
            **_results(task, trained),
            **columns(entries, task),
            "pixelated": longest <= PIXEL_ART,
        }
        page = render(f"{len(task.classes)} classes of {task.descriptor}", data)
        (folder / "index.html").write_text(page, encoding="utf-8")
    click.echo(f"report: {layout.REPORT}/index.html, {len(entries)} images")


# --- the images ---------------------------------------------------------------------------------


def _generated() -> list[Entry]:
    audited = {row["file_name"]: row for row in read_jsonl(layout.AUDITED)}
    entries = []
    for image in read_manifest():
        row = audited[image.file]
        entries.append(
            Entry(
                "generated",
                (layout.GENERATE / image.file).as_posix(),
                image.class_name,
                image.recipe,
                image.context,
                Context(**row["seen"]) if row.get("seen") else None,
                image.prompt,
                image.seed,
                row["shot"],
                row["similarity"],
                [(layout.GENERATE / other).as_posix() for other in row["alike"]],
            )
        )
    return entries


def _photos() -> Iterator[Entry]:
    contexts = {entry.image: entry.context for entry in read_bank(layout.BANK)}
    for kind, path in zip(KINDS[1:], (layout.TRAIN, layout.VAL, layout.TEST), strict=True):
        for photo in read_photos(path):
            context = contexts.get(photo.sha256) if kind == "shot" else None
            yield Entry(kind, photo.path, photo.class_name, photo.sha256, context)


def _ask_classifiers(entries: Sequence[Entry], trained: Trained) -> None:
    """Set what a classifier says of each image.

    Of a generated image it is the one of real photos alone, since the other was trained on it; of a
    real photo the one that is exported. Of either, the seed best on validation.
    """
    device = computing_device()
    generated = [entry for entry in entries if entry.kind == "generated"]
    real = [entry for entry in entries if entry.kind != "generated"]
    for variant, members in ((REAL_ONLY, generated), (REAL_AND_SYNTHETIC, real)):
        if not members:
            continue
        model = load_classifier(variant, trained.best_seed(variant))
        inputs = read_inputs([entry.file for entry in members], trained.preprocessing)
        shares = predict(model, inputs, device).softmax(dim=1)
        top = shares.topk(min(TOP, len(trained.classes)), dim=1)
        for entry, own, values, labels in zip(
            members, shares, top.values.tolist(), top.indices.tolist(), strict=True
        ):
            entry.says = [
                (label, round(value, 4)) for label, value in zip(labels, values, strict=True)
            ]
            entry.doubt = round(1 - own[trained.classes.index(entry.class_name)].item(), 4)


def _write_thumbnails(entries: Sequence[Entry], folder: Path) -> int:
    """Write a thumbnail of each image; returns the longest side of any image, in pixels."""

    def write(numbered: tuple[int, Entry]) -> int:
        number, entry = numbered
        image = open_image(entry.file)
        longest = max(image.size)
        if longest > THUMBNAIL:
            image = ImageOps.contain(image, (THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        # Few pixels are shown large, so that what a lossy file makes of them would show too.
        image.save(folder / f"{number:06d}.webp", quality=85, lossless=longest <= PIXEL_ART)
        return longest

    return max(in_threads(write, enumerate(entries)), default=0)


def columns(entries: Sequence[Entry], task: Task) -> dict[str, Any]:
    """The images column by column, texts by their number: a tenth of what rows would take."""
    texts: dict[str, dict[str, int]] = {name: {} for name in TEXTS}
    places = {entry.file: number for number, entry in enumerate(entries)}

    def place(column: str, value: str | None) -> int:
        return -1 if value is None else texts[column].setdefault(value, len(texts[column]))

    by_column = {
        "kind": [KINDS.index(entry.kind) for entry in entries],
        "file": [entry.file for entry in entries],
        "class": [task.classes.index(entry.class_name) for entry in entries],
        "key": [entry.key for entry in entries],
        # As text: a seed has more digits than a number of JavaScript.
        "seed": [None if entry.seed is None else str(entry.seed) for entry in entries],
        "shot": [-1 if entry.shot is None else places[entry.shot] for entry in entries],
        "similarity": [entry.similarity for entry in entries],
        "alike": [[places[other] for other in entry.alike] for entry in entries],
        "says": [entry.says for entry in entries],
        "doubt": [entry.doubt for entry in entries],
        **{name: [place(name, of(entry)) for entry in entries] for name, of in TEXTS.items()},
    }
    return {"entries": by_column, "texts": {name: [*values] for name, values in texts.items()}}


# --- the results --------------------------------------------------------------------------------


def _results(task: Task, trained: Trained) -> dict[str, Any]:
    """What was measured, from the files that `dvc metrics` and `dvc plots` show."""
    evaluated = {
        variant: _rows(layout.EVALUATE / "predictions" / f"{variant}.csv") for variant in VARIANTS
    }
    by_class = {
        variant: {
            row["class"]: float(row["top1"])
            for row in _rows(layout.EVALUATE / "per_class" / f"{variant}.csv")
        }
        for variant in VARIANTS
    }
    return {
        "descriptor": task.descriptor,
        "classes": task.classes,
        "clusters": read_json(layout.CLUSTERS),
        "verdicts": {recipe: one.verdict for recipe, one in read_verdicts().items()},
        "metrics": {
            "accuracy": read_json(layout.ACCURACY_METRICS),
            "onnx": read_json(layout.ONNX_METRICS),
            "synthetic": read_json(layout.SYNTHETIC_METRICS),
        },
        "test": len(read_photos(layout.TEST)),
        "by_class": {
            variant: [top1.get(name) for name in task.classes] for variant, top1 in by_class.items()
        },
        "seeds": {
            variant: [
                (int(row["seed"]), float(row["top1"]))
                for row in _rows(layout.EVALUATE / "per_seed" / f"{variant}.csv")
            ]
            for variant in VARIANTS
        },
        "confusions": _confusions(evaluated, task, trained),
        "curves": {
            variant: [
                (int(row["step"]) + 1, float(row["val_top1"]))
                for row in _rows(
                    layout.CLASSIFY / f"curves/plots/metrics/{variant}/val_top1.tsv", "\t"
                )
            ]
            for variant in VARIANTS
        },
    }


def _confusions(
    evaluated: Mapping[str, Sequence[Mapping[str, str]]], task: Task, trained: Trained
) -> list[tuple[int, int, int, int]]:
    """Pairs of classes (shown, named), how often, and how often by real photos alone.

    Of each variant's seed best on validation; most often confused by the exported one first.
    """
    counts = {
        variant: Counter(
            (task.classes.index(row["actual"]), task.classes.index(row["predicted"]))
            for row in rows
            if row["seed"] == str(trained.best_seed(variant)) and row["actual"] != row["predicted"]
        )
        for variant, rows in evaluated.items()
    }
    most = sorted(counts[REAL_AND_SYNTHETIC].items(), key=lambda pair: (-pair[1], pair[0]))
    return [(*pair, count, counts[REAL_ONLY][pair]) for pair, count in most[:CONFUSIONS]]


def _rows(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a table; none where it is not there, as a curve without validation photos."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


# --- the page -----------------------------------------------------------------------------------


def render(title: str, data: Mapping[str, Any]) -> str:
    """The page with `data` in it.

    Its policy lets no script run but the page's own, by their hashes, and no request leave the
    place that it comes from; so a class that is called `<script>` is a text like any other.
    """
    style = (PAGE / "style.css").read_text(encoding="utf-8")
    scripts = [(PAGE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(_source(script) for script in scripts)}",
            f"style-src {_source(style)}",
            "img-src 'self' file: data: blob:",  # a file's own origin is not 'self' everywhere
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (PAGE / "index.html").read_text(encoding="utf-8")
    )
    return page.render(
        title=title,
        policy=policy,
        style=Markup(style),
        scripts=[Markup(script) for script in scripts],
        data=Markup(_as_json(data)),
    )


def _source(text: str) -> str:
    """A script or a style as a Content-Security-Policy names it."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _as_json(data: Mapping[str, Any]) -> str:
    """JSON in which no text can end the element that it stands in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
