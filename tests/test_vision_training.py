"""Training on images: packed rows equal separate ones, a mesh equals one device, a resumed run equals an uninterrupted one."""
import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from mmx import config
from mmx import mesh as meshes
from mmx.analysis.counts import flops_tile
from mmx.checkpoints import convert, hf_config, hf_layout, manager
from mmx.checkpoints import initial as starts
from mmx.config import ConfigError
from mmx.data import encoding, images, packing, pipeline, sources, tokens
from mmx.model import Model, abstract_params, encode_images
from mmx.parallel import sharding
from mmx.training import loop, loss, metrics, optim
from mmx.training import run as training
from mmx.training.run import train
from mmx.training.step import init, train_step

pytestmark = pytest.mark.usefixtures("compiled_once")
T, B = 64, 8
V = config.Vision(layers=2, dim=8, heads=2, hidden=12, tile=8, patch=4, grids=((1, 1), (1, 2), (2, 1)), token=259)
C = config.Model(vocab=264, dim=16, layers=1, pattern="L", heads=8, kv_heads=2, head_dim=4, rotary_dim=2, experts=4,
                 expert_dim=8, init="fan_in", embed_std=1.0, z_weight=0.01, chunk=8, vision=V)
BOTH = dataclasses.replace(C, layers=2, pattern="LS")
SIZES = (8, 8), (8, 16), (20, 9), (5, 5)        # width, height


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Captions, questions about two images, answers that contain an image, and plain text."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i, (width, height) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    lines = []
    for n in range(60):
        one, two = (f"{i}.png" for i in rng.integers(len(SIZES), size=2))
        lines += [{"text": f"<image> number {n}", "images": [one]},
                  {"prompt": "<image> or <image>?", "completion": f" {n}", "images": [one, two]},
                  {"prompt": "Show one.", "completion": "<image>!", "images": [two]}, {"prompt": "1 + 1 = ", "completion": "2"}]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    captions = [{"text": f"<image> number {n}", "images": [f"{'03'[n % 2]}.png"]} for n in range(10, 90)]    # one fills a row
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    return folder


def stream(folder, t, **where):
    return pipeline.stream(config.Data(sources=(str(folder / "a.jsonl"),)), t, vision=V, **where)


def separate(folder, t):
    """Every training document in a separate row."""
    rows, row_images = [], []
    options = encoding.ImageOptions(V, t.contrastive > 0)
    for name, content in sources.documents(str(folder / "a.jsonl"), "train"):
        d = encoding.encode(tokens.tokenizer("bytes"), content, name, options)
        rows.append(packing._make_row([packing.span_arrays(d.ids_T, d.targets_T, 0, len(d.ids_T))], [len(d.ids_T)], t.length))
        row_images.append(images.prepare_all(V, d.images.images if d.images else ()))
    batch = packing.stack(rows)
    return batch | dict(zip(("patch_code", "pixels"), images.collate(V, batch["tokens"], row_images)))


def test_packed_equals_separate(folder):
    """Values and gradients over all documents of an epoch; image tokens are never targets."""
    t = config.Train(batch=len(stream(folder, config.Train(batch=8, length=T))._packed[0]), length=T)
    packed = pipeline.stream(config.Data(sources=(str(folder / "a.jsonl"),), shards=1), t, vision=V).next()
    unpacked = separate(folder, t)
    assert not packed["targets"][packed["weights"] > 0].tolist().count(V.token)
    assert packed["weights"].sum() == unpacked["weights"].sum() and len(unpacked["tokens"]) > 2 * t.batch
    assert packed["segments"].max() > 2
    params = jax.jit(Model(BOTH).init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    step = jax.jit(jax.value_and_grad(lambda params, batch: loss.loss(Model(BOTH), params, batch, 512)[0]))
    rows = len(unpacked["tokens"])     # empty rows pad the packed batch, so that both use one program
    packed = {k: x if k == "pixels" else np.pad(x, [(0, rows - t.batch), (0, 0)]) for k, x in packed.items() if k in unpacked}
    (one, grads), (many, grads_unpacked) = (step(params, batch) for batch in (packed, unpacked))
    np.testing.assert_allclose(one, many, rtol=1e-6)
    assert np.abs(grads["vision"]["patch_YXZJ"]).max() > 1e-4 and np.abs(grads["vision"]["newline_D"]).max() > 1e-4
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), grads, grads_unpacked)


