"""Images as the model takes them (model.md section 8, "anyres"): tiles of pixels, and what each image token shows.

    grid       of the grids of tiles the one in which most of the image's pixels survive, then the one with least waste
    tiles      the whole image squeezed to one tile, then the grid's, row by row: the image scaled to fit (bicubic, the free
               side rounded down), centred on black
    tokens     the squeezed tile's patches, then the grid's patches that show image (black margins are cut by the
               original's aspect), row by row, each row with a newline behind it

All of it follows from the image's size: tokens are counted before any pixel is read. Sizes are (height, width).
"""
import contextlib
import io
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mmx.config import ConfigError, Vision
from mmx.files import untrusted

MARK = "<image>"                # stands for an image in a prompt
PIXELS = 8192 ** 2              # of the largest image that is decoded: 4 bytes each, three times at most
FILE_BYTES = 512 << 20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")     # not EPS, which runs a program, nor what nobody gives a model
SCANS = 100                     # of a progressive JPEG, each of which goes over the whole image
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)        # CLIP's, of red, green, blue
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
TEXT, NEWLINE, PATCH = 0, 1, 2  # places: text, a row's end, the first patch of the first tile
_LIMIT = threading.Lock()


class Picture(NamedTuple):
    """An image as the model takes it."""
    pixels_IYXZ: np.ndarray     # normalized float32 tiles
    places_T: np.ndarray        # of its tokens: NEWLINE, or PATCH + tile * patches + patch


def best_grid(v: Vision, height, width):
    """(rows, columns) of tiles for an image, or arrays of them for arrays of sizes.

    By float64, as the released code has it: for one large size in some thousands exact numbers would choose another.
    """
    rows_N, columns_N = np.array(v.grids).T
    height, width = np.float64(height)[..., None], np.float64(width)[..., None]
    scale = np.minimum(columns_N * v.tile / width, rows_N * v.tile / height)
    survive = np.minimum(np.floor(width * scale) * np.floor(height * scale), height * width)
    area_N = rows_N * columns_N * v.tile ** 2
    best = np.argmax(survive * (area_N.max() + 1) - area_N, axis=-1)    # the first of equals
    return rows_N[best], columns_N[best]


