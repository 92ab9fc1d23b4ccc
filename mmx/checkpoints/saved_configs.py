"""The config of a saved checkpoint, without its tensors."""
from pathlib import Path

from mmx.checkpoints import hf_config, manager
from mmx.config import ConfigError
from mmx.files import untrusted


def read(path: Path) -> dict:
    """The sections of a config.json, which a directory contains or which `path` names.

    A run has all sections. A Hugging Face checkpoint, or a workdir that was converted from one, has only the section model.
    """
    if path.is_dir():
        workdir, _ = manager.find_step(path) or (path, None)
        if not (workdir / "config.json").exists():
            raise ConfigError(f"{path} has no config.json: give an experiment file, a run's working directory or a Hugging "
                              "Face checkpoint directory")
        path = workdir / "config.json"
    table = untrusted.read_json(untrusted.check_link(path))
    if isinstance(table.get("model"), dict):
        return table
    if manager.HUGGING_FACE_KEYS.isdisjoint(table):
        raise ConfigError(f"{path} is neither the config of a run, which has a section \"model\", nor one of a Hugging Face "
                          "checkpoint, which has a \"model_type\"")
    return {"model": hf_config.read_model(table, path)}
