"""The checkpoints of a run: WORKDIR/checkpoints/STEP contains the Orbax items params, opt (with the step) and data.

Orbax saves in the background and renames a step when it is complete, so an incomplete step is never read. Before the rename,
each process reads the files that it wrote once more, and checksums.json gets the length and SHA-256 of every file of the step.
A run resumes from the newest step whose files match their checksums.

Conversion reads and writes slices of arrays through TensorStore (`open_arrays`, `create_params`), never whole tensors.
"""
import contextlib
import functools
import json
import re
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from mmx.checkpoints import orbax_hooks
from mmx.checkpoints.casts import cast
from mmx.checkpoints.shapes import check_shapes
from mmx.config import ConfigError
from mmx.files import atomic, checksums, output, untrusted

KEY = re.compile(r"[\w-]{1,100}", re.ASCII)     # one part of a path in a parameter tree; it becomes the name of a folder
TIMEOUT = 30 * 24 * 3600    # seconds for a save. It is long because the clock may jump; dead processes are detected elsewhere
CHUNK_BYTES = 64 << 20      # of an array on disk; reading a slice decodes whole chunks
HUGGING_FACE_KEYS = {"model_type", "architectures", "vocab_size"}       # a config.json of Hugging Face has one of them


class Checkpoints:
    """The saved steps of one run.

    Args:
      every: a step is saved every `every` steps.
      keep: number of latest steps that are kept.
      verify: whether `restore` compares files with their checksums. Each process compares some of the files.
    """

    def __init__(self, workdir: str | Path, every: int, keep: int, verify: bool = True):
        self.directory, self.every, self.keep, self.verify = Path(workdir).resolve() / "checkpoints", every, keep, verify
        self.saving = None      # number of the step that is being saved
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
        """Starts saving `step` if it is due or forced; returns whether it did. Every process calls it with the same `data`."""
        if step in self.manager.all_steps() or not (force or self.manager.should_save(step)):
            return False
        self.wait()
        self.check_disk_space(params, opt)
        chunks = jax.tree_util.tree_map_with_path(_chunks, params)
        args = ocp.args.Composite(params=orbax_hooks.ArraySave(params, chunks), opt=orbax_hooks.ArraySave(opt),
                                  data=ocp.args.JsonSave(data))
        with self._short_errors(step):
            self.saving = step
            return self.manager.save(step, args=args, force=True)

    def check_saved(self):
        """Raises the error of a background save that has failed; does not wait for one that is still running."""
        if self.saving is not None and not self.manager.is_saving_in_progress():
            self.wait()

    def wait(self):
        """Waits until no save is running. Raises ConfigError if the last one failed."""
        if self.saving is not None:
            with self._short_errors(self.saving):
                self.saving = None
                self.manager.wait_until_finished()

    def check_disk_space(self, params, opt):
        """Raises ConfigError, in every process, if the disk lacks space for one more step."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves((params, opt))) * 1.01 + 1e6
        self.directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.directory).free
        problem = "" if free >= needed else (
            f"a checkpoint needs {needed / 1e9:.3f} GB, {self.directory} has {free / 1e9:.3f} GB free: make room, then "
            "repeat the command to resume from the last checkpoint")
        if problem := agree_on_problem(problem):
            raise ConfigError(problem)

    @contextlib.contextmanager
    def _short_errors(self, step: int):
        """Turns the errors of a save into a ConfigError of one line."""
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, (ConfigError, TimeoutError)):      # TimeoutError: Orbax waited for another process
                raise
            raise ConfigError(f"step {step} could not be saved in {self.directory}: {_one_line(error)}; earlier "
                              "checkpoints are complete: repeat the command to resume from the last") from None

    def restore(self, params, opt):
        """Restores the newest undamaged step. Newer, damaged steps are renamed STEP.damaged, and a line is printed for each.

        Args:
          params, opt: trees of abstract arrays with shapes, dtypes and shardings.
        Returns:
          (step, params, opt, data), or None if there is no step. A converted checkpoint has no opt and no data: None.
        Raises:
          ConfigError: all steps are damaged.
        """
        self.wait()
        damage = {}         # step -> what is damaged
        for number in sorted(_steps(self.directory), reverse=True):
            step = self.directory / str(number)
            problem = agree_on_problem(self._find_damage(step))
            if not problem:
                try:
                    found = _read_step(step, params, opt)
                except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                    if isinstance(error, PermissionError) or (self.verify and checksums.read(step)):
                        raise       # the files are as they were written
                    problem = _one_line(error)
                problem = agree_on_problem(problem)
            if not problem:
                self._set_aside(damage, number)
                return number, *found
            damage[number] = problem
        if damage:
            problems = "; ".join(f"{number}: {problem}" for number, problem in damage.items())
            raise ConfigError(f"all checkpoints in {self.directory} are damaged ({problems}): give another --workdir, or "
                              "remove them to start from the beginning")
        return None

    def _find_damage(self, step: Path) -> str:
        """Describes the first damaged file in this process's share of a step; "" if there is none."""
        try:
            return checksums.find_damage(step, "", jax.process_index(), jax.process_count()) if self.verify else ""
        except PermissionError:
            raise
        except OSError as error:        # such as a bad block of the disk
            return str(error)

    def _set_aside(self, damage: dict[int, str], number: int):
        """Renames damaged steps, so that the run can save the same steps again."""
        if not damage:
            return
        for damaged, problem in damage.items() if jax.process_index() == 0 else ():
            aside = self.directory / f"{damaged}.damaged"
            atomic.remove(aside)
            (self.directory / str(damaged)).rename(aside)
            output.message(f"mmx: {self.directory / str(damaged)} is damaged, {problem}: renamed to {aside.name}; the run "
                           f"resumes from step {number}")
        agree_on_problem("")    # the other processes wait until process 0 has renamed the steps
        if "manager" in vars(self):
            self.manager.reload()

    def preempted(self, step: int) -> bool:
        """Whether any process of a distributed run got SIGTERM. All processes get the same answer at the same step."""
        return jax.process_count() > 1 and self.manager.reached_preemption(step)

    def close(self):
        """Waits for a running save and closes the manager."""
        self.wait()
        if "manager" in vars(self):
            self.manager.close()


