"""Makes hostile files at random: copies a folder of valid files and damages some of them, each according to its format."""
import contextlib
import copy
import io
import json
import os
import re
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

BIG = "9" * 5000
RAW = (         # JSON texts that Python's json module would not write
    BIG, "-" + BIG, "1e999", "-1e999", "NaN", "Infinity", "1e-999", "[" * 70 + "]" * 70, "[" * 100_000 + "]" * 100_000,
    '{"a":' * 70 + "1" + "}" * 70, '{"a":1,"a":2}', r'"\ud800"', r'"\u0000"', r'"a\u0000b"', r'"\u001b[2J"', "0x10", "'", "",
    '"' + "a" * 100_000 + '"', "[" + "0," * 10_000 + "0]", "[" + "{}," * 10_000 + "{}]")
VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**63, 2**64 - 1, 2**64, -2**63, 10**18,
    0.0, 0.5, -1.5, 1e300, "", "0", "../../etc/passwd", "/etc/passwd", "..", ".", "a/b", "\\", "é", "𝄞", "F32", "I64", "BOOL",
    "minimax", [], {}, [[]], [None], [0], [1, 2, 3], [2**40] * 8, {"a": 1}, {"key": ".."}, "bytes", "sotu", "Regex",
    "Precompiled", "Replace", "ByteLevel", "FixedLength", "gzip", "<f8", "|O", "S", "L" * 50)
KEYS = ("", "__metadata__", "a" * 1000, "\ud800", "a\0", "../x", "..", "/etc/passwd", "layer", "\x1b[2J")
NAMES = ("../out", "/tmp/mmx-out", "a/../../out", "captions.jsonl", "a.png", ".", "..", "a" * 300, "a\0b", "\ud800", "\x1b[2J",
         "a.png/b", "new/deep/a.png", "/dev/zero", "../outside/secret")
TYPES = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE,
         tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"Z")
PAX = ({"path": "../out"}, {"linkpath": "/etc/passwd"}, {"size": "-1"}, {"size": "9" * 30}, {"mtime": "nan"}, {"uid": "x"},
       {"GNU.sparse.map": "0,1"}, {"GNU.sparse.size": "1099511627776"}, {"a" * 1000: "b"})
