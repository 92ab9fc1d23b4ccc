"""mmx, mmx.torch and transformers compute the same logits, on random models of several shapes and after conversion.

The oracle is `faithful`: transformers changed to compute the function of the released weights, by code that shares
nothing with mmx.torch.
"""
import dataclasses
import importlib
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import faithful
from PIL import Image
from safetensors.numpy import load_file, save_file

import mmx.torch
from mmx import config
from mmx.checkpoints import convert, hf_layout, manager, run_config, safetensors
from mmx.config import ConfigError
from mmx.data import images
from mmx.inference.forward import forward
from mmx.inference.verify import verify
from mmx.model import abstract_params

ORACLES = Path(__file__).parent / "oracles"
SHAPES = {      # name: (faithful.random_model's arguments, length)
    "quarter_rotary": ({"pattern": "LLLS", "heads": 4, "kv": 2, "head_dim": 16, "rotary": 4}, 37),
    "five_heads_one_kv": ({"pattern": "LSLS", "heads": 5, "kv": 1, "head_dim": 8, "rotary": 4, "hidden": 28}, 21),
    "six_heads_all_kv_full_rotary": ({"pattern": "LLS", "heads": 6, "kv": 6, "rotary": 8, "theta": 1e7}, 33),
    "softmax_first": ({"pattern": "SLLL", "heads": 8, "kv": 4, "head_dim": 4, "rotary": 2, "top_k": 3}, 17),
    "softmax_alone": ({"pattern": "SS", "heads": 4, "kv": 4, "rotary": 2, "experts": 2, "top_k": 1}, 5),
}
EXPORTS = {     # name: changes of EXPORT
    "power_of_two": {},
    "six_heads": {"heads": 6, "kv_heads": 1, "rotary_dim": 4},
    "six_heads_full_rotary": {"heads": 6, "kv_heads": 6, "rotary_dim": 16},
}
EXPORT = config.Model(vocab=61, dim=32, layers=2, pattern="LS", heads=4, kv_heads=2, head_dim=16, rotary_dim=8,
                      experts=4, expert_dim=24, beta_moe=0.75)
ATOL = 2e-5


def tokens(vocab, length, batch=2, seed=7):
    return np.random.default_rng(seed).integers(vocab, size=(batch, length))


def mmx_logits(path, tokens_BT):
    return forward(convert.load(path, "float32"), tokens_BT)


@pytest.fixture(scope="module", params=SHAPES)
def saved(request, tmp_path_factory):
    """A random model saved by transformers: (directory, tokens, logits)."""
    shape, length = SHAPES[request.param]
    model = faithful.make_released(faithful.random_model(**shape))
    directory = tmp_path_factory.mktemp(request.param) / "hf"
    model.save_pretrained(directory)
    tokens_BT = tokens(model.config.vocab_size, length)
    return directory, tokens_BT, faithful.logits(model, tokens_BT)


def test_mmx_loads_a_transformers_checkpoint(saved):
    directory, tokens_BT, logits_BTW = saved
    np.testing.assert_allclose(mmx_logits(directory, tokens_BT), logits_BTW, atol=ATOL, rtol=0)


def test_mmx_torch_loads_a_transformers_checkpoint(saved):
    directory, tokens_BT, logits_BTW = saved
    np.testing.assert_allclose(mmx.torch.logits(mmx.torch.load(directory), tokens_BT), logits_BTW, atol=ATOL, rtol=0)


@pytest.mark.parametrize("dialect", convert.DIALECTS)
def test_conversion_to_mmx_and_back_keeps_the_logits(saved, tmp_path, dialect):
    directory, tokens_BT, logits_BTW = saved
    convert.from_hf(directory, tmp_path / "run", progress=False)
    back = convert.to_hf(tmp_path / "run", tmp_path / "back", dialect, progress=False)
    np.testing.assert_allclose(mmx.torch.logits(mmx.torch.load(back), tokens_BT), logits_BTW, atol=ATOL, rtol=0)


def random_params(model, seed=0):
    """Random parameters of an mmx model, at the scale of `faithful.random_model`."""
    rng = np.random.default_rng(seed)

    def values(path, leaf):
        name = path[-1].key
        if "norm" in name:
            return jnp.asarray(1 + 0.25 * rng.standard_normal(leaf.shape), jnp.float32)
        fan_in = {"embed_WD": 1, "w2_EFD": model.expert_dim, "out_HVD": model.heads * model.head_dim}.get(name, model.dim)
        return jnp.asarray(rng.standard_normal(leaf.shape) * 1.2 / np.sqrt(fan_in), jnp.float32)

    return jax.tree_util.tree_map_with_path(values, abstract_params(model))


