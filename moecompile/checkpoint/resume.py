"""What a config takes from the checkpoint that it goes on from, before any rank is started. Needs no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moecompile.checkpoint.folders import AUTO, PLAN, STATE, find
from moecompile.checkpoint.state import check_settings, read_state
from moecompile.checkpoint.sums import check
from moecompile.plan import load
from moecompile.schema import Config, TaskName


def resumed(config: Config, run_dir: Path) -> Config:
    """`config` with the routing groups that the checkpoint has frozen; itself if it begins a run.

    `routing.groups=auto` follows the mesh only once: groups belong to the model, and another mesh must not change it.

    Raises:
        ConfigError: no such checkpoint, one of another run, or one with more steps.
    """
    resume = config.trainer.resume
    if resume is None or config.task.name is not TaskName.train:
        return config
    folder = find(resume, run_dir)
    if folder is None:
        return config
    check(folder, [STATE, PLAN])
    check_settings(read_state(folder), config, folder)
    config = replace(config, trainer=replace(config.trainer, resume=AUTO if resume == AUTO else str(folder)))
    layers = [layer for layer in load(folder / PLAN).layers if layer.experts.init != "existing"]
    frozen = {(layer.routing.groups, layer.routing.top_groups) for layer in layers}
    if config.routing.groups != "auto" or len(frozen) != 1:
        return config
    groups, top_groups = frozen.pop()
    limit = config.routing.top_groups or (top_groups if top_groups < groups else None)
    return replace(config, routing=replace(config.routing, groups=groups, top_groups=limit))
