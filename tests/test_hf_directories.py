"""Hugging Face directories as people have them: extra keys, files, tensors and tokenizers give a right result or one line."""
import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from released_files import SMALL, all_tensors, write_released
from safetensors.numpy import load_file, save_file

from mmx import cli, config
from mmx.checkpoints import casts, convert, hf_config, hf_layout, manager, safetensors, side_files, tokenizer_files
from mmx.checkpoints import initial as starts
from mmx.config import ConfigError
from mmx.data import tokens
from mmx.inference import prefix as prefixes
from mmx.model import abstract_params
from mmx.training import run as training

MODEL = dataclasses.replace(SMALL, pattern="LS", layers=2, vocab=264)
WORDS = {"</s>": 0, "<s>": 1, "<pad>": 2, "the": 3, "state": 4, "of": 5}


def tokenizer_json(**changes):
    """A tokenizer.json of whole words: "the state" is 3, 4."""
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for token, i in WORDS.items() if token[0] == "<"]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
            "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "<pad>"}} | changes


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read_all(directory):
    """Every parameter of a Hugging Face directory, by path."""
    source = convert.open_source(directory)
    with safetensors.Files(0) as files:
        return {leaf.path: source.read_leaf(files, leaf) for leaf in hf_layout.leaves(source.model)}


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


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
    same, other = tmp_path / "same.json", tmp_path / "other.json"
    same.write_text(json.dumps(tokenizer_json(padding={"strategy": "BatchLongest"}), indent=3))
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
        manager.check_config(run, config.Experiment(MODEL))
    manager.check_config(run, config.Experiment(MODEL, data=config.Data(tokenizer=str(file))))
    moved = file.rename(tmp_path / "moved.json")
    manager.check_config(run, config.Experiment(MODEL, data=config.Data(tokenizer=str(moved))))
    change_config(hf_with_tokenizer, **convert.BYTE_IDS)
    byte_run = convert.from_hf(hf_with_tokenizer, tmp_path / "byte_run", progress=False)
    with pytest.raises(ConfigError, match="data.tokenizer='numbers:9' is not the bytes that the run has"):
        manager.check_config(byte_run, config.Experiment(MODEL, data=config.Data(tokenizer="numbers:9")))


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


# ---- tensors ----

@pytest.mark.case(9)
def test_derived_buffers_are_skipped_whatever_their_type(hf):
    plain, tensors = read_all(hf), load_file(hf / "model.safetensors")
    extra = {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float16),
             "model.rotary_emb.inv_freq": np.ones(4, np.int64), "model.position_ids": np.arange(9),
             "vision_tower.embeddings.position_ids": np.arange(9)[None],
             "vision_tower.vision_model.embeddings.position_ids": np.arange(9)[None]}
    save_file(tensors | extra, hf / "model.safetensors")
    for path, array in read_all(hf).items():
        np.testing.assert_array_equal(array, plain[path])
    (hf / "model.safetensors").rename(hf / "model-1.safetensors")
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(
        [*tensors, *extra], "model-1.safetensors")}))
    assert read_all(hf).keys() == plain.keys()
    save_file(tensors | {"model.layers.0.extra": np.arange(9)}, hf / "model-1.safetensors")
    with pytest.raises(ConfigError, match="tensor model.layers.0.extra has dtype I64; only"):
        read_all(hf)


