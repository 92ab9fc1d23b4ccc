"""The vision model: agreement with the oracle of MiniMax-VL-01, tensor names, conversion, images in prompts, mistakes."""
import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import mmx
from mmx import cli, config
from mmx.checkpoints import convert, hf_config, hf_layout
from mmx.config import ConfigError
from mmx.data import images
from mmx.inference import engine
from mmx.kernels.int8 import Int8
from mmx.model import Model, abstract_params

ORACLE = Path(__file__).parent / "oracles" / "vl_tiny"
WANT = dict(np.load(ORACLE / "oracle.npz"))
SIZES = [tuple(WANT[f"floor_{i}_size_hw"]) for i in range(5)]


@pytest.fixture(scope="module")
def loaded():
    return mmx.load(ORACLE / "ckpt")


def oracle_images(v):
    return [images.PreparedImage(np.moveaxis(WANT[f"{i}_pixel_values"], 1, -1), images.patch_codes(v, *map(int, size)))
            for i, size in enumerate(SIZES)]


@functools.cache
def batch():
    """The oracle's five prompts, padded on the right, and the mask of real tokens."""
    rows = [WANT[f"floor_{i}_input_ids"][0] for i in range(5)]
    tokens_BT, mask_BT = np.zeros((2, 5, -(-max(map(len, rows)) // 8) * 8), np.int32)
    for b, row in enumerate(rows):
        tokens_BT[b, :len(row)], mask_BT[b, :len(row)] = row, 1
    return tokens_BT, mask_BT


def test_oracle_counts_and_features(loaded):
    """The tiles of all five images are encoded at once. An image's features are the rows that its patch codes select."""
    v, prepared = loaded.config.vision, oracle_images(loaded.config.vision)
    assert [images.token_count(v, *size) for size in SIZES] == [WANT[f"floor_{i}_n_tokens"] for i in range(5)]
    for i, size in enumerate(SIZES):
        np.testing.assert_array_equal(np.multiply(images.best_grid(v, *size), v.tile), WANT[f"floor_{i}_best_res_hw"])
        assert len(prepared[i].pixels_IYXZ) == 1 + np.prod(images.best_grid(v, *size))
    patch_code_BT, pixels_bIYXZ = images.collate(v, batch()[0], [[image] for image in prepared])
    newline_D, (patches_MD,) = engine.encode_images(loaded.config, loaded.params, pixels_bIYXZ)
    features_MD = np.concatenate([newline_D[None], patches_MD])
    for i in range(5):
        patch_code_T = patch_code_BT[i][patch_code_BT[i] > 0]
        np.testing.assert_allclose(features_MD[patch_code_T - 1], WANT[f"floor_{i}_image_features"], atol=2e-5, rtol=0)


def test_oracle_logits(loaded):
    tokens_BT, mask_BT = batch()
    logits_BTW = mmx.forward(loaded, tokens_BT, mask_BT, [[image] for image in oracle_images(loaded.config.vision)])
    for b, count in enumerate(mask_BT.sum(1)):
        np.testing.assert_allclose(logits_BTW[b, count - 7:count], WANT[f"floor_{b}_last_logits"][0], atol=2e-5, rtol=0)


# ---- names and conversion ----

SMALL = config.Model(vocab=264, dim=12, layers=2, pattern="LS", heads=6, kv_heads=2, head_dim=8, rotary_dim=4, experts=3,
                     expert_dim=10, vision=config.Vision(2, 8, 2, 16, 28, 14, ((1, 1), (1, 2), (2, 1)), token=259))


def write_released(directory, model=SMALL, dialect="released", seed=0):
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors = {name: rng.standard_normal(leaf.tensor_shape).astype(np.float32) / 4
               for leaf in hf_layout.leaves(model) for _, name in leaf.tensors()}
    save_file(tensors, directory / "model.safetensors")
    text = hf_config.write_model(model, dialect, "float32", convert.BYTE_IDS)
    (directory / "config.json").write_text(json.dumps(text))
    return tensors


def test_vl_01_has_the_released_names():
    model = config.Model(vocab=200_064, dim=6_144, layers=80, heads=64, kv_heads=8, head_dim=128, rotary_dim=64, experts=32,
                         expert_dim=9_216, vision=config.Vision(layers=24))
    shapes = {name: leaf.tensor_shape for leaf in hf_layout.leaves(model) for _, name in leaf.tensors()}
    assert len(shapes) == 8637 == hf_layout.tensor_count(model)
    digest = hashlib.sha256("\n".join(sorted(shapes)).encode()).hexdigest()
    assert digest == "d0caf1b714cdfc4caa65b56cbec591668d77b0e2a5d6cf3b5af169531311c886"
    assert shapes["vision_tower.vision_model.embeddings.patch_embedding.weight"] == (1024, 3, 14, 14)
    assert shapes["vision_tower.vision_model.embeddings.position_embedding.weight"] == (577, 1024)
    assert shapes["multi_modal_projector.linear_1.weight"] == (6144, 1024)


def test_abstract_parameters_match_those_that_init_creates():
    created = jax.eval_shape(Model(SMALL).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert jax.tree.map(lambda x: x.shape, created) == jax.tree.map(lambda x: x.shape, abstract_params(SMALL))
    text = dataclasses.replace(SMALL, vision=config.Vision())
    bare = jax.eval_shape(Model(text).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert created.keys() - bare.keys() == {"vision"} and jax.tree.structure(bare) == jax.tree.structure(
        {name: leaf for name, leaf in created.items() if name != "vision"})


@pytest.mark.parametrize("dialect", convert.DIALECTS)
def test_round_trip_is_bit_exact(tmp_path, monkeypatch, dialect):
    monkeypatch.setattr(hf_layout, "SLICE_BYTES", 500)
    tensors = write_released(tmp_path / "hf")
    convert.from_hf(tmp_path / "hf", tmp_path / "run", progress=False)
    convert.to_hf(tmp_path / "run", tmp_path / "back", dialect, progress=False)
    back = load_file(tmp_path / "back" / "model.safetensors")
    extra = {f"language_model.model.layers.0.self_attn.{name}" for name in hf_layout.DECAY_BUFFERS}     # for six heads
    assert back.keys() - tensors.keys() == (extra if dialect == "transformers" else set())
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
    assert convert.open_source(tmp_path / "run").model == convert.open_source(tmp_path / "back").model
    assert convert.open_source(tmp_path / "hf").model == dataclasses.replace(SMALL, aux="hf", aux_weight=0.005)


def test_names_of_transformers_map_to_the_released_names(tmp_path, loaded):
    """transformers omits `vision_model.` from names and saves an unused norm. The index of its shards also uses its names."""
    convert.to_hf(ORACLE / "ckpt", tmp_path / "hf", "released", progress=False)
    theirs, ours = load_file(ORACLE / "ckpt" / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert {name.replace("vision_model.", "") for name in ours} == {
        name for name in theirs if not name.endswith(hf_layout.DECAY_BUFFERS) and "post_layernorm" not in name}
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name.replace("vision_model.", "")])
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "config.json").write_bytes((ORACLE / "ckpt" / "config.json").read_bytes())
    (tmp_path / "sharded" / "model-1.safetensors").write_bytes((ORACLE / "ckpt" / "model.safetensors").read_bytes())
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(theirs, "model-1.safetensors")}))
    assert convert.open_source(tmp_path / "sharded").model == convert.open_source(tmp_path / "hf").model
    found = convert.open_source(tmp_path / "sharded").model
    assert (found.vision.token, found.vision.tile, found.vision.patch, found.pattern) == (90, 28, 7, "LLLS")
    assert found.vision.grids == config.schema.GRIDS