def test_hosts_make_one_batch(folder):
    """Each host has the tiles of its blocks of rows, padded to the same number on all hosts."""
    t = config.Train(batch=B, length=T)
    whole = stream(folder, t, blocks=4, devices_per_block=2)
    parts = [stream(folder, t, host=host, hosts=2, blocks=4, devices_per_block=2) for host in range(2)]
    for _ in range(5):
        batch, halves = whole.next(), [part.next() for part in parts]
        assert batch["pixels"].shape[1] % 2 == 0 and len(batch["pixels"]) == 4
        assert len({int(b.pop("tiles")) for b in (batch, *halves)}) == 1
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), array, err_msg=name)
        blank = (batch["pixels"] == 0).all((2, 3, 4))
        for n, patch_code_BT in enumerate(np.split(batch["patch_code"], 4)):
            assert patch_code_BT.max() < 2 + 4 * (~blank[n]).sum()


TRAIN = config.Train(batch=B, length=T, clip=1.0, loss_chunk=256, contrastive=0.5, ramp=((0, 2),))


def one_step(folder, mesh=None, **changes):
    """Metrics and gradients of a step of two micro-batches, in float64; on a mesh layers are recomputed."""
    c = config.Model(**{**vars(C), "dtype": "float64", "remat": mesh is not None})
    model, optimizer = Model(c), optim.adamw(TRAIN)
    sizes = [sharding.size(mesh, axes) for axes in (sharding.ROWS, sharding.TIME)] if mesh else [1, 1]
    batches = stream(folder, TRAIN, blocks=sizes[0], devices_per_block=sizes[1])
    batch = pipeline.stack_micro_batches([batches.next() for _ in range(2)])
    del batch["tiles"]
    params, opt = start()
    step = functools.partial(train_step, model=model, optimizer=optimizer, train=TRAIN)
    if mesh:
        kept = sharding.param_shardings((params, opt), mesh)
        params, opt = jax.device_put((params, opt), kept)
        tokens, tiles = sharding.batch_sharding(mesh, 1), sharding.tile_sharding(mesh, 1)
        batch = {name: jax.device_put(x, tiles if name in ("pixels", "caption_ends") else tokens) for name, x in batch.items()}
        step = jax.jit(step, out_shardings=(*kept, sharding.replicated(mesh)))
    _, opt, told = jax.device_get(jax.jit(step)(params, opt, batch, np.float64(1e-2)))
    return told, opt[1].mu      # after one step the gradient's tenth


@functools.cache
def start():
    with jax.enable_x64(False):
        made = jax.jit(functools.partial(init, Model(C), optim.adamw(TRAIN), TRAIN))()
    return jax.tree.map(lambda x: np.asarray(x, np.float64) if x.ndim else np.asarray(x), made)


@pytest.fixture(scope="module")
def one_device(folder):
    with jax.enable_x64(True):
        return one_step(folder)


@pytest.mark.parametrize("sizes", [(4, 2, 1, 1), (1, 2, 2, 2)], ids=str)
def test_eight_devices_equal_one(folder, one_device, sizes):
    """Tiles are sharded over the data axes and the sequence axis; contrastive pairs span all devices."""
    mesh = meshes.make(config.Experiment(C, TRAIN, mesh=config.Mesh(*sizes)))
    with jax.enable_x64(True), jax.set_mesh(mesh):
        many = one_step(folder, mesh)
    for name, one, other in zip(("metrics", "gradients"), one_device, many):      # the ViT's softmax is in float32
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-8, err_msg=name), one, other)
    assert one_device[0]["contrastive_loss"] > 1


# ---- runs ----

FROZEN = "groups", "vision.layers", "vision.place_PJ"


def experiment(folder, source="captions", **changes):
    options = {"steps": 8, "batch": 4, "length": T, "warmup": 1, "lr": 1e-2, "tensorboard": False, "contrastive": 0.5,
               "ramp": ((0, 2),), "vision_lr": 0.5, "freeze": FROZEN}
    return config.build({"model": json.loads(json.dumps(config.sections(config.Experiment(C))["model"])),
                         "train": options | changes, "data": {"sources": (str(folder / f"{source}.jsonl"),)},
                         "checkpoint": {"every": 3}, "mesh": {"edp": 1}})


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    assert train(experiment(folder), workdir)["step"] == 8
    return workdir


