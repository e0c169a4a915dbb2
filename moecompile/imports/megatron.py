"""Arguments of Megatron-Core: a shell script, YAML with flags (`MODEL_ARGS`), or an experiment of Primus, as a draft of
a recipe.

Algorithm:
  1. Flags with values and lines: of a script (shell.py), of YAML, whose `${NAME}` the caller gives, or of files that
     an experiment names (primus.py).
  2. The model: the type of transformers with the same attention and FFNs, and its widths.            -> `_model`
  3. The layout and the batch; the number of GPUs is what the launcher's flags or variables say.      -> `_layout`
  4. The software: dispatcher, precision, what overlaps, CUDA graphs, recomputation.                  -> `_stack`
  5. The router's losses, the optimizer, the schedule.                                                -> `_training`
  6. What is left follows `FATES`, or is unknown.

Defaults are those of `megatron/training/arguments.py`; where one is used that matters, the report says so.
"""

from __future__ import annotations

import ast
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import accumulate
from math import gcd
from pathlib import Path
from typing import Any

from moecompile.errors import ConfigError
from moecompile.imports.models import shipped, vocabulary
from moecompile.imports.primus import FLAGS, is_primus, of_primus, spelled
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
from moecompile.imports.shell import expanded, read_script
from moecompile.imports.yaml_file import leaves, mapping_of

_NODES = ("NNODES", "NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES", "NODES")
_PER_NODE = ("GPUS_PER_NODE", "NPROC_PER_NODE", "NUM_GPUS", "N_TASKS_PER_NODE")
_NAME = "Megatron-Core"
_RACK = 64  # GPUs of an NVL72 rack that EP groups of published runs use
DISPATCHERS = {"alltoall": "alltoall", "alltoall_seq": "alltoall", "allgather": "allgather", "flex": "deepep"}
BALANCE = {"aux_loss": "micro_batch", "seq_aux_loss": "sequence", "global_aux_loss": "global_batch"}
RECOMPUTED = {
    "moe": "moe", "mlp": "mlp", "mla_up_proj": "mla_up_proj", "layernorm": "layernorm", "moe_act": "moe_act",
}  # fmt: skip
GRAPHED = {
    "attn": "attn", "mamba": "mamba", "mlp": "dense", "moe_router": "router", "moe_preprocess": "preprocess",
    "moe": "experts",
}  # fmt: skip
_MOMENTS = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8}


# -- step 1: the file ------------------------------------------------------------------------------------------------


def read_megatron(path: Path, text: str, caller: Caller) -> Draft:
    """The draft of a file. The caller gives variables, and flags with `_` for `-`.

    Raises:
        ConfigError: it is no such file, or something that is needed has no value or contradicts something else.
    """
    is_yaml = path.suffix in (".yaml", ".yml")
    if is_yaml:
        given = _Asked(caller.names)
        found, variables, asked = _of_yaml(path, text, given), dict(caller.names), given.asked
        launch, unread = dict[str, Setting](), list[tuple[int, str, str]]()
    else:
        script = read_script(text, caller.names, str(path))
        found, variables, launch, unread = script.settings, script.variables, script.launch, script.unread
        asked = set()
    used = asked | {name for name in caller.names if _is_variable(name, text)}
    named = (*found.values(), *_given(caller.names, used).values())
    found = {key: replace(each, key=key) for each in named for key in [FLAGS.get(each.key, each.key)]}
    spells = spelled if any(setting.source for setting in found.values()) else (lambda key: f"--{key}")
    settings = Settings(path=str(path), found=found, fates=FATES, spelled=spells)
    if not settings.has("num-layers") or not settings.has("hidden-size"):
        raise ConfigError(
            "file", path, "has no arguments of Megatron-Core for a model (--num-layers, --hidden-size)",
            "Give the script or the YAML with them; what it includes or calls is not read",
        )  # fmt: skip
    settings.refuse_missing(key for key in found if key in _NEEDED)
    for line, words, why in unread:
        known = [word for word in words.split() if word[2:].replace("_", "-") in _NEEDED]
        if known:
            settings.assume(f"line {line}", " ".join(known), f"not read: {why}")
    model = _model(settings, caller.conf)
    layout = _layout(settings, launch, variables, caller)
    stack = _stack(settings, layout["workload"])
    draft = Draft(name=_name(path), model=model, **layout, stack=stack, values=_training(settings, layout))
    draft.rows = settings.finish()
    return draft


class _Asked(dict[str, str]):
    """Names with values, and which of them were asked for."""

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__(names)
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)


def _is_variable(name: str, text: str) -> bool:
    """Whether a file uses or sets a name, in arithmetic without `$`; in lower case it may be a word of a flag, too."""
    word = rf"\b{re.escape(name)}\b"
    used = rf"\$\{{?[#!]?{word}|{word}=|\(\((?:(?!\)\)).)*{word}"
    return re.search(used if name.islower() else word, text) is not None


def _given(names: Mapping[str, str], used: Collection[str]) -> dict[str, Setting]:
    """Flags of the command line: names in lower case that are no variables of the file, or that must have a value.

    Raises:
        ConfigError: another name is not used.
    """
    found: dict[str, Setting] = {}
    for name, value in names.items():
        key = name.replace("_", "-")
        if name.islower() and (name not in used or key in _KNOWN):
            found[key] = Setting(key=key, value=value, given=name)
        elif name not in (*used, *_NODES, *_PER_NODE):
            raise unknown_name(name, value)
    return found


def _of_yaml(path: Path, text: str, given: Mapping[str, str]) -> dict[str, Setting]:
    """Flags of YAML: those of `MODEL_ARGS`, of an experiment, or of all mappings; `true` is a flag, `false` none."""
    node = mapping_of(path, text)
    if is_primus(node):
        return of_primus(path, node, given)
    arguments = [value for key, value in node.value if key.value == "MODEL_ARGS"]
    found: dict[str, Setting] = {}
    for dotted, value, line in leaves(arguments[0] if arguments else node):
        key = dotted.rpartition(".")[2].lstrip("-").replace("_", "-")
        shown, missing = expanded(value, given)
        found[key] = Setting(key=key, value=shown, line=line, missing=missing)
    return found


def _name(path: Path) -> str:
    """The name of the recipe: that of the file, or of its folder if files of this name are in many folders."""
    stem = path.parent.name if path.stem in ("model_config", "run", "config") and path.parent.name else path.stem
    return re.sub(r"\W+", "_", stem).strip("_").lower() or "imported"


# -- step 2: the model -----------------------------------------------------------------------------------------------


