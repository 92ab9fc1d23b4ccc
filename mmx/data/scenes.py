"""Generated images with questions, to train and test vision: the sources "scenes", "maps" and "words".

    scenes  1 to 4 objects of 5 shapes and 5 colours. The questions: how many objects of a shape, what colour, what shape, and
            on which side an object is
    maps    the same kind of images. The answer describes all 9 cells, three letters each. A small model learns to see from
            fewer maps than scenes, whose answers are one word
    words   a word of 3 to 6 letters to read

Held-out images differ from all training images. Scenes: a fifth of the combinations of shape, colour and count (how many
objects of the image have this shape and colour) occurs in no training image, and every held-out question is about one of
them. Words: those that `corpus.split_of` holds out. Images are 84 x 84 pixels, drawn when read. A document depends only on its
name.
"""
import functools
import random
import re
from collections import Counter
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from mmx.data import corpus
from mmx.data.document_types import ImageText
from mmx.data.images import PLACEHOLDER

SIDE = 84                       # pixels
GROUND = (122, 116, 104)        # background, near `images.MEAN`: after normalization it is nearly 0
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {     # all lighter than the background, so that the position of an object is linear in the pixels
    "red": (255, 116, 104), "green": (122, 255, 104), "blue": (122, 116, 255), "yellow": (255, 255, 104),
    "white": (255, 255, 255)}
MAX_OBJECTS = 4                 # in an image
CELL = 28                       # pixels of a cell. Objects are in different cells of a 3 x 3 grid
RADII = 9, 12                   # smallest and largest radius of an object, pixels
SIZES = {"scenes": {"train": 32_000, "validation": 2_000, "test": 2_000},
         "maps": {"train": 16_000, "validation": 500, "test": 500},
         "words": {"train": 32_000, "validation": 1_000, "test": 1_000}}
# accuracy of a constant answer
CHANCE = {"count": 1 / MAX_OBJECTS, "colour": 1 / len(COLOURS), "shape": 1 / len(SHAPES), "side": 1 / 2}
QUESTIONS = (*CHANCE, "word")
MIN_LETTERS, MAX_LETTERS = 3, 6
LETTER_WIDTH, FONT_SIZE = 14, 18        # pixels
INK = COLOURS["white"]
MAX_SHIFT = 1                   # largest random shift of a word in each direction, pixels


class SceneObject(NamedTuple):
    shape: str
    colour: str
    x: int
    y: int
    radius: int


class Scene(NamedTuple):
    objects: tuple[SceneObject, ...]
    size = SIDE, SIDE

    def draw(self) -> Image.Image:
        image = Image.new("RGB", self.size, GROUND)
        pen = ImageDraw.Draw(image)
        for shape, colour, x, y, r in self.objects:
            box, fill = (x - r, y - r, x + r, y + r), COLOURS[colour]
            if shape == "circle":
                pen.ellipse(box, fill)
            elif shape == "square":
                pen.rectangle(box, fill)
            elif shape == "triangle":
                pen.polygon([(x - r, y + r), (x + r, y + r), (x, y - r)], fill)
            elif shape == "ring":
                pen.ellipse(box, outline=fill, width=max(r // 3, 3))
            else:
                pen.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill)
                pen.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill)
        return image


class Word(NamedTuple):
    """A word in a fixed-width layout: each letter is centred in a cell of LETTER_WIDTH."""
    text: str
    x: int                      # centre of the first letter's cell
    y: int                      # centre of the line
    size = SIDE, SIDE

    def draw(self) -> Image.Image:
        image = Image.new("RGB", self.size, GROUND)
        pen = ImageDraw.Draw(image)
        for n, letter in enumerate(self.text):
            pen.text((self.x + n * LETTER_WIDTH, self.y), letter, INK, font(), anchor="mm")
        return image


class Blank(NamedTuple):
    """An image of the background only."""
    size = SIDE, SIDE

    def draw(self) -> Image.Image:
        return Image.new("RGB", self.size, GROUND)


def documents(name: str, split: str) -> list[tuple[str, ImageText]]:
    """(name, question with answer and image) of the documents of a split: "train", "validation" or "test"."""
    make = {"scenes": _scene, "maps": functools.partial(_scene, kind="map"), "words": _word}[name]
    return [make(split, index) for index in range(SIZES[name][split])]


