"""An axolotl YAML as a draft of a recipe.

Algorithm:
  1. Keys with values and lines; those of `fsdp_config` without the prefix that older files have.
  2. The model, by its published name: an axolotl file has no widths.                                 -> `_model`
  3. The layout: FSDP or DeepSpeed, EP, TP and CP. The number of ranks is the product of the sizes that the file says,
     else the caller's.                                                                               -> `_layout`
  4. Adapters, optimizer, schedule.                                                        -> `_adapters`, `_optimizer`
  5. What is left follows `FATES`, or is unknown.

axolotl trains with PyTorch and transformers, so the software that is planned is this package's own (`stack=runtime`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moecompile.errors import ConfigError
from moecompile.imports.models import named, taken
from moecompile.imports.settings import (
    NO_EFFECT,
    NO_EQUAL,
    ON,
    Caller,
    Draft,
    Setting,
    Settings,
    machine_of,
    warmup_of,
)
from moecompile.imports.yaml_file import leaves, mapping_of
from moecompile.schema import OptimizerConfig

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_PER_NODE = 8
_NAME = "axolotl"
_SIZES = ("dp_shard_size", "dp_replicate_size", "tensor_parallel_size", "context_parallel_size", "expert_parallel_size")


def read_axolotl(path: Path, text: str, caller: Caller) -> Draft:
    """The draft of a file. The caller gives keys of the file.

    Raises:
        ConfigError: it is no such file, its model is not known, or something contradicts something else.
    """
    found = {}
    for key, value, line in leaves(mapping_of(path, text)):  # Step 1
        name = re.sub(r"^fsdp_config\.(fsdp_)?", "fsdp_config.", key)
        found[name] = Setting(key=name, value=value, line=line)
    found |= {name: Setting(key=name, value=value, given=name) for name, value in caller.names.items()}
    s = Settings(path=str(path), found=found, fates=FATES)
    if not s.has("base_model") or not (s.has("micro_batch_size") or s.has("datasets")):
        fix = "Give a YAML file as axolotl's examples are"
        raise ConfigError("file", path, "is no config of axolotl: it has no base_model with a batch or data", fix)
    model = _model(s, caller)
    layout, mesh = _layout(s, caller)
    trainer = _trainer(s)
    optimizer = _optimizer(s) | _schedule(s, trainer.get("max_steps"))
    values = {"mesh": mesh, "optimizer": optimizer, "trainer": trainer, "adapters": _adapters(s)}
    name = re.sub(r"\W+", "_", path.stem).strip("_").lower()
    draft = Draft(name=name, model=model, **layout, stack="runtime", values={k: v for k, v in values.items() if v})
    draft.rows = s.finish()
    return draft


def _model(s: Settings, caller: Caller) -> str | dict[str, Any] | None:
    name = s.word("base_model", "model") or ""
    if caller.says_model:
        s.assume("model", "given", "your command line says it, whatever base_model says")
        return None
    model = named(name)
    if model is None:
        raise ConfigError(
            "file", s.path, f"names base_model {name}, whose widths are not known here, and nothing is downloaded",
            "Give model.pretrained=FOLDER with its config.json and weights, or a model such as model=qwen3_30b_a3b",
        )  # fmt: skip
    return taken(s, model, "the shipped option with this published name")


def _layout(s: Settings, caller: Caller) -> tuple[dict[str, Any], dict[str, int]]:
    shard = s.whole("dp_shard_size", "mesh.dp_shard, which is what the other sizes leave")
    mesh = {
        "dp_replicate": s.whole("dp_replicate_size", "mesh.dp_replicate") or 1,
        "tp": s.whole("tensor_parallel_size", "mesh.tp") or 1,
        "cp": s.whole("context_parallel_size", "mesh.cp: heads are exchanged here, not keys in a ring") or 1,
    }
    ep = s.whole("expert_parallel_size", "mesh.ep") or 1
    ranks = _ranks(s, caller, (shard or 1) * mesh["dp_replicate"] * mesh["tp"] * mesh["cp"] * ep)
    replicas = ranks[0] * ranks[1] // (mesh["tp"] * mesh["cp"])
    micro = s.whole("micro_batch_size", "workload.micro_batch_size") or 1
    again = s.whole("gradient_accumulation_steps", "workload.global_batch_size: times micro-batch and ranks")
    if again is None:
        again = 1
        s.assume("gradient_accumulation_steps", again, "axolotl's default")
    seq = s.whole("sequence_len", "workload.seq_len")
    if seq is None:
        seq = 512
        s.assume("sequence_len", seq, "axolotl's default")
    s.on("sample_packing", "workload.seq_len: every sequence is full")
    if not s.has("sample_packing"):
        s.assume("sample_packing", "false", "priced as if every sequence were full, which padding makes too much")
    workload: dict[str, Any] = {
        "seq_len": seq, "micro_batch_size": micro, "global_batch_size": micro * again * replicas,
        "precision": _precision(s), "zero": _zero(s),
    }  # fmt: skip
    layout = {"hardware": machine_of(s, caller), "mesh": ranks, "ep": ep, "workload": workload}
    return layout, {name: size for name, size in mesh.items() if size > 1}


def _ranks(s: Settings, caller: Caller, product: int) -> tuple[int, int]:
    if caller.ranks is not None:
        s.assume("mesh", f"{caller.ranks[0]} x {caller.ranks[1]}", "your command line says the ranks")
        if caller.ranks[0] * caller.ranks[1] % product:
            rule = f"sizes of {product} ranks, and your command line says {caller.ranks[0]} x {caller.ranks[1]}"
            raise ConfigError("file", s.path, f"has {rule}", f"Give a multiple of {product} ranks")
        return caller.ranks
    if product == 1:
        fix = "Give mesh.num_nodes=1 mesh.ranks_per_node=8, or a mesh such as mesh=h100_8"
        raise ConfigError("mesh", None, f"{s.path} does not say on how many GPUs it runs", fix)
    if product > _PER_NODE and product % _PER_NODE:
        fix = f"Give mesh.num_nodes and mesh.ranks_per_node for {product} ranks"
        raise ConfigError(
            "mesh", None, f"{s.path} has sizes of {product} ranks, which fill no nodes of {_PER_NODE}", fix
        )
    said = " * ".join(name for name in _SIZES if name in s.found)
    s.assume("mesh", product, f"ranks: {said}")
    return max(1, product // _PER_NODE), min(_PER_NODE, product)


def _precision(s: Settings) -> str:
    keys = ("bf16", "fp16", "bfloat16", "float16")
    for key in keys:
        if not s.has(key):
            s.say(key, "is off", NO_EFFECT)
    on = next((key for key in keys if s.has(key)), None)
    if on is not None:
        s.say(on, "workload.precision=bf16_params" + ("" if on.startswith("b") else ": as many bytes"))
        return "bf16_params"
    if "bf16" not in s.found:
        s.assume("bf16", "auto", "axolotl's default; workload.precision=bf16_params")
        return "bf16_params"
    s.assume("precision", "fp32", "bf16 and fp16 are off")
    return "fp32"


def _zero(s: Settings) -> int:
    """What is sharded: FSDP, or the stage in the name of DeepSpeed's file."""
    deepspeed = s.word("deepspeed", "workload.zero, by the stage in the file's name")
    if deepspeed is not None:
        match = re.search(r"zero_?([123])", deepspeed.lower())
        if match is None:
            raise s.error("deepspeed", "does not say its stage", "Give set.deepspeed=zero3.json, or another stage")
        stage = int(match[1])
        if stage == 2:
            s.assume("workload.zero", 1, "ZeRO 2 shards gradients too; ZeRO 1 is priced, which needs more memory")
        if "offload" in deepspeed or "offload" in s.found["deepspeed"].value:
            s.assume("workload", "no offload", "no equal here: states stay on the GPU, which needs more memory")
        return 3 if stage == 3 else 1
    sharding = s.word("fsdp_config.sharding_strategy", "workload.zero")
    s.word("fsdp", "workload.zero=3")
    if sharding is not None and sharding not in ("FULL_SHARD", "HYBRID_SHARD"):
        s.assume("workload.zero", 3, f"{sharding} is priced as FULL_SHARD")
    if any(key == "fsdp" or key.startswith("fsdp_config.") for key in s.found) or s.has("dp_shard_size"):
        return 3
    s.assume("workload.zero", 3, "neither fsdp nor deepspeed is set: this package shards, where the file's run copies")
    return 3


