"""Padding is no token: a padded batch computes what the same tokens compute without padding."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moecompile
from moecompile.errors import MoecompileError
from moecompile.nn import LayerLoad, auxiliary_loss, update_balance
from moecompile.nn.padding import Padding, TokenMask
from moecompile.nn.watch import masks_of, watch_padding
from moecompile.passes.recompute import recompute
from moecompile.pipeline import plan_of
from tests.existing_models import moe_model
from tests.tiny import randomize, tiny_llama

IDS = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(0))
LOSSES = ["balance.losses.micro_batch=0.1", "balance.losses.sequence=0.1", "balance.losses.z=0.1"]
FOUR = ["experts.num_routed=4", "routing.top_k=2"]
SHARED = ["experts.num_shared=1", "experts.granularity=2", "experts.init=random"]
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "mixtral": (lambda: moe_model("mixtral", dtype=torch.float64), []),
    "deepseek_v3": (lambda: moe_model("deepseek_v3", dtype=torch.float64), []),
    "shared expert": (lambda: tiny_llama().double(), [*FOUR, *SHARED, *LOSSES]),
    "global batch loss": (lambda: tiny_llama().double(), [*FOUR, "balance.losses.global_batch=0.1"]),
    "capacity": (lambda: tiny_llama().double(), [*FOUR, "routing.capacity_factor=0.75", *LOSSES]),
    "capacity by score": (
        lambda: tiny_llama().double(),
        [*FOUR, "routing.capacity_factor=0.75", "routing.drop=score", *LOSSES],
    ),
    "sigmoid": (lambda: tiny_llama().double(), [*FOUR, "routing.score=sigmoid", *LOSSES]),
    "shared expert with a routed weight": (
        lambda: tiny_llama().double(),
        [*FOUR, *SHARED, "experts.shared_routed=true", "routing.score=sigmoid", *LOSSES],
    ),
    "expert choice": (
        lambda: tiny_llama().double(),
        [
            *FOUR, "routing.choice=expert", "routing.normalize=false", "routing.allow_future=true",
            "balance.losses.z=0.1",
        ],
    ),
}  # fmt: skip


def padded(ids: Tensor, left: int, right: int) -> dict[str, Tensor]:
    """The same tokens between columns of padding."""
    mask = nn.functional.pad(torch.ones_like(ids), (left, right))
    return {
        "input_ids": nn.functional.pad(ids, (left, right), value=3),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
    }


def results(
    model: nn.Module, inputs: dict[str, Tensor], left: int = 0
) -> tuple[Tensor, dict[str, Tensor], list[LayerLoad]]:
    """Logits of the real tokens, gradients of all weights with auxiliary losses, and loads."""
    model.train().zero_grad()
    logits = model(**inputs, use_cache=False).logits[:, left : left + IDS.shape[1]]
    factors = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(3))
    loss, aux = (logits * factors).sum(), auxiliary_loss(model)
    (loss if aux is None else loss + aux).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads, update_balance(model, move=False)


def compiled(name: str, *overrides: str, example: dict[str, Tensor] | None = None) -> nn.Module:
    make, options = MODELS[name]
    model = make()
    moecompile.compile_model(model, [*options, *overrides], example=example or padded(IDS, 1, 2))
    randomize(model)
    return model


def assert_same(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=1e-12)
    assert got[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        torch.testing.assert_close(got[1][name], grad, rtol=0, atol=1e-11 * max(1.0, float(grad.abs().max())), msg=name)
    for one, other in zip(got[2], wanted[2], strict=True):
        assert one.load.tolist() == other.load.tolist() and one.node_tokens.tolist() == other.node_tokens.tolist()
        assert (one.tokens, one.dropped) == (other.tokens, other.dropped)
        assert one.entropy == other.entropy or one.entropy == pytest.approx(other.entropy, rel=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_same_tokens_without_padding(name: str) -> None:
    plain, masked = compiled(name, "data.mask_padding=never"), compiled(name)
    assert plan_of(masked).layers[0].mask_padding and not plan_of(plain).layers[0].mask_padding
    wanted = results(plain, {"input_ids": IDS})
    for left, right in ((3, 0), (0, 4), (2, 2), (0, 0)):
        assert_same(results(masked, padded(IDS, left, right), left), wanted)
    assert_same(results(masked, {"input_ids": IDS}), wanted)  # no mask: nothing is padding


def test_unequal_lengths_equal_each_sequence_alone() -> None:
    """transformers' own Mixtral, one sequence at a time."""
    lengths, longest = (3, 7, 1), 7
    own, ours = moe_model("mixtral", dtype=torch.float64), moe_model("mixtral", dtype=torch.float64)
    ids = torch.randint(1, 60, (3, longest), generator=torch.Generator().manual_seed(1))
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    moecompile.compile_model(ours, example=inputs)
    logits = ours.train()(**inputs, use_cache=False).logits
    alone = [own.train()(input_ids=ids[i : i + 1, -n:], use_cache=False).logits for i, n in enumerate(lengths)]
    for i, n in enumerate(lengths):
        torch.testing.assert_close(logits[i : i + 1, -n:], alone[i], rtol=0, atol=1e-12)
    sum(out.sin().sum() for out in alone).backward()  # type: ignore[union-attr]
    sum(logits[i, -n:].sin().sum() for i, n in enumerate(lengths)).backward()  # type: ignore[union-attr]
    wanted = dict(own.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=0, atol=1e-11, msg=name)
    (load, _) = update_balance(ours)
    assert load.tokens == sum(lengths) and int(load.load.sum()) == 2 * sum(lengths)


