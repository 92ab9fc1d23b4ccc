"""Tokenizers and other files beside the tensors: starting points are compared, conversions keep every file."""
import dataclasses
import json

import jax
import pytest
from released_files import BYTE_MODEL as MODEL
from released_files import change_config, one_line, tokenizer_json, write_released

from mmx import cli, config
from mmx.checkpoints import convert, run_config, side_files, tokenizer_files
from mmx.checkpoints import initial as starts
from mmx.config import ConfigError
from mmx.data import tokens
from mmx.inference import prefix as prefixes
from mmx.training import run as training


@pytest.fixture
def hf(tmp_path):
    write_released(tmp_path / "hf", MODEL)
    return tmp_path / "hf"


@pytest.fixture
def hf_with_tokenizer(hf):
    (hf / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    return hf


# ---- tokenizers of starting points ----

def run_of(hf, **data):
    return config.Experiment(MODEL, config.Train(steps=1, batch=2, length=32, init_from=str(hf), tensorboard=False),
                             config.Data(shards=1, **data), mesh=config.Mesh(1))


@pytest.mark.case(4)
def test_init_from_refuses_another_tokenizer(hf_with_tokenizer, tmp_path):
    file = str(hf_with_tokenizer / "tokenizer.json")
    with pytest.raises(ConfigError) as error:
        training.train(run_of(hf_with_tokenizer), tmp_path / "run")
    assert one_line(error).endswith(f"than data.tokenizer='bytes': give --config.data.tokenizer={file}")
    assert not (tmp_path / "run").exists()
    assert starts.open_initial(hf_with_tokenizer, MODEL, file).tokenizer == file
    # the contents count, not the path, the layout of the JSON or the parts that mmx does not use
    template = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
                "special_tokens": {}}
    same, other = tmp_path / "same.json", tmp_path / "other.json"
    same.write_text(json.dumps(tokenizer_json(post_processor=template), indent=3))
    other.write_text(json.dumps(tokenizer_json(pre_tokenizer={"type": "Whitespace"})))
    assert starts.open_initial(hf_with_tokenizer, MODEL, str(same)).tokenizer == file
    with pytest.raises(ConfigError, match="was trained with another tokenizer than data.tokenizer='.*other.json'"):
        starts.open_initial(hf_with_tokenizer, MODEL, str(other))


