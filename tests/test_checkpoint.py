"""Checkpoints: restored arrays equal the saved ones, incomplete steps are ignored, another config is refused."""
import contextlib
import dataclasses
import errno
import gc
import json
import re
import shutil
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from mmx import config
from mmx.checkpoints import convert
from mmx.checkpoints import manager as checkpoint
from mmx.checkpoints.manager import Checkpoints
from mmx.checkpoints.run_config import check_config
from mmx.config import ConfigError
from mmx.files import checksums
from mmx.model import abstract_params

MODEL = config.Model(vocab=19, dim=12, layers=4, pattern="LS", heads=4, kv_heads=2, head_dim=8, rotary_dim=4, experts=3,
                     expert_dim=10)


def random_params(seed=0):
    leaves, tree = jax.tree.flatten(abstract_params(MODEL))
    rng = np.random.default_rng(seed)
    return tree.unflatten([jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves])


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_a_hugging_face_folder_is_not_a_workdir(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "minimax"}')
    with pytest.raises(ConfigError, match="is not the config of a run"):
        check_config(tmp_path, config.build({}))
    assert (tmp_path / "config.json").read_text() == '{"model_type": "minimax"}'


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run whose steps 0, 2 and 4 are saved when due, and step 5 because it is forced."""
    path = tmp_path_factory.mktemp("run")
    check_config(path, config.Experiment(model=MODEL))
    checkpoints = Checkpoints(path, every=2, keep=2)
    optimizer, params = optax.adamw(1e-3), random_params()
    opt = optimizer.init(params)
    empty = checkpoints.restore(abstract(params), abstract(opt))
    saved = [checkpoints.save(0, params, opt, {"at": 0})]

    @jax.jit
    def step(params, opt):
        updates, opt = optimizer.update(jax.tree.map(jnp.sin, params), opt, params)
        return optax.apply_updates(params, updates), opt

    step = jax.jit(step, donate_argnums=(0, 1))
    for at in range(1, 6):
        params, opt = step(params, opt)
        saved.append(checkpoints.save(at, params, opt, {"at": at, "shards": [1, 2]}, force=at == 5))
        saved_again = checkpoints.save(at, params, opt, {"at": at}, force=at == 5)
        kept = jax.tree.map(np.array, (params, opt))
    params, opt = step(params, opt)         # donates what is being saved
    checkpoints.close()
    return path, kept, saved, saved_again, empty


def test_an_empty_run_restores_none_and_due_steps_are_saved(workdir):
    path, _, saved, saved_again, empty = workdir
    assert empty is None
    assert saved == [True, False, True, False, True, True] and not saved_again
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["4", "5"]


def test_restores_bit_by_bit(workdir):
    path, (params, opt), *_ = workdir
    checkpoints = Checkpoints(path, every=2, keep=2)
    step, params_back, opt_back, data = checkpoints.restore(abstract(params), abstract(opt))
    checkpoints.close()
    assert step == 5 and data == {"at": 5, "shards": [1, 2]}
    equal(params_back, params)
    equal(opt_back, opt)


def test_incomplete_steps_are_ignored_and_damaged_ones_set_aside(workdir, tmp_path):
    path, (params, opt), *_ = workdir
    shutil.copytree(path, tmp_path / "run")
    steps = tmp_path / "run" / "checkpoints"
    shutil.copytree(steps / "5", steps / "6.orbax-checkpoint-tmp")
    (steps / "7").mkdir()
    assert checkpoint.find_step(tmp_path / "run") == (tmp_path / "run", steps / "7")    # damaged, but not skipped
    checkpoints = Checkpoints(tmp_path / "run", every=2, keep=2)
    assert checkpoints.restore(abstract(params), abstract(opt))[0] == 5
    checkpoints.save(7, params, opt, {}, force=True)
    checkpoints.close()
    assert sorted(p.name for p in steps.iterdir()) == ["5", "7", "7.damaged"]


def test_params_are_read_by_slices(workdir):
    path, (params, _), *_ = workdir
    arrays = checkpoint.open_arrays(checkpoint.find_step(path)[1])
    flat = {tuple(k.key for k in keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert arrays.keys() == flat.keys()
    for keys, leaf in flat.items():
        assert arrays[keys].shape == leaf.shape and arrays[keys].dtype.numpy_dtype == leaf.dtype
        np.testing.assert_array_equal(arrays[keys][0].read().result(), leaf[0])


def test_large_leaves_are_saved_in_chunks(tmp_path, monkeypatch):
    """So the conversion of a trained checkpoint decodes single chunks, not whole tensors."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 256)
    params = random_params()
    checkpoints = Checkpoints(tmp_path, every=1, keep=1)
    checkpoints.save(0, params, {"step": jnp.zeros(())}, {})
    checkpoints.close()
    arrays = checkpoint.open_arrays(checkpoint.find_step(tmp_path)[1])
    assert all(np.prod(a.chunk_layout.read_chunk.shape) * 4 <= 256 for a in arrays.values())
    assert arrays[("groups", "layer_0", "moe", "w1_EDF")].chunk_layout.read_chunk.shape[:2] == (1, 1)


