"""The training stream: micro-batches [B, T]. It resumes exactly and does not depend on the number of hosts (processes).

The documents of each source are packed into rows (`rows.pack`). Grain shuffles the rows, in a new order for each epoch,
and repeats them without end. The rows are divided into `data.shards` shards: shard v contains rows v, v + shards,
v + 2 shards, ... of that order, so an epoch reads every row once. Rows are shuffled, not documents, because some documents
(speeches) are hundreds of rows long.

The rows of a batch are divided into gcd(B, shards) equal parts, and so are the shards. Part i of the rows comes from part i of
the shards, one row of each shard in turn. Host h makes rows [h B / hosts, (h + 1) B / hosts), so it reads only shards [h shards
/ hosts, (h + 1) shards / hosts). Concatenated in order, the hosts' batches are the same global batch for every number of hosts
that divides B and data.shards.

The source of a row is drawn from (seed, micro-batch, row), weighted by data.weights at the current step. These are the weights
of the latest entry whose step has been reached. With data.interpolate, they are interpolated linearly to the next entry. Every
host draws for the whole batch, so every host knows the state: how many rows of each source have been read from each shard. The
state is the same on all hosts, and any number of hosts can resume from it.

The sizes of images are read when their source is tokenized; an image is decoded when its row is needed. A batch with images is
divided into blocks of rows, one for each group of devices with the same rows, and a block's tiles are stored together. Every
host knows the rows of the whole batch, so all hosts pad their blocks to the same number of tiles: enough for the fullest block,
rounded up by `images.padded_tiles`.
"""
import math

import grain
import numpy as np

from mmx import config
from mmx.config import ConfigError
from mmx.data import encoding, images, packing, rows


def stream(data: config.Data, train: config.Train, *, host: int = 0, hosts: int = 1, vision: config.Vision | None = None,
           blocks: int = 1, devices_per_block: int = 1) -> "Stream":
    """The stream of micro-batches of one host, from the start.

    Args:
      host: index of this host, out of `hosts`.
      vision: of a model with vision; batches then contain images.
      blocks: number of blocks that the rows of the whole batch are divided into, each with separate tiles.
      devices_per_block: number of devices that share the tiles of a block; the number of tiles is padded to a multiple of it.
    """
    return Stream(data, train, host, hosts, vision or config.Vision(), blocks, devices_per_block)


def stack_micro_batches(batches: list[dict]) -> dict[str, np.ndarray]:
    """Stacks micro-batches along a new first axis. Tiles are padded to the largest number among the micro-batches."""
    most = max((b["pixels"].shape[1] for b in batches if "pixels" in b), default=0)
    for b in batches:
        if "pixels" in b:
            missing = most - b["pixels"].shape[1]
            b["pixels"] = np.pad(b["pixels"], [(0, 0), (0, missing), (0, 0), (0, 0), (0, 0)])
            b["caption_ends"] = np.pad(b["caption_ends"], [(0, 0), (0, missing)], constant_values=-1)
    return packing.stack(batches)


