"""The site: reference pages are complete and fresh, nothing is fetched from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import moecompile
from moecompile.compose import compose_config
from moecompile.errors import UserError
from moecompile.schema import validate

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"


@cache
def module_of_docs(name: str) -> ModuleType:
    """docs/NAME.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


def test_the_api_page_has_every_public_name_once() -> None:
    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: moecompile\.(\w+)$", page, re.MULTILINE)) == sorted(moecompile.__all__)


def test_the_pictures_of_concepts_are_up_to_date(tmp_path: Path) -> None:
    module_of_docs("draw").draw(tmp_path)
    page = (DOCS / "understand" / "concepts.md").read_text(encoding="utf-8")
    for path in tmp_path.iterdir():
        shown = (DOCS / "assets" / "concepts" / path.name).read_text(encoding="utf-8")
        assert shown == path.read_text(encoding="utf-8"), "run python docs/generate.py"
        assert f'--8<-- "docs/assets/concepts/{path.name}"' in page


# -- messages ----------------------------------------------------------------------------------------------------------


def listed() -> list[re.Pattern[str]]:
    """The messages of the page, with anything in place of `…`."""
    page = (DOCS / "reference" / "messages.md").read_text(encoding="utf-8")
    texts = [line[2:].strip("` ") for line in page.splitlines() if line.startswith("* ")]
    return [re.compile(".*".join(map(re.escape, text.split("…")))) for text in texts]


def test_the_page_of_messages_is_up_to_date() -> None:
    page = (DOCS / "reference" / "messages.md").read_text(encoding="utf-8")
    assert page == module_of_docs("messages").page(), "run python docs/generate.py"


def test_only_repeated_errors_are_not_on_the_page_of_messages() -> None:
    """What an error, a misfit or a failure said elsewhere is listed there."""
    import ast

    unlisted = [ast.unparse(call) for call, made in module_of_docs("messages").found() if not made]
    own = [text for text in unlisted if not re.search(r"\b(error|misfit|failure)\b|_one_line\(text\)", text)]
    assert own == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["mesh.ep=3", "mesh=cpu_1x4"], ["mesh.epp=3"], ["mesh=nowhere"], ["trainer.max_steps=-1"], ["routing.max_nodes=3", "mesh=cpu_2x2"],
        ["experts.num_routed=many"], ["balance.rule=quantile", "routing.score=sqrt_softplus"], ["mesh.tp=3", "mesh=cpu_1x4"],
        ["balance.recenter=true"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_message_is_found_on_the_page(overrides: list[str]) -> None:
    try:
        validate(compose_config(overrides))
    except UserError as error:
        said = str(error)
    else:
        pytest.fail(f"{overrides} is accepted")
    assert any(pattern.fullmatch(said) and len(pattern.pattern) > 40 for pattern in listed()), said


# -- prose -------------------------------------------------------------------------------------------------------------

_NO_KEYS = {"bench.json", "mesh.py", "model.layers", "trainer.strategy"}


def test_keys_that_pages_name_exist() -> None:
    """`group.key` between backticks, for the groups of the config."""
    config = compose_config()
    groups = "|".join(each.name for each in fields(config) if is_dataclass(getattr(config, each.name)))
    unknown = []
    for page in (REPOSITORY / "README.md", *DOCS.rglob("*.md")):
        if page.parent.name not in ("decisions", "assets"):
            for group, key in re.findall(rf"`({groups})\.(\w+)[^`\s(]*`", page.read_text(encoding="utf-8")):
                if not hasattr(getattr(config, group), key) and f"{group}.{key}" not in _NO_KEYS:
                    unknown.append(f"{page.name}: {group}.{key}")
    assert unknown == []


def test_the_table_of_extras_is_complete() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    page = (DOCS / "getting-started.md").read_text(encoding="utf-8")
    _, _, section = page.partition("## Extras")
    rows = " ".join(re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE)).replace("`pip install -e '.[NAME]'`", "")
    assert sorted(re.findall(r"`(\w+)`", rows)) == sorted(project["optional-dependencies"])


def test_the_documented_line_completes_in_bash() -> None:
    page = (DOCS / "use" / "command-line.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^eval .*$", page, re.MULTILINE)
    script = f"""{line}
COMP_LINE="moecompile recipe=deep"; COMP_POINT=22; COMP_WORDS=(moecompile recipe=deep); COMP_CWORD=1
hydra_bash_completion
printf "%s\\n" "${{COMPREPLY[@]}}"
"""
    environ = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["recipe=deepseek_ep", "recipe=deepseek_v2", "recipe=deepseek_v4"]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_anchors_of_links_into_the_docs_exist(name: str) -> None:
    """Those between pages of the site are checked by mkdocs."""
    missing = []
    for path, anchor in re.findall(
        r"\]\((docs/[^)#\s]+\.md)#([^)\s]+)\)", (REPOSITORY / name).read_text(encoding="utf-8")
    ):
        headings = re.findall(r"^#+ (.+)$", (REPOSITORY / path).read_text(encoding="utf-8"), re.MULTILINE)
        slugs = [re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings]
        if anchor not in slugs:
            missing.append(f"{path}#{anchor}")
    assert missing == []
