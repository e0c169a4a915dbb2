"""An experiment of Primus in the layout of its repository: facts of AMD-AGI/Primus (MIT), not its files.

The experiment is examples/megatron/configs/MI355X/deepseek_v3-FP8-pretrain.yaml (05b350b3), with the values that its own
files have of these keys. What is expected was read from them by eye.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moecompile.compose import conf_dir
from moecompile.errors import ConfigError
from moecompile.imports import Caller, Draft, read_draft
from tests.imports.test_megatron import flat

EXPERIMENT = "examples/megatron/configs/MI355X/deepseek_v3-FP8-pretrain.yaml"
FILES: dict[str, dict[str, Any]] = {
    "primus/configs/modules/module_base.yaml": {"trainable": False, "file_sink_level": "DEBUG"},
    "primus/configs/modules/megatron/turbo.yaml": {
        "enable_primus_turbo": False, "use_turbo_deepep": False, "turbo_deepep_num_cu": 32,
    },
    "primus/configs/modules/megatron/pre_trainer.yaml": {
        "extends": ["../module_base.yaml", "turbo.yaml"], "retro_num_neighbors": 2, "bf16": True, "fp8": None,
        "fp8_recipe": "delayed", "use_distributed_optimizer": True, "micro_batch_size": 2, "lr": 2.0e-5,
        "adam_beta2": 0.999, "weight_decay": 0.0, "lr_decay_iters": 9, "cuda_graph_scope": "full",
    },
    "primus/configs/models/megatron/language_model.yaml": {
        "num_layers": 24, "swiglu": True, "quick_geglu": False, "untie_embeddings_and_output_weights": True,
        "tp_comm_bulk_wgrad": True, "moe_token_dispatcher_type": "allgather", "moe_layer_freq": 1, "moe_router_topk": 2,
        "context_parallel_size": 1,
    },
    "primus/configs/models/megatron/deepseek_v3_base.yaml": {
        "includes": ["language_model.yaml"], "multi_latent_attention": True, "qk_layernorm": True, "moe_router_topk": 6,
        "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_aux_loss_coeff": 0.001,
        "moe_router_bias_update_rate": 1.0e-3, "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_token_dispatcher_type": "alltoall", "expert_tensor_parallel_size": None, "add_bias_linear": False,
    },
    "primus/configs/models/megatron/deepseek_v3.yaml": {
        "extends": ["deepseek_v3_base.yaml"], "tokenizer_type": "DeepSeekV3Tokenizer", "num_layers": 61,
        "tokenizer_model": "deepseek-ai/DeepSeek-V3", "hidden_size": 7168, "ffn_hidden_size": 18432,
        "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_head_dim": 128, "v_head_dim": 128,
        "qk_pos_emb_head_dim": 64, "moe_layer_freq": "([0]*3+[1]*58)", "num_experts": 256, "moe_router_topk": 8,
        "moe_ffn_hidden_size": 2048, "moe_shared_expert_intermediate_size": 2048, "expert_model_parallel_size": 1,
        "moe_router_num_groups": 8, "moe_router_group_topk": 4, "moe_router_topk_scaling_factor": 2.5,
        "mtp_num_layers": 1, "num_shared_experts": 1,
    },
}  # fmt: skip
OVERRIDES: dict[str, Any] = {
    "stderr_sink_level": "DEBUG", "train_iters": 50, "micro_batch_size": 2, "global_batch_size": 4096,
    "seq_length": "${PRIMUS_SEQ_LENGTH:4096}", "max_position_embeddings": "${PRIMUS_MAX_POSITION_EMBEDDINGS:4096}",
    "lr": 1.0e-5, "weight_decay": 0.1, "adam_beta2": 0.95, "lr_decay_iters": None,
    "pipeline_model_parallel_size": "${PRIMUS_PP:16}",
    "pipeline_model_parallel_layout": f"Et*1|t*1|{'t*2|' * 29}t*1,L",
    "expert_model_parallel_size": "${PRIMUS_EP:8}", "train_data_path": "${PRIMUS_TOKENIZED_DATA_PATH:null}",
    "main_grads_dtype": "bf16", "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16", "recompute_granularity": "full",
    "recompute_layer_ids": "0,3,4,7,8,11,12,15,19,23,31,32,35,36,39,40,43,44,47,48,51", "enable_primus_turbo": True,
    "use_turbo_deepep": True, "turbo_deepep_num_cu": 80, "turbo_sync_free_moe_stage": 1, "fp8": "hybrid",
}  # fmt: skip


def experiment(clone: Path, files: dict[str, dict[str, Any]] | None = None, **overrides: Any) -> Path:
    """Writes a clone with an experiment, and returns its file."""
    trainer = {"framework": "megatron", "config": "pre_trainer.yaml", "model": "${PRIMUS_MODEL:deepseek_v3}.yaml"}
    body = {"exp_name": "x", "modules": {"pre_trainer": {**trainer, "overrides": OVERRIDES | overrides}}}
    for name, content in {EXPERIMENT: body, **FILES, **(files or {})}.items():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text(yaml.safe_dump(content, sort_keys=False))
    return clone / EXPERIMENT


def draft(path: Path, **names: str) -> Draft:
    return read_draft("megatron", str(path), Caller(names=names, conf=conf_dir(), ranks=(32, 8)))


def test_an_experiment(tmp_path: Path) -> None:
    found = draft(experiment(tmp_path))
    expected = {
        "model": "deepseek_v3", "hardware": "mi355x", "mesh": (32, 8), "ep": 8, "pp": 16, "vpp": 2, "tp": 1, "zero": 1,
        "global_batch_size": 4096, "seq_len": 4096, "mtp": 1, "bits": 8, "dispatcher": "deepep", "grad_bits": 16,
        "moment_bits": 16, "recompute": ["full"], "graph": [], "losses": {"sequence": 0.001}, "rule": "bias",
        "lr": 1e-5, "weight_decay": 0.1, "betas": [0.9, 0.95], "max_steps": 50,
    }  # fmt: skip
    assert {key: flat(found)[key] for key in expected} == expected
    assert found.stack["comm_units"]["value"] == 80  # type: ignore[index]
    # Of the stages 0, 1, 2-3, 4-5, ..., 58-59 and 60 rank i has those at i and i + 16. The ranks with layers 3, 4, 35
    # and 36 and their like compute two again, where the mean rank has 61 / 16.
    assert flat(found)["recompute_share"] == round(2 * 16 / 61, 4)
    rows = {row.key: row for row in found.rows}
    assert not [row for row in found.rows if row.kind == "unknown"]
    # Each key of the experiment has a row but those that are null; of tables of defaults there are those that count.
    assert {key for key, value in OVERRIDES.items() if value is not None} - rows.keys() == {"train_data_path"}
    assert not {"retro_num_neighbors", "tp_comm_bulk_wgrad", "file_sink_level", "lr_decay_iters"} & rows.keys()
    line = (tmp_path / EXPERIMENT).read_text().splitlines().index("      fp8: hybrid") + 1
    assert (rows["fp8"].line, rows["num_experts"].line) == (line, None)
    assert rows["num_experts"].text.endswith("(deepseek_v3.yaml)")
    assert rows["swiglu"].text.endswith("(language_model.yaml)") and rows["bf16"].text.endswith("(pre_trainer.yaml)")


def test_what_the_caller_gives_and_takes_away(tmp_path: Path) -> None:
    path = experiment(tmp_path / "a", fp8=None, enable_primus_turbo=False, recompute_layer_ids=[0, 1, 2])
    found = flat(draft(path, PRIMUS_PP="8", PRIMUS_EP="32", PRIMUS_SEQ_LENGTH="8192"))
    expected = {"pp": 8, "vpp": 4, "ep": 32, "seq_len": 8192, "bits": 16, "dispatcher": "alltoall"}
    assert {key: found[key] for key in expected} == expected  # a recipe of FP8 alone is none
    assert found["recompute_share"] == round(8 / 61, 4)  # layers 0, 1 and 2 are on ranks 0, 1 and 2
    assert found["comm_units"]["value"] == 20
    elsewhere = tmp_path / "mine" / "MI300X.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(path.read_text())
    assert flat(draft(elsewhere, PRIMUS_PATH=str(tmp_path / "a")))["hardware"] == "mi300x"
    with pytest.raises(ConfigError, match=r"whose folder primus/configs is not above it\. Give the path of the file"):
        draft(elsewhere)
    with pytest.raises(
        ConfigError, match=r"^set\.PRIMUS_PATH=.*mine: has no folder primus/configs\. Give the folder of"
    ):
        draft(elsewhere, PRIMUS_PATH=str(elsewhere.parent))


def test_names_of_the_experiment_and_of_the_command_line(tmp_path: Path) -> None:
    path = experiment(tmp_path, fp8="hybrid")
    path.write_text(path.read_text() + "work_group: ${PRIMUS_TEAM:amd}\n")
    assert flat(draft(path, PRIMUS_TEAM="mine", fp8="null"))["bits"] == 16  # one of another part, a key of the file


def test_null_takes_away_what_another_file_says(tmp_path: Path) -> None:
    folder = "primus/configs/models/megatron/"
    last = {"moe_router_score_function": None, "q_lora_rank": "${RANK:7}"}
    extends = {"extends": ["deepseek_v3_base.yaml", "${PRIMUS_LAST:last}.yaml"]}
    path = experiment(tmp_path, {f"{folder}last.yaml": last, MODEL: {**FILES[MODEL], "q_lora_rank": None, **extends}})
    model: Any = draft(path).model
    assert (model["architecture"], model["config"]["q_lora_rank"]) == ("deepseek_v2", None)
    with pytest.raises(ConfigError, match=r"names .*other\.yaml, which is not there"):
        draft(path, PRIMUS_LAST="other")


MODEL = "primus/configs/models/megatron/deepseek_v3.yaml"


@pytest.mark.parametrize(
    ("files", "changed", "message"),
    [
        ({EXPERIMENT: {"modules": {}}}, {}, "has no trainers in `modules`, and one is read"),
        ({EXPERIMENT: {"modules": [{"name": "pre_trainer"}]}}, {}, "has no trainers in `modules`, and one is read"),
        (
            {EXPERIMENT: {"modules": {"pre_trainer": {"framework": "torchtitan", "config": "a", "model": "b"}}}}, {},
            "has modules.pre_trainer.framework=torchtitan. Known is megatron: Megatron-Core.",
        ),
        ({EXPERIMENT: {"modules": {"pre_trainer": {"framework": "megatron", "config": "pre_trainer.yaml"}}}}, {}, "has no modules.pre_trainer.model"),
        ({MODEL: {"extends": ["not_there.yaml"]}}, {}, "not_there.yaml, which is not there. Give a clone of Primus that has it."),
        ({MODEL: {"extends": "deepseek_v3_base.yaml"}}, {}, "deepseek_v3.yaml: extends deepseek_v3_base.yaml, which is no list."),
        (
            {EXPERIMENT: {"modules": {"pre_trainer": {"framework": "megatron", "config": "${A}.yaml", "model": "b"}}}}, {},
            "names ${A}.yaml, which has no value for A. Give set.A=VALUE.",
        ),
        ({EXPERIMENT: {"modules": {"pre_trainer": {"framework": "megatron", "config": None}}}}, {}, "has no modules.pre_trainer.config"),
        ({MODEL: {"extends": ["deepseek_v3.yaml"]}}, {}, "deepseek_v3.yaml: extends itself. Correct it."),
        ({MODEL: {"bases": ["language_model.yaml"]}}, {}, "has `bases`, which some versions of Primus follow and others leave out."),
        ({}, {"num_experts": "${EXPERTS}"}, "has no value for EXPERTS, which num_experts (line "),
        ({MODEL: {**FILES[MODEL], "num_experts": "${EXPERTS}"}}, {}, "which num_experts (in deepseek_v3.yaml) needs. Give set.EXPERTS=VALUE."),
        ({MODEL: {**FILES[MODEL], "num_experts": "many"}}, {}, " (in deepseek_v3.yaml): num_experts=many: must be a whole number."),
        ({}, {"recompute_layer_ids": "0,61"}, "recompute_layer_ids=0,61: must be numbers of layers below 61."),
        ({}, {"recompute_layer_ids": None, "recompute_method": "block"}, "recompute_method=block: needs the number of layers."),
    ],
)  # fmt: skip
def test_what_is_refused(files: dict[str, Any], changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        draft(experiment(tmp_path, files, **changed))
    assert message in str(caught.value)
