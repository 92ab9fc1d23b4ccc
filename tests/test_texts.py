"""Text files and JSON lines: every reader gives the same text of the same file, and passes over nothing silently."""
import bz2
import gzip
import io
import json
import lzma
import re
from pathlib import Path

import pytest

from mmx.analysis import runs
from mmx.config import ConfigError
from mmx.data import captions, sources
from mmx.evals import runner, user_files
from mmx.files import texts
from mmx.launch.sweep import rows
from mmx.training import metrics

SEPARATORS = "a\u2028b\u2029c\x85d\x1ce"         # str.splitlines ends a line at each of them


def documents(path) -> dict:
    return {name: content for part in ("train", "validation", "test") for name, content in sources.documents(str(path), part)}


def whole(path) -> bytes:
    """The text of a source of one document, whose last 5 % are held out."""
    return b"".join(content for part in ("train", "validation") for _, content in sources.documents(str(path), part))


@pytest.mark.case(8)
@pytest.mark.parametrize("raw, expected", [
    (b"\xef\xbb\xbfThe state\r\nof", "The state\nof"), (b"a\rb\r\n\r\nc\n", "a\nb\n\nc\n"), ("é\r\n".encode("utf-16"), "é\n"),
    ("é\nb".encode("utf-32"), "é\nb"), (b"\xfe\xff\0a\0\n", "a\n"), ("\ufeffé\ufeff".encode(), "é\ufeff"),
    (SEPARATORS.encode(), SEPARATORS)])
def test_a_text_is_the_same_in_a_source_and_in_a_prompt(tmp_path, raw, expected):
    (tmp_path / "a.txt").write_bytes(raw)
    assert texts.read(tmp_path / "a.txt") == expected and whole(tmp_path / "a.txt") == expected.encode()
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(raw))
    assert texts.read(tmp_path / "a.txt.gz") == expected and whole(tmp_path / "a.txt.gz") == expected.encode()


