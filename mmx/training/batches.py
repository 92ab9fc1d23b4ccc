"""Batches on the mesh: each process reads its own rows of the stream and puts them into global arrays."""
import time

import jax
import numpy as np

from mmx import mesh as meshes
from mmx.config import Experiment
from mmx.data import pipeline
from mmx.parallel import sharding

TILE_ARRAYS = "pixels", "caption_ends"      # in a micro-batch these arrays are [blocks, tiles, ...], the others [rows, T]


class Batches:
    """The training data of a run. The state of `stream` is the same in all processes."""

    def __init__(self, e: Experiment, mesh):
        host, self.hosts = meshes.data_host(mesh)       # equal for processes that need the same rows
        # The mesh axes ROWS divide a batch's rows into blocks. The devices along TIME share the rows and tiles of a block.
        blocks, devices_per_block = sharding.size(mesh, sharding.ROWS), sharding.size(mesh, sharding.TIME)
        self.stream = pipeline.stream(e.data, e.train, host=host, hosts=self.hosts, vision=e.model.vision, blocks=blocks,
                                      devices_per_block=devices_per_block)
        # leading=1: the axis of micro-batches is not sharded
        self.rows, self.tiles = sharding.batch_sharding(mesh, leading=1), sharding.tile_sharding(mesh, leading=1)
        self.replicated = sharding.replicated(mesh)
        self.waited = 0.0

    def next(self, micro_batches: int) -> tuple[dict, int]:
        """The batch of a step and its number of image tiles. `waited` is the number of seconds that this took.

        The batch is a dict of global arrays [micro-batches, ...]; `loss.loss` describes them.
        """
        start = time.monotonic()
        batch = pipeline.stack_micro_batches([self.stream.next() for _ in range(micro_batches)])
        tiles = int(batch.pop("tiles", np.int64(0)).sum())
        arrays = {}
        for name, x in batch.items():       # x: this process's 1 / hosts of the rows or blocks, which are axis 1
            shape = x.shape[0], x.shape[1] * self.hosts, *x.shape[2:]
            arrays[name] = _to_devices(x, shape, self.tiles if name in TILE_ARRAYS else self.rows)
        self.waited = time.monotonic() - start
        return arrays, tiles

    def replicate(self, x: float):
        """A number as a float32 array on every device."""
        return _to_devices(np.float32(x), (), self.replicated)


def _to_devices(x, shape, global_sharding):
    with jax.transfer_guard_host_to_device("allow"):        # the loop forbids implicit transfers; this one is intended
        return jax.make_array_from_process_local_data(global_sharding, x, shape)
