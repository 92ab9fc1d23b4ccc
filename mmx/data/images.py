"""Image preprocessing: an image file becomes tiles of pixels and a list of image tokens ("anyres", docs/model.md section 8).

    grid       the grid of tiles (rows x columns) that keeps the most pixels of the image; among equals, the one with the
               fewest tiles
    tiles      first the whole image resized to one tile, then the tiles of the grid, row by row. For the grid, the image is
               scaled to fit (bicubic; one side fills the grid, the other is rounded down) and centred on black
    tokens     the patches of the resized tile, then the grid's patches row by row, with a newline token after each row.
               Patches in the black margins are dropped; the image's aspect ratio decides which ones

Tokens can be counted without reading pixels: all of this depends only on the image's size. Sizes are (height, width).

A token's patch code selects its embedding: 0 (TEXT) is the embedding of its id, 1 (NEWLINE) is the newline
embedding, and PATCH + tile * (patches per tile) + patch is the embedding of that patch.
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

PLACEHOLDER = "<image>"         # marks the position of an image in a text
PIXELS = 8192 ** 2              # limit on an image's pixels. Decoding needs up to three copies of 4 bytes per pixel
FILE_BYTES = 512 << 20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")     # without EPS, which runs a program, and without rare formats
SCANS = 100                     # limit on the scans of a progressive JPEG. Each scan takes a pass over the whole image
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)        # CLIP's, of red, green, blue
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
TEXT, NEWLINE, PATCH = 0, 1, 2  # the codes that are not patches, and the code of the first patch
_PILLOW_LIMIT_LOCK = threading.Lock()


class PreparedImage(NamedTuple):
    """An image as the model takes it."""
    pixels_IYXZ: np.ndarray     # normalized float32 tiles
    patch_code_T: np.ndarray    # of its tokens: NEWLINE, or PATCH + tile * patches per tile + patch


def best_grid(v: Vision, height, width):
    """(rows, columns) of the grid of tiles for an image; arrays of them if the sizes are arrays.

    Computed in float64, as in the released code: rounding can change the grid of a large image.
    """
    grid_rows, grid_columns = np.array(v.grids).T
    height, width = np.float64(height)[..., None], np.float64(width)[..., None]
    scale = np.minimum(grid_columns * v.tile / width, grid_rows * v.tile / height)
    kept = np.minimum(np.floor(width * scale) * np.floor(height * scale), height * width)
    area = grid_rows * grid_columns * v.tile ** 2
    best = np.argmax(kept * (area.max() + 1) - area, axis=-1)    # the first of equals
    return grid_rows[best], grid_columns[best]


def visible_patches(v: Vision, height, width):
    """(top, left, rows, columns) of the part of the grid, in patches, that shows the image and not the margins."""
    rows, columns = (n * v.patches_per_side for n in best_grid(v, height, width))
    height, width = np.asarray(height), np.asarray(width)
    wide = width * rows > columns * height
    top = np.where(wide, (rows - height * columns // width) // 2, 0)
    left = np.where(wide, 0, (columns - width * rows // height) // 2)
    return top, left, rows - 2 * top, columns - 2 * left


def token_count(v: Vision, height, width):
    """The number of tokens of an image."""
    if not v.grids:
        return v.patches_per_side ** 2 + 0 * np.asarray(height)
    _, _, rows, columns = visible_patches(v, height, width)
    return v.patches_per_side ** 2 + rows * (columns + 1)


def tile_count(v: Vision, height, width):
    """The number of tiles of an image, including the resized whole image."""
    rows, columns = best_grid(v, height, width) if v.grids else (0, 0)
    return 1 + rows * columns


def patch_codes(v: Vision, height: int, width: int) -> np.ndarray:
    """patch_code_T of an image's tokens. Tile 0 is the resized whole image."""
    side = v.patches_per_side
    whole_T = np.arange(side ** 2)
    if not v.grids:
        return np.int32(PATCH + whole_T)
    top, left, rows, columns = map(int, visible_patches(v, height, width))
    tiles = int(best_grid(v, height, width)[1])
    y, x = np.ogrid[top:top + rows, left:left + columns]
    tile, patch = 1 + y // side * tiles + x // side, y % side * side + x % side
    grid = np.full((rows, columns + 1), NEWLINE)
    grid[:, :-1] = PATCH + tile * side ** 2 + patch
    return np.int32(np.concatenate([PATCH + whole_T, grid.ravel()]))


