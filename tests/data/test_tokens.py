import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from mmx.config import ConfigError
from mmx.data import tokens


def save(path, specials):
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(["the state of the union, the union of the states"], trainer)
    model.enable_truncation(4)
    model.save(str(path))
    return str(path)


def test_bytes_round_trip_without_special_tokens():
    t = tokens.tokenizer("bytes")
    ids = t.encode("Fellow citizens — é\0".encode())
    assert ids.dtype == np.int32 and ids.tolist() == list("Fellow citizens — é\0".encode())
    assert t.decode([t.bos, *ids, t.eos, t.pad, 263]) == "Fellow citizens — é\0"
    assert t.decode([0xC3]) == "\ufffd"
    assert sorted({t.bos, t.eos, t.pad}) == [256, 257, 258] and t.vocab == 264
    assert t.encode(bytes(range(256))).tolist() == list(range(256))


def test_document_has_bos_and_eos():
    t = tokens.tokenizer("bytes")
    assert tokens.document(t, b"ab").tolist() == [256, 97, 98, 257]


def test_only_the_completion_of_a_prompt_has_targets(tmp_path):
    """Both are encoded separately, as in inference: no token spans the boundary."""
    ids, targets = tokens.prompt_completion(tokens.tokenizer("bytes"), b"ab", b"cd")
    assert ids.tolist() == [256, 97, 98, 99, 100, 257] and targets.tolist() == [-1, -1, 99, 100, 257, -1]
    t = tokens.tokenizer(save(tmp_path / "t.json", ["<s>", "</s>"]))
    ids, targets = tokens.prompt_completion(t, b"the sta", b"te of the union")
    prompt, completion = t.encode(b"the sta").tolist(), t.encode(b"te of the union").tolist()
    assert ids.tolist() == [t.bos, *prompt, *completion, t.eos] and len(completion) > 1
    assert targets.tolist() == [-1] * len(prompt) + [*completion, t.eos, -1]
    assert tokens.prompt_completion(t, b"", b"the union")[0].tolist() == tokens.document(t, b"the union").tolist()


def test_file_round_trips_texts_and_finds_special_tokens(tmp_path):
    t = tokens.tokenizer(save(tmp_path / "t.json", ["<s>", "</s>", "<pad>"]))
    text = "the union — é of the states, and more words than four"
    ids = t.encode(text.encode())
    assert ids.dtype == np.int32 and t.decode([t.bos, *ids, t.eos]) == text
    assert (t.bos, t.eos, t.pad) == (0, 1, 2) and ids.max() < t.vocab


def test_special_tokens_written_in_a_text_stay_text(tmp_path):
    t = tokens.tokenizer(save(tmp_path / "t.json", ["<s>", "</s>", "<pad>"]))
    ids = t.encode(b"the </s> union")
    assert t.eos not in ids and t.decode(ids) == "the </s> union"


def test_eos_replaces_missing_bos_and_pad(tmp_path):
    t = tokens.tokenizer(save(tmp_path / "t.json", ["<|endoftext|>"]))
    assert t.bos == t.eos == t.pad == 0


def test_bytes_accept_invalid_utf8_and_a_file_names_the_offset(tmp_path):
    assert tokens.tokenizer("bytes").encode(b"ab\xff").tolist() == [97, 98, 255]
    with pytest.raises(ConfigError, match="speech.txt: not UTF-8 at byte 2"):
        tokens.tokenizer(save(tmp_path / "t.json", ["</s>"])).encode(b"ab\xff", "speech.txt")


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no end-of-text token"):
        tokens.tokenizer(save(tmp_path / "t.json", ["<s>", "<x>"]))


@pytest.mark.parametrize("content", [None, "{", '{"model": 1}'])
def test_other_files_are_refused_in_one_line(tmp_path, content):
    if content:
        (tmp_path / "t.json").write_text(content)
    with pytest.raises(ConfigError, match="is not 'bytes', 'numbers:COUNT' or a tokenizer.json") as error:
        tokens.tokenizer(str(tmp_path / "t.json"))
    assert "\n" not in str(error.value)


def test_vocabulary_must_fit_the_model():
    tokens.check_vocab(tokens.tokenizer("bytes"), 264)
    with pytest.raises(ConfigError, match="reach 263, out of range of model.vocab=200; set model.vocab=264"):
        tokens.check_vocab(tokens.tokenizer("bytes"), 200)
