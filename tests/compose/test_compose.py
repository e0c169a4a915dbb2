"""Composition from Python: precedence, typed results, errors that say what to change, the caller's own Hydra."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from moecompile.compose import CONFIG_DIR_VARIABLE, compose_config, conf_dir, load_resolved, save_resolved
from moecompile.errors import ConfigError, UserError
from moecompile.schema import BalanceRule, Config, DispatchKind, PerLayerConfig, TaskName, validate

RECIPES = sorted(path.stem for path in (conf_dir() / "recipe").glob("*.yaml"))
GROUPS = sorted(path.name for path in conf_dir().iterdir() if path.is_dir() and path.name != "recipe")
OPTIONS = [f"{group}={path.stem}" for group in GROUPS for path in sorted((conf_dir() / group).glob("*.yaml"))]


@pytest.fixture
def my_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes `recipe/mine` and the like to a config folder that the environment names."""
    monkeypatch.setenv(CONFIG_DIR_VARIABLE, str(tmp_path))

    def write(name: str, text: str) -> None:
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# @package _global_\n{text}" if name.startswith("recipe/") else text)

    return write


# -- what is shipped -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_resolves_to_its_golden_config(recipe: str, tmp_path: Path, bless: Callable[[str, str], None]) -> None:
    config = compose_config([f"recipe={recipe}"])
    validate(config)
    save_resolved(config, tmp_path / "resolved.yaml")
    bless(f"configs/{recipe}.yaml", (tmp_path / "resolved.yaml").read_text())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_names_itself_and_says_how_to_run_it(recipe: str) -> None:
    text = (conf_dir() / "recipe" / f"{recipe}.yaml").read_text()
    comment = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert text.startswith("# @package _global_\n")
    assert f"python -m moecompile recipe={recipe}\n" in comment
    for word in ("hardware:", "time:", "expected loss:"):
        assert re.search(rf"{word} *\S", comment), word
    content = yaml.safe_load(text)
    assert content["name"] == recipe
    assert "model" not in content, "a recipe selects a model and never sets its values"


def test_the_defaults_are_a_dense_nano_model_in_one_process() -> None:
    config = compose_config()
    validate(config)
    assert (config.name, config.model.name, config.task.name) == ("default", "llama_nano", TaskName.train)
    assert config.mesh.num_nodes * config.mesh.ranks_per_node == 1
    assert config.hardware.name == "laptop"


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes(option: str) -> None:
    compose_config([option])


def test_every_option_gives_all_of_its_keys_so_that_the_file_shows_what_holds() -> None:
    """But where a group has parts that only some options need (`mesh`, `model`, `optimizer.muon`, `hardware.host`) or none (`balance`, `routing`)."""
    for group in ("experts", "data", "optimizer", "trainer", "hardware"):
        keys = set(vars(getattr(Config(), group)))
        for path in (conf_dir() / group).glob("*.yaml"):
            given = yaml.safe_load(path.read_text())
            assert set(given) == keys - {"muon", "host"} | {given.get("kind")} & {"muon"}, path


def test_routing_presets_say_what_differs_from_the_schema() -> None:
    keys = vars(Config().routing)
    for path in (conf_dir() / "routing").glob("*.yaml"):
        preset = yaml.safe_load(path.read_text())
        same = {key for key, value in preset.items() if getattr(keys[key], "value", keys[key]) == value}
        assert same <= {"top_k", "score"}, path  # which say what it is


def test_the_model_takes_its_vocabulary_and_length_from_the_data() -> None:
    for model in ("llama_nano", "deepseek_nano"):
        config = compose_config([f"model={model}", "data.vocab_size=512", "data.seq_len=64"])
        assert config.model.config["vocab_size"] == 512
        assert config.model.config["max_position_embeddings"] == 64


def test_deepseek_nano_stays_dense_at_any_depth() -> None:
    config = compose_config(["model=deepseek_nano", "model.config.num_hidden_layers=9"])
    assert config.model.config["first_k_dense_replace"] == 9


# -- precedence ----------------------------------------------------------------------------------------------------


def test_a_recipe_wins_over_the_defaults() -> None:
    config = compose_config(["recipe=deepseek_ep"])
    assert config.model.name == "deepseek_nano"
    assert config.balance.rule is BalanceRule.bias
    assert config.experts.layers == "1:"