NUMBERS = (0, 1, 2, 7, 8, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def folder(rng, files: dict[str, bytes], into: Path, outside: Path) -> None:
    """Writes `files` into the folder `into` and damages some of them; links lead to `outside`."""
    files = dict(files)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        name = rng.choice(sorted(files))
        files[name] = damage(rng, name, files[name])
    special = rng.choice((None,) * 12 + ("link", "pipe", "folder", "missing", "device", "loop", "other", "empty"))
    victim = rng.choice(sorted(files))
    for name, raw in files.items():
        path = into / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if special == "other" and name == victim:
            raw = files[rng.choice(sorted(files))]
        path.write_bytes(b"" if special == "empty" and name == victim else raw)
    path = into / victim
    if special in ("link", "pipe", "folder", "missing", "device", "loop"):
        path.unlink()
    if special == "link":
        path.symlink_to(outside / "secret")
    elif special == "pipe":
        os.mkfifo(path)
    elif special == "folder":
        path.mkdir()
    elif special == "device":
        path.symlink_to("/dev/zero")
    elif special == "loop":
        path.symlink_to(path)


def damage(rng, name: str, raw: bytes) -> bytes:
    kind = _kind(name, raw)
    if kind and rng.randint(0, 3):
        return kind(rng, raw)
    return damage_bytes(rng, raw)


def _kind(name: str, raw: bytes):
    if name.endswith(".safetensors"):
        return tensors
    if name.endswith((".jsonl", ".csv")):
        return lines
    if name.endswith(".npz"):
        return archive
    if ".tar" in name:
        return tar
    if raw[:8] == b"\x89PNG\r\n\x1a\n":
        return png
    return tree if raw[:1] in (b"{", b"[") else None


def damage_bytes(rng, raw: bytes) -> bytes:
    """Flips, overwrites, removes, repeats, cuts off and inserts bytes."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randint(0, max(len(raw) - 1, 0))
        match rng.randint(0, 7):
            case 0 | 1:
                if raw:
                    raw[at] ^= 1 << rng.randint(0, 7)
            case 2:
                raw[at:at + 1] = bytes([rng.choice((0, 10, 34, 44, 91, 123, 127, 255))])
            case 3:
                form, number = rng.choice(("<Q", ">Q", "<I", ">I", "<H", ">H")), rng.choice(NUMBERS)
                packed = struct.pack(form, number % (1 << 8 * struct.calcsize(form)))
                raw[at:at + len(packed)] = packed
            case 4:
                del raw[at:at + rng.randint(1, 64)]
            case 5:
                raw[at:at] = raw[at:at + rng.randint(1, 64)] * rng.choice((1, 2, 1000))
            case 6:
                del raw[at:]
            case 7:
                raw[at:at] = rng.randbytes(rng.randint(1, 16))
    return bytes(raw)


class Raw(str):
    """JSON text that `written` inserts unchanged."""


def tree(rng, raw: bytes) -> bytes:
    """Changes, moves, removes or renames some fields of a JSON text."""
    if raw.count(b"[" * 80) + raw.count(b'{"a":' * 80):      # the depth at which Python fails depends on the caller
        return damage_bytes(rng, raw)
    try:
        value = [json.loads(raw)]
    except (ValueError, RecursionError):
        return damage_bytes(rng, raw)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(value, 400))
        outer, key = places[rng.randint(0, len(places) - 1)]
        match rng.randint(0, 7):
            case 0 | 1 | 2:
                outer[key] = copy.deepcopy(rng.choice(VALUES))
            case 3 | 4:
                outer[key] = Raw(rng.choice(RAW))
            case 5:
                if outer is not value:
                    del outer[key]
            case 6:
                there, its = places[rng.randint(0, len(places) - 1)]
                outer[key] = json.loads(json.dumps(there[its], default=str)) if there is not value else 0
            case 7:
                new = rng.choice(KEYS)
                if isinstance(outer, dict):
                    outer[str(new)] = outer.pop(key)
    return written(value[0]).encode("utf-8", "surrogatepass")


def _places(value, most: int):
    """(container, key) of each value in a JSON value, breadth first; about the first `most`."""
    level, found = [value], 0
    while level and found < most:
        inner = []
        for outer in level:
            for key in outer if isinstance(outer, dict) else range(len(outer)):
                yield outer, key
                found += 1
                inner += [outer[key]] if isinstance(outer[key], (dict, list)) else []
        level = inner


def written(value) -> str:
    """JSON of a value that may contain `Raw` texts."""
    raws = []

    def stand_in(value):
        if isinstance(value, Raw):
            raws.append(str(value))
            return f"@raw{len(raws) - 1}@"
        if isinstance(value, dict):
            return {key: stand_in(inner) for key, inner in value.items()}
        return [stand_in(inner) for inner in value] if isinstance(value, list) else value

    return re.sub(r'"@raw(\d+)@"', lambda found: raws[int(found[1])], json.dumps(stand_in(value)))


def tensors(rng, raw: bytes) -> bytes:
    """Damages the header, its length or the data of a safetensors file."""
    end = 8 + int.from_bytes(raw[:8], "little")
    header, data = tree(rng, raw[8:end]), raw[end:]
    length = rng.choice((len(header),) * 8 + NUMBERS)
    data = rng.choice((data,) * 6 + (data[:-1], data + b"\0", b""))
    return struct.pack("<Q", length) + header + data


def lines(rng, raw: bytes) -> bytes:
    """Damages one of the lines."""
    found = raw.split(b"\n")
    at = rng.randint(0, len(found) - 1)
    found[at] = tree(rng, found[at]) if found[at][:1] == b"{" and rng.random() < 0.5 else damage_bytes(rng, found[at])
    return b"\n".join(found)


def archive(rng, raw: bytes) -> bytes:
    """Damages a member of a zip file and packs it again, so that the checksums are valid."""
    out = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as old:
            parts = {name: old.read(name) for name in old.namelist()}
    except Exception:       # it is damaged already; zipfile raises many kinds of errors
        return damage_bytes(rng, raw)
    if not parts:
        return damage_bytes(rng, raw)
    with zipfile.ZipFile(out, "w") as new:
        victim, how = rng.choice(list(parts)), rng.randint(0, 4)
        for name, part in parts.items():
            kind = zipfile.ZIP_STORED
            if name == victim and how == 0:
                part = damage_bytes(rng, part)
            elif name == victim and how == 1:
                old_text = (re.search(rb"\{.*\}", part) or [part[:100]])[0]
                text = rng.choice((b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
                                   b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }",
                                   b"{'descr': '<f4', 'fortran_order': True, 'shape': (-1,), }",
                                   b"(" * 40, b"{'descr': '<U99999999', 'fortran_order': False, 'shape': (), }"))
                part = part.replace(old_text, text.ljust(len(old_text)))
            elif name == victim and how == 2:
                kind = zipfile.ZIP_DEFLATED
                part += bytes(rng.choice((0, *(1,) * 8, 50_000_000)))
            elif name == victim and how == 3:
                continue
            new.writestr(rng.choice(("../x.npy", "x")) if name == victim and how == 4 else name, part, kind)
    return out.getvalue()


def tar(rng, raw: bytes) -> bytes:
    """Changes the name, type, link, header or content of a tar member and packs it again, so that the checksums are valid."""
    kind = {b"\x1f\x8b": "gz", b"\xfd7": "xz", b"BZ": "bz2"}.get(raw[:2], "")
    out = io.BytesIO()
    try:
        with tarfile.open(fileobj=io.BytesIO(raw)) as old:
            members = [(member, old.extractfile(member).read() if member.isfile() else b"") for member in old]
    except Exception:       # it is damaged already
        return damage_bytes(rng, raw)
    if not members:
        return damage_bytes(rng, raw)
    victim = members[rng.randint(0, len(members) - 1)][0]
    with tarfile.open(fileobj=out, mode=f"w:{kind}") as new:
        for member, data in members:
            if member is victim:
                match rng.randint(0, 3):
                    case 0:
                        member.name = rng.choice(NAMES)
                    case 1:
                        member.type, member.linkname = rng.choice(TYPES), rng.choice(NAMES)
                    case 2:
                        data = lines(rng, data)
                        member.size = len(data)
                    case 3:
                        member.mode, member.pax_headers = 0o7777, rng.choice(PAX)
            with contextlib.suppress(Exception):        # tar cannot express some changes
                new.addfile(member, io.BytesIO(data))
                if member is victim and rng.random() < 0.5:
                    new.addfile(member, io.BytesIO(data))
    return out.getvalue() if kind or rng.random() < 0.5 else damage_bytes(rng, out.getvalue())


def png(rng, raw: bytes) -> bytes:
    """Damages a chunk of a PNG, with a valid checksum."""
    chunks, at = [], 8
    while at + 12 <= len(raw):
        length = int.from_bytes(raw[at:at + 4], "big")
        chunks.append((raw[at + 4:at + 8], raw[at + 8:at + 8 + length]))
        at += 12 + length
    victim = rng.randint(0, len(chunks) - 1)
    name, data = chunks[victim]
    if name == b"IHDR" and rng.random() < 0.5:
        sides = rng.choices((0, 1, 31, 4096, 8193, 60_000, 2**31 - 1), k=2)
        data = struct.pack(">II", *sides) + data[8:]
    elif name == b"IDAT" and rng.random() < 0.5:
        data = zlib.compress(bytes(rng.choice((0, 10, 10_000_000))))
    else:
        data = damage_bytes(rng, data)
    chunks[victim] = rng.choice((name, name, name, b"tEXt", b"iCCP", b"zTXt", b"eXIf", b"acTL", b"fdAT")), data
    chunks[victim:victim + 1] *= rng.choice((0, 1, 1, 1, 2, 100))
    return raw[:8] + b"".join(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
                              for name, data in chunks)