def agree_on_problem(problem: str) -> str:
    """Returns the first message that is not empty, in the order of processes. Every process must call it; all get the same."""
    if jax.process_count() == 1:
        return problem
    buffer = np.zeros(1000, np.uint8)
    text = problem.encode()[:buffer.size]
    buffer[:len(text)] = list(text)
    with jax.transfer_guard_host_to_device("allow"):
        buffers = multihost_utils.process_allgather(buffer)
    problems = (bytes(each).rstrip(b"\0").decode(errors="replace") for each in np.asarray(buffers))
    return next(filter(None, problems), "")


def _one_line(error: BaseException) -> str:
    """An error's message as one line, without the source locations that TensorStore appends."""
    return " ".join(str(error).partition(" [")[0].split()) or type(error).__name__


def _steps(directory: Path) -> list[int]:
    """The numbers of the saved steps."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return [int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name)]


def _read_step(step: Path, params, opt):
    """(params, opt, data) of a step; opt and data are None for a converted checkpoint."""
    table = checksums.read(step)
    trained = (any(name.startswith("opt/") for name in table) if table
               else "opt" in untrusted.read_json(step / "_CHECKPOINT_METADATA").get("item_handlers", ()))
    params = _read_tree(step, "params", params)
    if not trained:
        return params, None, None
    return params, _read_tree(step, "opt", opt), untrusted.read_json(step / "data" / "metadata")


def _chunks(path, leaf) -> ocp.SaveArgs:
    """How Orbax divides a leaf into chunks: large stacked leaves by layer and expert first, then within a matrix."""
    stacked = path[0].key == "groups"
    expert = path[-1].key.rpartition("_")[2] in ("EDF", "EFD")
    axes = tuple(range(stacked + expert)) if leaf.nbytes > CHUNK_BYTES else ()
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=axes)


def find_step(path: str | Path) -> tuple[Path, Path] | None:
    """(workdir, directory of a step); None if there is no step.

    The content of a directory decides what it is, not its name: a workdir may be called checkpoints/7.

    Args:
      path: a workdir, whose latest step is taken, or one of its checkpoints/STEP.
    """
    path = Path(path).absolute()
    steps = path / "checkpoints"
    if (found := _steps(steps)) and not is_hugging_face(path):
        return path, steps / str(max(found))
    is_step = path.name.isdecimal() and path.parent.name == "checkpoints" and any(
        (path / name).exists() for name in ("_CHECKPOINT_METADATA", checksums.NAME, "params"))
    return (path.parent.parent, path) if is_step else None


def is_hugging_face(path: Path) -> bool:
    """Whether a directory has the config.json of a Hugging Face checkpoint. A run's config.json has the section "model"."""
    file = path / "config.json"
    try:
        table = untrusted.read_json(file) if file.exists() else {}
    except ConfigError:     # unreadable: the reader of the file reports it
        return False
    return "model" not in table and not HUGGING_FACE_KEYS.isdisjoint(table)