def _model(s: Settings, conf: Path) -> str | dict[str, Any]:
    """The shipped option with these widths, else a model type and its config."""
    if not s.has("num-experts"):
        raise ConfigError(
            "file", s.path, "trains a dense model: it has no --num-experts",
            "Give a file with experts, or plan its model with model.architecture and experts.num_routed",
        )  # fmt: skip
    if s.found.get("swiglu") is None and not s.has("quick-geglu"):
        raise s.error(
            "swiglu", "is not set, and experts without a gate are of no model type here", "Give set.swiglu=true"
        )
    s.on("swiglu", "model.architecture, whose FFNs have a gate")
    family = _family(s)
    config = _widths(s, family)
    _check_experts(s, config)
    same = shipped(conf, family, config)
    vocab = s.whole("vocab-size", "model.config.vocab_size") or _vocabulary(s, same)
    if same is not None and vocab == same[1]["vocab_size"]:
        s.assume("model", same[0], "has these widths; its vocabulary and its positions are taken")
        for key in ("rotary-base", "max-position-embeddings", "norm-epsilon"):
            s.say(key, f"those of model={same[0]}; without effect on size and time", NO_EFFECT)
        return same[0]
    positions = s.whole("max-position-embeddings", "model.config.max_position_embeddings") or 0
    config |= {
        "vocab_size": vocab,
        "max_position_embeddings": max(positions, _needed(s, "seq-length", "workload.seq_len")),
    }
    if (eps := s.real("norm-epsilon", "model.config.rms_norm_eps")) is not None:
        config["rms_norm_eps"] = eps
    if (base := s.real("rotary-base", "model.config.rope_parameters")) is not None:
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": base}
    s.assume("model.architecture", family, "the model type of transformers with these layers")
    return {"architecture": family, "device": "meta", "config": {"dtype": "bfloat16", **config}}


def _family(s: Settings) -> str:
    """The model type: by attention, shared experts and the router's scores."""
    sigmoid = s.has("moe-router-score-function") and s.found["moe-router-score-function"].value == "sigmoid"
    shared = s.has("moe-shared-expert-intermediate-size")
    if s.has("quick-geglu"):
        s.on("quick-geglu", "model.architecture=gpt_oss, whose experts are gated so")
        return "gpt_oss"
    if s.on("multi-latent-attention", "model.architecture with latent attention"):
        return "deepseek_v3" if sigmoid else "deepseek_v2"
    every = all(_pattern(s, _needed(s, "num-layers", "model.config.num_hidden_layers")))
    if sigmoid or (shared and not every and not s.has("moe-shared-expert-gate")):
        return "glm4_moe"
    if shared:
        return "qwen2_moe"
    return "mixtral" if every and not s.has("qk-layernorm") else "qwen3_moe"


