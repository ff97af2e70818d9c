"""The measures of the synthetic set, on cases whose value is known."""

import numpy as np
import pytest
from PIL import Image

from bob.cache.items import ItemCache
from bob.formats.manifest import Generated
from bob.formats.params import Params
from bob.formats.photos import Photo, Task
from bob.formats.prompts import Context
from bob.miniature import world
from bob.models import similarity
from bob.stages import audit
from tests.builders import build_photos, build_text_to_image
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    return build_text_to_image(tmp_path_factory.mktemp("models") / "base")


def pairs(count, context_of):
    return [(f"class {i % 4}", context_of(i)) for i in range(count)]


def test_leakage_is_one_where_the_context_decides_the_class_and_zero_at_chance(base_model):
    random = np.random.default_rng(0)
    tied = pairs(80, lambda i: Context(f"place {i % 4}", "one pose"))
    free = pairs(80, lambda i: Context(f"place {random.integers(4)}", "one pose"))
    clusters = audit.cluster_contexts({"real": tied, "generated": free}, len(tied), base_model)
    scores = audit.context_leakage(tied, clusters)
    assert scores["background"] == pytest.approx(1)
    assert scores["pose"] == pytest.approx(0, abs=1e-9)
    assert audit.context_leakage(free, clusters)["background"] == pytest.approx(0, abs=0.1)
    assert [len(set(numbers.values())) for numbers in clusters.values()] == [4, 1]


def test_phrases_that_are_all_distinct_do_not_leak_by_being_distinct(base_model):
    """Plain mutual information would call this the maximum."""
    random = np.random.default_rng(0)
    words = [" ".join(random.choice(list("abcdefgh"), 3)) for _ in range(100)]
    distinct = pairs(100, lambda i: Context(f"{words[i]} {i}", "pose"))
    clusters = audit.cluster_contexts({"real": distinct}, len(distinct), base_model)
    assert len(set(clusters["background"].values())) == 10
    assert abs(audit.context_leakage(distinct, clusters)["background"]) < 0.15
    assert audit.context_leakage([], clusters) == {"background": 0, "pose": 0}


def test_the_pictures_are_judged_by_the_captioner_and_not_by_their_prompts(repository):
    """Every prompt asks for a sunset to the left; the pictures show what the class is tied to."""
    shown = {
        "Heron 300": Context("grass", "climbing facing left"),
        "Pelican 400": Context("ocean", "level facing right"),
    }
    asked = Context("sunset", "level facing left")
    images = []
    for variant in world.TASK:
        for number in range(4 if variant.name in shown else 0):
            context = shown[variant.name]
            file = f"images/{variant.family}-{number}.png"
            path = repository / "results/generate" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            world.draw(variant, context.background, context.pose, number, 7).save(path)
            images.append(Generated(variant.name, asked, "", 0, file))
    params = Params(
        {
            "caption": {
                "model": str(ROOT / "models/miniature-captioner"),
                "batch_size": 4,
                "precision": "fp32",
                "image_side": 768,
            }
        },
        "audit",
    )
    sample = audit.first_of_each_class(images, 3)
    with ItemCache("audit") as cache:
        seen = audit.contexts_shown(sample, Task("aircraft", tuple(shown)), params, cache)
    assert [image.class_name for image in sample] == ["Heron 300"] * 3 + ["Pelican 400"] * 3
    assert [context and context.background for context in seen] == ["grass"] * 3 + ["ocean"] * 3

    pairs = [(i.class_name, context) for i, context in zip(sample, seen, strict=True) if context]
    clusters = {
        attribute: {
            phrase: number
            for number, phrase in enumerate(
                sorted({getattr(c, attribute) for c in (asked, *(c for _, c in pairs))})
            )
        }
        for attribute in ("background", "pose")
    }
    assert audit.context_leakage(pairs, clusters)["background"] == pytest.approx(1)
    assert audit.context_obedience([(asked, c) for _, c in pairs], clusters)["background"] == 0
    assert audit.context_obedience([(c, c) for _, c in pairs], clusters)["pose"] == 1


def test_diversity_of_copies_is_zero_and_of_opposites_is_known():
    copies = np.tile([[3.0, 4.0]], (5, 1))
    assert similarity.diversity(copies, ["a"] * 5) == pytest.approx(0)
    axes = np.eye(4) * 7
    assert similarity.diversity(axes, ["a"] * 4) == pytest.approx(1)
    both = np.concatenate([np.tile([[1.0, 0, 0, 0]], (4, 1)), axes])
    assert similarity.diversity(both, ["a"] * 4 + ["b"] * 4) == pytest.approx(0.5)


def test_kid_is_zero_in_the_mean_for_one_distribution_and_grows_with_distance():
    random = np.random.default_rng(0)

    def draw(shift):
        return random.normal(shift, 1, (200, 16))

    same, std = similarity.kernel_inception_distance(draw(0), draw(0))
    near, _ = similarity.kernel_inception_distance(draw(0), draw(0.5))
    far, _ = similarity.kernel_inception_distance(draw(0), draw(1.5))
    assert abs(same) < 3 * std
    assert near > same + std
    assert far > 2 * near


def test_kid_agrees_with_the_definition_written_out():
    random = np.random.default_rng(1)
    x, y = random.normal(size=(4, 3)), random.normal(size=(4, 3))

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    within = sum(
        kernel(z[i], z[j]) for z in (x, y) for i in range(4) for j in range(4) if i != j
    ) / (4 * 3)
    across = sum(kernel(a, b) for a in x for b in y) / 16
    assert similarity.squared_mmd(x, y) == pytest.approx(within - 2 * across)


def test_a_contact_sheet_has_real_and_generated_images_side_by_side(workspace):
    real = build_photos(workspace / "real", {"Wren": 2, "Tit": 1})
    made = workspace / "results/generate/images/Wren"
    made.mkdir(parents=True)
    Image.new("RGB", (16, 16), "magenta").save(made / "0000.png")
    audit.write_contact_sheets(
        workspace / "sheets",
        ["Tit", "Wren"],
        [Photo(str(path), path.parent.name, "") for path in sorted(real.rglob("*.jpg"))],
        [Generated("Wren", None, "", 0, "images/Wren/0000.png")],
    )
    sheet = np.asarray(Image.open(workspace / "sheets/01.png")).astype(int)
    magenta = np.abs(sheet - (255, 0, 255)).sum(axis=2) < 30
    assert magenta.any()
    columns = np.flatnonzero(magenta.any(axis=0))
    assert columns.min() > audit.SHEET_REAL * audit.SHEET_CELL
    assert not magenta[: sheet.shape[0] // 2].any(), "it stands in its class's row"


def test_many_classes_take_several_sheets(workspace):
    classes = [f"class {i}" for i in range(audit.SHEET_CLASSES + 1)]
    audit.write_contact_sheets(workspace / "sheets", classes, [], [])
    assert sorted(path.name for path in (workspace / "sheets").iterdir()) == ["01.png", "02.png"]
