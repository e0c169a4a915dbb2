"""Files of a pretrained folder other than weights: generation settings, tokenizer, chat templates, custom fields.

Files are copied unchanged, except those that transformers has written for the export (config, the run's tokenizer).
Code is not copied, because an upcycled model is not a model of that code.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moecompile.errors import VerificationFailed
from moecompile.models.chat import load_tokenizer
from moecompile.models.without_hub_code import read_config

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt", ".onnx", ".index.json")
_NEVER = (
    "config.json", "plan.yaml", "resolved.yaml",  # the export writes its own
    "hf_quant_config.json", "quantize_config.json", "quant_config.json", "adapter_config.json",  # of weights that stay
)  # fmt: skip
_TOKENIZER = (
    "tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "spiece", "sentencepiece", "chat_template",
    "additional_chat_templates",
)  # fmt: skip
_SAMPLE = "The whale, the White Whale! 42 \u00e9t\u00e9s\n\ttabs, \u6d77."


def carry(original: Path, folder: Path, *, tokenizer: bool) -> None:
    """Copies files that `folder` lacks, and the generation settings, from `original`.

    Args:
        tokenizer: whether the model was trained with the original's tokenizer.
    """
    for path in sorted(original.iterdir()):
        if path.name in _NEVER or path.name.endswith((*_WEIGHTS, ".py")) or path.name.startswith("."):
            continue
        if path.name.startswith(_TOKENIZER) and not tokenizer:
            continue
        target = folder / path.name
        if path.is_dir():
            if path.name.startswith(_TOKENIZER):
                shutil.copytree(path, target, dirs_exist_ok=True)
        elif not target.exists() or path.name == "generation_config.json":
            shutil.copyfile(path, target)


def own_fields(config: Any) -> dict[str, Any]:
    """Custom fields of a config, which its class does not declare."""
    declared = {*getattr(type(config), "__dataclass_fields__", {}), *type(config).attribute_map}
    added = {*type(config)().to_dict(), "auto_map", "quantization_config", "architectures", "torch_dtype"}
    return {key: value for key, value in config.to_dict().items() if key not in declared | added}


def compare(original: Path, folder: Path, *, tokenizer: bool) -> None:
    """Loads both folders and compares everything but weights.

    Raises:
        VerificationFailed: something is missing or differs; lists it.
    """
    if different := list(_differences(original, folder, tokenizer)):
        raise VerificationFailed(f"{folder}, exported and loaded again,", different)


def _differences(original: Path, folder: Path, tokenizer: bool) -> Iterator[str]:
    before, after = (read_config(path, "export.path", folder) for path in (original, folder))
    kept = after.to_dict()
    for key, value in own_fields(before).items():
        if kept.get(key) != value:
            yield f"config.json says {key}={kept.get(key)}, the original {value}"
    yield from _generation(original, folder)
    if tokenizer and (original / "tokenizer_config.json").is_file():
        yield from _tokenizers(original, folder)


def _generation(original: Path, folder: Path) -> Iterator[str]:
    from transformers import GenerationConfig

    name = "generation_config.json"
    if not (original / name).is_file():
        return
    before, after = (GenerationConfig.from_pretrained(path).to_dict() for path in (original, folder))
    for key in before.keys() | after.keys():
        if before.get(key) != after.get(key) and key not in ("transformers_version", "_from_model_config"):
            yield f"{name} says {key}={after.get(key)}, the original {before.get(key)}"


def _tokenizers(original: Path, folder: Path) -> Iterator[str]:
    before, after = load_tokenizer(original), load_tokenizer(folder)
    facts: dict[str, Callable[[Any], Any]] = {
        "vocabulary": lambda it: it.get_vocab(),
        "special tokens": lambda it: {**it.special_tokens_map, "all": it.all_special_tokens},
        "added tokens": lambda it: {index: str(token) for index, token in it.added_tokens_decoder.items()},
        "chat template": lambda it: it.chat_template,
        "longest text": lambda it: it.model_max_length,
        "tokens of a sample": lambda it: it(_SAMPLE).input_ids,
    }
    yield from (f"the tokenizer's {fact} differ" for fact, read in facts.items() if read(before) != read(after))