@pytest.mark.parametrize("first", [True, False], ids=["recipe_first", "recipe_last"])
def test_the_command_line_wins_over_a_recipe_in_any_order(first: bool) -> None:
    given = ["model=llama_nano", "dispatch=flat", "routing.top_k=8", "name=mine"]
    config = compose_config(["recipe=deepseek_ep", *given] if first else [*given, "recipe=deepseek_ep"])
    assert config.model.name == "llama_nano"
    assert config.dispatch.kind is DispatchKind.flat
    assert config.routing.top_k == 8
    assert config.name == "mine"
    assert config.routing.groups == 2, "what was not given is the recipe's"


def test_a_recipes_values_hold_within_a_group_that_the_command_line_selects() -> None:
    config = compose_config(["recipe=deepseek_ep", "routing=softmax_topk"])
    assert (config.routing.score, config.routing.top_k) == ("softmax", 4)


@pytest.mark.parametrize("recipe", [[], ["recipe=deepseek_ep"]], ids=["no_recipe", "recipe"])
@pytest.mark.parametrize(
    ("given", "hardware"),
    [
        (["mesh=h100_8"], "h100"),
        (["mesh=h100_2x8"], "h100"),
        (["mesh=h800_256x8"], "h800"),
        (["mesh=cpu_1x4"], "laptop"),
        (["mesh=h100_8", "hardware=h800"], "h800"),
        (["hardware=h800", "mesh=h100_8"], "h800"),
        (["hardware=h100"], "h100"),
    ],
)
def test_a_mesh_selects_its_hardware_and_the_command_line_wins(
    recipe: list[str], given: list[str], hardware: str
) -> None:
    assert compose_config([*recipe, *given]).hardware.name == hardware


def test_a_recipe_may_choose_other_hardware_than_its_mesh(my_conf: Callable[[str, str], None]) -> None:
    my_conf("recipe/mine", "defaults:\n  - override /mesh: h100_8\n  - override /hardware: h800\n")
    assert compose_config(["recipe=mine"]).hardware.name == "h800"


# -- a folder of one's own -----------------------------------------------------------------------------------------


def test_own_recipes_and_groups_come_from_the_folder_in_the_environment(my_conf: Callable[[str, str], None]) -> None:
    my_conf("recipe/mine", "defaults:\n  - override /mesh: three\n  - override /model: deepseek_nano\nname: mine\n")
    my_conf("mesh/three", "ranks_per_node: 3\n")
    config = compose_config(["recipe=mine"])
    assert (config.name, config.mesh.ranks_per_node, config.model.name) == ("mine", 3, "deepseek_nano")
    assert compose_config(["recipe=deepseek_ep"]).name == "deepseek_ep", "the shipped ones are still there"


def test_a_missing_folder_in_the_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_DIR_VARIABLE, "/no/such/folder")
    with pytest.raises(ConfigError, match=r"^MOECOMPILE_CONFIG_DIR=/no/such/folder: there is no such folder\. Create"):
        compose_config()


