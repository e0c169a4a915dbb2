"""Which causal language models of the installed transformers are rewritten, and whether they stay the same function.

    python benchmarks/architectures.py                      # every architecture: about ten minutes on one core
    python benchmarks/architectures.py llama bert opt       # some, printed alone

Each model is built tiny by the rules of ../shared/zoo (2 layers, hidden size 64, random weights; without that folder
the program says so and ends), its dense FFNs become 4 copied experts with top-2, and it is compared with itself before:

* outputs in evaluation mode, and in training mode with every dropout at 0 (largest difference);
* gradients of every parameter that is no part of an FFN, relative to the largest entry of each;
* tokens that `generate` gives with a cache of keys and values.

Writes benchmarks/results/architectures.json and .csv and docs/assets/architectures.md, the table of the documentation.
Exits with 1 if fewer than 171 are rewritten, or one of them is not the same.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import logging
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moecompile.compose import compose_config
from moecompile.errors import MoecompileError
from moecompile.pipeline import Compilation, compile_with_report
from moecompile.plan import FFNSite
from moecompile.verify import worst

REPOSITORY = Path(__file__).parents[1]
ZOO = REPOSITORY.parent / "shared" / "zoo"
RESULTS = Path(__file__).with_name("results") / "architectures"
TABLE = REPOSITORY / "docs" / "assets" / "architectures.md"
LEAST, MOST_DIFFERENCE, MOST_GRADIENT = 171, 1e-4, 1e-4
NOISE = 1e-6  # gradients below this part of the largest one are no more than rounding
OVERRIDES = ("experts.sites=dense", "experts.num_routed=4", "routing.top_k=2")

# What the zoo's rules get wrong in architectures that it does not list.
_DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse"]}  # as published; two layers are too few for their defaults
_K2 = {"num_experts_per_tok": 2}
EXTRA: dict[str, dict[str, Any]] = {
    "blt": {
        "patcher_config": {
            "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128,
        },
        "encoder_hash_byte_group_vocab": 128, "cross_attn_k": 1,
    },
    "cohere2_moe": _DENSE_FIRST,
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}, "d_model": 64, "n_heads": 4,
        "n_layers": 2,
    },
    "deepseek_v2": {**_K2, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"},
    "dots1": {
        "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32, **_K2,
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": [128, 128], "activation_sparsity_pattern": [0.0, 0.0],
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "inkling_text": _DENSE_FIRST,
    "inkling2_loop_text": _DENSE_FIRST,
    "inkling2_text": _DENSE_FIRST,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "reformer": {
        "is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 2], "hash_seed": 0,
        "attn_layers": ["local", "local"], "local_attn_chunk_length": 4, "feed_forward_size": 128,
    },
}  # fmt: skip


@dataclass
class Row:
    """One architecture. sites: form -> number of FFNs found; left: reason -> number of what looks like one. named: the
    pattern by which shared experts are rewritten, in models that have no other dense FFNs.

    difference_eval, difference_train: of the outputs; gradient: relative; generates: whether the tokens are the same,
    None where the model before does not generate. precision: in which the figures were taken.
    """

    name: str
    status: str = ""
    sites: dict[str, int] = field(default_factory=dict)
    rewritten: int = 0
    left: dict[str, int] = field(default_factory=dict)
    named: str = ""
    difference_eval: float | None = None
    difference_train: float | None = None
    gradient: float | None = None
    worst_gradient: str = ""
    generates: bool | None = None
    precision: str = "float32"
    seconds: float = 0.0


def build(name: str, zoo: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny causal language model in evaluation mode, and the inputs of one forward."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    made = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    declared = getattr(made, "config_class", None)
    overrides = {**zoo._ZOO.overrides}
    overrides[name] = {**overrides.get(name, {}), **EXTRA.get(name, {})}
    config = zoo.tiny_config(declared if isinstance(declared, type) else CONFIG_MAPPING[name], overrides)
    torch.manual_seed(0)
    model = made(config).eval()
    zoo.randomize(model)
    torch.manual_seed(1)
    return model, zoo.example_inputs("codebooks" if hasattr(config, "num_codebooks") else "text", config)


def examine(name: str, zoo: Any) -> Row:
    """Builds, rewrites and compares one architecture."""
    row, start = Row(name), time.perf_counter()
    try:
        model, inputs = build(name, zoo)
        with torch.no_grad():
            zoo.output_tensors(model(**inputs))
    except Exception as error:  # whatever other people's code raises
        row.status = f"not built: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
        return row
    no_dropout(model)
    before = copy.deepcopy(model)
    try:
        compiled = compile_with_report(model, compose_config(OVERRIDES), example=inputs)
        row.named = "" if compiled.plan.layers else _shared(compiled)
        if row.named:
            overrides = [*OVERRIDES, f"experts.match='{row.named}'"]
            model = copy.deepcopy(before)
            compiled = compile_with_report(model, compose_config(overrides), example=inputs)
    except MoecompileError as error:
        row.status = f"failed: {error}"
        return row
    _describe(row, compiled, before)
    if row.rewritten:
        _compare(row, before, compiled.model, inputs, zoo)
        if (row.gradient or 0.0) > MOST_GRADIENT:
            row.precision = "float64"  # in which small gradients are not rounding either
            _compare(row, before.double(), compiled.model.double(), inputs, zoo)
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def _shared(compiled: Compilation) -> str:
    """A pattern that names the shared experts, which are rewritten only then, or nothing."""
    paths = [site.fqn for site in compiled.sites if "shared expert" in site.reason and site.kind != "-"]
    return next((_general(path) for path in paths), "")


def no_dropout(model: nn.Module) -> None:
    """Every rate becomes 0, whether a module holds it or a number that a function is given."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for key, value in vars(module).items():
            if isinstance(value, float) and ("drop" in key or key.endswith("pdrop")):
                setattr(module, key, 0.0)


