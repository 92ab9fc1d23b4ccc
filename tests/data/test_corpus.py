import pytest

from mmx.config import ConfigError
from mmx.data import corpus


@pytest.mark.parametrize("split,files,size", [
    ("test", 13, 602_017), ("validation", 9, 433_492), ("train", 227, 11_150_488)])
def test_split_has_the_published_size_when_joined_by_newlines(split, files, size):
    documents = corpus.documents(split)
    assert len(documents) == files
    assert len(b"\n".join(raw for _, raw in documents)) == size


def test_documents_are_sorted_by_name():
    names = [name for name, _ in corpus.documents("train")]
    assert names == sorted(names) and names[0] == "1790-Washington-1.txt"


def test_a_damaged_archive_is_refused(monkeypatch, tmp_path):
    packed = bytearray((corpus.importlib.resources.files("mmx.data.corpus") / corpus.ARCHIVE).read_bytes())
    packed[1000] ^= 1
    (tmp_path / corpus.ARCHIVE).write_bytes(packed)
    monkeypatch.setattr(corpus.importlib.resources, "files", lambda package: tmp_path)
    corpus.all_documents.cache_clear()
    with pytest.raises(ConfigError, match="damaged"):
        corpus.documents("test")