def test_other_hydra_programs_do_not_see_that_folder(tmp_path: Path, my_conf: Callable[[str, str], None]) -> None:
    my_conf("recipe/mine", "name: mine\n")
    (tmp_path / "other").mkdir()
    with hydra.initialize_config_dir(str(tmp_path / "other"), version_base="1.3"):
        cfg = hydra.compose(return_hydra_config=True)
    assert str(tmp_path) not in [source.path for source in cfg.hydra.runtime.config_sources]


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("mesh.epp=3", "mesh.epp=3: there is no such key. Did you mean pp or ep? mesh has num_nodes, ranks_per_node,"),
        ("+mesh.epp=3", "mesh.epp=3: there is no such key. Did you mean"),
        (
            "hardware.figures.memory_gib.value=80",
            "hardware.figures.memory_gib.value=80: there is no such key: it was the same as hardware.memory_gib. "
            "Set hardware.memory_gib.",
        ),
        (
            "hardware.figures.inter_node_effective_gb_s={value:1}",
            "hardware.figures.inter_node_effective_gb_s={value:1}: there is no such key: it was the same as "
            "hardware.inter_node_gb_s. Set hardware.inter_node_gb_s.",
        ),
        ("recpie=x", "recpie=x: there is no such key. Did you mean recipe? The config has name, seed, debug, task,"),
        ("+foo=1", "foo=1: there is no such key. The config has name,"),
        ("+per_layer.a.layrs=1", "per_layer.a.layrs=1: there is no such key. Did you mean layers? per_layer.a has match,"),
        ("+per_layer.a.layers=[1]", "per_layer.a.layers=[1]: has the wrong type. Give text."),
        ("+per_layer.a=1", "per_layer.a=1: is a group of keys: match, layers, experts, routing, balance. Set them one by one, such as per_layer.a.match."),
        ("mesh/foo=1", "mesh/foo=1: there is no such key."),
        ("model.config.foo=1", "model.config.foo=1: there is no such key. Write +model.config.foo=... to add a key."),
        ("~foo", "Could not delete from config. 'foo' does not exist."),
        ("mesh=cpu_1x22", "mesh=cpu_1x22: there is no such option. Did you mean cpu_1x2"),
        ("recipe=nope", "recipe=nope: there is no such option. Use one of deepseek_ep"),
        ("mesh=null", "mesh=null: a group takes the name of one option. --help lists them."),
        ("mesh=[1]", "mesh=[1]: a group takes the name of one option. --help lists them."),
        ("balance.losses=0", "balance.losses=0: is a group of keys: micro_batch, sequence, global_batch, z. Set them one by one, "),
        ("+per_layer.a.balance=none", "per_layer.a.balance=none: has the wrong type. Give keys with their values: {key: value}."),
        ("per_layer.a.balance.rule=none", "per_layer.a: there is no such key. Write +per_layer.a.balance.rule=... to add a key."),
        ("+mesh=cpu_1", "mesh=cpu_1: the group has an option already. Write mesh=cpu_1, without +."),
        ("+recipe=deepseek_ep", "recipe=deepseek_ep: the group has an option already. Write recipe=deepseek_ep,"),
        ("balance.rule=bais", "balance.rule=bais: there is no such choice. Did you mean bias? Give one of auto, none, bias, quantile."),
        ("mesh.num_nodes=two", "mesh.num_nodes=two: has the wrong type. Give a whole number."),
        ("mesh.ep=1.5", "mesh.ep=1.5: has the wrong type. Give a whole number or auto."),
        ("mesh.ep=null", "mesh.ep=null: has the wrong type. Give a whole number or auto."),
        ("mesh.ep=???", "mesh.ep=???: has the wrong type. Give a whole number or auto."),
        (
            "model.config.hidden_sise=4",
            "model.config.hidden_sise=4: there is no such key. Did you mean hidden_size? Write "
            "+model.config.hidden_sise=... to add a key.",
        ),
        ("optimizer.lr=fast", "optimizer.lr=fast: has the wrong type. Give a number."),
        ("optimizer.clip_norm=x", "optimizer.clip_norm=x: has the wrong type. Give a number or null."),
        ("optimizer.betas=[a,b]", "optimizer.betas[0]=a: has the wrong type. Give a number."),
        ("debug=maybe", "debug=maybe: has the wrong type. Give true or false."),
        ("seed=${nope}", "seed: Interpolation key 'nope' not found. Refer to a key that exists"),
        ("mesh.ep=[1,", "mesh.ep=[1,: cannot be read (no viable alternative at input '[1,'). Quote"),
        ("mesh", "mesh: not an override. Write key=value; --help lists the groups."),
        ("train recipe=mixtral_ep", "train: not an override. Write task=train; --help lists the groups."),
        ("mixtral_ep", "mixtral_ep: not an override. Write recipe=mixtral_ep; --help lists the groups."),
        ("seed=1 recipe = mixtral_ep", "recipe = mixtral_ep: an override has no spaces. Write recipe=mixtral_ep."),
        ("recipe =mixtral_ep", "recipe =mixtral_ep: an override has no spaces. Write recipe=mixtral_ep."),
        ("recipe= mixtral_ep", "recipe= mixtral_ep: an override has no spaces. Write recipe=mixtral_ep."),
        (
            "model=./folder",
            "model=./folder: takes the name of an option, not a path. Write model.pretrained=./folder, if save_pretrained "
            "wrote this folder; nothing is downloaded.",
        ),
        ("model=tests", "model=tests: takes the name of an option, not a path. Write model.pretrained=tests,"),
        ("data=a/text.txt", "data=a/text.txt: takes the name of an option, not a path. Write data.path=a/text.txt, after"),
        (
            "recipe=a/my.yaml",
            "recipe=a/my.yaml: takes the name of an option, not a path. Write --config-dir FOLDER recipe=my, where the file "
            "is FOLDER/recipe/my.yaml.",
        ),
        ("mesh.memory_gib=4", "mesh.memory_gib=4: there is no such key. Did you mean hardware.memory_gib? mesh has"),
        ("max_steps=4", "max_steps=4: there is no such key. Did you mean trainer.max_steps? The config has"),
        ("routing.top_k=1,2", "routing.top_k=1,2: several values are a sweep. Add -m for one job a value, or write"),
        ("seed=range(3)", "seed=range(3): several values are a sweep. Add -m"),
        ("mesh=cpu_1,cpu_1x2", "mesh=cpu_1,cpu_1x2: several values are a sweep. Add -m for one job a value."),
        ("mesh=[cpu_1,cpu_1x2]", "mesh=[cpu_1,cpu_1x2]: a group takes the name of one option."),
        ("+model.config.rope._target_=os.getcwd", "model.config=_target_: a config never chooses code to run."),
        ("+mesh._target_=os.getcwd", "mesh._target_=os.getcwd: there is no such key."),
    ],
)  # fmt: skip
def test_an_override_that_cannot_be(overrides: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(UserError) as raised:
        compose_config(overrides.split())
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("mesh: {epp: 3}", "mesh.epp: there is no such key (in recipe/mine.yaml). Did you mean pp or ep?"),
        ("mehs: {ep: 3}", "mehs: there is no such key (in recipe/mine.yaml). Did you mean mesh?"),
        ("mesh: {num_nodes: two}", "mesh.num_nodes=two: has the wrong type (in recipe/mine.yaml). Give a whole"),
        ("balance: {rule: x}", "balance.rule=x: there is no such choice (in recipe/mine.yaml). Give one of auto"),
        ("mesh: 3", "In 'recipe/mine': Merge error: int is not a subclass of MeshConfig. value: 3"),
        ("- a", "In 'recipe/mine': Cannot merge DictConfig with ListConfig"),
        ("mesh: [1\nx: 3", "not valid YAML: while parsing a flow sequence in"),
        ("defaults: [override /mesh: x]", "mesh=x: there is no such option (a config file asks for it). Use one of"),
        ("defaults: [override /mehs: x]", "mehs: there is no such group (in recipe/mine.yaml). --help lists"),
        ("model: {factory: os.getcwd}", "model.factory=os.getcwd: a config file may not choose code to run. Give"),
        ("mesh: {_target_: os.getcwd}", "mesh._target_: there is no such key (in recipe/mine.yaml)."),
        ("model: {config: {_target_: x}}", "model.config=_target_: a config never chooses code to run."),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be(recipe: str, message: str, my_conf: Callable[[str, str], None]) -> None:
    my_conf("recipe/mine", recipe + "\n")
    with pytest.raises(UserError) as raised:
        compose_config(["recipe=mine"])
    assert str(raised.value).startswith(message)


def test_a_recipe_without_its_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("name: mine\nmesh:\n  ep: 1\n")
    monkeypatch.setenv(CONFIG_DIR_VARIABLE, str(tmp_path))
    with pytest.raises(UserError) as raised:
        compose_config(["recipe=mine"])
    assert str(raised.value) == (
        "recipe/mine.yaml: its keys go below `recipe`, where there are none. "
        "Begin the file with the line '# @package _global_'."
    )


def test_settings_of_some_layers_may_be_given_key_by_key_or_whole() -> None:
    by_key = compose_config(["+per_layer.first.layers=0:1", "+per_layer.first.routing.top_k=1"]).per_layer
    whole = compose_config(["+per_layer.first={layers: '0:1', routing: {top_k: 1}}"]).per_layer
    assert by_key == whole == {"first": PerLayerConfig(layers="0:1", routing={"top_k": 1})}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.muon={lr: 0.1}", "optimizer.muon.lr=0.1: has no effect with AdamW."),
        ("experts.widen={noise: 0.1}", "experts.widen.noise=0.1: has no effect with experts.init=copy."),
    ],
)
def test_keys_that_are_given_in_a_mapping_are_checked_like_others(override: str, says: str) -> None:
    config = compose_config([override, "data.seq_len=32"])
    assert config.given == [says.partition("=")[0], "data.seq_len"]
    with pytest.raises(ConfigError, match=re.escape(says)):
        validate(config)


