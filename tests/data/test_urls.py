"""Sources at URLs: an fsspec file system in memory, and a web server on this machine."""
import functools
import gzip
import http.server
import threading

import numpy as np
import pytest
from upath import UPath

from mmx import cli
from mmx.config import ConfigError, Data
from mmx.data import encoding, paths, rows, sources
from mmx.data.store import cache
from mmx.files import urls

LINES = gzip.compress(b'{"text": "one"}\n' * 50, mtime=0)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    for n in range(30):
        (path / f"{n}.txt").write_text(f"{n} hello " * 50)
    (path / "x.jsonl.gz").write_bytes(LINES)
    return path


@pytest.fixture
def server(folder):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def test_a_folder_in_an_object_store_equals_one_on_disk(folder, tmp_path):
    bucket = UPath("memory://bucket/source")
    bucket.mkdir(parents=True)
    for path in folder.iterdir():
        (bucket / path.name).write_bytes(path.read_bytes())
    data = Data(cache=str(tmp_path / "cache"))
    wanted, found = (rows.pack(source, data, 64, (0, 0), encoding.TEXT_ONLY) for source in (str(folder), str(bucket)))
    assert len(found) == len(wanted)
    for row in range(len(wanted)):
        np.testing.assert_array_equal(found[row]["tokens"], wanted[row]["tokens"])
    first = cache.open_store(str(bucket), data)
    assert cache.open_store(str(bucket), data).folder == first.folder
    (bucket / "0.txt").write_bytes(b"changed")
    assert cache.open_store(str(bucket), data).folder != first.folder


def test_a_file_of_a_web_server_is_read(server, tmp_path):
    store = cache.open_store(f"{server}/x.jsonl.gz", Data(cache=str(tmp_path / "cache")))
    assert sum(count["documents"] for count in store.manifest.splits.values()) == 50
    assert store.manifest.splits["train"]["tokens"] == 5 * store.manifest.splits["train"]["documents"]


@pytest.mark.parametrize("source, message", [
    ("foo://bucket/a.txt", "foo://bucket/a.txt: .*; known are gs://"), ("memory://nothing/here", "no file or folder"),
    ("http://127.0.0.1:1/x.jsonl", "no file or folder 'http://127.0.0.1:1/x.jsonl'"),
])
def test_mistakes_are_one_line(source, message):
    with pytest.raises(ConfigError, match=message) as error:
        sources.list_files(source)
    assert "\n" not in str(error.value)


def test_workdirs_and_outputs_cannot_be_urls_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in (["train", "--config", "tiny", "--workdir", "gs://bucket/run"], ["generate", "--checkpoint", "gs://b/run"],
                    ["data", "prepare", "--source", "sotu", "--out", "s3://bucket/store"]):
        assert cli.main(command) == 2
        assert "object stores are read as data sources only; give a path on a disk" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_paths_of_urls_stay_as_they_are():
    assert paths.absolute("gs://bucket/a") == "gs://bucket/a" and paths.is_same("gs://b/a", "gs://b/a")
    assert not paths.is_same("gs://bucket/a", "/bucket/a") and urls.is_url("hf://datasets/a/b") and not urls.is_url("a:/b")
