"""Files choose no code: every key that names code, in every file that is read, and every place that imports or runs."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import sys
import typing
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

import moecompile
from moecompile import compose
from moecompile import plan as plans
from moecompile.compose import CONFIG_DIR_VARIABLE, compose_config, load_resolved, save_resolved
from moecompile.errors import ConfigError, MoecompileError, PlanError
from moecompile.export import load_exported
from moecompile.export.run import find_run
from moecompile.models.build import build_model, config_of, example_inputs
from moecompile.models.source import source_model
from moecompile.named_code import (
    DISPATCH,
    EXPERTS,
    FACTORY,
    IMPORTED,
    KEYS,
    PLUGINS,
    VARIABLE,
    for_ranks,
    from_launcher,
    imported,
    named_in,
)
from moecompile.ops import backend
from moecompile.pipeline import compile_with_report
from moecompile.planner.given import given_plan
from moecompile.routing.scores import SCORES
from moecompile.runtime.ranks import free_port
from moecompile.schema import Config, ModelConfig, validate
from moecompile.tasks import launched
from moecompile.tasks.export import run as export
from moecompile.tasks.inputs import check_inputs
from tests import forked
from tests.cluster.slow_model import SMALL
from tests.tiny import ids, tiny_llama

PACKAGE = Path(__file__).parents[1] / "moecompile"
CANARY = "a_canary:sing"
VALUES: dict[str, str | list[str]] = dict.fromkeys(KEYS, CANARY) | {
    PLUGINS: ["a_canary"], "launcher.setup": [CANARY], "launcher.directives": [CANARY],
}  # fmt: skip
PLACES = [*KEYS, f"per_layer.first.{EXPERTS}"]


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that leaves a file behind when it is imported; afterwards it must not be there."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "a_canary.py").write_text(f"open({str(tmp_path / 'sang')!r}, 'w')\ndef sing(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    yield tmp_path
    assert not (tmp_path / "sang").exists() and "a_canary" not in sys.modules


def recipe(folder: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe `mine` with these dotted keys."""
    body: dict[str, Any] = {"name": "mine"}
    for key, value in values.items():
        *groups, name = key.split(".")
        node = body
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    (folder / "recipe").mkdir(exist_ok=True)
    (folder / "recipe" / "mine.yaml").write_text("# @package _global_\n" + yaml.safe_dump(body))
    monkeypatch.setenv(CONFIG_DIR_VARIABLE, str(folder))


def named(key: str, value: Any = None) -> str:
    value = VALUES[key.removeprefix("per_layer.first.")] if value is None else value
    return f"{key}={value if isinstance(value, str) else f'[{chr(39)}{value[0]}{chr(39)}]'}"


