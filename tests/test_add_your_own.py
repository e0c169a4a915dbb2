"""docs/use/add-your-own.md lists every file of the package that a new dispatch kind or axis touches, and shows a plugin.

The page marks each list with a word that exists already, `<!-- files that name: allgather -->`. Whoever adds a file that
names it, or takes one away, changes the table below that line.
"""

from __future__ import annotations

import ast
import json
import mailbox
import re
from collections.abc import Iterator
from dataclasses import asdict, make_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import moecompile
from moecompile import mesh as mesh_table
from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec
from moecompile.named_code import load_plugins
from moecompile.nn import Router
from moecompile.passes import lower
from moecompile.passes.base import exchanges_of
from moecompile.passes.lower import Lower
from moecompile.passes.rewrite import Rewrite
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.plan import DispatchPlan, Plan, dispatch
from moecompile.planner import traffic
from moecompile.routing import BalanceSpec, RouterConfig
from moecompile.runtime.groups import Groups
from moecompile.schema import DispatchKind, MeshConfig
from moecompile.schema import validation as mesh_rules
from tests.distributed.harness import run_distributed_test
from tests.forked import python
from tests.tiny import COPY4, PLAIN_ROUTING, Gated, config, only_region, passed, plan_for, trace

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "moecompile"
PAGE = (REPOSITORY / "docs" / "use" / "add-your-own.md").read_text(encoding="utf-8")

_TABLE = re.compile(r"^<!-- files that name: (\w+) -->\n\n((?:\|.*\n)+)", re.MULTILINE)
TABLES = {found[1]: found[2] for found in _TABLE.finditer(PAGE)}
_DESCRIBED = (
    "planner/cost_model/", "planner/search/", "schema/ranges.py", "schema/workload.py", "bench/",
)  # fmt: skip
"""These name axes of layouts that are described, not run (`workload.cp`)."""
_OTHERS = "imports/"
"""Here words of other systems' configs stand."""


def listed(word: str) -> set[str]:
    """The files of the table, `KIND.py` being the word's own."""
    rows = re.findall(r"^\| `([^`]+)` \|", TABLES[word], re.MULTILINE)
    return {row.replace("KIND", word) for row in rows}


def naming(word: str) -> set[str]:
    """The files of the package whose code names the word, or which bear its name."""
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.stem == word or any(re.search(rf"\b{word}\b", name) for name in _names(path.read_text("utf-8")))
        if not path.relative_to(PACKAGE).as_posix().startswith(_OTHERS)
        if word not in ("cp", "tp") or not path.relative_to(PACKAGE).as_posix().startswith(_DESCRIBED)
    }


def _names(code: str) -> Iterator[str]:
    """Texts and names in code; docstrings and comments are left out."""
    tree = ast.parse(code)
    prose = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            yield node.value
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id


def test_the_lists_are_there() -> None:
    assert set(TABLES) == {"allgather", "cp"}


@pytest.mark.parametrize("word", TABLES)
def test_the_page_lists_the_files_that_name_one(word: str) -> None:
    assert listed(word) == naming(word)


@pytest.mark.parametrize("word", TABLES)
def test_the_functions_and_tables_to_change_are_in_these_files(word: str) -> None:
    for path, what in re.findall(r"^\| `([^`]+)` \| (.*) \|$", TABLES[word], re.MULTILINE):
        code = (PACKAGE / path.replace("KIND", word)).read_text(encoding="utf-8")
        names = re.findall(r"`(_?[a-z]+(?:_[a-z]+)+|_[a-z]+|_?[A-Z]+)`", what)
        assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []


def test_tensor_parallelism_is_in_the_same_files_and_in_its_own() -> None:
    own = {"nn/context.py": "nn/split.py"}
    assert naming("tp") == {own.get(path, path.replace("context_parallel", "tensor_parallel")) for path in listed("cp")}


def test_a_name_in_code_counts_and_prose_does_not() -> None:
    code = '"""one: prose."""\nkind = "two"  # three\n\n\ndef f():\n    """four"""\n    return kind.five\n'
    assert sorted(_names(code)) == ["five", "kind", "kind", "two"]


