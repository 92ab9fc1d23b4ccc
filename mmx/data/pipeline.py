"""The training stream: micro-batches [B, T] that resume exactly and do not depend on the number of hosts.

Each source's documents become rows (`packing.Packed`); Grain shuffles the rows, anew each epoch, repeats them for ever
and deals them to V virtual shards: shard v holds rows v, v + V, v + 2V, ... of that order. Shuffling rows, not
documents, spreads every batch over all documents and all their parts from the first step on, though speeches are
hundreds of rows long; and as all shards deal from one order, an epoch reads every row once.

The rows of a batch fall into gcd(B, V) equal blocks, which own equal blocks of shards and read them round-robin. Host h
of H makes rows [hB/H, (h+1)B/H), so it reads shards [hV/H, (h+1)V/H) alone, and the hosts' batches, concatenated in
their order, are the same global batch for every H that divides B and V.

A row's source is drawn from (seed, micro-batch, row) with the weights of the current step: those of the last step that
data.weights names or, with data.interpolate, on the line to those of the next. Every host draws for the
whole batch (it costs microseconds), so each knows the state of all V shards, how many rows of each source they have
given: the state is the same everywhere, and any number of hosts resumes from it.

Images are counted by their sizes when the stream is made, and decoded when a row that shows them is given. A batch's rows fall
into blocks, one for each of the mesh's data shards, and the tiles of a block's images lie together: as every host knows
which rows the whole batch has, all give their blocks room for as many tiles as the fullest has, by level.
"""
import functools
import itertools
import math
from typing import NamedTuple

import grain
import numpy as np

from mmx import config
from mmx.config import ConfigError
from mmx.data import images, packing, sources, tokens
from mmx.data.document_types import ImageText, PromptCompletion, TokenIds


def stream(data: config.Data, train: config.Train, *, host: int = 0, hosts: int = 1, vision: config.Vision | None = None,
           blocks: int = 1, share: int = 1) -> "Stream":
    """The micro-batches of `host` out of `hosts`, from the start. Of a model that has `vision` they have images: their tiles
    lie in `blocks` of rows, as many in each as split among `share` devices."""
    return Stream(data, train, host, hosts, vision or config.Vision(), blocks, share)


def together(batches: list[dict]) -> dict[str, np.ndarray]:
    """Micro-batches behind each other, [micro-batches, ...] by name, with room for the tiles of that with the most."""
    room = max((b["pixels"].shape[1] for b in batches if "pixels" in b), default=0)
    for b in batches:
        if "pixels" in b:
            more = room - b["pixels"].shape[1]
            b["pixels"] = np.pad(b["pixels"], [(0, 0), (0, more), (0, 0), (0, 0), (0, 0)])
            b["ends"] = np.pad(b["ends"], [(0, 0), (0, more)], constant_values=-1)
    return packing.stack(batches)


def validation(data: config.Data) -> list[tuple[str, bytes]]:
    """(name, raw bytes) of every document held out for validation; a prompt and its completion are one text."""
    return _held_out(data, "validation")


def held_out_ids(data: config.Data) -> dict[str, list]:
    """(tokens_T, targets_T) of every document of ids held out for validation, by source, where there are any."""
    every = {source: [content for _, content in sources.documents(source, "validation") if isinstance(content, TokenIds)]
             for source in dict.fromkeys(data.sources)}
    return {source: found for source, found in every.items() if found}


def test(data: config.Data) -> list[tuple[str, bytes]]:
    """(name, raw bytes) of every test document; none where the sources' names put none there."""
    return _held_out(data, "test")


def _held_out(data: config.Data, split: str) -> list[tuple[str, bytes]]:
    """Of several sources, as SOURCE/NAME: each has names of its own."""
    names = dict.fromkeys(data.sources)         # one that is there for several lengths is held out once
    return [(f"{source}/{name}" if len(names) > 1 else name, raw if isinstance(raw, bytes) else b"".join(raw))
            for source in names for name, raw in sources.documents(source, split)
            if not isinstance(raw, (TokenIds, ImageText))]


