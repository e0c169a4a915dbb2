"""`mesh.ep=search` on the command line: the layout is chosen before ranks are started, so that all have the same."""

from __future__ import annotations

from moecompile import waiting
from moecompile.models.build import example_inputs
from moecompile.models.sharded import loads_sharded, structure_of
from moecompile.models.source import source_model
from moecompile.pipeline.captured import planning_facts
from moecompile.pipeline.shape import shape_of_model
from moecompile.planner.search.chosen import EP, choose_layout
from moecompile.report.text import seconds_text
from moecompile.schema import SEARCHED, Config, ExpertInit, TaskName, validate
from moecompile.tasks.inputs import check_inputs

_WITHOUT = (TaskName.export, TaskName.place, TaskName.data, TaskName.chat)


def with_layout(config: Config) -> Config:
    """The config with the layout of least predicted time, which is printed; unchanged if the task needs no mesh.

    Raises:
        ConfigError: the config is wrong, or no layout fits.
    """
    if config.task.name in _WITHOUT:
        return config
    validate(config)
    check_inputs(config)
    waiting.show(f"{EP}={SEARCHED}: loading the model", line=False)
    world = config.mesh.num_nodes * config.mesh.ranks_per_node
    is_sharded = loads_sharded(config, world) and config.experts.init is not ExpertInit.widen
    model = structure_of(config) if is_sharded else source_model(config)  # as ranks do, without the weights
    sites, facts = planning_facts(model, config, example_inputs(model, config.data.seq_len))
    choice = choose_layout(sites, facts, config, lambda plan: shape_of_model(model, plan))
    waiting.done()
    assert choice is not None
    why = "needs the least memory, none fits"
    if choice.seconds is not None:
        seconds = seconds_text(choice.seconds)
        why = f"the fastest of {choice.layouts} layouts, {seconds} a step predicted; task=search varies more"
    print(f"{EP}={SEARCHED}: {choice.settings}  ({why})", flush=True)
    return choice.config
