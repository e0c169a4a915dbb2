"""adapters=lora with the command line's defaults on a folder: two ranks, resumed on one, exported alone and merged.

On two ranks, experts are where a placement says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moecompile.pipeline import make_plan
from moecompile.runtime.data import load_text, train_tokenizer
from moecompile.schema import DataConfig
from tests.distributed.harness import run_distributed_test
from tests.existing_models import moe_model
from tests.placements import random_placement
from tests.tasks.families_job import VOCAB, of_run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of peft and transformers
LORA = ("adapters=lora", "adapters.rank=4")
FAMILIES = {"mixtral": (), "deepseek_v3": ("adapters.train_router=true", "balance.rule=bias", "balance.rate=0.01")}


def _folders(root: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    text = load_text(DataConfig())[20_000:50_000]
    (root / "text.txt").write_text(text)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(text, 300))
    for name in FAMILIES:
        moe_model(name, vocab_size=VOCAB).save_pretrained(root / "folders" / name)
        tokenizer.save_pretrained(root / "folders" / name)
        example = {"input_ids": torch.ones(1, 8, dtype=torch.int64)}
        plan = make_plan(moe_model(name, vocab_size=VOCAB), ["mesh.ranks_per_node=2"], example=example)
        random_placement(plan.layers, root / f"{name}.yaml", 1)


def _train(rank: int, world_size: int, root: Path, kind: str, mesh: str, steps: int, start: str) -> None:
    from unittest import mock

    from moecompile.tasks.ranks import train

    for name, more in FAMILIES.items():
        resumed = [f"trainer.resume={root / start / name}"] if start else []
        placed = [f"mesh.placement={root}/{name}.yaml"] if world_size > 1 else []
        config = of_run(root, name, kind, mesh, *LORA, *more, f"trainer.max_steps={steps}", *resumed, *placed)
        with mock.patch("moecompile.tasks.ranks.train.init_process_group"):
            train.run_rank(config, root / kind / name)


def _result(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    return result


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    _folders(root)
    run_distributed_test(_train, 2, root, "two", "cpu_1x2", 2, "", timeout_s=300)
    run_distributed_test(_train, 1, root, "resumed", "cpu_1", 3, "two", timeout_s=300)
    run_distributed_test(_train, 1, root, "straight", "cpu_1", 3, "", timeout_s=300)
    return root


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_and_then_one_equal_one_rank(name: str, root: Path) -> None:
    from moecompile.export import load_exported

    resumed, straight = _result(root / "resumed" / name), _result(root / "straight" / name)
    assert resumed["val_loss"] == pytest.approx(straight["val_loss"], abs=5e-6)
    got, wanted = (load_exported(root / kind / name).state_dict() for kind in ("resumed", "straight"))
    before = moe_model(name, vocab_size=VOCAB).state_dict()
    for key, value in wanted.items():
        assert torch.allclose(got[key], value, atol=2e-5), key
        if ".lora_" not in key and not ("gate." in key and name == "deepseek_v3"):
            assert torch.equal(value, before[key.replace(".base_layer.", ".")]), key  # frozen
    assert any(value.abs().max() > 0 for key, value in wanted.items() if "lora_B" in key)


@pytest.mark.parametrize("how", ["separate", "merged"])
@pytest.mark.parametrize("name", FAMILIES)
def test_exports_equal_the_trained_model_in_plain_transformers(name: str, how: str, root: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from moecompile.compose import compose_config
    from moecompile.export import load_exported
    from moecompile.tasks import export

    run, out = root / "resumed" / name, root / f"{how}_{name}"
    export.run(compose_config([f"export.run={run}", f"export.adapters={how}"]), out)
    result = _result(out)
    assert result["max_abs_diff"] <= 1e-5
    source = root / "folders" / name if how == "separate" else out / "model"
    loaded: Any = AutoModelForCausalLM.from_pretrained(source)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        base = loaded.eval()(ids).logits
        if how == "separate":
            loaded = PeftModel.from_pretrained(loaded, str(out / "model")).eval()
        logits, wanted = loaded(ids).logits, load_exported(run)(ids).logits
    assert torch.allclose(logits, wanted, atol=1e-5)
    if how == "separate":
        assert (base - wanted).abs().max() > 1e-3


def _states(rank: int, world_size: int, overrides: list[str]) -> dict[str, int]:
    """Bytes of gradients and of the optimizer's state on this rank after a step, and what was planned."""
    from moecompile.passes.shard import device_mesh_of, shard
    from moecompile.pipeline import compile_model, plan_of
    from moecompile.torch_private import local_part

    model, ids = moe_model("mixtral"), torch.arange(16).reshape(2, 8)
    compile_model(model, [f"mesh.ranks_per_node={world_size}", *overrides], example={"input_ids": ids})
    plan = plan_of(model)
    shard(model.train(), plan, device_mesh_of(plan.mesh, "cpu"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(ids).logits.sum().backward()
    optimizer.step()
    assert plan.estimate is not None
    memory = plan.estimate.memory_bytes_per_rank
    state = [value for entry in optimizer.state.values() for key, value in entry.items() if key != "step"]
    return {
        "grads": sum(local_part(p.grad).nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(local_part(value).nbytes for value in state),
        "planned_optimizer": memory.optimizer, "planned_grads": memory.grads,
    }  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2])
def test_memory_of_gradients_and_optimizer_is_as_planned(world_size: int) -> None:
    """Gradients are planned with the buffer in which FSDP reduces them, so they are at most the planned ones."""
    adapters, full = (
        run_distributed_test(_states, world_size, overrides, timeout_s=120)[0] for overrides in (list(LORA), [])
    )
    for found in (adapters, full):
        assert found["optimizer"] == pytest.approx(found["planned_optimizer"], rel=0.02)
        assert found["optimizer"] / 2 == found["grads"] <= found["planned_grads"]
    assert adapters["optimizer"] < full["optimizer"] / 5
    print(world_size, adapters, full)
