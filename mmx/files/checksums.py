"""checksums.json of a folder: the length and SHA-256 of every file below it, and of that table itself."""
import concurrent.futures
import hashlib
import json
import os
import stat
from pathlib import Path

from mmx.files import untrusted

NAME = "checksums.json"
MOST_BYTES = 256 << 20      # of a table: 1,500,000 files


def write(folder: Path) -> None:
    """What folders below have of their own is taken from there, the rest is read."""
    table = {}
    for part in sorted(folder.glob(f"*/*/{NAME}")):
        below = part.parent.relative_to(folder).as_posix()
        table |= {f"{below}/{name}": entry for name, entry in json.loads(part.read_text())["files"].items()}
    names = [name for name in _files(folder) if name not in table and name != NAME]
    with concurrent.futures.ThreadPoolExecutor() as threads:
        table |= zip(names, threads.map(_entry, (folder / name for name in names)))
    with (folder / NAME).open("w") as file:
        json.dump({"sha256": _own(table), "files": table}, file)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[str, list] | None:
    """(bytes, SHA-256) by file; None where the folder has no table. ValueError: the table is damaged."""
    try:
        with _opened(folder / NAME) as file:
            found = untrusted.loads(file.read(MOST_BYTES))
        if found["sha256"] == _own(found["files"]) and all(map(_plain, *zip(*found["files"].items()))):
            return found["files"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{NAME} is damaged")


def find_damage(folder: Path, below: str = "", share: int = 0, shares: int = 1) -> str:
    """What of a folder, or of what is `below`, is not as its table says; "" where all is, or no table is there.

    One `share` of `shares` looks at some of the files, largest first.
    """
    try:
        table = read(folder)
    except ValueError as error:
        return str(error)
    mine = sorted((name for name in table or () if name.startswith(below)), key=lambda name: (-table[name][0], name))
    mine = mine[share::shares]

    def compare(name):
        path, (size, digest) = folder / name, table[name]
        try:
            if (now := path.stat().st_size) != size:
                return f"{name} has {now:,} bytes of {size:,}"
            return "" if _entry(path)[1] == digest else f"{name} differs from its checksum"
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        except ValueError as error:     # a folder, a pipe, a name with a NUL
            return f"{name}: {error}"

    with concurrent.futures.ThreadPoolExecutor() as threads:
        found = next(filter(None, threads.map(compare, mine)), "")
        threads.shutdown(cancel_futures=True)
    return found


def _files(folder: Path):
    for top, _, names in os.walk(folder):
        yield from ((Path(top) / name).relative_to(folder).as_posix() for name in sorted(names))


def _opened(path: Path):
    """A file to read. What may not be read is not damaged: PermissionError; a folder or a pipe is: ValueError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no file")
    return path.open("rb")


def _entry(path: Path) -> list:
    with _opened(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), digest]


def _plain(name: str, entry) -> bool:
    """Whether an entry is of a file below, as `write` makes them."""
    return (isinstance(entry, list) and list(map(type, entry)) == [int, str] and not name.startswith("/")
            and ".." not in name.split("/"))


def _own(table: dict) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