@pytest.mark.parametrize("key", PLACES)
def test_a_recipe_names_none_and_the_caller_may(key: str, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = VALUES[key.removeprefix("per_layer.first.")]
    recipe(canary, {key: value}, monkeypatch)
    with pytest.raises(ConfigError) as raised:
        compose_config(["recipe=mine"])
    assert str(raised.value) == (
        f"{key}={value}: a config file may not choose code to run. "
        f"Give {named(key)} on the command line or in Python, if you trust it."
    )
    assert named_in(compose_config(["recipe=mine", named(key)])) == {key: value}


def test_a_group_of_a_folder_names_none(canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for group, field in (("dispatch", "backend"), ("experts", "backend"), ("launcher", "python"), ("model", "factory")):
        (canary / group).mkdir()
        (canary / group / "mine.yaml").write_text(f"{field}: {CANARY}\n")
        monkeypatch.setenv(CONFIG_DIR_VARIABLE, str(canary))
        with pytest.raises(ConfigError, match=rf"^{group}\.{field}=a_canary:sing: a config file may not choose code"):
            compose_config([f"{group}=mine"])


@pytest.mark.parametrize(
    "words",
    [
        ["++per_layer.first={layers: '0:1'}"],  # is merged with what the recipe has there
        ["++per_layer.first.experts={num_routed: 4}"],
        ["per_layer.first.experts=${per_layer.first.experts}"],
        ["+per_layer.second={experts: {backend: 'b:c'}}", "experts.backend='b:c'"],
        ["experts.backend=a_canary:sing"],
    ],
)
def test_what_is_typed_beside_it_does_not_name_it(
    words: list[str], canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe(canary, {f"per_layer.first.{EXPERTS}": CANARY}, monkeypatch)
    with pytest.raises(MoecompileError, match=r"^per_layer\.first\.experts"):
        compose_config(["recipe=mine", *words])


def test_a_typed_mapping_names_what_is_in_it() -> None:
    word = "+per_layer.first={experts: {backend: 'b:c'}, layers: '0:1'}"
    assert named_in(compose_config([word])) == {f"per_layer.first.{EXPERTS}": "b:c"}


# -- the config of a run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", PLACES)
def test_the_config_of_a_run_names_none(key: str, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, path = compose_config([f"+{named(key)}" if "first" in key else named(key)]), canary / "resolved.yaml"
    save_resolved(config, path)
    with pytest.raises(ConfigError) as raised:
        load_resolved(path)
    text = named(key)
    assert str(raised.value) == f"resolved.yaml={path}: names code to run, {text}. Give {text} too, if you trust it."
    with pytest.raises(ConfigError, match="names code to run"):
        load_resolved(path, named={key: "another"})
    assert load_resolved(path, named=named_in(config)) == config
    looked = load_resolved(path, runs=())
    assert named_in(looked) == {}
    # What a rank reads: the launcher tells it what was named; a folder alone tells it nothing.
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="names code to run"):
        launched.main(canary)
    assert from_launcher(for_ranks(named_in(config))) == named_in(config)


def test_what_a_run_keeps_cannot_give_itself_leave(canary: Path) -> None:
    save_resolved(replace(compose_config([named(KEYS[0])]), given=["model.factory"]), canary / "resolved.yaml")
    with pytest.raises(ConfigError, match="names code to run"):
        load_resolved(canary / "resolved.yaml")


def test_an_export_needs_the_factory_alone(canary: Path) -> None:
    run = canary / "run"
    (run / "checkpoints" / "step-1").mkdir(parents=True)
    words = ["task=export", f"export.run={run}", f"export.checkpoint={run}/checkpoints/step-1"]
    save_resolved(compose_config([named(key) for key in KEYS if key != PLUGINS]), run / "resolved.yaml")
    (run / "plan.yaml").write_text("no plan")
    told = rf"={run}: names code to run, model\.factory=a_canary:sing\. Give model\.factory=a_canary:sing too"
    with pytest.raises(ConfigError, match=f"^export.run{told}"):
        export(compose_config(words), canary / "out")
    (run / "model.safetensors").write_text("{}")
    with pytest.raises(ConfigError, match=f"^export.run{told}"):
        load_exported(run)
    with pytest.raises(PlanError, match="must be a mapping"):
        export(compose_config([*words, named(KEYS[0])]), canary / "out")  # the next file is read


# -- plugins --------------------------------------------------------------------------------------------------------


SCORE = "import moecompile\nmoecompile.register_score('mine', lambda logits: logits.exp())\n"


def test_an_export_needs_the_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_plugins: None) -> None:
    (tmp_path / "mine.py").write_text(SCORE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    save_resolved(compose_config(["plugins=[mine.py]", "routing.score=mine"]), tmp_path / "resolved.yaml")
    (tmp_path / "plan.yaml").write_text("no plan")
    told = r"names code to run, plugins=\['mine.py'\]\. Give plugins=\['mine.py'\] too, if you trust it\.$"
    with pytest.raises(ConfigError, match=told):
        find_run(str(tmp_path), f"{tmp_path}/checkpoints/step-1")
    assert "mine" not in SCORES
    with pytest.raises(PlanError, match="must be a mapping"):
        find_run(str(tmp_path), f"{tmp_path}/checkpoints/step-1", named={PLUGINS: ["mine.py"]})  # the next file is read
    assert "mine" in SCORES


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("nowhere", None, ": ModuleNotFoundError: No module named 'nowhere'. Give modules that Python finds on every rank, or paths of .py files."),
        ("mine.py", None, ": FileNotFoundError: there is no such file. Give modules that Python finds on every rank, or paths of .py files."),
        ("mine.py", "import nowhere", " (mine.py line 1): ModuleNotFoundError: No module named 'nowhere'. Correct it."),
        ("mine.py", f"{SCORE}{SCORE}", " (mine.py line 4): ConfigError: name=mine: there is such a score already. Give another name. Correct it."),
        ("json.py", "", ": ImportError: Python has another module of the name json: rename the file. Give modules that Python finds on every rank, or paths of .py files."),
    ],
)  # fmt: skip
def test_a_plugin_that_cannot_be_imported_is_one_message_before_anything_starts(
    name: str, code: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_plugins: None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if code is not None:
        (tmp_path / name).write_text(code)
    monkeypatch.setattr(sys, "argv", ["moecompile", f"plugins=[{name}]", "hydra.run.dir=run"])
    assert compose.main(lambda config, run_dir: pytest.fail("it runs")) == 2
    assert capsys.readouterr().err == f"error: plugins={name}: cannot be imported{told}\n"
    assert not (tmp_path / "run").exists()


def test_plugins_stay_so_the_jobs_of_a_sweep_have_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_plugins: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SCORE)
    jobs: list[str] = []
    words = ["-m", "task=plan", "hydra.sweep.dir=sweep", "plugins=[mine.py],[]", "routing.score=mine,softmax"]
    monkeypatch.setattr(sys, "argv", ["moecompile", *words])
    assert compose.main(lambda config, run_dir: jobs.append(config.routing.score) or 0) == 2
    assert jobs == ["mine", "softmax"]
    told = "error: plugins=[]: an earlier job of this process has imported mine.py, and what it has registered stays. "
    assert capsys.readouterr().err.count(told) == 2


# -- plans ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [EXPERTS, DISPATCH])
def test_a_plan_names_none(key: str, canary: Path) -> None:
    text, path = f"{key}={CANARY}", canary / "plan.yaml"
    words = ["experts.num_routed=4", "mesh=cpu_1x2", "trainer.checkpointing=none", "dispatch=dedup", text]
    plan = moecompile.make_plan(tiny_llama(), words, example={"input_ids": ids()})
    plans.save(plan, path)
    for source, read in ((path, partial(plans.load, path)), ("plan.yaml", partial(plans.from_yaml, path.read_text()))):
        with pytest.raises(ConfigError) as raised:
            read()
        assert str(raised.value) == f"plan={source}: names code to run, {text}. Give {text} too, if you trust it."
        assert read(named={key: CANARY}) == plans.read(path) == plan


# -- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_a_model_of_a_folder_names_no_attention_of_a_hub(name: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), name: "some/kernel"}))
    told = r"^model\.pretrained=.*: names code of a hub to run, attn_implementation=some/kernel\. Remove it there"
    for use in (config_of, lambda model: build_model(model, 0)):
        with pytest.raises(ConfigError, match=told):
            use(ModelConfig(pretrained=str(tmp_path)))
    tiny = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # if it is built
    model = ModelConfig(architecture="llama", config={**tiny, name: "some/kernel"})
    with pytest.raises(ConfigError, match=r"^model\.config=custom: names code of a hub to run"):
        build_model(model, 0)


# -- nothing is forgotten ------------------------------------------------------------------------------------------


RUN_AND_IMPORT = {
    "__init__.py": {"importlib.import_module": 2},  # names of the package's own API
    "checkpoint/tensors.py": {"pickle.Unpickler": 1},  # reads a list of classes alone
    "compose/typed.py": {"pickle.loads": 1},  # a copy of what this process has pickled
    "imports/shell.py": {"subprocess.run": 1},  # the parser of the package; a script is its input
    "libyaml.py": {"yaml.load": 2},  # by loaders of plain values
    "models/build.py": {"importlib.util.find_spec": 1},  # of transformers' own modules
    "models/packages.py": {"importlib.util.find_spec": 1},  # of READERS
    "models/without_hub_code.py": {"importlib.import_module": 1},  # of _GETTERS
    "named_code.py": {"importlib.import_module": 2, "importlib.util.find_spec": 1, "spec.loader.exec_module": 1},
    "ops/cpu/native.py": {
        "ctypes.CDLL": 1,
        "subprocess.run": 1,
    },  # the kernels of the package, by the compiler of the machine
    "runtime/fork_server.py": {"ctypes.CDLL": 1, "ctypes.CDLL(None).prctl": 1},  # of the C library
    "verify/certificate.py": {"pickle.loads": 2},  # what its own ranks have written
    "runtime/launch.py": {"importlib.import_module": 1},  # the module that `launch` is called with
    "runtime/external_launch.py": {"importlib.import_module": 1},  # the module of a command, which rank 0 sends
    "runtime/records.py": {"importlib.util.find_spec": 1},
    "runtime/slurm.py": {"subprocess.run": 1},  # commands of SLURM
    "runtime/trainer_checkpoint.py": {"torch.load": 1},  # weights_only
    "tasks/__init__.py": {"importlib.import_module": 1},  # by the name of a task, an enum
    "tasks/inputs.py": {"importlib.util.find_spec": 2},  # of peft, and of _LOGGER_PACKAGES
    "tasks/launched.py": {"importlib.import_module": 1},  # so, too
    "tasks/rehearse.py": {"subprocess.Popen": 1},  # this Python, a module of the package
}
"""Every call that may import, run or unpickle what a value names. A new one belongs here if no file can choose the value;
else it is made by `moecompile.named_code`, and its key belongs in `KEYS`."""
BUILTINS = {"eval", "exec", "compile", "__import__"}
METHODS = {
    "import_module",
    "find_spec",
    "exec_module",
    "instantiate",
    "get_class",
    "get_method",
    "get_object",
    "load_library",
}
MODULES = (
    "subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check", "os.system", "os.exec", "os.spawn",
    "os.popen", "os.posix_spawn", "runpy.", "pickle.load", "pickle.Unpickler", "torch.load", "torch.hub", "yaml.load",
    "yaml.unsafe_load", "joblib.", "ctypes.", "pydoc.",
)  # fmt: skip


def test_nothing_else_imports_or_runs_by_name() -> None:
    found: dict[str, dict[str, int]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.func] if isinstance(node, ast.Call) else node.bases if isinstance(node, ast.ClassDef) else []
            for text in map(ast.unparse, names):
                if text in BUILTINS or text.rpartition(".")[2] in METHODS or text.startswith(MODULES):
                    calls = found.setdefault(str(path.relative_to(PACKAGE)), {})
                    calls[text] = calls.get(text, 0) + 1
    assert found == RUN_AND_IMPORT


def test_a_key_that_is_not_listed_is_never_imported() -> None:
    with pytest.raises(KeyError, match=r"export\.family is not listed in moecompile\.named_code"):
        imported("export.family", CANARY)
    for key in KEYS:
        group, _, field = key.rpartition(".")
        kind = type(getattr(Config(), group)) if group else Config
        assert field in {each.name for each in dataclasses.fields(kind)}, key
        assert "only from the command line or Python" in " ".join(docs_of(kind)[field].split())


def docs_of(kind: type) -> dict[str, str]:
    import importlib.util

    spec = importlib.util.spec_from_file_location("generate", PACKAGE.parent / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(PACKAGE.parent / "docs"))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    found: dict[str, str] = module.field_docs(kind)
    return found


def texts(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, a value that names the canary) of every key of the schema that takes text."""
    for name, hint in typing.get_type_hints(kind).items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            yield from texts(typing.cast(type, hint), f"{key}.")
        elif str in (hint, *typing.get_args(hint)) and typing.get_origin(hint) not in (list, dict):
            yield key, CANARY
        elif hint == list[str]:
            yield key, [CANARY]
            yield key, ["a_canary"]
        elif hint == dict[str, typing.Any]:
            yield key, {"first": CANARY}
            yield key, {"a_canary": {"_target_": "a_canary.sing"}}


@pytest.mark.slow
def test_only_listed_keys_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_plugins: None) -> None:
    """Every key of the schema names a module, and a run is begun with it as far as one process goes."""
    (tmp_path / "a_canary.py").write_text("def sing(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    small = ["model.config.num_hidden_layers=1", "data.vocab_size=300", "data.seq_len=16", "mesh=cpu_1x2"]
    base, found = compose_config([*small, "dispatch=dedup", "trainer.checkpointing=none"]), set()
    keys = list(texts(Config))
    assert {key for key, _ in keys} >= set(KEYS) and len(keys) > 60
    for key, value in keys:
        config, (*groups, name) = copy.deepcopy(base), key.split(".")
        setattr(reduce(getattr, groups, config), name, value)
        if key == FACTORY:
            config.model.architecture, config.model.config = None, {}
        backend.load.cache_clear()
        with suppress(Exception):  # most are refused, some by the type
            validate(config)
            check_inputs(config)
            model = source_model(config)
            compile_with_report(model, config, example=example_inputs(model, 8), plan=given_plan(config))
        if sys.modules.pop("a_canary", None):
            found.add(key)
    assert found == {*IMPORTED, PLUGINS}


# -- ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_run_what_the_caller_names_and_its_export_asks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_plugins: None
) -> None:
    """Ranks that the command line starts, then ranks of torchrun, which go on with the run."""
    root, port = PACKAGE.parent, str(free_port())
    factory, experts = f"{FACTORY}=tests.cluster.slow_model:build", f"{EXPERTS}=tests.backends:one_by_one"
    plugin = "plugins=[docs/examples/my_plugin.py]"
    small = [*SMALL, "mesh=cpu_1x2", "data.micro_batch_size=1", "dispatch=dedup", "trainer.checkpointing=none"]
    train = [
        *small,
        experts,
        plugin,
        "routing.score=softplus",
        "optimizer.warmup_steps=1",
        f"hydra.run.dir={tmp_path}/run",
        "trainer.log_interval=1",
    ]
    python = ["-m"]
    torchrun = [*python, "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", "-m"]

    def run(start: list[str], *words: str) -> None:
        done = forked.python(*start, "moecompile", *words, cwd=root)
        assert done.returncode == 0, done.stdout + done.stderr

    run(python, *train, "trainer.max_steps=1")
    run(torchrun, *train, "trainer.max_steps=2", "trainer.resume=auto")
    export_words = ["task=export", "export.format=native", f"export.run={tmp_path}/run", f"export.path={tmp_path}/out"]
    export_words.append(f"hydra.run.dir={tmp_path}/export")
    run(python, *export_words, factory, plugin)
    with pytest.raises(ConfigError, match=f"^export.run={tmp_path}/out: names code to run"):
        load_exported(tmp_path / "out")
    monkeypatch.chdir(root)
    named = {FACTORY: factory.partition("=")[2], PLUGINS: ["docs/examples/my_plugin.py"]}
    assert load_exported(tmp_path / "out", named=named).config.vocab_size == 300