def test_the_released_config():
    text = hf_config.write_model(SMALL, "released", "bfloat16", convert.BYTE_IDS)
    assert (text["model_type"], text["text_config"]["model_type"]) == ("minimax_vl_01", "minimax_text_01")
    assert text["image_grid_pinpoints"] == [[28, 28], [28, 56], [56, 28]] and text["image_token_index"] == 259
    assert text["vision_config"]["hidden_act"] == "gelu" and text["vision_feature_layer"] == -1
    with pytest.raises(ConfigError, match="cannot be expressed in the released form"):
        hf_config.write_model(dataclasses.replace(SMALL, vision=dataclasses.replace(SMALL.vision, grids=())), "released",
                             "float32", {})


def test_token_ids_are_read_from_the_text_config(tmp_path):
    write_released(tmp_path / "hf")
    text = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({k: v for k, v in text.items() if k not in convert.BYTE_IDS}))
    assert convert.open_source(tmp_path / "hf").tokenizer == "bytes"


def test_int8_does_not_quantize_the_vision_tower(loaded):
    quantized = mmx.load(ORACLE / "ckpt", weights_dtype="int8").params
    assert isinstance(quantized["groups"]["layer_0"]["mixer"]["q_DHK"], Int8)
    jax.tree.map(np.testing.assert_array_equal, quantized["vision"], loaded.params["vision"])