def shown(v: Vision, height, width):
    """(top, left, rows, columns) of the grid's patches that show the image."""
    rows, columns = (n * v.side for n in best_grid(v, height, width))
    height, width = np.asarray(height), np.asarray(width)
    wide = width * rows > columns * height
    top = np.where(wide, (rows - height * columns // width) // 2, 0)
    left = np.where(wide, 0, (columns - width * rows // height) // 2)
    return top, left, rows - 2 * top, columns - 2 * left


def count(v: Vision, height, width):
    """How many tokens an image is."""
    if not v.grids:
        return v.side ** 2 + 0 * np.asarray(height)
    _, _, rows, columns = shown(v, height, width)
    return v.side ** 2 + rows * (columns + 1)


def tiles(v: Vision, height, width):
    """How many tiles an image is, the squeezed one too."""
    rows, columns = best_grid(v, height, width) if v.grids else (0, 0)
    return 1 + rows * columns


def places(v: Vision, height: int, width: int) -> np.ndarray:
    """What each token of an image shows, places_T; its first tile is 0."""
    squeezed_T = np.arange(v.side ** 2)
    if not v.grids:
        return np.int32(PATCH + squeezed_T)
    top, left, rows, columns = map(int, shown(v, height, width))
    tiles = int(best_grid(v, height, width)[1])
    y, x = np.ogrid[top:top + rows, left:left + columns]
    tile, patch = 1 + y // v.side * tiles + x // v.side, y % v.side * v.side + x % v.side
    grid = np.full((rows, columns + 1), NEWLINE)
    grid[:, :-1] = PATCH + tile * v.side ** 2 + patch
    return np.int32(np.concatenate([PATCH + squeezed_T, grid.ravel()]))


def prepare(v: Vision, image: Image.Image) -> Picture:
    """Tiles and places of an image of `read`."""
    width, height = image.size
    tiles = [_resized(image, v.tile, v.tile)]
    if v.grids:
        most_height, most_width = (int(n) * v.tile for n in best_grid(v, height, width))
        if most_width * height <= most_height * width:
            fit_height, fit_width = max(1, height * most_width // width), most_width
        else:
            fit_height, fit_width = most_height, max(1, width * most_height // height)
        canvas = Image.new("RGB", (most_width, most_height))
        canvas.paste(_resized(image, fit_height, fit_width), ((most_width - fit_width) // 2, (most_height - fit_height) // 2))
        tiles += [canvas.crop((x, y, x + v.tile, y + v.tile))
                  for y in range(0, most_height, v.tile) for x in range(0, most_width, v.tile)]
    pixels_IYXZ = np.stack([np.asarray(tile) for tile in tiles]).astype(np.float32)
    return Picture((pixels_IYXZ / 255 - MEAN) / STD, places(v, height, width))


def pictures(v: Vision, images) -> list[Picture]:
    """Of files, of Pillow's images, and of what is a Picture already."""
    if images:
        check_sees(v)
    return [image if isinstance(image, Picture) else prepare(v, read(image)) for image in images]


def share(texts: list[str], images: list) -> list[tuple]:
    """Each text's images, as many as it has marks, in order."""
    ends = np.cumsum([text.count(MARK) for text in texts]).tolist()
    if images and ends[-1] != len(images):
        raise ConfigError(unlike(ends[-1], len(images)))
    return [tuple(images[begin:end]) for begin, end in zip([0, *ends[:-1]], ends)]


def encode(v: Vision, text: bytes, counts: list[int], tokens_of) -> np.ndarray:
    """ids_T of a text, `tokens_of` its parts; at its MARKs (which in a model of text alone are text) stand as many of the
    vision's tokens as `counts` says of the images, in order."""
    before, *behind = text.split(MARK.encode()) if v.layers else [text]
    if len(behind) != len(counts):
        raise ConfigError(unlike(len(behind), len(counts)))
    ids = [tokens_of(before)]
    for count, part in zip(counts, behind):
        ids += [np.full(count, v.token, np.int32), tokens_of(part)]
    return np.concatenate(ids)


def lay(v: Vision, ids_BT, rows: list[list[Picture]], shards: int = 1, room: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """places_BT and pixels_NIYXZ of token ids and each row's images: the vision's tokens are their places, in order.

    Rows fall into N `shards`, equal blocks, each of which has its own tiles: a place counts from the first of them. Each has
    `room` for so many, 0: for as many as the fullest of them has, by level.
    """
    check_sees(v)
    places_BT, tiles_N = np.zeros(ids_BT.shape, np.int32), [[] for _ in range(shards)]
    for b, (ids_T, row) in enumerate(zip(ids_BT, rows, strict=True)):
        places, tiles = [np.zeros(0, np.int32)], tiles_N[b * shards // len(rows)]
        for image in row:
            places.append(image.places_T + (image.places_T >= PATCH) * np.int32(len(tiles) * v.side ** 2))
            tiles += [*image.pixels_IYXZ]
        places_T, at_T = np.concatenate(places), ids_T == v.token
        if at_T.sum() != len(places_T):
            raise ConfigError(f"row {b} has token {v.token}, a place of an image, {at_T.sum()} times; its images ({len(row)}) "
                              f"need {len(places_T)}")
        places_BT[b, at_T] = places_T
    room = room or level(max(map(len, tiles_N)))
    pixels_NIYXZ = np.zeros((shards, room, v.tile, v.tile, 3), np.float32)
    for pixels_IYXZ, tiles in zip(pixels_NIYXZ, tiles_N):
        pixels_IYXZ[:len(tiles)] = np.stack(tiles) if tiles else 0
    return places_BT, pixels_NIYXZ


def level(tiles: int) -> int:
    """As many or more, so that few shapes are compiled: 1, 2, 3, 4, 6, 8, 12, 16 and so on."""
    power = 1 << max(tiles - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and tiles <= power * 3 // 4 else power


def check_sees(v: Vision):
    if not v.layers:
        raise ConfigError("this model reads text alone: an image needs a checkpoint with model.vision.layers above 0")


def unlike(marks: int, images: int) -> str:
    return (f"{_many(marks, MARK + ' mark')} in the prompt, {_many(images, 'image')} given: a mark stands where an image "
            f"belongs, as in '{MARK} What is this?'")


def _many(count: int, name: str) -> str:
    return f"{count} {name}" + "s" * (count != 1)


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    """Across, then down: Pillow 13 takes the cheaper order itself, and levels hang on it."""
    across = image.resize((width, image.size[1]), Image.Resampling.BICUBIC)
    return across.resize((width, height), Image.Resampling.BICUBIC)


def read(source) -> Image.Image:
    """An image file of FORMATS, Pillow's image, or what has a `size` and draws one: upright, RGB (transparency is
    left out), of an animation the first frame.

    Raises ConfigError for what is no whole image, and for more than FILE_BYTES, PIXELS and SCANS, before they are decoded.
    """
    with _opened(source) as image:
        return _rgb(ImageOps.exif_transpose(image))


def size(source) -> tuple[int, int]:
    """(height, width) of what `read` would give, by a file's head (a PNG is read whole: what turns it may stand last)."""
    if hasattr(source, "draw"):
        return source.size[::-1]
    with _opened(source, whole=False) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        if image is not source:
            image.close()
        return image.size if turned else image.size[::-1]


@contextlib.contextmanager
def _opened(source, whole: bool = True):
    """Pillow's image of what `read` takes, not decoded; what is wrong with it, inside too, in one line. Not `whole`: a file is
    read no further than its size stands."""
    source = source.draw() if hasattr(source, "draw") else source
    name = "the image" if isinstance(source, Image.Image) else f"image {str(source)!r}"
    if not isinstance(source, (str, Path, Image.Image)):
        raise ConfigError(f"an image is a file's path or a PIL.Image, not {type(source).__name__}")
    try:
        with _no_limit(), contextlib.ExitStack() as stack:
            image = source if isinstance(source, Image.Image) else Image.open(_file(source, whole, stack), formats=FORMATS)
            width, height = image.size
            if width * height > PIXELS:
                raise ConfigError(f"{name} has {width} x {height} pixels, more than {PIXELS:,}: not decoded; scale it down")
            if not width * height:
                raise ConfigError(f"{name} has {width} x {height} pixels: it needs one at least")
            yield image
    except (ConfigError, MemoryError):
        raise
    except Exception as error:      # Pillow has as many kinds as there are formats
        reason = "no image that Pillow knows" if isinstance(error, Image.UnidentifiedImageError) else f"damaged ({error})"
        raise ConfigError(f"{name} is {' '.join(reason.split())}; give a whole PNG, JPEG, WebP or the like") from None


def _file(path, whole: bool, stack):
    """A file to read from, which ends with `stack`."""
    if not whole:
        return stack.enter_context(untrusted.open_file(path, FILE_BYTES))
    raw = untrusted.read_bytes(path, FILE_BYTES)
    scans = raw.count(b"\xff\xda") if raw[:2] == b"\xff\xd8" else 0
    if scans > SCANS:
        raise ConfigError(f"image {str(path)!r} is a JPEG of {scans:,} scans, more than {SCANS}: not decoded; save it anew")
    return io.BytesIO(raw)


def _rgb(image: Image.Image) -> Image.Image:
    """Modes of more than 8 bits are scaled, where Pillow would clip them."""
    if image.mode.startswith("I"):          # 16 bits, in whatever Pillow keeps them
        levels = np.asarray(image)
        image = Image.fromarray(np.concatenate([
            np.uint8((np.clip(rows.astype(np.int64), 0, 65535) * 255 + 32767) // 65535)
            for rows in np.array_split(levels, -(-levels.size // (1 << 20)))]))      # a few rows at a time are int64
    return image.convert("RGB")


@contextlib.contextmanager
def _no_limit():
    """Ours in place of Pillow's bound on pixels, which is global and half of it a warning."""
    with _LIMIT, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before
