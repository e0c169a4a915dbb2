"""What a rewritten model of transformers still does as before: generate, train and eval, checkpointing, copies, compile."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moecompile.nn import meters_of
from moecompile.verify import worst
from tests.architectures import ALL, DENSE, EXISTING, IDS, VOCAB, inputs_of, model_of, rewrite
from tests.tiny import max_diff, randomize

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's models

FEW = ("llama", "mixtral", "deepseek_v3")  # one dense, stacked experts, experts with groups beside a dense layer


def trained(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of one step in training mode; zero where there is none."""
    model.train().zero_grad()
    torch.manual_seed(3)
    model(**inputs).logits.square().mean().backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def loads(model: nn.Module) -> list[list[int]]:
    return [meter.load.tolist() for _, meter in meters_of(model)]


def different_experts(name: str, seed: int = 5, **changes: Any) -> nn.Module:
    """A rewritten model whose experts all differ, else gradients and choices would say little."""
    model = rewrite(model_of(name, **changes), name).model
    if name in DENSE:
        for module in model.modules():
            if type(module).__name__ in ("Experts", "Router"):
                randomize(module, seed)
    return model


# -- generate --------------------------------------------------------------------------------------------------------


def generate(model: nn.Module, **how: Any) -> Tensor:
    """20 new tokens; no pair of them comes twice, as it would for ever with random weights."""
    arguments = {"min_new_tokens": 20, "max_new_tokens": 20, "do_sample": False, "no_repeat_ngram_size": 2, **how}
    ids: Tensor = model.generate(IDS, attention_mask=torch.ones_like(IDS), **arguments)
    return ids


@pytest.mark.parametrize("name", ALL)
def test_generate_gives_the_same_text_with_and_without_the_cache(name: str) -> None:
    ways: tuple[dict[str, Any], ...] = ({"use_cache": True}, {"use_cache": False}, {"num_beams": 3})
    model = model_of(name)
    before = [generate(model, **way) for way in ways]
    assert len(set(before[0][:, -20:].flatten().tolist())) > 8
    rewrite(model, name)
    for way, wanted in zip(ways, before, strict=True):
        assert torch.equal(generate(model, **way), wanted), way


def test_another_weight_gives_another_text() -> None:
    """Else equal texts would say nothing."""
    for name in ("llama", "mixtral"):
        model = model_of(name)
        before = generate(model)
        rewrite(model, name)
        with torch.no_grad():
            experts = next(p for n, p in model.named_parameters() if n.endswith("experts.down_proj"))
            experts.neg_()
        assert not torch.equal(generate(model), before)


# -- train and eval, checkpointing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
def test_train_and_eval_reach_every_module(name: str) -> None:
    model = rewrite(model_of(name), name).model
    for mode in (True, False):
        model.train(mode)
        assert {module.training for module in model.modules()} == {mode}


def test_dropout_inside_the_ffn_follows_the_mode() -> None:
    model = rewrite(model_of("t5", dropout_rate=0.5), "t5").model
    inputs = inputs_of("t5")
    assert max_diff(model(**inputs).logits, model(**inputs).logits) == 0
    model.train()
    encoder, dropouts = model.get_submodule("encoder.block.0.layer.1.DenseReluDense"), []
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda *args: dropouts.append(float((args[-1] == 0).float().mean())))
    model(**inputs)
    assert dropouts and max(dropouts) > 0.3


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("name", FEW)
def test_gradient_checkpointing_changes_no_gradient_and_counts_no_load_twice(
    name: str, when: str, reentrant: bool
) -> None:
    model, inputs = model_of(name), inputs_of(name)
    wanted_model = rewrite(copy.deepcopy(model), name).model
    wanted = trained(wanted_model, inputs)
    arguments = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if when == "before":
        model.gradient_checkpointing_enable(**arguments)
    rewrite(model, name)
    if when == "after":
        model.gradient_checkpointing_enable(**arguments)
    if reentrant:
        model.enable_input_require_grads()
    runs: list[int] = []
    for path, module in model.named_modules():
        if path.endswith("layers.1.mlp"):
            module.register_forward_pre_hook(lambda *_: runs.append(1))
    grads = trained(model, inputs)
    assert len(runs) == 2  # it is recomputed
    assert worst(grads, wanted) < (1e-6, "")
    assert any(grad.any() for grad in grads.values())
    assert loads(model) == loads(wanted_model) and sum(map(sum, loads(model))) > 0


# -- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_state_dict_loads_strictly_through_a_file(name: str) -> None:
    """`weights_only=True` reads nothing but tensors."""
    model, inputs = different_experts(name), inputs_of(name)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = rewrite(model_of(name), name).model
    randomize(other)
    result = other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert max_diff(other(**inputs).logits, model(**inputs).logits) == 0


