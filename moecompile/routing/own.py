"""Which modules are those of the router that a model has already."""

from __future__ import annotations


def is_of_router(path: str, source: str) -> bool:
    """Whether the module at `path` has weights of a router: it returns the logits, as the module at `source` does, or
    one is in the other. A row per expert says less: linears of a shared expert may have as many (Qwen3-Next).
    """
    return f"{path}.".startswith(f"{source}.") or f"{source}.".startswith(f"{path}.")