class Stream:
    """See `stream`."""

    def __init__(self, data: config.Data, train: config.Train, host: int, hosts: int, vision: config.Vision, blocks: int,
                 devices_per_block: int):
        _check_hosts(train.batch, data.shards, hosts)
        self.data, self.train, self.vision = data, train, vision
        self._blocks, self._own_blocks, self._devices_per_block = blocks, blocks // hosts, devices_per_block
        self._own_rows = slice(host * train.batch // hosts, (host + 1) * train.batch // hosts)
        options = encoding.ImageOptions(vision, train.contrastive > 0)
        self._packed = [rows.pack(source, data, train.length, bounds, options)
                        for source, bounds in zip(data.sources, data.lengths or [(0, 0)] * len(data.sources))]
        self._rows = [len(packed) for packed in self._packed]
        self._shards = [_shuffle_into_shards(count, data, number) for number, count in enumerate(self._rows)]
        self._weights = _weights(data, self._rows)
        # micro-batches made; the optimizer step; micro-batches that remain in this step; micro-batches that were rolled back
        self._micro, self._step, self._remaining, self._rolled_back = 0, -1, 0, 0
        self._given = np.zeros((data.shards, len(self._rows)), np.int64)     # rows read from each shard of each source

    def next(self) -> dict[str, np.ndarray]:
        """The next micro-batch.

        Returns:
          tokens, targets, segments, positions (int32) and weights (float32), each [B / hosts, T]. With vision also
          patch_code [B / hosts, T] and pixels [blocks / hosts, I, Y, X, Z] of `images.collate`;
          caption_ends [blocks / hosts, I]: for a tile with a separate caption, the index of the caption's last token among
          the block's tokens (row by row), else -1;
          tiles: the number of tiles of all hosts, without padding.
        """
        if not self._remaining:
            tokens_read = (self._micro - self._rolled_back) * self.train.batch * self.train.length
            self._step, self._remaining = self._step + 1, self.train.micro_batches(tokens_read)
        picks = []
        for shard, source in zip(self._shards_B(), self._sources_B()):
            picks.append((source, shard, self._given[shard, source]))
            self._given[shard, source] += 1
        self._micro, self._remaining = self._micro + 1, self._remaining - 1
        own_rows = [self._packed[source][row] for source, row in map(self._row, picks[self._own_rows])]
        row_images = [row.pop("images", ()) for row in own_rows]
        batch = packing.stack(own_rows)
        if not self.vision.layers:
            return batch
        return batch | self._collate_images(batch["tokens"], row_images, map(self._row, picks))

    def _row(self, pick) -> tuple[int, int]:
        """(source, row number in the source) of a pick (source, shard, rows read from the shard before)."""
        source, shard, given = pick
        return source, int(self._shards[source][shard][int(given)])

    def _collate_images(self, tokens_BT, row_images, global_rows) -> dict[str, np.ndarray]:
        """The image part of a batch. `global_rows`: (source, row number) of the rows of all hosts."""
        tiles_bB = np.array([self._packed[source].tiles(row) for source, row in global_rows]).reshape(self._blocks, -1)
        most = self._devices_per_block * images.padded_tiles(-(-int(tiles_bB.sum(1).max()) // self._devices_per_block))
        prepared = [images.prepare_all(self.vision, [image for image, _ in row]) for row in row_images]
        patch_code_BT, pixels_bIYXZ = images.collate(self.vision, tokens_BT, prepared, self._own_blocks, most)
        caption_ends_bI, rows_per_block = np.full(pixels_bIYXZ.shape[:2], -1, np.int32), len(row_images) // self._own_blocks
        for n, caption_ends_I in enumerate(caption_ends_bI):
            tile = 0
            for b in range(rows_per_block):
                row = n * rows_per_block + b
                for (_, end), image in zip(row_images[row], prepared[row]):
                    caption_ends_I[tile] = b * self.train.length + end if end >= 0 else -1
                    tile += len(image.pixels_IYXZ)
        return {"patch_code": patch_code_BT, "pixels": pixels_bIYXZ, "caption_ends": caption_ends_bI, "tiles": tiles_bB.sum()}

    def state(self) -> dict:
        """The stream's position, for JSON; the same on every host."""
        return {"micro": self._micro, "step": self._step, "left": self._remaining, "lost": self._rolled_back,
                "given": self._given.tolist(), "rows": self._rows}

    def restore(self, state: dict) -> None:
        """Continues from `state`, whatever the number of hosts that saved it."""
        shape = (len(state["given"]), len(state["rows"]))
        if shape != self._given.shape:
            raise ConfigError(f"the checkpoint's data has {shape[0]} shards and {shape[1]} sources, the config has "
                              f"{len(self._given)} and {len(self._rows)}: resume with the checkpoint's config")
        for source, before, now in zip(self.data.sources, state["rows"], self._rows):
            if before != now:
                raise ConfigError(f"data source {source!r} has {now} rows of {self.train.length} tokens, but had {before} when "
                                  "the checkpoint was saved: its text, the tokenizer or train.length has changed")
        self._micro, self._step, self._remaining = state["micro"], state["step"], state["left"]
        self._rolled_back = state.get("lost", 0)       # older checkpoints do not have it
        self._given = np.array(state["given"], np.int64)

    def rewind_step_count(self, state: dict) -> None:
        """Sets the number of steps to that of `state`, but keeps the position in the data. A rollback needs this.

        The micro-batches read after `state` do not count towards the batch ramp.
        """
        self._step, self._remaining = state["step"], state["left"]
        self._rolled_back = state.get("lost", 0) + self._micro - state["micro"]

    def _shards_B(self):
        batch, shards = self.train.batch, self.data.shards
        blocks = math.gcd(batch, shards)
        block, row = np.divmod(np.arange(batch), batch // blocks)
        turn = self._micro * (batch // blocks) + row
        return block * (shards // blocks) + turn % (shards // blocks)

    def _sources_B(self):
        weights = self._current_weights()
        draws = np.random.default_rng((self.data.seed % 2**32, self._micro)).random(self.train.batch)
        return np.searchsorted(np.cumsum(weights) / np.sum(weights), draws, side="right")

    def _current_weights(self):
        """The sources' weights in the current step."""
        if self.data.interpolate:
            steps, weights = zip(*self._weights)
            return [np.interp(self._step, steps, source) for source in zip(*weights)]
        return next((w for begin, w in reversed(self._weights) if begin <= self._step), self._weights[0][1])


def _shuffle_into_shards(rows: int, data: config.Data, source: int) -> list[grain.MapDataset]:
    """The row numbers of a source in each shard, repeated without end, in a new order for each epoch."""
    seed = int(np.random.SeedSequence((data.seed % 2**32, source)).generate_state(1)[0])
    order = grain.MapDataset.source(range(rows)).seed(seed).shuffle().repeat()
    return [order.slice(slice(shard, None, data.shards)) for shard in range(data.shards)]


def _weights(data: config.Data, rows: list[int]) -> list[tuple]:
    """((step, weights), ...), sorted by step. Without data.weights, the weight of a source is its number of rows."""
    return sorted(data.weights) or [(0, rows)]


def _check_hosts(batch: int, shards: int, hosts: int) -> None:
    for name, value in (("train.batch", batch), ("data.shards", shards)):
        if value % hosts:
            raise ConfigError(f"{name}={value} must be divisible by the number of hosts ({hosts}), such as "
                              f"{-(-value // hosts) * hosts}")
