"""checksums.json: the length and SHA-256 of every file below a folder, and the SHA-256 of this table itself."""
import concurrent.futures
import hashlib
import json
import os
import stat
from pathlib import Path

from mmx.files import untrusted

NAME = "checksums.json"
MOST_BYTES = 256 << 20      # of checksums.json: enough for 1,500,000 files


def write(folder: Path) -> None:
    """Writes checksums.json of a folder.

    If a folder two levels below has a checksums.json, its checksums are copied. All other files are read.
    """
    table = {}
    for part in sorted(folder.glob(f"*/*/{NAME}")):
        below = part.parent.relative_to(folder).as_posix()
        table |= {f"{below}/{name}": entry for name, entry in json.loads(part.read_text())["files"].items()}
    names = [name for name in _files(folder) if name not in table and name != NAME]
    with concurrent.futures.ThreadPoolExecutor() as threads:
        table |= zip(names, threads.map(_entry, (folder / name for name in names)))
    with (folder / NAME).open("w") as file:
        json.dump({"sha256": _table_digest(table), "files": table}, file)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[str, list] | None:
    """[bytes, SHA-256] of each file, or None if the folder has no table. Raises ValueError if the table is damaged."""
    try:
        with _open(folder / NAME) as file:
            found = untrusted.loads(file.read(MOST_BYTES))
        if found["sha256"] == _table_digest(found["files"]) and all(map(_is_valid, *zip(*found["files"].items()))):
            return found["files"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{NAME} is damaged")


def find_damage(folder: Path, prefix: str = "", share: int = 0, shares: int = 1) -> str:
    """Compares the files of a folder with its checksums.

    Args:
      prefix: only files whose name in the table starts with it are compared.
      share, shares: this call compares files share, share + shares, share + 2 shares, ... of the list sorted by size.
    Returns:
      A description of the first difference; "" if there is none, or if the folder has no table.
    """
    try:
        table = read(folder)
    except ValueError as error:
        return str(error)
    names = sorted((name for name in table or () if name.startswith(prefix)), key=lambda name: (-table[name][0], name))

    def compare(name):
        path, (size, digest) = folder / name, table[name]
        try:
            if (now := path.stat().st_size) != size:
                return f"{name} has {now:,} bytes instead of {size:,}"
            return "" if _entry(path)[1] == digest else f"{name} differs from its checksum"
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        except ValueError as error:     # a folder, a pipe, or a name with a NUL character
            return f"{name}: {error}"

    with concurrent.futures.ThreadPoolExecutor() as threads:
        found = next(filter(None, threads.map(compare, names[share::shares])), "")
        threads.shutdown(cancel_futures=True)
    return found


def _files(folder: Path):
    for top, _, names in os.walk(folder):
        yield from ((Path(top) / name).relative_to(folder).as_posix() for name in sorted(names))


def _open(path: Path):
    """Opens a regular file. Raises ValueError for anything else, and PermissionError if the file may not be read."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")
    return path.open("rb")


def _entry(path: Path) -> list:
    """[bytes, SHA-256] of a file."""
    with _open(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), digest]


def _is_valid(name: str, entry) -> bool:
    """Whether a table's entry has the form that `write` gives it, and its name stays below the folder."""
    return (isinstance(entry, list) and list(map(type, entry)) == [int, str] and not name.startswith("/")
            and ".." not in name.split("/"))


def _table_digest(table: dict) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
