"""task=export: from sharded checkpoints, in our own format, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils._python_dispatch import TorchDispatchMode

import moecompile
from moecompile import plan as plans
from moecompile.compose import compose_config
from moecompile.errors import ConfigError, VerificationFailed
from moecompile.export import huggingface, load_run, pairs
from moecompile.export import run as runs
from moecompile.export.huggingface import family_weights
from moecompile.models.build import build_model, example_inputs
from moecompile.plan.adapters import AdaptersPlan
from moecompile.runtime.data import train_tokenizer
from moecompile.schema import validate
from moecompile.torch_private import is_fake, tree_leaves
from tests.distributed.harness import run_distributed_test
from tests.existing_models import CONFIGS
from tests.export.runs import SEQ, tiny_config, tiny_run
from tests.export.sharded import RUNS, save_runs
from tests.export.test_pairs import exported
from tests.table_models import qwen4
from tests.tiny import max_diff


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Checkpoints of four ranks, EP2 x DP2 and EP4, and the logits that these ranks computed."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, run_distributed_test(save_runs, 4, str(folder), timeout_s=180)[0]


@pytest.mark.parametrize("name", RUNS)
def test_a_sharded_checkpoint_becomes_a_model_of_transformers(
    name: str, sharded: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, logits = sharded
    result = exported(folder / name, tmp_path)
    assert result["max_abs_diff"] <= 1e-5
    assert result["checkpoint"].endswith("checkpoints/step-7")
    model = huggingface.reload(tmp_path / "model")
    with torch.no_grad():
        again = model(**example_inputs(model, SEQ), use_cache=False).logits
    assert max_diff(again, logits[name]) <= 1e-5 < float(again.std()) / 1000  # what the four ranks computed


def test_deepseek_keeps_its_correction_biases(sharded: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    exported(sharded[0] / "deepseek", tmp_path)
    model, trained = huggingface.reload(tmp_path / "model"), load_run(runs.find_run(str(sharded[0] / "deepseek"), None))
    for layer in (1, 2):
        bias = trained.get_buffer(f"model.layers.{layer}.mlp.router.correction_bias")
        assert bias.abs().max() > 0.01
        assert torch.equal(model.get_buffer(f"model.layers.{layer}.mlp.gate.e_score_correction_bias"), bias)


def test_the_native_format_is_read_again(sharded: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, logits = sharded
    result = exported(folder / "deepseek", tmp_path / "native", "export.format=native")
    native = Path(result["path"])
    assert result["max_abs_diff"] == 0.0
    model, trained = moecompile.load_exported(native), load_run(runs.find_run(str(folder / "deepseek"), None))
    assert model.state_dict().keys() == trained.state_dict().keys()
    for key, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    with torch.no_grad():
        assert max_diff(model(**example_inputs(model, SEQ)).logits, logits["deepseek"]) <= 1e-5
    assert exported(native, tmp_path / "family")["architecture"] == "DeepseekV3ForCausalLM"  # a native export is a run


class _Largest(TorchDispatchMode):
    """bytes: of the largest memory of a tensor that is in no file."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or is_fake(tensor) or tensor.is_meta:
                continue
            memory = tensor.untyped_storage()
            if memory.nbytes() > self.bytes and not _is_of_a_file(memory.data_ptr()):
                self.bytes = memory.nbytes()
        return out