@pytest.mark.parametrize("checkpointing", ["full", "keep_exchanges"])
def test_recomputed_layers_have_the_mask_of_their_own_forward(checkpointing: str) -> None:
    """Two forwards with different padding, then both backwards."""

    def both(model: nn.Module) -> dict[str, Tensor]:
        inputs = [padded(IDS, 3, 0), padded(IDS.flip(0), 0, 3)]
        losses = [model.train()(**x, use_cache=False).logits[x["attention_mask"].bool()].sin().sum() for x in inputs]
        for loss in losses:
            loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    wanted, model = both(compiled("shared expert")), compiled("shared expert")
    recompute(model, plan_of(model), checkpointing)
    for name, grad in both(model).items():
        torch.testing.assert_close(grad, wanted[name], rtol=0, atol=1e-11, msg=name)


def test_checkpointing_of_transformers() -> None:
    wanted, model = results(compiled("mixtral"), padded(IDS, 2, 1), 2), compiled("mixtral")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    got = results(model, padded(IDS, 2, 1), 2)
    torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=1e-11)
    results(model, padded(IDS, 0, 0))  # another mask, after the backward
    first = model(**padded(IDS, 2, 1), use_cache=False).logits.sum()
    with pytest.raises(MoecompileError, match="two forwards with different padding or token ids before a backward"):
        model(**padded(IDS, 1, 2), use_cache=False)
    first.backward()
    model(**padded(IDS, 1, 2), use_cache=False)


def test_a_forward_of_the_base_model_alone() -> None:
    """A head of the user's own calls `model.model`; masks of earlier calls are gone."""
    model = compiled("mixtral").eval()
    hidden = model.model(**padded(IDS, 2, 0), use_cache=False).last_hidden_state[:, 2:]
    torch.testing.assert_close(
        hidden, model.model(input_ids=IDS, use_cache=False).last_hidden_state, rtol=0, atol=1e-12
    )


def test_generates_with_padding_on_the_left() -> None:
    own, ours = moe_model("mixtral", dtype=torch.float64), compiled("mixtral").eval()
    ours.load_state_dict(own.state_dict())
    ids, mask = torch.cat((torch.zeros(2, 3, dtype=torch.int64), IDS), 1), torch.ones(2, 10, dtype=torch.int64)
    mask[0, :3] = 0
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    wanted = own.generate(input_ids=ids, attention_mask=mask, **options)
    assert ours.generate(input_ids=ids, attention_mask=mask, **options).tolist() == wanted.tolist()


class Wrapped(nn.Module):
    """Takes masks in several forms, and returns what its layer sees."""

    def __init__(self) -> None:
        super().__init__()
        self.token_mask = TokenMask()

    def forward(self, x: Tensor, attention_mask: Any = None, **others: Any) -> Tensor | None:
        seen: Tensor | None = self.token_mask(x)
        return seen


@pytest.mark.parametrize(
    ("args", "kwargs", "real"),
    [
        ((torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]),), {}, [1, 1, 0, 0, 1, 1, 1, 0]),
        (
            (),
            {"src_key_padding_mask": torch.tensor([[False, True, True, True], [False] * 4])},
            [1, 0, 0, 0, 1, 1, 1, 1],
        ),
        ((), {"cu_seq_lens_q": torch.tensor([0, 3, 5])}, [1, 1, 1, 1, 1, 0, 0, 0]),
        (
            (),
            {"attention_mask": torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1]]), "past_key_values": object()},
            [1, 1, 1, 1, 0, 1, 1, 1],
        ),
        ((torch.ones(2, 1, 4, 4),), {}, None),
        ((), {}, None),
    ],
)
def test_masks_are_found(args: Any, kwargs: Any, real: list[int] | None) -> None:
    model = Wrapped()
    watch_padding(model)
    for x in (torch.zeros(2, 4, 3), torch.zeros(8, 3)):
        seen = model(x, *args, **kwargs)
        assert (seen is None) == (real is None) and (seen is None or seen.int().tolist() == real)
    assert model.token_mask(torch.zeros(8, 3)) is None  # outside of a forward