def _widths(s: Settings, family: str) -> dict[str, Any]:
    """The config of the model type, but vocabulary and positions; what is left out has its default in transformers."""
    hidden = _needed(s, "hidden-size", "model.config.hidden_size")
    heads = _needed(s, "num-attention-heads", "model.config.num_attention_heads")
    _check_heads(s, hidden, heads)
    layers = _needed(s, "num-layers", "model.config.num_hidden_layers")
    experts = _needed(s, "num-experts", "number of experts in model.config")
    dense = s.whole("ffn-hidden-size", "model.config.intermediate_size")
    if dense is None:
        dense = int(4 * hidden * 2 / 3 / 64) * 64
        s.assume("--ffn-hidden-size", dense, "Megatron-Core's default with --swiglu")
    own = s.whole("moe-ffn-hidden-size", "width of an expert")
    expert = own or dense
    shared = s.whole("moe-shared-expert-intermediate-size", "width of the shared expert", least=0)
    top_k = s.whole("moe-router-topk", "model.config.num_experts_per_tok")
    if top_k is None:
        top_k = 2
        s.assume("--moe-router-topk", top_k, "Megatron-Core's default")
    groups = s.on("group-query-attention", "model.config.num_key_value_heads")
    queries = s.whole("num-query-groups", "model.config.num_key_value_heads")
    pattern = _pattern(s, layers)
    common: dict[str, Any] = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": (queries or 1) if groups else heads, "num_experts_per_tok": top_k,
        "tie_word_embeddings": not s.on("untie-embeddings-and-output-weights", "model.config.tie_word_embeddings"),
    }  # fmt: skip
    if family in ("deepseek_v2", "deepseek_v3", "glm4_moe"):
        return common | _of_deepseek(s, family, (dense, expert, shared, experts, hidden, heads), pattern)
    channels = s.whole("kv-channels", "model.config.head_dim")
    renormalized = not s.on("moe-router-pre-softmax", "model.config.norm_topk_prob")
    if family in ("mixtral", "gpt_oss"):
        s.say("qk-layernorm", "this model type has no norms of queries and keys", NO_EFFECT)
        if not renormalized and family == "mixtral":
            s.assume(
                "--moe-router-pre-softmax", "true", "weights of a token are normalized all the same: no width changes"
            )
        config = common | {"intermediate_size": expert, "num_local_experts": experts}
        if family == "gpt_oss" or channels not in (None, hidden // heads):  # mixtral's default follows its widths
            config["head_dim"] = channels or hidden // heads
        return config
    first = {"mlp_only_layers": [i for i, moe in enumerate(pattern) if not moe]} if not all(pattern) else {}
    config = common | {"intermediate_size": dense, "moe_intermediate_size": expert, "norm_topk_prob": renormalized}
    config |= {"num_experts": experts, **first}
    s.on(
        "qk-layernorm",
        "model.architecture, with norms of queries and keys",
        NO_EQUAL if family == "qwen2_moe" else "taken",
    )
    if family == "qwen2_moe":
        s.on("moe-shared-expert-gate", "model.architecture=qwen2_moe, whose shared expert has a gate")
        s.on("add-qkv-bias", "model.config.qkv_bias")
        heads_of = {} if channels in (None, hidden // heads) else {"head_dim": channels}
        return config | {"shared_expert_intermediate_size": shared, "qkv_bias": s.has("add-qkv-bias"), **heads_of}
    return config | {"head_dim": channels or hidden // heads}


def _check_heads(s: Settings, hidden: int, heads: int) -> None:
    if hidden % heads and not (s.has("kv-channels") or s.has("multi-latent-attention")):
        rule = f"must divide --hidden-size {hidden}, without --kv-channels"
        raise s.error("num-attention-heads", rule, "Correct one of them, or give set.kv_channels=VALUE")
    queries = s.whole("num-query-groups", "model.config.num_key_value_heads")
    if s.has("group-query-attention") and queries and heads % queries:
        raise s.error("num-query-groups", f"must divide --num-attention-heads {heads}", "Correct one of them")


def _of_deepseek(
    s: Settings, family: str, sizes: tuple[int, int, int | None, int, int, int], pattern: list[int]
) -> dict[str, Any]:
    """Widths of model types with dense layers first, groups of experts and, but for glm4_moe, latent attention."""
    dense, expert, shared, experts, hidden, heads = sizes
    first = pattern.index(1) if 1 in pattern else len(pattern)
    if not all(pattern[first:]):
        raise s.error(
            "moe-layer-freq", f"has dense layers between others, and {family} has them first", "Use another layout"
        )
    if shared is not None and shared % expert:
        raise s.error(
            "moe-shared-expert-intermediate-size", f"must be a multiple of an expert's width {expert} in {family}",
            "Correct the file",
        )  # fmt: skip
    groups = s.whole("moe-router-num-groups", "model.config.n_group")
    config: dict[str, Any] = {
        "intermediate_size": dense, "moe_intermediate_size": expert, "n_routed_experts": experts,
        "n_shared_experts": (shared or 0) // expert, "first_k_dense_replace": first, "n_group": groups or 1,
        "topk_group": s.whole("moe-router-group-topk", "model.config.topk_group") or 1,
        "routed_scaling_factor": s.real("moe-router-topk-scaling-factor", "model.config.routed_scaling_factor") or 1.0,
        "norm_topk_prob": family != "deepseek_v2",
    }  # fmt: skip
    s.on("moe-router-pre-softmax", "the scores of this model type are made before the choice")
    s.on("qk-layernorm", "model.architecture, with norms of queries and keys, or of latents")
    if family == "deepseek_v2":
        config["topk_method"] = "group_limited_greedy" if groups else "greedy"
    if family == "glm4_moe":
        channels = s.whole("kv-channels", "model.config.head_dim")
        s.on("add-qkv-bias", "model.config.attention_bias")
        return config | {
            "head_dim": channels or hidden // heads, "use_qk_norm": s.has("qk-layernorm"),
            "attention_bias": s.has("add-qkv-bias"),
        }  # fmt: skip
    s.say("kv-channels", "not read with latent attention, whose widths are below", NO_EFFECT)
    if not s.has("q-lora-rank"):
        s.assume("--q-lora-rank", "none", "queries without a latent, Megatron-Core's default")
    return config | {
        "num_key_value_heads": heads,
        "q_lora_rank": s.whole("q-lora-rank", "model.config.q_lora_rank"),
        "kv_lora_rank": s.whole("kv-lora-rank", "model.config.kv_lora_rank") or 32,
        "qk_nope_head_dim": s.whole("qk-head-dim", "model.config.qk_nope_head_dim") or 128,
        "qk_rope_head_dim": s.whole("qk-pos-emb-head-dim", "model.config.qk_rope_head_dim") or 64,
        "v_head_dim": s.whole("v-head-dim", "model.config.v_head_dim") or 128,
    }  # fmt: skip


def _pattern(s: Settings, layers: int) -> list[int]:
    """1 for each layer with experts, 0 for a dense one: `--moe-layer-freq`, a number or a list as Python writes it."""
    text = s.word("moe-layer-freq", "which layers have experts")
    if text is None:
        return [1] * layers
    try:
        value: int | list[int] = _plain_list(ast.parse(text.strip("'\" "), mode="eval").body)
    except (ValueError, SyntaxError):
        raise s.error("moe-layer-freq", "is no number and no list of 0 and 1", "Correct the file") from None
    if isinstance(value, int):
        if value < 1:
            raise s.error("moe-layer-freq", "must be at least 1", "Correct the file")
        return [int(i % value == 0) for i in range(layers)]
    if len(value) != layers:
        raise s.error(
            "moe-layer-freq", f"is for {len(value)} layers, and --num-layers is {layers}", "Correct one of them"
        )
    return value


def _plain_list(node: ast.expr) -> Any:
    """`([0]*3+[1]*58)`: numbers, lists, + and *."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        return [_plain_list(each) for each in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _plain_list(node.left), _plain_list(node.right)
        if isinstance(left, list) or isinstance(right, list):
            sizes = [each for each in (left, right) if isinstance(each, int)]
            if isinstance(node.op, ast.Mult) and sizes and sizes[0] <= 10_000:
                return left * right
            if isinstance(node.op, ast.Add) and not sizes:
                return left + right
    raise ValueError("no plain list")


def _check_experts(s: Settings, config: Mapping[str, Any]) -> None:
    experts = _needed(s, "num-experts", "number of experts in model.config")
    if config["num_experts_per_tok"] > experts:
        raise s.error("moe-router-topk", f"is more than --num-experts {experts}", "Correct one of them")
    if experts % (config.get("n_group") or 1):
        raise s.error("moe-router-num-groups", f"must divide --num-experts {experts}", "Correct one of them")


def _vocabulary(s: Settings, same: tuple[str, Mapping[str, Any]] | None) -> int:
    tokenizer = " ".join(s.found[key].value for key in ("tokenizer-model", "tokenizer-type") if key in s.found)
    size = vocabulary(tokenizer)
    if size is None and same is not None and "nemotron" not in tokenizer:
        size = int(same[1]["vocab_size"])
        s.assume("vocabulary", size, f"that of model={same[0]}, which has these widths")
        return size
    if size is None:
        raise ConfigError(
            "file", s.path, "does not say the size of the vocabulary: that is in its tokenizer, which is not read",
            "Give set.vocab_size=VALUE",
        )  # fmt: skip
    s.assume("vocabulary", size, "that of the tokenizer, by its name; not padded to --make-vocab-size-divisible-by")
    return size


def _needed(s: Settings, key: str, becomes: str) -> int:
    value = s.whole(key, becomes)
    if value is None:
        raise ConfigError("file", s.path, f"has no --{key}", f"Give set.{key.replace('-', '_')}=VALUE")
    return value


# -- step 3: the layout ----------------------------------------------------------------------------------------------


def _layout(s: Settings, launch: Mapping[str, Setting], variables: Mapping[str, str], caller: Caller) -> dict[str, Any]:
    sizes = {
        name: s.whole(f"{key}-size", f"workload.{name}") or 1
        for name, key in (
            ("tp", "tensor-model-parallel"),
            ("pp", "pipeline-model-parallel"),
            ("cp", "context-parallel"),
        )
    }
    ep = s.whole("expert-model-parallel-size", "mesh.ep") or 1
    etp = s.whole("expert-tensor-parallel-size", "workload.etp")
    if etp is None:
        etp = sizes["tp"]
        if etp > 1:
            s.assume("--expert-tensor-parallel-size", etp, "Megatron-Core's default: that of tensor parallelism")
    sizes |= {"etp": etp, "vpp": _virtual(s, sizes["pp"])}
    s.on("sequence-parallel", "workload.tp: activations are split over it too")
    experts = _needed(s, "num-experts", "number of experts in model.config")
    if experts % ep:
        raise s.error("expert-model-parallel-size", f"must divide --num-experts {experts}", "Correct one of them")
    hardware = machine_of(s, caller)
    mesh = _mesh(s, launch, variables, caller, hardware, sizes | {"ep": ep})
    seq = _needed(s, "seq-length", "workload.seq_len")
    micro = s.whole("micro-batch-size", "workload.micro_batch_size")
    if micro is None:
        micro = 1
        s.assume("--micro-batch-size", micro, "the file does not say")
    workload = {"seq_len": seq, "micro_batch_size": micro, **_precision(s), **sizes}
    workload["global_batch_size"] = _batch(s, mesh, sizes, micro)
    if (further := s.whole("mtp-num-layers", "workload.mtp", least=0)) is not None:
        workload["mtp"] = further
    return {"hardware": hardware, "mesh": mesh, "ep": ep, "workload": workload | {"zero": _zero(s)}}


_UNEVEN_STAGES = (
    "decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers", "account-for-embedding-in-pipeline-split",
    "account-for-loss-in-pipeline-split",
)  # fmt: skip


def _virtual(s: Settings, pp: int) -> int:
    """Virtual stages of a rank, from one of three flags."""
    layers = _needed(s, "num-layers", "model.config.num_hidden_layers")
    per_stage = s.whole("num-layers-per-virtual-pipeline-stage", "workload.vpp")
    stages = s.whole("num-virtual-stages-per-pipeline-rank", "workload.vpp")
    layout = s.word("pipeline-model-parallel-layout", "workload.vpp; which layers a stage has is not kept")
    if layout is not None:
        parts = _stages(layout)
        if not parts or len(parts) % pp:
            raise s.error(
                "pipeline-model-parallel-layout", f"has no whole number of stages on {pp} ranks", "Correct it"
            )
        return len(parts) // pp
    for key in _UNEVEN_STAGES:
        s.say(key, "stages with other numbers of layers: even ones are priced, the fullest counts", NO_EQUAL)
    if stages is not None:
        return max(1, stages)
    if per_stage is None or pp == 1:
        return 1
    whole = layers + sum(s.has(f"account-for-{part}-in-pipeline-split") for part in ("embedding", "loss"))
    if whole % (pp * per_stage):
        raise s.error(
            "num-layers-per-virtual-pipeline-stage", f"must divide the {whole} layers on {pp} stages evenly",
            "Correct one of them",
        )  # fmt: skip
    return whole // (pp * per_stage)


def _stages(layout: str) -> list[str]:
    """The stages of `Et*4|(tttt|)*14tmL`: parts between bars, with `(...)*n` and `x*n` repeated; none if it is none."""
    text, before = layout.partition("#")[0].replace("\\", "").strip("\"' "), ""
    while text != before:
        before = text
        text = re.sub(r"\(([^()]*)\)\*(\d+)", lambda match: match[1] * min(int(match[2]), 1000), text)
        text = re.sub(r"(\w)\*(\d+)", lambda match: match[1] * min(int(match[2]), 1000), text)
    return [] if "(" in text or not text else text.split("|")


def _mesh(
    s: Settings, launch: Mapping[str, Setting], variables: Mapping[str, str], caller: Caller, hardware: str,
    sizes: Mapping[str, int],
) -> tuple[int, int]:  # fmt: skip
    """Nodes and ranks per node."""
    if caller.ranks is not None:
        s.assume("mesh", f"{caller.ranks[0]} x {caller.ranks[1]}", "your command line says the ranks")
        s.say("world-size", "your command line says the ranks", NO_EFFECT)
        _check_world(s, caller.ranks[0] * caller.ranks[1], caller.ranks[1], sizes)
        return caller.ranks
    nodes = _said(s, launch, variables, ("nnodes", "nodes"), _NODES)
    ranks = _said(s, launch, variables, ("nproc-per-node", "gpus-per-node", "gres", "ntasks-per-node"), _PER_NODE)
    world = s.whole("world-size", "the number of ranks")
    if world is None and (nodes is None or ranks is None):
        rule = "does not say on how many GPUs it runs"
        fix = "Give mesh.num_nodes=N mesh.ranks_per_node=8, or a mesh such as mesh=h100_2x8"
        raise ConfigError("mesh", None, f"{s.path} {rule}", fix)
    world = world or int(nodes or 0) * int(ranks or 0)
    per_node = ranks or min(8, world)
    _check_world(s, world, per_node, sizes)
    if hardware.startswith("gb") and world > per_node:  # the nodes of a plan are link domains
        per_rack = _RACK if not world % _RACK else world
        s.assume("mesh.ranks_per_node", per_rack, f"a node is a rack of {hardware}, whose GPUs NVLink connects")
        return world // per_rack, per_rack
    return world // per_node, per_node


def _check_world(s: Settings, world: int, per_node: int, sizes: Mapping[str, int]) -> None:
    model, of_experts = sizes["tp"] * sizes["pp"] * sizes["cp"], sizes["pp"] * sizes["ep"] * sizes["etp"]
    for size, what in ((model, "tp * pp * cp"), (of_experts, "pp * ep * etp")):
        if world % size:
            least = model * of_experts // gcd(model, of_experts)
            raise ConfigError(
                "file", s.path, f"runs on {world} GPUs, which {what} = {size} must divide",
                f"Give mesh.num_nodes={max(1, least // per_node)} mesh.ranks_per_node={per_node}, or another multiple "
                f"of {least} GPUs",
            )  # fmt: skip


def _said(
    s: Settings,
    launch: Mapping[str, Setting],
    variables: Mapping[str, str],
    keys: tuple[str, ...],
    names: tuple[str, ...],
) -> int | None:
    for key in keys:
        count = launch[key].value.rpartition(":")[2] if key in launch else ""  # `gpu:8`
        if count.isdigit():
            what = "mesh.num_nodes" if "nodes" in key else "mesh.ranks_per_node"
            s.take(f"--{key}", launch[key].value, f"{what}: of what launches the ranks", launch[key].line)
            return int(count)
    for name in names:
        if variables.get(name, "").isdigit():
            what = "mesh.num_nodes" if names is _NODES else "mesh.ranks_per_node"
            s.take(name, variables[name], f"{what}: a variable")
            return int(variables[name])
    return None


def _batch(s: Settings, mesh: tuple[int, int], sizes: Mapping[str, int], micro: int) -> int:
    batch = s.whole("global-batch-size", "workload.global_batch_size")
    step = micro * mesh[0] * mesh[1] // (sizes["tp"] * sizes["pp"] * sizes["cp"])
    if batch is None:
        s.assume("--global-batch-size", step, "Megatron-Core's default: a micro-batch on each replica")
        return step
    if batch % step:
        rule = f"must be a multiple of micro-batch * replicas = {step}"
        raise s.error("global-batch-size", rule, "Correct one of them")
    return batch


def _precision(s: Settings) -> dict[str, str]:
    if s.on("bf16", "workload.precision=bf16_params"):
        s.say("fp16", "beside --bf16, which counts here; Megatron-Core refuses both", NO_EQUAL)
        return {"precision": "bf16_params"}
    if s.on("fp16", "workload.precision=bf16_params: as many bytes", "assumed"):
        return {"precision": "bf16_params"}
    s.assume("precision", "fp32", "neither --bf16 nor --fp16 is set")
    return {"precision": "fp32"}


def _zero(s: Settings) -> int:
    strategy = s.word("data-parallel-sharding-strategy", "workload.zero")
    whole = s.on("use-torch-fsdp2", "workload.zero=3") or (
        s.on("use-megatron-fsdp", "workload.zero") and strategy in (None, "optim_grads_params")
    )
    if whole:
        s.say("use-distributed-optimizer", "workload.zero=3 includes it")
        return 3
    if s.on("use-distributed-optimizer", "workload.zero=1"):
        return 1
    s.assume("workload.zero", 0, "without --use-distributed-optimizer nothing is sharded over replicas")
    return 0


# -- step 4: the software --------------------------------------------------------------------------------------------


def _stack(s: Settings, workload: Mapping[str, Any]) -> dict[str, Any]:
    dispatcher = _dispatcher(s)
    share = (
        {"value": 0.82, "source": "conf/stack/nccl.yaml: alltoall over HybridEP (arXiv 2603.07685, table 7)"}
        if dispatcher == "alltoall"
        else {"value": 1.0, "source": "as conf/stack/megatron_2026.yaml"}
    )
    stack: dict[str, Any] = {
        "bits": _bits(s), "dispatcher": dispatcher,
        "overlap": s.on("overlap-moe-expert-parallel-comm", "stack.overlap"),
        "graph": _graph(s), **_recomputed(s, workload), "wire_share": share,
        "comm_units": {"value": 20, "source": "DeepSeek-V3 report, section 3.2.2"},
    }  # fmt: skip
    units = (s.whole(key, "stack.comm_units") for key in ("moe-hybridep-num-sms", "moe-deepep-num-sms"))
    turbo = s.whole("turbo-deepep-num-cu", "stack.comm_units") if _is_turbo(s) else None
    if known_units := next(filter(None, (*units, turbo)), None):
        stack["comm_units"] = {"value": known_units, "source": "the imported file"}
    if s.word("grad-reduce-in-bf16", "stack.grad_bits") or s.word("main-grads-dtype", "stack.grad_bits") == "bf16":
        stack["grad_bits"] = 16
    s.on("use-precision-aware-optimizer", "stack.moment_bits, with the types below")
    moments = [s.word(key, "stack.moment_bits", _MOMENTS) for key in ("exp-avg-dtype", "exp-avg-sq-dtype")]
    if known := [_MOMENTS[each] for each in moments if each]:
        stack["moment_bits"] = max(known) if len(known) == len(moments) else 32
    return stack


def _dispatcher(s: Settings) -> str:
    kind = s.word("moe-token-dispatcher-type", "stack.dispatcher", DISPATCHERS)
    backend = s.word("moe-flex-dispatcher-backend", "stack.dispatcher", {"deepep": "", "hybridep": ""})
    if s.on("moe-enable-deepep", "stack.dispatcher=deepep"):
        return "deepep"
    if _is_turbo(s):
        s.on("use-turbo-deepep", "stack.dispatcher=deepep")
        s.on("enable-primus-turbo", "stack.dispatcher, with use_turbo_deepep")
        return "deepep"
    if kind is None:
        s.assume("--moe-token-dispatcher-type", "allgather", "Megatron-Core's default")
        return "allgather"
    return backend or "deepep" if kind == "flex" else DISPATCHERS[kind]


def _is_turbo(s: Settings) -> bool:
    """Whether Primus exchanges tokens by its own DeepEP."""
    return s.has("enable-primus-turbo") and s.has("use-turbo-deepep")


def _bits(s: Settings) -> int:
    fp4, fp8 = s.word("fp4-format", "stack.bits=4"), s.word("fp8-format", "stack.bits=8")
    if fp8:
        s.say("fp8-recipe", "stack.bits; the scaling of blocks is not priced apart")
    s.say("fp8-recipe", "without --fp8-format nothing is in FP8", NO_EFFECT)
    if fp4 or fp8:
        return 4 if fp4 else 8
    return 16 if s.has("bf16") or s.has("fp16") else 32


def _graph(s: Settings) -> list[str]:
    kind = s.word("cuda-graph-impl", "stack.graph")
    on = s.on("enable-cuda-graph", "stack.graph") or s.on("external-cuda-graph", "stack.graph")
    if kind in (None, "none") and not on:
        s.say("cuda-graph-scope", "no graphs are made", NO_EFFECT)
        return []
    scope = s.word("cuda-graph-scope", "stack.graph")
    words = (scope or "").replace(",", " ").split()
    if "full_iteration" in words or "full" in words:
        return ["all"]
    unknown = [word for word in words if word not in GRAPHED]
    if unknown:
        raise s.error("cuda-graph-scope", f"{unknown[0]} is not known", f"Known are {', '.join(GRAPHED)}")
    if not words:
        s.assume("--cuda-graph-scope", "all", "a graph without a scope")
        return ["all"]
    return [GRAPHED[word] for word in words]


def _recomputed(s: Settings, workload: Mapping[str, Any]) -> dict[str, Any]:
    """What backward computes again, and in which share of the layers."""
    kind = s.word("recompute-granularity", "stack.recompute", {"full": "", "selective": ""})
    modules = s.word("recompute-modules", "stack.recompute; core_attn is what fused attention does anyway")
    if s.on("moe-layer-recompute", "stack.recompute=[moe]"):
        return {"recompute": ["moe"]}
    attention = "stack.recompute=[]: core_attn is what fused attention does anyway"
    if s.on("recompute-activations", attention) and kind is None:
        return {"recompute": []}
    if kind == "full":
        return _whole_layers(s, workload)
    for key in ("recompute-method", "recompute-num-layers", "recompute-layer-ids"):
        s.say(key, "is of --recompute-granularity full", NO_EFFECT)
    words = (modules or "core_attn").replace(",", " ").split() if kind == "selective" else []
    if unknown := [word for word in words if word not in (*RECOMPUTED, "core_attn", "shared_experts")]:
        raise s.error(
            "recompute-modules", f"{unknown[0]} is not known", f"Known are core_attn, {', '.join(RECOMPUTED)}"
        )
    if "shared_experts" in words:
        s.assume("--recompute-modules shared_experts", "none", "the shared expert alone is not computed again here")
    return {"recompute": [RECOMPUTED[word] for word in words if word in RECOMPUTED]}


def _whole_layers(s: Settings, workload: Mapping[str, Any]) -> dict[str, Any]:
    """All layers; with `block` the first ones of each virtual stage; or those that are listed, of which the rank of a
    pipeline that has most sets the pace.
    """
    layers = _needed(s, "num-layers", "model.config.num_hidden_layers")
    if s.has("recompute-layer-ids"):
        share = _most_listed(s, layers, workload)
        s.say("recompute-layer-ids", f"stack.recompute_share={share:.4g}: as the rank that computes most layers again")
        for key in ("recompute-method", "recompute-num-layers"):
            s.say(key, "the layers are listed", NO_EFFECT)
    elif s.word("recompute-method", "which layers", {"uniform": "", "block": ""}) == "block":
        first = s.whole("recompute-num-layers", "stack.recompute_share: of the layers of a virtual stage", least=0)
        if first is None:
            raise s.error("recompute-method", "needs the number of layers", "Give set.recompute_num_layers=N")
        share = min(1.0, first * int(workload["pp"]) * int(workload["vpp"]) / layers)
    else:
        s.say("recompute-num-layers", "how many layers are kept together; all are computed again")
        share = 1.0
    if not 0 < share < 1:
        return {"recompute": ["full"] if share else []}
    return {"recompute": ["full"], "recompute_share": float(f"{share:.4g}")}


def _most_listed(s: Settings, layers: int, workload: Mapping[str, Any]) -> float:
    """Layers that a rank computes again over those of the mean rank, of the rank with the most; by the file's stages,
    or even ones.
    """
    words = re.split(r"[\s,]+", s.found["recompute-layer-ids"].value.strip("[] "))
    if not all(word.isdigit() and int(word) < layers for word in words):
        raise s.error("recompute-layer-ids", f"must be numbers of layers below {layers}", "Correct it")
    ranks = int(workload["pp"])
    stages = ranks * int(workload["vpp"])
    ends = [round(layers * (i + 1) / stages) for i in range(stages)]
    if s.has("pipeline-model-parallel-layout"):
        said = _stages(s.found["pipeline-model-parallel-layout"].value)
        ends = list(accumulate(stage.count("t") for stage in said))
    again = Counter(bisect_right(ends, layer) % ranks for layer in {int(word) for word in words})
    return min(1.0, max(again.values()) * ranks / layers)


# -- step 5: the router and the optimizer ----------------------------------------------------------------------------


def _training(s: Settings, layout: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    values = {"balance": _balance(s), "optimizer": _optimizer(s), "trainer": _steps(s, layout)}
    factor = s.real("moe-expert-capacity-factor", "routing.capacity_factor")
    if factor is not None and factor > 0:
        policy = s.word("moe-token-drop-policy", "routing.drop", {"probs": "", "position": ""})
        values["routing"] = {"capacity_factor": factor, "drop": "position" if policy == "position" else "score"}
    s.say("moe-token-drop-policy", "drops nothing without a capacity", NO_EFFECT)
    steps = values["trainer"].get("max_steps")
    values["optimizer"] |= _warmup(s, int(layout["workload"]["global_batch_size"]), steps)
    return {group: each for group, each in values.items() if each}


def _balance(s: Settings) -> dict[str, Any]:
    kinds = (s.word("moe-router-load-balancing-type", "balance.losses") or "aux_loss").split()
    rates = s.word("moe-aux-loss-coeff", "balance.losses") or "0"
    try:
        coefficients = [float(each) for each in rates.split()]
    except ValueError:
        raise s.error("moe-aux-loss-coeff", "must be a number", "Correct the file") from None
    losses: dict[str, float] = {}
    for kind, value in zip(kinds, coefficients * (len(kinds) if len(coefficients) == 1 else 1), strict=False):
        if kind in BALANCE:
            losses[BALANCE[kind]] = value
        elif kind != "none":
            s.assume("--moe-router-load-balancing-type", kind, "no equal here: the router chooses by its scores alone")
    if (z := s.real("moe-z-loss-coeff", "balance.losses.z")) is not None:
        losses["z"] = z
    s.word("moe-router-score-function", "model.architecture, by the router's scores", {"softmax": "", "sigmoid": ""})
    balance: dict[str, Any] = {"rule": "none", "losses": losses} if losses else {"rule": "none"}
    rate = s.real("moe-router-bias-update-rate", "balance.rate")
    if s.on("moe-router-enable-expert-bias", "balance.rule=bias"):
        balance |= {"rule": "bias", "rate": 1e-3 if rate is None else rate}
    return balance


def _optimizer(s: Settings) -> dict[str, Any]:
    kind = s.word("optimizer", "optimizer.kind", {"adam": "", "sgd": "", "muon": "", "dist_muon": ""})
    if kind == "sgd":
        s.assume("--optimizer", "sgd", "no equal here: adamw is planned")
    found: dict[str, Any] = {
        "kind": "muon" if kind and "muon" in kind else "adamw", "lr": s.real("lr", "optimizer.lr"),
        "min_lr_ratio": _least_rate(s), "eps": s.real("adam-eps", "optimizer.eps"),
        "weight_decay": s.real_or("weight-decay", "optimizer.weight_decay", 0.01, _NAME),
    }  # fmt: skip
    first = s.real("adam-beta1", "optimizer.betas")
    found["betas"] = [0.9 if first is None else first, s.real_or("adam-beta2", "optimizer.betas", 0.999, _NAME)]
    clip = s.real("clip-grad", "optimizer.clip_norm, null for 0")
    found = {key: value for key, value in found.items() if value is not None}
    return found | ({"clip_norm": clip or None} if "clip-grad" in s.found else {})


def _least_rate(s: Settings) -> float | None:
    """The final over the peak learning rate; None: the file has a final one alone."""
    style = s.word("lr-decay-style", "optimizer.min_lr_ratio; decay is by a cosine here")
    if style == "constant":
        s.say("min-lr", "the rate is constant", NO_EFFECT)
        return 1.0
    if style not in (None, "cosine"):
        s.assume("--lr-decay-style", style, "no equal here: the rate falls by a cosine")
    rate, least = s.real("lr", "optimizer.lr"), s.real_or("min-lr", "optimizer.min_lr_ratio", 0.0, _NAME)
    if not least:
        return 0.0
    return float(f"{least / rate:.6g}") if rate else None


def _warmup(s: Settings, batch: int, steps: int | None) -> dict[str, int]:
    """Steps of warm-up, from one of three flags; none without, as in Megatron-Core."""
    iterations = s.whole("lr-warmup-iters", "optimizer.warmup_steps", least=0)
    samples = s.whole("lr-warmup-samples", "optimizer.warmup_steps: over the sequences of a step", least=0)
    fraction = s.real("lr-warmup-fraction", "optimizer.warmup_steps: of trainer.max_steps")
    found = iterations or (samples or 0) // batch or round((fraction or 0.0) * (steps or 0))
    return warmup_of(s, "its warm-up", found, steps)


def _steps(s: Settings, layout: Mapping[str, Any]) -> dict[str, Any]:
    steps = s.whole("train-iters", "trainer.max_steps", least=0)
    samples = s.whole("train-samples", "trainer.max_steps: over the sequences of a step", least=0)
    batch = layout["workload"].get("global_batch_size")
    found: dict[str, Any] = {}
    if steps or (samples and batch):
        found["max_steps"] = steps or max(1, int(samples or 0) // int(batch))
    return found


# -- step 6: what else there is --------------------------------------------------------------------------------------

_LOGS = (NO_EFFECT, "logs, timers and profiles")
_FILES = (NO_EFFECT, "paths, data and checkpoints are given to a run here, not to a plan")
_STARTS = (NO_EFFECT, "how the program and its kernels are started; the prediction takes the best ones")
_EXACT = (NO_EFFECT, "values of weights or positions, which change neither size nor time")
_OVERLAPS = (NO_EFFECT, "gradients and weights are always sent beside compute in the prediction")
FATES: dict[str, tuple[str, str]] = {
    **dict.fromkeys((
        "log-interval", "log-throughput", "log-timers-to-tensorboard", "log-memory-to-tensorboard", "log-params-norm",
        "log-num-zeros-in-grad", "log-validation-ppl-to-tensorboard", "log-progress", "logging-level",
        "timing-log-level", "tensorboard-dir", "tensorboard-queue-size", "tensorboard-log-interval", "wandb-project",
        "wandb-exp-name", "wandb-entity", "wandb-save-dir", "moe-per-layer-logging", "profile", "profile-step-start",
        "profile-step-end", "profile-ranks", "use-pytorch-profiler", "timing-log-option",
        "log-loss-scale-to-tensorboard", "log-world-size-to-tensorboard", "log-avg-skip-iterations",
        "log-avg-reset-interval", "stderr-sink-level", "file-sink-level", "disable-wandb", "disable-tensorboard",
        "disable-mlflow", "mlflow-run-name", "mlflow-experiment-name", "use-rocm-mem-info", "use-rocm-mem-info-iters",
    ), _LOGS),
    **dict.fromkeys((
        "save", "load", "save-interval", "save-retain-interval", "eval-iters", "eval-interval", "exit-interval",
        "exit-duration-in-mins", "no-load-optim", "no-load-rng", "no-save-optim", "no-save-rng", "finetune",
        "ckpt-format", "auto-detect-ckpt-format", "dist-ckpt-strictness", "no-ckpt-fully-parallel-save",
        "ckpt-fully-parallel-load", "async-save", "use-dist-ckpt", "data-path", "train-data-path", "valid-data-path",
        "test-data-path", "data-cache-path", "split", "mock-data", "num-workers", "no-mmap-bin-files",
        "tokenizer-type", "tokenizer-model", "vocab-file", "merge-file", "no-create-attention-mask-in-dataloader",
        "dataloader-type", "reset-position-ids", "reset-attention-mask", "eod-mask-loss", "pretrained-checkpoint",
        "use-checkpoint-args", "no-use-tokenizer-model-from-checkpoint-args", "dist-ckpt-format", "ckpt-convert-save",
        "ckpt-convert-format", "hf-model-ckpt", "per-split-data-args-path", "auto-continue-train",
        "disable-last-saving",
    ), _FILES),
    **dict.fromkeys((
        "use-mcore-models", "transformer-impl", "use-flash-attn", "attention-backend", "use-fused-attn",
        "no-masked-softmax-fusion", "no-rope-fusion", "apply-rope-fusion", "no-bias-swiglu-fusion",
        "no-bias-gelu-fusion", "no-bias-dropout-fusion", "no-gradient-accumulation-fusion",
        "cross-entropy-loss-fusion", "cross-entropy-fusion-impl", "moe-grouped-gemm", "moe-permute-fusion",
        "moe-router-fusion", "moe-use-legacy-grouped-gemm", "manual-gc", "manual-gc-interval",
        "distributed-timeout-minutes", "distributed-backend", "no-check-for-nan-in-loss-and-grad",
        "enable-experimental", "te-rng-tracker", "cuda-graph-warmup-steps", "high-priority-stream-groups",
        "use-cpu-initialization", "no-initialization", "deterministic-mode", "nccl-ub", "exit-on-missing-checkpoint",
        "moe-router-padding-for-fp8", "empty-unused-memory-level", "moe-router-padding-for-quantization",
        "delay-wgrad-compute", "moe-shared-expert-overlap", "disable-gloo-process-groups", "fp8-param-gather",
        "reuse-grad-buf-for-mxfp8-param-ag", "fp8-margin", "fp8-amax-history-len", "fp8-amax-compute-algo",
        "keep-fp8-transpose-cache", "main-params-dtype", "attention-softmax-in-fp32", "rerun-mode",
        "microbatch-group-size-per-virtual-pipeline-stage", "train-sync-interval", "use-tp-pp-dp-mapping",
        "overlap-p2p-communication", "overlap-p2p-communication-warmup-flush", "no-overlap-p2p-communication",
        "is-hybrid-model", "spec", "use-te", "gradient-accumulation-fusion", "bias-swiglu-fusion", "bias-gelu-fusion",
        "bias-dropout-fusion", "masked-softmax-fusion", "overlap-p2p-comm", "enable-primus-turbo",
        "use-turbo-attention", "use-turbo-gemm", "use-turbo-grouped-mlp", "use-turbo-grouped-gemm",
        "use-turbo-rms-norm", "use-turbo-fused-act-with-probs", "use-turbo-deepep", "turbo-deepep-num-cu",
        "turbo-deepep-use-comm-stream", "turbo-sync-free-moe-stage", "moe-use-fused-router-with-aux-score",
        "pp-warmup",
    ), _STARTS),
    **dict.fromkeys((
        "init-method-std", "seed", "rotary-percent", "rotary-seq-len-interpolation-factor", "rotary-scaling-factor",
        "mscale", "mscale-all-dim", "beta-fast", "beta-slow", "original-max-position-embeddings", "use-rope-scaling",
        "rope-type", "use-rotary-position-embeddings", "no-position-embedding", "position-embedding-type",
        "apply-layernorm-1p", "mtp-loss-scaling-factor", "lr-warmup-init", "lr-decay-iters", "lr-decay-samples",
        "lr-wsd-decay-style", "override-opt-param-scheduler", "override-opt_param-scheduler",
        "use-checkpoint-opt_param-scheduler", "moe-router-dtype", "moe-router-force-load-balancing", "normalization",
        "make-vocab-size-divisible-by", "decoupled-lr", "decoupled-min-lr", "initial-loss-scale", "min-loss-scale",
        "loss-scale", "loss-scale-window", "hysteresis", "weight-decay-incr-style", "start-weight-decay",
        "end-weight-decay", "accumulate-allreduce-grads-in-fp32", "rampup-batch-size", "no-weight-decay-cond-type",
        "qk-l2-norm", "no-rope-freq", "rotary-interleaved", "rope-scaling-factor", "disable-bias-linear",
        "num-shared-experts",
    ), _EXACT),
    **dict.fromkeys((
        "overlap-grad-reduce", "overlap-param-gather", "overlap-param-gather-with-optimizer-step", "tp-comm-overlap",
        "ddp-bucket-size", "ddp-num-buckets", "ddp-average-in-collective", "align-grad-reduce", "align-param-gather",
        "tp-comm-overlap-rs", "cp-comm-type", "gradient-reduce-div-fusion",
    ), _OVERLAPS),
    "attention-dropout": (NO_EFFECT, "dropout is not priced"),
    "hidden-dropout": (NO_EFFECT, "dropout is not priced"),
    "moe-pad-expert-input-to-capacity": (NO_EQUAL, "rows are sent as they are, without padding"),
    "moe-input-jitter-eps": (NO_EQUAL, "a model that has a router keeps it; routing.jitter is for routers made here"),
    "moe-use-upcycling": (NO_EQUAL, "the file's model has experts; model=DENSE with experts.* upcycles here"),
    "moe-upcycling-granularity": (NO_EQUAL, "the file's model has experts; experts.granularity upcycles here"),
    "moe-extended-tp": (NO_EQUAL, "workload.etp says how experts are split"),
    "moe-latent-size": (NO_EQUAL, "this model type has experts of the model's width"),
    "optimizer-cpu-offload": (NO_EQUAL, "states stay on the GPU here: it needs more memory than the file's run"),
    "optimizer-offload-fraction": (NO_EQUAL, "states stay on the GPU here"),
    "overlap-cpu-optimizer-d2h-h2d": (NO_EQUAL, "states stay on the GPU here"),
    "offload-optimizer-states": (NO_EQUAL, "states stay on the GPU here: it needs more memory than the file's run"),
    "cpu-offloading": (NO_EQUAL, "activations stay on the GPU here"),
    "cpu-offloading-num-layers": (NO_EQUAL, "activations stay on the GPU here"),
    "fine-grained-activation-offloading": (NO_EQUAL, "activations stay on the GPU here"),
    "offload-modules": (NO_EQUAL, "activations stay on the GPU here"),
    "hierarchical-context-parallel-sizes": (NO_EQUAL, "context parallelism is priced as one ring"),
    "num-distributed-optimizer-instances": (NO_EQUAL, "optimizer states are sharded over all replicas"),
    "window-size": (NO_EQUAL, "windows are those of the model type"),
    "softmax-type": (NO_EQUAL, "attention is that of the model type"),
    "fim-rate": (NO_EQUAL, "the objective is the next token"),
    "add-qkv-bias": (NO_EQUAL, "the model type has no biases there"),
    "add-bias-linear": (NO_EQUAL, "the model type has no biases there"),
    "use-sink-attention": (NO_EQUAL, "attention is that of the model type"),
    "use-turbo-mega-moe": (NO_EQUAL, "exchange and products are priced apart, as without it"),
    "use-rocmoe": (NO_EQUAL, "exchange and products are priced apart, as without it"),
    "patch-zero-bubble": (NO_EQUAL, "the pipeline is priced as 1F1B"),
    "enable-zero-bubble": (NO_EQUAL, "the pipeline is priced as 1F1B"),
    "patch-primus-pipeline": (NO_EQUAL, "the pipeline is priced as 1F1B"),
    "pp-algorithm": (NO_EQUAL, "the pipeline is priced as 1F1B"),
}  # fmt: skip
"""Flags that nobody reads -> what becomes of them."""

_NEEDED = frozenset((
    "num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups", "kv-channels",
    "num-experts", "moe-ffn-hidden-size", "moe-shared-expert-intermediate-size", "moe-router-topk", "moe-layer-freq",
    "q-lora-rank", "kv-lora-rank", "qk-head-dim", "qk-pos-emb-head-dim", "v-head-dim", "vocab-size",
    "max-position-embeddings", "tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size",
    "expert-model-parallel-size", "expert-tensor-parallel-size", "num-layers-per-virtual-pipeline-stage",
    "num-virtual-stages-per-pipeline-rank", "pipeline-model-parallel-layout", "seq-length", "micro-batch-size",
    "global-batch-size", "mtp-num-layers", "moe-token-dispatcher-type", "moe-flex-dispatcher-backend", "fp8-format",
    "fp8-recipe", "fp4-format", "recompute-granularity", "recompute-modules", "recompute-method",
    "recompute-num-layers", "recompute-layer-ids", "moe-expert-capacity-factor",
    "moe-router-num-groups", "moe-router-group-topk", "moe-router-score-function", "moe-router-load-balancing-type",
    "moe-aux-loss-coeff",
))  # fmt: skip
"""Flags that must have a value if the file has them."""
_KNOWN = _NEEDED | {"swiglu", "world-size", "bf16", "group-query-attention", "multi-latent-attention"}
"""Flags that the caller may give."""
