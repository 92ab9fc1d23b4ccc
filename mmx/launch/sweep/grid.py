"""The cells of a grid: experiments with the keys that made them, checked before any run starts."""
import dataclasses
import functools
import hashlib
import itertools
import json
import re

from mmx import config
from mmx.analysis.counts import flops_training
from mmx.config import ConfigError, Experiment, NonFiniteError
from mmx.data import encoding, held_out, tokens
from mmx.files import json_text


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the grid: its keys as the grid gives them, and the experiment that they make."""
    keys: dict
    experiment: Experiment

    @functools.cached_property
    def hash(self) -> str:
        """Identifies what the run computes: the sections model, train and data, and guard where it is not the default.

        The mesh is not part of it. The section checkpoint is part of it only with guard.spike, which rolls back to the last
        checkpoint.
        """
        sections = config.sections(self.experiment)
        hashed = {name: sections[name] for name in ("model", "train", "data")}
        hashed["data"] = {key: value for key, value in hashed["data"].items() if key != "cache"}
        if self.experiment.guard != config.Guard():     # the default is left out, so that hashes of older rows stay valid
            hashed["guard"] = sections["guard"]
        if self.experiment.guard.spike:
            hashed["checkpoint"] = sections["checkpoint"]
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        return "-".join([re.sub(r"[^\w.]+", "_", str(value)) for value in self.keys.values()] + [self.hash])

    @property
    def tokens(self) -> int:
        return self.experiment.train.tokens_seen(self.experiment.train.steps)

    @property
    def flops_per_token(self) -> float:
        return flops_training(self.experiment.model, self.experiment.train.length)

    @property
    def flops(self) -> float:
        return self.tokens * self.flops_per_token


def cells(grid, make) -> list[Cell]:
    """Returns the cells of a grid.

    Args:
      grid: what an experiment file's sweep() returns: a dict of values by key, whose product is the grid, or a list of dicts
        with one cell each.
      make: make(keys) returns the experiment of a cell.
    Raises:
      ConfigError: a cell is invalid, or two cells are the same run.
    """
    if isinstance(grid, dict):
        bad = [key for key, values in grid.items() if not isinstance(values, (list, tuple)) or not values]
        if bad:
            raise ConfigError(f"sweep(): {bad[0]!r} needs a list of values, got {grid[bad[0]]!r}")
        grid = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    if not isinstance(grid, (list, tuple)) or not grid or not all(isinstance(keys, dict) and keys for keys in grid):
        raise ConfigError("sweep() must return a dict of lists of values by key, or a list of dicts with one run each")
    result, number_of_hash, has_held_out = [], {}, functools.cache(_has_held_out)
    for number, keys in enumerate(grid, 1):
        label = f"cell {number} of {len(grid)} ({format_keys(keys)})"
        try:
            _check_keys(keys)
            cell = Cell(keys, make(keys))
            _check_experiment(cell.experiment, has_held_out)
        except ConfigError as error:
            raise ConfigError(f"{label}: {error}") from None
        if cell.hash in number_of_hash:
            raise ConfigError(f"{label} is the same run as cell {number_of_hash[cell.hash]}: the keys that differ do not "
                              "change the config")
        number_of_hash[cell.hash] = number
        result.append(cell)
    return result


def format_keys(keys: dict) -> str:
    return ", ".join(f"{key}={value}" for key, value in keys.items())


def _check_keys(keys: dict) -> None:
    """Raises ConfigError if a row cannot store the keys as JSON."""
    for key, value in keys.items():
        try:
            json_text.dumps(value)
        except NonFiniteError:
            raise ConfigError(f"{key}={value} is not a finite number") from None
        except (TypeError, ValueError):
            raise ConfigError(f"{key} has type {type(value).__name__}, which JSON cannot store: use int(x), float(x) or a "
                              "string") from None


def _check_experiment(e: Experiment, has_held_out) -> None:
    """Raises ConfigError for a mistake that a run would report only after it has started."""
    if e.train.seconds:
        raise ConfigError(f"train.seconds={e.train.seconds:g} leaves the number of steps open, so runs cannot be compared: set "
                          "train.steps instead")
    tokens.check_vocab(tokens.tokenizer(e.data.tokenizer), e.model.vocab)
    options = encoding.image_options(e)
    if not any([has_held_out(source, e.data, options) for source in e.data.sources]):       # a list: every source is checked
        raise ConfigError(f"data.sources={e.data.sources} have no held-out text or ids, so there would be no loss to report: "
                          "add a source that has")


def _has_held_out(source: str, data, options: encoding.ImageOptions) -> bool:
    """Whether a source has held-out text or ids; there is no loss on held-out images."""
    return source == "sotu" or any(True for _ in held_out.documents(source, data, "validation", options))
