"""Generated pictures with questions, to learn from and be tested on: the sources "scenes", "maps" and "words".

    scenes  1 to 4 objects of 5 shapes and 5 colours: how many of a shape, what colour, what shape, on which side
    maps    such objects, all of them: three letters for each of 9 cells. From maps a small model learns in a few thousand
            pictures what there is to see; from one word an answer, in many more
    words   a word of 3 to 6 letters, to read

What is held out was never trained on. Of scenes a fifth of the combinations of shape, colour and count, the count being how
many objects of a picture have both: none is in a training picture, and every held-out question is about one. Of words those
that `corpus.split_of` holds out. Pictures are 84 x 84 pixels and drawn when asked for; all is a function of a document's name.
"""
import functools
import random
import re
from collections import Counter
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from mmx.data import corpus
from mmx.data.document_types import ImageText
from mmx.data.images import MARK

SIDE = 84
GROUND = (122, 116, 104)        # near the mean of `images.MEAN`: bare ground is nearly zeros to a model
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {     # all lighter than the ground: where an object is, whatever its colour, is linear in the pixels
    "red": (255, 116, 104), "green": (122, 255, 104), "blue": (122, 116, 255), "yellow": (255, 255, 104),
    "white": (255, 255, 255)}
MOST = 4                        # objects in a picture
CELL = 28                       # pixels: objects stand in different cells of 3 x 3
RADII = 9, 12                   # pixels
SIZES = {"scenes": {"train": 32_000, "validation": 2_000, "test": 2_000},
         "maps": {"train": 16_000, "validation": 500, "test": 500},
         "words": {"train": 32_000, "validation": 1_000, "test": 1_000}}
CHANCE = {"count": 1 / MOST, "colour": 1 / len(COLOURS), "shape": 1 / len(SHAPES), "side": 1 / 2}    # of one answer to all
KINDS = (*CHANCE, "word")
LEAST, LONGEST = 3, 6           # letters
LETTER, FONT = 14, 18           # pixels across a letter's cell, and of a line
INK = COLOURS["white"]
AROUND = 1                      # pixels that a word may be off its place


class Thing(NamedTuple):
    shape: str
    colour: str
    x: int
    y: int
    radius: int


class Scene(NamedTuple):
    things: tuple[Thing, ...]
    size = SIDE, SIDE

    def draw(self) -> Image.Image:
        image = Image.new("RGB", self.size, GROUND)
        pen = ImageDraw.Draw(image)
        for shape, colour, x, y, r in self.things:
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
    """As a typewriter has it: each letter in the middle of its own cell."""
    text: str
    x: int                      # of the first cell's middle, and of the line's
    y: int
    size = SIDE, SIDE

    def draw(self) -> Image.Image:
        image = Image.new("RGB", self.size, GROUND)
        pen = ImageDraw.Draw(image)
        for n, letter in enumerate(self.text):
            pen.text((self.x + n * LETTER, self.y), letter, INK, font(), anchor="mm")
        return image


class Blank(NamedTuple):
    """A picture of nothing."""
    size = SIDE, SIDE

    def draw(self) -> Image.Image:
        return Image.new("RGB", self.size, GROUND)


def documents(name: str, split: str) -> list[tuple[str, ImageText]]:
    """(name, question, answer and picture) of the "train", "validation" or "test" part of a source."""
    make = {"scenes": _scene, "maps": functools.partial(_scene, kind="map"), "words": _word}[name]
    return [make(split, index) for index in range(SIZES[name][split])]


def held_out(shape: str, colour: str, count: int) -> bool:
    """Whether a picture with `count` objects of this shape and colour is for validation and test: 20 of 100, each shape and
    each colour four times, each count five."""
    return (SHAPES.index(shape) + list(COLOURS).index(colour)) % 5 == count - 1