def test_a_run_learns_and_is_resumed_bit_by_bit(folder, whole, tmp_path, monkeypatch):
    def interrupt(run, done):
        if done.step == 5:
            raise KeyboardInterrupt
        return report(run, done)

    report = loop.report
    monkeypatch.setattr(loop, "report", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(experiment(folder), tmp_path / "run")
    monkeypatch.undo()
    train(experiment(folder), tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, *(convert.load(path).params for path in (tmp_path / "run", whole)))
    one, two = (metrics.read(path) for path in (whole, tmp_path / "run"))
    for r in one + two:
        del r["seconds"], r["tokens_per_s"], r["flops_per_s"], r["data_wait"]
    assert one == two
    assert one[-1]["loss"] < one[0]["loss"] and one[-1]["contrastive_loss"] < one[0]["contrastive_loss"]
    assert all(r["tiles"] == 16 for r in one)


def test_frozen_parameters_do_not_change_and_have_no_optimizer_state(folder, whole):
    before, after = start()[0], convert.load(whole).params
    (learned, frozen), (learned_after, frozen_after) = (optim.split(p, FROZEN) for p in (before, after))
    assert optim.join(learned, frozen).keys() == before.keys() and set(frozen["vision"]) == {"layers", "place_PJ"}
    jax.tree.map(np.testing.assert_array_equal, frozen, frozen_after)
    assert all((x != y).any() for x, y in zip(*map(jax.tree.leaves, (learned, learned_after)), strict=True))
    state = {path[2:] for path in manager.open_arrays(manager.find_step(whole)[1], "opt") if path[1:2] == ("mu",)}
    paths = {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(learned)}
    assert state == paths


def test_a_text_model_learns_to_see(whole, tmp_path):
    """It starts from a checkpoint without vision and another checkpoint's ViT, but not from that one's projector."""
    text, rng = dataclasses.replace(C, vision=config.Vision()), np.random.default_rng(0)
    (tmp_path / "hf").mkdir()
    save_file({name: rng.standard_normal(leaf.tensor_shape).astype(np.float32) / 4
               for leaf in hf_layout.leaves(text) for _, name in leaf.tensors()}, tmp_path / "hf" / "model.safetensors")
    written = hf_config.write_model(text, "released", "float32", convert.BYTE_IDS)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(written))
    e = config.Experiment(C, TRAIN, mesh=config.Mesh(1))
    initial = training.InitialCheckpoints(starts.open_initial(tmp_path / "hf", C), starts.open_initial_vision(whole, C))
    made = training.initial_params(training.build_program(e, meshes.make(e)), initial)
    vision, vit, new = made.pop("vision"), convert.load(whole).params["vision"], start()[0]["vision"]
    jax.tree.map(np.testing.assert_array_equal, made, convert.load(tmp_path / "hf").params)
    for name, leaf in vision.items():
        wanted = new if name in ("in_JO", "in_O", "out_OD", "out_D", "newline_D") else vit
        jax.tree.map(np.testing.assert_array_equal, leaf, wanted[name])


def test_a_vit_with_another_tile_size(whole):
    larger = dataclasses.replace(C, dim=24, vision=dataclasses.replace(V, tile=16))
    source = starts.open_initial_vision(whole, larger)
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape), abstract_params(larger)["vision"])
    made, vit = starts.load_initial_vision(source, blank), convert.load(whole).params["vision"]
    jax.tree.map(np.testing.assert_array_equal, made["layers"], vit["layers"])
    assert made["place_PJ"].shape == (17, 8) and not made["in_JO"].any() and not made["newline_D"].any()
    np.testing.assert_array_equal(made["place_PJ"][0], vit["place_PJ"][0])
    corners = made["place_PJ"][1:].reshape(4, 4, 8)[::3, ::3].reshape(4, 8)
    assert np.abs(corners - vit["place_PJ"][1:]).max() < 0.3 * np.abs(vit["place_PJ"]).max()
    with pytest.raises(ConfigError, match="has model.vision.hidden=12, this model 13"):
        starts.open_initial_vision(whole, dataclasses.replace(C, vision=dataclasses.replace(V, hidden=13)))
    with pytest.raises(ConfigError, match="train.init_vision=.*: this is a text model; set model.vision.layers"):
        starts.open_initial_vision(whole, dataclasses.replace(C, vision=config.Vision()))


def test_optimizer_of_what_sees():
    """Biases, shifts and scales do not decay; train.vision_lr is for all of vision alone."""
    params = jax.tree.map(lambda _: np.ones(1, np.float32), abstract_params(C))
    optimizer = optim.adamw(config.Train(weight_decay=0.1, vision_lr=0.25))
    updates, _ = optimizer.update(jax.tree.map(np.zeros_like, params), optimizer.init(params), params)
    decayed = {path[-1].key: pytest.approx(-update) for path, update in jax.tree_util.tree_leaves_with_path(updates) if update}
    vision = {"patch_YXZJ", "place_PJ", "in_JO", "out_OD", "q_JAK", "k_JAK", "v_JAK", "out_AKJ", "up_JU", "down_UJ"}
    text = {"embed_WD", "head_WD", "q_DHK", "k_DHK", "v_DHV", "gate_DHV", "out_HVD", "router_DE", "w1_EDF", "w3_EDF", "w2_EFD"}
    assert decayed == dict.fromkeys(vision, 0.025) | dict.fromkeys(text, 0.1)


