"""Files beside the tensors of a checkpoint: tokenizer, chat template, processor, generation settings, licence, ...

Conversions copy all of them, whatever their names. A workdir also has other files, so it lists the copied files in
released_files.json.
"""
import json
import os
from pathlib import Path

from mmx.checkpoints.shapes import first_five
from mmx.config import ConfigError
from mmx.files import atomic, notes, untrusted

LIST = "released_files.json"        # of a workdir: the files that were copied from a released checkpoint
# exported from a workdir, whether listed or not: earlier versions of mmx wrote no list, and users add files
KNOWN = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "added_tokens.json",
         "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json")
# files and folders that mmx writes
RESERVED = ("config.json", LIST, "run.lock", "metrics.jsonl", "eval.json", "curve.png", "checkpoints", "tensorboard")
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".pkl", ".pickle",
           ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz", ".npy", ".tflite", ".ot")
CODE = (".py", ".pyc", ".so", ".dll", ".sh")
MOST_FILES = 1000


def find(directory: Path, workdir: bool) -> list[str]:
    """The relative paths of the side files of a released checkpoint, or of a workdir."""
    if workdir:
        return [name for name in dict.fromkeys((*_read_list(directory), *KNOWN)) if (directory / name).is_file()]
    found, omitted = [], []
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for path in (Path(folder, name) for name in sorted(names)):
            name = path.relative_to(directory).as_posix()
            ignored = name == "config.json" or path.name.startswith(".") or name.lower().endswith(WEIGHTS)
            if ignored or not path.is_file():
                continue
            small = path.stat().st_size <= untrusted.TOKENIZER_BYTES and len(found) < MOST_FILES
            (found if small and _may_be_copied(name) else omitted).append(name)
    if omitted:
        notes.note(f"{directory}: not copied are {first_five(omitted)}: larger than {untrusted.TOKENIZER_BYTES >> 20} MiB, "
                   f"more than {MOST_FILES} files, code, or a name that mmx uses itself")
    return found


def _may_be_copied(name: str) -> bool:
    """Whether a relative path stays inside its directory, and is neither code nor a name that mmx uses."""
    parts = name.split("/")
    return (name.isprintable() and len(name) <= 256 and parts[0] not in RESERVED and not name.lower().endswith(WEIGHTS + CODE)
            and not any(part in ("", ".", "..") for part in parts))


def copy(directory: Path, names: list[str], out: Path, skip=()) -> list[str]:
    """Copies side files that `out` does not have yet, except those in `skip`. Returns the names of the copied files."""
    copied = [name for name in names if name not in skip and not (out / name).exists()]
    for name in copied:
        if not untrusted.is_inside(directory / name, directory):
            raise ConfigError(f"{directory / name} is a link that leads out of its directory: replace it by the file itself")
        content = untrusted.read_bytes(directory / name, untrusted.TOKENIZER_BYTES)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    return copied


def write_list(workdir: Path, names: list[str]) -> None:
    """Adds names to the list of the released files that a workdir contains."""
    if names:
        with atomic.replacing(workdir / LIST) as file:
            json.dump({"files": list(dict.fromkeys((*_read_list(workdir), *names)))}, file, indent=1)


def _read_list(workdir: Path) -> list[str]:
    path = workdir / LIST
    names = untrusted.read_json(untrusted.check_link(path)).get("files") if path.exists() else []
    if not isinstance(names, list) or not all(isinstance(name, str) and _may_be_copied(name) for name in names):
        raise ConfigError(f"{path} is damaged: it does not list files of its directory")
    return names[:MOST_FILES]
