"""No native code of a hub runs: in any path of the package, whatever a config says, and in a user's own model."""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import moecompile
from moecompile import compile_model, hub_kernels, make_plan
from moecompile.errors import ConfigError
from moecompile.export import load_adapters, reload
from moecompile.export.huggingface import find_target, write
from moecompile.models.build import build_empty, build_model, config_of
from moecompile.models.widen import widen_experts
from moecompile.runtime.launch import _launch_variables
from moecompile.schema import ModelAttention, ModelConfig
from tests.existing_models import moe_model
from tests.tiny import COPY4, config, ids, max_diff, tiny_llama

hub = pytest.importorskip("transformers.integrations.hub_kernels")
PACKAGE = Path(moecompile.__file__).parent
EXAMPLE = {"input_ids": ids()}
needs_default = pytest.mark.skipif(
    not hasattr(hub, "_ensure_kernels_enabled") or not hub.is_kernels_available(),
    reason="transformers puts kernels of a hub into models by itself since 5.25, with the package kernels",
)


class Doubled(nn.Module):
    """What a hub would have in the place of a norm: wrong on purpose."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * hidden_states


class Repository:
    def load(self) -> type[nn.Module]:
        return Doubled


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Kernels for a CPU, and every call that would put them into a model, or fetch one."""
    import kernels

    monkeypatch.delenv(hub_kernels.VARIABLE, raising=False)
    found: list[str] = []
    inner = hub._kernels_kernelize
    repository = Repository()
    mapping = {"RMSNorm": {"cpu": {kernels.Mode.TRAINING: repository, kernels.Mode.INFERENCE: repository}}}

    def kernelize(model: nn.Module, **options: Any) -> Any:
        found.append(type(model).__name__)
        return inner(model, **options)

    def fetch(name: str, *args: Any, **kwargs: Any) -> Any:
        found.append(name)
        raise FileNotFoundError(name)

    monkeypatch.setattr(hub, "_kernels_kernelize", kernelize)
    monkeypatch.setattr(hub, "get_kernel_mapping_transformers", lambda: mapping)
    monkeypatch.setattr(hub, "get_kernel_hub", fetch)
    monkeypatch.setattr(kernels, "get_kernel", fetch)
    with kernels.use_kernel_mapping({}, inherit_mapping=False):
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    return tmp_path / "dense"


def load_as_user(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


# -- what the package loads --------------------------------------------------------------------------------------------


@needs_default
def test_no_path_of_the_package_asks_for_kernels(folder: Path, calls: list[str]) -> None:
    given = ModelConfig(pretrained=str(folder))
    config_of(given)
    build_empty(given, torch.float32).train()
    model: Any = build_model(given, 0)
    plan = make_plan(model, COPY4, example=EXAMPLE)
    model = compile_model(model, plan=plan, example=EXAMPLE, until="rewrite")
    for training in (False, True, False):
        model.train(training)
        model(**EXAMPLE)
    model.generate(ids(1, 3), max_new_tokens=2, do_sample=True)  # as chat and samples do
    target = find_target(model, plan, None)
    write(model, target, folder.parent / "moe")
    loaded = reload(folder.parent / "moe")
    loaded.train().eval()
    assert max_diff(loaded(**EXAMPLE).logits, model(**EXAMPLE).logits) < 1e-5
    assert calls == []


@needs_default
def test_the_spy_sees_what_transformers_does_by_itself(folder: Path, calls: list[str]) -> None:
    model = load_as_user(folder)
    model.train()
    assert calls == ["LlamaForCausalLM"] * 2
    assert "forward" in vars(model.model.norm)


@needs_default
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it
def test_widening_and_adapters_ask_for_none(calls: list[str], folder: Path) -> None:
    widen_experts(moe_model("qwen3_moe"), 2, example=EXAMPLE)
    peft = pytest.importorskip("peft")
    base = build_model(ModelConfig(pretrained=str(folder)), 0)
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(folder.parent / "lora")
    load_adapters(build_model(ModelConfig(pretrained=str(folder)), 0), folder.parent / "lora").train().eval()
    assert calls == []


@needs_default
def test_a_broken_installation_of_kernels_stops_no_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kernels", None)  # its import raises
    with torch.no_grad():
        assert torch.isfinite(build_model(ModelConfig(pretrained=str(folder)), 0)(**EXAMPLE).logits).all()


@pytest.mark.parametrize("version", [2, 3])
def test_attention_of_a_missing_package_is_not_fetched(version: int, folder: Path, calls: list[str]) -> None:
    asked = ModelAttention(f"flash_attention_{version}")
    for model in (
        ModelConfig(pretrained=str(folder), attention=asked),
        ModelConfig(architecture="llama", config=SMALL, attention=asked),
    ):
        with pytest.raises(ConfigError, match=rf"^model\.attention={asked.value}"):
            build_model(model, 0)
    assert calls == []


SMALL = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32,
    "num_key_value_heads": 2,
}  # fmt: skip


def test_one_module_loads_and_makes_models() -> None:
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "from_config", "_from_config"):
                found.setdefault(str(path.relative_to(PACKAGE)), []).append(ast.unparse(node.value))
    assert found == {
        "export/adapters.py": ["PeftModel"],  # into a model that is there
        "export/beside.py": ["GenerationConfig"],
        "models/chat.py": ["AutoTokenizer"],
        "models/packages.py": ["AutoTokenizer"],
        "models/without_hub_code.py": ["AutoConfig", "kind", "kind"],
    }


# -- what configs name -------------------------------------------------------------------------------------------------

