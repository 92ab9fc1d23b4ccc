"""Conversion: layouts, bit-exact round trips in both dialects, bounded memory, and a one-line error for every mistake."""
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from released_files import SHAPES, SMALL, all_tensors, write_released
from safetensors.numpy import load_file, save_file

from mmx import config
from mmx import mesh as meshes
from mmx.checkpoints import convert, hf_config, hf_layout, safetensors
from mmx.checkpoints import initial as starts
from mmx.checkpoints import manager as checkpoint
from mmx.config import ConfigError
from mmx.model import abstract_params

ORACLES = Path(__file__).parent / "oracles"
CKPT = ORACLES / "c_partial_orig" / "ckpt"


def test_text_01_has_the_released_names_and_shapes():
    model = config.Model(vocab=200064, dim=6144, layers=80, heads=64, kv_heads=8, head_dim=128, rotary_dim=64,
                         experts=32, expert_dim=9216)
    shapes = {name: leaf.tensor_shape for leaf in hf_layout.leaves(model) for _, name in leaf.tensors()}
    assert len(shapes) == 8243 == hf_layout.tensor_count(model)
    assert shapes["model.layers.78.self_attn.qkv_proj.weight"] == (3 * 8192, 6144)
    assert shapes["model.layers.79.self_attn.k_proj.weight"] == (1024, 6144)
    assert shapes["model.layers.79.self_attn.o_proj.weight"] == (6144, 8192)
    assert shapes["model.layers.0.block_sparse_moe.experts.31.w2.weight"] == (6144, 9216)
    assert max(np.prod(leaf.slice_shape(2)) * 2 for leaf in hf_layout.leaves(model)) <= hf_layout.SLICE_BYTES


def test_layouts_by_hand(tmp_path):
    """Each kind of leaf equals the released tensor in a layout written out in the test."""
    model = dataclasses.replace(SMALL, pattern="LS", layers=4)
    tensors = write_released(tmp_path / "hf", model)
    source = convert.open_source(tmp_path / "hf")
    with safetensors.Files(0) as files:
        params = {leaf.path: source.read_leaf(files, leaf) for leaf in hf_layout.leaves(model)}
    H, K, D, G = model.heads, model.head_dim, model.dim, model.kv_heads
    for group in range(2):
        lightning, softmax = (f"model.layers.{2 * group + i}." for i in range(2))
        qkv_HPKD = tensors[lightning + "self_attn.qkv_proj.weight"].reshape(H, 3, K, D)
        at = ("groups", "layer_0", "mixer")
        for part, name in enumerate(("q_DHK", "k_DHK", "v_DHV")):
            np.testing.assert_array_equal(params[(*at, name)][group], np.moveaxis(qkv_HPKD[:, part], -1, 0))
        np.testing.assert_array_equal(params[(*at, "gate_DHV")][group].reshape(D, -1).T,
                                      tensors[lightning + "self_attn.output_gate.weight"])
        np.testing.assert_array_equal(params[(*at, "norm_HV")][group].ravel(),
                                      tensors[lightning + "self_attn.norm.weight"])
        np.testing.assert_array_equal(params[(*at, "out_HVD")][group].reshape(-1, D).T,
                                      tensors[lightning + "self_attn.out_proj.weight"])
        at = ("groups", "layer_1", "mixer")
        for name, rows, theirs in (("q_DHK", H, "q"), ("k_DGK", G, "k"), ("v_DGV", G, "v")):
            np.testing.assert_array_equal(np.moveaxis(params[(*at, name)][group], 0, -1),
                                          tensors[softmax + f"self_attn.{theirs}_proj.weight"].reshape(rows, K, D))
        at = ("groups", "layer_1", "moe")
        np.testing.assert_array_equal(params[(*at, "router_DE")][group].T,
                                      tensors[softmax + "block_sparse_moe.gate.weight"])
        for expert in range(model.experts):
            for name in ("w1_EDF", "w3_EDF", "w2_EFD"):
                np.testing.assert_array_equal(params[(*at, name)][group, expert].T, tensors[
                    softmax + f"block_sparse_moe.experts.{expert}.{name[:2]}.weight"])
    np.testing.assert_array_equal(params[("head_WD",)], tensors["lm_head.weight"])