def test_a_converted_checkpoint_restores_only_parameters(workdir, tmp_path):
    path, (params, opt), *_ = workdir
    run = convert.from_hf(path, tmp_path / "run", progress=False)
    check_config(run, config.Experiment(model=MODEL))
    checkpoints = Checkpoints(run, every=2, keep=2)
    step, params_back, opt_back, data = checkpoints.restore(abstract(params), abstract(opt))
    assert (step, opt_back, data) == (0, None, None)
    equal(params_back, params)
    checkpoints.save(3, params, opt, {"at": 3}, force=True)
    checkpoints.close()
    assert checkpoint.find_step(run)[1].name == "3"


def chunk(item, name, value=None):
    """Removes the entries of an item's database that begin with a name, or replaces their bytes."""
    def damage(step):
        base = {"driver": "file", "path": f"{step / item}/"}
        store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
        for key in [key for key in store.list().result() if key.decode().startswith(name)]:
            store.write(key, value).result()        # None removes the key
    return damage


def cut(name):
    return lambda step: (step / name).write_bytes((step / name).read_bytes()[:20])


DAMAGES = {
    "chunk": (chunk("params", "embed_WD/0"), "damaged: .*embed_WD/0.0.* is missing"),
    "cut chunk": (chunk("params", "groups.layer_0.mixer.q_DHK/0", b"abc"), "damaged: .*groups.layer_0.mixer.q_DHK/0"),
    "tensor": (chunk("params", "norm_D/"), "params is damaged, tensor norm_D: .*does not exist"),
    "cut table": (cut("params/_METADATA"), "params/_METADATA cannot be read as JSON"),
    "other table": (lambda step: (step / "params/_METADATA").write_text("{}"), "params/_METADATA is damaged"),
    "database": (cut("params/manifest.ocdbt"), "params is damaged, tensor .*manifest.ocdbt"),
    "chunk of opt": (chunk("opt", "0.nu.head_WD/0"), "damaged: .*0.nu.head_WD/0.0.* is missing"),
    "no opt": (lambda step: shutil.rmtree(step / "opt"), "opt/_METADATA is missing"),
    "data": (cut("data/metadata"), "data/metadata cannot be read as JSON"),
    "config": (lambda step: (step.parents[1] / "config.json").write_text("{}"), "config.json is not the config of a run"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_reported_in_one_line_with_its_place(workdir, tmp_path, damage):
    """For a run whose only step has no checksums."""
    path, (params, opt), *_ = workdir
    apply, message = DAMAGES[damage]
    run = shutil.copytree(path, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "4")
    (run / "checkpoints" / "5" / checksums.NAME).unlink()
    apply(run / "checkpoints" / "5")
    if damage != "config":          # there `check_config` raises first
        checkpoints = Checkpoints(run, every=2, keep=2)
        with pytest.raises(ConfigError, match=f"are damaged \\(5: .*{message}") as caught:
            checkpoints.restore(abstract(params), abstract(opt))
        checkpoints.close()
        assert "\n" not in str(caught.value)
    if "opt" not in damage and damage != "data":
        with pytest.raises(ConfigError, match=message):
            convert.to_hf(run, tmp_path / "hf", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("checked", [True, False], ids=["checksums", "no checksums"])
def test_a_damaged_step_is_set_aside(checked, workdir, tmp_path, capfd):
    """The run resumes from the step before and saves the damaged one again."""
    path, (params, opt), *_ = workdir
    run = shutil.copytree(path, tmp_path / "run")
    chunk("opt", "0.nu.head_WD/0")(run / "checkpoints" / "5")
    if not checked:
        (run / "checkpoints" / "5" / checksums.NAME).unlink()
    checkpoints = Checkpoints(run, every=2, keep=2)
    capfd.readouterr()
    step, _, _, data = checkpoints.restore(abstract(params), abstract(opt))
    output = capfd.readouterr().err
    named = "opt/manifest.ocdbt .*" if checked else ".*0.nu.head_WD/0.0.* is missing.*"
    assert re.fullmatch(rf"mmx: {run}/checkpoints/5 is damaged, {named}: renamed to 5.damaged; the run resumes from step 4"
                        "\n", output), output
    assert step == data["at"] == 4
    assert checkpoints.save(5, params, opt, {"at": 5}, force=True)
    checkpoints.close()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["4", "5", "5.damaged"]


def test_without_verification_damage_in_unused_files_is_ignored(workdir, tmp_path, capfd):
    path, (params, opt), *_ = workdir
    run = shutil.copytree(path, tmp_path / "run")
    (run / "checkpoints" / "5" / "params" / "_sharding").write_text("")
    for verify, step in ((False, 5), (True, 4)):
        checkpoints = Checkpoints(run, every=2, keep=2, verify=verify)
        assert checkpoints.restore(abstract(params), abstract(opt))[0] == step
        checkpoints.close()


def test_orbax_restores_saved_steps(workdir):
    """With its own handler instead of mmx's."""
    path, (params, _), *_ = workdir
    manager = ocp.CheckpointManager(path / "checkpoints")
    back = manager.restore(5, args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract(params))))
    equal(back["params"], params)


def test_a_failed_save_is_reported_and_removes_nothing(tmp_path, monkeypatch):
    """The save fails in Orbax's background thread; its incomplete files are removed later."""
    params, opt = random_params(), {"step": jnp.zeros(())}
    checkpoints = Checkpoints(tmp_path, every=1, keep=1)
    checkpoints.save(1, params, opt, {})
    checkpoints.wait()

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "x"))

    monkeypatch.setattr(checksums, "write", full)
    checkpoints.save(2, params, opt, {})
    with pytest.raises(ConfigError, match="^step 2 could not be saved in .*No space left on device.* to resume from the last$"):
        for _ in range(600):
            checkpoints.check_saved()
            time.sleep(0.1)
    checkpoints.close()
    monkeypatch.undo()
    assert checkpoint.find_step(tmp_path)[1].name == "1"
    checkpoints = Checkpoints(tmp_path, every=1, keep=1)
    assert checkpoints.restore(abstract(params), abstract(opt))[0] == 1
    checkpoints.save(3, params, opt, {})
    checkpoints.close()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_saves_leak_no_memory(tmp_path):
    """Counts Python's memory blocks. TensorStore's results leaked 540 a save, and 4 an array."""
    checkpoints, blocks = Checkpoints(tmp_path, every=1, keep=1), []
    for step in range(15):
        checkpoints.save(step, {f"a{n}_D": jnp.zeros(3) for n in range(60)}, {"step": jnp.zeros(())}, {})
        checkpoints.wait()
        if step in (4, 14):
            gc.collect()
            blocks.append(sys.getallocatedblocks())
    checkpoints.close()
    assert blocks[1] - blocks[0] < 10 * 150


