"""The one door to transformers' `from_pretrained` and `from_config` of models and configs: no code of a hub comes in.

Three things bring it in: `use_kernels`, which transformers assumes since 5.25; a config that names code; and an
implementation that transformers looks for in a hub where its package is missing (`flash_attention_2`).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from moecompile.errors import ConfigError

_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_CODE = ("kernel_config", "fusion_config", "use_kernels", "kernels_mode", "allow_all_kernels")
_GETTERS = {"kernels": "get_kernel", "transformers.integrations.hub_kernels": "get_kernel_hub"}
"""Module -> its function that fetches and imports a repository of a hub."""


def read_config(folder: Path, path: str, value: Any) -> Any:
    """transformers' config in a folder.

    Raises:
        ConfigError: `path` = `value` names code of a hub. Others: as transformers raises.
    """
    from transformers import AutoConfig

    file = Path(folder, "config.json")
    refuse_code(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}, path, value)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return refuse_attention(config, path, value)


def refuse_code(keys: Any, path: str, value: Any) -> None:
    """Refuses keys of a config, or of a config inside it, that name code, whichever version of transformers reads them.

    Raises:
        ConfigError: one does.
    """
    if isinstance(keys, list):
        for each in keys:
            refuse_code(each, path, value)
    for key, given in keys.items() if isinstance(keys, Mapping) else ():
        name = str(key).removeprefix("_").removesuffix("_internal")
        if name in _IMPLEMENTATIONS:  # one name, or one for each config inside
            for named in given.values() if isinstance(given, Mapping) else [given]:
                if isinstance(named, str) and "/" in named:
                    raise _named(f"{name}={named}", path, value)
        elif name in _CODE and given:
            raise _named(f"{key}={given if isinstance(given, str | int) else json.dumps(given)}", path, value)
        else:
            refuse_code(given, path, value)


def refuse_attention(config: Any, path: str, value: Any) -> Any:
    """The config, unless it names attention of a hub (`OWNER/REPOSITORY`), which transformers would load and run.

    Raises:
        ConfigError: it does.
    """
    for each in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        for name in _IMPLEMENTATIONS:
            refuse_code({name: getattr(each, f"_{name}", None)}, path, value)
    return config


def _named(what: str, path: str, value: Any) -> ConfigError:
    return ConfigError(
        path, value, f"names code of a hub to run, {what}", "Remove it there: transformers computes all of it itself"
    )


def load(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained`, without kernels of a hub."""
    from transformers import PreTrainedModel

    if hasattr(PreTrainedModel, "use_kernels"):  # where there is the attribute, there is the argument
        options["use_kernels"] = False
    with no_hub():
        return kind.from_pretrained(folder, trust_remote_code=False, **options)


def make(kind: Any, config: Any, **options: Any) -> Any:
    """The model of a config, of an auto class or a model's own; it gets no kernels, since nothing is loaded."""
    build = getattr(kind, "from_config", None) or kind._from_config
    with no_hub():
        return build(config, **options)


@contextmanager
def no_hub() -> Iterator[None]:
    """Inside, transformers fetches no code of a hub where a package is missing; it says which is missing instead."""

    def refused(name: str, *args: Any, **kwargs: Any) -> NoReturn:
        raise ImportError(f"would run native code of a hub, {name}")

    with ExitStack() as stack:
        for module, function in _GETTERS.items():
            try:
                found = importlib.import_module(module)
            except Exception:  # not installed, or broken: then it fetches nothing
                continue
            if hasattr(found, function):
                stack.enter_context(mock.patch.object(found, function, refused))
        yield
