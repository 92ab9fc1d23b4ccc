"""Scenes and words: nothing held out is in train, answers are what an independent look at the pixels finds."""
import hashlib
import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
from looking import answer, look, told
from PIL import Image, ImageDraw

from mmx.config import ConfigError
from mmx.data import captions, corpus, images, scenes, sources

PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def found():
    """Documents of a part of either source."""
    return {(name, part): sources.documents(name, part) for name in ("scenes", "maps", "words") for part in PARTS}


@pytest.mark.parametrize("part", PARTS)
def test_answers_are_what_the_pixels_show(part, found):
    for name, document in found["scenes", part][:600] + found["maps", part][:100]:
        [picture] = document.images
        seen = look(images.read(picture))
        assert sorted(of[:2] for of in seen) == sorted(thing[:2] for thing in picture.objects), name
        question, said = told(document)
        assert answer(question, seen) == said, name


def test_held_out_combinations_are_in_no_training_picture(found):
    combinations = {(shape, colour, count) for shape in scenes.SHAPES for colour in scenes.COLOURS for count in range(1, 5)}
    held = {of for of in combinations if scenes.is_held_out(*of)}
    assert len(held) == 20 == len(combinations) / 5
    assert all(set(Counter(of[n] for of in held).values()) == {times} for n, times in enumerate((4, 4, 5)))

    def shown(document):
        return {(*of, count) for of, count in Counter(thing[:2] for thing in document.images[0].objects).items()}

    for source in ("scenes", "maps"):
        assert {of for _, document in found[source, "train"] for of in shown(document)} == combinations - held
    for part in PARTS[1:]:
        asked = set()
        for name, document in found["scenes", part]:
            assert shown(document) & held, name
            asked |= shown(document) & held if name.startswith("count") else set()
        assert asked == held


def test_held_out_words_are_in_no_training_picture(found):
    parts = {part: {told(document)[1] for _, document in found["words", part]} for part in PARTS}
    assert not parts["train"] & (parts["validation"] | parts["test"]) and not parts["validation"] & parts["test"]
    assert all(corpus.split_of(word) == part for part, words in parts.items() for word in words)
    assert {len(word) for word in parts["validation"]} == {3, 4, 5, 6} and len(parts["validation"]) > 150


def test_one_answer_to_all_is_right_by_chance(found):
    for part in PARTS:
        said = {}
        for name, document in found["scenes", part]:
            said.setdefault(name.split("/")[0], Counter())[told(document)[1]] += 1
        for kind, chance in scenes.CHANCE.items():
            assert len(said[kind]) == round(1 / chance)
            assert max(said[kind].values()) / said[kind].total() < chance + 0.08, (part, kind)


def test_words_are_whole_in_their_picture(found):
    """Each letter's ink is in its own cell and as much as by itself, wherever the word begins."""
    for _, document in found["words", "validation"][:50]:
        [word] = document.images
        ink_YX = (np.asarray(word.draw()) != scenes.GROUND).any(-1)
        for n, letter in enumerate(word.text):
            alone = Image.new("L", (40, 40))
            ImageDraw.Draw(alone).text((20, 20), letter, 255, scenes.font(), anchor="mm")
            width = scenes.LETTER_WIDTH
            left = max(word.x + n * width - width // 2, 0)
            assert abs(int(ink_YX[:, left:left + width].sum()) - (np.asarray(alone) > 0).sum()) < 25, (word, letter)


@pytest.mark.parametrize("name", ["scenes", "maps", "words"])
def test_the_same_at_every_call(name, found):
    again = sources.documents(name, "validation")
    assert again == found[name, "validation"]
    digest = hashlib.sha256(b"".join(document.images[0].draw().tobytes() for _, document in again[:20])).hexdigest()
    assert digest == hashlib.sha256(b"".join(found[name, "validation"][n][1].images[0].draw().tobytes() for n in range(20))
                                    ).hexdigest()
    names = [document[0] for part in PARTS for document in found[name, part]]
    assert len(set(names)) == len(names)


def test_an_archive_of_captioned_pictures_is_a_source(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(picture, "WEBP", lossless=True)
    lines = [{"image": f"img/{n}.webp", "title": "", "name": f"red é {n}", "keywords": ["red"]} for n in range(30)]
    files = {line["image"]: picture.getvalue() for line in lines}
    files["captions.jsonl"] = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, raw in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            tar.addfile(entry, io.BytesIO(raw))
    assert captions.unpack(tmp_path / "a.tar", tmp_path / "a") == 30
    found = [document for part in PARTS for _, document in sources.documents(str(tmp_path / "a"), part)]
    assert {document.completion.decode() for document in found} == {f"<image>red é {n}" for n in range(30)}
    assert all(images.size(*document.images) == (6, 8) and document.prompt == b"" for document in found)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_bytes(b"no"),
                                  lambda path: tarfile.open(path, "w").close()])
def test_what_is_no_such_archive_is_told(make, tmp_path):
    make(tmp_path / "a.tar")
    with pytest.raises(ConfigError, match="a.tar is not an archive of captioned images"):
        captions.unpack(tmp_path / "a.tar", tmp_path / "a")
