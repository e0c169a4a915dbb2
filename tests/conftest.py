"""What all tests share: golden texts, one thread a process, a folder for what is measured of this machine, and configs
that are composed once, with another folder (composed.py)."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import guard

os.environ.setdefault("USE_HUB_KERNELS", "NO")  # before transformers is imported, as in tasks and ranks
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: more threads than cores make it crawl
_MACHINE = tempfile.TemporaryDirectory(prefix="machine-")  # removed at the end; workers have that of the first process
os.environ.setdefault("MOECOMPILE_MACHINE_DIR", _MACHINE.name)
_COMPOSED = tempfile.TemporaryDirectory(prefix="composed-")  # likewise
os.environ.setdefault("MOECOMPILE_TESTS_COMPOSED", _COMPOSED.name)
gc.disable()  # until all is imported, of which nothing is garbage: a third of the time of collecting tests

GOLDEN = Path(__file__).parent / "golden"
LONGEST = (
    "tests/verify/test_pipeline.py", "tests/tasks/test_families.py", "tests/test_docs.py", "tests/test_tutorials.py",
    "tests/tasks/test_train.py", "tests/distributed/test_external_launch.py", "tests/verify/test_certify.py",
    "tests/distributed/test_faults.py", "tests/tasks/test_recipes.py", "tests/benchmarks/test_peers.py", "tests/verify/",
    "tests/cluster/", "tests/tasks/", "tests/distributed/", "tests/benchmarks/", "tests/compose/", "tests/match/",
    "tests/passes/test_upcycle.py", "tests/test_", "tests/runtime/", "tests/models/",
)  # fmt: skip
"""Files and rooms that begin first: a worker gets whole files, and a long one at the end would leave the others idle."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bless", action="store_true", help="rewrite the golden files, and run only tests that use them")


def pytest_configure(config: pytest.Config) -> None:
    from tests import composed

    config.pluginmanager.register(guard.Guard(config))
    composed.use()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--bless"):
        items[:] = [item for item in items if "bless" in getattr(item, "fixturenames", ())]
    items.sort(key=lambda item: [not item.nodeid.startswith(name) for name in LONGEST])


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.enable()  # and no freeze() yet: Hypothesis asks gc who refers to an object


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure() -> None:
    gc.collect()
    gc.freeze()  # pytest collects five times more, and so does Python when it ends


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """torch wraps the hook once more for every process group, and each wrapper adds `[rank0]:` to each line."""
    if torch_private := sys.modules.get("moecompile.torch_private"):
        sys.excepthook = torch_private.unwrapped(sys.excepthook)


@pytest.fixture
def own_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What plugins register is gone after the test."""
    from moecompile import named_code
    from moecompile.match import ffn
    from moecompile.nn.scores import FUNCTIONS
    from moecompile.passes import base
    from moecompile.routing.scores import SCORES
    from moecompile.runtime import records

    tables: list[dict[Any, Any]] = [SCORES, FUNCTIONS, base._registered, ffn._patterns, records._readers]
    before = [dict(table) for table in tables]
    monkeypatch.setattr(named_code, "_plugins", {})
    yield
    for name in named_code._plugins:
        sys.modules.pop(Path(name).stem if name.endswith(".py") else name, None)
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


@pytest.fixture
def bless(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`bless("plans/mixtral_ep.yaml", text)`: `text` is what that golden file holds; `make bless` writes it."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--bless"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"there is no tests/golden/{name}: run `make bless`, and read it before you commit it"
        assert text == path.read_text(encoding="utf-8"), f"tests/golden/{name} differs: `make bless` if it should"

    return check
