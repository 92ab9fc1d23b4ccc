"""Hugging Face directories as people have them: extra keys, files, tensors and values give a right result or one line."""
import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from released_files import BYTE_MODEL as MODEL
from released_files import all_tensors, change_config, one_line, write_released
from safetensors.numpy import load_file, save_file

from mmx.checkpoints import casts, convert, hf_config, hf_layout, manager, safetensors
from mmx.checkpoints import initial as starts
from mmx.config import ConfigError
from mmx.files import untrusted
from mmx.model import abstract_params


@pytest.fixture
def hf(tmp_path):
    write_released(tmp_path / "hf", MODEL)
    return tmp_path / "hf"


def read_all(directory):
    """Every parameter of a Hugging Face directory, by path."""
    source = convert.open_source(directory)
    with safetensors.Files(0) as files:
        return {leaf.path: source.read_leaf(files, leaf) for leaf in hf_layout.leaves(source.model)}


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
    "rope_parameters theta": ({"rope_theta": 7.0},
                              "rope_theta (gives 500000) and rope_parameters.rope_theta (gives 7) contradict"),
    "partial_rotary_factor": (0.25, "rotary_dim (gives 4) and partial_rotary_factor (gives 2)"),
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


# ---- no silent failure: every reader gives the right parameters, or one line ----

def sparse(path, size):
    with path.open("wb") as file:
        file.truncate(size)


def add_tensor(name, value):
    def apply(directory):
        tensors = load_file(directory / "model.safetensors")
        save_file(tensors | {name: value}, directory / "model.safetensors")
    return apply


def rename(prefix: str):
    def apply(directory):
        tensors = load_file(directory / "model.safetensors")
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, directory / "model.safetensors")
    return apply


def put_nan(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight"][0, 0] = np.nan
    save_file(tensors, directory / "model.safetensors")


GATE = "model.layers.0.mlp.gate.weight"
SILENT = {      # name: (what is done to the directory, the message; "": the parameters are right)
    "unknown key": (lambda d: change_config(d, colour="red"), ""),
    "unknown key that matters": (lambda d: change_config(d, rotary_scaling=2), "rotary_scaling=2 is not supported"),
    "extra file": (lambda d: (d / "notes.txt").write_text("x"), ""),
    "extra safetensors": (lambda d: shutil.copy(d / "model.safetensors", d / "adapter_model.safetensors"), ""),
    "doubled tensor": (add_tensor(GATE, np.ones((3, 12), np.float32)), "contains tensor .*gate.weight under two names"),
    "doubled key": (lambda d: (d / "config.json").write_text('{"a": 1, "a": 2}'), "an object has a key twice"),
    "non-finite number": (lambda d: change_config(d, rope_theta=float("inf")), "rope_theta needs a finite number, got inf"),
    "empty config": (lambda d: (d / "config.json").write_text(""), "config.json cannot be read as JSON"),
    "empty object": (lambda d: (d / "config.json").write_text("{}"), "vocab_size is missing"),
    "empty index": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    "empty weight_map": (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {}}'), "has no weight_map"),
    "empty tensors": (lambda d: (d / "model.safetensors").write_bytes(b""), "is truncated or not a safetensors file"),
    "names with a prefix": (rename("_orig_mod."), "the names of its tensors begin with '_orig_mod.'"),
    "names with two prefixes": (rename("base_model.model."), "the names of its tensors begin with 'base_model.model.'"),
    "pickles": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "has pytorch_model.bin, but mmx reads"),
    "no index": (lambda d: (d / "model.safetensors").rename(d / "model-00001-of-00001.safetensors"), "but no index of them"),
    "Git LFS pointer": (lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid a\n"),
                        "is a Git LFS pointer, not the file itself"),
    "empty template": (lambda d: (d / "chat_template.jinja").write_text(""), ""),
    "empty model type": (lambda d: change_config(d, model_type=""), "model_type='' is not supported"),
    "huge number": (lambda d: change_config(d, rope_theta=10**400), "rope_theta needs float"),
    "huge name": (lambda d: change_config(d, model_type="x" * 10**6), "model_type='xxx.* is not supported"),
    "huge key": (lambda d: change_config(d, **{"norm" * 10**5: 1}), "norm.*=1 is not supported"),
    "huge config": (lambda d: sparse(d / "config.json", 1 << 30), "at most 16,777,216 are allowed"),
    "huge side file": (lambda d: sparse(d / "corpus.txt", 1 << 30), ""),
}


@pytest.mark.parametrize("case", SILENT)
def test_no_silent_failure(case, hf, tmp_path, monkeypatch, capsys):
    """Also from another folder: the path of the directory is relative."""
    apply, message = SILENT[case]
    plain = read_all(hf)
    apply(hf)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    if message:
        for call in (lambda: convert.from_hf("../hf", "../run", progress=False), lambda: convert.find_model("../hf"),
                     lambda: convert.to_hf("../hf", "../out", progress=False), lambda: starts.open_initial("../hf", MODEL)):
            with pytest.raises(ConfigError, match=message) as error:
                call()
            assert len(untrusted.one_line(one_line(error))) < 2100
        assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "hf"]
        return
    for path, array in read_all("../hf").items():
        np.testing.assert_array_equal(array, plain[path])
    convert.from_hf("../hf", "../run", progress=False)
    convert.to_hf("../run", "../out", progress=False)
    assert ".." not in manager.Checkpoints("../run", 1, 1).directory.parts
    for path, array in read_all("../out").items():
        np.testing.assert_array_equal(array, plain[path])
    reported = {"unknown key": "ignored: colour", "extra safetensors": "ignored are adapter_model.safetensors",
                "huge side file": "not copied are corpus.txt"}
    assert reported.get(case, "") in capsys.readouterr().err


def test_a_weight_that_is_not_a_number_is_kept_or_refused(hf, tmp_path):
    """Conversions copy it; a run does not start from it, and int8 has no value for it."""
    put_nan(hf)
    convert.to_hf(hf, tmp_path / "out", dtype="bfloat16", progress=False)
    assert np.isnan(all_tensors(tmp_path / "out")["model.layers.0.block_sparse_moe.experts.0.w1.weight"][0, 0])
    with pytest.raises(ConfigError, match="experts.0.w1.weight contains values that are not finite; int8"):
        convert.load(hf, weights_dtype="int8")
    with pytest.raises(ConfigError, match="w1_EDF of the initial checkpoint contains values that are not finite"):
        starts.load_initial(convert.open_source(hf), abstract_float32())
