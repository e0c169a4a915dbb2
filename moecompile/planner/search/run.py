"""The whole search: candidates that run and described ones, their fronts, and what was kept.

Algorithm:
  1. The plan of the config as it is: what training must not change.
  2. Layouts that this package runs (runnable.py), then described ones (described.py).
  3. The front of speed against memory of each kind; the fastest of each is best.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec
from moecompile.plan import IN_FLIGHT, Plan, PlannedSite
from moecompile.planner.build_plan import GIB, draft_plan
from moecompile.planner.cost_model.inputs import REPEATED, SAID_BY_MESH, Inputs, inputs_of
from moecompile.planner.cost_model.shapes import ModelShape
from moecompile.planner.params import ModelFacts
from moecompile.planner.search.axes import KINDS, axes_of
from moecompile.planner.search.described import Described, Space, described, settings_of, space_of
from moecompile.planner.search.found import Candidate, Reason, Rejected, front
from moecompile.planner.search.runnable import Search, as_run, runnable
from moecompile.schema import Config


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result. considered, fitting: candidates. cpu_seconds: of the search. kept: axis -> why it was not searched.

    runs, described: fronts, the fastest first. rejected: reasons, the most frequent first. least: (bytes, settings) of
    the smallest layout that this package runs and that does not fit.
    """

    considered: int
    fitting: int
    cpu_seconds: float
    kept: dict[str, str]
    runs: list[Candidate]
    described: list[Candidate]
    rejected: list[Reason]
    least: tuple[int, dict[str, object]] | None


def search(
    sites: Sequence[PlannedSite],
    facts: ModelFacts,
    config: Config,
    shape: Callable[[Plan], ModelShape],
    *,
    rounds: bool,
) -> Found:
    """Searches for layouts.

    Args:
        sites, facts: of the model. config: with `data` of the workload, and its batch before rounding.
        shape: a plan's shape for the time model. rounds: whether the batch may be rounded up, as a published one is.

    Raises:
        ConfigError: the config itself cannot be planned, or `search.axes` names something else.
    """
    start = time.process_time()
    plan, _ = draft_plan(sites, config, facts)  # Step 1
    axes = axes_of(config, plan.layers, plan.mesh.ep)
    rejected = Rejected()
    searched = Search(
        sites=sites, facts=facts, config=config, layers=plan.layers, shape=shape, axes=axes, rounds=rounds
    )
    ours = list(runnable(searched, rejected))  # Step 2
    others = list(_described(searched, plan, rejected)) if axes.layout else []
    least = None if rejected.least is None else (rejected.least[0], dict(rejected.least[1]))
    return Found(
        considered=len(ours) + len(others) + rejected.total, fitting=len(ours) + len(others),
        cpu_seconds=time.process_time() - start, kept=axes.kept, runs=front(ours), described=front(others),  # Step 3
        rejected=rejected.listed, least=least,
    )  # fmt: skip


def _described(search: Search, plan: Plan, rejected: Rejected) -> Iterator[Candidate]:
    config, axes = search.config, search.axes
    as_config = replace(config, workload=as_run(config.workload))
    inputs = inputs_of(search.shape(plan), plan, as_config)
    space = _space(search, plan, inputs)
    if "overlap" not in axes.kept:
        inputs = replace(inputs, software=replace(inputs.software, in_flight="none", chunks=1))
    for each in described(inputs, space, config.hardware.memory_gib * GIB, rejected):
        yield Candidate(
            settings=_settings(each, search), runs=False, seconds=each.seconds, memory_bytes=each.memory,
            tokens_per_second_per_rank=each.layout.global_batch * each.layout.seq / each.layout.gpus / each.seconds,
        )  # fmt: skip


def _space(search: Search, plan: Plan, inputs: Inputs) -> Space:
    """The sizes that are searched: those of the axes that are not kept."""
    config, axes = search.config, search.axes
    space = space_of(inputs, config.data.global_batch_size)
    kinds: Sequence[str] = [kind for kind in KINDS if kind in IN_FLIGHT or inputs.software.in_flight == "none"]
    if "dispatch" in axes.kept:
        kinds = [inputs.software.dispatcher]
    said = _said(search)
    tp = config.mesh.tp if "tp" in said else 1
    recompute = {"": inputs.software.recompute}
    if "checkpointing" not in axes.kept:
        recompute = {name: REPEATED[name] for name in axes.checkpointing}
    return replace(
        space, ep=[ep for ep in axes.ep if _on_nodes(plan.mesh, ep, tp)], kinds=kinds, recompute=recompute,
        micro_batch=[n for n in axes.micro_batch if n <= 8 or len(axes.micro_batch) == 1],
        ran=[tp for tp in axes.sharing["tp"] if _splits(search, tp)],
        tp=[tp] if "tp" in said else space.tp, cp=[config.mesh.cp] if "cp" in said else space.cp,
        ran_cp=config.mesh.cp,
    )  # fmt: skip


def _said(search: Search) -> list[str]:
    """Sizes that the mesh says and keeps; a described layout has them too, and does not say them again."""
    kept = {"tp": "tp" in search.axes.kept, "cp": True}
    return [name for name in SAID_BY_MESH if kept[name] and getattr(search.config.mesh, name) > 1]


def _on_nodes(mesh: MeshSpec, ep: int, tp: int) -> bool:
    """Whether a mesh may have these sizes."""
    with suppress(ConfigError):
        replace(mesh, ep=ep, tp=tp, dp_replicate=1)
        return True
    return False


def _splits(search: Search, tp: int) -> bool:
    """Whether the runtime splits this model over tp."""
    config = replace(search.config, mesh=replace(search.config.mesh, tp=tp, ep=1, dp_replicate=1, dp_shard="auto"))
    with suppress(ConfigError):
        draft_plan(search.sites, config, search.facts)
        return True
    return False


def _settings(found: Described, search: Search) -> dict[str, object]:
    settings = {"mesh.tp": 1, "mesh.dp_replicate": 1, **settings_of(found.layout), "dispatch.overlap": "none"}
    settings["dispatch.kind"] = found.software.dispatcher
    if found.recompute:
        settings["trainer.checkpointing"] = found.recompute
    settings |= {f"workload.{name}": 1 for name in _said(search)}
    chosen = search.axes.chosen(settings)
    return {**chosen, **{key: value for key, value in settings.items() if key.startswith("workload.")}}