def prepare(v: Vision, image: Image.Image) -> PreparedImage:
    """Tiles and patch codes of an image that `read` returned."""
    width, height = image.size
    tiles = [_resize(image, v.tile, v.tile)]
    if v.grids:
        grid_height, grid_width = (int(n) * v.tile for n in best_grid(v, height, width))
        if grid_width * height <= grid_height * width:
            fit_height, fit_width = max(1, height * grid_width // width), grid_width
        else:
            fit_height, fit_width = grid_height, max(1, width * grid_height // height)
        canvas = Image.new("RGB", (grid_width, grid_height))
        canvas.paste(_resize(image, fit_height, fit_width), ((grid_width - fit_width) // 2, (grid_height - fit_height) // 2))
        tiles += [canvas.crop((x, y, x + v.tile, y + v.tile))
                  for y in range(0, grid_height, v.tile) for x in range(0, grid_width, v.tile)]
    pixels_IYXZ = np.stack([np.asarray(tile) for tile in tiles]).astype(np.float32)
    return PreparedImage((pixels_IYXZ / 255 - MEAN) / STD, patch_codes(v, height, width))


def prepare_all(v: Vision, images) -> list[PreparedImage]:
    """Reads and prepares images: paths, Pillow images, or objects that `read` takes. A PreparedImage is returned as it is."""
    if images:
        check_has_vision(v)
    return [image if isinstance(image, PreparedImage) else prepare(v, read(image)) for image in images]


def split_by_prompt(texts: list[str], images: list) -> list[tuple]:
    """Assigns `images` to texts in order: each text gets as many as it has placeholders."""
    ends = np.cumsum([text.count(PLACEHOLDER) for text in texts]).tolist()
    if images and ends[-1] != len(images):
        raise ConfigError(mismatch_message(ends[-1], len(images)))
    return [tuple(images[begin:end]) for begin, end in zip([0, *ends[:-1]], ends)]


def encode(v: Vision, text: bytes, counts: list[int], encode_text, continues: bool = False) -> np.ndarray:
    """ids_T of a text with placeholders.

    Args:
      counts: the number of tokens of each image. A placeholder becomes that many image tokens (v.token).
      encode_text: maps (bytes, continues=whether text comes before them) to ids; called on each part between placeholders.
      continues: whether text comes before this text.
    """
    parts = split_text(v, text)
    return insert_images(v, [encode_text(part, continues=continues or n > 0) for n, part in enumerate(parts)], counts)


def split_text(v: Vision, text: bytes) -> list[bytes]:
    """The parts of a text between its placeholders; the whole text for a model without vision, which has no placeholders."""
    return text.split(PLACEHOLDER.encode()) if v.layers else [text]


def insert_images(v: Vision, parts: list[np.ndarray], counts: list[int]) -> np.ndarray:
    """ids_T of the parts of a text, with the tokens of an image between each two of them."""
    first, *others = parts
    if len(others) != len(counts):
        raise ConfigError(mismatch_message(len(others), len(counts)))
    return np.concatenate([first, *(ids_T for count, part_T in zip(counts, others)
                                    for ids_T in (np.full(count, v.token, np.int32), part_T))])


def collate(v: Vision, ids_BT, rows: list[list[PreparedImage]], blocks: int = 1, tiles_per_block: int = 0
            ) -> tuple[np.ndarray, np.ndarray]:
    """Collates the images of a batch into arrays.

    Args:
      ids_BT: token ids, with v.token at the image tokens.
      rows: each row's images, in the order of their tokens.
      blocks: the rows are divided into equal blocks, each with separate tiles. Patch codes count from the block's first tile.
      tiles_per_block: pads each block to this many tiles. 0: enough for the fullest block, rounded up by `padded_tiles`.
    Returns:
      patch_code_BT (0 at text tokens) and pixels_bIYXZ.
    """
    check_has_vision(v)
    patch_code_BT, block_tiles = np.zeros(ids_BT.shape, np.int32), [[] for _ in range(blocks)]
    for b, (ids_T, row) in enumerate(zip(ids_BT, rows, strict=True)):
        codes, tiles = [np.zeros(0, np.int32)], block_tiles[b * blocks // len(rows)]
        for image in row:
            codes.append(image.patch_code_T + (image.patch_code_T >= PATCH) * np.int32(len(tiles) * v.patches_per_side ** 2))
            tiles += [*image.pixels_IYXZ]
        patch_code_T, is_image_T = np.concatenate(codes), ids_T == v.token
        if is_image_T.sum() != len(patch_code_T):
            raise ConfigError(f"row {b} contains the image token {v.token} {is_image_T.sum()} times; its images ({len(row)}) "
                              f"need {len(patch_code_T)} tokens")
        patch_code_BT[b, is_image_T] = patch_code_T
    tiles_per_block = tiles_per_block or padded_tiles(max(map(len, block_tiles)))
    pixels_bIYXZ = np.zeros((blocks, tiles_per_block, v.tile, v.tile, 3), np.float32)
    for pixels_IYXZ, tiles in zip(pixels_bIYXZ, block_tiles):
        pixels_IYXZ[:len(tiles)] = np.stack(tiles) if tiles else 0
    return patch_code_BT, pixels_bIYXZ


def padded_tiles(tiles: int) -> int:
    """Rounds a number of tiles up to 1, 2, 3, 4, 6, 8, 12, 16 and so on, so that few shapes are compiled."""
    power = 1 << max(tiles - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and tiles <= power * 3 // 4 else power


def check_has_vision(v: Vision):
    if not v.layers:
        raise ConfigError("this model reads only text: images need a checkpoint with model.vision.layers above 0")


def mismatch_message(placeholders: int, images: int) -> str:
    return (f"{_plural(placeholders, PLACEHOLDER + ' placeholder')} in the prompt, but {_plural(images, 'image')} given: "
            f"write one {PLACEHOLDER} for each image, as in '{PLACEHOLDER} What is this?'")


def _plural(count: int, name: str) -> str:
    return f"{count} {name}" + "s" * (count != 1)


def _resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resizes the width first, then the height. Pillow 13 chooses the cheaper order itself, and the order changes pixels."""
    resized = image.resize((width, image.size[1]), Image.Resampling.BICUBIC)
    return resized.resize((width, height), Image.Resampling.BICUBIC)


def read(source) -> Image.Image:
    """Reads an image as upright RGB.

    Transparency is discarded; of an animation the first frame is read.

    Args:
      source: the path of an image file in one of FORMATS, a Pillow image, or an object with a `size` and a method `draw` that
        returns a Pillow image.
    Raises:
      ConfigError: the image is incomplete, or exceeds FILE_BYTES, PIXELS or SCANS.
    """
    with _open(source) as image:
        return _to_rgb(ImageOps.exif_transpose(image))


def size(source) -> tuple[int, int]:
    """(height, width) of the image that `read` would return.

    Reads only the header of a file, but all of a PNG, since its orientation may come last.
    """
    if hasattr(source, "draw"):
        return source.size[::-1]
    with _open(source, whole=False) as image:
        rotated = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        if image is not source:
            image.close()
        return image.size if rotated else image.size[::-1]


@contextlib.contextmanager
def _open(source, whole: bool = True):
    """Yields the Pillow image of a source that `read` takes, not decoded yet.

    Turns all errors, including those raised inside the context, into a one-line ConfigError. `whole=False`: reads only the part
    of the file that gives the image's size.
    """
    source = source.draw() if hasattr(source, "draw") else source
    name = "the image" if isinstance(source, Image.Image) else f"image {str(source)!r}"
    if not isinstance(source, (str, Path, Image.Image)):
        raise ConfigError(f"an image must be the path of a file or a PIL.Image, not {type(source).__name__}")
    try:
        with _no_pillow_limit(), contextlib.ExitStack() as stack:
            image = source if isinstance(source, Image.Image) else Image.open(_open_file(source, whole, stack), formats=FORMATS)
            width, height = image.size
            if width * height > PIXELS:
                raise ConfigError(f"{name} has {width} x {height} pixels, more than the limit of {PIXELS:,}: scale it down")
            if not width * height:
                raise ConfigError(f"{name} has {width} x {height} pixels: it needs at least one")
            yield image
    except (ConfigError, MemoryError):
        raise
    except Exception as error:      # each of Pillow's format readers raises its own types
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = "not in a known image format" if unknown else f"damaged ({error})"
        raise ConfigError(f"{name} is {' '.join(reason.split())}; give a complete file of {', '.join(FORMATS)}") from None


def _open_file(path, whole: bool, stack):
    """A binary file object; `stack` closes it."""
    if not whole:
        return stack.enter_context(untrusted.open_file(path, FILE_BYTES))
    raw = untrusted.read_bytes(path, FILE_BYTES)
    scans = raw.count(b"\xff\xda") if raw[:2] == b"\xff\xd8" else 0
    if scans > SCANS:
        raise ConfigError(f"image {str(path)!r} is a JPEG of {scans:,} scans, more than the limit of {SCANS}: save it again "
                          "as a JPEG with fewer scans or as a PNG")
    return io.BytesIO(raw)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts to RGB. Modes with more than 8 bits are scaled; Pillow would clip them."""
    if image.mode.startswith("I"):          # the modes in which Pillow keeps 16-bit images
        levels = np.asarray(image)
        image = Image.fromarray(np.concatenate([
            np.uint8((np.clip(rows.astype(np.int64), 0, 65535) * 255 + 32767) // 65535)
            for rows in np.array_split(levels, -(-levels.size // (1 << 20)))]))      # in parts, as int64 takes much memory
    return image.convert("RGB")


@contextlib.contextmanager
def _no_pillow_limit():
    """Lifts Pillow's limit on pixels, since `_open` checks PIXELS. Pillow's limit is a global, and often only warns."""
    with _PILLOW_LIMIT_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before