def _is_of_a_file(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, _, _, _, inode, *_ = line.split()
        first, end = (int(each, 16) for each in where.split("-"))
        if first <= address < end:
            return inode != "0"
    return False


@pytest.mark.parametrize("format", ["huggingface", "native"])
def test_a_table_is_never_whole_in_memory(format: str, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", qwen4("mesh=cpu_1x2", base=40_000))
    (table,) = (each.numbers for each in plans.read(run / "plan.yaml").lookups)
    with _Largest() as largest:
        result = exported(run, tmp_path / "out", f"export.format={format}")
    assert result["max_abs_diff"] <= 1e-6
    assert 0 < largest.bytes < table  # in fp32 it has four times as many
    left = {path.suffix for path in Path(result["path"]).iterdir()}
    assert left <= {".json", ".safetensors", ".yaml"}


def test_a_disk_without_room_for_tables_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = tiny_run(tmp_path / "run", qwen4("mesh=cpu_1x2"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        ConfigError, match=r"^export.path=.*: has no room for model.layers.0.*: No space left on device"
    ):
        exported(run, tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_disk_that_fills_up_is_told_and_nothing_is_left(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_model: object, _run: object, folder: Path) -> None:
        (folder / "part").write_text("half")
        raise error

    run = tiny_run(tmp_path / "run", tiny_config("llama", []))
    monkeypatch.setattr("moecompile.tasks.export.write_native", full)
    with pytest.raises(ConfigError, match=r"^export\.path=.*/model: cannot be written: .*No space left on device"):
        exported(run, tmp_path / "out", "export.format=native")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_in_the_way_of_an_export_is_told(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", tiny_config("llama", []))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^export\.path=.*/file/new: cannot be written: Not a directory"):
        exported(run, tmp_path / "out", f"export.path={tmp_path / 'file' / 'new'}")


@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_existing_experts_stay_their_family(architecture: str, tmp_path: Path) -> None:
    model = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, **CONFIGS[architecture]}
    run = tiny_run(tmp_path / "run", tiny_config(architecture, ["experts.sites=existing"], model))
    result = exported(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert (config["model_type"], result["max_abs_diff"] <= 1e-5) == (architecture, True)


def test_a_capacity_of_existing_experts_is_named(tmp_path: Path) -> None:
    """A large one: the example alone would not tell."""
    model = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, **CONFIGS["mixtral"]}
    config = tiny_config("mixtral", ["experts.sites=existing", "routing.capacity_factor=1.95"], model)
    run = tiny_run(tmp_path / "run", config)
    with pytest.raises(
        ConfigError, match=r"huggingface: routing\.capacity_factor=1\.95 drops tokens of model\.layers\.0"
    ):
        exported(run, tmp_path / "out")
    assert exported(run, tmp_path / "out", "export.format=native")["max_abs_diff"] == 0.0


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    run = tiny_run(tmp_path / "run", tiny_config("llama", ["data.vocab_size=300"], {"vocab_size": 300}))
    text = "the whale, the whale, the white whale and the ship; " * 40
    trained = train_tokenizer(text, 270)
    trained.save(str(run / "tokenizer.json"))
    exported(run, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert tokenizer("the white whale").input_ids == trained.encode("the white whale").ids
    assert tokenizer.decode(tokenizer("the white whale").input_ids) == "the white whale"


# -- what is refused -----------------------------------------------------------------------------------------------

_REFUSED = [
    ("llama", ["routing.capacity_factor=1.0"], "routing.capacity_factor=1.0 drops tokens"),
    ("llama", ["routing.bias=true"], "routing.bias=True gives the router's logits a bias"),
    ("llama", ["routing.jitter=0.01"], "routing.jitter=0.01 jitters the router's input alone in training"),
    ("llama", ["routing.scale=2.0"], "routing.scale=2.0 scales routing weights"),
    ("llama", ["balance=bias"], "balance.rule=bias shifts the choice of experts by a correction bias"),
    ("llama", ["balance=quantile"], "balance.rule=quantile shifts the choice of experts by a correction bias"),
    ("llama", ["routing.choice=hash"], "routing.choice=hash chooses by a hash of the token id"),
    ("llama", ["routing.norm=true"], "routing.norm=True norms the router's input"),
    ("llama", ["routing.expert_scale=true"], "routing.expert_scale=True scales the weights of each expert"),
    ("cohere2", ["routing.score=sqrt_softplus"], "routing.score=sqrt_softplus is neither softmax nor sigmoid"),
    ("deepseek_v3", ["routing.score=sigmoid_after_topk"], "routing.score=sigmoid_after_topk is not sigmoid"),
    ("llama", ["experts.latent_size=8"], "experts.latent_size=8 makes experts work in a latent width"),
    (
        "nemotron_h",
        ["experts.latent_size=8", "experts.latent_norm=true", "routing.score=sigmoid"],
        "experts.latent_norm=True puts a norm before the projection up",
    ),
    (
        "qwen2",
        ["experts.num_shared=1", "experts.shared_routed=true", "routing.score=sigmoid"],
        "experts.shared_routed=True makes the router weigh the shared expert",
    ),
    ("llama", ["routing.groups=2", "routing.top_groups=1"], "routing.top_groups=1 limits a token to some of 2 groups"),
    ("llama", ["routing.groups=2", "routing.even_groups=true"], "routing.even_groups=True lets a token choose as many experts of every group"),
    ("olmo2", ["experts.layers=1:"], "experts.layers=all but [0] leaves layers dense"),
    ("deepseek_v3", ["experts.layers=::2", "routing.score=sigmoid"], "experts.layers=all but [1] leaves layers dense that are not the first ones"),
    ("deepseek_v3", ["routing.score=sigmoid", "routing.groups=2", "routing.top_groups=1", "routing.group_score=max"], "routing.group_score=max is not top2"),
    ("ernie4_5", ["experts.layers=::2"], "experts.layers=[0, 2] is not one run of layers"),
]  # fmt: skip


@pytest.mark.parametrize(("dense", "overrides", "reason"), _REFUSED)
def test_a_setting_that_no_family_has_is_named(dense: str, overrides: list[str], reason: str, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", tiny_config(dense, overrides))
    with pytest.raises(ConfigError, match=re.escape(reason)) as caught:
        exported(run, tmp_path / "out")
    assert str(caught.value).startswith("export.format=huggingface: this ")
    assert str(caught.value).endswith(f". Use export.format=native; pairs are {pairs()}.")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_exported_is_said_before_training() -> None:
    def said(*words: str) -> list[str]:
        config = tiny_config("llama", list(words))
        model = build_model(config.model, 0)
        plan = moecompile.make_plan(model, config, example=example_inputs(model, SEQ))
        assert huggingface.export_notes(model, plan, config) == []  # it is no folder's: the user has no family in mind
        config.model.pretrained = "llama"
        return huggingface.export_notes(model, plan, config)

    assert said() == []
    (note,) = said("balance=bias")
    assert "export.format=native can: this llama cannot become mixtral, because balance.rule=bias" in note


def test_a_model_without_a_pair_is_exported_as_it_is(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", tiny_config("gpt_neox", []))
    with pytest.raises(ConfigError, match=r"gpt_neox is in no pair.*export.format=native; pairs are llama, mistral"):
        exported(run, tmp_path / "out")
    assert exported(run, tmp_path / "out", "export.format=native")["max_abs_diff"] == 0.0


def test_layers_that_differ_have_no_family(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", tiny_config("llama", ["+per_layer.a.layers=0:1", "+per_layer.a.routing.top_k=1"]))
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp and model\.layers\.0\.mlp differ in experts, routing"):
        exported(run, tmp_path / "out")


def test_a_family_can_be_asked_for(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", tiny_config("llama", []))
    assert exported(run, tmp_path / "out", "export.family=qwen2_moe")["architecture"] == "Qwen2MoeForCausalLM"
    with pytest.raises(ConfigError, match=r"export\.family=olmoe: llama becomes mixtral or qwen2_moe"):
        exported(run, tmp_path / "other", "export.family=olmoe")


def test_a_difference_fails_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path / "run", tiny_config("qwen3", []))
    monkeypatch.setattr("moecompile.export.huggingface.family_weights", _wrong)
    with pytest.raises(VerificationFailed, match=r"Qwen3MoeForCausalLM.*logits differ by .*export.tolerance=1e-05"):
        exported(run, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def _wrong(*arguments: Any) -> dict[str, Tensor]:
    """The right weights, two experts of one layer exchanged."""
    weights = family_weights(*arguments)
    name = "model.layers.1.mlp.experts.down_proj"
    weights[name] = weights[name][[1, 0, *range(2, 8)]]
    return weights


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "export.run=null: task=export needs a run that was trained. Give export.run=RUN_DIRECTORY."),
        (["export.run=x", "export.tolerance=0"], "export.tolerance=0.0: must be positive. Use 1e-5."),
        (["export.run=x", "export.format=native", "export.family=mixtral"], "export.family=mixtral: has no meaning with export.format=native. Leave one of them out."),
        (["export.run=x", "routing.top_k=1"], "routing.top_k=...: task=export takes the model and its plan from the run, so other keys have no effect. Leave it out."),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        validate(compose_config(["task=export", *overrides]))


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"export\.run=.*has no resolved\.yaml\. Name the run directory of task=train"
    ):
        exported(tmp_path / "missing", tmp_path / "out")


def test_a_run_without_a_checkpoint(sharded: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    for name in ("resolved.yaml", "plan.yaml"):
        (tmp_path / name).write_text((sharded[0] / "mixtral" / name).read_text())
    with pytest.raises(ConfigError, match=r"holds no checkpoint\. Train with trainer\.save_checkpoint=true"):
        exported(tmp_path, tmp_path / "out")


def test_a_checkpoint_of_another_model(sharded: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    wrong = sharded[0] / "mixtral" / "checkpoints" / "step-7"
    with pytest.raises(ConfigError, match=r"export\.checkpoint=.*(lacks|the plan says)"):
        exported(sharded[0] / "deepseek", tmp_path, f"export.checkpoint={wrong}")


def test_the_mean_of_checkpoints(sharded: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """Against torch's own reader, in float64; transformers loads it, and its logits are those of the mean."""
    run, means = sharded[0] / "mixtral", dict[str, Tensor]()
    for step in (3, 5, 7):
        dcp_to_torch_save(run / "checkpoints" / f"step-{step}", tmp_path / "whole.pt")
        for name, value in torch.load(tmp_path / "whole.pt")["state_dict"].items():
            means[name.removeprefix("model.")] = means.get(name.removeprefix("model."), 0.0) + value.double() / 3
    result = exported(run, tmp_path / "native", "export.format=native", "export.average=3")
    assert [Path(each).name for each in result["averaged_with"]] == ["step-3", "step-5"]
    found = moecompile.load_exported(result["path"]).state_dict()
    assert found.keys() == means.keys()
    for name, mean in means.items():
        assert max_diff(found[name].double(), mean) <= 3e-7, name  # fp32
    assert exported(run, tmp_path / "transformers", "export.average=3")["max_abs_diff"] <= 1e-5
    earlier = exported(run, tmp_path / "earlier", "export.average=2", f"export.checkpoint={run}/checkpoints/step-5")
    assert [Path(each).name for each in earlier["averaged_with"]] == ["step-3"]
    with pytest.raises(
        ConfigError, match=r"export\.average=5: .*step-7 and what is before it are 4 checkpoints\. Use fewer"
    ):
        exported(run, tmp_path / "more", "export.average=5")
    assert not (tmp_path / "more" / "model").exists()
    trained = runs.find_run(str(run), None)
    adapters = AdaptersPlan(rank=2, alpha=4, dropout=0, linears=(), train_router=False)
    adapted = replace(trained, plan=replace(trained.plan, adapters=adapters))
    with pytest.raises(ConfigError, match=r"export\.average=2: the mean of A and of B, the two weights of an adapter"):
        runs.averaged(adapted, 2)


def test_an_existing_folder_is_not_overwritten(sharded: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match=r"export\.path=.*is there already"):
        exported(sharded[0] / "mixtral", tmp_path, f"export.path={tmp_path}/mine")