def test_a_mapping_for_the_config_of_a_saved_model_is_refused() -> None:
    says = "model.config.hidden_size=64: model.pretrained=folder has a config of its own"
    with pytest.raises(ConfigError, match=re.escape(says)):
        compose_config(["model.pretrained=folder", "model.config={hidden_size: 64}"])


def test_a_defect_is_not_dressed_up_as_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecompile.compose.typed._typed", lambda cfg: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compose_config()


def test_the_factory_may_be_given_by_the_caller() -> None:
    config = compose_config(["model.factory=my.models:build", "model.architecture=null"])
    validate(config)
    assert config.model.factory == "my.models:build"


# -- resolved.yaml -------------------------------------------------------------------------------------------------


def test_resolved_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "resolved.yaml"
    config = compose_config(["recipe=deepseek_ep", "model.factory=my.models:build", "data.path='a: b'"])
    save_resolved(config, path)
    assert load_resolved(path, named={"model.factory": "my.models:build"}) == config
    assert [file.name for file in tmp_path.iterdir()] == ["resolved.yaml"]


def test_resolved_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "resolved.yaml"
    save_resolved(compose_config(["seed=1"]), path)

    def cut_off(self: Path, text: str, **kwargs: str) -> int:
        with self.open("w") as file:
            file.write(text[:10])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(OSError, match="disk full"):
        save_resolved(compose_config(["seed=2"]), path)
    assert load_resolved(path).seed == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mesh: {epp: 3}", "mesh.epp: there is no such key"),
        ("foo: 1", "foo: there is no such key"),
        ("mesh: {ep: 1.5}", "mesh.ep=1.5: has the wrong type"),
        ("balance: {rule: x}", "balance.rule=x: there is no such choice"),
    ],
)
def test_resolved_is_typed(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "resolved.yaml").write_text(text)
    with pytest.raises(UserError) as raised:
        load_resolved(tmp_path / "resolved.yaml")
    assert str(raised.value).startswith(message)


