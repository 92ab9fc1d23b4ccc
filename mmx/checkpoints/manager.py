"""Checkpoints of a run: WORKDIR/checkpoints/STEP holds the Orbax items params, opt (with the step) and data.

Orbax saves asynchronously and commits a step by renaming it, so that a half-written one is never seen. Before that
checksums.json gets the length and SHA-256 of every file of the step, each process reading once more what it wrote; a run
goes on from the newest step that has them right. `open_arrays` and `create_params` reach the arrays of an item through
TensorStore: a conversion reads and writes slices, never a whole tensor, and what is damaged is named. WORKDIR/config.json
says what the run is; `check_config` guards it.
"""
import contextlib
import functools
import json
import re
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from mmx.checkpoints import orbax_hooks
from mmx.checkpoints.shapes import check_shapes
from mmx.config import IMPLEMENTATION_KEYS, ConfigError, Experiment, Model, to_json
from mmx.files import atomic, checksums, untrusted

KEY = re.compile(r"[\w-]{1,100}", re.ASCII)     # of a path in a parameter tree: it names a folder
TIMEOUT = 30 * 24 * 3600    # seconds that a save may take by the wall clock, which may leap; dead processes are found otherwise
CHUNK_BYTES = 64 << 20      # of an array on disk: bounds what reading a slice decodes
FREE = {    # what a resumed run may change, beside checkpoint and mesh: how long, how fast, what is shown
    "model": set(IMPLEMENTATION_KEYS),
    "train": {"steps", "seconds", "log_every", "eval_every", "eval_bytes", "sample_every", "sample_prompt",
              "tensorboard"},
}
UNTRAINED = {"model": FREE["model"] | {"aux", "aux_weight", "context"}}     # what the first run of a converted checkpoint may