@pytest.mark.parametrize("name", [name for name in EXISTING if name != "switch_transformers"])  # has renamed weights
def test_transformers_initialises_the_weights_where_they_are_now(name: str) -> None:
    """`_init_weights` goes by the classes of modules: one of the model's own that has lost its weights would break it."""
    model = rewrite(model_of(name), name).model
    for module in model.modules():
        model._init_weights(module)
    assert torch.isfinite(model(**inputs_of(name)).logits).all()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_compiled_where_new_tensors_are_on_the_meta_device(name: str) -> None:
    """As `from_pretrained` builds a model, before it loads the weights."""
    from transformers import AutoModelForCausalLM

    made = model_of(name).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
        compiled = rewrite(model, name)
    assert len(compiled.plan.layers) == 2
    assert all(parameter.is_meta for parameter in compiled.model.parameters())
    assert list(compiled.model.state_dict()) == list(rewrite(model_of(name), name).model.state_dict())


@pytest.mark.parametrize("name", ALL)
def test_a_deep_copy_computes_the_same_and_shares_nothing(name: str) -> None:
    model, inputs = different_experts(name), inputs_of(name)
    again = copy.deepcopy(model)
    assert max_diff(again(**inputs).logits, model(**inputs).logits) == 0
    assert not {p.data_ptr() for p in again.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert worst(trained(again, inputs), trained(model, inputs)) <= (1e-6, "")
    assert loads(again) == loads(model)


@pytest.mark.parametrize("name", EXISTING)
def test_a_saved_model_is_one_that_transformers_loads(name: str, tmp_path: Path) -> None:
    if name == "switch_transformers":
        pytest.skip("its separate experts are stacked, and so renamed")
    model, inputs = rewrite(model_of(name), name).model, inputs_of(name)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert max_diff(again(**inputs).logits, model(**inputs).logits) <= 1e-5


def test_a_saved_model_with_new_experts_loads_into_one_that_is_rewritten_alike(tmp_path: Path) -> None:
    """transformers has no place for them and says so; weights are complete, and load strictly."""
    from safetensors.torch import load_file

    model, inputs = different_experts("llama"), inputs_of("llama")
    model.save_pretrained(tmp_path)
    _, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert {name.rpartition(".mlp.")[2] for name in report["missing_keys"]} == {
        "gate_proj.weight", "up_proj.weight", "down_proj.weight",
    }  # fmt: skip
    assert any(name.endswith("experts.gate_up_proj") for name in report["unexpected_keys"])
    other = rewrite(model_of("llama"), "llama").model
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert max_diff(other(**inputs).logits, model(**inputs).logits) == 0


# -- torch.compile ---------------------------------------------------------------------------------------------------


def compiled_steps(name: str, backend: str, lengths: tuple[int, ...]) -> list[int]:
    """Trains with texts of these lengths, compiled without a graph break, against the same model run eagerly.

    Returns:
        How many graphs had been compiled after each length.
    """
    from torch._dynamo.backends.registry import lookup_backend

    model = different_experts(name, num_hidden_layers=1).train()
    reference, graphs, after = copy.deepcopy(model), [], []

    def counting(graph_module: Any, example: Any, **options: Any) -> Any:
        graphs.append(1)
        return lookup_backend(backend)(graph_module, example, **options)

    torch.compiler.reset()
    # Rows per expert depend on values: without this, dynamo leaves the graph at every layer.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        fast = torch.compile(model, backend=counting, fullgraph=True)
        for length in lengths:
            ids = torch.randint(1, VOCAB, (2, length), generator=torch.Generator().manual_seed(length))
            outputs, grads = [], []
            for each, owner in ((fast, model), (reference, reference)):
                owner.zero_grad()
                logits = each(**inputs_of(name, ids)).logits
                logits.square().mean().backward()
                outputs.append(logits.detach())
                grads.append({n: p.grad.clone() for n, p in owner.named_parameters() if p.grad is not None})
            assert max_diff(*outputs) <= 1e-4
            assert worst(*grads) < (1e-3 if backend == "inductor" else 1e-5, "")
            after.append(len(graphs))
    torch.compiler.reset()
    assert loads(model) == loads(reference)
    return after


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_compiled_whole_without_a_break_and_for_any_number_of_tokens(name: str) -> None:
    """The second length makes sizes dynamic; from then on nothing is compiled again."""
    assert compiled_steps(name, "aot_eager", (12, 7, 9, 5)) == [1, 2, 2, 2]


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    assert compiled_steps("llama", "inductor", (12, 7, 9)) == [1, 2, 2]