_OFFLOADED = ("offload", "offload_disk")


def _trainer(s: Settings) -> dict[str, Any]:
    found: dict[str, Any] = {}
    whole = s.word("gradient_checkpointing", "trainer.checkpointing=full")
    if whole in _OFFLOADED:
        s.assume("gradient_checkpointing", whole, "no equal here: inputs of layers stay on the GPU")
    elif whole is not None and whole.lower() not in ON:
        known = ("true", "false", *_OFFLOADED)
        raise s.error("gradient_checkpointing", "is not known", f"Known are {', '.join(known)}")
    within = s.on("fsdp_config.activation_checkpointing", "trainer.checkpointing=full")
    found["checkpointing"] = "full" if within or whole else "none"
    if (steps := s.whole("max_steps", "trainer.max_steps", least=-1)) is not None and steps > 0:
        found["max_steps"] = steps
    return found


def _optimizer(s: Settings) -> dict[str, Any]:
    kind = s.word("optimizer", "optimizer.kind") or "adamw_torch"
    if "8bit" in kind or "4bit" in kind:
        s.assume("optimizer", kind, "no equal here: the optimizer's states have 32 bits, which needs more memory")
    elif not kind.startswith(("adamw", "paged_adamw", "muon")):
        s.assume("optimizer", kind, "no equal here: adamw is planned")
    found: dict[str, Any] = {
        "kind": "muon" if kind.startswith("muon") else "adamw", "lr": s.real("learning_rate", "optimizer.lr"),
        "weight_decay": s.real_or("weight_decay", "optimizer.weight_decay", 0.0, _NAME),
        "eps": s.real("adam_epsilon", "optimizer.eps"),
        "clip_norm": s.real("max_grad_norm", "optimizer.clip_norm"),
    }  # fmt: skip
    first = s.real("adam_beta1", "optimizer.betas")
    second = s.real_or("adam_beta2", "optimizer.betas", 0.999, _NAME)
    found["betas"] = [0.9 if first is None else first, second]
    return {key: value for key, value in found.items() if value is not None}


