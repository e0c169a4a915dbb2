"""Every field of the schema, and of what it resolves into, has a string under it; the reference page prints them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import pytest

from moecompile.routing import BalanceSpec, RouterConfig
from moecompile.schema import Config, PerLayerConfig
from tests.test_docs import generate


def groups(kind: Any) -> Iterator[type]:
    """A dataclass of the schema and all those inside it."""
    yield kind
    for hint in get_type_hints(kind).values():
        if is_dataclass(hint):
            yield from groups(hint)


@pytest.mark.parametrize("kind", [*groups(Config), PerLayerConfig, RouterConfig, BalanceSpec])
def test_every_field_says_what_it_is(kind: type) -> None:
    hints = get_type_hints(kind)
    wanted = [field.name for field in fields(kind) if not is_dataclass(hints[field.name])]  # groups have a docstring
    said = generate().field_docs(kind)
    assert [name for name in wanted if not said.get(name, "").endswith(".")] == []
    assert kind.__doc__
