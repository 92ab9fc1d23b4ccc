"""Images: token counts against an integer rule, pixels against a float64 implementation; all modes, sizes and errors."""
import functools
import io
import math
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mmx.config import ConfigError, Vision
from mmx.config.schema import GRIDS
from mmx.data import images

RELEASED, TINY = Vision(layers=24), Vision(layers=2, tile=28, patch=7)
RNG = np.random.default_rng(0)
SIZES = [(1, 1), (1, 20_000), (20_000, 1), (28, 28), (50, 31), (20, 97), (160, 90), (333, 41), (29, 28), (168, 168), (3, 700)]


def by_hand(v, height, width):
    """((rows, columns) of tiles, (rows, columns) of visible patches), arrays over sizes.

    The grid is computed in floats as in the released code, the rest in integers. A later grid wins only if it is better.
    """
    rows, columns, most, waste = (np.full_like(height, -1) for _ in range(4))
    for r, c in GRIDS:
        H, W = r * v.tile, c * v.tile
        scale = np.minimum(W / width, H / height)
        kept = np.minimum((width * scale).astype(int) * (height * scale).astype(int), height * width)
        better = (kept > most) | (kept == most) & (H * W - kept < waste)
        most, waste = np.where(better, kept, most), np.where(better, H * W - kept, waste)
        rows, columns = np.where(better, r, rows), np.where(better, c, columns)
    h, w = rows * v.patches_per_side, columns * v.patches_per_side
    wide = width * h > w * height
    across, down = h - 2 * ((h - height * w // width) // 2), w - 2 * ((w - width * h // height) // 2)
    return (rows, columns), (np.where(wide, across, h), np.where(wide, w, down))


def one_by_hand(v, size):
    return (tuple(map(int, pair)) for pair in by_hand(v, *np.array(size)))


def test_counts_and_crops_are_the_integer_rule_on_100_000_sizes():
    sizes_N2 = np.concatenate([RNG.integers(1, 20_001, (30_000, 2)), RNG.integers(1, 2_500, (50_000, 2)),
                               np.int64(10 ** RNG.uniform(0, math.log10(20_000), (20_000, 2)))])
    height_N, width_N = sizes_N2.T
    want = np.concatenate(by_hand(RELEASED, height_N, width_N)).T
    np.testing.assert_array_equal(np.stack(images.best_grid(RELEASED, height_N, width_N), 1), want[:, :2])
    top_N, left_N, rows_N, columns_N = images.visible_patches(RELEASED, height_N, width_N)
    np.testing.assert_array_equal(np.stack([rows_N, columns_N], 1), want[:, 2:])
    np.testing.assert_array_equal(np.stack([rows_N + 2 * top_N, columns_N + 2 * left_N], 1), 24 * want[:, :2])
    np.testing.assert_array_equal(images.token_count(RELEASED, height_N, width_N), 576 + want[:, 2] * (want[:, 3] + 1))


def test_counts_known():
    assert len(GRIDS) == 28 and images.token_count(RELEASED, 336, 336) == 576 + 24 * 25
    assert images.token_count(RELEASED, 2016, 1008) == 576 + 144 * 73 and images.token_count(RELEASED, 1, 20_000) == 576
    fixed = Vision(layers=1, grids=())
    assert images.token_count(fixed, 1000, 10) == 576 == len(images.patch_codes(fixed, 1000, 10))


def patch_codes_by_hand(v, height, width):
    """As in the released code: arranges tiles as a grid, crops it, adds a newline to each row and flattens."""
    (rows, columns), kept = one_by_hand(v, (height, width))
    side = v.patches_per_side
    tiles = images.PATCH + np.arange((rows * columns + 1) * side ** 2).reshape(-1, side, side)
    grid = np.block([[tiles[1 + r * columns + c] for c in range(columns)] for r in range(rows)])
    top, left = ((whole - part) // 2 for whole, part in zip(grid.shape, kept))
    grid = grid[top:top + kept[0], left:left + kept[1]]
    newline = np.full((len(grid), 1), images.NEWLINE)
    return np.concatenate([tiles[0].ravel(), np.concatenate([grid, newline], 1).ravel()])


@pytest.mark.parametrize("size", SIZES)
def test_places(size):
    patch_code_T = images.patch_codes(TINY, *size)
    np.testing.assert_array_equal(patch_code_T, patch_codes_by_hand(TINY, *size))
    assert len(patch_code_T) == images.token_count(TINY, *size)


# ---- pixels ----

@functools.cache
def weights(old, new):
    """The bicubic filter (a = -1/2) from `old` to `new` samples in float64, widened by the ratio when it shrinks.

    Weights are rounded to 22 bits, as in Pillow: this matters when a level is exactly between two integers.
    """
    ratio = old / new
    stretch, matrix = max(ratio, 1.0), np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * ratio
        first, end = max(0, int(centre - 2 * stretch + 0.5)), min(old, int(centre + 2 * stretch + 0.5))
        x = abs((np.arange(first, end) - centre + 0.5) / stretch)
        near, far = 1.5 * x ** 3 - 2.5 * x ** 2 + 1, -0.5 * x ** 3 + 2.5 * x ** 2 - 4 * x + 2
        row = np.where(x < 1, near, np.where(x < 2, far, 0))
        matrix[i, first:end] = row / row.sum()
    return np.copysign(np.floor(abs(matrix) * 2 ** 22 + 0.5), matrix) / 2 ** 22


def resized(pixels_YXZ, height, width):
    """Resizes in two passes; levels are rounded to integers after each."""
    across = np.einsum("ox,yxz->yoz", weights(pixels_YXZ.shape[1], width), pixels_YXZ)
    across = np.floor(np.clip(across, 0, 255) + 0.5)
    down = np.einsum("oy,yxz->oxz", weights(pixels_YXZ.shape[0], height), across)
    return np.floor(np.clip(down, 0, 255) + 0.5)


def tiles_by_hand(v, pixels_YXZ):
    height, width, _ = pixels_YXZ.shape
    (rows, columns), _ = one_by_hand(v, (height, width))
    H, W, t = rows * v.tile, columns * v.tile, v.tile
    fit = (height * W // width, W) if W * height <= H * width else (H, width * H // height)
    fit = max(fit[0], 1), max(fit[1], 1)
    canvas = np.zeros((H, W, 3))
    y, x = (H - fit[0]) // 2, (W - fit[1]) // 2
    canvas[y:y + fit[0], x:x + fit[1]] = resized(pixels_YXZ, *fit)
    tiles = [canvas[r * t:r * t + t, c * t:c * t + t] for r in range(rows) for c in range(columns)]
    levels = np.stack([resized(pixels_YXZ, t, t), *tiles])
    return (levels / 255 - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]


@pytest.mark.parametrize("size", [*SIZES, (700, 500)])
def test_pixels_equal_an_independent_implementation(size):
    pixels_YXZ = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    made, want = images.prepare(TINY, Image.fromarray(pixels_YXZ)), tiles_by_hand(TINY, pixels_YXZ.astype(np.float64))
    assert made.pixels_IYXZ.dtype == np.float32 and made.pixels_IYXZ.shape == want.shape
    np.testing.assert_allclose(made.pixels_IYXZ, want, rtol=0, atol=1e-6)


# ---- any file ----

BASE = np.zeros((20, 30, 3), np.uint8)
BASE[:, :15], BASE[:, 15:] = (200, 30, 90), (10, 120, 250)
DEPTH_16 = np.uint16(np.linspace(0, 65535, 600).reshape(20, 30))


DEPTH_8 = np.uint8(np.rint(DEPTH_16 / 257))[..., None].repeat(3, 2)
RGB = Image.fromarray(BASE)
PALETTE = RGB.convert("P", palette=Image.Palette.ADAPTIVE)


def stored(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rgb(kind="PNG", **options):
    return stored(RGB, kind, **options)


GREY = np.asarray(RGB.convert("L"))[..., None].repeat(3, 2)
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
OTHER = Image.new("RGB", (30, 20), "red")
FILES = {       # file, expected pixels, tolerance
    "png": (rgb(), BASE, 0), "webp": (rgb("WEBP", lossless=True), BASE, 0), "bmp": (rgb("BMP"), BASE, 0),
    "jpeg": (rgb("JPEG", quality=95, subsampling=0), BASE, 12), "tiff": (rgb("TIFF"), BASE, 0),
    "palette": (stored(PALETTE, "PNG"), BASE, 2), "palette, one clear": (stored(PALETTE, "PNG", transparency=0), BASE, 2),
    "alpha": (stored(Image.fromarray(np.dstack([BASE, np.full((20, 30), 7, np.uint8)])), "PNG"), BASE, 0),
    "grey": (stored(RGB.convert("L"), "PNG"), GREY, 0), "grey, alpha": (stored(RGB.convert("LA"), "PNG"), GREY, 0),
    "two levels": (stored(Image.fromarray(BASE[..., 2] > 127), "PNG"), 255 * np.uint8(BASE[..., [2] * 3] > 127), 0),
    "16 bits": (stored(Image.fromarray(DEPTH_16), "PNG"), DEPTH_8, 0), "cmyk": (stored(RGB.convert("CMYK"), "TIFF"), BASE, 1),
    "16 bits, tiff": (stored(Image.fromarray(DEPTH_16), "TIFF"), DEPTH_8, 0),
    "rotated": (rgb("PNG", exif=ROTATED), np.rot90(BASE, -1), 0),
    "animation": (rgb("GIF", save_all=True, append_images=[OTHER]), BASE, 2),
    "animated webp": (rgb("WEBP", save_all=True, append_images=[OTHER], lossless=True), BASE, 0)}


@pytest.mark.parametrize("kind", FILES)
def test_any_mode(tmp_path, kind):
    raw, want, off = FILES[kind]
    (tmp_path / "x").write_bytes(raw)
    found = images.read(tmp_path / "x")
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found).astype(int) - want).max() <= off
    assert images.size(tmp_path / "x") == images.size(found) == want.shape[:2]


def header(width, height):
    """A PNG of this size without its pixel data."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


MISTAKES = {
    "text": (b"no image at all", "is not in a known image format; give a complete file of PNG"),
    "empty": (b"", "is not in a known image format"),
    "truncated": (rgb("BMP")[:700], "is damaged .*truncated"),
    "truncated jpeg": (rgb("JPEG")[:400], "is damaged|is not in a known"),
    "truncated gif": (rgb("GIF")[:40], "is damaged|is not in a known"),
    "header alone": (rgb()[:30], "is damaged|is not in a known"),
    "no pixels": (header(10, 10), "is damaged"),
    "zero size": (header(0, 10), "0 x 10 pixels|is damaged|is not in a known"),
    "bomb": (header(50_000, 50_000), "has 50000 x 50000 pixels, more than the limit of 67,108,864: scale it down"),
    "one row too many": (header(8192, 8193), "more than the limit of 67,108,864")}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(tmp_path, mistake):
    raw, message = MISTAKES[mistake]
    (tmp_path / "x.png").write_bytes(raw)
    with pytest.raises(ConfigError, match=message) as caught:
        images.read(tmp_path / "x.png")
    assert "\n" not in str(caught.value) and "x.png" in str(caught.value)


def test_sources_that_are_not_image_files(tmp_path):
    for source, message in ((tmp_path / "none.png", "none.png is missing"), (tmp_path, "cannot be read: Is a"),
                            (3, "path of a file or a PIL.Image, not int"), (Image.new("RGB", (0, 4)), "has 0 x 4 pixels")):
        with pytest.raises(ConfigError, match=message):
            images.read(source)


def test_pillows_limit_is_restored(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(header(50_000, 50_000))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12_345)
    with pytest.raises(ConfigError):
        images.read(tmp_path / "x.png")
    assert Image.MAX_IMAGE_PIXELS == 12_345