NAMED: list[tuple[dict[str, Any], str]] = [
    ({"attn_implementation": "some/kernel"}, "attn_implementation=some/kernel"),
    ({"_attn_implementation": "some/kernel"}, "attn_implementation=some/kernel"),
    ({"_attn_implementation_internal": "paged|some/kernel@main:f"}, "attn_implementation=paged|some/kernel@main:f"),
    ({"attn_implementation": {"": "sdpa", "text_config": "some/kernel"}}, "attn_implementation=some/kernel"),
    ({"text_config": {"_attn_implementation": "some/kernel"}}, "attn_implementation=some/kernel"),
    ({"experts_implementation": "some/kernel"}, "experts_implementation=some/kernel"),
    ({"kernel_config": {"kernel_mapping": {"RMSNorm": "some/kernel:Norm"}}}, "kernel_config="),
    ({"fusion_config": {"patch_embeddings": True}}, "fusion_config="),
    ({"use_kernels": True}, "use_kernels=True"),
    ({"per_layer_config": [{"kernel_config": "x"}]}, "kernel_config=x"),
]


@pytest.mark.parametrize(("keys", "says"), NAMED)
def test_a_folder_names_no_code(keys: dict[str, Any], says: str, folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    given = ModelConfig(pretrained=str(folder))
    for use in (config_of, lambda model: build_model(model, 0), lambda model: build_empty(model, torch.float32)):
        with pytest.raises(ConfigError) as raised:
            use(given)
        assert str(raised.value).startswith(f"model.pretrained={folder}: names code of a hub to run, {says}")
    with pytest.raises(ConfigError, match=r"^export\.path=.*: names code of a hub to run"):
        reload(folder)


@pytest.mark.parametrize("keys", [{"use_kernels": False}, {"fusion_config": None}, {"_attn_implementation": "sdpa"}])
def test_what_names_none_is_loaded(keys: dict[str, Any], folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    build_model(ModelConfig(pretrained=str(folder)), 0)


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "kernel_config"])
def test_keys_of_a_model_name_no_code(name: str) -> None:
    model = ModelConfig(architecture="llama", config={**SMALL, name: "some/kernel"})
    with pytest.raises(ConfigError, match=rf"^model\.config=.*: names code of a hub to run, {name.strip('_')}="):
        build_model(model, 0)


# -- a user's model ----------------------------------------------------------------------------------------------------


@needs_default
@pytest.mark.parametrize("variable", [None, "NO"])
def test_a_users_model_gets_its_own_layers_again(
    variable: str | None, folder: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, model = build_model(ModelConfig(pretrained=str(folder)), 0).eval(), load_as_user(folder)
    with torch.no_grad():
        want = wanted(**EXAMPLE).logits
        assert max_diff(model(**EXAMPLE).logits, want) > 1e-3
    if variable is not None:
        monkeypatch.setenv(hub_kernels.VARIABLE, variable)
    with pytest.warns(UserWarning, match=r"^LlamaForCausalLM had kernels of a hub.*from_pretrained\(\.\.\., use_ker"):
        compiled = compile_model(model, COPY4, example=EXAMPLE)
    assert os.environ.get(hub_kernels.VARIABLE) == variable
    calls.clear()
    for training in (True, False):
        compiled.train(training)
    with torch.no_grad():
        assert max_diff(compiled(**EXAMPLE).logits, want) < 1e-5
    assert calls == []


@needs_default
def test_planning_takes_them_off_too_and_below_a_module_of_the_user(folder: Path, calls: list[str]) -> None:
    holder = nn.Module()
    holder.inner = load_as_user(folder)
    with pytest.warns(UserWarning, match="had kernels of a hub"):
        hub_kernels.take_off(holder)
    calls.clear()
    holder.train()
    assert calls == [] and "forward" not in vars(holder.inner.model.norm)
    model = load_as_user(folder)
    with pytest.warns(UserWarning, match="had kernels of a hub"):
        make_plan(model, COPY4, example=EXAMPLE)
    assert not model.use_kernels


@needs_default
def test_kernels_that_stay_are_refused(folder: Path, calls: list[str]) -> None:
    fix = r"Load it without: from_pretrained\(\.\.\., use_kernels=False\)"
    model = load_as_user(folder).to("meta")
    with pytest.raises(
        ConfigError, match=rf"^model=LlamaForCausalLM: has kernels of a hub, which cannot .*meta.*{fix}"
    ):
        compile_model(model, COPY4, example=EXAMPLE)
    model = load_as_user(folder)
    with mock.patch.object(type(model), "reset_kernels"), pytest.raises(ConfigError, match=f"which stay .*{fix}"):
        compile_model(model, COPY4, example=EXAMPLE)
    model.kernel_config = object()
    with pytest.raises(ConfigError, match=f"was loaded with a kernel_config.*{fix}"):
        compile_model(model, COPY4, example=EXAMPLE)


# -- the environment ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "NO", "0", "YES", "on"])
def test_the_environment_of_tasks_and_ranks(
    given: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(hub_kernels.VARIABLE, given or "")
    if given is None:
        monkeypatch.delenv(hub_kernels.VARIABLE)
    assert _launch_variables(1)[hub_kernels.VARIABLE] == "NO"
    hub_kernels.switch_off()
    hub_kernels.switch_off()
    assert os.environ[hub_kernels.VARIABLE] == "NO"
    said = f"USE_HUB_KERNELS={given} does not hold here: no native code of a hub is run, so it is NO\n"
    assert capsys.readouterr().err == (said if given in ("YES", "on") else "")


# -- the plan of a folder ----------------------------------------------------------------------------------------------


@needs_default
def test_the_plan_of_a_folder_runs_its_own_code(folder: Path, calls: list[str]) -> None:
    model = build_model(ModelConfig(pretrained=str(folder)), 0)
    plan = make_plan(model, config(*COPY4), example=EXAMPLE)
    assert plan.estimate is not None and "Llama" not in plan.estimate.largest
    assert calls == []
