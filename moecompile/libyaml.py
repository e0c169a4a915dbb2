"""YAML as PyYAML reads it, parsed by libyaml where PyYAML was built with it: five times as fast.

What libyaml refuses is read again by PyYAML's own parser, so every message is its own.
"""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import yaml


def load_yaml(text: str) -> Any:
    """What `yaml.safe_load` returns.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: as `yaml.safe_load`.
    """
    return by_libyaml(yaml.SafeLoader)(text).get_single_data()


@cache
def by_libyaml(loader: type[yaml.SafeLoader]) -> Any:
    """A loader, to be given to `yaml.load`, that reads what `loader` reads, with its constructors and resolvers."""
    if not yaml.__with_libyaml__:
        return loader

    parser: Any = vars(yaml.cyaml)["CParser"]

    class Faster(parser, loader):  # type: ignore[misc, valid-type]
        def __init__(self, text: str) -> None:
            parser.__init__(self, text)
            yaml.constructor.SafeConstructor.__init__(self)
            yaml.resolver.Resolver.__init__(self)

    class Reader:
        def __init__(self, stream: Any) -> None:
            self.text = stream if isinstance(stream, str) else stream.read()
            self.name = getattr(stream, "name", None)

        def get_single_data(self) -> Any:
            try:
                return yaml.load(self.text, Loader=Faster)
            except (yaml.YAMLError, ValueError):
                return yaml.load(self._named(), Loader=loader)

        def dispose(self) -> None:
            """Nothing is held."""

        def _named(self) -> Any:
            """The text; of a file, messages have its name."""
            if self.name is None:
                return self.text
            stream: Any = io.StringIO(self.text)
            stream.name = self.name
            return stream

    return Reader
