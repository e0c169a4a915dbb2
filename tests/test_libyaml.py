"""YAML by libyaml: the values, and the messages, are PyYAML's."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf, _utils

from moecompile.compose import compose_config
from moecompile.compose.typed import read_by_libyaml
from moecompile.libyaml import by_libyaml, load_yaml

REPOSITORY = Path(__file__).parents[1]
SHIPPED = [*sorted((REPOSITORY / "conf").rglob("*.yaml")), *sorted((REPOSITORY / "recipes").rglob("*.yaml"))]
WRONG = [
    "a: [1,",
    "a: 'b",
    "a:\n\t- 1",
    "a: &x 1\nb: *y",
    "a: 1: 2",
    "- 1\nb: 2",
    "a: !!python/name:os.system x",
    "\ud800",
]


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml")
def test_shipped_configs_have_the_same_values() -> None:
    omegaconfs = _utils.get_yaml_loader()
    for path in SHIPPED:
        text = path.read_text(encoding="utf-8")
        assert load_yaml(text) == yaml.safe_load(text), path
        assert yaml.load(text, Loader=by_libyaml(omegaconfs)) == yaml.load(text, Loader=omegaconfs), path
    assert by_libyaml(omegaconfs) is not omegaconfs


@pytest.mark.parametrize("text", WRONG)
def test_what_is_refused_has_the_same_message(text: str) -> None:
    with pytest.raises((yaml.YAMLError, ValueError)) as own:
        yaml.safe_load(text)
    with pytest.raises(type(own.value)) as ours:
        load_yaml(text)
    assert str(ours.value) == str(own.value)


def test_the_message_names_the_file_and_what_omegaconf_alone_refuses(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("a: 1\na: 2\n")
    with pytest.raises(yaml.YAMLError) as own:
        OmegaConf.load(path)
    with read_by_libyaml(), pytest.raises(yaml.YAMLError) as ours:
        OmegaConf.load(path)
    assert str(ours.value) == str(own.value) and str(path) in str(ours.value) and "duplicate key" in str(ours.value)


def test_deep_nesting_ends_as_in_pyyaml() -> None:
    with pytest.raises(RecursionError):
        load_yaml("[" * 100_000)


def test_a_composition_leaves_omegaconf_as_it_was() -> None:
    before = _utils.get_yaml_loader
    compose_config(["mesh=cpu_1"])
    assert _utils.get_yaml_loader is before
