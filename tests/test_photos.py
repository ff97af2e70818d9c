"""What a photo becomes, and what is said of a file that is none."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from bob.errors import BobError
from bob.formats import photos
from bob.formats.photos import open_image, size_of
from bob.models import predictor
from bob.stages.split import IMAGE_SUFFIXES
from tests.conftest import ROOT

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))


def told(path: str | Path) -> str:
    with pytest.raises(BobError) as caught:
        open_image(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{path} cannot be read as an image (")
    return message


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        *((mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *((mode, "JPEG") for mode in ("L", "RGB", "CMYK")),
        *((mode, "TIFF") for mode in ("1", "L", "RGB", "RGBA", "CMYK", "YCbCr")),
        *(("RGB", form) for form in ("WEBP", "BMP", "GIF")),
    ],
)
def test_an_ordinary_image_is_decoded_to_the_bits_that_pillow_decodes(
    workspace: Path, mode: str, form: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    NOISE.convert(mode).save("image", form, exif=exif)
    with Image.open("image") as image:
        size = image.size
        expected = ImageOps.exif_transpose(image)
        if mode in ("LA", "RGBA"):
            expected = expected.convert("RGBA")
            white = Image.new("RGBA", expected.size, "white")
            expected = Image.alpha_composite(white, expected)
        expected = expected.convert("RGB")
    found = open_image("image")
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert size_of("image") == size


def test_sixteen_bits_of_colour_are_scaled_by_pillow(workspace: Path) -> None:
    """Pillow takes the upper eight bits of each channel where there are three."""
    values = np.full((4, 4, 3), 0x8001, ">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in values)
    Path("deep.png").write_bytes(png(4, 4, bits=16, colour=2, data=zlib.compress(lines)))
    assert open_image("deep.png").getpixel((0, 0)) == (0x80, 0x80, 0x80)


@pytest.mark.parametrize(
    ("array", "form", "mode"),
    [
        (np.full((9, 9), 300, np.uint16), "PNG", "I;16"),
        (np.full((9, 9), 300, np.uint16), "TIFF", "I;16"),
        (np.full((9, 9), 70_000, np.int32), "TIFF", "I"),
        (np.full((9, 9), 0.5, np.float32), "TIFF", "F"),
    ],
)
def test_deep_grey_is_refused_and_not_cut_to_white(
    workspace: Path, array: np.ndarray, form: str, mode: str
) -> None:
    Image.fromarray(array).save("deep", form)
    assert f"(its pixels are of mode {mode}; save it with 8 bits a channel)" in told("deep")


def png(width: int, height: int, *, bits: int = 8, colour: int = 0, data: bytes = b"") -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    NOISE.save(buffer, form)
    return buffer.getvalue()


def negative(content: bytes, at: int) -> bytes:
    return content[:at] + struct.pack("<i", -30) + content[at + 4 :]


WRONG = {
    "empty": b"",
    "text": b"a text",
    "EPS": encoded("EPS"),
    "PPM": b"P6 1 1 255 abc",
    "PDF": b"%PDF-1.4",
    "bomb": png(60_000, 60_000, data=zlib.compress(b"\0" * 1_000_000)),
    "no height": png(9, 0),
    "negative width": negative(encoded("BMP"), 18),
    "truncated": encoded("JPEG")[:300],
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_photo_is_one_line(workspace: Path, name: str) -> None:
    Path("photo.jpg").write_bytes(WRONG[name])
    told("photo.jpg")


def test_a_bmp_from_top_to_bottom_is_upright(workspace: Path) -> None:
    """A negative height says so in that format."""
    content = encoded("BMP")
    rows = np.asarray(NOISE)
    Path("photo.bmp").write_bytes(negative(content, 22))
    np.testing.assert_array_equal(np.asarray(open_image("photo.bmp")), rows[::-1])


def test_a_file_that_is_no_photo_starts_no_program(workspace: Path) -> None:
    """Pillow reads an EPS by Ghostscript, whatever the file is called."""
    Path("photo.jpg").write_bytes(WRONG["EPS"])
    code = (
        "from PIL import EpsImagePlugin\n"  # as Pillow does with a file of no usual format
        "import sys; sys.addaudithook(lambda event, _: event == 'subprocess.Popen' and exit(9))\n"
        "from bob.errors import BobError; from bob.formats.photos import open_image\n"
        "try: open_image('photo.jpg')\nexcept BobError: exit(3)"
    )
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == 3


def test_the_script_that_is_exported_agrees(workspace: Path) -> None:
    assert predictor.IMAGE_FORMATS == photos.FORMATS
    assert predictor.DEEP == photos.DEEP
    assert predictor.SUFFIXES == IMAGE_SUFFIXES


MUTATIONS = st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=4)), max_size=4)


@settings(max_examples=200, derandomize=True, deadline=2000)
@given(st.sampled_from(photos.FORMATS), MUTATIONS, st.none() | st.integers(0, 999))
def test_whatever_bytes_a_file_has_it_is_an_image_or_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    form: str,
    mutations: list[tuple[int, bytes]],
    length: int | None,
) -> None:
    content = bytearray(encoded(form))
    for at, new in mutations:
        content[at : at + len(new)] = new
    path = tmp_path_factory.mktemp("fuzz") / "new\nline.jpg"
    path.write_bytes(content[:length])
    try:
        assert open_image(path).mode == "RGB"
    except BobError as error:
        assert "new\\nline.jpg cannot be read" in str(error)
        assert len(str(error).splitlines()) == 1
