"""The token store of a source of files: the source itself if it is a store, otherwise a store that is prepared in a cache.

A cached store is used again as long as the files of its source have the same sizes and times of their last changes, and the
tokenizer is the same. The cache may be deleted at any time.
"""
import hashlib
import os
from pathlib import Path

import filelock

from mmx import config
from mmx.config import ConfigError
from mmx.data import sources
from mmx.data.encoding import TEXT_ONLY, ImageOptions
from mmx.data.store import identity, layout, preparing, reading, writing
from mmx.files import json_text, urls


def open_store(source: str, data: config.Data, options: ImageOptions = TEXT_ONLY) -> reading.Store:
    """The token store of a source that is a store, a file, a folder, or the embedded corpus. Prepares it if necessary."""
    wanted = identity.tokenizer(data.tokenizer), identity.images(options)
    if reading.is_store(source):
        store = reading.Store(source)
        identity.check(store.manifest, f"data.sources: {source}", *wanted)
        return store
    files = sources.list_files(source)
    versions = [preparing.file_version(path, files.name(path)) for path in files.paths]
    base = str(files.base) if urls.is_url(files.base) else os.path.abspath(files.base)
    key = [layout.VERSION, base, versions, *wanted, data.columns]
    name = hashlib.sha256(json_text.dumps(key).encode()).hexdigest()[:32]
    folder = cache_folder(data.cache) / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{folder}.lock"):       # one process prepares, the others wait
            if not reading.is_store(folder):
                settings = writing.Settings(folder, data.tokenizer, options, data.columns)
                return preparing.prepare(source, settings)
    except OSError as error:
        raise ConfigError(f"data.cache: {folder.parent} cannot be written ({error.strerror or error}): give a folder with "
                          "space, as --config.data.cache=FOLDER") from None
    store = reading.Store(folder)
    if files.skipped:       # said again in each run
        sources.note_skipped(source, files, store.image_files())
    return store


def cache_folder(given: str) -> Path:
    """The folder of data.cache; empty: in the user's cache folder."""
    if given:
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "mmx" / "data"
    except RuntimeError:        # no home folder
        raise ConfigError("data.cache is empty and there is no home folder: give --config.data.cache=FOLDER") from None
