"""Which ids begin and end a text: what a checkpoint's files say, in the order of transformers; then names."""
import json
import shutil
from pathlib import Path

import pytest
import tokenizers

from mmx.config import ConfigError
from mmx.data import tokens

SPECIALS = ["<unk>", "<s>", "</s>", "<|end_of_text|>", "<|eot_id|>", "<pad>"]       # ids 0 to 5


def save(folder: Path, specials=SPECIALS, **files):
    """Writes a tokenizer.json with these special tokens, and other JSON files beside it. Returns its path."""
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate([*specials, "a", "b"])}))
    model.add_special_tokens(specials)
    model.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return str(folder / "tokenizer.json")


def decided(*arguments, **files):
    found = tokens.tokenizer(save(*arguments, **files))
    assert found.eos == found.ends[0]
    return found.bos, found.ends, found.pad


@pytest.mark.case(3)
@pytest.mark.parametrize("files, expected", [
    ({}, (1, (2,), 5)),                                                                 # names alone
    ({"generation_config": {"eos_token_id": [4]}}, (1, (4,), 5)),
    ({"generation_config": {"eos_token_id": [4, 3]}, "config": {"eos_token_id": 2, "bos_token_id": 3}}, (3, (4, 3), 5)),
    ({"generation_config": {"temperature": 0.6, "eos_token_id": None}, "config": {"eos_token_id": 4}}, (1, (4,), 5)),
    ({"config": {"text_config": {"eos_token_id": 3}, "vision_config": {}}}, (1, (3,), 5)),
    ({"config": {"eos_token_id": -1, "pad_token_id": -1}}, (1, (2,), 5)),
    ({"config": {"eos_token_id": 0}}, (1, (0,), 5)),                                    # 0 is an id like others
    ({"tokenizer_config": {"eos_token": "<|eot_id|>"}}, (1, (4,), 5)),                  # not <|end_of_text|>, a known name
    ({"tokenizer_config": {"eos_token": {"content": "<|eot_id|>", "lstrip": False}, "bos_token": None}}, (1, (4,), 5)),
    ({"tokenizer_config": {"eos_token": "<|eot_id|>"}, "config": {"eos_token_id": 3}}, (1, (3,), 5)),
    ({"special_tokens_map": {"bos_token": "<|eot_id|>"}, "tokenizer_config": {"pad_token": "[new]"}}, (4, (2,), 5)),
])
def test_the_files_of_a_checkpoint_decide(tmp_path, files, expected):
    assert decided(tmp_path, **files) == expected


@pytest.mark.case(3)
@pytest.mark.parametrize("specials, expected", [
    (["</s>"], (0, (0,), 0)), (["<s>"], (0, (0,), 0)), (["<|stop|>"], (0, (0,), 0)),
    (["<unk>", "[new]", "<pad>"], (1, (1,), 2)), (["<|im_end|>", "<|endoftext|>"], (1, (1,), 1)),
])
def test_a_tokenizer_with_one_special_token_or_without_bos(tmp_path, specials, expected):
    assert decided(tmp_path, specials) == expected


@pytest.mark.case(3)
def test_equal_to_transformers(tmp_path):
    """The tokenizer_config.json of a checkpoint names its tokens as for AutoTokenizer."""
    transformers = pytest.importorskip("transformers")
    save(tmp_path, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot_id|>",
                                     "bos_token": "<|end_of_text|>", "pad_token": "<unk>"})
    stock, own = transformers.AutoTokenizer.from_pretrained(tmp_path), tokens.tokenizer(str(tmp_path / "tokenizer.json"))
    assert (own.bos, own.eos, own.pad) == (stock.bos_token_id, stock.eos_token_id, stock.pad_token_id) == (3, 4, 0)


@pytest.mark.parametrize("specials, files, message", [
    (["<s>", "<x>"], {}, "has no end-of-text token: give \"eos_token_id\" in a generation_config.json beside it"),
    ([], {}, "has no end-of-text token"),
    (SPECIALS, {"config": {"eos_token_id": "</s>"}}, "config.json: eos_token_id='</s>' must be a token id, a list of ids or"),
    (SPECIALS, {"config": {"eos_token_id": True}}, "eos_token_id=True must be a token id"),
    (SPECIALS, {"config": {"eos_token_id": float("nan")}}, "eos_token_id=nan must be a token id"),
    (SPECIALS, {"config": {"eos_token_id": 2**80}}, "must be a token id"),
    (SPECIALS, {"config": {"bos_token_id": [1, 2]}}, "bos_token_id=.1, 2. must be one id"),
    (SPECIALS, {"config": [1]}, "config.json must contain a JSON object"),
    (SPECIALS, {"tokenizer_config": {"eos_token": "<|no|>"}}, "tokenizer_config.json: eos_token='<|no|>' is no token of"),
])
def test_mistakes_are_one_line(tmp_path, specials, files, message):
    with pytest.raises(ConfigError, match=message.replace("|", r"\|")) as error:
        decided(tmp_path, specials, **files)
    assert "\n" not in str(error.value)


def test_ids_outside_of_the_tokenizer_are_ignored_in_one_line(tmp_path, capfd):
    assert decided(tmp_path, config={"eos_token_id": [9, 4], "bos_token_id": 2**30, "unknown": 1}) == (1, (4,), 5)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and "eos_token_id=9 is ignored: the ids of the tokenizer" in lines[1] and "end at 7" in lines[1]


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    save(tmp_path)
    (tmp_path / "inner").mkdir()
    shutil.move(tmp_path / "tokenizer.json", tmp_path / "inner")
    (tmp_path / "inner" / "config.json").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="config.json is a link that leads out of its directory"):
        tokens.tokenizer(str(tmp_path / "inner" / "tokenizer.json"))