@pytest.mark.parametrize("change, message", [
    ({"model_type": "llava"}, "model_type='llava' is not supported, only 'minimax_vl_01' or 'llava_next'"),
    ({"vision_feature_layer": -2}, "vision_feature_layer=-2 is not supported, only -1"),
    ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full' is not supported"),
    ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu' is not supported"),
    ({"image_grid_pinpoints": []}, r"image_grid_pinpoints=\[\] must be pairs"),
    ({"image_grid_pinpoints": [[28, 30]]}, "must be pairs of height and width, multiples of 28"),
    ({"image_token_index": None}, "image_token_index needs int, got None"),
    ({"image_token_index": 264}, "model.vision.token=264 must be a token id"),
    ({"text_config": None}, "text_config needs dict, got None"),
    ({"vision_config": {"hidden_act": "quick_gelu"}}, "vision_config.hidden_act='quick_gelu' is not supported"),
    ({"vision_config": {"hidden_act": "gelu"}}, "num_hidden_layers is missing"),
])
def test_unsupported_configs_are_refused(change, message):
    text = hf_config.write_model(SMALL, "released", "float32", {})
    with pytest.raises(ConfigError, match=message) as caught:
        hf_config.read_model(text | change, "config.json")
    assert "\n" not in str(caught.value)


# ---- images in prompts ----

def test_text_alone_runs_the_program_of_a_text_model(loaded):
    """Without images, the model needs no vision parameters."""
    params = {name: leaf for name, leaf in loaded.params.items() if name != "vision"}
    programs = {str(jax.make_jaxpr(functools.partial(Model(c).apply, {"params": params}))(batch()[0]))
                for c in (loaded.config, dataclasses.replace(loaded.config, vision=config.Vision()))}
    assert len(programs) == 1


def prompt(v, seed, counts=(3, 2, 4), sizes=((56, 56), (28, 56))):
    """Random token ids (`counts` before, between and after the images), and random images of these sizes."""
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    ids = [rng.integers(0, v.token, counts[0])]
    for size, count in zip(sizes, counts[1:]):
        ids += [np.full(images.token_count(v, *size), v.token), rng.integers(0, v.token, count)]
    return np.concatenate(ids).astype(np.int32), pictures


def generate_ids(loaded, requests, prefix=None):
    """(ids_BT, logprobs_BT) that the engine generates for requests which end within one block of steps."""
    pieces = sorted(engine.stream(loaded, requests, prefix=prefix, rows=1), key=lambda piece: piece.request)
    return np.stack([piece.ids_T for piece in pieces]), np.stack([piece.logprobs_T for piece in pieces])