def test_bytes_that_are_not_utf_8_stay_as_they_are_in_a_source(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait\r\n")
    assert whole(tmp_path / "a.txt") == b"caf\xe9 au lait\n"
    with pytest.raises(ConfigError, match="a.txt: not UTF-8 at byte 3"):
        texts.read(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfea")
    with pytest.raises(ConfigError, match="b.txt: not UTF-16.* at byte .*, which its byte order mark announces"):
        documents(tmp_path / "b.txt")


@pytest.mark.case(6)
def test_hidden_files_and_folders_are_skipped(tmp_path, capfd):
    for name in ("a.txt", "deep/b.TXT", ".ipynb_checkpoints/a.txt", "._a.txt", "deep/.c/d.txt", ".git/index", "deep/._b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name * 50)
    found = documents(tmp_path)
    assert set(found) == {"a.txt", "deep/b.TXT"}
    assert all(content in (name * 50).encode() for name, content in found.items())
    [line] = capfd.readouterr().err.splitlines()
    assert line.endswith(": skipped ._a.txt, .ipynb_checkpoints/a.txt, deep/._b.jsonl and 1 more (hidden)")
    hidden = tmp_path / ".ipynb_checkpoints"
    assert set(documents(hidden)) == set(documents(hidden / "a.txt")) == {"a.txt"}       # named by the user


@pytest.mark.case(7)
def test_other_files_are_read_or_listed(tmp_path, capfd):
    line = b'{"text": "one"}\n'
    files = {"a.jsonl": line, "b.jsonl.gz": gzip.compress(line), "C.JSONL.BZ2": bz2.compress(line), "D.TXT": b"d" * 99,
             "e.txt.xz": lzma.compress(b"e" * 99), "a.jsonl.gz": gzip.compress(line), "f.arrow": b"ARROW1", "g.json": b"[]",
             "README": b"read me", "shown.png": b"", "other.png": b"",
             "h.jsonl": b'{"text": "<image>", "images": ["./shown.png"]}'}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link").symlink_to(tmp_path.parent)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    assert set(documents(tmp_path)) == {"a.jsonl:1", "b.jsonl:1", "C.JSONL:1", "D.TXT", "e.txt", "h.jsonl:1"}
    [found] = capfd.readouterr().err.splitlines()
    kind = "not of a kind that is read: .txt and .jsonl, also compressed as .gz, .bz2, .xz, .zst, and .parquet"
    assert f"skipped README, f.arrow, g.json and 1 more ({kind})" in found        # the fourth: other.png
    for text in ("a.jsonl.gz (a compressed copy of a file beside it)", "link (a link to a folder)",
                 "gone.txt (not a regular file)"):
        assert text in found
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.arrow").touch()
    with pytest.raises(ConfigError, match="no .txt, .jsonl or .parquet file: skipped a.arrow .not of a kind that is read"):
        documents(tmp_path / "only")


@pytest.mark.parametrize("name, content, message", [
    ("a.txt.gz", b"text", "a.txt.gz cannot be decompressed: Not a gzipped file"),
    ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "a.txt.gz cannot be decompressed: Compressed file ended"),
    ("a.txt.bz2", b"BZh9", "a.txt.bz2 cannot be decompressed"), ("a.txt.xz", b"", "a.txt.xz cannot be decompressed"),
    ("a.json", b"{}", "must be a .txt, .jsonl or .parquet file, or a folder"),
    ("a.parquet.gz", b"", "must be a .txt, .jsonl or .parquet file"), ("a.parquet", b"PAR1", "a.parquet is not a Parquet file"),
    ("a.jsonl", b'{"text": NaN}', 'a.jsonl:1: no "text" string'), ("a.jsonl", b"1", 'a.jsonl:1: no "text" string'),
    ("a.jsonl", b'{"text": "a", "text": "b"}', "a.jsonl:1 is not JSON .an object has a key twice"),
    ("a.jsonl", b"\n" + b"[" * 100, "a.jsonl:2 is not JSON"), ("a.jsonl", b"", "contains no text"),
    ("a.jsonl", b'{"text": "' + b"a" * 10**6, "a.jsonl:1 is not JSON"),
])
def test_mistakes_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        documents(tmp_path / name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_a_file_that_decompresses_to_far_more_than_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(texts.untrusted, "TEXT_BYTES", 10_000)
    monkeypatch.setattr(texts, "CHUNK", 1000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(bytes(200_000)))
    with pytest.raises(ConfigError, match=r"a.txt.gz has more than \d\d,\d00 bytes when decompressed"):
        documents(tmp_path)


@pytest.mark.case(19)
def test_json_lines_end_at_newlines_only(tmp_path):
    """Every reader of JSON lines takes characters that str.splitlines takes for line ends."""
    records = [{"note": SEPARATORS, "number": n} for n in range(3)]
    raw = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode()
    assert b"\xe2\x80\xa8" in raw
    found = list(texts.json_lines(raw))
    assert [line.value for line in found] == records and [line.number for line in found] == [1, 2, 3]
    assert b"".join(line.raw for line in found) == raw and found[-1].end == len(raw)
    damaged = list(texts.json_lines(io.BytesIO(b'\n{"a": 1}\n{"a"\n\n2')))
    assert [(line.number, line.value, bool(line.problem), line.end) for line in damaged] == [
        (2, {"a": 1}, False, 10), (3, None, True, 15), (5, 2, False, 17)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + raw)
    assert user_files.records(tmp_path / "a.jsonl") == records
    (tmp_path / "a.jsonl").write_bytes((raw.replace(b'"note"', b'"text"') + b"\n") * 20)
    assert set(documents(tmp_path / "a.jsonl").values()) == {SEPARATORS.encode()}


@pytest.mark.case(19)
def test_runs_for_a_scaling_law(tmp_path):
    lines = [{"flops": 10.0**n, "loss": 4 - n / 30, "note": SEPARATORS} for n in range(15, 20)]
    (tmp_path / "runs.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    [found], _ = runs.read_runs(str(tmp_path / "runs.jsonl"), "power", dict.fromkeys(runs.COLUMNS), [])
    assert found.flops.tolist() == [1e15, 1e16, 1e17, 1e18, 1e19]
    (tmp_path / "runs.csv").write_text("\ufeffflops,loss,note\r\n" + f'1e15,4,"{SEPARATORS}"\r\n' * 5)
    [found], _ = runs.read_runs(str(tmp_path / "runs.csv"), "power", dict.fromkeys(runs.COLUMNS), [])
    assert found.loss.tolist() == [4.0] * 5


@pytest.mark.case(19)
def test_results_and_metrics(tmp_path):
    header, example = {"suite": "needle", "seed": 0}, {"row": "0", "column": "512", "index": 0, "output": SEPARATORS}
    path = tmp_path / "needle.jsonl"
    path.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in (header, example)) + '{"row": "0"')
    assert runner._resume(path, header) == {("0", "512", 0): example}
    assert path.read_text() == "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in (header, example))

    row = {"name": SEPARATORS, "hash": "h"}
    (tmp_path / "runs.jsonl").write_text(json.dumps(row, ensure_ascii=False) + '\n{"name')
    assert rows.collect(tmp_path) == {"h": row}
    assert json.loads((tmp_path / "runs.jsonl").read_text()) == row

    record = {"step": 1, "loss": 2.0, SEPARATORS: [1.0]}
    (tmp_path / "metrics.jsonl").write_text((json.dumps(record, ensure_ascii=False) + "\n") * 2 + '{"step": 2, "loss"')
    assert metrics.read(tmp_path) == [record] * 2 and metrics.latest(tmp_path) == record
    metrics._truncate(tmp_path / "metrics.jsonl", 1)
    assert metrics.read(tmp_path) == [record] * 2


@pytest.mark.case(19)
def test_captions(tmp_path):
    import tarfile

    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": "a.png", "title": SEPARATORS}, ensure_ascii=False))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "captions.jsonl", "captions.jsonl")
    assert captions.unpack(tmp_path / "a.tar", tmp_path / "out") == 1
    [record] = user_files.records(tmp_path / "out" / "captions.jsonl")
    assert record["text"] == f"<image>{SEPARATORS}"


def test_text_and_json_lines_have_one_reader():
    """`splitlines` is for the first line of messages, and for the output of other programs."""
    root = Path(__file__).parents[1] / "mmx"
    files = {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*.py")}
    found = {name for name, source in files.items() if re.search(r"\.splitlines\(|\.readlines\(|split\(b.\\n", source)}
    assert found == {"files/texts.py", "config/reference.py", "cli/parser.py", "compilers/search.py", "compilers/aot.py",
                     "compilers/schedule.py", "launch/runtime.py", "launch/sweep/executors.py"}
