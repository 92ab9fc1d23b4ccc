"""Archives of captioned pictures, as a source: "<image>" and what the picture is called.

    python -c "from mmx.data import captions; captions.unpack('openclipart64.tar', 'clipart')"
    mmx train --config.data.sources="('clipart',)" ...

An archive holds pictures and a captions.jsonl, each line an object with the path of one ("image") and its "title" or "name".
"""
import json
import lzma
import sys
import tarfile
import zlib
from pathlib import Path

from mmx.config import ConfigError
from mmx.data.images import MARK
from mmx.files import atomic, untrusted

MOST_BYTES = 1 << 30        # of captions.jsonl


def _plain(member, folder):
    """tar's "data" filter, past which links led out of the folder in some versions of Python: none are unpacked."""
    if member.issym() or member.islnk():
        raise ValueError(f"{member.name!r:.200} is a link: pack with tar --dereference --hard-dereference")
    return tarfile.data_filter(member, folder)


def unpack(archive, folder) -> int:
    """Unpacks an archive and gives its captions.jsonl the texts and images that `sources` reads; returns how many pictures.

    Raises ConfigError where the archive is none, or has no such file.
    """
    folder, path = Path(folder), Path(folder) / "captions.jsonl"
    try:
        with untrusted.open_file(archive, sys.maxsize) as raw, tarfile.open(fileobj=raw) as tar:
            tar.extractall(folder, filter=_plain)
        found = [untrusted.loads(line) for line in untrusted.read_bytes(path, MOST_BYTES).splitlines() if line.strip()]
        lines = [value | {"text": MARK + (value.get("title") or value["name"]), "images": [value["image"]]} for value in found]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    except (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError, ValueError, LookupError, TypeError,
            AttributeError) as error:
        why = str(error).partition(":\n")[0]        # tarfile's has a line for each way to pack
        raise ConfigError(f"{archive} is no archive of captioned pictures ({why}): it needs a captions.jsonl, in each line "
                          "an \"image\" and a \"title\" or a \"name\"") from None
    with atomic.replacing(path, "wb") as file:
        file.write(text)
    return len(lines)