@pytest.fixture(scope="module", params=EXPORTS)
def export(request, tmp_path_factory):
    """An mmx model with random parameters: (config, workdir, directory of its export, tokens)."""
    model, folder = dataclasses.replace(EXPORT, **EXPORTS[request.param]), tmp_path_factory.mktemp(request.param)
    run_config.check_config(folder / "run", config.Experiment(model=model))
    checkpoints = manager.Checkpoints(folder / "run", every=1, keep=1)
    checkpoints.save(0, random_params(model), {"step": jnp.zeros(())}, {})
    checkpoints.close()
    return model, folder / "run", convert.to_hf(folder / "run", folder / "hf", progress=False), tokens(61, 43)


def test_transformers_loads_an_export(export):
    _, run, directory, tokens_BT = export
    logits_BTW = mmx_logits(run, tokens_BT)
    np.testing.assert_allclose(mmx.torch.logits(mmx.torch.load(directory), tokens_BT), logits_BTW, atol=ATOL, rtol=0)
    stock = transformers.MiniMaxForCausalLM.from_pretrained(directory, attn_implementation="eager")
    np.testing.assert_allclose(faithful.logits(faithful.make_released(stock), tokens_BT), logits_BTW, atol=ATOL, rtol=0)


def test_stock_transformers_differs_by_partial_rope_only(export):
    """Stock transformers reads the decay from the export's buffers, but rotates whole heads."""
    model, run, directory, tokens_BT = export
    stock = transformers.MiniMaxForCausalLM.from_pretrained(directory)
    difference = np.abs(faithful.logits(stock, tokens_BT) - mmx_logits(run, tokens_BT)).max()
    print(f"{model.heads} heads, rotary {model.rotary_dim} of {model.head_dim}: stock differs by {difference:.2g}")
    if model.rotary_dim == model.head_dim:
        assert difference < ATOL
    else:
        assert difference > 0.01


def test_export_contains_the_decay_where_the_stock_decay_differs(export):
    model, _, directory, _ = export
    names = safetensors.read_header(directory / "model.safetensors").keys()
    assert not any(name.endswith("slope_rate") for name in names)       # never read as a parameter
    raw = (directory / "model.safetensors").read_bytes()
    assert (b"slope_rate" in raw) == (model.heads == 6)


def test_verify_returns_the_largest_difference(export, tmp_path):
    model, run, directory, _ = export
    assert verify(run, directory) == {"mmx": 0}
    by_torch = verify(run, directory, torch=True)
    assert 0 < by_torch["mmx.torch"] < ATOL
    assert (by_torch["stock transformers"] < ATOL) == (model.rotary_dim == model.head_dim)
    convert.to_hf(run, tmp_path / "half", dtype="bfloat16", progress=False)
    assert 1e-3 < verify(run, tmp_path / "half")["mmx"] < 2


@pytest.mark.parametrize("name", ["c_partial_orig", "a_7to1_hf"])
def test_mmx_torch_on_the_oracles(name):
    oracle = np.load(ORACLES / name / "oracle.npz")
    model = mmx.torch.load(ORACLES / name / "ckpt")
    np.testing.assert_allclose(mmx.torch.logits(model, oracle["input_ids"]), oracle["logits"], atol=ATOL, rtol=0)
    prompt = torch.as_tensor(oracle["prompt"])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False)
    np.testing.assert_array_equal(out[:, prompt.shape[1]:], oracle["greedy_nocache"])


def test_in_bfloat16_decays_and_states_stay_float32():
    directory, prompt = ORACLES / "c_partial_orig" / "ckpt", tokens(113, 40)
    whole, half = mmx.torch.load(directory), mmx.torch.load(directory, dtype=torch.bfloat16, experts_implementation="eager")
    for layer, kind in enumerate(convert.load(directory).config.layer_kinds):
        if kind == "L":
            in_bfloat16, in_float32 = (model.model.layers[layer].self_attn for model in (half, whole))
            for name in hf_layout.DECAY_BUFFERS:
                torch.testing.assert_close(getattr(in_bfloat16, name), getattr(in_float32, name), rtol=0, atol=0)
    cache = half(torch.as_tensor(prompt), use_cache=True).past_key_values
    assert cache.get_linear_cache(0).dtype == torch.float32
    error = mmx.torch.logits(half, prompt) - mmx.torch.logits(whole, prompt)
    assert np.linalg.norm(error) < 0.1 * np.linalg.norm(mmx.torch.logits(whole, prompt))
    assert half.generate(torch.as_tensor(prompt), max_new_tokens=4, do_sample=False).shape[1] == prompt.shape[1] + 4


# ---- MiniMax-VL-01: LlavaNext around the text model, which mmx.torch does not support ----

