"""checksums.json: damaged files are named, and an invalid table is reported as damaged."""
import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from mmx.files import checksums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "item" / "part").mkdir(parents=True)
    for name, text in (("a", "first"), ("item/b", "second" * 99), ("item/part/c", ""), ("item/part/d", "x")):
        (tmp_path / name).write_text(text)
    checksums.write(tmp_path / "item" / "part")
    checksums.write(tmp_path)
    return tmp_path


def test_unchanged_files_are_not_damaged(folder):
    assert checksums.find_damage(folder) == "" == checksums.find_damage(folder, "item/")
    assert sorted(checksums.read(folder)) == ["a", "item/b", "item/part/c", "item/part/checksums.json", "item/part/d"]
    assert checksums.read(folder)["a"] == [5, hashlib.sha256(b"first").hexdigest()]
    os.remove(folder / checksums.NAME)
    assert checksums.read(folder) is None and checksums.find_damage(folder) == ""


@pytest.mark.parametrize("name, text, message", [
    ("a", "fist", "a has 4 bytes instead of 5"), ("a", "First", "a differs from its checksum"),
    ("item/part/d", None, "is missing"), ("item/part/c", "y", "item/part/c has 1 bytes instead of 0"),
    ("checksums.json", "", "checksums.json is damaged")])
def test_damage_is_described(name, text, message, folder):
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    assert message in checksums.find_damage(folder)
    shares = [checksums.find_damage(folder, "", share, 3) for share in range(3)]
    assert all(shares) if name == checksums.NAME else sorted(map(bool, shares)) == [False, False, True]
    assert bool(checksums.find_damage(folder, "item/")) == (name != "a")


@pytest.mark.parametrize("name", ["a", checksums.NAME])
def test_a_file_without_read_permission_is_not_damaged(name, folder, monkeypatch):
    opened = Path.open

    def denied(path, *args):
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args)
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(PermissionError):
        checksums.find_damage(folder)


@pytest.mark.parametrize("files", [
    {"a": None}, {"a": [5]}, {"a": ["5", "x"]}, {"../a": [5, "x"]}, {"/a": [5, "x"]}, {"item/../../a": [5, "x"]}, [1], "a", 7])
def test_an_invalid_table_is_damaged(files, folder):
    other = json.loads((folder / checksums.NAME).read_text())
    other["files"]["a"][1] = "0" * 64
    (folder / checksums.NAME).write_text(json.dumps(other))
    assert checksums.find_damage(folder) == "checksums.json is damaged"
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    (folder / checksums.NAME).write_text(json.dumps({"sha256": digest, "files": files}))
    assert checksums.find_damage(folder) == "checksums.json is damaged"
    (folder / checksums.NAME).write_text("[" * 100_000)
    assert checksums.find_damage(folder) == "checksums.json is damaged"
