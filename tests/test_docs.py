"""README and docs say what is true: examples run, commands compose, generated parts are up to date, the site builds."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from moecompile import compose
from tests import forked
from tests.tiny import SHORT

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [*(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(DOCS.rglob("*.md"))]
EXAMPLE = DOCS / "examples" / "lightning_module.py"

_BLOCK = re.compile(r"^(?:<!-- ranks: (\d+) -->\n)?```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block. where: `docs/use/lightning.md:12`. ranks: 0 where it is run in this process."""

    where: str
    line: int
    language: str
    ranks: int
    text: str


def _blocks() -> Iterator[Block]:
    for page in PAGES:
        content = page.read_text(encoding="utf-8")
        for found in _BLOCK.finditer(content):
            line = content[: found.start(3)].count("\n") + 1
            where = f"{page.relative_to(REPOSITORY)}:{line}"
            yield Block(where, line, found[2], int(found[1] or 0), found[3])


# Tutorials are run whole by tests/test_tutorials.py.
BLOCKS = [block for block in _blocks() if "--8<--" not in block.text and not block.where.startswith("docs/tutorials/")]
PROGRAMS = [block for block in BLOCKS if block.language == "python"]


def by_place(block: Block) -> str:
    return block.where


def generate() -> ModuleType:
    """docs/generate.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*args: str, cwd: Path) -> str:
    """Standard output of `python ARGS` in `cwd`."""
    done = forked.python(*args, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def torchrun(ranks: int, program: Path, cwd: Path) -> str:
    return run("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(program), cwd=cwd)


# -- examples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [block for block in PROGRAMS if not block.ranks], ids=by_place)
def test_python_examples_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = compile("\n" * (block.line - 1) + block.text, block.where, "exec", dont_inherit=True)
    exec(code, {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in PROGRAMS if block.ranks], ids=by_place)
def test_python_examples_run_on_several_ranks(block: Block, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(block.text, encoding="utf-8")
    torchrun(block.ranks, program, tmp_path)


@pytest.mark.slow
def test_the_lightning_example_prints_what_the_page_says(tmp_path: Path) -> None:
    got = torchrun(2, EXAMPLE, tmp_path).splitlines()
    (said,) = (block.text.splitlines() for block in BLOCKS if block.text.startswith("Plan "))
    assert got[:3] == said[:3]
    assert re.sub(r"\d\.\d+", "X", "\n".join(got[3:])) == re.sub(r"\d\.\d+", "X", "\n".join(said[3:]))
    assert float(got[3].split()[1]) < 0.5


# -- commands ------------------------------------------------------------------------------------------------------


def _commands() -> Iterator[tuple[str, str]]:
    for block in BLOCKS:
        if block.language == "bash":
            for i, line in enumerate(block.text.splitlines()):
                if line.strip() and not line.startswith("#"):
                    page = block.where.rpartition(":")[0]
                    yield f"{page}:{block.line + i}", line


_FIRST = ("README.md", "docs/index.md", "docs/getting-started.md", "docs/tutorials/")


def _marks(where: str, line: str) -> tuple[pytest.MarkDecorator, ...]:
    """A command takes half a second, and a sweep composes each of its jobs: what is read first is tested always."""
    return () if where.startswith(_FIRST) and "moecompile -m" not in line else (pytest.mark.slow,)


@pytest.mark.parametrize(
    "line", [pytest.param(line, id=where, marks=_marks(where, line)) for where, line in _commands()]
)
def test_documented_commands_are_right(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_plugins: None
) -> None:
    """A command of moecompile composes to a valid config; others name things that exist."""
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    if "moecompile" in words:
        arguments = words[words.index("moecompile") + 1 :]
        folders = [f"hydra.run.dir={tmp_path}/run", f"hydra.sweep.dir={tmp_path}/sweep"]
        assert _compose([*arguments, *folders], monkeypatch) == 0
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    else:
        assert Path(words[0]).name in ("pytest", "torchrun", "source", "python")
        paths = [word for word in words[1:] if "/" in word and not word.startswith(".venv")]
        assert all((REPOSITORY / path).exists() for path in paths), paths


def _compose(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of the command line with a task that does nothing."""
    monkeypatch.setattr(sys, "argv", ["moecompile", *arguments])
    try:
        return compose.main(lambda config, run_dir: 0)
    except SystemExit as end:
        return int(end.code or 0)


_ERRORS = [
    (block.where, *found.groups())
    for block in BLOCKS
    for found in re.finditer(r"^\$ python -m moecompile (.*)\n(error: .*)$", block.text, re.MULTILINE)
]


