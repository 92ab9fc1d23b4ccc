"""Checkpoints on the Hugging Face Hub: ORG/NAME or hf://ORG/NAME, with an optional @REVISION (a branch, a tag or a commit).

The package huggingface_hub downloads them into its own cache, and finds the user's token. With HF_HUB_OFFLINE=1 only the files
in this cache are used.
"""
import re
from pathlib import Path

from mmx.config import ConfigError

PREFIX = "hf://"
NAME = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]      # what a checkpoint needs, without pickles and code


def resolve(path: str | Path) -> str | Path:
    """The local folder of a checkpoint: `path`, or the snapshot in the Hub's cache, downloaded if necessary.

    A path without hf:// is a name on the Hub if it looks like one and its first folder does not exist here.
    """
    text = str(path)
    explicit = text.startswith(PREFIX)
    name = NAME.fullmatch(text.removeprefix(PREFIX))
    if explicit and not name:
        raise ConfigError(f"{text} must be hf://ORG/NAME or hf://ORG/NAME@REVISION")
    if not explicit and (not name or text.startswith(".") or Path(text).exists() or Path(text).parent.exists()):
        return path
    from huggingface_hub import errors, snapshot_download

    where = f"{name[1]} on the Hugging Face Hub"
    try:
        return snapshot_download(name[1], revision=name[2], allow_patterns=FILES)
    except errors.GatedRepoError:
        problem = f"{where} is gated: accept its conditions there, and log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        problem = f"there is no {where}, or it is private: log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        problem = f"{where} has no revision {name[2]!r}"
    except Exception as error:
        problem = f"{where} cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}"
    raise ConfigError(problem if explicit else f"checkpoint {text} is not a directory, and {problem}") from None
