"""Archives of captioned pictures, as a source: "<image>" and what the picture is called.

    python -c "from mmx.data import captions; captions.unpack('openclipart64.tar', 'clipart')"
    mmx train --config.data.sources="('clipart',)" ...

An archive holds pictures and a captions.jsonl, each line an object with the path of one ("image") and its "title" or "name".
"""
import json
import lzma
import tarfile
import zlib
from pathlib import Path

from mmx import atomic, untrusted
from mmx.config import ConfigError
from mmx.data.images import MARK


def unpack(archive, folder) -> int:
    """Unpacks an archive and gives its captions.jsonl the texts and images that `sources` reads; returns how many pictures.

    Raises ConfigError where the archive is none, or has no such file.
    """
    folder, path = Path(folder), Path(folder) / "captions.jsonl"
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        found = [untrusted.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
        lines = [value | {"text": MARK + (value.get("title") or value["name"]), "images": [value["image"]]} for value in found]
    except (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError, ValueError, LookupError, TypeError,
            AttributeError) as error:
        raise ConfigError(f"{archive} is no archive of captioned pictures ({error}): it needs a captions.jsonl, in each line "
                          "an \"image\" and a \"title\" or a \"name\"") from None
    with atomic.replacing(path) as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return len(lines)
