"""A torchtitan config as a draft of a recipe: TOML, or a function of a `config_registry.py`, which is never run.

Algorithm:
  1. Keys `section.key` with values and lines. Of Python: the keyword arguments of `Trainer.Config(...)` that a function
     returns, as far as they are literals; a function that begins with another one's config changes it. -> `_of_python`
  2. The model: its name and flavor.                                                                      -> `_model`
  3. The layout: FSDP over what the other sizes leave of the ranks, which the caller says unless the file does.
                                                                                                          -> `_layout`
  4. The software: this package's own, unless the file asks for float8, DeepEP or a pipeline.             -> `_stack`
  5. Optimizer and schedule; what is left follows `FATES`, or is unknown.

Defaults are those of `torchtitan/config`; where one is used that matters, the report says so.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moecompile.errors import ConfigError
from moecompile.imports.models import named, taken
from moecompile.imports.settings import (
    NO_EFFECT,
    NO_EQUAL,
    Caller,
    Draft,
    Setting,
    Settings,
    machine_of,
    unknown_name,
    warmup_of,
)
from moecompile.schema import OptimizerConfig

_FLAVORS = {
    ("deepseek_v3", "16b"): "deepseek-v2-lite", ("deepseek_v3", "236b"): "deepseek-v2",
    ("deepseek_v3", "671b"): "deepseek-v3", ("qwen3", "30b-a3b"): "qwen3-30b-a3b",
    ("qwen3", "235b-a22b"): "qwen3-235b-a22b", ("gpt_oss", "20b"): "gpt-oss-20b", ("gpt_oss", "120b"): "gpt-oss-120b",
    ("llama4", "17bx16e"): "llama-4-scout-17b-16e", ("llama4", "17bx128e"): "llama-4-maverick-17b-128e",
}  # fmt: skip
"""Name and flavor of a model, in lower case -> its published name."""
_RECOMPUTED = {"none": "none", "full": "full", "selective": "auto", "fullac": "full", "selectiveac": "auto"}
_BACKENDS = {"standard": "alltoall", "deepep": "deepep", "hybridep": "hybridep"}
_LONG_SECTIONS = ("activation_checkpoint", "lr_scheduler")
_PER_NODE = 8
_NAME = "torchtitan"


def read_torchtitan(path: Path, text: str, caller: Caller) -> Draft:
    """The draft of a file. The caller gives `config`, the name of a function of Python, and keys with `_` for `.`.

    Raises:
        ConfigError: it is no such file, its model is not known, or something contradicts something else.
    """
    found = _of_toml(path, text) if path.suffix == ".toml" else _of_python(path, text, caller.names.get("config"))
    for name, value in caller.names.items():
        section = next((each for each in _LONG_SECTIONS if name.startswith(f"{each}_")), name.partition("_")[0])
        key = f"{section}.{name.removeprefix(section)[1:]}"
        if name != "config":
            found[key] = Setting(key=key, value=value, given=name)
        elif path.suffix == ".toml":
            raise unknown_name(name, value)
    s = Settings(path=str(path), found=found, fates=FATES)
    if not any(key.startswith("training.") for key in found):
        fix = "Give a job config of torchtitan, or a config_registry.py"
        raise ConfigError("file", path, "is no config of torchtitan: it has no settings of training", fix)
    model = _model(s, caller)
    layout = _layout(s, caller)
    stack, values = _stack(s, layout)
    trainer = _trainer(s)
    values |= {"optimizer": _optimizer(s) | _schedule(s, trainer["max_steps"]), "trainer": trainer}
    name = caller.names.get("config", path.stem)
    draft = Draft(name=re.sub(r"\W+", "_", name).lower(), model=model, **layout, stack=stack, values=values)
    draft.rows = s.finish()
    return draft


# -- step 1: the file ------------------------------------------------------------------------------------------------


def _of_toml(path: Path, text: str) -> dict[str, Setting]:
    try:
        body = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("file", path, f"is not valid TOML: {error}", "Correct it") from None
    lines = dict(_lines(text))
    return {key: Setting(key=key, value=value, line=lines.get(key)) for key, value in _leaves(body)}


def _leaves(body: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in body.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _text(value)


def _lines(text: str) -> Iterator[tuple[str, int]]:
    """Where each key is: the standard library's TOML does not say."""
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*\[([\w.-]+)\]", line):
            section = f"{match[1]}."
        elif match := re.match(r"\s*([\w.-]+)\s*=", line):
            yield section + match[1], number


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(_text(each) for each in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _of_python(path: Path, text: str, function: str | None) -> dict[str, Setting]:
    try:
        functions = {each.name: each for each in ast.parse(text).body if isinstance(each, ast.FunctionDef)}
    except SyntaxError as error:
        raise ConfigError(
            "file", path, f"is not valid Python: {error.msg}, line {error.lineno}", "Correct it"
        ) from None
    known = [name for name in functions if not name.startswith("_")]
    if function not in functions:
        rule = "has several configs" if function is None else f"has no config {function}"
        raise ConfigError("file", path, rule, f"Give set.config=NAME, one of {', '.join(known)}")
    found = _of_function(path, functions, function, ())
    found.setdefault("model.name", Setting(key="model.name", value=path.resolve().parent.name))
    return found


def _of_function(
    path: Path, functions: Mapping[str, ast.FunctionDef], name: str, callers: tuple[str, ...]
) -> dict[str, Setting]:
    """The settings of a config function: what it returns, with what it assigns before."""
    if name in callers or name not in functions:
        raise ConfigError(
            "file", path, f"{name} is no function with a config of its own", "Give another set.config=NAME"
        )
    found: dict[str, Setting] = {}
    specs: dict[str, ast.Call] = {}
    for node in functions[name].body:
        value = getattr(node, "value", None)
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(value, ast.Call) and _name(value.func) in functions and isinstance(node, ast.Assign | ast.Return):
            found |= _of_function(path, functions, _name(value.func), (*callers, name))
        elif isinstance(target, ast.Name) and isinstance(value, ast.Call):
            specs[target.id] = value
        elif isinstance(target, ast.Attribute) and value is not None:
            found |= _of_value(ast.unparse(target).partition(".")[2], value, specs)
        elif isinstance(node, ast.Return) and isinstance(value, ast.Call):
            for keyword in value.keywords:
                found |= _of_value(str(keyword.arg), keyword.value, specs)
        elif isinstance(node, ast.Expr) and isinstance(value, ast.Call):
            key = f"line {node.lineno}: {_name(value.func)}"
            found[key] = Setting(key=key, value="a call", line=node.lineno)
    return found


def _of_value(key: str, node: ast.expr, specs: Mapping[str, ast.Call]) -> dict[str, Setting]:
    """The settings within a value: the keyword arguments of a call, or a literal."""
    if isinstance(node, ast.Name) and node.id in specs:
        node = specs[node.id]
    if key == "model_spec" and isinstance(node, ast.Call) and node.args:
        found = {"model.flavor": Setting(key="model.flavor", value=_text(_literal(node.args[0])), line=node.lineno)}
        return found | _of_keywords("model", node)
    if isinstance(node, ast.Call):
        kind = _name(node.func).partition(".")[0]
        found = _of_keywords(key, node)
        return found | {f"{key}.kind": Setting(key=f"{key}.kind", value=kind, line=node.lineno)}
    return {key: Setting(key=key, value=_text(_literal(node)), line=node.lineno)}


def _of_keywords(key: str, call: ast.Call) -> dict[str, Setting]:
    found = {}
    for each in call.keywords:
        name = f"{key}.{each.arg}"
        found[name] = Setting(key=name, value=_text(_literal(each.value)), line=each.value.lineno)
    return found


def _literal(node: ast.expr) -> Any:
    """A literal, or the code of what is none; calls in a list by their names."""
    if isinstance(node, ast.List):
        return [_name(each.func) if isinstance(each, ast.Call) else _literal(each) for each in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _name(node: ast.expr) -> str:
    return ast.unparse(node)


# -- step 2: the model -----------------------------------------------------------------------------------------------


def _model(s: Settings, caller: Caller) -> str | dict[str, Any] | None:
    name, flavor = s.word("model.name", "model") or "", s.word("model.flavor", "model") or ""
    if caller.says_model:
        s.assume("model", "given", "your command line says it, whatever the file says")
        return None
    model = named(_FLAVORS.get((name.lower(), flavor.lower()), ""))
    if model is None:
        known = ", ".join(f"{each} {size}" for each, size in _FLAVORS)
        raise ConfigError(
            "file", s.path, f"has the model {name} {flavor}, whose widths are not known here (known: {known})",
            "Give a model such as model=qwen3_30b_a3b, or model.architecture with model.config",
        )  # fmt: skip
    return taken(s, model, "the shipped option of this model and flavor")


# -- step 3: the layout ----------------------------------------------------------------------------------------------


def _layout(s: Settings, caller: Caller) -> dict[str, Any]:
    tp = s.whole("parallelism.tensor_parallel_degree", "workload.tp") or 1
    cp = s.whole("parallelism.context_parallel_degree", "workload.cp") or 1
    pp = s.whole("parallelism.pipeline_parallel_degree", "workload.pp") or 1
    ep = s.whole("parallelism.expert_parallel_degree", "mesh.ep") or 1
    etp = s.whole("parallelism.expert_tensor_parallel_degree", "workload.etp") or 1
    if ep == 1 and tp > 1:
        etp = tp
        s.assume("workload.etp", etp, "without expert parallelism, tensor parallelism cuts experts too")
    replicas = s.whole("parallelism.data_parallel_replicate_degree", "mesh.dp_replicate") or 1
    shard = s.whole(
        "parallelism.data_parallel_shard_degree", "mesh.dp_shard: -1 is what the other sizes leave", least=-1
    )
    ranks = _ranks(s, caller, tp * cp * pp * replicas, shard or -1)
    if (ranks[0] * ranks[1]) % (pp * ep * etp):
        raise s.error(
            "parallelism.expert_parallel_degree", f"must divide the {ranks[0] * ranks[1]} ranks", "Give other ranks"
        )
    local = s.whole("training.local_batch_size", "workload.micro_batch_size")
    local = local or s.whole("training.batch_size", "workload.micro_batch_size")
    if local is None:
        local = 8
        s.assume("training.local_batch_size", local, "torchtitan's default")
    batch = s.whole(
        "training.global_batch_size", "workload.global_batch_size: -1 is one micro-batch a replica", least=-1
    )
    data = ranks[0] * ranks[1] // (tp * cp * pp)
    seq = s.whole("training.seq_len", "workload.seq_len")
    if seq is None:
        seq = 2048
        s.assume("training.seq_len", seq, "torchtitan's default")
    workload: dict[str, Any] = {
        "seq_len": seq, "micro_batch_size": local, "precision": "bf16_params", "zero": 3,
        "global_batch_size": batch if batch and batch > 0 else local * data, "tp": tp, "cp": cp, "pp": pp, "etp": etp,
    }  # fmt: skip
    s.assume("precision", "bf16_params", "FSDP's mixed precision, torchtitan's default")
    if pp > 1:
        workload |= _pipeline(s, local)
    else:
        for key in ("schedule", "microbatch_size", "microbatches", "layers_per_stage"):
            s.say(f"parallelism.pipeline_parallel_{key}", "without a pipeline", NO_EFFECT)
    mesh = {"hardware": machine_of(s, caller), "mesh": ranks, "ep": ep, "workload": workload}
    return mesh | ({"values": {"mesh": {"dp_replicate": replicas}}} if replicas > 1 else {})


def _ranks(s: Settings, caller: Caller, others: int, shard: int) -> tuple[int, int]:
    if caller.ranks is not None:
        s.assume("mesh", f"{caller.ranks[0]} x {caller.ranks[1]}", "your command line says the ranks")
        world = caller.ranks[0] * caller.ranks[1]
        if world % others or (shard > 0 and world != others * shard):
            rule = f"has sizes of {others * max(1, shard)} ranks, and your command line says {world}"
            raise ConfigError("file", s.path, rule, f"Give a multiple of {others} ranks")
        return caller.ranks
    if shard < 1:
        fix = "Give mesh.num_nodes=N mesh.ranks_per_node=8, or a mesh such as mesh=h100_2x8"
        raise ConfigError("mesh", None, f"{s.path} does not say on how many GPUs it runs", fix)
    world = others * shard
    s.assume("mesh", world, "ranks: the product of the file's sizes")
    return max(1, world // _PER_NODE), min(_PER_NODE, world)


def _pipeline(s: Settings, local: int) -> dict[str, int]:
    schedule = s.word("parallelism.pipeline_parallel_schedule", "workload.vpp")
    micro = s.whole("parallelism.pipeline_parallel_microbatch_size", "workload.micro_batch_size")
    parts = s.whole("parallelism.pipeline_parallel_microbatches", "workload.micro_batch_size")
    s.say("parallelism.pipeline_parallel_layers_per_stage", "stages of even size are priced", NO_EQUAL)
    if micro is None and parts is None:
        s.assume("parallelism.pipeline_parallel_microbatch_size", 1, "torchtitan's default")
    stages = 2 if schedule is not None and "interleaved" in schedule.lower() else 1
    if stages > 1:
        s.assume("workload.vpp", stages, "torchtitan's default for this schedule")
    return {"micro_batch_size": micro or max(1, local // parts if parts else 1), "vpp": stages}


# -- steps 4 and 5 ---------------------------------------------------------------------------------------------------


def _stack(s: Settings, layout: dict[str, Any]) -> tuple[str | dict[str, Any], dict[str, Any]]:
    values = layout.pop("values", {})
    backend = s.word("model.moe_comm_backend", "stack.dispatcher")
    backend = backend or s.word("parallelism.expert_parallel_comm_backend", "stack.dispatcher")
    if backend is not None and backend not in _BACKENDS:
        s.assume("model.moe_comm_backend", backend, "no equal here: a plain all-to-all is priced")
    converters = (s.word("model.converters", "stack.bits") or "").lower()
    eight = "float8" in converters or "mxfp8" in converters
    dispatcher = _BACKENDS.get(backend or "standard", "alltoall")
    if not eight and dispatcher == "alltoall" and layout["workload"]["pp"] == 1:
        return "runtime", values | ({"dispatch": {"kind": "flat"}} if layout["ep"] > 1 else {})
    share = (
        {"value": 0.82, "source": "conf/stack/nccl.yaml"}
        if dispatcher == "alltoall"
        else {"value": 1.0, "source": "its own"}
    )
    return {"bits": 8 if eight else 16, "dispatcher": dispatcher, "wire_share": share}, values


def _optimizer(s: Settings) -> dict[str, Any]:
    kind = (s.word("optimizer.name", "optimizer.kind") or "adamw").lower()
    if kind not in ("adamw", "muon"):
        s.assume("optimizer.name", kind, "no equal here: adamw is planned")
    found = {
        "kind": "muon" if kind == "muon" else "adamw", "lr": s.real_or("optimizer.lr", "optimizer.lr", 8e-4, _NAME),
        "eps": s.real("optimizer.eps", "optimizer.eps"),
        "weight_decay": s.real("optimizer.weight_decay", "optimizer.weight_decay"),
        "clip_norm": s.real("training.max_norm", "optimizer.clip_norm"), "betas": _betas(s),
    }  # fmt: skip
    return {key: value for key, value in found.items() if value is not None}


def _betas(s: Settings) -> list[float] | None:
    """From `betas`, or from the older `beta1` and `beta2`; None: torchtitan's default, which is ours."""
    both = s.word("optimizer.betas", "optimizer.betas")
    if both is not None:
        try:
            first, second = map(float, both.strip("()").replace(",", " ").split())
        except ValueError:
            raise s.error("optimizer.betas", "must be two numbers", "Correct the file") from None
        return [first, second]
    older = [s.real(f"optimizer.beta{i}", "optimizer.betas") for i in (1, 2)]
    if older == [None, None]:
        return None
    return [default if beta is None else beta for beta, default in zip(older, OptimizerConfig().betas, strict=True)]


def _schedule(s: Settings, steps: int) -> dict[str, Any]:
    """Warm-up and the final rate, by torchtitan's defaults."""
    warmup = s.whole("lr_scheduler.warmup_steps", "optimizer.warmup_steps", least=0)
    if warmup is None:
        warmup = 200
        s.assume("lr_scheduler.warmup_steps", warmup, "torchtitan's default")
    style = s.word("lr_scheduler.decay_type", "optimizer; decay is by a cosine here")
    if style != "cosine":
        s.assume("lr_scheduler.decay_type", style or "linear", "no equal here: the rate falls by a cosine")
    older = s.real("lr_scheduler.lr_min", "optimizer.min_lr_ratio")
    newer = "lr_scheduler.min_lr_factor"
    least = older if older is not None else s.real_or(newer, "optimizer.min_lr_ratio", 0.0, _NAME)
    return {"min_lr_ratio": least} | warmup_of(s, "lr_scheduler.warmup_steps", warmup, steps)


def _trainer(s: Settings) -> dict[str, Any]:
    kinds = ("activation_checkpoint.mode", "activation_checkpoint.kind", "activation_checkpoint")
    key = next((each for each in kinds if each in s.found), kinds[0])
    mode = s.word(key, "trainer.checkpointing") or "none"
    if key not in s.found:
        mode = "selective"
        s.assume(key, mode, "torchtitan's default")
    if mode.lower() not in _RECOMPUTED:
        raise s.error(key, "is not known", "Known are none, selective and full")
    checkpointing = _RECOMPUTED[mode.lower()]
    if checkpointing == "auto":
        s.assume("activation_checkpoint", mode, "no equal here: trainer.checkpointing=auto recomputes whole layers")
    steps = s.whole("training.steps", "trainer.max_steps")
    if steps is None:
        steps = 10_000
        s.assume("training.steps", steps, "torchtitan's default")
    return {"checkpointing": checkpointing, "max_steps": steps}


_LOGS = (NO_EFFECT, "logs, profiles, checkpoints and validation")
_FILES = (NO_EFFECT, "data and tokenizers are given to a run here, not to a plan")
_STARTS = (NO_EFFECT, "how the program and its kernels are started; the prediction takes the best ones")
FATES: dict[str, tuple[str, str]] = {
    **dict.fromkeys((
        "job.dump_folder", "job.description", "job.print_args", "job.config_file", "profiling.enable_profiling",
        "profiling.save_traces_folder", "profiling.profile_freq", "profiling.enable_memory_snapshot",
        "profiling.save_memory_snapshot_folder", "metrics.log_freq", "metrics.disable_color_printing",
        "metrics.enable_tensorboard", "metrics.save_tb_folder", "metrics.enable_wandb", "metrics.kind",
        "checkpoint.enable", "checkpoint.enable_checkpoint", "checkpoint.folder", "checkpoint.interval",
        "checkpoint.last_save_model_only", "checkpoint.last_save_model_weights_only", "checkpoint.model_weights_only",
        "checkpoint.export_dtype", "checkpoint.async_mode", "checkpoint.initial_load_in_hf",
        "checkpoint.initial_load_dequantize", "checkpoint.initial_load_path", "checkpoint.kind",
        "checkpoint.keep_latest_k", "validation.enable", "validation.dataset", "validation.freq", "validation.steps",
        "validator.kind", "validator.freq", "validator.steps", "validator.dataloader",
    ), _LOGS),
    **dict.fromkeys((
        "model.tokenizer_path", "model.hf_assets_path", "hf_assets_path", "training.dataset", "training.dataset_path",
        "dataloader.kind", "dataloader.dataset", "tokenizer", "training.seed",
    ), _FILES),
    **dict.fromkeys((
        "training.compile", "training.disable_cuda_graphs", "training.kind", "training.gc_freq", "compile.enable",
        "compile.components", "compile.kind", "loss.kind", "loss.loss_fn", "loss.global_vocab_size", "optimizer.kind",
        "optimizer.implementation", "lr_scheduler.kind", "parallelism.kind",
        "parallelism.enable_async_tensor_parallel", "parallelism.fsdp_reshard_after_forward",
        "parallelism.enable_sequence_parallel", "model.attn_backend", "activation_checkpoint.selective_ac_option",
        "comm.init_timeout_seconds", "activation_checkpoint.kind", "activation_checkpoint",
        "float8.enable_fsdp_float8_all_gather", "float8.filter_fqns",
        "float8.precompute_float8_dynamic_scale_for_fsdp", "float8.moe_fqns",
        "quantize.dense.float8.enable_fsdp_float8_all_gather",
        "quantize.dense.float8.precompute_float8_dynamic_scale_for_fsdp", "quantize.dense.float8.filter_fqns",
        "quantize.moe.float8.fqns", "quantize.linear.float8.enable_fsdp_float8_all_gather",
        "quantize.linear.float8.filter_fqns", "quantize.grouped_mm.float8.fqns",
        "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp",
    ), _STARTS),
    "lr_scheduler.total_steps": (NO_EQUAL, "the rate falls to the last step here"),
    "lr_scheduler.decay_ratio": (NO_EQUAL, "the rate falls from the end of the warm-up on"),
    "training.enable_cpu_offload": (NO_EQUAL, "weights stay on the GPU here, which needs more memory"),
    "model.non_blocking_capacity_factor": (NO_EQUAL, "buffers have the size of the rows that arrive"),
    "model.num_mtp_layers": (NO_EQUAL, "give workload.mtp"),
}  # fmt: skip
"""Keys that nobody reads -> what becomes of them."""