class Checkpoints:
    """The steps of one run: one is saved every `every` steps and whenever forced, the latest `keep` stay.

    `verify`: whether what is restored is compared with its checksums, each process reading its share.
    """

    def __init__(self, workdir: str | Path, every: int, keep: int, verify: bool = True):
        self.directory, self.every, self.keep, self.verify = Path(workdir).absolute() / "checkpoints", every, keep, verify
        self.saving = None      # the step that is being saved
        orbax_hooks.install()

    @functools.cached_property
    def manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=checkpoint_managers.FixedIntervalPolicy(self.every),
            preservation_policy=checkpoint_managers.LatestN(self.keep),
            temporary_path_class=orbax_hooks.StepDirectory, cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(timeout_secs=TIMEOUT))
        return ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, params, opt, data: dict, force: bool = False) -> bool:
        """Starts saving `step` where it is due or forced; every process calls it, with the same data state."""
        if step in self.manager.all_steps() or not (force or self.manager.should_save(step)):
            return False
        self.wait()
        self.check_room(params, opt)
        chunks = jax.tree_util.tree_map_with_path(_chunks, params)
        args = ocp.args.Composite(params=orbax_hooks.ArraySave(params, chunks), opt=orbax_hooks.ArraySave(opt),
                                  data=ocp.args.JsonSave(data))
        with self._told(step):
            self.saving = step
            return self.manager.save(step, args=args, force=True)

    def check_saved(self):
        """What a save that has ended could not do is raised here, and by `wait`."""
        if self.saving is not None and not self.manager.is_saving_in_progress():
            self.wait()

    def wait(self):
        """Until the save under way has ended."""
        if self.saving is not None:
            with self._told(self.saving):
                self.saving = None
                self.manager.wait_until_finished()

    def check_room(self, params, opt):
        """Raises where the disk has not room for one more step."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves((params, opt))) * 1.01 + 1e6
        self.directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.directory).free
        problem = "" if free >= needed else (
            f"a checkpoint needs {needed / 1e9:.3f} GB, {self.directory} has {free / 1e9:.3f} GB free: make room, and the same "
            "command goes on from the last checkpoint")
        if problem := first_problem(problem):
            raise ConfigError(problem)

    @contextlib.contextmanager
    def _told(self, step: int):
        """Says in one line that a step could not be saved."""
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, (ConfigError, TimeoutError)):      # Orbax's, where it waited for another process
                raise
            raise ConfigError(f"step {step} could not be saved in {self.directory}: {_short(error)}; the checkpoints there are "
                              "whole, and the same command goes on from the last") from None

    def restore(self, params, opt):
        """(step, params, opt, data) of the newest whole step, or None where there is none.

        `params` and `opt` are abstract trees, shardings included. A converted checkpoint has parameters only: its opt
        and data are None. Damaged steps that are newer are renamed STEP.damaged, a line each; ConfigError: all are damaged.
        """
        self.wait()
        faults = {}
        for number in sorted(_steps(self.directory), reverse=True):
            step = self.directory / str(number)
            fault = first_problem(self._fault(step))
            if not fault:
                try:
                    found = _read_step(step, params, opt)
                except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                    if isinstance(error, PermissionError) or (self.verify and checksums.read(step)):
                        raise       # it is as it was written
                    fault = _short(error)
                fault = first_problem(fault)
            if not fault:
                self._set_aside(faults, number)
                return number, *found
            faults[number] = fault
        if faults:
            told = "; ".join(f"{number}: {fault}" for number, fault in faults.items())
            raise ConfigError(f"{self.directory} has no whole step ({told}): give another "
                              "--workdir, or remove them to begin anew")
        return None

    def _fault(self, step: Path) -> str:
        try:
            return checksums.find_damage(step, "", jax.process_index(), jax.process_count()) if self.verify else ""
        except PermissionError:
            raise
        except OSError as error:        # a bad block
            return str(error)

    def _set_aside(self, faults: dict[int, str], number: int):
        """Out of the way of what will be saved as the same steps."""
        if not faults:
            return
        for damaged, fault in faults.items() if jax.process_index() == 0 else ():
            aside = self.directory / f"{damaged}.damaged"
            atomic.remove(aside)
            (self.directory / str(damaged)).rename(aside)
            print(f"mmx: {self.directory / str(damaged)} is damaged, {fault}: it is now {aside.name}, and the run goes on from "
                  f"step {number}", file=sys.stderr)
        first_problem("")      # the others wait for that
        if "manager" in vars(self):
            self.manager.reload()

    def preempted(self, step: int) -> bool:
        """Whether a distributed run was asked to stop (SIGTERM to any process): true at the same step in all."""
        return jax.process_count() > 1 and self.manager.reached_preemption(step)

    def close(self):
        """Waits for the save under way."""
        self.wait()
        if "manager" in vars(self):
            self.manager.close()


def first_problem(problem: str) -> str:
    """The first problem that a process has, in all of them; each calls it."""
    if jax.process_count() == 1:
        return problem
    mine_N = np.zeros(1000, np.uint8)
    text = problem.encode()[:mine_N.size]
    mine_N[:len(text)] = list(text)
    with jax.transfer_guard_host_to_device("allow"):
        all_PN = multihost_utils.process_allgather(mine_N)
    return next((told for each_N in np.asarray(all_PN)
                 if (told := bytes(each_N).rstrip(b"\0").decode(errors="replace"))), "")


def _short(error: BaseException) -> str:
    """An error in one line, without the tail of TensorStore's."""
    return " ".join(str(error).partition(" [")[0].split()) or type(error).__name__


def _steps(directory: Path) -> list[int]:
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return [int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name)]


def _read_step(step: Path, params, opt):
    table = checksums.read(step)
    trained = (any(name.startswith("opt/") for name in table) if table
               else "opt" in untrusted.read_json(step / "_CHECKPOINT_METADATA").get("item_handlers", ()))
    params = _read_tree(step, "params", params)
    if not trained:
        return params, None, None
    return params, _read_tree(step, "opt", opt), untrusted.read_json(step / "data" / "metadata")