class Stream:
    def __init__(self, data: config.Data, train: config.Train, host: int, hosts: int, vision: config.Vision, blocks: int,
                 share: int):
        _check_hosts(train.batch, data.shards, hosts)
        self.data, self.train, self.vision = data, train, vision
        self._blocks, self._own_blocks, self._share = blocks, blocks // hosts, share
        self._own = slice(host * train.batch // hosts, (host + 1) * train.batch // hosts)
        tokenizer = tokens.tokenizer(data.tokenizer)
        documents = {source: _documents(source, tokenizer, vision, train.contrastive > 0)
                     for source in dict.fromkeys(data.sources)}
        chosen = [_between(documents[source], *span, source)
                  for source, span in zip(data.sources, data.lengths or [(0, 0)] * len(data.sources))]
        for d in itertools.chain(*chosen):
            if d.shown and len(d.ids_T) > train.length:
                raise ConfigError(f"{d.name} has {len(d.ids_T)} tokens with its images, train.length={train.length} is less, "
                                  "and it is not cut: give longer rows, or by data.lengths take shorter documents")
        self._packed = [packing.Packed([d.ids_T for d in found], train.length, [d.targets_T for d in found],
                                       [d.shown for d in found]) for found in chosen]
        self._sizes = [len(rows) for rows in self._packed]
        self._shards = [_deal(rows, data, number) for number, rows in enumerate(self._sizes)]
        self._weights = _weights(data, self._sizes)
        self._micro, self._step, self._left, self._lost = 0, -1, 0, 0
        self._given_VS = np.zeros((data.shards, len(self._sizes)), np.int64)

    def next(self) -> dict[str, np.ndarray]:
        """tokens, targets, segments, positions (int32) and weights (float32), each [B / hosts, T]. With vision also places
        (of `images.lay`), pixels [blocks / hosts, I, Y, X, Z] and ends [blocks / hosts, I]: where in its block, row by row, the
        last token of the text stands that tells of a tile alone, -1 for none; and tiles, how many the hosts' images have."""
        if not self._left:
            seen = (self._micro - self._lost) * self.train.batch * self.train.length
            self._step, self._left = self._step + 1, self.train.micro_batches(seen)
        picks = []
        for shard, source in zip(self._shards_B(), self._sources_B()):
            picks.append((source, shard, self._given_VS[shard, source]))
            self._given_VS[shard, source] += 1
        self._micro, self._left = self._micro + 1, self._left - 1
        rows = [self._packed[source][row] for source, row in map(self._row, picks[self._own])]
        shown = [row.pop("images", ()) for row in rows]
        batch = packing.stack(rows)
        return batch | self._seen(batch["tokens"], shown, map(self._row, picks)) if self.vision.layers else batch

    def _row(self, pick) -> tuple[int, int]:
        """The source of a row that a shard has dealt, and its number there."""
        source, shard, given = pick
        return source, int(self._shards[source][shard][int(given)])

    def _seen(self, tokens_BT, shown, rows):
        """What a batch has beside its text; `rows` are those of all hosts."""
        tiles_NB = np.array([self._packed[source].tiles(row) for source, row in rows]).reshape(self._blocks, -1)
        room = self._share * images.level(-(-int(tiles_NB.sum(1).max()) // self._share))
        pictures = [images.pictures(self.vision, [image for image, _ in row]) for row in shown]
        places_BT, pixels_NIYXZ = images.lay(self.vision, tokens_BT, pictures, self._own_blocks, room)
        ends_NI, size = np.full(pixels_NIYXZ.shape[:2], -1, np.int32), len(shown) // self._own_blocks
        for n, ends_I in enumerate(ends_NI):
            tile = 0
            for b in range(size):
                for (_, end), picture in zip(shown[n * size + b], pictures[n * size + b]):
                    ends_I[tile] = b * self.train.length + end if end >= 0 else -1
                    tile += len(picture.pixels_IYXZ)
        return {"places": places_BT, "pixels": pixels_NIYXZ, "ends": ends_NI, "tiles": tiles_NB.sum()}

    def state(self) -> dict:
        """Where the stream stands, for JSON; the same on every host."""
        return {"micro": self._micro, "step": self._step, "left": self._left, "lost": self._lost,
                "given": self._given_VS.tolist(), "rows": self._sizes}

    def restore(self, state: dict) -> None:
        """Goes on where `state` was taken, by however many hosts."""
        shape = (len(state["given"]), len(state["rows"]))
        if shape != self._given_VS.shape:
            raise ConfigError(f"the checkpoint's data has {shape[0]} shards and {shape[1]} sources, the config has "
                              f"{len(self._given_VS)} and {len(self._sizes)}: resume with the config it was made with")
        for source, was, now in zip(self.data.sources, state["rows"], self._sizes):
            if was != now:
                raise ConfigError(f"data source {source!r} has {now} rows of {self.train.length} tokens, had {was} at "
                                  "the checkpoint: its text, tokenizer or train.length has changed")
        self._micro, self._step, self._left = state["micro"], state["step"], state["left"]
        self._lost = state.get("lost", 0)       # of before any was
        self._given_VS = np.array(state["given"], np.int64)

    def repeat(self, state: dict) -> None:
        """The next step is that of `state`, an earlier one, with the data that come now: those between are lost."""
        self._step, self._left = state["step"], state["left"]
        self._lost = state.get("lost", 0) + self._micro - state["micro"]

    def _shards_B(self):
        batch, shards = self.train.batch, self.data.shards
        blocks = math.gcd(batch, shards)
        block, place = np.divmod(np.arange(batch), batch // blocks)
        turn = self._micro * (batch // blocks) + place
        return block * (shards // blocks) + turn % (shards // blocks)

    def _sources_B(self):
        weights = self._mixture()
        draws = np.random.default_rng((self.data.seed % 2**32, self._micro)).random(self.train.batch)
        return np.searchsorted(np.cumsum(weights) / np.sum(weights), draws, side="right")

    def _mixture(self):
        """The sources' weights in the current step."""
        if self.data.interpolate:
            steps, weights = zip(*self._weights)
            return [np.interp(self._step, steps, source) for source in zip(*weights)]
        return next((w for begin, w in reversed(self._weights) if begin <= self._step), self._weights[0][1])


class _Document(NamedTuple):
    ids_T: np.ndarray
    targets_T: np.ndarray | None        # its own; None: the next tokens
    shown: packing.Shown | None
    name: str


def _documents(source: str, tokenizer, vision: config.Vision, alone: bool) -> list[_Document]:
    """A source's training documents, in the smallest integers that hold their tokens."""
    kind, found = np.min_scalar_type(max(tokenizer.vocab, vision.layers and vision.token)), []
    for name, content in sources.documents(source, "train"):
        name = f"{source}, {name}"
        ids_T, *others = _document(tokenizer, content, name, vision, alone)
        found.append(_Document(ids_T.astype(kind), *others, name))
    return found


def _document(tokenizer, content, name: str, vision: config.Vision, alone: bool):
    """The tokens of what `sources` found, their own targets, None for text, and its images, None without any."""
    if isinstance(content, bytes):
        return tokens.document(tokenizer, content, name), None, None
    if isinstance(content, PromptCompletion):
        return *tokens.prompted(tokenizer, *content, name), None
    if isinstance(content, ImageText):
        return _pictured(tokenizer, content, name, vision, alone)
    tokens.check_ids(tokenizer, np.concatenate(content), name)
    return *content, None


def _pictured(tokenizer, content: ImageText, name: str, v: config.Vision, alone: bool):
    """As of a prompt and its completion; an image is nowhere a target. `alone`: behind one image's caption, which is all
    learned, its text stands once more, without the image, to be no target."""
    if not v.layers:
        raise ConfigError(f"{name} shows an image, and this model reads text alone: set model.vision.layers, or leave it out")
    try:
        sizes = [images.size(image) for image in content.images]
        counts, marks = [_measure(v, size)[0] for size in sizes], content.prompt.count(images.MARK.encode())
        asked_T, said_T = (images.encode(v, text, some, functools.partial(tokenizer.encode, name=name)) for text, some in (
            (content.prompt, counts[:marks]), (content.completion, counts[marks:])))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    ids_T = np.concatenate([[tokenizer.bos], asked_T, said_T, [tokenizer.eos]], dtype=np.int32)
    targets_T = np.concatenate([np.full(len(asked_T), -1), said_T, [tokenizer.eos, -1]], dtype=np.int32)
    targets_T[targets_T == v.token] = -1
    text_T = ids_T[ids_T != v.token] if alone and not content.prompt and len(sizes) == 1 else ids_T[:0]
    tiles = sum(_measure(v, size)[1] for size in sizes)
    return (np.concatenate([ids_T, text_T]), np.concatenate([targets_T, np.full(len(text_T), -1, np.int32)]),
            packing.Shown(content.images, tiles, len(text_T)))


@functools.cache
def _measure(v: config.Vision, size) -> tuple[int, int]:
    """An image's tokens and tiles."""
    return int(images.count(v, *size)), int(images.tiles(v, *size))


def _between(documents: list, least: int, below: int, source: str) -> list:
    """Those of at least and below so many tokens, bos and eos included."""
    found = [d for d in documents if least <= len(d.ids_T) < (below or math.inf)]
    if not found:
        sizes = sorted(len(d.ids_T) for d in documents)
        raise ConfigError(f"data.lengths: {source!r} has no training document of {least:,} tokens or more"
                          + f" and below {below:,}" * bool(below) + f"; its {len(sizes):,} have {sizes[0]:,} to {sizes[-1]:,}")
    return found


def _deal(rows: int, data: config.Data, source: int) -> list[grain.MapDataset]:
    """The numbers of a source's rows in V virtual shards: endless, each epoch in another order."""
    seed = int(np.random.SeedSequence((data.seed % 2**32, source)).generate_state(1)[0])
    order = grain.MapDataset.source(range(rows)).seed(seed).shuffle().repeat()
    return [order.slice(slice(shard, None, data.shards)) for shard in range(data.shards)]


def _weights(data: config.Data, sizes: list[int]) -> list[tuple]:
    """((step, weights), ...), by step; without data.weights, by size."""
    return sorted(data.weights) or [(0, sizes)]


def _check_hosts(batch: int, shards: int, hosts: int) -> None:
    for name, value in (("train.batch", batch), ("data.shards", shards)):
        if value % hosts:
            raise ConfigError(f"{name}={value} does not divide among {hosts} hosts; {-(-value // hosts) * hosts} would")