@pytest.mark.parametrize("dialect", convert.DIALECTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_is_bit_exact(tmp_path, monkeypatch, shape, dialect):
    monkeypatch.setattr(hf_layout, "SLICE_BYTES", 500)       # every matrix in several slices, the last one short
    dtype = "BF16" if shape == "odd_heads" else "F32"
    tensors = write_released(tmp_path / "hf", SHAPES[shape], dtype)
    convert.from_hf(tmp_path / "hf", tmp_path / "run", progress=False)
    convert.to_hf(tmp_path / "run", tmp_path / "back", dialect, shard_bytes=9000, progress=False)
    back = all_tensors(tmp_path / "back")
    extra = {name for name in back if name.endswith(hf_layout.DECAY_BUFFERS)}
    assert back.keys() - extra == tensors.keys()
    assert bool(extra) == (dialect == "transformers" and shape == "odd_heads")
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].tobytes() == tensor.tobytes(), name
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == back.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in back.values())
    for file in (tmp_path / "back").glob("*.safetensors"):
        arrays = load_file(file).values()
        assert sum(array.nbytes for array in arrays) <= 9000 or len(arrays) == 1
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0      # the data is aligned
    assert hf_config.read_model(json.loads((tmp_path / "back" / "config.json").read_text()), "x") == hf_config.read_model(
        json.loads((tmp_path / "hf" / "config.json").read_text()), "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "run"]


def test_orbax_restores_a_converted_checkpoint(tmp_path):
    convert.from_hf(CKPT, tmp_path / "run", progress=False)
    loaded = convert.open_source(CKPT)
    with safetensors.Files(0) as files:
        wanted = {leaf.path: loaded.read_leaf(files, leaf) for leaf in hf_layout.leaves(loaded.model)}
    wish = ocp.args.Composite(params=ocp.args.StandardRestore(abstract_params(loaded.model)))
    with ocp.CheckpointManager(tmp_path / "run" / "checkpoints") as manager:
        params = manager.restore(manager.latest_step(), args=wish)["params"]
    flat = {tuple(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert flat.keys() == wanted.keys()
    for path, leaf in flat.items():
        np.testing.assert_array_equal(leaf, wanted[path])


def test_several_files_convert_like_a_single_one(tmp_path):
    one = convert.from_hf(CKPT, tmp_path / "one", progress=False)
    many = convert.from_hf(CKPT.with_name("ckpt_sharded"), tmp_path / "many", progress=False)
    first, second = (checkpoint.open_arrays(run / "checkpoints" / "0") for run in (one, many))
    assert first.keys() == second.keys()
    for path in first:
        np.testing.assert_array_equal(first[path].read().result(), second[path].read().result())


def test_stacked_experts_convert_like_released_ones(tmp_path):
    """With the names that transformers has in memory, and w1 and w3 stacked."""
    model = SMALL
    tensors = write_released(tmp_path / "hf", model)
    (tmp_path / "stacked").mkdir()
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "stacked")
    stacked = {name.replace("block_sparse_moe", "mlp"): t for name, t in tensors.items() if "experts" not in name}
    for layer in range(model.layers):
        w1, w2, w3 = (np.stack([tensors[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{w}.weight"]
                                for e in range(model.experts)]) for w in ("w1", "w2", "w3"))
        stacked[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        stacked[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    save_file(stacked, tmp_path / "stacked" / "model.safetensors")
    convert.to_hf(tmp_path / "stacked", tmp_path / "back", progress=False)
    for name, tensor in all_tensors(tmp_path / "back").items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)


def test_dtype_is_cast_on_request(tmp_path):
    tensors = write_released(tmp_path / "hf", SMALL)
    convert.from_hf(tmp_path / "hf", tmp_path / "run", dtype="bfloat16", progress=False)
    convert.to_hf(tmp_path / "run", tmp_path / "back", progress=False)
    for name, tensor in all_tensors(tmp_path / "back").items():
        np.testing.assert_array_equal(tensor, tensors[name].astype(ml_dtypes.bfloat16), err_msg=name)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_checkpoint_of_another_machine_loads(tmp_path, monkeypatch):
    """Its choice of kernels is dropped. `find_model` reads no tensor."""
    write_released(tmp_path / "hf", SMALL)
    convert.from_hf(tmp_path / "hf", tmp_path / "run", progress=False)
    text = json.loads((tmp_path / "run" / "config.json").read_text())
    text["model"] |= {"impl": "gpu", "chunk": 7, "ragged": True, "token_groups": 2, "remat": True}
    (tmp_path / "run" / "config.json").write_text(json.dumps(text))
    loaded = convert.load(tmp_path / "run").config
    assert [getattr(loaded, name) for name in config.IMPLEMENTATION_KEYS] == ["", 0, False, False, 1, False]
    with meshes.inference_mesh(convert.find_model(tmp_path / "run"), "etp=2"):
        pass
    monkeypatch.setattr(checkpoint, "verify_item", None)
    assert convert.find_model(tmp_path / "run").impl == "gpu" and convert.find_model(tmp_path / "hf").dim == loaded.dim


@pytest.mark.parametrize("pattern, keys", [
    ("LW", ["window", "rotary_dim", "head_norm_eps"]), ("LS", ["rotary_dim", "head_norm_eps"]), ("L", ["head_norm_eps"]),
    ("S", ["rotary_dim"]), ("W", ["window", "rotary_dim"])])
def test_settings_differ_only_by_keys_that_change_the_function(pattern, keys):
    saved = dataclasses.replace(SMALL, pattern=pattern)
    new = dataclasses.replace(saved, rotary_dim=2, window=7, head_norm_eps=1e-3, aux_weight=0.5, capacity=1.5, impl="xla")
    assert [text.split(" is ")[0] for text in starts.differing_settings(saved, new)] == [f"model.{key}" for key in keys]
    assert not starts.differing_settings(saved, saved)
    with_capacity = starts.differing_settings(saved, new, with_capacity=True)
    assert "model.capacity is 0.0 there, 1.5 here" in with_capacity and len(with_capacity) == len(keys) + 1


def test_decay_buffers_equal_the_oracles():
    found = load_file(CKPT / "model.safetensors")
    model = convert.open_source(CKPT).model
    for layer in (0, 4):
        for name, ours in hf_layout.decay_buffers(model, layer).items():
            theirs = found[f"model.layers.{layer}.self_attn.{name}"]
            block = 32                                      # of the oracle; the buffers of mmx are longer
            if name == "key_decay":                         # decays from the end of the block
                ours = ours[:, -block:]
            elif name != "slope_rate":
                ours = ours[..., :block, :block] if name == "diagonal_decay" else ours[:, :block]
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7, err_msg=name)


def test_both_dialects_describe_the_same_model():
    stock = json.loads((CKPT / "config.json").read_text())
    model = config.Model(**hf_config.read_model(stock, "x"))
    assert (model.pattern, model.rotary_dim, model.rope_theta, model.heads) == ("LLS", 8, 1e7, 5)
    assert model.alpha_lightning == stock["linear_attn_alpha_factor"] and model.norm_eps == 1e-5
    ids = dict.fromkeys(convert.BYTE_IDS)
    for dialect in convert.DIALECTS:
        bare = dataclasses.replace(model, rotary_dim=0)
        assert config.Model(**hf_config.read_model(hf_config.write_model(bare, dialect, "float32", ids), "x")) == bare
        assert config.Model(**hf_config.read_model(hf_config.write_model(model, dialect, "float32", ids), "x")) == model
    text = hf_config.write_model(model, "released", "float32", ids)
    assert not text.keys() & {"layer_types", "rope_parameters", "linear_attn_alpha_factor"}
    full = stock | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    assert hf_config.read_model(full, "x")["rotary_dim"] == 16
    m1 = text | {"model_type": "minimax_m1", "num_local_experts": [8] * 6, "shared_intermediate_size": [0]}
    assert config.Model(**hf_config.read_model(m1, "x")) == model


def test_tokenizer_ids_are_written(tmp_path):
    model = dataclasses.replace(SMALL, vocab=264)
    write_released(tmp_path / "hf", model)
    convert.from_hf(tmp_path / "hf", tmp_path / "run", progress=False)
    text = json.loads((tmp_path / "run" / "config.json").read_text())
    as_trained = json.dumps(text | {"data": {"tokenizer": "bytes"}})
    (tmp_path / "run" / "config.json").write_text(as_trained)
    convert.to_hf(tmp_path / "run", tmp_path / "back", progress=False)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()).items() >= convert.BYTE_IDS.items()
    assert convert.open_source(tmp_path / "back").tokenizer == "bytes"
    assert convert.open_source(tmp_path / "hf").tokenizer == ""


def test_memory_is_bounded_by_slices(tmp_path):
    """Converting 0.4 GB, nearly all in three matrices, takes under 80 MB more than imports and tracing the model, both ways."""
    model = dataclasses.replace(SMALL, pattern="S", layers=1, dim=1024, expert_dim=32768, experts=1, top_k=1)
    directory = tmp_path / "hf"
    directory.mkdir()
    tensors = {name: (safetensors.DTYPES["F32"], leaf.tensor_shape)
               for leaf in hf_layout.leaves(model) for _, name in leaf.tensors()}
    safetensors.plan_files(directory, tensors, 100_000_000)            # holes: zeros
    (directory / "config.json").write_text(json.dumps(hf_config.write_model(model, "released", "float32", {})))
    code = """
import sys
from mmx.checkpoints import convert, hf_layout
hf_layout.SLICE_BYTES = 4 << 20
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
convert.open_source(sys.argv[1] + "/hf")
before = peak()
convert.from_hf(sys.argv[1] + "/hf", sys.argv[1] + "/run", progress=False)
convert.to_hf(sys.argv[1] + "/run", sys.argv[1] + "/back", progress=False)
print(peak() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 80_000


# ---- mistakes ----

def edit_config(**changes):
    def edit(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return edit


def edit_tensors(change):
    def edit(directory):
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")
    return edit


def cut(size):
    def edit(directory):
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])
    return edit


NORM, STACK = "model.norm.weight", "model.layers.0.mlp.experts.gate_up_proj"


def edit_header(change, length=None):
    def edit(directory):
        path = directory / "model.safetensors"
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes((length or len(text)).to_bytes(8, "little") + text + raw[end:])
    return edit


def index(place):
    def edit(directory):
        path = directory / "model.safetensors"
        names = list(load_file(path))
        path.rename(directory / "model-1.safetensors")
        places = dict.fromkeys(names, "model-1.safetensors") | place(names)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return edit


def drop_w1(tensors):
    for name in [n for n in tensors if n.endswith("w1.weight")]:
        del tensors[name]


MISTAKES = {
    "missing": (edit_tensors(lambda t: t.pop("model.norm.weight")), "lacks model.norm.weight"),
    "many missing": (edit_tensors(drop_w1), r"lacks (model\S+, ){4}model\S+ and 19 more"),
    "extra": (edit_tensors(lambda t: t.update({"model.layers.0.shared_mlp.up_proj.weight": np.zeros(2)})),
              "unknown model.layers.0.shared_mlp.up_proj.weight"),
    "misshapen": (edit_tensors(lambda t: t.update({"lm_head.weight": np.zeros((19, 11))})),
                  r"misshapen lm_head.weight \[19, 11\] instead of \[19, 12\]"),
    "truncated": (cut(-100), "is truncated: .* fetch the file again"),
    "truncated header": (cut(300), "is truncated or not a safetensors file: its header ends at byte"),
    "empty file": (cut(0), "is truncated or not a safetensors file"),
    "no tensors": (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "postnorm": (edit_config(postnorm=False), "postnorm=false .* is not supported"),
    "shared MLP": (edit_config(shared_intermediate_size=[0, 16]), "shared_intermediate_size=.* not supported"),
    "tied": (edit_config(tie_word_embeddings=True), "tie_word_embeddings=True is not supported"),
    "activation": (edit_config(hidden_act="gelu"), "hidden_act='gelu' is not supported, only 'silu'"),
    "uneven experts": (edit_config(num_local_experts=[1, 3]), "different numbers of experts"),
    "no layer list": (edit_config(attn_type_list=None), "needs attn_type_list"),
    "short layer list": (edit_config(attn_type_list=[0, 1]), "for 8 layers, got"),
    "no width": (edit_config(hidden_size=None), "config key hidden_size needs int, got None"),
    "heads": (edit_config(num_key_value_heads=3), "model.heads=4 must be divisible by model.kv_heads=3"),
    "eps": (edit_config(rms_norm_eps="abc"), "key rms_norm_eps needs float, got 'abc'"),
    "alpha": (edit_config(layernorm_mlp_alpha=None), "key layernorm_mlp_alpha needs float, got None"),
    "no residual": (edit_config(layernorm_mlp_alpha=0), "layernorm_mlp_alpha or mlp_alpha_factor is 0: .* not supported"),
    "rope": (edit_config(rope_parameters=[]), r"key rope_parameters needs dict, got \[\]"),
    "head size": (edit_config(head_dim="16"), "key head_dim needs int, got '16'"),
    "no heads": (edit_config(num_attention_heads=0, head_dim=None), "model.heads=0 must be positive"),
    "layer list": (edit_config(attn_type_list=[[0]] * 8), r"for 8 layers, got \[\[0\]"),
    "context": (edit_config(max_position_embeddings="8192"), "key max_position_embeddings needs int, got '8192'"),
    "experts": (edit_config(num_local_experts=60_000), "has 131 tensors, but its config.json needs more than 1440000"),
    "too many experts": (edit_config(num_local_experts=10**12), "model.experts=1000000000000 must be at most 65,536"),
    "many digits": (edit_config(rope_theta=10**400), "key rope_theta needs float, got 1000"),
    "deep": (lambda d: (d / "config.json").write_text("[" * 10**5), "cannot be read as JSON: nested deeper than 64"),
    "header length": (edit_header(lambda h: None, length=2**63), "its header ends at byte 9223372036854775816 of"),
    "header": (edit_header(lambda h: h.update({NORM: [1]})), f"damaged: tensor {NORM} needs dtype, .* has \\[1\\]"),
    "offsets": (edit_header(lambda h: h[NORM].update(data_offsets="ab")), f"damaged: tensor {NORM} needs .*'ab'"),
    "negative": (edit_header(lambda h: h[NORM].update(data_offsets=[-48, 0])), f"damaged: tensor {NORM} needs "),
    "shape": (edit_header(lambda h: h[NORM].update(shape=["12"])), f"damaged: tensor {NORM} needs "),
    "dtype": (edit_header(lambda h: h[NORM].update(dtype="F7")), f"tensor {NORM} has dtype F7; only "),
    "no dtype": (edit_header(lambda h: h[NORM].update(dtype=["F32"])), f"damaged: tensor {NORM} needs "),
    "past the end": (edit_header(lambda h: h[NORM].update(data_offsets=[2**60, 2**60 + 48])), f"truncated: {NORM} ends at"),
    "overlap": (edit_header(lambda h: h[NORM].update(data_offsets=[0, 48])), f"bytes of tensors .*{NORM}.* overlap"),
    "odd stack": (edit_header(lambda h: h.update({STACK: {"dtype": "F32", "shape": [3, 1, 0], "data_offsets": [0, 0]}})),
                  "has unknown .*gate_up_proj"),
    "index outside": (index(lambda names: {names[0]: "../model.safetensors"}), "only files in the same directory"),
    "index absolute": (index(lambda names: {names[0]: "/etc/passwd"}), "only files in the same directory"),
    "index of no file": (index(lambda names: {names[0]: "model-2.safetensors"}), "2.safetensors', which does not exist"),
    "index of no tensor": (index(lambda names: {"model.phantom": "model-1.safetensors"}), "do not contain: model.phantom"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_reported_in_one_line_and_leave_no_files(tmp_path, mistake):
    apply, message = MISTAKES[mistake]
    write_released(tmp_path / "hf", SMALL)
    apply(tmp_path / "hf")
    with pytest.raises(ConfigError, match=message) as caught:
        convert.from_hf(tmp_path / "hf", tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_wrong_paths_and_options(tmp_path):
    write_released(tmp_path / "hf", SMALL)
    hf, new = tmp_path / "hf", tmp_path / "new"
    for call, message in ((lambda: convert.from_hf(tmp_path / "none", new), "is not a directory"),
                          (lambda: convert.from_hf(tmp_path, new), "neither a workdir .* nor a Hugging Face"),
                          (lambda: convert.from_hf(hf, hf), "exists and is not empty"),
                          (lambda: convert.to_hf(hf, new, "stock"), "dialect 'stock' is none of"),
                          (lambda: convert.to_hf(hf, new, shard_bytes=0), "shard-bytes 0 must be positive"),
                          (lambda: convert.to_hf(hf, new, dtype="int8"), "dtype 'int8' is none of")):
        with pytest.raises(ConfigError, match=message):
            call()
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="contains no saved step"):
        convert.open_source(tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "hf"]


def test_a_workdir_with_the_config_of_another_model_is_refused(tmp_path):
    write_released(tmp_path / "hf", SMALL)
    run = convert.from_hf(tmp_path / "hf", tmp_path / "run", progress=False)
    arguments = json.loads((run / "config.json").read_text())["model"]
    (run / "config.json").write_text(json.dumps({"model": arguments | {"vocab": 20}}))
    with pytest.raises(ConfigError, match="misshapen embed_WD .*, head_WD"):
        convert.to_hf(run, tmp_path / "x", progress=False)


def test_an_interrupted_conversion_leaves_no_files(tmp_path, monkeypatch):
    write_released(tmp_path / "hf", SMALL)
    monkeypatch.setattr(convert.ReleasedSource, "read", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for call in (convert.from_hf, convert.to_hf):
        with pytest.raises(KeyboardInterrupt):
            call(tmp_path / "hf", tmp_path / "out", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_failed_write_is_reported_in_one_line_and_leaves_no_files(tmp_path):
    write_released(tmp_path / "hf", dataclasses.replace(SMALL, vocab=4000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))         # like a full disk
    try:
        with pytest.raises(ConfigError, match=r"out cannot be written: .*embed_WD") as caught:
            convert.from_hf(tmp_path / "hf", tmp_path / "out", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_files_of_a_killed_conversion_are_removed(tmp_path):
    write_released(tmp_path / "hf", SMALL)
    done = subprocess.Popen(["true"])
    done.wait()
    names = {f"out.partial-{done.pid}": False, f"out.partial-{os.getpid()}": False, f"out.partial-{os.getppid()}": True,
             "out.partial-mine": True, f"other.partial-{done.pid}": True}
    for name in names:
        (tmp_path / name).mkdir()
    convert.to_hf(tmp_path / "hf", tmp_path / "out", progress=False)
    assert {name: (tmp_path / name).exists() for name in names} == names


@pytest.mark.parametrize("aux, coefficient", [("hf", 0.02), ("switch", 0.01), ("paper", 0.02 / 18)])
def test_the_balance_loss_keeps_its_weight(aux, coefficient):
    """Balanced, "hf" has the value top_k = 2, "switch" 1, "paper" 1/9. transformers' default weight is 0.001."""
    model = dataclasses.replace(SMALL, aux=aux, aux_weight=0.02)
    for dialect in convert.DIALECTS:
        text = hf_config.write_model(model, dialect, "float32", {})
        assert text["router_aux_loss_coef"] == pytest.approx(coefficient)
        back = config.Model(**hf_config.read_model(text, "x"))
        assert (back.aux, back.aux_weight) == ("hf", text["router_aux_loss_coef"])
        assert hf_config.write_model(back, dialect, "float32", {}) == text
    del text["router_aux_loss_coef"]
    assert hf_config.read_model(text, "x")["aux_weight"] == 0.001


def test_another_head_norm_eps_cannot_be_released(tmp_path):
    write_released(tmp_path / "hf", SMALL)
    run = convert.from_hf(tmp_path / "hf", tmp_path / "run", progress=False)
    other = dataclasses.replace(convert.open_source(run).model, head_norm_eps=1e-5)
    (run / "config.json").write_text(json.dumps({"model": dataclasses.asdict(other)}))
    with pytest.raises(ConfigError, match="head_norm_eps=1e-05 cannot be expressed"):
        convert.to_hf(run, tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()