def _describe(row: Row, compiled: Compilation, before: nn.Module) -> None:
    done = [layer.site for layer in compiled.plan.layers]
    row.rewritten = len(done)
    row.sites = dict(Counter(f"{form_of(site, before)} {site.kind}" for site in done if isinstance(site, FFNSite)))
    left = [site.reason for site in compiled.sites if site.status == "not_matched"]
    row.left = dict(Counter(_general(reason) for reason in left))
    row.status = "rewritten" if row.rewritten else "nothing to rewrite" if not left else "not rewritten"


def _general(reason: str) -> str:
    """Without the numbers of layers."""
    return ".".join("*" if part.isdigit() else part for part in reason.split("."))


def form_of(site: FFNSite, before: nn.Module) -> str:
    """own: the region is the FFN alone. Else its linears are in one module (inline) or over several (split)."""
    region = before.get_submodule(site.fqn.partition("@")[0])
    numbers = site.d_ff * site.d_model * (3 if site.kind == "gated" else 2)
    if sum(parameter.numel() for parameter in region.parameters() if parameter.ndim == 2) == numbers:
        return "own"
    wide = [any(site.d_ff in p.shape for p in child.parameters(recurse=False)) for child in region.children()]
    return "inline" if sum(wide) >= 2 else "split"


def _compare(row: Row, before: nn.Module, after: nn.Module, inputs: dict[str, Tensor], zoo: Any) -> None:
    with torch.no_grad():
        row.difference_eval = _difference(*(zoo.output_tensors(m.eval()(**inputs)) for m in (before, after)))
    row.generates = _generates(before, after, inputs)
    try:
        wanted, wanted_grads = _outputs_and_grads(before.train(), inputs, zoo)
    except Exception as error:  # some models do not train on such a batch
        row.status = f"rewritten; the model before does not train: {type(error).__name__}"
        return
    try:
        got, grads = _outputs_and_grads(after.train(), inputs, zoo)
    except Exception as error:
        row.status, row.gradient = f"rewritten; does not train: {type(error).__name__}: {error}", float("inf")
        return
    row.difference_train = _difference(wanted, got)
    both = wanted_grads.keys() & grads.keys()
    largest = max(float(wanted_grads[n].abs().max()) for n in both)
    # A bias of keys shifts all scores of a query alike: its gradient is rounding noise.
    real = [n for n in both if float(wanted_grads[n].abs().max()) > NOISE * largest]
    row.gradient, row.worst_gradient = worst({n: grads[n] for n in real}, {n: wanted_grads[n] for n in real})


def _difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True) if x.numel())


