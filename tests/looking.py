"""Reads generated images from their pixels and answers questions about them, independently of how they were drawn."""
import re
from collections import Counter

import numpy as np
from scipy import ndimage

from mmx.data import images, scenes


def look(image):
    """(shape, colour, x, y) of each object: connected pixels of one colour, classified by the filled part of their box."""
    objects, pixels_YXZ = [], np.asarray(image)
    for colour, rgb in scenes.COLOURS.items():
        parts_YX, _ = ndimage.label((pixels_YXZ == rgb).all(-1), np.ones((3, 3)))
        for n, box in enumerate(ndimage.find_objects(parts_YX), 1):
            full_YX = parts_YX[box] == n
            middle, bottom, top = full_YX[len(full_YX) // 2, full_YX.shape[1] // 2], full_YX[-1].mean(), full_YX[0].mean()
            shape = ("ring" if not middle else "square" if full_YX.all() else "triangle" if bottom == 1 else
                     "cross" if full_YX.mean() < 0.65 and top > 0.2 and not full_YX[2, 1] else "circle")
            objects.append((shape, colour, *((box[axis].start + box[axis].stop) / 2 for axis in (1, 0))))
    return objects


def answer(question, objects):
    """The answer to a question about the objects that `look` found."""
    if question == "What is where?":
        cells = ["..."] * 9
        for shape, colour, x, y in objects:
            cells[int(y // 28 * 3 + x // 28)] = colour[:1] + shape[:2]
        return "".join(cells)
    kinds = Counter(one[:2] for one in objects)
    if match := re.fullmatch(r"How many (\w+?)(es)?s?\?", question):
        return str(sum(n for (shape, _), n in kinds.items() if match[1].startswith(shape[:4])))
    if match := re.fullmatch(r"What colour are the (\w+)\?", question):
        [colour] = {colour for shape, colour in kinds if match[1].startswith(shape)}
        return colour
    if match := re.fullmatch(r"What shape are the (\w+) ones\?", question):
        [shape] = {shape for shape, colour in kinds if colour == match[1]}
        return shape
    match = re.fullmatch(r"Is the (\w+) (\w+) left or right\?", question)
    [x] = [x for shape, colour, x, _ in objects if (colour, shape) == (match[1], match[2])]
    assert abs(x - scenes.SIDE / 2) > 10
    return "left" if x < scenes.SIDE / 2 else "right"


def question_and_answer(document):
    return document.prompt.decode().removeprefix(images.PLACEHOLDER), document.completion.decode().removeprefix(" ")