@functools.cache
def words(split: str) -> tuple[str, ...]:
    """The words of a part, sorted: those of small letters that the embedded corpus has three times and more."""
    text = b"\n".join(raw for _, raw in corpus.documents("train")).decode()
    found = Counter(re.findall(rf"\b[a-z]{{{LEAST},{LONGEST}}}\b", text))
    return tuple(sorted(word for word, times in found.items() if times > 2 and corpus.split_of(word) == split))


def _scene(split: str, index: int, kind: str = "") -> tuple[str, ImageText]:
    kind = kind or list(CHANCE)[index % len(CHANCE)]
    name = f"{kind}/{split}/{index}"
    draw = random.Random(name)
    asked = _combination(draw, 1 if kind == "side" else draw.randint(1, MOST), split)
    others = draw.randint(0, MOST - asked[2])
    kinds = []
    while not kinds or not _do(*asked, kinds, kind, split):
        kinds = [asked[:2]] * asked[2] + [(draw.choice(SHAPES), draw.choice(list(COLOURS))) for _ in range(others)]
    things = _placed(draw, kinds, kind)
    shape, colour, _ = asked
    question, answer = {
        "count": (f"How many {many(shape)}?", [of[0] for of in kinds].count(shape)),
        "colour": (f"What colour are the {many(shape)}?", colour),
        "shape": (f"What shape are the {colour} ones?", shape),
        "side": (f"Is the {colour} {shape} left or right?", "left" if things[0].x < SIDE / 2 else "right"),
        "map": ("What is where?", _map(things))}[kind]
    return name, _asked(question, answer, Scene(tuple(things)))


def _combination(draw: random.Random, count: int, split: str) -> tuple[str, str, int]:
    while True:
        shape, colour = draw.choice(SHAPES), draw.choice(list(COLOURS))
        if held_out(shape, colour, count) == (split != "train"):
            return shape, colour, count


def _do(shape: str, colour: str, count: int, kinds: list, kind: str, split: str) -> bool:
    """Whether the question has one answer in a picture of these objects, and training may see them."""
    others = kinds[count:]
    clear = {"map": True, "count": True, "colour": shape not in [of[0] for of in others],
             "shape": colour not in [of[1] for of in others],
             "side": (shape, colour) not in others}[kind]
    if split != "train":
        return clear and (shape, colour) not in others
    return clear and not any(held_out(*of, n) for of, n in Counter(kinds).items())


def _placed(draw: random.Random, kinds: list, kind: str) -> list[Thing]:
    """Objects in cells, not quite in their middle; where it is asked on which side, the first on one."""
    cells = []
    while not cells or (kind == "side" and cells[0] % 3 == 1):
        cells = draw.sample(range((SIDE // CELL) ** 2), len(kinds))
    things = []
    for of, cell in zip(kinds, cells):
        radius = draw.randint(*RADII)
        room = CELL // 2 - radius - 1
        x, y = (CELL * at + CELL // 2 + draw.randint(-room, room - 1) for at in (cell % 3, cell // 3))
        things.append(Thing(*of, x, y, radius))
    return things


def _map(things: list) -> str:
    """Row by row of each cell's object the first letter of its colour and two of its shape, or dots."""
    found = {(thing.y // CELL, thing.x // CELL): thing.colour[0] + thing.shape[:2] for thing in things}
    return "".join(found.get((row, column), "...") for row in range(3) for column in range(3))


def _word(split: str, index: int) -> tuple[str, ImageText]:
    name = f"word/{split}/{index}"
    draw = random.Random(name)
    word = draw.choice(words(split))
    x, y = (middle + draw.randint(-AROUND, AROUND) for middle in (LETTER // 2, SIDE // 2))
    return name, _asked("What is written?", word, Word(word, x, y))


def _asked(question: str, answer, picture) -> ImageText:
    return ImageText(f"{MARK}{question}".encode(), f" {answer}".encode(), (picture,))


def many(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


@functools.cache
def font():
    return ImageFont.load_default(FONT)