def _schedule(s: Settings, steps: int | None) -> dict[str, Any]:
    """Warm-up and the final rate. steps: of the run; None: the data say them."""
    style = s.word("lr_scheduler", "optimizer.min_lr_ratio") or "cosine"
    if style in ("constant_with_warmup", "constant"):
        least = 1.0
        s.say("cosine_min_lr_ratio", "the rate is constant", NO_EFFECT)
    else:
        least = s.real_or("cosine_min_lr_ratio", "optimizer.min_lr_ratio", 0.0, _NAME)
    if style not in ("constant_with_warmup", "constant", "cosine"):
        s.assume("lr_scheduler", style, "no equal here: the rate falls by a cosine")
    return {"min_lr_ratio": least} | _warmup(s, steps)


def _warmup(s: Settings, steps: int | None) -> dict[str, int]:
    """Steps; below 1 a share of them; without, 3% of them and at most 100 (axolotl's trainer builder)."""
    given = s.real("warmup_steps", "optimizer.warmup_steps")
    share = s.real("warmup_ratio", "optimizer.warmup_steps: of trainer.max_steps")
    if given is not None and (given >= 1 or given == 0):
        return warmup_of(s, "warmup_steps", int(given), steps)
    share = share if given is None else given
    if steps is None:
        ours = OptimizerConfig().warmup_steps
        what = "3% of the steps, axolotl's default" if share is None else f"{share:g} of the steps"
        s.assume("optimizer.warmup_steps", ours, f"warm-up is {what}, which the data say: give set.max_steps")
        return {}
    if share is None:
        s.assume("warmup_ratio", 0.03, "axolotl's default, and at most 100 steps")
        return {"warmup_steps": min(int(0.03 * steps), 100)}
    return {"warmup_steps": int(share * steps)}


def _adapters(s: Settings) -> dict[str, Any]:
    kind = s.word("adapter", "adapters.kind=lora", {"lora": "", "qlora": ""})
    for key in ("load_in_4bit", "load_in_8bit", "quantize_moe_experts"):
        s.on(key, "QLoRA is not there: weights stay in bf16, which needs more memory", NO_EQUAL)
    if kind is None:
        return {}
    found = {
        "kind": "lora", "rank": s.whole("lora_r", "adapters.rank"), "alpha": s.real("lora_alpha", "adapters.alpha"),
        "dropout": s.real("lora_dropout", "adapters.dropout"),
    }  # fmt: skip
    every = s.on("lora_target_linear", "adapters.dense: all linears")
    modules = (s.word("lora_target_modules", "adapters.dense") or "").split()
    of_experts = s.word("lora_target_parameters", "adapters.experts: all weights of experts")
    values: dict[str, Any] = {key: value for key, value in found.items() if value is not None}
    of_attention = bool(modules) and set(modules) <= _ATTENTION and not every
    values["dense"] = "*.self_attn.?_proj" if of_attention else "*" if modules or every or not of_experts else None
    if modules and not of_attention and not every:
        s.assume("lora_target_modules", len(modules), "adapters.dense is one pattern, so all linears get adapters")
    values["experts"] = "*" if of_experts else None
    if of_experts and values.get("dropout"):
        values["dropout"] = 0.0
        s.assume("lora_dropout", 0, "adapters of experts have none")
    return values