def test_a_run_that_said_its_memory_twice_is_read(tmp_path: Path) -> None:
    path = tmp_path / "resolved.yaml"
    path.write_text("hardware: {memory_gib: 7.0, figures: {memory_gib: {value: 7.0, source: a sheet}}}\n")
    assert load_resolved(path).hardware.memory_gib == 7.0


# -- the caller's process ------------------------------------------------------------------------------------------


def test_composing_prints_nothing_and_leaves_no_trace(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    compose_config(["recipe=deepseek_ep"])
    with pytest.raises(UserError):
        compose_config(["mesh=nope"])
    assert capfd.readouterr() == ("", "")
    assert not GlobalHydra.instance().is_initialized()
    assert Path.cwd() == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_composing_in_threads() -> None:
    with ThreadPoolExecutor(4) as pool:
        seeds = pool.map(lambda seed: compose_config([f"seed={seed}", "recipe=deepseek_ep"]).seed, range(8))
        assert list(seeds) == list(range(8))


APP = """
import logging
import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_original_cwd
from omegaconf import OmegaConf

@hydra.main(version_base="1.2", config_path="conf", config_name="app")
def app(cfg):
    from moecompile.compose import compose_config
    from moecompile.errors import UserError

    before = GlobalHydra.instance().hydra, HydraConfig.get(), hydra.version.getbase(), logging.root.handlers[:]
    assert compose_config(["recipe=deepseek_ep", f"routing.top_k={cfg.top_k}"]).routing.top_k == cfg.top_k
    try:
        compose_config(["mesh=nope"])
    except UserError as error:
        print(error)
    after = GlobalHydra.instance().hydra, HydraConfig.get(), hydra.version.getbase(), logging.root.handlers[:]
    assert before[0] is after[0] and before[1] is after[1] and before[2:] == after[2:]
    assert hydra.compose("app", ["top_k=16"]).top_k == 16, "the caller can still compose its own"
    assert HydraConfig.get().job.name == "app"

app()
"""


def test_composing_inside_the_callers_own_hydra_main(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "app.yaml").write_text("top_k: 8\n")
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for flags in ([], ["-m", "top_k=4,8"]):
        result = subprocess.run(
            [sys.executable, "-W", "error", "app.py", *flags],
            cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert "mesh=nope: there is no such option" in result.stdout
