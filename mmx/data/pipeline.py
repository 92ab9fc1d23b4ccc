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
"""
import math

import grain
import numpy as np

from mmx import config
from mmx.config import ConfigError
from mmx.data import packing, sources, tokens


def stream(data: config.Data, train: config.Train, *, host: int = 0, hosts: int = 1) -> "Stream":
    """The micro-batches of `host` out of `hosts`, from the start."""
    return Stream(data, train, host, hosts)


def validation(data: config.Data) -> list[tuple[str, bytes]]:
    """(name, raw bytes) of every document held out for validation; a prompt and its completion are one text."""
    return _held_out(data, "validation")


def held_out_ids(data: config.Data) -> dict[str, list]:
    """(tokens_T, targets_T) of every document of ids held out for validation, by source, where there are any."""
    every = {source: [content for _, content in sources.documents(source, "validation") if isinstance(content, sources.Ids)]
             for source in dict.fromkeys(data.sources)}
    return {source: found for source, found in every.items() if found}


def test(data: config.Data) -> list[tuple[str, bytes]]:
    """(name, raw bytes) of every test document; none where the sources' names put none there."""
    return _held_out(data, "test")


def _held_out(data: config.Data, split: str) -> list[tuple[str, bytes]]:
    """Of several sources, as SOURCE/NAME: each has names of its own."""
    names = dict.fromkeys(data.sources)         # one that is there for several lengths is held out once
    return [(f"{source}/{name}" if len(names) > 1 else name, raw if isinstance(raw, bytes) else b"".join(raw))
            for source in names for name, raw in sources.documents(source, split) if not isinstance(raw, sources.Ids)]


class Stream:
    def __init__(self, data: config.Data, train: config.Train, host: int, hosts: int):
        _check_hosts(train.batch, data.shards, hosts)
        self.data, self.train = data, train
        self._own = slice(host * train.batch // hosts, (host + 1) * train.batch // hosts)
        tokenizer = tokens.tokenizer(data.tokenizer)
        documents = {source: _documents(source, tokenizer) for source in dict.fromkeys(data.sources)}
        chosen = [_between(documents[source], *span, source)
                  for source, span in zip(data.sources, data.lengths or [(0, 0)] * len(data.sources))]
        packed = [packing.Packed([ids for ids, _ in found], train.length, [own for _, own in found]) for found in chosen]
        self._shards = [_deal(rows, data, number) for number, rows in enumerate(packed)]
        self._sizes = [len(rows) for rows in packed]
        self._weights = _weights(data, self._sizes)
        self._micro, self._step, self._left = 0, -1, 0
        self._given_VS = np.zeros((data.shards, len(packed)), np.int64)

    def next(self) -> dict[str, np.ndarray]:
        """tokens, targets, segments, positions (int32) and weights (float32), each [B / hosts, T]."""
        if not self._left:
            self._step, self._left = self._step + 1, self._micro_batches()
        picks = []
        for shard, source in zip(self._shards_B(), self._sources_B()):
            picks.append((source, shard, self._given_VS[shard, source]))
            self._given_VS[shard, source] += 1
        self._micro, self._left = self._micro + 1, self._left - 1
        return packing.stack(self._shards[source][shard][int(row)] for source, shard, row in picks[self._own])

    def state(self) -> dict:
        """Where the stream stands, for JSON; the same on every host."""
        return {"micro": self._micro, "step": self._step, "left": self._left, "given": self._given_VS.tolist(),
                "rows": self._sizes}

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
        self._given_VS = np.array(state["given"], np.int64)

    def _micro_batches(self) -> int:
        """Micro-batches of the step that begins now, by train.ramp."""
        seen = self._micro * self.train.batch * self.train.length
        return next((count for begin, count in reversed(self.train.ramp) if begin <= seen), 1)

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


def _documents(source: str, tokenizer) -> list[tuple]:
    """A source's training documents, in the smallest integers that hold their tokens, each with its own targets or None."""
    kind = np.min_scalar_type(tokenizer.vocab)
    return [(ids.astype(kind), targets) for ids, targets in (
        _document(tokenizer, content, f"{source}, {name}") for name, content in sources.documents(source, "train"))]


def _document(tokenizer, content, name: str):
    """The tokens of what `sources` found, and their own targets, None for text."""
    if isinstance(content, bytes):
        return tokens.document(tokenizer, content, name), None
    if isinstance(content, sources.Prompted):
        return tokens.prompted(tokenizer, *content, name)
    tokens.check_ids(tokenizer, np.concatenate(content), name)
    return content


def _between(documents: list, least: int, below: int, source: str) -> list:
    """Those of at least and below so many tokens, bos and eos included."""
    found = [d for d in documents if least <= len(d[0]) < (below or math.inf)]
    if not found:
        sizes = sorted(len(ids) for ids, _ in documents)
        raise ConfigError(f"data.lengths: {source!r} has no training document of {least:,} tokens or more"
                          + f" and below {below:,}" * bool(below) + f"; its {len(sizes):,} have {sizes[0]:,} to {sizes[-1]:,}")
    return found


def _deal(rows: packing.Packed, data: config.Data, source: int) -> list[grain.MapDataset]:
    """The V virtual shards of a source: endless, each epoch in another order."""
    seed = int(np.random.SeedSequence((data.seed % 2**32, source)).generate_state(1)[0])
    order = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
    return [order.slice(slice(shard, None, data.shards)) for shard in range(data.shards)]


def _weights(data: config.Data, sizes: list[int]) -> list[tuple]:
    """((step, weights), ...), by step; without data.weights, by size."""
    for step, weights in data.weights:
        if not all(isinstance(w, (int, float)) and 0 <= w < math.inf for w in weights) or not sum(weights):
            raise ConfigError(f"data.weights={weights} from step {step}: weights are 0 or more, and not all 0")
    return sorted(data.weights) or [(0, sizes)]


def _check_hosts(batch: int, shards: int, hosts: int) -> None:
    for name, value in (("train.batch", batch), ("data.shards", shards)):
        if value % hosts:
            raise ConfigError(f"{name}={value} does not divide among {hosts} hosts; {-(-value // hosts) * hosts} would")
