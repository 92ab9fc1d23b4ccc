"""Small models in the released checkpoint form, for tests of conversion."""
import dataclasses
import json

import numpy as np
from safetensors.numpy import load_file, save_file

from mmx import config
from mmx.checkpoints import convert, hf_config, hf_layout, safetensors

SMALL = config.Model(vocab=19, dim=12, layers=8, heads=4, kv_heads=2, head_dim=8, rotary_dim=4, experts=3,
                     expert_dim=10, alpha_softmax=3.0, beta_moe=0.5, norm_eps=2e-5, rope_theta=5e5)
SHAPES = {
    "seven_to_one": SMALL,
    "odd_heads": dataclasses.replace(SMALL, pattern="LLS", layers=6, heads=6, kv_heads=1, rotary_dim=2),
    "all_softmax": dataclasses.replace(SMALL, pattern="S", layers=3, heads=5, kv_heads=5),
    "all_lightning": dataclasses.replace(SMALL, pattern="L", layers=2),
}
BYTE_MODEL = dataclasses.replace(SMALL, pattern="LS", layers=2, vocab=264)      # of the byte tokenizer
WORDS = {"</s>": 0, "<s>": 1, "<pad>": 2, "the": 3, "state": 4, "of": 5}


def write_released(directory, model, dtype="F32", dialect="released", seed=0):
    """Writes random tensors and a config.json in the form of the released checkpoint; returns the tensors."""
    directory.mkdir(parents=True)
    rng, numpy_dtype = np.random.default_rng(seed), safetensors.DTYPES[dtype]
    tensors = {name: rng.standard_normal(leaf.tensor_shape).astype(numpy_dtype)
               for leaf in hf_layout.leaves(model) for _, name in leaf.tensors()}
    save_file(tensors, directory / "model.safetensors")
    text = hf_config.write_model(model, dialect, numpy_dtype.name, dict.fromkeys(convert.BYTE_IDS))
    (directory / "config.json").write_text(json.dumps(text))
    return tensors


def all_tensors(directory):
    """The tensors of all safetensors files of a directory, by name."""
    return {name: array for file in directory.glob("*.safetensors") for name, array in load_file(file).items()}


def tokenizer_json(**changes):
    """A tokenizer.json of whole words: "the state" is 3, 4."""
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for token, i in WORDS.items() if token[0] == "<"]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
            "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "<pad>"}} | changes


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)
