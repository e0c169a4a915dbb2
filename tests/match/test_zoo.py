"""Tiny models of many architectures (../shared/zoo): their FFNs become experts, and the experts of those that are MoE
already become sites.
"""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import moecompile
from moecompile.errors import ConfigError
from moecompile.match.experts import skips_tokens
from moecompile.match.sites import record_model
from moecompile.nn import meters_of
from moecompile.pipeline import compile_with_report
from moecompile.verify import worst
from tests.families import has_identity, needs, needs_identity
from tests.tiny import COPY4, config, max_diff

ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"
if not (ZOO / "tiny_models.py").is_file():
    pytest.skip(f"there is no {ZOO}", allow_module_level=True)
sys.path.insert(0, str(ZOO))
import tiny_models  # noqa: E402

sys.path.remove(str(ZOO))

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's models


def zoo_model(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model that the zoo lists, and its inputs."""
    needs(tiny_models.architectures[name].model_type)
    model, inputs = tiny_models.build(name)
    return model, inputs


DENSE = config(*COPY4, "experts.sites=dense")  # else a model that has experts already is refused
# Models whose FFNs are not all rewritten, and what is said about them.
LEFT = {
    "zamba": "its weight model.layers.1.shared_transf.feed_forward.gate_proj.weight is also used by model.layers.3.",
}


@pytest.mark.parametrize("name", sorted(tiny_models.architectures))
def test_ffns_become_experts_and_the_outputs_stay(name: str) -> None:
    architecture = tiny_models.architectures[name]
    model, inputs = zoo_model(name)
    with torch.no_grad():
        wanted = tiny_models.output_tensors(model(**inputs))
        compiled = compile_with_report(model, DENSE, example=inputs)
        got = tiny_models.output_tensors(compiled.model(**inputs))
    rewritten = {site.fqn for site in compiled.sites if site.status == "rewritten"}
    if name in LEFT:
        assert rewritten == set()
        reasons = [site.reason for site in compiled.sites]
        assert not LEFT[name] or any(reason.startswith(LEFT[name]) for reason in reasons), reasons
    else:
        assert len(rewritten) == architecture.ffn_sites, compiled.sites
    assert all(site.reason for site in compiled.sites if site.status != "rewritten")
    assert len(got) == len(wanted)
    tolerance = 1e-4 if rewritten else 0.0
    assert all(max_diff(a, b) <= tolerance for a, b in zip(got, wanted, strict=True))
    assert compiled.step0.max_abs_diff is None if not rewritten else compiled.step0.max_abs_diff <= 1e-4


def test_gradients_reach_router_and_experts_and_what_lies_below() -> None:
    model, inputs = zoo_model("qwen3")
    compile_with_report(model, DENSE, example=inputs)
    model.train()
    model(**inputs).logits.square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize("name", ["opt", "bert-causal", "bart", "gpt2"])
def test_what_transformers_does_with_a_layer_still_works(name: str) -> None:
    """Inline, split, encoder-decoder, Conv1D: generation with a cache, recorded hidden states, checkpointing."""
    model, inputs = zoo_model(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    before = copy.deepcopy(model)
    compile_with_report(model, DENSE, example=inputs)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    prompt = {"input_ids": inputs["input_ids"]}
    assert torch.equal(model.generate(**prompt, **options), before.generate(**prompt, **options))
    with torch.no_grad():
        got, wanted = (m(**inputs, output_hidden_states=True) for m in (model, before))
    assert wanted.get("hidden_states") or wanted.get("decoder_hidden_states")
    for kind in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
        if wanted.get(kind) is not None:
            assert len(got[kind]) == len(wanted[kind]) > 0
            assert all(max_diff(a, b) <= 1e-4 for a, b in zip(got[kind], wanted[kind], strict=True))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plain, plain_grads = outputs_and_grads(before.train(), inputs)
    outputs, grads = outputs_and_grads(model.train(), inputs)
    assert all(max_diff(a, b) <= 1e-4 for a, b in zip(outputs, plain, strict=True))
    same = {n for n in plain_grads.keys() & grads.keys() if plain_grads[n].abs().max() > 1e-5}
    assert worst({n: grads[n] for n in same}, {n: plain_grads[n] for n in same}) < (1e-4, "")


# -- models that are MoE already -------------------------------------------------------------------------------------


def outputs_and_grads(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Floating-point outputs, and the gradients of their mean squares; zero where a weight has none."""
    model.zero_grad()
    torch.manual_seed(0)
    outputs = tiny_models.output_tensors(model(**inputs))
    sum(output.float().square().mean() for output in outputs).backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return [output.detach() for output in outputs], grads


# Parts of these compute in fp32 whatever they are given, and a product of two types fails.
NOT_IN_FLOAT64 = {"inkling2_text", "inkling2_loop_text"}


def assert_experts_stay_exact(model: nn.Module, inputs: dict[str, Tensor], num_sites: int) -> None:
    """Outputs, gradients and names are those of transformers' eager experts.

    Processors add in different orders, so in fp32 a gradient that is zero but for rounding is another one on each, and
    small gradients are compared in float64.
    """
    in_float64 = model.config.model_type not in NOT_IN_FLOAT64
    if in_float64:
        assert_equal_in_float64(copy.deepcopy(model).double(), inputs)
    reference, names = copy.deepcopy(model), list(model.state_dict())
    compiled = compile_with_report(model, config(), example=inputs)
    assert len(compiled.plan.layers) == num_sites
    assert {layer.experts.init for layer in compiled.plan.layers} == {"existing"}
    assert list(compiled.model.state_dict()) == names
    wanted, wanted_grads = outputs_and_grads(reference, inputs)
    for by_torch in (True, False):  # products by torch, as in the reference, and by our own kernels
        with mock.patch("moecompile.ops.cpu.products._most_rows", lambda dtype: 0) if by_torch else nullcontext():
            got, grads = outputs_and_grads(compiled.model, inputs)
        assert all(max_diff(a, b) <= 1e-5 for a, b in zip(got, wanted, strict=True))
        own_largest = by_torch and not in_float64
        assert differing(grads, wanted_grads, tolerance=1e-4, floor=0.0 if own_largest else 1e-2) == {}
    assert any(grads[f"{layer.site.fqn}.down_proj"].any() for layer in compiled.plan.layers)


def assert_equal_in_float64(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    inputs = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    reference = copy.deepcopy(model)
    compiled = compile_with_report(model, config(), example=inputs)
    (wanted, wanted_grads), (got, grads) = (outputs_and_grads(each, inputs) for each in (reference, compiled.model))
    assert all(max_diff(a, b) <= 1e-6 for a, b in zip(got, wanted, strict=True))
    assert differing(grads, wanted_grads, tolerance=1e-6, floor=1e-9) == {}


def differing(
    grads: dict[str, Tensor], wanted: dict[str, Tensor], *, tolerance: float, floor: float
) -> dict[str, float]:
    """Largest errors of gradients that differ, relative to their largest entry or to `floor` times the largest of all."""
    assert grads.keys() == wanted.keys()
    least = floor * max(float(grad.abs().max()) for grad in wanted.values())
    bounds = {name: tolerance * max(float(grad.abs().max()), least) for name, grad in wanted.items()}
    errors = {name: max_diff(grads[name], grad) for name, grad in wanted.items()}
    return {name: error for name, error in errors.items() if not error <= bounds[name]}


@pytest.mark.parametrize("name", tiny_models.names("moe"))
def test_experts_of_the_zoo(name: str) -> None:
    model, inputs = zoo_model(name)
    assert_experts_stay_exact(model, inputs, tiny_models.architectures[name].experts)


# Language models of transformers with experts behind its interface that the zoo does not list, built by its rules;
# values that those miss. Number of MoE layers of the tiny model.
_K2 = {"num_experts_per_tok": 2}
# Two layers of which the second has experts: limits of one layer, and attention that selects its keys.
_STEP = {
    "text_config": {
        "layer_types": ["sliding_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"],
        "sliding_window": 16, "n_routed_experts": 4, "share_expert_dim": 32, "swiglu_limits": [0.0, 0.05],
    },
}  # fmt: skip
_KOLIBRI = {
    "layer_types": ["sliding_attention", "indexed_attention"], "kv_source_layers": [0, 1], "index_layers": [1],
    "index_num_heads": 2, "index_topk": 4, "index_pool_size": 32, "mlp_only_layers": [0],
    "mlp_only_intermediate_size": 128,
}  # fmt: skip
_DOTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    **_K2,
}
_KDA = {"linear_num_heads": 2, "linear_head_dim": 16}  # its own 32 of 128 take 64 MiB a sequence and product
LANGUAGE_MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "aria_text": (2, {}), "axk1": (1, {}), "axk2": (1, {}), "exaone_moe": (1, {}), "flex_olmo": (2, {}),
    "deepseek_v2": (2, {**_K2, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}),
    "gemma4_text": (2, {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}),
    "dots1": (2, _DOTS), "hunyuan_v1_moe": (2, {"head_dim": 16, "num_experts": 4, "moe_topk": 2}),
    "kolibri1_1": (1, _KOLIBRI), "lfm2_moe": (1, {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "minicpm5_moe": (1, {}), "param2moe": (1, {}), "step3p7": (1, _STEP), "glm4_moe": (1, {}), "glm4_moe_lite": (1, {}), "glm_moe_dsa": (1, {}), "granitemoe_swa": (2, {}),
    "granitemoehybrid": (2, {}), "granitemoeshared": (2, {}), "hy_v3": (1, {}), "inkling2_loop_text": (2, {}),
    "jamba": (1, {}), "kimi_linear": (1, _KDA), "kolibri1": (2, {}), "laguna": (1, {}), "lara_mini": (2, {}),
    "llama4_text": (1, {}), "mellum": (2, {}), "minimax_m2": (2, {}), "minimax_m3_vl_text": (2, {}), "qwen2_moe": (2, {}),
    "qwen3_5_moe_text": (2, {}), "qwen3_next": (2, {}), "sarvam_moe": (1, {}), "zaya": (2, {}),
}  # fmt: skip


def auto_class(model_type: str) -> Any:
    """Of transformers: that of language models, or of those that see, too (Step 3.7)."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as LANGUAGE

    return transformers.AutoModelForCausalLM if model_type in LANGUAGE else transformers.AutoModelForImageTextToText


def language_model(model_type: str, changes: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model by the zoo's rules, and its inputs."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    needs(model_type)
    settings = {**tiny_models._ZOO.overrides.get(model_type, {}), **changes}
    tiny = tiny_models.tiny_config(CONFIG_MAPPING[model_type], {**tiny_models._ZOO.overrides, model_type: settings})
    torch.manual_seed(0)
    model = auto_class(model_type).from_config(tiny).eval()
    tiny_models.randomize(model)
    torch.manual_seed(1)
    return model, tiny_models.example_inputs("text", tiny)


@pytest.mark.parametrize("sites", ["dense", "both"])
def test_experts_in_a_layer_make_no_block_of_it(sites: str) -> None:
    """Gemma 4: its FFN runs beside the experts, and a projection of its per-layer inputs after them."""
    model, inputs = language_model("gemma4_text", LANGUAGE_MODELS["gemma4_text"][1])
    wanted = model(**inputs).logits
    compiled = compile_with_report(model, config(f"experts.sites={sites}", "routing.top_k=2"), example=inputs)
    kinds = ("mlp", "experts") if sites == "both" else ("mlp",)
    assert [layer.site.fqn for layer in compiled.plan.layers] == [
        f"model.layers.{i}.{kind}" for i in range(2) for kind in kinds
    ]
    assert max_diff(compiled.model(**inputs).logits, wanted) <= 1e-4
    assert not any("MoE block" in site.reason for site in compiled.sites)


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_experts_of_more_language_models(model_type: str) -> None:
    num_sites, changes = LANGUAGE_MODELS[model_type]
    assert_experts_stay_exact(*language_model(model_type, changes), num_sites)


def test_tokens_that_a_router_skips_reach_no_expert() -> None:
    """Zaya gives a skipped token expert 0 with weight 0: no row of it is sent, and no load is counted."""
    model, inputs = language_model("zaya", {})
    assert skips_tokens(record_model(model, inputs), "model.layers.0.mlp.experts")
    for layer in model.model.layers:
        layer.mlp.gate.balancing_biases[-1] = 0.0  # as likely as the others
    model = model.double()
    alone = copy.deepcopy(model)
    compile_with_report(model, config(), example=inputs)
    wanted, wanted_grads = outputs_and_grads(alone.train(), inputs)
    skipped = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _module, _args, out: skipped.append(int((out[1] == 0).sum())))
    got, grads = outputs_and_grads(model.train(), inputs)
    assert max(max_diff(a, b) for a, b in zip(got, wanted, strict=True)) <= 1e-12
    assert worst(grads, wanted_grads)[0] <= 1e-9
    num_tokens, loads = inputs["input_ids"].numel(), [int(meter.load.sum()) for _, meter in meters_of(model)]
    assert loads == [num_tokens - number for number in skipped] and 0 < sum(skipped) < num_tokens * len(skipped)


def test_weights_that_are_zero_otherwise_are_assignments() -> None:
    model, inputs = zoo_model("mixtral")
    assert not skips_tokens(record_model(model, inputs), "model.layers.0.mlp.experts")


def looped(passes: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """Inkling2-loop of four layers, of which the two in the middle run so often."""
    kinds = [*["hybrid_sliding"] * 3, "hybrid"]
    loop = {"loop_layer_index_start": 1, "loop_layer_index_end": 3, "loop_num_passes": passes}
    changes = {"num_hidden_layers": 4, "n_layers_per_attn_res_block": 1, "layer_types": kinds, **loop}
    return language_model("inkling2_loop_text", changes)


def test_experts_that_run_more_than_once_are_refused() -> None:
    """Their rows would be planned once."""
    compiled = compile_with_report(looped(1)[0], config(), example=looped(1)[1])
    assert len(compiled.plan.layers) == 4
    model, inputs = looped(3)
    with pytest.raises(ConfigError, match=r"runs model\.layers\.1\.mlp\.experts 3 times in one forward"):
        compile_with_report(model, config(), example=inputs)


# Tiny models that do not generate as they are: caches without an attention layer, ids outside of a hashed vocabulary, a
# config of several modalities without its special tokens.
NO_TEXT = (
    "granitemoehybrid", "inkling2_loop_text", "inkling2_text", "jamba", "kimi_linear", "qwen3_omni_moe_thinker",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*tiny_models.names("moe"), *LANGUAGE_MODELS} - {*NO_TEXT}))
def test_generate_gives_the_same_text(name: str) -> None:
    """20 tokens: greedy with and without the cache, and by beam search."""
    listed = name in tiny_models.architectures
    model, inputs = zoo_model(name) if listed else language_model(name, LANGUAGE_MODELS[name][1])
    ids = inputs["input_ids"][:, :5]
    ways: tuple[dict[str, Any], ...] = ({"use_cache": True}, {"use_cache": False}, {"num_beams": 3})
    fixed = {"attention_mask": torch.ones_like(ids), "min_new_tokens": 20, "max_new_tokens": 20, "do_sample": False}
    wanted = [model.generate(ids, **fixed, **way) for way in ways]
    assert len(set(wanted[0].flatten().tolist())) > 8
    compile_with_report(model, config(), example=inputs)
    for way, text in zip(ways, wanted, strict=True):
        assert torch.equal(model.generate(ids, **fixed, **way), text), way


IN_BF16 = (
    "afmoe", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32", "deepseek_v4", "ernie4_5_moe", "flint", "gpt_oss",
    "hy_v4", "inkling_text", "llama4_text", "mimo_v2_flash", "mixtral", "olmoe", "phimoe", "qwen3_moe", "qwen4_exp", "qwen4_exp_text",
    "solar_open", "unlimited_ocr",
)  # fmt: skip


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))], ids="seed {}".format
)
@pytest.mark.parametrize("name", IN_BF16)
def test_no_router_in_bf16_refuses_by_chance(name: str, seed: int) -> None:
    """Wherever a near tie sends a token: each layer alone is what it was, by far."""
    model, inputs = zoo_model(name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.std())
    model = model.to(torch.bfloat16)
    receipt = compile_with_report(model, config(), example=inputs).step0
    assert receipt.max_abs_diff is not None
    assert receipt.region_part is not None and receipt.region_part < 0.5


def dbrx() -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny DBRX: gate, up and down of all experts are a matrix each, in a child; hidden states are (B, L, D)."""
    from transformers import AutoModelForCausalLM, DbrxConfig

    ffn = {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": None}
    attn = {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}
    tiny = DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=32, vocab_size=64, attn_config=attn, ffn_config=ffn,
        use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny).eval()
    tiny_models.randomize(model)
    return model, {"input_ids": torch.randint(1, 64, (2, 7))}


def test_experts_of_one_matrix_a_projection() -> None:
    model, inputs = dbrx()
    reference, names = copy.deepcopy(model), list(model.state_dict())
    compiled = compile_with_report(model, config(), example=inputs)
    assert [layer.site.num_experts for layer in compiled.plan.layers] == [4, 4]
    assert list(model.state_dict()) == names
    wanted, wanted_grads = outputs_and_grads(reference, inputs)
    got, grads = outputs_and_grads(compiled.model, inputs)
    assert all(max_diff(a, b) <= 1e-5 for a, b in zip(got, wanted, strict=True))
    assert worst(grads, wanted_grads) < (1e-4, "")
    assert all(grads[f"{layer.site.fqn}.mlp.w2"].any() for layer in compiled.plan.layers)


def test_experts_that_are_the_identity_stay_with_their_token() -> None:
    """LongCat-Flash: the rows of `gate_up_proj` behind the experts that have weights are never read, and are cut off.

    Since transformers 5.25 its block computes them, and the experts get such tokens with a weight of 0.
    """
    model, inputs = language_model("longcat_flash", {"zero_expert_num": 3, "n_routed_experts": 4, "moe_topk": 3})
    in_block = not has_identity(model, 4)
    reference = copy.deepcopy(model)
    compiled = compile_with_report(model, config("mesh.ranks_per_node=2", "dispatch.kind=flat"), example=inputs)
    assert {(layer.site.num_experts, layer.site.top_k) for layer in compiled.plan.layers} == {(4, 3)}
    compiled = compile_with_report(copy.deepcopy(reference), config(), example=inputs)
    model = compiled.model
    wanted, wanted_grads = outputs_and_grads(reference, inputs)
    got, grads = outputs_and_grads(model, inputs)
    assert all(max_diff(a, b) <= 1e-5 for a, b in zip(got, wanted, strict=True))
    assert list(grads) == list(wanted_grads)
    for layer in compiled.plan.layers:
        name = f"{layer.site.fqn}.gate_up_proj"
        assert not wanted_grads[name][4:].any()
        wanted_grads[name] = wanted_grads[name][:4]
    assert worst(grads, wanted_grads) < (1e-4, "")
    chosen: list[Tensor] = []
    experts = model.get_submodule(compiled.plan.layers[0].site.fqn)
    experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
    model(**inputs)
    assert (chosen[0] >= 4).any() != in_block and (chosen[0] < 4).any()


@pytest.mark.parametrize(
    ("model_type", "reason"), [("dbrx", "are one matrix per projection"), ("longcat_flash", "have identity experts")]
)
def test_experts_that_cannot_have_adapters_are_refused_by_the_plan(model_type: str, reason: str) -> None:
    changes = {"zero_expert_num": 3, "n_routed_experts": 4, "moe_topk": 3}
    model, inputs = dbrx() if model_type == "dbrx" else language_model(model_type, changes)
    if model_type == "longcat_flash":
        needs_identity(model, 4)
    with pytest.raises(ConfigError, match=rf"^adapters\.experts=\*: the experts of .*{reason}.*adapters\.experts=null"):
        moecompile.make_plan(model, ["adapters=lora"], example=inputs)
    plan = moecompile.make_plan(model, ["adapters=lora", "adapters.experts=null"], example=inputs)
    assert plan.adapters is not None and plan.adapters.linears


@pytest.mark.parametrize(
    ("model_type", "changes", "name"),
    [
        ("jamba", {}, "mamba.dt_proj"),
        ("longcat_flash", {"zero_expert_num": 3, "n_routed_experts": 4, "moe_topk": 3}, "router.classifier"),
    ],
)
def test_a_linear_whose_weight_alone_is_read_gets_no_adapter(
    model_type: str, changes: dict[str, Any], name: str
) -> None:
    """It would not be read, so it would have no gradient."""
    model, inputs = language_model(model_type, changes)
    assert any(path.endswith(name) for path, _ in model.named_modules())
    plan = moecompile.make_plan(model, ["adapters=lora", "adapters.experts=null"], example=inputs)
    assert plan.adapters is not None and plan.adapters.linears
    assert not any(path.endswith(name) for path in plan.adapters.linears)


# Experts that are seen and cannot be rewritten, and why.
REFUSED = {
    "ergo": "its post_expert_norm has weights of its own",  # a row for each expert
    "jetmoe": "it holds stacked weights, but is not called with hidden states",  # each projection is a module
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_other_forms_are_refused_with_the_reason(model_type: str) -> None:
    model, inputs = language_model(model_type, {})
    with pytest.raises(ConfigError, match=rf"^experts\.sites=auto: .*{REFUSED[model_type]}"):
        compile_with_report(model, config(), example=inputs)
    compiled = compile_with_report(model, DENSE, example=inputs)
    reasons = [site.reason for site in compiled.sites if site.kind == "experts"]
    assert reasons and all(reason.startswith(REFUSED[model_type]) for reason in reasons)