def test_generation_equals_recomputation(loaded, monkeypatch):
    """Two prompts of two images are prefilled in chunks. Then the first image is in a prefix, the second after it."""
    monkeypatch.setattr(engine, "PREFILL_CHUNKS", (32,))
    prompts, pairs = zip(*(prompt(loaded.config.vision, seed) for seed in range(2)))
    T, steps = len(prompts[0]), 5
    requests = [engine.Request(ids_T, steps, images=pair) for ids_T, pair in zip(prompts, pairs)]
    new_BT, logprobs_BT = generate_ids(loaded, requests)
    np.testing.assert_array_equal(mmx.generate(loaded, np.stack(prompts), steps=steps, images=pairs, rows=1), new_BT)
    full_BT = np.concatenate([np.stack(prompts), new_BT], axis=1)
    logits_BTW = np.asarray(mmx.forward(loaded, full_BT, None, pairs)[:, T - 1:-1])
    np.testing.assert_array_equal(new_BT, np.argmax(logits_BTW, axis=-1))
    want_BT = np.take_along_axis(jax.nn.log_softmax(logits_BTW), new_BT[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(logprobs_BT, want_BT, atol=2e-5, rtol=0)
    swapped_BTW = mmx.forward(loaded, full_BT, None, pairs[::-1])[:, T - 1:-1]
    assert np.abs(swapped_BTW - logits_BTW).max() > 0.1
    begin = T - 4 - images.token_count(loaded.config.vision, 28, 56)       # of the second image
    prefix = engine.make_prefix(loaded, prompts[0][:begin], images=pairs[0][:1])
    ids_BT, logprobs_BT = generate_ids(loaded, [engine.Request(prompts[0][begin:], steps, images=pairs[0][1:])], prefix)
    np.testing.assert_array_equal(ids_BT, new_BT[:1])
    np.testing.assert_allclose(logprobs_BT, want_BT[:1], atol=2e-5, rtol=0)


def test_images_must_match_their_tokens(loaded):
    v = loaded.config.vision
    ids_T, pictures = prompt(v, 0)
    for call, message in (
            (lambda: mmx.forward(loaded, ids_T[None], images=[pictures[:1]]),
             r"row 0 contains the image token 90 .* \(1\) need"),
            (lambda: mmx.forward(loaded, ids_T[None], images=[[]]), r"its images \(0\) need 0"),
            (lambda: mmx.forward(loaded, ids_T[None], images=[pictures, pictures]), "a list for each of 1 rows, got 2"),
            (lambda: mmx.generate(loaded, ids_T[None], steps=1, images=[pictures, pictures]), "each of 1 prompts, got 2"),
            (lambda: mmx.generate(loaded, ids_T[None, :-4], steps=1, images=[pictures]), "the prompt ends in an image"),
            (lambda: mmx.forward(loaded, ids_T[None], images=[[3]]),
             "an image must be the path of a file or a PIL.Image, not int")):
        with pytest.raises(ConfigError, match=message):
            call()


def test_tiles_are_padded_to_few_sizes(loaded):
    v = loaded.config.vision
    assert [images.padded_tiles(n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 97)] == [
        1, 1, 2, 3, 4, 6, 6, 8, 12, 12, 16, 128]
    for sizes, tiles in (((), 1), (((28, 28),), 2), (((20, 30), (9, 70)), 8)):
        ids_T, pictures = prompt(v, 0, (3, *[2] * len(sizes)), sizes)
        assert images.collate(v, ids_T[None], [images.prepare_all(v, pictures)])[1].shape == (1, tiles, 28, 28, 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a small random model that has the byte tokenizer, and two images."""
    folder = tmp_path_factory.mktemp("small")
    write_released(folder / "hf")
    for name, size in (("a.png", (30, 28)), ("b.png", (60, 28))):
        Image.new("RGB", size, (200, 40, 90)).save(folder / name)
    return folder


def run_generate(folder, capsys, *arguments):
    """The exit code and the captured output of `mmx generate`."""
    code = cli.main(["generate", "--checkpoint", str(folder / "hf"), "--steps", "8", "--temperature", "0", *arguments])
    return code, capsys.readouterr()


def test_the_command_line_accepts_images(checkpoint, capsys):
    a, b = str(checkpoint / "a.png"), str(checkpoint / "b.png")
    code, output = run_generate(checkpoint, capsys, "--json", "--image", a, "--image", b, "--prompt", "<image> what?",
                                "--prompt", "See <image>: ")
    rows = [json.loads(line) for line in output.out.splitlines()]
    assert code == 0 and [row["prompt"] for row in rows] == ["<image> what?", "See <image>: "]
    loaded = mmx.load(checkpoint / "hf")
    texts = mmx.generate(loaded, ["<image> what?", "See <image>: "], steps=8, images=[[a], [Image.open(b)]])
    assert [row["text"] for row in rows] == texts


@pytest.mark.parametrize("arguments, message", [
    (["--prompt", "what?", "--image", "a.png"], "0 <image> placeholders in the prompt, but 1 image given"),
    (["--prompt", "<image><image> what?", "--image", "a.png"], "2 <image> placeholders in the prompt, but 1 image given"),
    (["--prompt", "<image> what?"], "1 <image> placeholder in the prompt, but 0 images given"),
    (["--prompt", "<image>", "--image", "a.png"], "the prompt ends in an image: add text after the image"),
    (["--prompt", "<image> what?", "--image", "none.png"], "none.png is missing"),
    (["--prompt", "<image> what?", "--image", "hf/config.json"], "is not in a known image format"),
])
def test_mistakes_of_the_command_line(checkpoint, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(checkpoint)
    code, output = run_generate(checkpoint, capsys, *arguments)
    assert code == 2 and message in output.err and output.err.count("\n") == 1


def test_a_text_model_refuses_images_and_reads_the_placeholder_as_text(checkpoint, tmp_path):
    write_released(tmp_path / "hf", dataclasses.replace(SMALL, vision=config.Vision()))
    text = mmx.load(tmp_path / "hf")
    with pytest.raises(ConfigError, match="this model reads only text"):
        mmx.generate(text, "<image> what?", steps=1, images=[checkpoint / "a.png"])
    with pytest.raises(ConfigError, match="this model reads only text"):
        mmx.forward(text, np.ones((1, 3), int), images=[[]])
    encode = lambda part, continues: np.frombuffer(part.encode(), np.uint8)
    ids_T = images.encode(text.config.vision, "<image> what?", [], encode)
    assert bytes(ids_T) == b"<image> what?"