def test_a_mask_that_does_not_fit_is_refused() -> None:
    model = Wrapped()
    watch_padding(model)
    with pytest.raises(MoecompileError, match=r"attention_mask \(2, 4\) does not fit the 9 tokens.*mask_padding=never"):
        model(torch.zeros(3, 3, 2), torch.ones(2, 4))
    for x, mask in (
        (torch.zeros(2, 4, 3), torch.ones(2, 6)),  # of samples, or of earlier tokens, without a cache
        (torch.zeros(4, 2, 3), torch.ones(2, 4)),  # sequences first
        (torch.zeros(2, 4, 3), torch.ones(4, 4)),  # who sees whom
    ):
        with pytest.raises(MoecompileError, match=r"does not fit the 8 tokens \((2, 4|4, 2)\)"):
            model(x, mask)
    assert model(torch.zeros(2, 4, 3)) is None  # a failed forward leaves nothing behind


class SequencesFirst(nn.Module):
    """torch's encoder as it is by default, (S, B, D)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, src: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        out: Tensor = self.encoder(src, src_key_padding_mask=src_key_padding_mask)
        return out


class Causal(nn.Module):
    """Its mask says who sees whom."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up, self.down = nn.Linear(16, 48), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = x + F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), attn_mask=attention_mask)
        out: Tensor = x + self.down(F.gelu(self.up(x)))
        return out


def images_and_text() -> tuple[nn.Module, dict[str, Tensor]]:
    """Five patches an image, and as many tokens of text."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=16)
    text = LlamaConfig(**sizes, vocab_size=64, num_key_value_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63, vision_feature_layer=-1)
    mask = torch.tensor([[1] * 5, [1, 1, 1, 1, 0]])
    ids = torch.tensor([[63, 63, 63, 63, 5], [63, 63, 63, 63, 0]])
    return LlavaForConditionalGeneration(config), {
        "input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 8, 8)
    }  # fmt: skip


def other_tokens(name: str) -> tuple[nn.Module, dict[str, Tensor], list[bool]]:
    """A model, its example, and which of its layers have the tokens of the mask."""
    torch.manual_seed(0)
    if name == "sequences first":
        padding = torch.zeros(2, 6, dtype=torch.bool)
        padding[1, 2:] = True
        return SequencesFirst(), {"src": torch.randn(6, 2, 16), "src_key_padding_mask": padding}, [False]
    if name == "causal":
        return Causal(), {"x": torch.randn(2, 6, 16), "attention_mask": torch.ones(6, 6).bool().tril()}, [False]
    return *images_and_text(), [False, False, True]  # the tower, what follows it, and the language model


@pytest.mark.parametrize("name", ["sequences first", "causal", "images"])
def test_a_mask_of_other_tokens_masks_none(name: str) -> None:
    """The compiled model is the model before, and not without the FFN of tokens that the mask seemed to have."""
    model, example, masked = other_tokens(name)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            before = model.eval()(**example)
            options = ["experts.num_routed=4", "routing.top_k=2"]
            plan = plan_of(moecompile.compile_model(model, options, example=example))
            after = model.eval()(**example)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert [layer.mask_padding for layer in plan.layers] == masked
    one, other = (getattr(out, "logits", out) for out in (before, after))
    real = example["attention_mask"].bool() if name == "images" else torch.ones(other.shape[:2]).bool()
    torch.testing.assert_close(other[real], one[real], rtol=0, atol=1e-5)


def test_copies_have_masks_of_their_own() -> None:
    model = Wrapped()
    watch_padding(model)
    twin = copy.deepcopy(model)
    mask = torch.tensor([[1, 0]])
    assert twin(torch.zeros(1, 2, 3), mask).tolist() == [True, False]
    assert twin.token_mask.padding is not model.token_mask.padding
    again = pickle.loads(pickle.dumps(model))
    assert isinstance(again.token_mask.padding, Padding) and again(torch.zeros(1, 2, 3), mask).tolist() == [True, False]


def test_padding_that_is_routed_is_reported_once() -> None:
    model = compiled("mixtral", example={"input_ids": IDS})
    model.eval()(**padded(IDS, 1, 1))
    model.train()(**padded(IDS, 0, 0))
    with pytest.warns(UserWarning, match="attention_mask has padding, which is routed, sent and counted like tokens"):
        model(**padded(IDS, 1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**padded(IDS, 1, 1))


def test_positional_masks_have_names() -> None:
    mask = torch.ones(2, 4)
    assert masks_of(Wrapped(), (torch.zeros(2, 4, 3), mask), {}).keys() == {"attention_mask"}