def test_the_dispatch_on_the_page_inserts_its_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows and the functions as they are printed, between the contracts of `lower`."""
    rows: dict[str, dict[str, Any]] = {}
    for module, table, first in (
        (dispatch, "KINDS", "KINDS = {"), (lower, "LOWERINGS", "def lower_gather"), (traffic, "_SENT", "def _gather_copies"),
    ):  # fmt: skip
        (code,) = re.findall(rf"^```text\n({re.escape(first)}.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
        rows[table] = dict(vars(module))
        exec(compile(code.replace("    ...\n", ""), "docs/use/add-your-own.md", "exec", dont_inherit=True), rows[table])
        monkeypatch.setitem(getattr(module, table), "gather", rows[table][table]["gather"])
    (layer,) = plan_for(Gated(), [*COPY4, "mesh.ranks_per_node=2"]).layers
    layer = replace(layer, dispatch=DispatchPlan(kind="gather"), fused=False)
    assert len(exchanges_of(passed(only_region(Gated()), layer, Rewrite(), Lower()).graph)) == 4
    sizes = traffic.Wire(d_model=8, tokens_per_rank=16)
    one_node = MeshSpec(num_nodes=1, ranks_per_node=2, ep=2)
    sent = {
        kind: traffic.forward_traffic(kind, layer.placement, layer.routing, one_node, sizes)
        for kind in ("gather", "allgather")
    }
    assert sent["gather"] == sent["allgather"]  # on one node there is one level


def test_every_kind_has_its_rows() -> None:
    kinds = {kind.value for kind in DispatchKind if kind is not DispatchKind.auto}
    assert {*dispatch.KINDS} == {*lower.LOWERINGS} == {*traffic._SENT} == kinds


PLUGIN = "docs/examples/my_plugin.py"


def test_the_score_on_the_page_routes(own_plugins: None) -> None:
    with pytest.raises(ConfigError, match=r"routing\.score=softplus: must be one of .* a module of plugins=\[MODULE\]"):
        RouterConfig(**{**PLAIN_ROUTING, "score": "softplus"})
    load_plugins([str(REPOSITORY / PLUGIN)])
    load_plugins([str(REPOSITORY / PLUGIN)])  # as `compile_model` does for each of its calls
    config = RouterConfig(**{**PLAIN_ROUTING, "score": "softplus"})
    router = Router(8, 4, config, BalanceSpec(rule="none", rate=0.0, micro_batch=0.1)).train()
    torch.nn.init.normal_(router.weight)
    x_TD = torch.randn(6, 8)
    weights_TK, ids_TK = router(x_TD)
    scores_TE = nn.functional.softplus(router.logits(x_TD))
    best = scores_TE.topk(2, sorted=False)
    assert torch.equal(ids_TK, best.indices)
    torch.testing.assert_close(weights_TK, best.values / best.values.sum(1, keepdim=True))
    assert router.aux_loss is not None and router.aux_loss.isfinite()


@pytest.mark.slow
def test_the_plugin_on_the_page_trains_on_ranks_and_is_verified(tmp_path: Path) -> None:
    """`task=verify` compares gradients of two ranks with those of one process; the run has the pass, the plan the score, and its
    data are read by the reader.
    """
    words = ["recipe=mixtral_ep", "mesh=cpu_1x2", f"plugins=[{PLUGIN}]", "routing.score=softplus"]
    verified = python("-m", "moecompile", *words, "task=verify", f"hydra.run.dir={tmp_path}/verify", cwd=REPOSITORY)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    checks = json.loads((tmp_path / "verify" / "certificate.json").read_text())["checks"]
    assert all(check["passed"] for check in checks)
    assert {"float64: gradients of router", "float64: gradients of experts"} <= {check["name"] for check in checks}
    mails = mailbox.mbox(tmp_path / "mails.mbox")
    for i in range(300):
        mails.add(f"Subject: {i}\n\n" + f"Call me Ishmael, said number {i} of the crew, and sat down. " * 30)
    mails.close()
    words += ["data=corpus", f"data.path={tmp_path}/mails.mbox", "data.vocab_size=300", f"data.cache={tmp_path}/cache"]
    short = ["trainer.max_steps=1", "optimizer.warmup_steps=0", "trainer.sample_interval=0", "data.val_batches=1"]
    trained = python("-m", "moecompile", *words, *short, f"hydra.run.dir={tmp_path}/run", cwd=REPOSITORY)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert re.search(r"clamp_rows .* \+4 clamp \(outputs in \[-1, 1\]\)", trained.stdout)
    assert re.search(r"^data +1 file, 300 documents", trained.stdout, re.MULTILINE)
    assert "score: softplus" in (tmp_path / "run" / "plan.yaml").read_text()
    again = [word for word in words if "plugins" not in word]
    resumed = python(
        "-m", "moecompile", *again, *short, "trainer.resume=auto", f"hydra.run.dir={tmp_path}/run", cwd=REPOSITORY
    )  # fmt: skip
    assert resumed.returncode == 2 and f"plugins: ['{PLUGIN}'] in the checkpoint, [] here" in resumed.stderr


def with_outer(patch: pytest.MonkeyPatch) -> type[MeshSpec]:
    """Adds the axis on the page, by its row and its two fields; the class of meshes that have it."""
    (row,) = re.findall(r'^    (Axis\(name="dp_outer".*\)),$', PAGE, re.MULTILINE)
    at = [axis.name for axis in mesh_table.AXES].index("dp_replicate")
    patch.setattr(mesh_table, "AXES", (*mesh_table.AXES[:at], eval(row, vars(mesh_table)), *mesh_table.AXES[at:]))
    spec: type[MeshSpec] = make_dataclass(
        "MeshSpec", [("dp_outer", int, 1)], bases=(MeshSpec,), frozen=True, kw_only=True
    )
    patch.setattr(mesh_rules, "MeshSpec", spec)
    return spec


def plan_on(outer: int, *overrides: str) -> Plan:
    settings = config(*COPY4, "mesh.num_nodes=2", "mesh.ranks_per_node=2", *overrides)
    kind = make_dataclass("MeshConfig", [("dp_outer", int, 1)], bases=(MeshConfig,), kw_only=True)
    settings.mesh = kind(**vars(settings.mesh), dp_outer=outer)
    return moecompile.make_plan(trace(Gated()), settings)


def test_the_axis_on_the_page_is_planned_as_the_replicas_that_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with_outer(monkeypatch)
    ours, plain = plan_on(2, "mesh.ep=2"), plan_on(1, "mesh.ep=2", "mesh.dp_replicate=2")
    assert ours.estimate == plain.estimate
    renamed = [
        {
            name: tuple("dp_outer" if each == "dp_replicate" else each for each in axes)
            for name, axes in asdict(r).items()
        }
        for r in plain.reductions
    ]
    assert [{**asdict(r), "parameters": tuple(r.parameters)} for r in ours.reductions] == renamed
    both, four = plan_on(2, "mesh.ep=1", "mesh.dp_replicate=2"), plan_on(1, "mesh.ep=1", "mesh.dp_replicate=4")
    assert both.estimate == four.estimate
    assert both.mesh.dims(("dp_outer", "dp_replicate")) == {"dp_outer_dp_replicate": 4}
    assert [both.mesh.batch_index(rank) for rank in range(4)] == [0, 1, 2, 3]
    assert both.mesh.group("dp_outer", rank=1) == (1, 3)
    with pytest.raises(
        ConfigError, match=r"^mesh\.dp_outer=4: must divide the number of expert copies, world / ep = 2 "
    ):
        plan_on(4, "mesh.ep=2")


def _on_ranks(rank: int, world_size: int, sizes: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Gradients, sums of them over all ranks that replicate a part."""
    with pytest.MonkeyPatch.context() as patch:
        with_outer(patch)
        torch.manual_seed(0)
        plan = plan_on(sizes[0], "mesh.ep=1", f"mesh.dp_replicate={sizes[1]}")
        model = moecompile.transform(trace(Gated()), plan).train()
        shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
        groups = Groups.of(plan.mesh, "cpu")
        assert groups.tokens is groups.every and groups.batch_index == rank
        model(torch.randn(world_size, 5, 8)[rank]).square().sum().backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return {name: (grad.full_tensor() if isinstance(grad, DTensor) else grad) for name, grad in grads.items()}


@pytest.mark.slow
def test_the_axis_on_the_page_replicates_on_ranks() -> None:
    both, four = (run_distributed_test(_on_ranks, 4, sizes)[0] for sizes in ((2, 2), (1, 4)))
    assert "experts.down_proj" in both and both.keys() == four.keys()
    for name, grad in both.items():
        torch.testing.assert_close(grad, four[name], msg=name)
