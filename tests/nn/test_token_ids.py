"""Token ids reach the layers whose experts a hash of them chooses, whatever lies between."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moecompile
from moecompile.errors import MoecompileError
from moecompile.nn.context import Positions
from moecompile.nn.padding import IDS, Padding, TokenIds
from moecompile.nn.replay import record_routes
from moecompile.nn.watch import ids_of
from moecompile.passes.recompute import recompute
from moecompile.pipeline import compile_with_report, plan_of
from tests.ops.test_hashing import chosen
from tests.tiny import TinyGPT, ids, randomize, tiny_llama

HASH = ["experts.num_routed=4", "routing.top_k=2", "routing.choice=hash"]
FIRST = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(0))
SECOND = FIRST.flip(1)


def llama(*overrides: str) -> nn.Module:
    model = tiny_llama().double()
    moecompile.compile_model(model, [*HASH, *overrides], example={"input_ids": FIRST})
    randomize(model)
    return model


def wanted(tokens: Tensor, layer: int) -> list[list[int]]:
    return [chosen(token, 4, 2, layer) for token in tokens.flatten().tolist()]


def test_every_layer_of_a_model_of_transformers_has_the_ids() -> None:
    model = llama()
    with record_routes(model) as routes:
        model(FIRST)
        model(input_ids=SECOND)
        model.model(SECOND)  # a head of the user's own
    assert [[t.tolist() for t in routes.ids[layer.path]] for layer in routes.layers] == [
        [wanted(FIRST, i), wanted(SECOND, i), wanted(SECOND, i)] for i in range(2)
    ]


def test_a_hand_written_model_has_the_only_integers() -> None:
    model = moecompile.compile_model(TinyGPT(), HASH, example=ids())
    with record_routes(model) as routes:
        model(ids(3, 4))
    assert [routes.ids[layer.path][0].tolist() for layer in routes.layers] == [wanted(ids(3, 4), i) for i in range(2)]


def test_a_decoder_has_its_own_ids() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    example = {"input_ids": FIRST, "decoder_input_ids": SECOND}
    moecompile.compile_model(model, HASH, example=example)
    with record_routes(model) as routes:
        model(**example)
    got = {layer.path.split(".")[0]: routes.ids[layer.path][0].tolist() for layer in routes.layers}
    assert got == {"encoder": wanted(FIRST, 0), "decoder": wanted(SECOND, 1)}


@pytest.mark.parametrize("checkpointing", ["full", "keep_exchanges"])
def test_recomputed_layers_have_the_ids_of_their_own_forward(checkpointing: str) -> None:
    """Two forwards with different ids, then both backwards."""

    def both(model: nn.Module) -> dict[str, Tensor]:
        losses = [model.train()(x, use_cache=False).logits.sin().sum() for x in (FIRST, SECOND)]
        for loss in losses:
            loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, model = both(llama()), llama()
    recompute(model, plan_of(model), checkpointing)
    got = both(model)
    assert got.keys() == plain.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad, plain[name], rtol=0, atol=1e-11, msg=name)


def test_transformers_checkpointing_is_refused_where_ids_would_be_mixed_up() -> None:
    model = llama().train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    first = model(FIRST, use_cache=False).logits.sum()
    with pytest.raises(MoecompileError, match="two forwards with different padding or token ids before a backward"):
        model(SECOND, use_cache=False)
    first.backward()
    model(SECOND, use_cache=False).logits.sum().backward()


def test_generates_with_a_cache_what_it_computes_without() -> None:
    model = llama().eval()
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(FIRST, use_cache=True, **options), model.generate(FIRST, use_cache=False, **options)
    )


def test_step_0_equals_the_dense_model_and_is_measured() -> None:
    """With ids that are known while it is measured, and no hook left behind."""
    model = tiny_llama().double()
    done = compile_with_report(model, HASH, example={"input_ids": FIRST})
    assert done.step0.max_abs_diff is not None
    assert done.step0.max_abs_diff < 1e-12
    assert len(model._forward_pre_hooks) == 2  # the warning about padding, and the ids
    assert done.plan.estimate.params_total == sum(p.numel() for p in model.parameters())


def test_the_router_of_gemma_starts_as_the_dense_model_and_is_counted() -> None:
    model = tiny_llama().double()
    options = ["experts.num_routed=4", "routing.norm=true", "routing.expert_scale=true"]
    done = compile_with_report(model, options, example={"input_ids": FIRST})
    assert done.step0.max_abs_diff is not None
    assert done.step0.max_abs_diff < 1e-12
    assert done.plan.estimate.params_total == sum(p.numel() for p in model.parameters())


def test_a_rank_has_the_ids_of_its_positions() -> None:
    part, padding = TokenIds(), Padding()
    part.padding, padding.now, padding.positions = padding, {IDS: torch.arange(16).view(2, 8)}, Positions("", 1, 2)
    assert part(torch.zeros(2, 4, 3)).tolist() == [4, 5, 6, 7, 12, 13, 14, 15]


def test_ids_of_other_tokens_are_refused() -> None:
    part, padding = TokenIds(), Padding()
    part.padding, padding.now = padding, {IDS: torch.arange(16).view(2, 8)}
    message = (
        "(2, 8) token ids are not those of the 6 tokens that reach an MoE layer whose experts a hash of them chooses"
    )
    with pytest.raises(MoecompileError, match=re.escape(message)):
        part(torch.zeros(2, 3, 3))


def test_embeddings_instead_of_ids_are_refused() -> None:
    model = llama()
    with pytest.raises(MoecompileError, match="the model was not called with any: give it input_ids, not embeddings"):
        model(inputs_embeds=model.get_input_embeddings()(FIRST))


def test_copies_have_ids_of_their_own() -> None:
    model = llama().eval()
    other = copy.deepcopy(model)
    assert torch.equal(other(FIRST).logits, model(FIRST).logits)


def test_which_argument_has_the_ids() -> None:
    class Two(nn.Module):
        def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> None: ...

    assert ids_of(Two(), (FIRST,), {})[IDS] is FIRST
    assert ids_of(Two(), (FIRST, SECOND), {}) == {}  # which of them is unknown
    assert ids_of(Two(), (FIRST.double(),), {}) == {}