@pytest.mark.parametrize(
    ("arguments", "message"), [found[1:] for found in _ERRORS], ids=[found[0] for found in _ERRORS]
)
def test_documented_errors_are_right(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _compose(shlex.split(arguments), monkeypatch) == 2
    assert capsys.readouterr().err == f"{message}\n"


# -- generated parts, tables, links --------------------------------------------------------------------------------


def test_the_configuration_reference_is_up_to_date() -> None:
    page = (DOCS / "reference" / "configuration.md").read_text(encoding="utf-8")
    assert page == generate().configuration(), "run python docs/generate.py"


@pytest.mark.slow
def test_the_graph_listings_are_up_to_date(tmp_path: Path) -> None:
    generate().graphs(tmp_path)
    assert (tmp_path / "ffn.svg").exists()
    for path in (*tmp_path.glob("*.txt"), tmp_path / "types.md"):
        shown = (DOCS / "assets" / path.name).read_text(encoding="utf-8")
        assert shown == path.read_text(encoding="utf-8"), "run python docs/generate.py"


def test_the_table_of_ops_is_complete() -> None:
    import torch

    from moecompile import ops  # noqa: F401  (registers the ops)

    page = (DOCS / "understand" / "how-it-works.md").read_text(encoding="utf-8")
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moecompile::")}
    missing = sorted(name for name in registered if f"`{name.removeprefix('moecompile::')}`" not in page)
    assert registered and not missing


def test_the_page_of_the_floors_is_up_to_date() -> None:
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    (floors,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert "\n".join(floors) in (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    page = (DOCS / "understand" / "architecture.md").read_text(encoding="utf-8")
    floors_said, _, rooms_said = page.partition("## Rooms")
    shown = [re.findall(r"`(\w+)`", cell) for cell in re.findall(r"^\| \d+ \| ([^|]+) \|", floors_said, re.MULTILINE)]
    assert shown == [floor.split(" | ") for floor in floors]
    described = re.findall(r"`(\w+)/?`", " ".join(re.findall(r"^\| ([^|]+) \|", rooms_said, re.MULTILINE)))
    assert sorted(described) == sorted(room for rooms in shown for room in rooms)


@pytest.mark.parametrize("path", sorted((DOCS / "decisions").glob("0*.md")), ids=lambda path: path.stem)
def test_every_decision_has_the_same_sections(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    title, status, *_ = page.split("\n\n")
    assert title.startswith(f"# {path.name[:4]}: ")
    assert status.startswith("**Status:** ")
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert headings == ["Question", "Decision", "For", "Against", "What would change it"]
    parts = re.split(r"^## .+$", page, flags=re.MULTILINE)[1:]
    assert all(part.strip() for part in parts)
    assert f"[{path.name[:4]}]({path.name})" in (path.parent / "index.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """As paths from the checkout, or from the package: `docs/generate.py`, `match/ffn.py`."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    named = {name for name in re.findall(r"`([\w/]+/[\w/]+\.(?:py|cpp|yaml|json))`", prose) if "KIND" not in name}
    roots = (REPOSITORY, REPOSITORY / "moecompile", DOCS / "examples" / "configs")
    assert sorted(name for name in named if not any((root / name).exists() for root in roots)) == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_into_the_checkout_resolve(name: str) -> None:
    targets = re.findall(r"(?:\]\(|src=\")([^)#\s\"]+)", (REPOSITORY / name).read_text(encoding="utf-8"))
    missing = [target for target in targets if ":" not in target and not (REPOSITORY / target).exists()]
    assert not missing


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for plugin in ("mkdocs", "mkdocstrings", "mkdocs_jupyter"):
        pytest.importorskip(plugin)
    run("-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site"), cwd=REPOSITORY)
    assert (tmp_path / "site" / "reference" / "configuration.html").exists()
    fetched = re.compile(
        r'<(?:script|img|iframe|source|link (?!rel="canonical"))[^>]*?(?:src|href)="(?:https?:)?//[^"]+"'
    )
    pages = {path: path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")}
    assert len(pages) > 60
    assert [(path.name, tag) for path, page in pages.items() for tag in fetched.findall(page)] == []


# -- what a run leaves behind --------------------------------------------------------------------------------------

TINY = [
    "model.config.num_hidden_layers=2", "model.config.hidden_size=32", "model.config.intermediate_size=64",
    "model.config.num_attention_heads=2", "model.config.num_key_value_heads=2", "data.vocab_size=300",
    "data.seq_len=32", "data.micro_batch_size=2", "data.global_batch_size=2", "data.val_batches=1",
    "trainer.max_steps=2", "trainer.progress_bar=false", SHORT,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("task", ["plan", "compile", "train"])
def test_every_file_and_every_result_is_explained(task: str, tmp_path: Path) -> None:
    run("-m", "moecompile", f"task={task}", *TINY, "hydra.run.dir=out", cwd=tmp_path)
    page = (DOCS / "use" / "command-line.md").read_text(encoding="utf-8")
    _, _, files = page.partition("## The run directory")
    files, _, results = files.partition("## result.json")
    results, _, _ = results.partition("## Exit codes")
    keys = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [key for key in keys if f"`{key}`" not in results] == []
    assert [path.name for path in (tmp_path / "out").iterdir() if f"`{path.name}" not in files] == []


def test_the_plan_of_the_demo_is_the_one_that_is_shown(tmp_path: Path) -> None:
    printed = run("-m", "moecompile", "task=plan", "recipe=deepseek_ep", cwd=tmp_path)
    (shown,) = (block.text for block in BLOCKS if block.text.startswith("plan  "))
    loading, *lines = [line.rstrip() for line in printed.strip().splitlines()]
    assert loading == "deepseek_ep: plan, loading torch ..."
    assert lines == shown.strip().splitlines()