_DATA = (NO_EFFECT, "data and tokenizers are given to a run here (data=sft data.path=...), not to a plan")
_LOGS = (NO_EFFECT, "logs, checkpoints and evaluation")
_STARTS = (NO_EFFECT, "how the program and its kernels are started; the prediction takes the best ones")
FATES: dict[str, tuple[str, str]] = {
    **dict.fromkeys((
        "datasets", "dataset_prepared_path", "val_set_size", "special_tokens", "tokens", "eot_tokens",
        "tokenizer_type", "chat_template", "pad_to_sequence_len", "eval_sample_packing", "train_on_inputs",
        "group_by_length", "num_epochs", "dataset_processes", "shuffle_merged_datasets", "special_tokens.pad_token",
        "special_tokens.eos_token", "special_tokens.bos_token", "tokenizer_config", "excess_length_strategy",
    ), _DATA),
    **dict.fromkeys((
        "output_dir", "logging_steps", "saves_per_epoch", "save_steps", "save_total_limit", "evals_per_epoch",
        "eval_steps", "resume_from_checkpoint", "wandb_project", "wandb_entity", "wandb_watch", "wandb_name",
        "wandb_log_model", "save_first_step", "loss_watchdog_threshold", "loss_watchdog_patience",
        "trackio_project_name", "hub_model_id", "seed", "debug", "strict", "fsdp_config.state_dict_type",
        "eval_table_size", "early_stopping_patience", "save_only_model", "load_best_model_at_end",
    ), _LOGS),
    **dict.fromkeys((
        "model_type", "trust_remote_code", "tf32", "attn_implementation", "flash_attention", "sdp_attention",
        "xformers_attention", "flex_attention", "low_cpu_mem_usage", "use_kernels", "use_scattermoe",
        "experts_implementation", "plugins", "torch_compile", "experimental_skip_move_to_device",
        "gradient_checkpointing_kwargs.use_reentrant", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel",
        "model_quantization_config", "model_quantization_config_kwargs.dequantize",
        "model_config.output_router_logits", "fsdp_version", "fsdp_config.fsdp_version", "fsdp_config.version",
        "fsdp_config.auto_wrap_policy", "fsdp_config.limit_all_gathers", "fsdp_config.transformer_layer_cls_to_wrap",
        "fsdp_config.cpu_ram_efficient_loading", "fsdp_config.sync_module_states", "fsdp_config.use_orig_params",
        "fsdp_config.reshard_after_forward", "fsdp_config.backward_prefetch", "liger_glu_activation", "liger_rms_norm",
        "liger_layer_norm", "liger_rope", "liger_fused_linear_cross_entropy", "is_mistral_derived_model",
        "is_falcon_derived_model", "ddp_timeout", "ddp_find_unused_parameters", "flex_attn_compile_kwargs.dynamic",
        "flex_attn_compile_kwargs.mode", "lora_model_dir",
        "llama4_linearized_experts",
    ), _STARTS),
    "cosine_constant_lr_ratio": (NO_EQUAL, "the rate falls to the last step here"),
    "fsdp_config.offload_params": (NO_EQUAL, "weights stay on the GPU here, which needs more memory"),
    "activation_offloading": (NO_EQUAL, "activations stay on the GPU here, which needs more memory"),
    "unfrozen_parameters": (NO_EQUAL, "adapters or all weights are trained here; all are planned"),
    "lora_modules_to_save": (NO_EQUAL, "adapters alone are trained, and routers with adapters.train_router"),
    "sequence_parallel_degree": (NO_EQUAL, "context_parallel_size is its newer name: give set.context_parallel_size"),
    "rl": (NO_EQUAL, "preference training is not there"),
    "heads_k_stride": (NO_EQUAL, "context parallelism exchanges heads here"),
}  # fmt: skip
"""Keys that nobody reads -> what becomes of them."""
