"""`experts.init=widen` of a config makes the model that `widen_experts` makes, the same on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moecompile
from moecompile.compose import compose_config
from moecompile.errors import ConfigError, MoecompileError
from moecompile.load_history import LoadHistory
from moecompile.models.build import build_model, example_inputs
from moecompile.models.source import source_model, source_structure
from moecompile.models.widen import widen_experts
from moecompile.pipeline import compile_with_report, make_plan
from moecompile.plan import from_yaml, to_yaml
from moecompile.schema import Config, ModelConfig, ModelDevice, validate
from moecompile.tasks.inputs import check_inputs
from tests.existing_models import moe_model
from tests.tiny import tiny_llama

WIDEN = ["experts.init=widen", "experts.num_routed=8", "data.seq_len=16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    moe_model("mixtral").save_pretrained(path)
    return path


def loads(path: Path, *rows: list[int]) -> Path:
    """What a run writes."""
    history = LoadHistory()
    history.add(1, {f"model.layers.{i}.mlp.experts": row for i, row in enumerate(rows)})
    path.mkdir(exist_ok=True)
    history.save(path / "load.npz")
    return path


def config_of(folder: Path, *overrides: str) -> Config:
    config = compose_config([f"model.pretrained={folder}", *WIDEN, *overrides])
    validate(config)
    return config


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_is_the_model_of_widen_experts(folder: Path, tmp_path: Path) -> None:
    run = loads(tmp_path / "run", [9, 1, 1, 1], [1, 1, 1, 30])
    config = config_of(
        folder, "experts.widen.top_k=kept", f"experts.widen.loads={run}", "experts.widen.noise=0.1", "seed=3"
    )
    model = build_model(config.model, 3)
    state = torch.random.get_rng_state()
    made = source_model(config)
    assert torch.equal(torch.random.get_rng_state(), state)
    load = {"model.layers.0.mlp.experts": [9, 1, 1, 1], "model.layers.1.mlp.experts": [1, 1, 1, 30]}
    wanted = widen_experts(model, 2, example=example_inputs(model, 16), top_k="kept", load=load, noise=0.1, seed=3)
    assert same(made, wanted.model) and same(source_model(config), made)
    assert [of.count(expert) for of, expert in zip(wanted.copies.values(), (0, 3), strict=True)] == [5, 5]
    assert made.config.num_local_experts == 8 and made.config.num_experts_per_tok == 2
    config.seed = 4
    assert not same(source_model(config), made)  # the noise has the run's seed
    (run / "load.npz").unlink()
    assert source_structure(config).config.num_local_experts == 8  # for weights of a checkpoint


def test_step_0_is_that_of_the_model_before_and_the_plan_says_it(folder: Path) -> None:
    config = config_of(folder)
    before, made = build_model(config.model, 0).eval(), source_model(config).eval()
    example = example_inputs(before, 16)
    wanted = before(**example).logits
    compiled = compile_with_report(made, config, example=example)
    assert compiled.plan.layers[0].experts.num_routed == 8 and compiled.plan.layers[0].routing.top_k == 4
    assert torch.allclose(compiled.model.eval()(**example).logits, wanted, atol=1e-6)
    assert compiled.notes[0].startswith("widened: 2 MoE layers, 4 -> 8 experts; outputs differ by ")
    assert "(promised); without noise, copies chosen together stay alike" in compiled.notes[0]


def test_a_model_without_values_is_planned() -> None:
    config = compose_config([*WIDEN, "task=plan", "experts.num_routed=12", "experts.widen.noise=0.1"])
    settings = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 4, "vocab_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    config.model = ModelConfig(name="m", architecture="mixtral", config=settings, device=ModelDevice.meta)
    validate(config)
    model = source_model(config)
    assert next(model.parameters()).is_meta
    plan = make_plan(model, config, example=example_inputs(model, 16))
    assert plan.layers[0].experts.num_routed == 12 and plan.layers[0].routing.top_k == 6
    assert plan.estimate is not None
    assert plan.estimate.params_total == sum(parameter.numel() for parameter in model.parameters())


def test_what_cannot_be_widened_is_refused_before_weights_are_read(folder: Path, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "llama")
    for where, overrides, message in (
        (folder, ["experts.num_routed=6"], r"experts.num_routed=6: must be a multiple of the model's 4 experts.*8 or 12"),
        (folder, ["experts.num_routed=4"], r"experts.num_routed=4: must be a multiple of the model's 4 experts, and more"),
        (folder, [f"experts.widen.loads={tmp_path}"], r"experts.widen.loads=\S*: is neither a run directory with"),
        (tmp_path / "llama", [], r"experts.init=widen: copies the experts of a model that is MoE already, and llama has"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            check_inputs(config_of(where, "task=compile", "data.tokenizer=train", *overrides))
    other = loads(tmp_path / "other", [1, 2, 3], [1, 2, 3])
    with pytest.raises(ConfigError, match=r"experts.widen.loads=\S*: is of another model: .* 3 experts in it, 4 here"):
        source_model(config_of(folder, f"experts.widen.loads={other}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experts.widen.top_k=kept"], r"experts.widen.noise=0.0: leaves copies alike.*Use 0.01, or"),
        (["experts.widen.noise=1"], r"experts.widen.noise=1.0: must lie in \[0, 1\)"),
        (["experts.sites=both"], r"experts.sites=both: are dense FFNs, and experts.init=widen copies experts"),
        (["adapters=lora"], r"adapters.kind=lora: are for weights that are in a folder.*moecompile.widen_experts"),
        (["plan=there"], r"plan=there: is a plan of the model after it.*moecompile.widen_experts"),
        (["experts.init=copy", "experts.widen.noise=0.1"], r"experts.widen.noise=0.1: has no effect with .*init=copy"),
    ],
)
def test_what_does_not_go_together_is_refused(folder: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(folder, *overrides)


def test_a_given_model_is_not_taken_for_a_widened_one() -> None:
    example: dict[str, Any] = {"input_ids": torch.arange(8).view(1, 8)}
    with pytest.raises(ConfigError, match=r"experts.init=widen: makes a larger model before.*moecompile.widen_experts"):
        make_plan(moe_model("mixtral"), ["experts.init=widen", "experts.num_routed=4"], example=example)
    with pytest.raises(ConfigError, match=r"experts.init=widen: makes a larger model before"):
        make_plan(tiny_llama(), ["experts.init=widen"], example=example)
    per_layer = ["+per_layer.a.experts.init=widen"]
    with pytest.raises(ConfigError, match=r"per_layer.a.experts.init=widen: copies the experts of a model"):
        make_plan(tiny_llama(), per_layer, example=example)
    plan = to_yaml(make_plan(tiny_llama(), (), example=example))
    with pytest.raises(MoecompileError, match=r"experts.init=widen: must be one of"):
        from_yaml(plan.replace("init: copy", "init: widen"))
    wide = moecompile.widen_experts(moe_model("mixtral"), 2, example=example).model
    assert make_plan(wide, example=example).layers[0].experts.num_routed == 8