def _chunks(path, leaf) -> ocp.SaveArgs:
    """A large stacked leaf is cut by group and expert before inside a matrix."""
    stacked = path[0].key == "groups"
    expert = path[-1].key.rpartition("_")[2] in ("EDF", "EFD")
    axes = tuple(range(stacked + expert)) if leaf.nbytes > CHUNK_BYTES else ()
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=axes)


def read_config(workdir: str | Path) -> dict:
    """The sections of WORKDIR/config.json."""
    path = Path(workdir) / "config.json"
    sections = untrusted.read_json(untrusted.check_link(path))
    if "model" not in sections or not all(isinstance(section, dict) for section in sections.values()):
        raise ConfigError(f"{path} is no run's config: it is damaged, or a Hugging Face checkpoint's")
    return sections


def check_config(workdir: str | Path, experiment: Experiment) -> None:
    """Writes WORKDIR/config.json, and tokenizer.json where the run has one; raises ConfigError where those there are
    another run's."""
    path, name = Path(workdir) / "config.json", experiment.data.tokenizer_file
    files = {path: to_json(experiment).encode()}
    tokenizer = path.with_name("tokenizer.json")
    if name:
        files[tokenizer] = untrusted.read_bytes(name, untrusted.TOKENIZER_BYTES)
    if tokenizer.exists() and untrusted.read_bytes(tokenizer, untrusted.TOKENIZER_BYTES) != files.get(tokenizer):
        raise ConfigError(f"data.tokenizer={experiment.data.tokenizer!r} is not the {tokenizer} that the run has: give "
                          f"--config.data.tokenizer={tokenizer}, or another --workdir")
    if path.exists():
        there = read_config(workdir)
        free = FREE if "train" in there else UNTRAINED
        old, new = _comparable(there, free), _comparable(json.loads(to_json(experiment)), free)
        differ = [f"{s}.{k} (there {old[s][k]!r}, now {v!r})" for s in old for k, v in new[s].items()
                  if k in old[s] and old[s][k] != v]
        if differ:
            raise ConfigError(f"{workdir} holds a run of another config: {', '.join(differ)}; give the same values, or "
                              "another --workdir")
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            with atomic.replacing(file, "wb") as new:
                new.write(content)


def _comparable(sections: dict, free: dict) -> dict:
    model = {"vision": None, "window": Model.window} | sections["model"]       # which are kept unsaid
    if "W" not in model.get("pattern", Model.pattern):
        del model["window"]
    sections = sections | {"model": model}
    return {s: {k: v for k, v in sections[s].items() if k not in free.get(s, ())}
            for s in ("model", "train", "data") if s in sections}


def find_step(path: str | Path) -> tuple[Path, Path] | None:
    """(workdir, a step's directory) of a workdir (its latest step) or of one of its checkpoints/STEP."""
    path = Path(path).absolute()
    if path.name.isdecimal() and path.parent.name == "checkpoints" and path.is_dir():
        return path.parent.parent, path
    steps = path / "checkpoints"
    found = _steps(steps)
    return (path, steps / str(max(found))) if found else None


def verify_item(step: Path, item: str) -> None:
    """Raises where an item of a step is not as its checksums say."""
    if fault := checksums.find_damage(step, f"{item}/"):
        raise ConfigError(f"{step} is damaged, {fault}; an older WORKDIR/checkpoints/STEP may be whole")


# No cache, and few copies at a time: what is held is the slice asked for and the chunks that it touches.
CONTEXT = {"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 1},
           "file_io_concurrency": {"limit": 2}}


