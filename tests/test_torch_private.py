"""Private torch names are in `moecompile/torch_private.py` alone, where a torch upgrade can be checked."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from moecompile.torch_private import init_process_group, unwrapped

PACKAGE = Path(__file__).parents[1] / "moecompile"
_OF_OBJECTS = {"_apply", "_buffers", "_modules", "_non_persistent_buffers_set", "_parameters", "_version"}


def private_names(code: str) -> Iterator[str]:
    """Names below `torch` with a part that begins with one underscore, and private attributes of modules and tensors.

    A method that overrides a private one calls it through `super()`.
    """
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            yield from (
                f"{node.module}.{name.name}" for name in node.names if _is_private(f"{node.module}.{name.name}")
            )
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("torch.") and _is_private(name.name))
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if (node.attr in _OF_OBJECTS and text != f"super().{node.attr}") or (
                text.startswith("torch.") and _is_private(text)
            ):
                yield text


def _is_private(path: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in path.split("."))


def test_private_names_of_torch_stand_in_one_file() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "torch_private.py"]
    found = {str(path.relative_to(PACKAGE)): [*private_names(path.read_text(encoding="utf-8"))] for path in files}
    assert len(files) > 100 and {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "code",
    [
        "from torch.utils._pytree import tree_map",
        "from torch import _assert",
        "import torch._ops",
        "f(torch._C.x)",
        "m._parameters",
    ],
)
def test_one_is_found(code: str) -> None:
    assert [*private_names(code)]


def test_groups_of_one_process_wrap_the_hook_once(tmp_path: Path) -> None:
    """torch wraps it for each: lines of a traceback began with as many `[rank0]:`."""
    before = sys.excepthook
    try:
        for number in range(3):
            init_process_group("gloo", store=dist.FileStore(str(tmp_path / str(number)), 1), rank=0, world_size=1)
            dist.destroy_process_group()
        assert sys.excepthook is not before and unwrapped(sys.excepthook) is before
        assert inspect.getclosurevars(sys.excepthook).nonlocals["old_hook"] is before
    finally:
        sys.excepthook = before
