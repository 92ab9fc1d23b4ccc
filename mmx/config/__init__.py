"""What an experiment is: frozen dataclasses, built once from an `ml_collections.ConfigDict`.

An experiment file's `get_config()` starts from `default()` and sets what it changes. `build` checks the ConfigDict and returns
an `Experiment`; the rest of mmx never sees the ConfigDict. docs/configuration.md lists every key. This package imports no jax,
so that data, scaling laws and a machine without a device can read any config.
"""
from mmx.config.build import as_config_dict, build, default, from_json, sections, to_json
from mmx.config.errors import ConfigError, NonFiniteError, nearest
from mmx.config.parsing import is_text, parse_lengths, typed, value_at
from mmx.config.schema import (
    IMPLEMENTATION_KEYS,
    LATER_KEYS,
    MOST_PIXELS,
    NUMBERS,
    SECTIONS,
    Checkpoint,
    Data,
    Experiment,
    Guard,
    Mesh,
    Model,
    Train,
    Vision,
    tokenizer_file,
)

__all__ = [
    "IMPLEMENTATION_KEYS", "LATER_KEYS", "MOST_PIXELS", "NUMBERS", "SECTIONS", "Checkpoint", "ConfigError", "Data",
    "Experiment", "Guard", "Mesh", "Model", "NonFiniteError", "Train", "Vision", "as_config_dict", "build", "default",
    "from_json", "is_text", "nearest", "parse_lengths", "sections", "to_json", "tokenizer_file", "typed", "value_at",
]
