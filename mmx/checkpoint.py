"""Checkpoints of a run: WORKDIR/checkpoints/STEP holds the Orbax items params, opt (with the step) and data.

Orbax saves asynchronously and commits a step by renaming it, so that a half-written one is never seen. `open_params`
and `create_params` reach the arrays of the params item through TensorStore: a conversion reads and writes slices, never
a whole tensor. WORKDIR/config.json says what the run is; `check_config` guards it.
"""
import json
import os
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import checkpoint_managers

from mmx.config import ConfigError, Experiment, to_json
from mmx.released import read_json

CHUNK_BYTES = 64 << 20      # of an array on disk: bounds what reading a slice decodes
FREE = {    # what a resumed run may change, beside checkpoint and mesh: how long, how fast, what is shown
    "model": {"remat", "impl", "chunk"},
    "train": {"steps", "seconds", "log_every", "eval_every", "eval_bytes", "sample_every", "sample_prompt",
              "tensorboard"},
}


class Checkpoints:
    """The steps of one run: one is saved every `every` steps and whenever forced, the latest `keep` stay."""

    def __init__(self, workdir: str | Path, every: int, keep: int):
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=checkpoint_managers.FixedIntervalPolicy(every),
            preservation_policy=checkpoint_managers.LatestN(keep))
        self.manager = ocp.CheckpointManager(Path(workdir).absolute() / "checkpoints", options=options)

    def save(self, step: int, params, opt, data: dict, force: bool = False) -> bool:
        """Starts saving `step` where it is due or forced; every process calls it, with the same data state."""
        if step in self.manager.all_steps() or not (force or self.manager.should_save(step)):
            return False
        chunks = jax.tree_util.tree_map_with_path(_chunks, params)
        args = ocp.args.Composite(params=ocp.args.StandardSave(params, chunks), opt=ocp.args.StandardSave(opt),
                                  data=ocp.args.JsonSave(data))
        return self.manager.save(step, args=args, force=True)

    def restore(self, params, opt):
        """(step, params, opt, data) of the latest committed step, or None where there is none.

        `params` and `opt` are abstract trees, shardings included. A converted checkpoint has parameters only: its opt
        and data are None.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        items = {"params": ocp.args.StandardRestore(params), "opt": ocp.args.StandardRestore(opt),
                 "data": ocp.args.JsonRestore()}
        held = {name: args for name, args in items.items() if (self.manager.directory / str(step) / name).exists()}
        found = self.manager.restore(step, args=ocp.args.Composite(**held))
        return step, found["params"], found.get("opt"), found.get("data")

    def preempted(self, step: int) -> bool:
        """Whether a distributed run was asked to stop (SIGTERM to any process): true at the same step in all."""
        return jax.process_count() > 1 and self.manager.reached_preemption(step)

    def close(self):
        """Waits for the save under way."""
        self.manager.wait_until_finished()
        self.manager.close()


def _chunks(path, leaf) -> ocp.SaveArgs:
    """A large stacked leaf is cut by group and expert before inside a matrix."""
    stacked = path[0].key == "groups"
    expert = path[-1].key.rpartition("_")[2] in ("EDF", "EFD")
    axes = tuple(range(stacked + expert)) if leaf.nbytes > CHUNK_BYTES else ()
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=axes)


def check_config(workdir: str | Path, experiment: Experiment) -> None:
    """Writes WORKDIR/config.json, or raises ConfigError where the one there describes another run."""
    path = Path(workdir) / "config.json"
    if path.exists():
        there = read_json(path)
        if not isinstance(there.get("model"), dict):
            raise ConfigError(f"{path} is no run's config, perhaps a Hugging Face checkpoint's: give another --workdir")
        old, new = _comparable(there), _comparable(json.loads(to_json(experiment)))
        differ = [f"{s}.{k} (there {old[s][k]!r}, now {v!r})" for s in old for k, v in new[s].items()
                  if k in old[s] and old[s][k] != v]
        if differ:
            raise ConfigError(f"{workdir} holds a run of another config: {', '.join(differ)}; give the same values, or "
                              "another --workdir")
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"config.json.partial-{os.getpid()}")
        partial.write_text(to_json(experiment))
        partial.replace(path)


def _comparable(sections: dict) -> dict:
    return {s: {k: v for k, v in sections[s].items() if k not in FREE.get(s, ())}
            for s in ("model", "train", "data") if s in sections}


def find_step(path: str | Path) -> tuple[Path, Path] | None:
    """(workdir, directory of a committed step) of a workdir (its latest step) or of one of its checkpoints/STEP."""
    path = Path(path).absolute()
    if _committed(path) and path.parent.name == "checkpoints":
        return path.parent.parent, path
    steps = path / "checkpoints"
    found = [p for p in steps.iterdir() if _committed(p)] if steps.is_dir() else []
    return (path, max(found, key=lambda p: int(p.name))) if found else None


def _committed(path: Path) -> bool:
    return path.name.isdigit() and (path / "params" / "_METADATA").exists()


# No cache, and few copies at a time: what is held is the slice asked for and the chunks that it touches.
CONTEXT = {"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 1},
           "file_io_concurrency": {"limit": 2}}


def open_params(step: Path) -> dict[tuple[str, ...], ts.TensorStore]:
    """The arrays of a step's params by path; each is read by slices: `array[index].read().result()`."""
    folder = step / "params"
    metadata = json.loads((folder / "_METADATA").read_text())
    base = {"driver": "file", "path": f"{folder}/"}
    driver, context = "zarr3" if metadata["use_zarr3"] else "zarr", ts.Context(CONTEXT)
    arrays = {}
    for entry in metadata["tree_metadata"].values():
        keys = tuple(k["key"] for k in entry["key_metadata"])
        name = ".".join(keys)
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"} if metadata["use_ocdbt"] else base | {
            "path": f"{folder}/{name}/"}
        arrays[keys] = ts.open({"driver": driver, "kvstore": store}, open=True, read=True, context=context)
    return {keys: array.result() for keys, array in arrays.items()}


def create_params(step: Path, arrays: dict[tuple[str, ...], tuple]) -> dict[tuple[str, ...], ts.TensorStore]:
    """A new step with a params item for Orbax to restore: empty arrays of the (shape, dtype, chunks) given by path.

    One file a chunk (Orbax's layout without OCDBT): a slice that is a chunk is written once, and nothing is rewritten.
    """
    folder, context = step / "params", ts.Context(CONTEXT)
    folder.mkdir(parents=True)
    stores, tree = {}, {}
    for keys, (shape, dtype, chunks) in arrays.items():
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder / '.'.join(keys)}/"},
                "metadata": {"compressor": None, "chunks": list(chunks)}, "store_data_equal_to_fill_value": True}
        stores[keys] = ts.open(spec, create=True, shape=shape, dtype=dtype.name, context=context).result()
        tree[str(keys)] = {"key_metadata": [{"key": k, "key_type": 2} for k in keys],
                           "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False}}
    (folder / "_METADATA").write_text(json.dumps({
        "tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None}))
    now = time.time_ns()
    handler = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
    (step / "_CHECKPOINT_METADATA").write_text(json.dumps({
        "item_handlers": {"params": handler}, "metrics": {}, "performance_metrics": {}, "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now, "custom_metadata": {}}))
    return stores
