"""Adds checksums to Orbax's saves; stops log messages of Orbax, and memory leaks of TensorStore, in the whole process."""
import asyncio
import copy
import dataclasses
import logging
import sys
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import tensorstore as ts

from mmx.files import checksums


class StepDirectory(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """The temporary directory of a step. It gets its checksums before it gets its final name."""

    async def finalize(self):
        if not self.get_final().name.isdecimal():       # an item of the step
            return await super().finalize()
        if self._checkpoint_metadata_store:
            self._checkpoint_metadata_store.wait_until_finished()
        await asyncio.to_thread(checksums.write, Path(self.get()))
        self.get().rename(self.get_final())     # Orbax's own rename would add files that have no checksums


class _ArrayHandler(ocp.StandardCheckpointHandler):
    """Orbax's handler of arrays. After a save, each process computes the checksums of the files that it wrote."""

    async def async_save(self, directory, args):
        futures = await super().async_save(directory, args=args) or []
        return [*futures, _ChecksumFuture(futures, Path(directory) / f"ocdbt.process_{jax.process_index()}")]


@ocp.args.register_with_handler(_ArrayHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class ArraySave(ocp.args.StandardSave):
    """Orbax's arguments to save a tree of arrays with checksums."""


class _ChecksumFuture(ocp.future.NoopFuture):
    """Waits for the futures of a save, then writes the checksums of `folder`."""

    def __init__(self, futures, folder: Path):
        self.futures, self.folder = futures, folder

    def result(self, timeout=None):
        for future in self.futures:
            future.result(timeout)
        if self.folder.is_dir():
            checksums.write(self.folder)


def install() -> None:
    """Changes logging, TensorStore and sys.unraisablehook for the whole process; calling it again changes nothing more."""
    logging.getLogger("absl").addFilter(_not_from_orbax)
    ts.experimental_collect_matching_metrics, ts.KvStore.Spec.to_json = _no_metrics, _cached_to_json
    if sys.unraisablehook is not _unraisable:
        _unraisable.previous, sys.unraisablehook = sys.unraisablehook, _unraisable


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """Drops what Orbax's threads log: `Checkpoints` raises the same errors."""
    return "orbax" not in record.pathname


def _no_metrics(*_, **__) -> list:
    """Replaces the TensorStore metrics that Orbax collects at each save to log a rate.

    TensorStore never frees the strings and numbers of the JSON that it returns, so each save would leak memory.
    """
    return []


_to_json, _json_cache = ts.KvStore.Spec.to_json, {}


def _cached_to_json(spec, **options):
    """KvStore.Spec.to_json, called once for each argument.

    Orbax calls it for every array of a save, always for the same folder, and TensorStore leaks each result (see `_no_metrics`).
    """
    text = repr((spec, options))
    value = _json_cache.get(text)
    if value is None:
        if len(_json_cache) > 8:
            _json_cache.clear()
        value = _json_cache[text] = _to_json(spec, **options)
    return copy.deepcopy(value)


def _unraisable(args) -> None:
    """Drops the message that TensorStore prints for each write that ends after Orbax has abandoned the save."""
    if str(args.exc_value) != "Event loop is closed":
        _unraisable.previous(args)
