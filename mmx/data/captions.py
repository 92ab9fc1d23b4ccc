"""Unpacks archives of captioned images into a folder that can be used as a data source.

    python -c "from mmx.data import captions; captions.unpack('openclipart64.tar', 'clipart')"
    mmx train --config.data.sources="('clipart',)" ...

An archive contains images and a file captions.jsonl. Each line of it is an object with the path of an image ("image") and its
caption ("title" or "name").
"""
import lzma
import sys
import tarfile
import zlib
from pathlib import Path

from mmx.config import ConfigError
from mmx.data.images import PLACEHOLDER
from mmx.files import atomic, json_text, texts, untrusted

MAX_BYTES = 1 << 30         # of captions.jsonl


def _refuse_links(member, folder):
    """tarfile's "data" filter, but without any links: in some versions of Python they can lead out of the folder."""
    if member.issym() or member.islnk():
        raise ValueError(f"{member.name!r:.200} is a link: pack with tar --dereference --hard-dereference")
    return tarfile.data_filter(member, folder)


def unpack(archive, folder) -> int:
    """Unpacks an archive of captioned images and returns the number of images.

    Rewrites the archive's captions.jsonl in `folder`: each line gets a "text" ("<image>" and the caption) and a list "images",
    the keys that `data.sources` reads.

    Raises:
      ConfigError: if the file is not such an archive.
    """
    folder, path = Path(folder), Path(folder) / "captions.jsonl"
    try:
        with untrusted.open_file(archive, sys.maxsize) as raw, tarfile.open(fileobj=raw) as tar:
            tar.extractall(folder, filter=_refuse_links)
        lines = [record | {"text": PLACEHOLDER + (record.get("title") or record["name"]), "images": [record["image"]]}
                 for _, record in texts.read_json_lines(path, MAX_BYTES)]
        text = "".join(json_text.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    except (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError, ValueError, LookupError, TypeError,
            AttributeError) as error:
        reason = str(error).partition(":\n")[0]     # tarfile adds a line for each compression that it tried
        raise ConfigError(f"{archive} is not an archive of captioned images ({reason}): it must contain a captions.jsonl in "
                          "which each line has an \"image\" and a \"title\" or a \"name\"") from None
    with atomic.replacing(path, "wb") as file:
        file.write(text)
    return len(lines)