def shard(directory, extra=()):
    """Splits model.safetensors into two files with an index. `extra`: names that both files contain."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    first, second = names[::2], names[1::2]
    save_file({name: tensors[name] for name in [*first, *extra]}, directory / "model-1.safetensors")
    save_file({name: tensors[name] for name in second}, directory / "model-2.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(
        first, "model-1.safetensors") | dict.fromkeys(second, "model-2.safetensors")}))
    (directory / "model.safetensors").unlink()
    return tensors, second


@pytest.mark.case(11)
def test_the_index_wins_over_a_stray_file(hf, capsys):
    plain = read_all(hf)
    tensors, _ = shard(hf)
    save_file({name: np.zeros_like(tensor) for name, tensor in tensors.items()}, hf / "model.safetensors")
    for path, array in read_all(hf).items():
        np.testing.assert_array_equal(array, plain[path])
    assert capsys.readouterr().err == (f"mmx: {hf}: the tensors are read from model.safetensors.index.json; ignored are "
                                       "model.safetensors\n")


@pytest.mark.case(11)
def test_a_doubled_tensor_is_named(hf, tmp_path):
    shutil.copytree(hf, tmp_path / "names")
    tensors, second = shard(hf)
    shutil.rmtree(hf)
    write_released(hf, MODEL)
    shard(hf, extra=second[:1])
    with pytest.raises(ConfigError) as error:
        read_all(hf)
    assert one_line(error) == (f"{hf / 'model-1.safetensors'} and model-2.safetensors both contain tensor {second[0]}: "
                               "remove one of the two")
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    save_file(tensors | {gate.replace("block_sparse_moe", "mlp"): tensors[gate]}, tmp_path / "names" / "model.safetensors")
    with pytest.raises(ConfigError, match=f"contains tensor {gate} under two names"):
        read_all(tmp_path / "names")


# ---- keys of config.json ----

LINEAR = {"type": "linear", "factor": 8.0, "rope_theta": 1e7, "partial_rotary_factor": 0.5}
KEYS = {        # key: (value, the beginning of the message; "": accepted, "ignored": reported in one line)
    "rope_parameters": (LINEAR, "rope_parameters.type='linear' is not supported"),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, "rope_scaling.type='linear' is not supported"),
    "rope_scaling default": ({"rope_type": "default"}, ""),
    "rope_scaling legacy default": ({"type": "default"}, ""),
    "rope_scaling factor": ({"rope_type": "default", "factor": 4.0}, "rope_scaling.factor=4.0 is not supported"),
    "rope_scaling yarn": ({"rope_type": "yarn", "factor": 4.0}, "rope_scaling.rope_type='yarn' is not supported"),
    "use_qk_norm": (True, "use_qk_norm=True is not supported"), "use_qk_norm off": (False, ""),
    "attention_bias": (True, "attention_bias=True is not supported"), "attention_bias off": (False, ""),
    "attn_window_size": (4096, "attn_window_size=4096 is not supported"), "attn_window_size null": (None, ""),
    "norm_topk_prob": (False, "norm_topk_prob=False is not supported"), "norm_topk_prob on": (True, ""),
    "embedding_scale": (2.0, "embedding_scale=2.0 is not supported"),
    "router_scoring": ("sigmoid", "router_scoring='sigmoid' is not supported"),
    "n_shared_experts": (1, "n_shared_experts=1 is not supported"),
    "quantization": ({"bits": 4}, "quantization={'bits': 4} is not supported"),
    "my_note": ("from run 7", "ignored"), "unsloth_version": ("2026.1", "ignored"),
    "attention_dropout": (0.1, ""), "router_jitter_noise": (0.1, ""), "torch_dtype": ("bfloat16", ""), "temperature": (0.6, ""),
    "model_type MiniMaxM1": ("MiniMaxM1", ""), "model_type minimax_m1": ("minimax_m1", ""),
    "model_type MINIMAX-TEXT-01": ("MINIMAX-TEXT-01", ""),
    "model_type minimax_m2": ("minimax_m2", "model_type='minimax_m2' is not supported"),
    "model_type MiniMaxM2": ("MiniMaxM2", "model_type='MiniMaxM2' is not supported"),
    "model_type minimax_m10": ("minimax_m10", "model_type='minimax_m10' is not supported"),
    "model_type empty": ("", "model_type='' is not supported"),
}


@pytest.mark.case(10)
@pytest.mark.case(13)
@pytest.mark.parametrize("case", KEYS)
def test_keys_of_config_json(case, tmp_path, capsys):
    value, message = KEYS[case]
    key = case.split(" ")[0]
    text = hf_config.write_model(MODEL, "transformers", "float32", {})
    plain = hf_config.read_model(text, "config.json")
    if message in ("", "ignored"):
        assert hf_config.read_model(text | {key: value}, tmp_path / "config.json") == plain
        note = f"mmx: {tmp_path / 'config.json'}: keys that mmx does not know are ignored: {key}\n"
        assert capsys.readouterr().err == (note if message else "")
    else:
        with pytest.raises(ConfigError) as error:
            hf_config.read_model(text | {key: value}, "config.json")
        assert one_line(error).startswith(f"config.json: {message}")


@pytest.mark.case(13)
def test_architectures_say_what_model_type_does_not():
    text = hf_config.write_model(MODEL, "released", "float32", {})
    del text["model_type"]
    plain = hf_config.read_model(text, "config.json")
    assert hf_config.read_model(text | {"architectures": ["MiniMaxM1ForCausalLM"]}, "config.json") == plain
    with pytest.raises(ConfigError, match="architectures='MiniMaxM2ForCausalLM' is not supported"):
        hf_config.read_model(text | {"architectures": ["MiniMaxM2ForCausalLM"]}, "config.json")


@pytest.mark.case(10)
def test_absent_keys_have_the_defaults_of_the_released_code():
    """configuration_minimax_text_01.py and transformers' MiniMaxConfig: 8 key-value heads, RoPE base 1,000,000."""
    text = hf_config.write_model(dataclasses.replace(MODEL, heads=16, kv_heads=4), "released", "float32", {})
    del text["num_key_value_heads"], text["rope_theta"]
    found = hf_config.read_model(text, "config.json")
    assert (found["kv_heads"], found["rope_theta"]) == (8, 1e6)
    assert hf_config.read_model(text | {"num_key_value_heads": None}, "config.json")["kv_heads"] == 16


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
    # training in the workdir adds files of its own
    (run / "eval.json").write_text("{}")
    manager.check_config(run, config.Experiment(MODEL, data=config.Data(tokenizer=str(run / "tokenizer.json"))))
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