@contextlib.contextmanager
def storage_errors(what, then=""):
    """Says in one line what of `what` failed: TensorStore has ValueError, and many words, for all it meets."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{what}: {str(error).partition(' [')[0]}{then}") from None


def open_arrays(step: Path, item: str = "params", limits: dict = CONTEXT) -> dict[tuple[str, ...], ts.TensorStore]:
    """The arrays of an item of a step by path; each is read by slices: `read_slice(array)`, `array[index].read().result()`.

    A chunk that is missing is an error, for every chunk was written, those of zeros too.
    """
    folder = step / item
    metadata = untrusted.read_json(folder / "_METADATA")
    untrusted.check_plain(folder)
    try:
        paths = [tuple(k["key"] for k in entry["key_metadata"]) for entry in metadata["tree_metadata"].values()
                 if entry["value_metadata"]["value_type"] == "jax.Array"]       # not an optimizer's empty state
        names = {path: ".".join(path) for path in paths}
        if not all(KEY.fullmatch(key) for path in paths for key in path):
            raise TypeError
        driver, ocdbt = "zarr3" if metadata["use_zarr3"] else "zarr", metadata["use_ocdbt"]
    except (AttributeError, KeyError, TypeError):
        raise ConfigError(f"{folder / '_METADATA'} is damaged: it has no table of arrays") from None
    base, context = {"driver": "file", "path": f"{folder}/"}, ts.Context(limits)
    _check_metadata(folder, names.values(), "zarr.json" if driver == "zarr3" else ".zarray",
                    {"driver": "ocdbt", "base": base} if ocdbt else base, context)
    arrays = {}
    for path, name in names.items():
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"} if ocdbt else base | {"path": f"{folder}/{name}/"}
        spec = {"driver": driver, "kvstore": store, "fill_missing_data_reads": False}
        arrays[path] = ts.open(spec, open=True, read=True, context=context)
    for path, array in arrays.items():
        with storage_errors(f"{folder} is damaged, tensor {names[path]}"):
            arrays[path] = array.result()
        shape, chunk = arrays[path].shape, arrays[path].chunk_layout.write_chunk.shape or ()    # no smaller than a read one
        if any(cut > max(size, 1) for cut, size in zip(chunk, shape)):
            raise ConfigError(f"{folder} is damaged, tensor {names[path]}: chunks of {chunk} are larger than its shape {shape}"
                              "; an older WORKDIR/checkpoints/STEP may be whole")
    return arrays


def _check_metadata(folder: Path, names, key: str, store: dict, context) -> None:
    """Raises ConfigError for JSON of an array that would end the process in TensorStore: it has no limit of levels."""
    then = "; an older WORKDIR/checkpoints/STEP may be whole"
    with storage_errors(f"{folder} is damaged", then):
        files = ts.KvStore.open(store, context=context).result()
    texts = {name: files.read(f"{name}/{key}") for name in names}
    for name, text in texts.items():
        with storage_errors(f"{folder} is damaged, tensor {name}", then):
            if text := text.result().value:     # TensorStore says that it is missing
                if len(text) > untrusted.JSON_BYTES:
                    raise ValueError(f"its {key} has {len(text):,} bytes")
                untrusted.loads(text)


def read_slice(array: ts.TensorStore, index=...) -> np.ndarray:
    """A slice of an array of `open_arrays`."""
    with storage_errors("the checkpoint is damaged", "; an older WORKDIR/checkpoints/STEP may be whole"):
        return array[index].read().result()


def _read_tree(step: Path, item: str, tree):
    """An item's arrays in the place, type and sharding of the abstract leaves of `tree`."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    wanted = {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in leaves}
    arrays = open_arrays(step, item, {})
    check_shapes({"/".join(path): array.shape for path, array in arrays.items()},
                 {"/".join(path): leaf.shape for path, leaf in wanted.items()}, step / item)
    somewhere = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with jax.transfer_guard_host_to_device("allow"):        # training, which lets nothing cross unasked, asks here
        return treedef.unflatten([jax.make_array_from_callback(
            leaf.shape, leaf.sharding or somewhere,
            lambda index, path=path, leaf=leaf: read_slice(arrays[path], index).astype(leaf.dtype))
            for path, leaf in wanted.items()])


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
        with storage_errors(f"{step} cannot be written"):
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
