"""Texts in parts: prompts and completions, texts around images, continuations. Together they decode to the whole text.

Expected values are from the tokenizers library, or written by hand.
"""
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mmx.config import Data, Train, Vision
from mmx.data import encoding, images, pipeline, tokens
from mmx.data.document_types import ImageText

METASPACE = Path(__file__).parent / "metaspace_tokenizer.json"
TEXT = "the state of the union"


def save(model, path: Path) -> str:
    model.add_special_tokens(["</s>"])
    model.save(str(path))
    return str(path)


def sentencepiece(path):
    """A tokenizer in the form of older SentencePiece conversions: a normalizer puts a space before each text."""
    model = tokenizers.Tokenizer.from_file(str(METASPACE))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.pre_tokenizer = None
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return save(model, path)


def byte_level(path, add_prefix_space: bool):
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    model.decoder = decoders.ByteLevel()
    model.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=300, show_progress=False,
                                                              initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return save(model, path)


def wordpiece(path):
    model = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "st": 2, "state": 3, "##ate": 4, "of": 5, "union": 6,
                                                   "ate": 7}, unk_token="[UNK]"))
    model.pre_tokenizer, model.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return save(model, path)


MAKERS = {"metaspace": lambda path: str(METASPACE), "sentencepiece": sentencepiece, "wordpiece": wordpiece,
          "byte level": functools.partial(byte_level, add_prefix_space=False),
          "byte level with a space": functools.partial(byte_level, add_prefix_space=True)}


@pytest.mark.case(1)
def test_the_metaspace_tokenizer_by_hand():
    """Ids: 15 ▁the, 23 ▁st, 25 ate, 26 ▁state, 12 ▁, 20 st."""
    pair = functools.partial(tokens.encode_pair, tokens.tokenizer(str(METASPACE)))
    as_lists = lambda *parts: [part.tolist() for part in pair(*parts)]
    assert as_lists(b"the st", b"ate") == [[15, 23], [25]]
    assert as_lists(b"the", b" state") == [[15], [26]]          # the ids of the whole, which split at the border
    assert as_lists(b"the ", b"state") == [[15, 12], [20, 25]]
    assert as_lists(b"the state", b"") == [[15, 26], []] and as_lists(b"", b"the state") == [[], [15, 26]]
    ids_T, targets_T = tokens.prompt_completion(tokens.tokenizer(str(METASPACE)), b"the st", b"ate")
    assert ids_T.tolist() == [0, 15, 23, 25, 0] and targets_T.tolist() == [-1, -1, 25, 0, -1]


@pytest.mark.case(1)
@pytest.mark.parametrize("name", MAKERS)
def test_a_prompt_and_a_completion_decode_to_the_whole(tmp_path, name):
    """At every border, the ids equal the whole text's wherever these start with the prompt's ids."""
    path = MAKERS[name](tmp_path / "tokenizer.json")
    stock, tokenizer = tokenizers.Tokenizer.from_file(path), tokens.tokenizer(path)
    ids = lambda text: stock.encode(text, add_special_tokens=False).ids
    whole, split = ids(TEXT), 0
    for border in range(len(TEXT) + 1):
        prompt, completion = (part.tolist() for part in tokens.encode_pair(
            tokenizer, TEXT[:border].encode(), TEXT[border:].encode()))
        assert stock.decode(prompt + completion) == stock.decode(whole), border
        if ids(TEXT[:border]) == whole[:len(ids(TEXT[:border]))]:
            assert prompt + completion == whole and prompt == ids(TEXT[:border])
            split += 1
    assert split >= 5


@pytest.mark.case(1)
@pytest.mark.parametrize("name", MAKERS)
def test_continuations_decode_to_the_whole(tmp_path, name):
    """decode(before + ids) without decode(before), also where only the last tokens before are known."""
    path = MAKERS[name](tmp_path / "tokenizer.json")
    stock, tokenizer = tokenizers.Tokenizer.from_file(path), tokens.tokenizer(path)
    ids = stock.encode(" ".join([TEXT] * 5), add_special_tokens=False).ids
    for border in range(1, len(ids)):
        tail = tokens.tail(tokenizer, ids[:border])
        assert len(tail) <= tokens.TAIL
        added = tokens.decode_continuation(tokenizer, tail, ids[border:])
        assert stock.decode(ids[:border]) + added == stock.decode(ids)


def test_a_continuation_of_a_character_that_is_cut(tmp_path):
    tokenizer = tokens.tokenizer("bytes")
    assert tokens.decode_continuation(tokenizer, list("aé".encode()), list("b é".encode())) == "b é"
    assert tokens.tail(tokenizer, list("€".encode() * 9)) == list("€".encode() * 4)         # from the start of a character
    assert tokens.decode_continuation(tokenizer, [], list(b"ab")) == "ab"


@pytest.mark.case(1)
def test_texts_around_images_decode_to_the_whole():
    """The parts after an image continue the text. An image's tokens are 99."""
    tokenizer, vision = tokens.tokenizer(str(METASPACE)), Vision(layers=1, dim=4, heads=1, hidden=4, tile=4, patch=2, token=99)
    ids_T = images.encode(vision, b"the st<image>ate<image> of", [1, 2], tokenizer.encode)
    assert ids_T.tolist() == [15, 23, 99, 25, 99, 99, 22]
    content = ImageText(b"<image>the st", b"ate of<image> the", ("", ""))
    prompt, completion = encoding.encode_parts(tokenizer, content, "text", vision)
    assert [part.tolist() for part in (*prompt, *completion)] == [[], [14, 23], [25, 22], [15]]
    assert tokenizer.decode(np.concatenate([*prompt, *completion])) == "the state of the"


def test_training_examples_of_bytes_are_unchanged(tmp_path):
    """Prompts and completions of the byte tokenizer, by hand."""
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"prompt": "é", "completion": " b"})] * 40))
    batch = pipeline.stream(Data(sources=(str(tmp_path / "a.jsonl"),), shards=1), Train(batch=1, length=6)).next()
    assert batch["tokens"].tolist() == [[256, 0xC3, 0xA9, 32, 98, 257]] and batch["weights"].tolist() == [[0, 0, 1, 1, 1, 0]]