def _outputs_and_grads(model: nn.Module, inputs: dict[str, Tensor], zoo: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(2)
    model.zero_grad()
    outputs = zoo.output_tensors(model(**inputs))
    sum(output.float().square().mean() for output in outputs).backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return [output.detach() for output in outputs], grads


def _generates(before: nn.Module, after: nn.Module, inputs: dict[str, Tensor]) -> bool | None:
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    try:
        wanted = before.generate(**copy.deepcopy(inputs), **options)
    except Exception:  # tiny models of some architectures do not generate
        return None
    try:
        return bool(torch.equal(after.generate(**copy.deepcopy(inputs), **options), wanted))
    except Exception as error:  # counts as another result
        print(f"generate of the rewritten model: {type(error).__name__}: {error}")
        return False


def is_same(row: Row) -> bool:
    """Whether a rewritten architecture is the same function as before."""
    differences = [d for d in (row.difference_eval, row.difference_train) if d is not None]
    return max(differences) <= MOST_DIFFERENCE and (row.gradient or 0.0) <= MOST_GRADIENT and row.generates is not False


def _line(row: Row) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1e}"

    forms = ", ".join(f"{count} {form}" for form, count in row.sites.items())
    left = "; ".join(f"{count} x {reason}" for reason, count in row.left.items())
    figures = " ".join(number(v) for v in (row.difference_eval, row.difference_train, row.gradient))
    same = "" if not row.rewritten or is_same(row) else "  NOT THE SAME"
    return f"{row.name:26} {row.status:12} {forms:24} {figures} {row.generates!s:5} {left[:150]}{same}"


def totals(rows: list[Row]) -> dict[str, Any]:
    """What the whole run says."""
    done = [row for row in rows if row.rewritten]
    forms = Counter(form for row in done for form in row.sites)
    return {
        "architectures": len(rows),
        "built": sum(not row.status.startswith("not built") for row in rows),
        "rewritten": len(done),
        "rewritten and the same": sum(is_same(row) for row in done),
        "of these, shared experts that were named": sum(bool(row.named) for row in done),
        "that generate, with the same tokens": sum(row.generates is True for row in done),
        **{f"with FFNs {form}": count for form, count in sorted(forms.items())},
    }


def table(rows: list[Row], summary: dict[str, Any]) -> str:
    """Totals and everything that was not rewritten, in Markdown."""
    lines = ["| | architectures |", "|---|---|", *(f"| {key} | {value} |" for key, value in summary.items()), ""]
    lines += ["| not rewritten | why |", "|---|---|"]
    for row in rows:
        if not row.rewritten:
            why = "; ".join(row.left) or ("no dense FFN" if row.status == "nothing to rewrite" else row.status)
            lines.append(f"| `{row.name}` | {why.replace('|', ' ')} |")
    lines += ["", "| rewritten when named | `experts.match` |", "|---|---|"]
    lines += [f"| `{row.name}` | `{row.named}` |" for row in rows if row.rewritten and row.named]
    lines += ["", "| rewritten, and not all of it | what stays, and why |", "|---|---|"]
    lines += [f"| `{row.name}` | {'; '.join(row.left)} |" for row in rows if row.rewritten and row.left]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Examines the architectures and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types; all causal language models if none is given")
    names = parser.parse_args().names
    if not (ZOO / "tiny_models.py").is_file():
        print(f"there is no {ZOO}, whose rules build the tiny models")
        return 2
    sys.path.insert(0, str(ZOO))
    import tiny_models
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    warnings.simplefilter("ignore")  # of other people's models
    logging.disable(logging.WARNING)
    rows = []
    for name in names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        rows.append(examine(name, tiny_models))
        print(_line(rows[-1]), flush=True)
    summary = totals(rows)
    print(*(f"{value:5} {key}" for key, value in summary.items()), sep="\n")
    if names:
        return 0
    RESULTS.parent.mkdir(exist_ok=True)
    data = {"totals": summary, "architectures": [asdict(row) for row in rows]}
    RESULTS.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    with RESULTS.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0])])
        writer.writeheader()
        writer.writerows({**asdict(row), "sites": _joined(row.sites), "left": _joined(row.left)} for row in rows)
    TABLE.write_text(table(rows, summary), encoding="utf-8")
    return int(summary["rewritten"] < LEAST or summary["rewritten and the same"] < summary["rewritten"])


def _joined(counts: dict[str, int]) -> str:
    return "; ".join(f"{count} {key}" for key, count in counts.items())


if __name__ == "__main__":
    sys.exit(main())
