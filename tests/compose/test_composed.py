"""What tests compose (tests/composed.py) is what Hydra composes, and so are its messages."""

from __future__ import annotations

import hydra
import pytest

from moecompile.compose import compose_config, conf_dir
from moecompile.errors import UserError
from tests import composed

RECIPES = sorted(path.stem for path in (conf_dir() / "recipe").glob("*.yaml"))
WORDS = [
    *([f"recipe={name}", "mesh=cpu_1x2", "data.seq_len=8"] for name in RECIPES[::4]),
    ["model=qwen3_30b_a3b", "+model.config.new=3", "model.config.num_hidden_layers=2", "balance=bias", "balance.rate=0.1"],
    ["trainer.max_steps=3", "trainer.max_steps=4", "optimizer.groups=[{match: '*norm*', lr_scale: 0.5}]", "seed=7"],
    ["+per_layer.first.layers='0:1'", "data.path='a b'", "trainer.resume=null", "name=x"],
    ["mesh={ep: 2}", "mesh.ranks_per_node=2"], ["~model.config.vocab_size"], ["mesh=cpu_1x2", "mesh=cpu_1"],
]  # fmt: skip
WRONG = [
    ["mesh.epp=3"], ["mesh.ep=1,2"], ["mesh.ep=[1,"], ["+mesh.ep=3"], ["nothing.ep=3"], ["seed.x=3"],
    ["trainer.max_steps=two"], ["mesh=none"], ["model.config.hidden_size=${nothing}"],
    ["data.path=${oc.env:HOME}", "data.kind=x"],
]  # fmt: skip


def _both(words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    found: list[object] = []
    for function in (composed.compose, composed.HYDRAS_OWN, composed.compose):  # the last one from what is known
        monkeypatch.setattr(hydra, "compose", function)
        try:
            found.append(compose_config(words))
        except UserError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_it_is_what_hydra_composes(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, wanted, again = _both(words, monkeypatch)
    assert not isinstance(wanted, str)
    assert first == wanted == again


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_mistakes_have_hydras_messages(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, wanted, again = _both(words, monkeypatch)
    assert isinstance(wanted, str)
    assert first == wanted == again
