"""The miniature: a procedurally drawn fine-grained dataset of toy aircraft.

A picture shows one aircraft variant in front of one background in one pose, so class and context
of every image are known. Everything random about a picture comes from (seed, variant, background,
pose, index): the same five give the same bytes.

Two sets of variants never meet. The eight *task* variants (`TASK`) come in four families whose
two members differ in exactly one part; they are what the pipeline is measured on. The *corpus*
variants (`corpus_variants`) train the miniature's models. The four task families occur in the
corpus with other variants, as Stable Diffusion knows "747" but not "747-400".
"""

from __future__ import annotations

import itertools
import math
import zlib
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

DESCRIPTOR = "aircraft"
BACKGROUNDS = ("clear sky", "cloudy sky", "sunset", "runway", "grass", "ocean")
POSES = (
    "level facing left",
    "climbing facing left",
    "descending facing left",
    "level facing right",
    "climbing facing right",
    "descending facing right",
)
CONTEXTS = tuple(itertools.product(BACKGROUNDS, POSES))

SIZE = 64  # pixels, both sides
SUPERSAMPLING = 4

Color = tuple[int, int, int]


# --- the catalogue ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Body:
    """What all variants of a family share."""

    length: Literal["short", "medium", "long"]
    girth: Literal["slim", "normal", "fat"]
    nose: Literal["round", "pointed", "blunt"]
    planform: Literal["straight", "swept", "delta"]
    cabin: Literal["windows", "canopy", "hump", "cargo"]
    fin: Literal["swept", "upright", "rounded"]


@dataclass(frozen=True)
class Parts:
    """What tells the variants of a family apart."""

    wing: Literal["low", "high"]
    winglet: Literal["none", "winglet"]
    tail: Literal["conventional", "T"]
    engines: Literal["none", "propeller", "tail", "one pod", "two pods"]


@dataclass(frozen=True)
class Variant:
    """One class: a family name with a number, the family's body and the variant's own parts."""

    family: str
    number: int
    body: Body
    parts: Parts

    @property
    def name(self) -> str:
        """As it stands in a prompt: "Heron 300"."""
        return f"{self.family} {self.number}"


BODY_VALUES: dict[str, tuple[str, ...]] = {
    "length": ("short", "medium", "long"),
    "girth": ("slim", "normal", "fat"),
    "nose": ("round", "pointed", "blunt"),
    "planform": ("straight", "swept", "delta"),
    "cabin": ("windows", "canopy", "hump", "cargo"),
    "fin": ("swept", "upright", "rounded"),
}
PART_VALUES: dict[str, tuple[str, ...]] = {
    "wing": ("low", "high"),
    "winglet": ("none", "winglet"),
    "tail": ("conventional", "T"),
    "engines": ("none", "propeller", "tail", "one pod", "two pods"),
}
_ALL_PARTS = [Parts(*values) for values in itertools.product(*PART_VALUES.values())]  # type: ignore[arg-type]

_HERON = Body("long", "normal", "round", "swept", "windows", "swept")
_KESTREL = Body("short", "slim", "pointed", "straight", "canopy", "upright")
_PELICAN = Body("medium", "fat", "blunt", "straight", "cargo", "rounded")
_CONDOR = Body("long", "fat", "round", "swept", "hump", "swept")

TASK: tuple[Variant, ...] = (
    Variant("Heron", 300, _HERON, Parts("low", "winglet", "conventional", "one pod")),
    Variant("Heron", 500, _HERON, Parts("low", "none", "conventional", "one pod")),
    Variant("Kestrel", 200, _KESTREL, Parts("low", "none", "T", "propeller")),
    Variant("Kestrel", 700, _KESTREL, Parts("low", "none", "conventional", "propeller")),
    Variant("Pelican", 400, _PELICAN, Parts("high", "none", "conventional", "none")),
    Variant("Pelican", 600, _PELICAN, Parts("low", "none", "conventional", "none")),
    Variant("Condor", 100, _CONDOR, Parts("low", "none", "conventional", "one pod")),
    Variant("Condor", 800, _CONDOR, Parts("low", "none", "conventional", "two pods")),
)