def verify_item(step: Path, item: str) -> None:
    """Raises ConfigError if a file of a step's item differs from its checksum."""
    if problem := checksums.find_damage(step, f"{item}/"):
        raise ConfigError(f"{step} is damaged, {problem}{TRY_OLDER}")


TRY_OLDER = "; an older WORKDIR/checkpoints/STEP may be undamaged"
# Without a cache and with few parallel copies, memory contains only the requested slice and the chunks that overlap it.
CONTEXT = {"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 1},
           "file_io_concurrency": {"limit": 2}}


@contextlib.contextmanager
def storage_errors(problem: str, remedy: str = ""):
    """Turns a ValueError of TensorStore, which it raises for every failure, into a ConfigError of one line."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{problem}: {str(error).partition(' [')[0]}{remedy}") from None


def open_arrays(step: Path, item: str = "params", limits: dict = CONTEXT) -> dict[tuple[str, ...], ts.TensorStore]:
    """Opens the arrays of an item of a step, by their paths in its tree. Read them with `read_slice`.

    zarr may omit chunks that contain only zeros. Ours are always written, so a missing chunk is an error.

    Args:
      limits: TensorStore's limits of memory and parallel work.
    """
    folder = step.resolve() / item      # TensorStore refuses paths with ".."
    metadata = untrusted.read_json(folder / "_METADATA")
    untrusted.check_plain(folder)
    try:
        paths = [tuple(k["key"] for k in entry["key_metadata"]) for entry in metadata["tree_metadata"].values()
                 if entry["value_metadata"]["value_type"] == "jax.Array"]       # others: empty parts of an optimizer's state
        names = {path: ".".join(path) for path in paths}
        if not all(KEY.fullmatch(key) for path in paths for key in path):
            raise TypeError
        driver, ocdbt = "zarr3" if metadata["use_zarr3"] else "zarr", metadata["use_ocdbt"]
    except (AttributeError, KeyError, TypeError):
        raise ConfigError(f"{folder / '_METADATA'} is damaged: it does not list arrays") from None
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
        # a chunk for writing is at least as large as one for reading
        shape, chunk = arrays[path].shape, arrays[path].chunk_layout.write_chunk.shape or ()
        if any(cut > max(size, 1) for cut, size in zip(chunk, shape)):
            raise ConfigError(f"{folder} is damaged, tensor {names[path]}: chunks of {chunk} are larger than its shape "
                              f"{shape}{TRY_OLDER}")
    return arrays


def _check_metadata(folder: Path, names, key: str, store: dict, context) -> None:
    """Raises ConfigError for deeply nested JSON: TensorStore's parser has no limit of levels and would end the process."""
    with storage_errors(f"{folder} is damaged", TRY_OLDER):
        files = ts.KvStore.open(store, context=context).result()
    texts = {name: files.read(f"{name}/{key}") for name in names}
    for name, text in texts.items():
        with storage_errors(f"{folder} is damaged, tensor {name}", TRY_OLDER):
            if text := text.result().value:     # if it is missing, opening the array reports that
                if len(text) > untrusted.JSON_BYTES:
                    raise ValueError(f"its {key} has {len(text):,} bytes")
                untrusted.loads(text)


def read_slice(array: ts.TensorStore, index=...) -> np.ndarray:
    """A slice of an array of `open_arrays`."""
    with storage_errors("the checkpoint is damaged", TRY_OLDER):
        return array[index].read().result()


def _read_tree(step: Path, item: str, tree):
    """Reads an item's arrays into a tree with the structure, dtypes and shardings of the abstract `tree`."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    wanted = {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in leaves}
    arrays = open_arrays(step, item, {})
    check_shapes({"/".join(path): array.shape for path, array in arrays.items()},
                 {"/".join(path): leaf.shape for path, leaf in wanted.items()}, step / item)
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with jax.transfer_guard_host_to_device("allow"):        # training forbids implicit transfers; this one is intended
        return treedef.unflatten([jax.make_array_from_callback(
            leaf.shape, leaf.sharding or default,
            lambda index, path=path, leaf=leaf: cast(read_slice(arrays[path], index), leaf.dtype, ".".join(path)))
            for path, leaf in wanted.items()])


def create_params(step: Path, arrays: dict[tuple[str, ...], tuple]) -> dict[tuple[str, ...], ts.TensorStore]:
    """Creates a step with empty arrays in a params item that Orbax can restore.

    Each chunk is one file, so writing a slice that is a chunk rewrites nothing. (Orbax's default layout, OCDBT, puts many
    chunks into one file.)

    Args:
      arrays: (shape, dtype, chunk shape) by path in the parameter tree.
    Returns:
      The arrays, open for writing.
    """
    folder, context = step.resolve() / "params", ts.Context(CONTEXT)
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
