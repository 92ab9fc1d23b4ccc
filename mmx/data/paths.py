"""Paths in a config: which keys have them, and how they are made absolute.

A relative path in a config is relative to the current folder of the command that reads the config. A run saves absolute paths
in its config.json, so later commands find the same files from any folder.
"""
import dataclasses
import os
import sys

from mmx import config
from mmx.config import ConfigError
from mmx.data import sources, token_tasks
from mmx.files import urls

INITIAL = "init_from", "init_vision"        # keys of the section train that are paths


def absolute(path: str) -> str:
    """The path from the root, with "~" expanded and without "." and "..". Links are kept. An empty path stays empty."""
    return path if not path or urls.is_url(path) else os.path.abspath(os.path.expanduser(path))


def is_same(a: str, b: str) -> bool:
    """Whether two paths are the same file or folder."""
    if urls.is_url(a) or urls.is_url(b):
        return a == b
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


def adopt_paths(saved: dict, e: config.Experiment) -> dict:
    """The saved sections of a run, with the paths of `e` where both are the same file or folder.

    A saved path that does not exist here is taken to have moved to the new path: one line on stderr says so.
    """
    data, train = dict(saved.get("data", {})), dict(saved.get("train", {}))
    sources = data.get("sources", ())
    if len(sources) == len(e.data.sources):
        data["sources"] = [_adopt("data.sources", old, new) if is_source_path(new) else old
                           for old, new in zip(sources, e.data.sources)]
    if config.tokenizer_file(str(data.get("tokenizer", "bytes"))) and e.data.tokenizer_file:
        data["tokenizer"] = _adopt("data.tokenizer", data["tokenizer"], e.data.tokenizer)
    for key in INITIAL:
        if train.get(key):
            train[key] = _adopt(f"train.{key}", train[key], getattr(e.train, key))
    return saved | {name: section for name, section in (("data", data), ("train", train)) if name in saved}


def _adopt(key: str, old: str, new: str) -> str:
    if not isinstance(old, str) or not new or is_same(old, new):
        return new if new and isinstance(old, str) else old
    if not urls.is_url(old) and not urls.is_url(new) and not os.path.exists(absolute(old)) and os.path.exists(absolute(new)):
        print(f"mmx: {key}: {old} of the saved run does not exist here, so {new} is taken to be the same", file=sys.stderr)
        return new
    return old


def check_workdir(workdir, data: config.Data) -> None:
    """Raises ConfigError if a source of files contains the working directory, whose metrics.jsonl would become a document."""
    for source in filter(is_source_path, data.sources):
        if urls.is_url(source):
            continue
        folder, inside = os.path.realpath(absolute(source)), os.path.realpath(absolute(str(workdir)))
        if os.path.commonpath([folder, inside]) == folder and os.path.isdir(folder):
            raise ConfigError(f"--workdir {workdir} is inside the data source {source}, so the run's own files would be read "
                              "as text: give a --workdir outside it")
