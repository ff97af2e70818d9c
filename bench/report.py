"""The report with many images: how large its page is, how soon it paints, what it loads.

    python -m bench.report [--images 20000] [--classes 200]

The page is the stage's own, of made-up images, and is opened from the disk in a headless Chromium.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from bob.formats.files import sha256
from bob.formats.photos import Task
from bob.formats.prompts import Context, prompt
from bob.stages.report import Entry, columns, render

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
BACKGROUNDS, POSES, THUMBNAILS = 40, 25, 50
VARIANTS = ("real_only", "real_and_synthetic")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium, the one that is installed."""
    with sync_playwright() as playwright:
        # A sandbox of its own is refused where this runs as root.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def made_up(classes: list[str], images: int, shots: int) -> list[Entry]:
    """Generated images and shots, spread over the classes."""
    random = np.random.default_rng(0)
    real = [
        Entry("shot", f"results/split/train/{n}.jpg", classes[n % len(classes)], f"{n:064x}")
        for n in range(shots)
    ]
    entries = []
    for n in range(images):
        name = classes[n * len(classes) // images]
        context = Context(f"place {random.integers(BACKGROUNDS)}", f"pose {random.integers(POSES)}")
        entries.append(
            Entry(
                "generated",
                f"results/generate/images/{n // 100}/{n % 100:04d}.png",
                name,
                f"{random.integers(2**62):064x}",
                context,
                context if n % 5 == 0 else None,
                prompt("aircraft", name, context),
                int(random.integers(2**62)),
                real[n % shots].file,
                round(float(random.random()), 4),
                says=[(int(random.integers(len(classes))), round(0.5 / k, 4)) for k in (1, 2, 3)],
                doubt=round(float(random.random()), 4),
            )
        )
    for n, entry in enumerate(entries):
        entry.alike = [entries[(n + k) % images].file for k in range(1, 7)]
    return [*entries, *real]


def results(classes: list[str]) -> dict[str, Any]:
    """What else stands on a page, as the stage reads it from the metrics."""
    leakage = {"background": 0.4, "pose": 0.4}
    top1 = {"top1": 80.0, "top1_std": 1.0}
    return {
        "descriptor": "aircraft",
        "classes": classes,
        "clusters": {"background": {}, "pose": {}},
        "verdicts": {},
        "metrics": {
            "accuracy": {**dict.fromkeys(VARIANTS, top1), "lift": 5.0, "lift_std": 1.0},
            "onnx": {
                "provider": "CPU",
                "gpu": "none",
                "processor": "-",
                "threads": 1,
                "model_mb": 1.0,
            },
            "synthetic": {"images": 1, "leakage": {"real": leakage, "generated": leakage}},
        },
        "test": 100,
        "by_class": {variant: [80.0] * len(classes) for variant in VARIANTS},
        "seeds": {variant: [(0, 80.0)] for variant in VARIANTS},
        "confusions": [(0, len(classes) - 1, 3, 2)],
        "curves": {},
        "pixelated": False,
    }


def write_report(folder: Path, classes: list[str], images: int, shots: int) -> Path:
    """Write a report of made-up images; returns its page."""
    entries = made_up(classes, images, shots)
    thumbs = folder / "thumbs"
    thumbs.mkdir(parents=True)
    random = np.random.default_rng(1)
    for n in range(min(THUMBNAILS, len(entries))):
        noise = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((256, 256), Image.Resampling.BICUBIC)
        image.save(thumbs / f"{n:06d}.webp", quality=85)
    for n in range(THUMBNAILS, len(entries)):
        (thumbs / f"{n:06d}.webp").hardlink_to(thumbs / f"{n % THUMBNAILS:06d}.webp")
    data = {**results(classes), **columns(entries, Task("aircraft", tuple(classes)))}
    page = folder / "index.html"
    page.write_text(render(f"{len(classes)} classes of aircraft", data), encoding="utf-8")
    return page


def first_paint(page: Page) -> float:
    """Seconds from the start of the navigation until something was painted."""
    return (
        page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000
    )


@click.command(help=__doc__)
@click.option("--images", default=20_000, show_default=True)
@click.option("--classes", default=200, show_default=True)
def main(images: int, classes: int) -> None:
    with tempfile.TemporaryDirectory() as name, chromium() as browser:
        path = write_report(Path(name), [f"Class {n}" for n in range(classes)], images, classes)
        click.echo(f"{images:,} images: {path.stat().st_size / 1e6:.2f} MB ({sha256(path)[:8]})")
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.evaluate("document.querySelector('.card img').decode()")
        painted = page.evaluate("performance.now()") / 1000
        click.echo(
            f"first paint {first_paint(page):.2f} s, first picture by {painted:.2f} s, "
            f"{len(requests)} requests"
        )
        before = len(requests)
        page.evaluate("document.querySelector('.scroll').scrollTop = 1e5")
        page.wait_for_timeout(500)
        click.echo(f"a jump to the middle: {len(requests) - before} requests")
        began = page.evaluate("performance.now()")
        ended = page.evaluate("gallery.update(), performance.now()")
        click.echo(f"filters and counts anew: {ended - began:.0f} ms")


if __name__ == "__main__":
    main()
