"""Crops of a batch at once are those that are made one by one; decoding in threads keeps order."""

import threading
import time

import pytest
import torch

from bob.models import training
from bob.models.crops import cropped, crops_at_once, draw_crop
from bob.models.preprocessing import Preprocessing
from bob.models.threads import in_threads
from bob.models.training import Labelled, TrainingImages
from tests.tiny_project import draw


def noise(height, width, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=random)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(64, 64), (96, 128), (224, 224)])
def test_a_batch_of_crops_is_what_torchvision_makes_of_each(interpolation, size):
    """Also of noise, the worst case of a filter, of images of several sizes, and enlarged."""
    images = [noise(*shape, seed) for seed, shape in enumerate([(64, 64), (256, 340), (300, 71)])]
    draws = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)).tolist()
    draws[0][4], draws[1][4] = 0.2, 0.8  # one is mirrored, one is not
    crops = [draw_crop(draw, *image.shape[1:]) for draw, image in zip(draws, images, strict=True)]
    assert [crop.flip for crop in crops[:2]] == [True, False]
    each = [cropped(i, c, size, interpolation) for i, c in zip(images, crops, strict=True)]
    difference = crops_at_once(images, crops, size, interpolation) - torch.stack(each).float()
    # The one by one are rounded to whole grey levels, twice.
    assert difference.abs().max() < 1.6
    assert abs(difference.mean()) < 0.1  # halves are rounded up


def test_a_crop_of_all_is_the_image_itself():
    image = noise(40, 40, 0)
    whole = draw_crop([1.0, 0.5, 0.0, 0.0, 1.0], 40, 40)
    (found,) = crops_at_once([image], [whole], (40, 40), "bicubic")
    assert (whole.height, whole.width) == (40, 40)
    torch.testing.assert_close(found, image.float(), atol=1e-3, rtol=0)


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for number, path in enumerate(paths):
        draw("Red Square", number, size=(50 + number, 40)).save(path)
    return Labelled(tuple(paths), tuple("0" * 8), (0, 1) * 4)


PREPROCESSING = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "center")


def test_the_same_seed_means_the_same_crops_on_a_gpu(images):
    def batch(at_once):
        of = TrainingImages(images, 2, PREPROCESSING)
        of._at_once = at_once
        return of.crops(torch.tensor([5, 0, 3, 5]), torch.Generator().manual_seed(3))

    (one, targets), (other, others) = batch(False), batch(True)
    assert torch.equal(targets, others)
    grey_level = 2 / 255  # of values from -1 to 1
    assert (one - other).abs().max() < 1.6 * grey_level


def test_images_beyond_the_room_are_decoded_each_time_to_the_same_crops(images, monkeypatch):
    def batch():
        of = TrainingImages(images, 2, PREPROCESSING)
        crops, _ = of.crops(torch.arange(8), torch.Generator().manual_seed(3))
        return crops, len(of._kept)

    every, kept = batch()
    monkeypatch.setattr(training, "KEPT_BYTES", 3 * 3 * 36 * 50)
    some, fewer = batch()
    assert (kept, 0 < fewer < 8) == (8, True)
    assert torch.equal(every, some)


def test_results_come_in_order_whatever_finishes_first(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    threads = set()

    def slow_first(number):
        threads.add(threading.get_ident())
        time.sleep(0.02 if number % 4 == 0 else 0)
        return number

    assert list(in_threads(slow_first, range(40))) == list(range(40))
    assert len(threads) > 1


def test_an_error_comes_in_its_place_and_ends_the_threads():
    def fails_at_three(number):
        if number == 3:
            raise ValueError(number)
        return number

    before = threading.active_count()
    results = in_threads(fails_at_three, range(100))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="3"):
        next(results)
    assert threading.active_count() == before


def test_what_is_not_taken_is_not_computed_far_ahead(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    begun: list[int] = []
    results = in_threads(begun.append, range(10_000))
    next(results)
    results.close()
    assert len(begun) < 100