def is_held_out(shape: str, colour: str, count: int) -> bool:
    """Whether images with exactly `count` objects of this shape and colour are held out of training.

    20 of the 100 combinations are held out: each shape and each colour occurs in four of them, each count in five.
    """
    return (SHAPES.index(shape) + list(COLOURS).index(colour)) % 5 == count - 1


@functools.cache
def words(split: str) -> tuple[str, ...]:
    """The words of a split, sorted: lower-case words that occur at least three times in the embedded corpus."""
    text = b"\n".join(raw for _, raw in corpus.documents("train")).decode()
    counts = Counter(re.findall(rf"\b[a-z]{{{MIN_LETTERS},{MAX_LETTERS}}}\b", text))
    return tuple(sorted(word for word, times in counts.items() if times > 2 and corpus.split_of(word) == split))


def _scene(split: str, index: int, kind: str = "") -> tuple[str, ImageText]:
    kind = kind or list(CHANCE)[index % len(CHANCE)]
    name = f"{kind}/{split}/{index}"
    rng = random.Random(name)
    target = _draw_combination(rng, 1 if kind == "side" else rng.randint(1, MAX_OBJECTS), split)
    others = rng.randint(0, MAX_OBJECTS - target[2])
    styles = []      # (shape, colour) of each object
    while not styles or not _is_valid(*target, styles, kind, split):
        styles = [target[:2]] * target[2] + [(rng.choice(SHAPES), rng.choice(list(COLOURS))) for _ in range(others)]
    objects = _place_objects(rng, styles, kind)
    shape, colour, _ = target
    question, answer = {
        "count": (f"How many {plural(shape)}?", [style[0] for style in styles].count(shape)),
        "colour": (f"What colour are the {plural(shape)}?", colour),
        "shape": (f"What shape are the {colour} ones?", shape),
        "side": (f"Is the {colour} {shape} left or right?", "left" if objects[0].x < SIDE / 2 else "right"),
        "map": ("What is where?", _describe_cells(objects))}[kind]
    return name, _make_content(question, answer, Scene(tuple(objects)))


def _draw_combination(rng: random.Random, count: int, split: str) -> tuple[str, str, int]:
    while True:
        shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        if is_held_out(shape, colour, count) == (split != "train"):
            return shape, colour, count


def _is_valid(shape: str, colour: str, count: int, styles: list, kind: str, split: str) -> bool:
    """Whether the question has exactly one answer for these objects, and the split may contain them."""
    others = styles[count:]
    unique = {"map": True, "count": True, "colour": shape not in [style[0] for style in others],
              "shape": colour not in [style[1] for style in others],
              "side": (shape, colour) not in others}[kind]
    if split != "train":
        return unique and (shape, colour) not in others
    return unique and not any(is_held_out(*style, n) for style, n in Counter(styles).items())


def _place_objects(rng: random.Random, styles: list, kind: str) -> list[SceneObject]:
    """Puts the objects into different cells, off-centre.

    For a question about the side, the first object is not in the middle column.
    """
    cells = []
    while not cells or (kind == "side" and cells[0] % 3 == 1):
        cells = rng.sample(range((SIDE // CELL) ** 2), len(styles))
    objects = []
    for style, cell in zip(styles, cells):
        radius = rng.randint(*RADII)
        margin = CELL // 2 - radius - 1
        x, y = (CELL * index + CELL // 2 + rng.randint(-margin, margin - 1) for index in (cell % 3, cell // 3))
        objects.append(SceneObject(*style, x, y, radius))
    return objects


def _describe_cells(objects: list) -> str:
    """Three characters for each cell, row by row: one letter of the object's colour and two of its shape, or dots."""
    cells = {(one.y // CELL, one.x // CELL): one.colour[0] + one.shape[:2] for one in objects}
    return "".join(cells.get((row, column), "...") for row in range(3) for column in range(3))


def _word(split: str, index: int) -> tuple[str, ImageText]:
    name = f"word/{split}/{index}"
    rng = random.Random(name)
    word = rng.choice(words(split))
    x, y = (middle + rng.randint(-MAX_SHIFT, MAX_SHIFT) for middle in (LETTER_WIDTH // 2, SIDE // 2))
    return name, _make_content("What is written?", word, Word(word, x, y))


def _make_content(question: str, answer, image) -> ImageText:
    return ImageText(f"{PLACEHOLDER}{question}".encode(), f" {answer}".encode(), (image,))


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


@functools.cache
def font():
    return ImageFont.load_default(FONT_SIZE)