# ---- values ----

@pytest.mark.case(14)
def test_casts_refuse_values_that_do_not_fit(hf, tmp_path):
    name, path = "model.layers.1.self_attn.q_proj.weight", hf / "model.safetensors"
    tensors = load_file(path)
    tensors[name][3, 5] = 1e6
    save_file(tensors, path)
    run = convert.from_hf(hf, tmp_path / "run", progress=False)
    before = sorted(p.name for p in tmp_path.iterdir())
    out, message = tmp_path / "out", f"tensor {name} contains 1e\\+06, too large for float16"
    for call in (convert.from_hf, convert.to_hf):
        for source in (hf, run):
            with pytest.raises(ConfigError, match=message) as error:
                call(source, out, dtype="float16", progress=False)
            one_line(error)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    for source in (hf, run):
        with pytest.raises(ConfigError, match="tensor groups.layer_1.mixer.q_DHK contains 1e.06, too large for float16"):
            convert.load(source, "float16")
    convert.to_hf(hf, out, dtype="bfloat16", progress=False)
    np.testing.assert_array_equal(all_tensors(out)[name], tensors[name].astype(ml_dtypes.bfloat16))


def abstract_float32():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=device), abstract_params(MODEL))


@pytest.mark.case(14)
def test_other_casts_refuse_values_that_do_not_fit(hf, tmp_path):
    """float64 to float32 in init_from, in the resume of a converted workdir, in load and in int8; and infinities in int8."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in load_file(hf / "model.safetensors").items()}
    name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    tensors[name][0, 0] = -1e300
    save_file(tensors, hf / "model.safetensors")
    run = convert.from_hf(hf, tmp_path / "run", progress=False)
    for call in (lambda: convert.load(hf), lambda: convert.load(run), lambda: convert.load(hf, weights_dtype="int8"),
                 lambda: manager.Checkpoints(run, 1, 1).restore(abstract_float32(), None),
                 lambda: starts.load_initial(convert.open_source(run), abstract_float32())):
        with pytest.raises(ConfigError, match="w2.* contains 1e.300, too large for float32"):
            call()
    tensors[name][0, 0] = np.inf
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(ConfigError, match=f"tensor {name} contains values that are not finite; int8"):
        convert.load(hf, weights_dtype="int8")
    with pytest.raises(ConfigError, match="w2_EFD of the initial checkpoint contains values that are not finite"):
        starts.load_initial(convert.open_source(hf), abstract_float32())
    # infinities and NaN that were there before are kept by a cast
    values = np.array([np.nan, np.inf, 1.0])
    np.testing.assert_array_equal(casts.cast(values, np.float16, "x"), values.astype(np.float16))
