"""Damaged and hostile prefix files (`mmx generate --save-cache`) are refused."""
import io
import itertools
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import parsers

from mmx.config import ConfigError
from mmx.inference import prefix


def test_rebuilt_prefix_files_are_refused(tmp_path):
    raw = parsers.prefix_files()["kept.npz"]

    def assert_refused(change, compression=zipfile.ZIP_STORED):
        with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(tmp_path / "kept.npz", "w") as new:
            for name in old.namelist():
                new.writestr(name, change(name, old.read(name)), compression)
        with pytest.raises(ConfigError, match="is not a prefix file written by --save-cache, or it is damaged"):
            prefix.load(tmp_path / "kept.npz", parsers.loaded())

    assert_refused(lambda name, data: data, zipfile.ZIP_DEFLATED)
    assert_refused(lambda name, data: data + bytes(10**6) if name.startswith("about") else data)
    assert_refused(lambda name, data: data[:-1])
    pickled = io.BytesIO()
    np.save(pickled, np.array([print], object), allow_pickle=True)
    assert_refused(lambda name, data: pickled.getvalue())
    (tmp_path / "kept.npz").write_bytes(raw)
    assert prefix.load(tmp_path / "kept.npz", parsers.loaded()).length == 5


def test_every_flipped_bit_in_an_array_is_detected(tmp_path):
    """The checksum of the zip file detects it."""
    raw = bytearray(parsers.prefix_files()["kept.npz"])
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        info, following = next(pair for pair in itertools.pairwise(file.infolist()) if "k_BGSK" in pair[0].filename)
    for offset in range(following.header_offset - info.file_size, following.header_offset):
        raw[offset] ^= 1
        (tmp_path / "kept.npz").write_bytes(raw)
        with pytest.raises(ConfigError):
            prefix.load(tmp_path / "kept.npz", parsers.loaded())
        raw[offset] ^= 1
