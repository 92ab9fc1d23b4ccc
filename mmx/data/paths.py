"""Paths in a config: which keys have them, and how they are made absolute.

A relative path in a config is relative to the current folder of the command that reads the config. A run saves absolute paths
in its config.json, so later commands find the same files from any folder.
"""
import dataclasses
import os

from mmx import config
from mmx.data import sources, token_tasks

INITIAL = "init_from", "init_vision"        # keys of the section train that are paths


def absolute(path: str) -> str:
    """The path from the root, with "~" expanded and without "." and "..". Links are kept. An empty path stays empty."""
    return path and os.path.abspath(os.path.expanduser(path))


def is_same(a: str, b: str) -> bool:
    """Whether two paths are the same file or folder."""
    return os.path.realpath(absolute(a)) == os.path.realpath(absolute(b))


def is_source_path(source: str) -> bool:
    """Whether a data source is a file or a folder, not the embedded corpus or a generated task."""
    return source != "sotu" and source not in sources.GENERATED and not token_tasks.matches(source)


def absolute_data(data: config.Data) -> config.Data:
    """The section data with absolute paths."""
    names = tuple(absolute(source) if is_source_path(source) else source for source in data.sources)
    tokenizer = absolute(data.tokenizer) if data.tokenizer_file else data.tokenizer
    return dataclasses.replace(data, sources=names, tokenizer=tokenizer)


def absolute_experiment(e: config.Experiment) -> config.Experiment:
    """The experiment with absolute paths."""
    train = dataclasses.replace(e.train, **{key: absolute(getattr(e.train, key)) for key in INITIAL})
    return dataclasses.replace(e, train=train, data=absolute_data(e.data))
