"""The code of docs/python.md runs from top to bottom."""
import re
from pathlib import Path

import jax
import jax.numpy as jnp

from mmx import config
from mmx.checkpoints import manager, run_config
from mmx.model import Model

PAGE = Path(__file__).parent.parent / "docs" / "python.md"
MODEL = config.Model(dim=16, layers=2, pattern="LS", heads=2, kv_heads=1, head_dim=8, rotary_dim=4, experts=4, expert_dim=16)


def save_checkpoint(workdir):
    """A workdir with random parameters, as `mmx train` writes it."""
    params = jax.jit(lambda: Model(MODEL).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])()
    run_config.check_config(workdir, config.Experiment(model=MODEL))
    checkpoints = manager.Checkpoints(workdir, every=1, keep=1)
    checkpoints.save(0, params, {"step": jnp.zeros(())}, {})
    checkpoints.close()


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE))
    assert len(blocks) >= 5
    names = {}
    for block in blocks:
        line = PAGE.read_text().count("\n", 0, block.start(1))
        code = compile("\n" * line + block[1], str(PAGE), "exec")      # a traceback names the page's line
        exec(code, names)
    assert names["losses"][-1] < names["losses"][0]
    assert capsys.readouterr().out.count("loss") == 1
    for grads in (names["grads"], names["dq_BHTK"]):
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(grads))
