"""Scenes and words: held-out content is not in the training split, and answers agree with the pixels, read independently."""
import hashlib
import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
from looking import answer, look, question_and_answer
from PIL import Image, ImageDraw

from mmx.config import ConfigError
from mmx.data import captions, corpus, images, scenes, sources

PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def found():
    """Documents of each source and split."""
    return {(name, part): sources.documents(name, part) for name in ("scenes", "maps", "words") for part in PARTS}


@pytest.mark.parametrize("part", PARTS)
def test_answers_are_what_the_pixels_show(part, found):
    for name, document in found["scenes", part][:600] + found["maps", part][:100]:
        [picture] = document.images
        objects = look(images.read(picture))
        assert sorted(one[:2] for one in objects) == sorted(one[:2] for one in picture.objects), name
        question, wanted = question_and_answer(document)
        assert answer(question, objects) == wanted, name


def test_held_out_combinations_are_in_no_training_picture(found):
    combinations = {(shape, colour, count) for shape in scenes.SHAPES for colour in scenes.COLOURS for count in range(1, 5)}
    held_out = {one for one in combinations if scenes.is_held_out(*one)}
    assert len(held_out) == 20 == len(combinations) / 5
    assert all(set(Counter(one[n] for one in held_out).values()) == {times} for n, times in enumerate((4, 4, 5)))

    def combinations_in(document):
        return {(*style, count) for style, count in Counter(one[:2] for one in document.images[0].objects).items()}

    for source in ("scenes", "maps"):
        assert {one for _, document in found[source, "train"] for one in combinations_in(document)} == combinations - held_out
    for part in PARTS[1:]:
        asked = set()
        for name, document in found["scenes", part]:
            assert combinations_in(document) & held_out, name
            asked |= combinations_in(document) & held_out if name.startswith("count") else set()
        assert asked == held_out


def test_held_out_words_are_in_no_training_picture(found):
    parts = {part: {question_and_answer(document)[1] for _, document in found["words", part]} for part in PARTS}
    assert not parts["train"] & (parts["validation"] | parts["test"]) and not parts["validation"] & parts["test"]
    assert all(corpus.split_of(word) == part for part, words in parts.items() for word in words)
    assert {len(word) for word in parts["validation"]} == {3, 4, 5, 6} and len(parts["validation"]) > 150


def test_a_constant_answer_scores_chance(found):
    for part in PARTS:
        answers = {}
        for name, document in found["scenes", part]:
            answers.setdefault(name.split("/")[0], Counter())[question_and_answer(document)[1]] += 1
        for kind, chance in scenes.CHANCE.items():
            assert len(answers[kind]) == round(1 / chance)
            assert max(answers[kind].values()) / answers[kind].total() < chance + 0.08, (part, kind)


def test_words_are_completely_visible(found):
    """Each letter's cell has as many inked pixels as the letter drawn separately, at any shift of the word."""
    for _, document in found["words", "validation"][:50]:
        [word] = document.images
        ink_YX = (np.asarray(word.draw()) != scenes.GROUND).any(-1)
        for n, letter in enumerate(word.text):
            separate = Image.new("L", (40, 40))
            ImageDraw.Draw(separate).text((20, 20), letter, 255, scenes.font(), anchor="mm")
            width = scenes.LETTER_WIDTH
            left = max(word.x + n * width - width // 2, 0)
            assert abs(int(ink_YX[:, left:left + width].sum()) - (np.asarray(separate) > 0).sum()) < 25, (word, letter)


@pytest.mark.parametrize("name", ["scenes", "maps", "words"])
def test_every_call_gives_the_same_documents(name, found):
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
def test_other_files_are_refused_as_archives(make, tmp_path):
    make(tmp_path / "a.tar")
    with pytest.raises(ConfigError, match="a.tar is not an archive of captioned images"):
        captions.unpack(tmp_path / "a.tar", tmp_path / "a")
