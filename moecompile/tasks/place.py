"""task=place: which rank gets which experts, from the loads of a run. In one process; needs no model and no ranks."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from moecompile.errors import ConfigError
from moecompile.plan import read
from moecompile.planner.given import plan_file
from moecompile.planner.loads import loads_of
from moecompile.planner.placement import FILE, make_placement, write_placement
from moecompile.report.plan_tables import placement_fields, print_placement
from moecompile.report.result import write_result
from moecompile.rundir import accept
from moecompile.schema import Config, mesh_spec


def run(config: Config, run_dir: Path) -> None:
    """Writes `placement.yaml` and `result.json`, and prints the fullest rank of each layer before and after."""
    source = config.place.run
    if source is None:
        raise ConfigError("place.run", None, "names no run", "Give the directory of a run that has trained")
    path = Path(source).absolute()
    plan = read(plan_file(str(path if path.is_dir() else path.parent), "place.run"))
    has_mesh = any(key == "mesh" or key.startswith("mesh.") for key in config.given)
    mesh = mesh_spec(config.mesh) if has_mesh else plan.mesh
    layers = make_placement(plan, loads_of(path, plan, config.place.steps), mesh.ep, mesh.nodes_per_ep_group)
    accept(run_dir)
    file = run_dir / FILE
    write_placement(file, layers)
    console = Console()
    print_placement(layers, console)
    console.print()
    console.print(Text(f"mesh.placement={file}"), soft_wrap=True)
    write_result(run_dir, "place", config.name, {"file": str(file), "ep": mesh.ep, **placement_fields(layers)})