# fmt: off
_CORPUS_ONLY_FAMILIES = (
    "Albatross", "Avocet", "Bittern", "Bunting", "Bustard", "Buzzard", "Cormorant", "Crane",
    "Cuckoo", "Curlew", "Dipper", "Dunlin", "Eagle", "Egret", "Falcon", "Finch", "Fulmar",
    "Gannet", "Godwit", "Goshawk", "Grebe", "Grouse", "Harrier", "Hobby", "Hoopoe", "Ibis",
    "Jackdaw", "Jay", "Kite", "Lapwing", "Magpie", "Martin", "Merlin", "Oriole", "Osprey",
    "Petrel", "Plover", "Puffin", "Raven", "Robin", "Shrike", "Skua", "Snipe", "Starling",
    "Stork", "Swift", "Tern",
)
# fmt: on
_CATALOGUE_SEED = 2510_24078
_VARIANTS_PER_FAMILY = 4
_NUMBERS = tuple(range(100, 1000, 100))


def corpus_variants() -> tuple[Variant, ...]:
    """The variants that the miniature's models are trained on: 51 families of 4.

    No task variant is among them, neither by name nor by its combination of body and parts.
    """
    rng = np.random.default_rng(_CATALOGUE_SEED)
    bodies = {variant.family: variant.body for variant in TASK}
    all_bodies = [Body(*values) for values in itertools.product(*BODY_VALUES.values())]  # type: ignore[arg-type]
    candidates = iter(rng.permutation(len(all_bodies)))
    for family in _CORPUS_ONLY_FAMILIES:
        bodies[family] = next(
            all_bodies[i]
            for i in candidates
            if all(differing_fields(all_bodies[i], body) >= 2 for body in bodies.values())
        )
    variants = []
    for family, body in bodies.items():
        own = [variant for variant in TASK if variant.family == family]
        free_parts = [parts for parts in _ALL_PARTS if parts not in {v.parts for v in own}]
        free_numbers = [number for number in _NUMBERS if number not in {v.number for v in own}]
        parts_chosen = rng.choice(len(free_parts), _VARIANTS_PER_FAMILY, replace=False)
        numbers_chosen = rng.choice(len(free_numbers), _VARIANTS_PER_FAMILY, replace=False)
        variants += [
            Variant(family, free_numbers[n], body, free_parts[p])
            for n, p in zip(numbers_chosen, parts_chosen, strict=True)
        ]
    return tuple(variants)


def differing_fields(one: Body | Parts, other: Body | Parts) -> int:
    """In how many fields two bodies, or two sets of parts, differ."""
    return sum(getattr(one, f.name) != getattr(other, f.name) for f in fields(one))


# --- one picture --------------------------------------------------------------------------------


def draw(variant: Variant, background: str, pose: str, index: int, seed: int) -> Image.Image:
    """Draw one picture: RGB, 64 x 64 pixels. The same arguments give the same pixels.

    `background` is one of BACKGROUNDS and `pose` one of POSES (else ValueError); `index` tells the
    pictures of one variant in one context apart. Livery, place, size, angle, light and the
    background's own details are random.
    """
    entropy = [seed, index, BACKGROUNDS.index(background), POSES.index(pose)]
    # crc32, not hash(): the latter changes from process to process.
    entropy.append(zlib.crc32(variant.name.encode()))
    rng = np.random.default_rng(np.random.SeedSequence(entropy))

    scene = _draw_background(background, rng)
    aircraft = np.asarray(_draw_aircraft(variant, pose, rng), np.float32) / 255
    opacity = aircraft[..., 3:]
    light = rng.uniform(0.88, 1.08)
    tint = np.array([1.06, 0.95, 0.88]) if background == "sunset" else np.ones(3)
    picture = scene * (1 - opacity) + aircraft[..., :3] * opacity * light * tint
    picture = picture + rng.normal(0, 0.008, (SIZE, SIZE, 1))
    return Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))


def _gradient(top: np.ndarray, bottom: np.ndarray, rows: int) -> np.ndarray:
    mix = np.linspace(0, 1, rows)[:, None, None]
    return np.broadcast_to(top * (1 - mix) + bottom * mix, (rows, SIZE, 3)).copy()