def test_contrastive_loss_by_hand():
    rng = np.random.default_rng(0)
    x_BTD, patches_bpD = rng.normal(size=(4, 6, 5)), rng.normal(size=(2, 3 * 4, 5))
    caption_ends_bI = np.array([[7, -1, 2], [-1, 11, -1]])
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    pairs = [(0, 0), (0, 2), (1, 1)]
    image = unit(np.stack([patches_bpD[n, 4 * i:4 * i + 4].mean(0) for n, i in pairs]))
    text = unit(np.stack([x_BTD[2 * n + caption_ends_bI[n, i] // 6, caption_ends_bI[n, i] % 6] for n, i in pairs]))
    p = np.exp(image @ text.T / 0.07)
    want = np.mean(-np.log(np.diag(p) / p.sum(0)) - np.log(np.diag(p) / p.sum(1)))
    np.testing.assert_allclose(jax.jit(loss.contrastive_loss)(caption_ends_bI, x_BTD, patches_bpD), want, rtol=1e-5)
    assert loss.contrastive_loss(np.full((2, 3), -1), x_BTD, patches_bpD) == 0


def test_captions_are_repeated_without_their_image(folder):
    """The copy follows the captioned image as a segment without targets; "caption_ends" has the index of its last token."""
    batch = stream(folder, config.Train(batch=B, length=T, contrastive=1.0), blocks=2).next()
    found = 0
    for n, caption_ends_I in enumerate(batch["caption_ends"]):
        rows = slice(n * B // 2, (n + 1) * B // 2)
        for tile in np.flatnonzero(caption_ends_I >= 0):
            b, end = divmod(caption_ends_I[tile], T)
            tokens_T, segments_T, weights_T = (batch[name][rows][b] for name in ("tokens", "segments", "weights"))
            copy_T, original_T = (segments_T == segments_T[end] - offset for offset in (0, 1))
            assert tokens_T[end] == 257 and np.flatnonzero(copy_T)[-1] == end and not weights_T[copy_T].any()
            np.testing.assert_array_equal(tokens_T[original_T & (tokens_T != V.token)], tokens_T[copy_T])
            first = batch["patch_code"][rows][b][original_T]
            assert first[first > 1].min() == images.PATCH + 4 * tile
            found += 1
    assert found == 5 and not (stream(folder, config.Train(batch=B, length=T)).next()["caption_ends"] >= 0).any()


def test_flops_of_a_tile():
    """XLA counts slightly more FLOPs: norms, softmax, GELU."""
    v = config.Vision(layers=1, dim=64, heads=2, hidden=128, tile=32, patch=4, token=1)
    c = config.Model(vocab=8, dim=96, layers=1, pattern="L", vision=v)
    params = abstract_params(c)
    lowered = jax.jit(functools.partial(encode_images, c)).lower(params, jax.ShapeDtypeStruct((1, 1, 32, 32, 3), np.float32))
    assert 1 < lowered.cost_analysis()["flops"] / flops_tile(c) < 1.2
    assert flops_tile(dataclasses.replace(c, vision=config.Vision())) == 0


@pytest.mark.parametrize("change, message", [
    ({"length": 16}, r"a.jsonl:\d+ has \d+ tokens with its images, more than train.length=16"),
    ({"freeze": ("vision.layer",)}, "names 'vision.layer', which is not a part of this model; did you mean vision.layers"),
    ({"freeze": ("embed_WD", "groups", "head_WD", "norm_D", "vision")}, "leaves nothing to learn"),
    ({"text": True}, "contains an image, but this model reads only text: set model.vision.layers"),
    ({"truncated": "3.png"}, r"a.jsonl:\d+: image '.*3.png' is damaged"),
    ({"text_file": "3.png"}, r"a.jsonl:\d+: image '.*3.png' is not in a known image format"),
])
def test_mistakes_are_one_line(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path / "data")
    e = experiment(tmp_path / "data", "a", **({"freeze": ()} | {k: v for k, v in change.items() if k in ("length", "freeze")}))
    if "truncated" in change:
        truncate(tmp_path / "data" / change["truncated"])
    if "text_file" in change:
        (tmp_path / "data" / change["text_file"]).write_text("no image")
    if "text" in change:
        e = config.build(config.sections(e) | {"model": {**config.sections(e)["model"], "vision": {}},
                                               "train": {"freeze": ()}})
    with pytest.raises(ConfigError, match=message) as caught:
        train(e, tmp_path / "run")
    assert "\n" not in str(caught.value)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


def test_a_damaged_jpeg_is_refused_when_its_row_is_read(tmp_path):
    Image.effect_noise((90, 90), 99).save(tmp_path / "a.jpg")
    truncate(tmp_path / "a.jpg")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "<image> noise", "images": ["a.jpg"]}) + '\n{"text": "none"}' * 20)
    batches = stream(tmp_path, config.Train(batch=2, length=T))
    with pytest.raises(ConfigError, match="image '.*a.jpg' is damaged"):
        for _ in range(20):
            batches.next()
