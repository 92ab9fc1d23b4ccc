"""experiments/vl_01.py: every pod and stage builds and fits its mesh, and has the settings of the MiniMax-VL-01 report."""
import itertools
import math
from pathlib import Path

import jax
import pytest

from mmx import cli
from mmx import mesh as meshes
from mmx.analysis.counts import count_params
from mmx.checkpoints import hf_layout
from mmx.dims import axes_of
from mmx.launch import experiments
from mmx.model import abstract_params

FOLDER = Path(__file__).parents[1] / "experiments"
FILE, TEXT = str(FOLDER / "vl_01.py"), str(FOLDER / "text_01.py")
CHIPS = {"v5p-512": 8 * 8 * 8, "v5p-2048": 8 * 16 * 16, "v6e-256": 16 * 16, "h100-512": 64 * 8}
TOKENS = {"align": 80e9, "full": 420e9, "long": 44.8e9}


@pytest.mark.parametrize("pod, stage", list(itertools.product(CHIPS, ("vit-224", "vit-336", *TOKENS))))
def test_every_pod_and_stage(pod, stage):
    e = experiments.read(f"{FILE}:{pod},{stage}", [])
    t, sizes, released = e.train, vars(e.mesh), experiments.read(TEXT, []).model
    assert math.prod(sizes.values()) == CHIPS[pod] and meshes.mesh_error(e, sizes) is None
    vit = [x.size for path, x in jax.tree_util.tree_leaves_with_path(abstract_params(e.model)["vision"])
           if not set(axes_of(path[-1].key)) & set("DO")]
    assert sum(vit) == pytest.approx(303e6, rel=2e-3)
    if stage in TOKENS:
        (_, count), = t.ramp
        assert 0 <= t.steps * count * t.batch * t.length - TOKENS[stage] < count * t.batch * t.length
        assert count_params(e.model).total - count_params(e.model).vision == count_params(released).total
        assert hf_layout.tensor_count(e.model) == 8637
        assert bool(t.freeze) == (e.model.vision.grids == ()) == (stage == "align")
    else:
        pairs, row = {"vit-224": (37e9, 4), "vit-336": (1.2e9, 2)}[stage]
        assert t.steps * t.batch * row == pytest.approx(pairs, rel=1e-4)
        captions = 2 * (76 + 2)     # a caption with its begin and end tokens, once after its image and once without it
        assert t.length // (e.model.vision.patches_per_side ** 2 + captions) == row


def test_stages_start_from_the_previous_stage():
    found = {stage: experiments.read(f"{FILE}:{stage}", []).train for stage in TOKENS}
    assert experiments.read(FILE, []).train == found["align"] == experiments.read(f"{FILE}:v5p-2048,align", []).train
    assert [(t.init_from, t.init_vision) for t in found.values()] == [("text-01", "vit-336"), ("align", ""), ("full", "")]
    assert experiments.read(f"{FILE}:vit-336", []).train.init_vision == "vit-224"


def test_unknown_arguments_are_one_line(capsys):
    assert cli.main(["config", f"{FILE}:v5p-512,8k"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "'8k' is neither a pod (v5p-512" in err