def _jittered(color: tuple[float, float, float], rng: np.random.Generator, by: float) -> np.ndarray:
    return np.clip(np.array(color) + rng.uniform(-by, by) + rng.uniform(-by, by, 3) / 2, 0, 1)


def _smooth_noise(rows: int, cell: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Noise in [0, 1] of shape (rows, SIZE, 1) with features of `cell` = (height, width) pixels."""
    coarse = rng.random((rows // cell[0] + 2, SIZE // cell[1] + 2)).astype(np.float32)
    noise = Image.fromarray(coarse).resize((SIZE, rows), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(noise), 0, 1)[..., None]


def _draw_background(background: str, rng: np.random.Generator) -> np.ndarray:
    """The scene without the aircraft: float (64, 64, 3) in [0, 1]."""
    return _SCENES[background](rng)


def _clear_sky(rng: np.random.Generator) -> np.ndarray:
    return _gradient(
        _jittered((0.22, 0.48, 0.86), rng, 0.08), _jittered((0.62, 0.80, 0.96), rng, 0.05), SIZE
    )


def _cloudy_sky(rng: np.random.Generator) -> np.ndarray:
    sky = _gradient(
        _jittered((0.48, 0.58, 0.70), rng, 0.06), _jittered((0.66, 0.72, 0.78), rng, 0.05), SIZE
    )
    clouds = 0.65 * _smooth_noise(SIZE, (12, 20), rng) + 0.35 * _smooth_noise(SIZE, (6, 9), rng)
    cover = np.clip((clouds - rng.uniform(0.38, 0.46)) * 6, 0, 1)
    cloud = _gradient(np.full(3, 0.97), _jittered((0.78, 0.80, 0.84), rng, 0.04), SIZE)
    return sky * (1 - cover) + cloud * cover


def _sunset(rng: np.random.Generator) -> np.ndarray:
    turn = int(rng.integers(26, 42))
    glow = _jittered((0.97, 0.52, 0.25), rng, 0.07)
    sky = np.concatenate(
        [
            _gradient(_jittered((0.30, 0.18, 0.45), rng, 0.07), glow, turn),
            _gradient(glow, _jittered((0.99, 0.83, 0.45), rng, 0.06), SIZE - turn),
        ]
    )
    y, x = np.mgrid[:SIZE, :SIZE]
    distance = np.hypot(x - rng.uniform(6, 58), y - rng.uniform(44, 62))
    sun = np.clip((rng.uniform(5, 8) - distance) / 1.5, 0, 1)[..., None]
    return sky * (1 - sun) + np.array([1.0, 0.95, 0.75]) * sun


def _with_horizon(
    sky: np.ndarray, ground: np.ndarray, horizon: int, rng: np.random.Generator
) -> np.ndarray:
    sky_part = _gradient(sky, np.clip(sky + rng.uniform(0.05, 0.15), 0, 1), horizon)
    return np.concatenate([sky_part, ground])


def _runway(rng: np.random.Generator) -> np.ndarray:
    horizon = int(rng.integers(20, 31))
    rows = SIZE - horizon
    ground = _gradient(
        _jittered((0.46, 0.46, 0.47), rng, 0.05), _jittered((0.33, 0.33, 0.34), rng, 0.05), rows
    )
    y, x = np.mgrid[:rows, :SIZE].astype(np.float64)
    near = (y + 1) / rows
    # A centre line in perspective: dashes grow and drift apart towards the camera.
    centre = rng.uniform(24, 40) + (rng.uniform(10, 54) - 32) * near
    dashes = (np.sin(rng.uniform(0, 6) + 9 / (near + 0.18)) > -0.1) & (
        np.abs(x - centre) < 0.6 + 2.6 * near
    )
    edges = np.abs(np.abs(x - centre) - (5 + 34 * near)) < 0.5 + 1.3 * near
    ground[dashes | edges] = _jittered((0.93, 0.92, 0.86), rng, 0.05)
    return _with_horizon(_jittered((0.72, 0.78, 0.82), rng, 0.06), ground, horizon, rng)


def _grass(rng: np.random.Generator) -> np.ndarray:
    horizon = int(rng.integers(12, 25))
    rows = SIZE - horizon
    ground = _gradient(
        _jittered((0.45, 0.62, 0.28), rng, 0.06), _jittered((0.22, 0.45, 0.14), rng, 0.06), rows
    )
    tufts = _smooth_noise(rows, (4, 3), rng) - 0.5
    ground = ground + tufts * np.array([0.20, 0.24, 0.10])
    return _with_horizon(_jittered((0.66, 0.80, 0.92), rng, 0.06), ground, horizon, rng)


def _ocean(rng: np.random.Generator) -> np.ndarray:
    horizon = int(rng.integers(12, 25))
    rows = SIZE - horizon
    ground = _gradient(
        _jittered((0.10, 0.42, 0.50), rng, 0.05), _jittered((0.03, 0.22, 0.36), rng, 0.05), rows
    )
    waves = _smooth_noise(rows, (2, 11), rng)
    ground = ground + (waves - 0.5) * 0.16
    crests = np.clip((waves - 0.74) * 6, 0, 1)
    ground = ground * (1 - crests) + np.array([0.86, 0.94, 0.95]) * crests
    return _with_horizon(_jittered((0.76, 0.86, 0.90), rng, 0.05), ground, horizon, rng)


_SCENES = {
    "clear sky": _clear_sky,
    "cloudy sky": _cloudy_sky,
    "sunset": _sunset,
    "runway": _runway,
    "grass": _grass,
    "ocean": _ocean,
}


class _Livery(NamedTuple):
    fuselage: Color
    wing: Color
    accent: Color  # tail fin, stripe and winglets
    engine: Color


def _hsv(hue: float, saturation: float, value: float) -> Color:
    sector = np.array([5.0, 3.0, 1.0]) + hue * 6
    mix = np.clip(np.minimum(sector % 6, 4 - sector % 6), 0, 1)
    red, green, blue = (255 * value * (1 - saturation * mix)).round().astype(int)
    return int(red), int(green), int(blue)


def _scaled(color: Color, factor: float) -> Color:
    red, green, blue = (min(255, round(channel * factor)) for channel in color)
    return red, green, blue


def _livery(rng: np.random.Generator) -> _Livery:
    """Bright fuselage, dark strong accent: parts in the accent colour stand out from the body."""
    hue = rng.random()
    saturation = rng.uniform(0, 0.12) if rng.random() < 0.5 else rng.uniform(0.25, 0.6)
    fuselage = _hsv(hue, saturation, rng.uniform(0.86, 1))
    accent = _hsv((hue + rng.uniform(0.25, 0.75)) % 1, rng.uniform(0.75, 1), rng.uniform(0.4, 0.75))
    wing = _scaled(fuselage, 0.85) if rng.random() < 0.5 else _hsv(0.6, 0.05, rng.uniform(0.6, 0.8))
    engine = _hsv(rng.random(), rng.uniform(0.0, 0.25), rng.uniform(0.28, 0.45))
    return _Livery(fuselage, wing, accent, engine)


class _Sketch:
    """A transparent canvas that takes shapes in the aircraft's own frame.

    The frame: output pixels, x towards the nose, y up, the origin in the aircraft's middle.
    """

    def __init__(self, facing: int, angle: float, scale: float, place: tuple[float, float]):
        side = SIZE * SUPERSAMPLING
        self.image = Image.new("RGBA", (side, side))
        self._canvas = ImageDraw.Draw(self.image)
        sin, cos = math.sin(angle), math.cos(angle)
        # Rotate nose-up by `angle`, mirror to face left, and turn y downwards.
        self._matrix = (
            SUPERSAMPLING * scale * np.array([[facing * cos, -facing * sin], [-sin, -cos]])
        )
        self._offset = SUPERSAMPLING * (SIZE / 2 + np.array(place))

    def polygon(self, points: Any, color: Color, outline: float = 0.72) -> None:
        """Fill a polygon ((n, 2) points) with an edge of the same colour, darkened by `outline`."""
        xy = np.asarray(points, np.float64) @ self._matrix.T + self._offset
        corners = [(float(x), float(y)) for x, y in xy]
        self._canvas.polygon(corners, fill=color, outline=_scaled(color, outline), width=2)

    def ellipse(self, x: float, y: float, width: float, height: float, color: Color) -> None:
        turn = np.linspace(0, 2 * np.pi, 25)[:-1]
        points = np.stack([x + width / 2 * np.cos(turn), y + height / 2 * np.sin(turn)], 1)
        self.polygon(points, color)


class _Fuselage:
    """The side view of a body of revolution: half-thickness and centre line along x, in pixels."""

    STATIONS = 48

    def __init__(self, body: Body):
        self.length = {"short": 38.0, "medium": 44.0, "long": 51.0}[body.length]
        self.half_height = {"slim": 3.1, "normal": 4.2, "fat": 5.6}[body.girth]
        nose_share = {"round": 0.20, "pointed": 0.38, "blunt": 0.05}[body.nose]
        position = np.linspace(0, 1, self.STATIONS)  # 0 at the tail, 1 at the nose
        self.x = (position - 0.5) * self.length
        towards_tail = np.clip((0.34 - position) / 0.34, 0, 1)
        towards_nose = np.clip((position - 1 + nose_share) / nose_share, 0, 1)
        taper = 1 - 0.72 * towards_tail**1.5
        if body.nose == "pointed":
            taper = taper * (1 - 0.94 * towards_nose**1.6)
        else:
            taper = taper * np.sqrt(np.clip(1 - towards_nose**2, 0.02, 1))
        self.thickness = self.half_height * taper
        # The tail sweeps up (a flat back) and a pointed nose droops.
        self.centre = self.half_height * 0.62 * towards_tail**1.5
        if body.nose == "pointed":
            self.centre = self.centre - self.half_height * 0.35 * towards_nose**1.6

    def band(self, low: float, high: float, start: float = 0, end: float = 1) -> np.ndarray:
        """Outline of the part between two heights (-1 belly, 1 back) and two places (0 tail)."""
        inside = slice(round(start * (self.STATIONS - 1)), round(end * (self.STATIONS - 1)) + 1)
        x, centre, thickness = self.x[inside], self.centre[inside], self.thickness[inside]
        lower = np.stack([x, centre + low * thickness], 1)
        upper = np.stack([x, centre + high * thickness], 1)
        return np.concatenate([lower, upper[::-1]])

    def x_at(self, position: float) -> float:
        return (position - 0.5) * self.length


def _draw_aircraft(variant: Variant, pose: str, rng: np.random.Generator) -> Image.Image:
    """The aircraft on a transparent ground: RGBA, 64 x 64 pixels."""
    attitude, _, side = pose.split()
    nose_up = {"level": 0.0, "climbing": 21.0, "descending": -21.0}[attitude]
    sketch = _Sketch(
        facing=1 if side == "right" else -1,
        angle=math.radians(nose_up + rng.uniform(-4.5, 4.5)),
        scale=rng.uniform(0.9, 1.05),
        place=(rng.uniform(-3, 3), rng.uniform(-4, 4)),
    )
    body, parts, livery = variant.body, variant.parts, _livery(rng)
    fuselage = _Fuselage(body)
    _draw_far_wing(sketch, fuselage, body, parts, livery)
    _draw_fin(sketch, fuselage, body, parts, livery)
    _draw_fuselage(sketch, fuselage, body, livery)
    if parts.tail == "conventional":
        _draw_stabilizer(sketch, fuselage, livery)
    if parts.engines == "tail":
        _draw_pod(sketch, fuselage.x_at(0.25), fuselage.half_height * 0.75, livery)
    _draw_near_wing(sketch, fuselage, body, parts, livery)
    if parts.engines == "propeller":
        _draw_propeller(sketch, fuselage, livery)
    return sketch.image.reduce(SUPERSAMPLING)


def _draw_fuselage(sketch: _Sketch, fuselage: _Fuselage, body: Body, livery: _Livery) -> None:
    height = fuselage.half_height
    if body.cabin == "hump":
        sketch.ellipse(
            fuselage.x_at(0.78),
            height * 0.72,
            fuselage.length * 0.30,
            height * 1.5,
            livery.fuselage,
        )
    if body.cabin == "canopy":
        sketch.ellipse(
            fuselage.x_at(0.64), height * 0.85, fuselage.length * 0.24, height * 1.7, (52, 72, 98)
        )
    sketch.polygon(fuselage.band(-1, 1), livery.fuselage)
    sketch.polygon(fuselage.band(-0.95, -0.5), _scaled(livery.fuselage, 0.76), outline=1)
    sketch.polygon(fuselage.band(0.62, 0.88), _scaled(livery.fuselage, 1.15), outline=1)
    sketch.polygon(fuselage.band(-0.5, -0.22), livery.accent, outline=1)
    if body.cabin in ("windows", "hump"):
        # Few and large: what is smaller than three pixels is lost in an autoencoder's latents.
        for position in np.arange(0.28, 0.82, 5.2 / fuselage.length):
            x = fuselage.x_at(float(position))
            window = [(x, -0.4), (x + 3.0, -0.4), (x + 3.0, 2.4), (x, 2.4)]
            sketch.polygon(window, (60, 70, 90), outline=1)
    if body.cabin != "canopy":
        sketch.polygon(fuselage.band(0.15, 0.72, 0.86, 0.94), (52, 72, 98), outline=1)


def _draw_fin(
    sketch: _Sketch, fuselage: _Fuselage, body: Body, parts: Parts, livery: _Livery
) -> None:
    tail, base = fuselage.x_at(0), fuselage.half_height * 0.6
    top = base + 10.5
    fin = {
        "swept": [(tail + 11, base), (tail + 0.5, top), (tail - 4.0, top), (tail + 1, base)],
        "upright": [(tail + 9, base), (tail + 5.5, top), (tail - 0.5, top), (tail, base)],
        "rounded": [
            (tail + 11, base),
            (tail + 7.5, base + 6.5),
            (tail + 4.0, top - 0.7),
            (tail + 0.5, top),
            (tail - 1.8, top - 2.5),
            (tail - 1.2, base + 4),
            (tail, base),
        ],
    }[body.fin]
    sketch.polygon(fin, livery.accent)
    if parts.tail == "T":
        middle = {"swept": tail - 1.5, "upright": tail + 2.5, "rounded": tail + 1.5}[body.fin]
        stabilizer = [
            (middle + 7.0, top + 1.4),
            (middle - 2.5, top + 1.4),
            (middle - 6.5, top - 2.4),
            (middle + 3.0, top - 2.4),
        ]
        sketch.polygon(stabilizer, livery.wing)


def _draw_stabilizer(sketch: _Sketch, fuselage: _Fuselage, livery: _Livery) -> None:
    tail, root = fuselage.x_at(0), fuselage.half_height * 0.55
    sketch.polygon(
        [
            (tail + 9, root + 0.8),
            (tail + 1.5, root - 5.0),
            (tail - 4.5, root - 5.0),
            (tail + 1, root + 0.8),
        ],
        livery.wing,
    )


class _Wing(NamedTuple):
    root: float  # x of the middle of the root
    root_chord: float
    tip_chord: float
    sweep: float  # how far the middle of the tip lies behind that of the root

    def edge(self, span: float, along_chord: float) -> float:
        """x at a share of the span (0 root, 1 tip) and of the chord (1 leading edge)."""
        chord = self.root_chord + (self.tip_chord - self.root_chord) * span
        return self.root - self.sweep * span + (along_chord - 0.5) * chord


def _wing(fuselage: _Fuselage, body: Body) -> _Wing:
    root = fuselage.x_at(0.56)
    return {
        "straight": _Wing(root, 10.5, 7.5, 0.0),
        "swept": _Wing(root + 3, 13.0, 6.0, 11.0),
        "delta": _Wing(root - 2, 20.0, 4.5, 8.5),
    }[body.planform]


def _draw_winglet(sketch: _Sketch, x: float, y: float, color: Color) -> None:
    sketch.polygon([(x + 2.6, y), (x - 0.8, y + 7.0), (x - 4.8, y + 7.0), (x - 3.0, y)], color)


# The camera looks slightly down on the aircraft: the near wing comes towards the viewer, that is
# down in the picture, and the far wing goes up, where a low one is hidden by the fuselage.


def _draw_far_wing(
    sketch: _Sketch, fuselage: _Fuselage, body: Body, parts: Parts, livery: _Livery
) -> None:
    if parts.wing == "low":
        return
    wing, y, rise = _wing(fuselage, body), fuselage.half_height * 0.9, 6.5
    points = [
        (wing.edge(0, 1), y),
        (wing.edge(1, 1), y + rise),
        (wing.edge(1, 0), y + rise),
        (wing.edge(0, 0), y),
    ]
    sketch.polygon(points, _scaled(livery.wing, 0.8))
    if parts.winglet == "winglet":
        _draw_winglet(sketch, wing.edge(1, 0.5), y + rise - 0.5, _scaled(livery.accent, 0.85))


def _draw_near_wing(
    sketch: _Sketch, fuselage: _Fuselage, body: Body, parts: Parts, livery: _Livery
) -> None:
    wing = _wing(fuselage, body)
    height = fuselage.half_height
    y, drop = (-0.55 * height, 11.0) if parts.wing == "low" else (0.95 * height, 7.5)
    for span in {"one pod": (0.5,), "two pods": (0.22, 0.88)}.get(parts.engines, ()):
        _draw_pod(sketch, wing.edge(span, 1) + 1.8, y - drop * span - 1.8, livery)
    sketch.polygon(
        [
            (wing.edge(0, 1), y),
            (wing.edge(1, 1), y - drop),
            (wing.edge(1, 0), y - drop),
            (wing.edge(0, 0), y),
        ],
        livery.wing,
    )
    if parts.winglet == "winglet":
        _draw_winglet(sketch, wing.edge(1, 0.5), y - drop, livery.accent)


def _draw_pod(sketch: _Sketch, x: float, y: float, livery: _Livery) -> None:
    sketch.ellipse(x, y, 9.0, 5.0, livery.engine)
    sketch.ellipse(x + 3.2, y, 2.0, 4.2, (225, 225, 230))


def _draw_propeller(sketch: _Sketch, fuselage: _Fuselage, livery: _Livery) -> None:
    nose, y = fuselage.x_at(1), float(fuselage.centre[-1])
    sketch.ellipse(nose + 1.2, y, 2.4, 17.0, (70, 66, 64))
    sketch.ellipse(nose + 1.5, y, 4.0, 4.0, livery.accent)


# --- the dataset --------------------------------------------------------------------------------

# Streams of random pictures that never meet. Only the training pictures follow data.seed: every
# seed is measured on the same test set. (CORPUS is for bob/miniature.py.)
VAL_SEED, TEST_SEED, CORPUS_SEED = 1_000_001, 1_000_002, 1_000_003


def ties(seed: int) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """The two backgrounds and the two poses each task class is tied to in training, by class name.

    The two variants of a family share none of them, and no two classes have the same: what differs
    most between their training photos is the context, which is the trap the method must avoid.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, len(TASK)]))
    tied: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    while not tied or len({frozenset(sum(both, ())) for both in tied.values()}) < len(TASK):
        for family in dict.fromkeys(variant.family for variant in TASK):
            backgrounds = [str(b) for b in rng.permutation(BACKGROUNDS)]
            poses = [str(p) for p in rng.permutation(POSES)]
            own = [variant for variant in TASK if variant.family == family]
            for i, variant in enumerate(own):
                pair = slice(2 * i, 2 * i + 2)
                tied[variant.name] = (tuple(sorted(backgrounds[pair])), tuple(sorted(poses[pair])))
    return tied


def images_per_class(train: int, per_context: int) -> dict[str, int]:
    """How many images of a class each part of the dataset has."""
    return {
        "train": train,
        "val": len(CONTEXTS) * max(1, per_context // 2),
        "test": len(CONTEXTS) * per_context,
    }
