"""Paths of files that may be URLs: gs://bucket/folder, s3://bucket/folder, https://host/file.jsonl or hf://datasets/ORG/NAME.

A URL becomes a UPath of the package universal_pathlib, which has pathlib's methods. The packages of fsspec transfer the data
(gcsfs, s3fs, huggingface_hub, aiohttp); they find credentials as their documentation says.
"""
import contextlib
import logging
import pathlib
import re

from mmx.config import ConfigError

PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}
# what tells two versions of an object apart, in the order of preference
VERSIONS = "generation", "etag", "ETag", "blob_id", "md5Hash", "mtime", "last_modified", "LastModified", "created"


def is_url(path) -> bool:
    """Whether a path is a URL, or a UPath of one."""
    return not isinstance(path, pathlib.Path) and bool(re.match(r"[A-Za-z][\w+.-]*://", str(path)))


def as_path(path):
    """The Path of a local file or folder, or the UPath of a URL."""
    if not is_url(path):
        return pathlib.Path(path)
    if not isinstance(path, str):
        return path
    protocol = path.partition("://")[0].lower()
    try:
        from upath import UPath

        logging.getLogger(PACKAGES.get(protocol, protocol)).setLevel(logging.CRITICAL)     # errors are reported in one line
        return UPath(path)
    except ImportError as error:
        package = PACKAGES.get(protocol, getattr(error, "name", None) or "universal_pathlib")
        raise ConfigError(f"{path} needs the package {package}: pip install {package}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; known are {', '.join(f'{name}://' for name in PACKAGES)}") from None


def refuse(path, what: str) -> None:
    """Raises ConfigError if a path is a URL, for a file that must be on a disk."""
    if is_url(path):
        raise ConfigError(f"{what} {path}: object stores are read as data sources only; give a path on a disk")


@contextlib.contextmanager
def one_line_errors(path):
    """Turns the errors of a URL into a one-line ConfigError: no such object, no permission, no server, a missing package."""
    try:
        yield
    except ConfigError:
        raise
    except ImportError as error:
        raise ConfigError(f"{path}: {error}") from None
    except Exception as error:
        if not is_url(path):
            raise
        text = " ".join(str(error).split())[:300]
        raise ConfigError(f"{path} cannot be read: {type(error).__name__}{': ' * bool(text)}{text}") from None


def version(path) -> tuple[int, int | str]:
    """(bytes, version) of a file, which change with its contents.

    The version is the time of its last change in ns, or for a URL what its store calls a version; "" if the store has none.
    """
    if not is_url(path):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    with one_line_errors(path):
        information = path.fs.info(path.path)
    found = next((information[key] for key in VERSIONS if information.get(key)), "")
    return int(information.get("size") or 0), str(found)
