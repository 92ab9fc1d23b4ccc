"""Token stores. The oracle is the source read into memory: `sources.documents`, encoded and packed at once."""
import bz2
import dataclasses
import gzip
import json
import random
import shutil

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from mmx import cli
from mmx.config import ConfigError, Data
from mmx.data import encoding, held_out, packing, rows, sources, tokens
from mmx.data.document_types import TokenIds
from mmx.data.store import cache, layout, preparing, reading, writing
from mmx.files import texts

ALPHABET = "abcdé \n中"


def random_text(r, most=200):
    return "".join(r.choice(ALPHABET) for _ in range(r.randrange(1, most)))


def random_line(r, kind):
    if kind == "prompts" and r.random() < 0.4:
        return {"prompt": random_text(r), "completion": random_text(r, 20)}
    if kind == "ids" and r.random() < 0.4:
        n = r.randrange(1, 30)
        return {"tokens": [r.randrange(200) for _ in range(n)], "targets": [r.randrange(-1, 200) for _ in range(n)]}
    return {"text": random_text(r)}


def write_source(folder, kind, seed, files=3):
    r = random.Random(seed)
    folder.mkdir()
    for n in range(files):
        if kind == "txt":
            (folder / f"{n}.txt").write_text(random_text(r) * 9)
        else:
            lines = [json.dumps(random_line(r, kind)) for _ in range(r.randrange(20, 80))]
            (folder / f"{n}.jsonl").write_text("\n\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Sizes for which a small source has many parts and batches."""
    monkeypatch.setattr(preparing, "PART_BYTES", 3000)
    monkeypatch.setattr(preparing, "BATCH_BYTES", 500)
    monkeypatch.setattr(texts, "CHUNK", 700)


def files_of(store) -> dict:
    return {path.name: path.read_bytes() for path in sorted((store / "parts").iterdir())}


def prepare(source, out, jobs=1, **settings):
    return preparing.prepare(str(source), writing.Settings(out, "bytes", **settings), jobs)


@pytest.mark.parametrize("kind, seed, length, bounds, files", [
    ("txt", 0, 40, (0, 0), 3), ("txt", 1, 7, (0, 0), 1), ("texts", 2, 64, (0, 0), 3), ("texts", 3, 33, (9, 120), 4),
    ("prompts", 4, 50, (0, 0), 3), ("ids", 5, 25, (0, 0), 3), ("prompts", 6, 300, (0, 0), 1), ("ids", 7, 16, (4, 0), 2)])
def test_rows_and_held_out_documents_equal_those_of_the_source_in_memory(tmp_path, kind, seed, length, bounds, files):
    source, tokenizer = write_source(tmp_path / "source", kind, seed, files), tokens.tokenizer("bytes")
    data = Data(sources=(source,), cache=str(tmp_path / "cache"))
    documents = [encoding.encode(tokenizer, content, name) for name, content in sources.documents(source, "train")]
    documents = [d for d in documents if bounds[0] <= len(d.ids_T) < (bounds[1] or np.inf)]
    wanted = packing.Packed(packing.Documents(*zip(*documents)), length)
    found = rows.pack(source, data, length, bounds, encoding.TEXT_ONLY)
    assert len(found) == len(wanted)
    for row in range(len(wanted)):
        for name, x in wanted[row].items():
            assert found[row][name].dtype == x.dtype
            np.testing.assert_array_equal(found[row][name], x)
    for split in ("validation", "test"):
        texts, kept = sources.documents(source, split), list(held_out.documents(source, data, split))
        assert [name for name, _ in kept] == [name for name, _ in texts]
        for (_, a), (_, b) in zip(texts, kept):
            assert all(map(np.array_equal, a, b)) if isinstance(a, TokenIds) else a == b
    manifest = cache.open_store(source, data).manifest
    for split, count in manifest.splits.items():
        contents = [content for _, content in sources.documents(source, split)]
        assert count["documents"] == len(contents) and count["bytes"] == sum(map(sources.size, contents))
        arrays = [packing.span_arrays(d.ids_T, d.targets_T, 0, len(d.ids_T))[1] for d in
                  (encoding.encode(tokenizer, content, "") for content in contents)]
        assert count["targets"] == sum(int((targets_T >= 0).sum()) for targets_T in arrays)


def test_the_last_part_of_the_text_is_held_out_where_names_hold_out_none(tmp_path):
    """One file of lines whose names are all for training: the border is inside a document of a later part."""
    lines = [json.dumps({"text": f"{n} " + "é" * 400}) for n in range(2, 9)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    store = prepare(tmp_path / "a.jsonl", tmp_path / "store")
    manifest = store.manifest
    assert manifest.border and manifest.parts[-1].name == layout.BORDER and len(manifest.parts) > 2
    found = list(store.held_out("validation"))
    assert found == sources.documents(str(tmp_path / "a.jsonl"), "validation") and found[0][1].decode().strip("é") == ""
    assert manifest.splits["train"]["documents"] == len(sources.documents(str(tmp_path / "a.jsonl"), "train"))


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2", "parquet"])
def test_the_same_documents_in_another_format_give_the_same_store(tmp_path, suffix):
    source = tmp_path / "source"
    write_source(source, "prompts", 1)
    wanted = prepare(source, tmp_path / "wanted")
    other = tmp_path / "other"
    other.mkdir()
    for path in source.iterdir():
        raw = path.read_bytes().replace(b"\n\n", b"\n")
        path.write_bytes(raw)
        if suffix == "parquet":
            values = [json.loads(line) for line in raw.splitlines()]
            table = pyarrow.table({key: [v.get(key) for v in values] for key in ("text", "prompt", "completion")})
            parquet.write_table(table, other / path.with_suffix(".parquet").name, row_group_size=7)
        else:
            compress = {"gz": gzip.compress, "zst": zstandard.compress, "bz2": bz2.compress}[suffix]
            (other / f"{path.name}.{suffix}").write_bytes(compress(raw))
    wanted = prepare(source, tmp_path / "store")
    found = prepare(other, tmp_path / "found")

    def contents(store):        # the units differ, because the files have other sizes
        parts = range(len(store.manifest.parts))
        return (b"".join(store.tokens(p).tobytes() for p in parts), [list(store.held_out(s)) for s in ("validation", "test")],
                [np.diff(store.records(p)["end"].astype(int), prepend=0).tolist() for p in parts] and store.manifest.splits)
    assert contents(found) == contents(wanted)


def test_the_store_does_not_depend_on_jobs(tmp_path):
    source = write_source(tmp_path / "source", "ids", 3)
    prepare(source, tmp_path / "one")
    prepare(source, tmp_path / "two", jobs=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") and len(files_of(tmp_path / "one")) > 10


def test_a_preparation_that_died_continues(tmp_path, monkeypatch):
    source = write_source(tmp_path / "source", "prompts", 3)
    prepare(source, tmp_path / "wanted")
    add, made = writing.Writer.add, []

    def dies(writer, *args):
        made.append(writer)
        if len(made) == 9:
            raise KeyboardInterrupt
        add(writer, *args)
    monkeypatch.setattr(writing.Writer, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "store")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store" / "parts").glob("*.json")}
    assert before and not reading.is_store(tmp_path / "store")
    prepare(source, tmp_path / "store")
    assert files_of(tmp_path / "store") == files_of(tmp_path / "wanted")
    assert all((tmp_path / "store" / "parts" / name).stat().st_mtime_ns == changed for name, changed in before.items())


def test_a_cached_store_is_used_again_until_its_files_change(tmp_path, monkeypatch):
    source = write_source(tmp_path / "source", "texts", 1)
    data = Data(sources=(source,), cache=str(tmp_path / "cache"))
    first = cache.open_store(source, data)
    monkeypatch.setattr(preparing, "prepare", lambda *args: pytest.fail("prepared again"))
    assert cache.open_store(source, data).folder == first.folder
    monkeypatch.undo()
    with (tmp_path / "source" / "0.jsonl").open("a") as file:
        file.write('{"text": "new"}\n')
    again = cache.open_store(source, data)
    assert again.folder != first.folder
    count = lambda store: sum(part.documents for part in store.manifest.parts if part.name != layout.BORDER)
    assert count(again) == count(first) + 1


def test_files_that_are_not_read_are_listed_in_each_run(tmp_path, capfd):
    source = write_source(tmp_path / "source", "texts", 1)
    (tmp_path / "source" / "a.arrow").write_bytes(b"ARROW1")
    for run in "12":        # the second run finds the store in the cache, and its source at another path
        link = tmp_path / f"run{run}"
        link.symlink_to(source)
        cache.open_store(str(link), Data(cache=str(tmp_path / "cache")))
        [line] = capfd.readouterr().err.splitlines()
        assert "skipped a.arrow (not of a kind that is read" in line
    assert cli.main(["data", "prepare", "--source", source, "--out", str(tmp_path / "store")]) == 0
    assert "skipped a.arrow (not of a kind that is read" in capfd.readouterr().err


def test_columns_are_found_by_their_names_or_given(tmp_path):
    lines = {"content": "a" * 50, "title": "t", "question": "q", "answer": "b" * 50, "body": "c" * 50}
    (tmp_path / "a.jsonl").write_text((json.dumps(lines) + "\n") * 40)

    def first(columns):
        store = prepare(tmp_path / "a.jsonl", tmp_path / f"store{len(list(tmp_path.iterdir()))}", columns=columns)
        return bytes(int(i) for i in store.tokens(0)[:53] if i < 256).decode()
    assert first("") == "a" * 50 and first("text=body") == "c" * 50
    assert first("prompt=question,completion=answer") == "q" + "b" * 50
    for columns, message in (("text=none", 'no "none" string'), ("prompt=question", "must name a text, or a prompt"),
                             ("texts=body", "'texts=body' must be text=NAME")):
        with pytest.raises(ConfigError, match=message):
            first(columns)


def test_damaged_files_are_skipped_if_asked(tmp_path, capfd):
    source = tmp_path / "source"
    write_source(source, "texts", 2)
    good = prepare(source, tmp_path / "good")
    (source / "1b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "lost"}\n' * 5000, mtime=0)[:-30])
    (source / "2b.jsonl").write_text('{"text": "lost"}\n{"text": ')
    (source / "3.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"3\.parquet is not a Parquet file, or is damaged"):
        prepare(source, tmp_path / "bad")
    assert not reading.is_store(tmp_path / "bad")
    (source / "3.parquet").unlink()
    found = prepare(source, tmp_path / "skipped", skip_bad=True)
    assert found.manifest.splits == good.manifest.splits
    assert b"".join(found.tokens(p).tobytes() for p in range(len(found.manifest.parts))) == b"".join(
        good.tokens(p).tobytes() for p in range(len(good.manifest.parts)))
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(":")[1].split("/")[-1] for line in lines] == ["1b.jsonl.gz", "2b.jsonl"]
    assert all(line.startswith("mmx: skipped ") for line in lines)


def test_stores_that_cannot_be_used_are_one_line(tmp_path):
    source = write_source(tmp_path / "source", "texts", 2)
    store = tmp_path / "store"
    prepare(source, store)
    data = Data(sources=(str(store),))
    assert len(rows.pack(str(store), data, 32, (0, 0), encoding.TEXT_ONLY)) > 10

    def refused(message, change, data=data):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(store, folder)
        change(folder)
        with pytest.raises(ConfigError, match=message) as error:
            packed = rows.pack(str(folder), data, 32, (0, 0), encoding.TEXT_ONLY)
            [packed[n] for n in range(len(packed))]
        assert "\n" not in str(error.value)

    def edit(**changes):
        return lambda folder: (folder / "manifest.json").write_text(
            json.dumps(json.loads((store / "manifest.json").read_text()) | changes))
    nothing = lambda folder: None
    refused("was made with another tokenizer than data.tokenizer .*name, .*vocab", nothing,
            dataclasses.replace(data, tokenizer="numbers:99"))
    refused("is a token store of format 2; this mmx reads format 1: update mmx", edit(format=2))
    refused("is not a manifest of a token store", lambda folder: (folder / "manifest.json").write_text('{"format": 1}'))
    refused("is damaged: .*00001.tokens has 5 bytes, not", lambda folder: (folder / "parts/00001.tokens").write_bytes(b"short"))
    refused("is incomplete: no .*00000.documents", lambda folder: (folder / "parts/00000.documents").unlink())


def test_documents_without_targets_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"tokens": [1, 2, 3], "targets": [-1, -1, -1]}\n' * 60)
    with pytest.raises(ConfigError, match="the training documents of .*a.jsonl' have no target to learn"):
        rows.pack(str(tmp_path / "a.jsonl"), Data(cache=str(tmp_path)), 8, (0, 0), encoding.TEXT_ONLY)


def test_a_folder_of_another_preparation_is_refused(tmp_path):
    source = write_source(tmp_path / "source", "texts", 2)
    prepare(source, tmp_path / "store")
    with pytest.raises(ConfigError, match="was begun with other columns: delete it, or give another --out"):
        prepare(source, tmp_path / "store", columns="text=text")
    (tmp_path / "other" / "parts").mkdir(parents=True)
    (tmp_path / "other" / "parts" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="contains other files"):
        prepare(source, tmp_path / "other")


def test_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_source(tmp_path / "source", "prompts", 5)
    assert cli.main(["data", "tokenizer", "--source", "source", "--vocab", "300", "--out", "t/tokenizer.json"]) == 0
    assert "300 token ids" in capsys.readouterr().out
    command = ["data", "prepare", "--source", "source", "--tokenizer", "t/tokenizer.json", "--out", "store"]
    assert cli.main(command) == 0 and cli.main(command) == 0
    assert "written: store: train" in capsys.readouterr().out
    assert cli.main(["data", "show", "store", "--json", "--out", "."]) == 0
    found = json.loads(capsys.readouterr().out)
    store = reading.Store("store")
    assert found["splits"] == store.manifest.splits and found["tokenizer"]["vocab"] == 300
    assert sum(count for _, count, _ in found["lengths"]) == found["splits"]["train"]["documents"]
    assert sum(total for _, _, total in found["lengths"]) == found["splits"]["train"]["tokens"]
    [first, *_] = sources.documents("source", "train")
    text = "".join(part.decode() for part in encoding.texts_of(first[1]))
    assert text.startswith(found["texts"][0][:50]) and (tmp_path / "lengths.png").stat().st_size > 5000
    assert cli.main(["data", "show", "store"]) == 0 and "training documents by length" in capsys.readouterr().out
    assert cli.main(["data", "show", "source"]) == 2
    assert "mmx: source is not a token store" in capsys.readouterr().err