def test_disk_space_is_checked_before_a_save(tmp_path, monkeypatch):
    params, opt = random_params(), {"step": jnp.zeros(())}
    checkpoints = Checkpoints(tmp_path, every=1, keep=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e6))
    with pytest.raises(ConfigError, match=r"^a checkpoint needs 0.001 GB, .*/checkpoints has 0.001 GB free: make ") as caught:
        checkpoints.save(1, params, opt, {})
    assert "\n" not in str(caught.value) and not list((tmp_path / "checkpoints").iterdir())
    checkpoints.close()


def test_a_run_keeps_its_tokenizer(tmp_path):
    mine, other = tmp_path / "mine.json", tmp_path / "other.json"
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    end = flags | {"id": 1, "content": "</s>", "special": True}
    for path, word in ((mine, "a"), (other, "b")):
        path.write_text(json.dumps({"added_tokens": [end], "model": {"type": "WordLevel", "vocab": {word: 0, "</s>": 1},
                                                                     "unk_token": word}}))

    def check(tokenizer):
        check_config(tmp_path / "run", config.Experiment(model=MODEL, data=config.Data(tokenizer=str(tokenizer))))

    check(mine)
    own = tmp_path / "run" / "tokenizer.json"
    assert own.read_text() == mine.read_text()
    assert sorted(p.name for p in own.parent.iterdir()) == ["config.json", "generation_config.json", "tokenizer.json"]
    check(mine)
    for tokenizer in ("bytes", other):
        with pytest.raises(ConfigError, match=f"give --config.data.tokenizer={own}, or another --workdir"):
            check(tokenizer)


