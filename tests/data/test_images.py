"""Every kind of image file, and of what is none; the oracles are numpy and Pillow's other ways to the same picture."""

import io
import struct
import uuid
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from vitcls.core.errors import UserError
from vitcls.data import images
from vitcls.data.images import BadImage

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (6, 9, 3), np.uint8)
# Smooth, so that lossy files and resizing change little: x in red, y in green.
Y, X = np.mgrid[0:90, 0:120]
SMOOTH = np.stack([X * 2, Y * 2, (X + Y) % 256], axis=-1).astype(np.uint8)


def encode(picture, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(file, kind, **options)
    return file.getvalue()


def orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


class Encoded:
    """The least that `decode_all` needs."""

    def __init__(self, files):
        self.files, self.unique = list(files), uuid.uuid4().hex

    def __len__(self):
        return len(self.files)

    def read(self, index):
        return self.files[index]

    def name(self, index):
        return f"{self.unique}/{index}"


@pytest.mark.parametrize(
    "file",
    [
        encode(NOISE, "PNG"),
        encode(NOISE, "BMP"),
        encode(NOISE, "PPM"),
        encode(NOISE, "TIFF"),
        encode(NOISE, "WEBP", lossless=True),
    ],
    ids=["png", "bmp", "ppm", "tiff", "webp"],
)
def test_lossless_formats_come_back_as_they_were(file):
    assert images.examine(file) == (9, 6, 3)
    np.testing.assert_array_equal(images.decode(file, size=None, channels=3), NOISE)


UPRIGHT = {  # what a viewer does with the stored rows and columns (EXIF 2.3, tag 274)
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("value", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation(value, kind):
    file = encode(NOISE, kind, exif=orientation(value))
    expected = UPRIGHT[value](NOISE)
    np.testing.assert_array_equal(images.decode(file, size=None, channels=3), expected)
    assert images.examine(file) == (expected.shape[1], expected.shape[0], 3)


def test_box_is_of_the_upright_image():
    file = encode(NOISE, "PNG", exif=orientation(6))
    expected = np.rot90(NOISE, -1)[2:5, 1:4]
    np.testing.assert_array_equal(images.decode(file, size=(3, 3), channels=3, box=(1, 2, 3, 3)), expected)


def test_broken_exif_does_not_cost_the_picture():
    good = encode(NOISE, "PNG", exif=orientation(6))
    broken = encode(NOISE, "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f" + bytes(5))
    assert images.examine(good)[:2] == (6, 9)
    np.testing.assert_array_equal(images.decode(broken, size=None, channels=3), NOISE)


def test_cmyk_jpeg_becomes_rgb():
    file = encode(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95)
    assert images.examine(file) == (120, 90, 3)
    difference = images.decode(file, size=None, channels=3).astype(int) - SMOOTH
    assert np.abs(difference).mean() < 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_not_clipped(kind):
    values = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    file = encode(values, kind)
    assert images.examine(file) == (16, 16, 1)
    expected = np.rint(values / 257.0)[..., None]
    np.testing.assert_array_equal(images.decode(file, size=None, channels=1), expected)
    np.testing.assert_array_equal(images.decode(file, size=None, channels=3), expected.repeat(3, -1))


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_floats_are_scaled_by_their_range(top):
    values = np.linspace(0, top, 64, dtype=np.float32).reshape(8, 8)
    expected = np.rint(np.linspace(0, 255, 64)).reshape(8, 8, 1)
    decoded = images.decode(encode(values, "TIFF"), size=None, channels=1)
    assert np.abs(decoded.astype(int) - expected).max() <= 1
    values[0, 0] = np.nan
    assert images.decode(encode(values, "TIFF"), size=None, channels=1)[0, 0, 0] == 0


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_one_white_for_integers_of_a_data_set(kind):
    values = np.array([[0, 1, 100, 2048], [4000, 4080, 4095, 60000]], np.uint16)
    file = encode(values, kind)
    assert images.is_deep(file) and images.largest_value(file) == 60000
    decoded = images.decode(file, size=None, channels=1, decoding=images.Decoding(4095.0))
    np.testing.assert_array_equal(decoded[..., 0], np.rint(np.minimum(values, 4095) * (255 / 4095)))


def test_one_white_for_floats_of_a_data_set():
    values = np.array([[0, 0.2, 1.0], [250.0, 300.0, 400.0]], np.float32)
    bright, dark = encode(values, "TIFF"), encode(values[:1].copy(), "TIFF")
    assert images.is_deep(dark) and images.largest_value(bright) == 400
    for file, expected in ((bright, values), (dark, values[:1])):  # the dark one alone would have white at 1
        decoded = images.decode(file, size=None, channels=1, decoding=images.Decoding(300.0))
        np.testing.assert_array_equal(decoded[..., 0], np.rint(np.minimum(expected, 300) * (255 / 300)))
    broken = encode(np.array([[np.nan, np.inf, -5.0, 7.0]], np.float32), "TIFF")
    assert images.largest_value(broken) == 7


def test_eight_bits_are_not_deep_and_know_no_scale():
    for file in (encode(NOISE, "PNG"), encode(NOISE[..., 0], "PNG"), encode(NOISE, "JPEG")):
        assert not images.is_deep(file)
    file = encode(NOISE, "PNG")
    decoded = images.decode(file, size=None, channels=3, decoding=images.Decoding(10.0))
    np.testing.assert_array_equal(decoded, NOISE)


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (0, 1),
        (0.3, 1),
        (1, 1),
        (1.5, 255),
        (2, 255),
        (255, 255),
        (256, 511),
        (4080, 4095),
        (4095, 4095),
        (65535, 65535),
        (310.5, 310.5),
    ],
)
def test_natural_maximum(largest, expected):
    assert images.natural_maximum(float(largest)) == expected


def test_transparency_lies_on_white():
    palette = Image.frombytes("P", (2, 2), bytes([0, 1, 2, 3]))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    file = encode(palette, "PNG", transparency=bytes([255, 0, 255, 255]))
    expected = np.array([[[10, 20, 30], [255, 255, 255]], [[70, 80, 90], [100, 110, 120]]])
    np.testing.assert_array_equal(images.decode(file, size=None, channels=3), expected)

    alpha = np.array([[0, 64, 128, 255]], np.uint8)
    rgba = np.concatenate([np.full((1, 4, 3), 40, np.uint8), alpha[..., None]], -1)
    expected = 255 - 215 * (alpha / 255.0)
    assert np.abs(images.decode(encode(rgba, "PNG"), size=None, channels=3)[..., 0] - expected).max() <= 1
    gray = encode(np.stack([rgba[..., 0], alpha], -1), "PNG")
    assert images.examine(gray)[2] == 1
    assert np.abs(images.decode(gray, size=None, channels=1)[..., 0] - expected).max() <= 1


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        lossless = {"lossless": True} if kind == "WEBP" else {}
        file = encode(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
        np.testing.assert_array_equal(images.decode(file, size=None, channels=3), np.full((4, 4, 3), [255, 0, 0]))


def test_channels_are_what_is_asked_for():
    gray = encode(NOISE[..., 0], "PNG")
    assert images.examine(gray)[2] == 1
    np.testing.assert_array_equal(images.decode(gray, size=None, channels=3), NOISE[..., :1].repeat(3, -1))
    luma = NOISE @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert np.abs(images.decode(encode(NOISE, "PNG"), size=None, channels=1)[..., 0] - luma).max() <= 1
    bits = encode(Image.fromarray(NOISE[..., 0]).convert("1"), "PNG")
    assert images.examine(bits)[2] == 1
    assert set(np.unique(images.decode(bits, size=None, channels=1))) <= {0, 255}


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 1_000_000) + b"IDAT" + bytes(100)


BAD = {
    "empty": (b"", "is empty"),
    "html": (b"\n<!DOCTYPE html><html><body>404</body></html>", "is an HTML page"),
    "text": (b"not a picture", "is not an image"),
    "noise": (RNG.bytes(1000), "is not an image"),
    "cut header": (encode(SMOOTH, "PNG")[:20], "is not an image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "is not an image"),
    "bomb": (png_header(100_000, 100_000), "claims more than 67,108,864 pixels"),
    "large": (png_header(9_000, 9_000), "claims 9000x9000 pixels"),  # below Pillow's own limit
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_told_from_its_header(name, tmp_path):
    data, reason = BAD[name]
    with pytest.raises(BadImage, match=reason):
        images.examine(data)
    with pytest.raises(BadImage, match=reason):
        images.is_deep(data)
    with pytest.raises(BadImage, match=reason):
        images.largest_value(data)
    with pytest.raises(BadImage, match=reason):
        images.decode(data, size=(8, 8), channels=3)
    (tmp_path / "image.jpg").write_bytes(data)
    with pytest.raises(BadImage, match=reason):
        images.verify(tmp_path / "image.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_images_are_found_by_decoding(kind, tmp_path):
    noise = RNG.integers(0, 256, (64, 64, 3), np.uint8)
    file = encode(noise, kind)
    (tmp_path / "whole").write_bytes(file)
    assert images.verify(tmp_path / "whole") == (64, 64, 3)
    (tmp_path / "cut").write_bytes(file[: len(file) // 2])
    with pytest.raises(BadImage):
        images.verify(tmp_path / "cut")


def test_an_image_with_a_good_header_is_examined_without_its_body():
    file = encode(RNG.integers(0, 256, (64, 64, 3), np.uint8), "PNG")
    assert images.examine(file[: len(file) // 2]) == (64, 64, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_damaged_bytes_give_a_picture_or_bad_image_and_nothing_else(kind):
    options = {"exif": orientation(6)} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    file = encode(NOISE, kind, **options)
    rng = np.random.default_rng(1)
    for _ in range(150):
        data = bytearray(file)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(0, 256)
        try:
            images.examine(bytes(data))
            decoded = images.decode(bytes(data), size=(5, 5), channels=3)
        except BadImage:
            continue
        assert decoded.shape == (5, 5, 3) and decoded.dtype == np.uint8


@pytest.mark.parametrize("size", [16, 32, 90, 128])
def test_resizing_takes_the_central_square(size):
    decoded = images.decode(encode(SMOOTH[..., :2].repeat(2, -1)[..., :3], "PNG"), size=(size, size), channels=3)
    expected = ImageOps.fit(
        Image.fromarray(SMOOTH[..., :2].repeat(2, -1)[..., :3]), (size, size), Image.Resampling.BILINEAR
    )
    assert np.abs(decoded.astype(int) - np.asarray(expected)).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(("size", "shape"), [((28, 28), (32, 32)), ((28, 42), (32, 48))])
def test_eval_crop_is_the_centre_of_a_larger_picture(kind, size, shape):
    """The oracle resizes to size / 0.875 and crops, in two steps."""
    file = encode(SMOOTH[:80, :120], kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    larger = np.asarray(ImageOps.fit(Image.fromarray(SMOOTH[:80, :120]), shape[::-1], Image.Resampling.BILINEAR))
    margins = [(outer - inner) // 2 for outer, inner in zip(shape, size, strict=True)]
    expected = larger[margins[0] : margins[0] + size[0], margins[1] : margins[1] + size[1]]
    decoding = images.Decoding(eval_crop=0.875)
    decoded = images.decode(file, size=size, channels=3, decoding=decoding)
    assert np.abs(decoded.astype(int) - expected)[..., :2].max() <= 3
    whole = images.decode(file, size=size, channels=3)
    np.testing.assert_array_equal(
        images.decode(file, size=size, channels=3, decoding=images.Decoding(eval_crop=1.0)), whole
    )
    assert np.abs(whole.astype(int) - expected)[..., :2].max() > 5
    box = (10, 10, 50, 50)  # at random, say: it is taken as it is
    np.testing.assert_array_equal(
        images.decode(file, size=size, channels=3, decoding=decoding, box=box),
        images.decode(file, size=size, channels=3, box=box),
    )


def test_resizing_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    decoded = images.decode(encode(stripes, "PNG"), size=(16, 16), channels=3)
    assert 100 < decoded.min() <= decoded.max() < 155


@pytest.mark.parametrize("box", [None, (0, 0, 801, 613), (400.0, 300.0, 401.0, 313.0), (13, 7, 300, 500)])
@pytest.mark.parametrize("shrink", [1, 2, 3, 5, 9])
def test_jpegs_decoded_at_reduced_size_are_cropped_in_the_same_place(box, shrink):
    y, x = np.mgrid[0:613, 0:801]
    picture = np.stack([x * 255 / 800, y * 255 / 612, 0 * x], -1).astype(np.uint8)
    left, top, width, height = box or (94, 0, 613, 613)
    size = int(min(width, height)) // (2 * shrink)
    decoded = images.decode(encode(picture, "JPEG", quality=95, subsampling=0), size=(size, size), channels=3, box=box)
    centers = (np.arange(size) + 0.5) / size
    red = (left + centers * width - 0.5) * 255 / 800
    green = (top + centers * height - 0.5) * 255 / 612
    inner = slice(1, -1)  # filters are cut off at the edges
    assert np.abs(decoded[:, :, 0].mean(0) - red)[inner].max() < 2
    assert np.abs(decoded[:, :, 1].mean(1) - green)[inner].max() < 2


@pytest.mark.parametrize("size", [(30, 60), (60, 30), (10, 200), (200, 10)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("turned", [False, True])
def test_resizing_takes_the_central_box_of_the_same_shape(size, kind, turned):
    """Ramps of 613x801 pixels: the box, and how many pixels of a JPEG were decoded, can be read off."""
    y, x = np.mgrid[0:613, 0:801]
    ripple = 8 * ((x // 8 + y // 8) % 2)  # a JPEG decoded at 1/8 has lost it, and what is fine may show it
    picture = np.stack([x * 255 / 800, y * 255 / 612, 100 + ripple], -1).astype(np.uint8)
    stored = np.rot90(picture) if turned else picture
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    file = encode(stored, kind, exif=orientation(6 if turned else 1), **options)
    decoded = images.decode(file, size=size, channels=3)
    assert decoded.shape == (*size, 3)
    zoom = min(613 / size[0], 801 / size[1])  # pixels of the box for one of the result
    for channel, axis, extent in ((1, 0, 613), (0, 1, 801)):
        place = (extent - zoom * size[axis]) / 2 + (np.arange(size[axis]) + 0.5) * zoom - 0.5
        found = decoded[:, :, channel].mean(1 - axis)
        assert np.abs(found - place * 255 / (extent - 1))[1:-1].max() < 2


def test_enough_of_a_jpeg_is_decoded_for_the_longer_side(monkeypatch):
    drafts = []
    draft = JpegImageFile.draft
    monkeypatch.setattr(JpegImageFile, "draft", lambda self, *a: drafts.append(draft(self, *a) and self.size))
    file = encode(np.zeros((640, 320, 3), np.uint8), "JPEG")
    turned = encode(np.zeros((320, 640, 3), np.uint8), "JPEG", exif=orientation(6))
    # box 320x160 (H, W) of each upright image of 640x320: 64x32 needs twice as many pixels, which a half has
    for encoded, size, box, longest in (
        (file, (40, 20), None, 80),
        (turned, (40, 20), None, 80),
        (file, (40, 160), None, 640),  # across: the box is 80 high and 320 wide
        (turned, (40, 160), None, 640),
        (file, (80, 20), (0, 0, 160, 160), 640),
    ):
        images.decode(encoded, size=size, channels=3, box=box)
        assert max(drafts.pop()) == longest, (size, box)


@pytest.mark.parametrize(("side", "same"), [(40, True), (63, True), (64, False), (120, False)])
def test_with_nothing_to_spare_a_jpeg_is_decoded_smaller_and_looks_the_same(side, same):
    """A crop of `side` pixels to 32: half of them are enough from 64 on, with twice as many to spare from 128 on."""
    file = encode(np.pad(SMOOTH, ((0, 38), (0, 8), (0, 0)), mode="edge"), "JPEG", quality=95, subsampling=0)
    box = (4, 2, side, side)
    usual = images.decode(file, size=(32, 32), channels=3, box=box)
    fast = images.decode(file, size=(32, 32), channels=3, box=box, spare=1)
    assert np.array_equal(usual, fast) == same
    assert np.abs(usual.astype(int) - fast)[1:-1, 1:-1].mean() < 2
    np.testing.assert_array_equal(fast, images.decode(file, size=(32, 32), channels=3, box=box, spare=1))


def test_random_resized_crops_are_inside_and_in_range():
    rng = np.random.default_rng(0)
    boxes = np.array([images.random_resized_crop_box(rng, 400, 300, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(2000)])
    left, top, width, height = boxes.T
    assert np.all(left >= 0) and np.all(top >= 0) and np.all(left + width <= 400) and np.all(top + height <= 300)
    shares, ratios = width * height / (400 * 300), width / height
    assert shares.min() > 0.07 and shares.max() <= 1.0 and np.all(ratios > 0.73) and np.all(ratios < 1.36)
    assert shares.min() < 0.1 and shares.max() > 0.9 and ratios.min() < 0.77 and ratios.max() > 1.3
    assert abs(np.log(ratios).mean()) < 0.05  # as wide as high, on average
    assert set(left[width == 300]) <= set(range(101))


def test_random_resized_crop_depends_on_its_generator_alone():
    boxes = [images.random_resized_crop_box(np.random.default_rng(7), 50, 40, (0.1, 1), (0.5, 2)) for _ in range(2)]
    assert boxes[0] == boxes[1]


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(1000, 10, (493, 0, 13, 10)), (10, 1000, (0, 493, 10, 13)), (1, 1, (0, 0, 1, 1)), (40, 40, (0, 0, 40, 40))],
)
def test_crops_that_cannot_fit_fall_back_to_the_centre(width, height, expected):
    area = (1.0, 1.0) if width != height else (2.0, 2.0)
    assert images.random_resized_crop_box(np.random.default_rng(0), width, height, area, (3 / 4, 4 / 3)) == expected


def test_decode_all_is_decode_of_each():
    small = [encode(RNG.integers(0, 256, (8, 8, 3), np.uint8), "PNG") for _ in range(5)]
    large = [encode(RNG.integers(0, 256, (80, 70, 3), np.uint8), "PNG") for _ in range(5)]  # in threads
    for files in (small, large):
        for size in (None, (4, 4), (4, 6)):
            decoded = images.decode_all(Encoded(files), size=size, channels=3)
            np.testing.assert_array_equal(decoded, [images.decode(file, size=size, channels=3) for file in files])
    assert images.decode_all(Encoded([]), size=(4, 4), channels=1).shape == (0, 4, 4, 1)


@pytest.mark.parametrize("side", [8, 80])
def test_decode_all_takes_what_cannot_be_decoded_as_black_and_names_it(side, caplog):
    good = encode(RNG.integers(0, 256, (side, side, 3), np.uint8), "PNG")
    other = encode(RNG.integers(0, 256, (side, side + 1, 3), np.uint8), "PNG")
    cut = good[: len(good) // 2]
    for size in (None, (4, 4)):
        files = Encoded([cut, good, cut, good])
        expected = images.decode(good, size=size, channels=3)
        for _ in range(2):  # told once
            decoded = images.decode_all(files, size=size, channels=3)
            np.testing.assert_array_equal(decoded, [expected * 0, expected, expected * 0, expected])
        told = [line.split(";")[0] for line in caplog.messages]
        assert [line.split(" cannot be decoded")[0] for line in told] == [files.name(0), files.name(2)]
        caplog.clear()
    with pytest.raises(UserError, match="none of 2 images can be decoded"):
        images.decode_all(Encoded([cut, cut]), size=(4, 4), channels=3)
    with pytest.raises(UserError, match=r"differ in size.*\(image 1\); set config.dataset.image_size"):
        images.decode_all(Encoded([good, other]), size=None, channels=3)


@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_in_memory_is_resizing_while_decoding(channels):
    arrays = SMOOTH[None, ..., :channels]
    files = [encode(array.squeeze(-1) if channels == 1 else array, "PNG") for array in arrays]
    for size in ((16, 16), (200, 200), (20, 30)):
        expected = images.decode_all(Encoded(files), size=size, channels=channels)
        np.testing.assert_array_equal(images.resize_all(arrays, size), expected)
        decoding = images.Decoding(eval_crop=0.8)
        expected = images.decode_all(Encoded(files), size=size, channels=channels, decoding=decoding)
        np.testing.assert_array_equal(images.resize_all(arrays, size, decoding), expected)


def test_a_huge_file_is_not_read(tmp_path):
    with open(tmp_path / "film.jpg", "wb") as file:
        file.truncate(2**33)  # sparse
    with pytest.raises(BadImage, match="too large"):
        images.verify(tmp_path / "film.jpg")


def test_a_turned_jpeg_is_cropped_like_an_upright_one():
    upright = encode(SMOOTH, "JPEG", quality=95, subsampling=0)
    turned = encode(np.rot90(SMOOTH), "JPEG", quality=95, subsampling=0, exif=orientation(6))
    for size, box in ((None, None), ((20, 20), None), ((10, 10), (5, 30, 60, 40)), ((12, 30), None), ((30, 12), None)):
        expected, found = (images.decode(file, size=size, channels=3, box=box) for file in (upright, turned))
        assert np.abs(expected[..., :2].astype(int) - found[..., :2]).mean() < 3