VISIONS = {     # name: (faithful.random_vision_model's arguments, the images' sizes)
    "five_heads": ({"grids": ((1, 1), (1, 2), (2, 1), (2, 2)), "vision": (24, 40, 3, 3), "seed": 3, "pattern": "LS",
                    "heads": 5, "kv": 1, "hidden": 28}, ((24, 24), (17, 61))),
    "many_patches": ({"grids": ((1, 1), (1, 3), (3, 2)), "vision": (16, 24, 1, 4), "tile": 20, "patch": 4, "seed": 4,
                      "pattern": "LS"}, ((90, 14), (7, 33), (41, 40))),
}


def test_vision_models_agree_in_both_directions(tmp_path):
    """Two or three images in one prompt: mmx runs a checkpoint of transformers, transformers runs its export by mmx."""
    for name, (arguments, sizes) in VISIONS.items():
        model, rng = faithful.random_vision_model(**arguments), np.random.default_rng(arguments["seed"])
        model.save_pretrained(tmp_path / name)
        loaded = convert.load(tmp_path / name)
        v = loaded.config.vision
        pictures = [images.prepare(v, Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))) for size in sizes]
        ids = [rng.integers(0, v.token, 4)]
        for picture in pictures:
            ids += [np.full(len(picture.patch_code_T), v.token), rng.integers(0, v.token, 3)]
        tokens_BT = np.concatenate(ids)[None]
        convert.to_hf(tmp_path / name, tmp_path / f"{name}-back", progress=False)
        again = transformers.LlavaNextForConditionalGeneration.from_pretrained(
            tmp_path / f"{name}-back", attn_implementation="eager")
        logits_BTW = forward(loaded, tokens_BT, images=[pictures])
        for torch_model, origin in ((model, "transformers"), (again, "export")):
            with faithful.released_vision(torch_model), torch.no_grad():
                want_BTW = torch_model(
                    input_ids=torch.as_tensor(tokens_BT), image_sizes=torch.tensor(sizes), use_cache=False,
                    pixel_values=torch.nn.utils.rnn.pad_sequence(
                        [torch.as_tensor(picture.pixels_IYXZ).movedim(-1, 1) for picture in pictures], batch_first=True)).logits
            np.testing.assert_allclose(logits_BTW, want_BTW, atol=ATOL, rtol=0, err_msg=f"{name}, {origin}")
    with pytest.raises(ConfigError, match="contains a vision model: mmx.torch supports text models only"):
        mmx.torch.load(tmp_path / name)


def test_load_does_not_change_stock_models():
    directory = ORACLES / "c_partial_orig" / "ckpt"
    tokens_BT = tokens(113, 20)
    before = transformers.MiniMaxForCausalLM.from_pretrained(directory)
    logits_BTW = faithful.logits(before, tokens_BT)
    assert np.abs(mmx.torch.logits(mmx.torch.load(directory), tokens_BT) - logits_BTW).max() > 0.1
    np.testing.assert_array_equal(faithful.logits(before, tokens_BT), logits_BTW)
    after = transformers.MiniMaxForCausalLM.from_pretrained(directory)
    np.testing.assert_array_equal(faithful.logits(after, tokens_BT), logits_BTW)


def test_mmx_torch_saves_what_it_loads(export, tmp_path):
    _, _, directory, tokens_BT = export
    model = mmx.torch.load(directory)
    model.save_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(mmx.torch.logits(mmx.torch.load(tmp_path / "again"), tokens_BT),
                                  mmx.torch.logits(model, tokens_BT))


@pytest.mark.case(11)
def test_the_index_wins_over_a_stray_file(export, tmp_path):
    _, run, directory, _ = export
    weights = dict(mmx.torch.load(directory).named_parameters())
    shards = convert.to_hf(run, tmp_path / "shards", shard_bytes=20_000, progress=False)
    stray = {name: np.zeros_like(tensor) for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(stray, shards / "model.safetensors")
    for load in (mmx.torch.load, mmx.torch.load_stock):
        for name, tensor in load(shards).named_parameters():
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    with pytest.raises(ConfigError, match="has no metadata, which transformers needs"):
        mmx.torch.load(shards)


@pytest.mark.case(14)
def test_a_value_too_large_for_the_dtype_is_refused(export, tmp_path):
    _, _, directory, _ = export
    shutil.copytree(directory, tmp_path / "large")
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e6
    save_file(tensors, tmp_path / "large" / "model.safetensors")
    with pytest.raises(ConfigError, match="lm_head.weight contains values too large for torch.float16"):
        mmx.torch.load(tmp_path / "large", dtype=torch.float16)


def test_a_workdir_is_refused_with_the_command_that_exports_it(export):
    _, run, *_ = export
    with pytest.raises(ConfigError, match="is an mmx workdir: export it first, by mmx convert to-hf --checkpoint"):
        mmx.torch.load(run)


def test_without_torch_the_error_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "mmx.torch")
    with pytest.raises(ImportError, match=r"needs torch and transformers .*pip install") as caught:
        importlib.import_module("mmx.torch")
    assert "\n" not in str(caught.value)