def test_restoring_with_another_sharding_gives_the_same_arrays(workdir):
    path, (params, opt), *_ = workdir
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("edp",)), jax.sharding.PartitionSpec("edp"))
    checkpoints = Checkpoints(path, every=2, keep=2)
    sharded = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), params)
    params_back = checkpoints.restore(sharded, abstract(opt))[1]
    checkpoints.close()
    equal(params_back, params)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(params_back))


def test_config_is_written_and_compared(tmp_path):
    first = config.Experiment(model=MODEL)
    check_config(tmp_path, first)
    assert config.from_json((tmp_path / "config.json").read_text()) == first
    written = json.loads((tmp_path / "config.json").read_text())        # as in versions without these keys
    assert "vision" not in written["model"] and "columns" not in written["data"]

    def changed(section, **changes):
        return dataclasses.replace(first, **{section: dataclasses.replace(getattr(first, section), **changes)})

    for other in (changed("train", steps=7, log_every=3), changed("mesh", ep=2), changed("checkpoint", every=9),
                  changed("model", remat=True), changed("data", cache="elsewhere")):
        check_config(tmp_path, other)
        assert config.from_json((tmp_path / "config.json").read_text()) == other
    check_config(tmp_path, first)
    for other, message in ((changed("model", vision=config.Vision(layers=2)), r"model.vision \(there None, now {'layers': 2"),
                           (changed("model", dim=16), r"model.dim \(there 12, now 16\)"),
                           (changed("train", lr=0.1, batch=2), r"train.batch \(there 8, now 2\), train.lr"),
                           (changed("data", columns="text=a"), r"data.columns \(there '', now 'text=a'\)"),
                           (changed("data", sources=("a",)), r"data.sources \(there \['sotu'\], now \['a'\]\)")):
        with pytest.raises(ConfigError, match=message) as caught:
            check_config(tmp_path, other)
        assert "\n" not in str(caught.value) and "another --workdir" in str(caught.value)
        assert config.from_json((tmp_path / "config.json").read_text()) == first
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        check_config(tmp_path, first)


def test_the_window_is_compared_only_for_window_layers(tmp_path):
    """Although config.json leaves out a window of the default size."""
    for pattern, refused in (("LW", True), ("LS", False)):
        model = dataclasses.replace(MODEL, pattern=pattern, layers=2)
        check_config(tmp_path / pattern, config.Experiment(model=model))
        other = config.Experiment(model=dataclasses.replace(model, window=64))
        with pytest.raises(ConfigError, match=r"model.window \(there 256, now 64\)") if refused else contextlib.nullcontext():
            check_config(tmp_path / pattern, other)


def test_a_converted_config_fixes_only_the_function(tmp_path):
    text = {"model": {k: v for k, v in dataclasses.asdict(MODEL).items() if k in ("vocab", "dim", "layers", "pattern", "aux")}}
    (tmp_path / "config.json").write_text(json.dumps(text))
    with pytest.raises(ConfigError, match="model.vocab"):
        check_config(tmp_path, config.Experiment(model=dataclasses.replace(MODEL, vocab=20)))
    check_config(tmp_path, config.Experiment(model=dataclasses.replace(MODEL, capacity=1.5, aux="paper")))
    with pytest.raises(ConfigError, match="model.aux"):     # from then on, it is fixed by the first run
        check_config(tmp_path, config.Experiment(model=dataclasses.replace(MODEL, capacity=1.5)))