@pytest.mark.case(4)
def test_init_from_without_a_tokenizer_json(hf, capsys):
    starts.open_initial(hf, MODEL, "bytes")
    assert "has no tokenizer.json: mmx cannot check" in capsys.readouterr().err
    (hf / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(ConfigError, match=r"that mmx cannot read \(tokenizer.model\), but data.tokenizer='bytes': save it"):
        starts.open_initial(hf, MODEL, "bytes")
    change_config(hf, **convert.BYTE_IDS)
    with pytest.raises(ConfigError, match="another tokenizer than data.tokenizer='numbers:200': give .*tokenizer=bytes"):
        starts.open_initial(hf, MODEL, "numbers:200")


@pytest.mark.case(4)
def test_a_resumed_run_keeps_its_tokenizer(hf_with_tokenizer, tmp_path):
    """The first run in a converted workdir, and a run that resumes; the path of the same tokenizer may change."""
    run, file = convert.from_hf(hf_with_tokenizer, tmp_path / "run", progress=False), hf_with_tokenizer / "tokenizer.json"
    with pytest.raises(ConfigError, match="data.tokenizer='bytes' is not the .*tokenizer.json that the run has"):
        run_config.check_config(run, config.Experiment(MODEL))
    run_config.check_config(run, config.Experiment(MODEL, data=config.Data(tokenizer=str(file))))
    moved = file.rename(tmp_path / "moved.json")
    run_config.check_config(run, config.Experiment(MODEL, data=config.Data(tokenizer=str(moved))))
    change_config(hf_with_tokenizer, **convert.BYTE_IDS)
    byte_run = convert.from_hf(hf_with_tokenizer, tmp_path / "byte_run", progress=False)
    with pytest.raises(ConfigError, match="data.tokenizer='numbers:9' is not the bytes that the run has"):
        run_config.check_config(byte_run, config.Experiment(MODEL, data=config.Data(tokenizer="numbers:9")))


@pytest.mark.case(4)
def test_the_other_starting_points_are_compared(tmp_path):
    saved = dataclasses.replace(MODEL, vision=config.Vision(2, 8, 2, 12, 8, 4, ((1, 1),), token=9))
    new = dataclasses.replace(saved, vision=dataclasses.replace(saved.vision, norm_eps=1e-3, token=8))
    assert starts.differing_vision_settings(saved, new) == ["model.vision.norm_eps is 1e-05 there, 0.001 here"]
    assert starts.differing_settings(saved, new) == ["model.vision.norm_eps is 1e-05 there, 0.001 here",
                                                     "model.vision.token is 9 there, 8 here"]
    params = {"norm_D": jax.numpy.ones(3)}
    cache = {"length_B": jax.numpy.ones(1, "int32"), "layers": {}}
    prefixes.save(tmp_path / "prefix", convert.Loaded(None, params, MODEL, "bytes"), prefixes.Prefix(cache, 1, 2))
    with pytest.raises(ConfigError, match="was made with another tokenizer"):
        prefixes.load(tmp_path / "prefix", convert.Loaded(None, params, MODEL, "numbers:9"))


# ---- side files ----

FILES = {"chat_template.jinja": b"{{ messages }}", "preprocessor_config.json": b'{"size": 8}', "processor_config.json": b"{}",
         "added_tokens.json": b'{"<s>": 1}', "vocab.json": b"{}", "merges.txt": b"#version", "LICENSE": b"licence",
         "my own file": b"\x00\xff", "empty.txt": b"", "tokenizer.model": b"model",
         "additional_chat_templates/tool.jinja": b"{{ tools }}", "generation_config.json": b'{"eos_token_id": [0, 2]}',
         "tokenizer_config.json": b'{"eos_token": "</s>"}'}
OMITTED = {"pytorch_model.bin": b"pickle", "optimizer.pt": b"pickle", ".hidden": b"", ".cache/x": b"", "metrics.jsonl": b"{}"}


@pytest.mark.case(12)
def test_side_files_survive_both_ways(hf_with_tokenizer, tmp_path, capsys):
    for name, content in (FILES | OMITTED).items():
        (hf_with_tokenizer / name).parent.mkdir(exist_ok=True)
        (hf_with_tokenizer / name).write_bytes(content)
    run = convert.from_hf(hf_with_tokenizer, tmp_path / "run", progress=False)
    assert f"mmx: {hf_with_tokenizer}: not copied are metrics.jsonl: " in capsys.readouterr().err
    # training in the workdir adds files
    (run / "eval.json").write_text("{}")
    run_config.check_config(run, config.Experiment(MODEL, data=config.Data(tokenizer=str(run / "tokenizer.json"))))
    convert.to_hf(run, tmp_path / "back", progress=False)
    for name, content in FILES.items():
        if name != "generation_config.json":
            assert (tmp_path / "back" / name).read_bytes() == content, name
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    found = {path.relative_to(tmp_path / "back").as_posix() for path in (tmp_path / "back").rglob("*") if path.is_file()}
    assert found == FILES.keys() | {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.case(12)
def test_side_files_of_init_from_reach_the_run(hf_with_tokenizer, tmp_path):
    for name, content in FILES.items():
        (hf_with_tokenizer / name).parent.mkdir(exist_ok=True)
        (hf_with_tokenizer / name).write_bytes(content)
    run, file = tmp_path / "run", str(hf_with_tokenizer / "tokenizer.json")
    e = run_of(hf_with_tokenizer, tokenizer=file)
    training.write_description(run, e, training.open_initial_checkpoints(e, run))
    assert set(side_files.find(run, workdir=True)) == FILES.keys() | {"tokenizer.json"}


@pytest.mark.case(12)
def test_transformers_loads_exports_and_gives_the_ids_that_mmx_trains_on(hf_with_tokenizer, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    text = "the état of\n \u2028 the <s> 🙂\r\n"
    back = convert.to_hf(hf_with_tokenizer, tmp_path / "words", progress=False)
    loaded = transformers.AutoTokenizer.from_pretrained(back)
    assert loaded("the state of the")["input_ids"] == [1, 3, 4, 5, 3]
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 0, 2)
    assert type(transformers.AutoConfig.from_pretrained(back)).__name__ == "MiniMaxConfig"

    (hf_with_tokenizer / "tokenizer.json").unlink()
    change_config(hf_with_tokenizer, **convert.BYTE_IDS)
    back = convert.to_hf(hf_with_tokenizer, tmp_path / "bytes", progress=False)
    loaded = transformers.AutoTokenizer.from_pretrained(back)
    plain = text.replace("<s>", "")
    assert loaded(plain)["input_ids"] == [256, *plain.encode()]
    assert loaded.decode([*plain.encode(), 257], skip_special_tokens=True) == plain
    assert tokens.tokenizer(str(back / "tokenizer.json")).encode(text.encode()).tolist() == list(text.encode())
    loaded.save_pretrained(back)        # transformers writes the file in its own way
    assert convert.open_source(back).tokenizer == "bytes"
    run = convert.from_hf(back, tmp_path / "run", progress=False)
    assert convert.open_source(run).tokenizer == "bytes" and not (run / "tokenizer.json").exists()
    capsys.readouterr()
    tokenizer_files.write_tokenizer("numbers:9", tmp_path, "export")
    assert "export: AutoTokenizer cannot load this export: data.tokenizer='numbers:9'" in capsys.readouterr().err


DIFFERENCES = {     # name: (changes of the model, dialect, what the line contains; "": no line)
    "partial": ({}, "transformers", "all 8 dimensions of a head, not the first 4 (partial RoPE); load it with mmx.torch.load"),
    "heads": ({"heads": 6, "kv_heads": 2, "rotary_dim": 8}, "transformers", "decays for 6 heads"),
    "none": ({"rotary_dim": 8}, "transformers", ""), "no RoPE": ({"pattern": "L"}, "transformers", ""),
    "released": ({"rotary_dim": 8}, "released", "needs remote code for the released dialect"),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_to_hf_says_where_stock_transformers_differs(case, tmp_path, capsys):
    changes, dialect, line = DIFFERENCES[case]
    write_released(tmp_path / "hf", dataclasses.replace(MODEL, **changes))
    capsys.readouterr()
    assert cli.main(["convert", "to-hf", "--checkpoint", str(tmp_path / "hf"), "--out", str(tmp_path / "out"),
                     "--dialect", dialect]) == 0
    found = [text for text in capsys.readouterr().err.splitlines() if "transformers" in text]
    assert len(found) == bool(line) and line in "".join(found)
