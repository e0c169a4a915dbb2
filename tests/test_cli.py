"""The command line as a user meets it: real processes, their exit codes, what they print and what they leave behind."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from tests.tiny import COPY4, NARROW, SHORT

REPOSITORY = Path(__file__).parents[1]
MODULE = ("-m", "moecompile")

# A stand-in for the tasks: what it does is chosen by the seed.
PROGRAM = """
import sys
from moecompile.compose import main
from moecompile.report.sweep import summarize
from moecompile.errors import ConfigError, RankFailure

def run(config, run_dir):
    print("ran", config.name, run_dir)
    if config.seed == 1:
        return 0  # writes nothing
    if config.seed == 2:
        raise ConfigError("experts.layers", "9:", "selects no site", "Use ':'")
    if config.seed == 3:
        raise RankFailure("rank 1 died")
    if config.seed == 4:
        raise RuntimeError("a defect")
    if config.seed == 5:
        raise KeyboardInterrupt
    (run_dir / "result.json").write_text('{"status": "ok"}')
    if config.seed == 6:
        return 3
    if config.seed == 7:
        raise ConfigError("data.path", "x", "is not text", "Give a text file")
    return 0

if __name__ == "__main__":
    sys.exit(main(run, summarize=summarize))
"""


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    """An empty folder to run in; the program lies beside it."""
    (tmp_path / "program.py").write_text(PROGRAM)
    folder = tmp_path / "cwd"
    folder.mkdir()
    return folder


def cli(
    cwd: Path, *args: str, program: Sequence[str] = ("../program.py",), **environ: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *program, *args],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environ},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# -- a reader that ends ----------------------------------------------------------------------------------------------


def closed(words: Sequence[str], cwd: Path, *names: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """The program with outputs (`stdout`, `stderr`) that nobody reads, and what the other one has."""
    reader, writer = os.pipe()
    os.close(reader)
    outputs = {name: writer if name in names else subprocess.PIPE for name in ("stdout", "stderr")}
    try:
        return subprocess.run(
            [sys.executable, *MODULE, *words], cwd=cwd, env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environ},
            **outputs, text=True, timeout=120,
        )  # fmt: skip
    finally:
        os.close(writer)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("words", "code", "names"),
    [(["--help"], 0, ["stdout"]), (["mesh.epp=3"], 2, ["stdout"]), (["mesh.epp=3"], 2, ["stdout", "stderr"])],
)
def test_an_output_that_nobody_reads_ends_quietly(
    words: list[str], code: int, names: list[str], unbuffered: str, cwd: Path
) -> None:
    result = closed(words, cwd, *names, PYTHONUNBUFFERED=unbuffered)
    assert result.returncode == code
    if "stderr" not in names:
        assert result.stderr.count("\n") == (code != 0), result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_run_whose_output_nobody_reads_trains_to_its_end(unbuffered: str, cwd: Path) -> None:
    words = ["model=llama_nano", *NARROW, *COPY4, SHORT, "mesh=cpu_1x2", "trainer.max_steps=4", "hydra.run.dir=out"]
    words += ["optimizer.warmup_steps=2", "trainer.log_interval=1", "trainer.calibrate=never"]
    result = closed(words, cwd, "stdout", PYTHONUNBUFFERED=unbuffered)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads((cwd / "out" / "result.json").read_text())["steps"] == 4
    assert list((cwd / "out" / "checkpoints").iterdir())


# -- one run -------------------------------------------------------------------------------------------------------


def test_a_run_has_its_own_directory_and_is_silent_about_hydra(cwd: Path) -> None:
    result = cli(cwd, "recipe=deepseek_ep")
    assert (result.returncode, result.stderr) == (0, "")
    (run_dir,) = cwd.glob("runs/deepseek_ep/*/*")
    assert result.stdout == f"ran deepseek_ep {run_dir}\n"
    assert files(run_dir) == ["overrides.txt", "resolved.yaml", "result.json"]
    resolved = yaml.safe_load((run_dir / "resolved.yaml").read_text())
    assert (resolved["name"], resolved["model"]["config"]["vocab_size"]) == ("deepseek_ep", 2048)


@pytest.mark.slow
def test_runs_that_start_together_do_not_collide(cwd: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: cli(cwd), range(4)))
    assert [result.returncode for result in results] == [0] * 4
    assert len(list(cwd.glob("runs/default/*/*/result.json"))) == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["mesh.epp=3"], "mesh.epp=3: there is no such key. Did you mean pp or ep? mesh has"),
        (["mesh=h100"], "mesh=h100: there is no such option. Did you mean h100_8"),
        (["balance.rule=x"], "balance.rule=x: there is no such choice. Give one of auto, none, bias, quantile."),
        (["mesh.ep=[1,"], "mesh.ep=[1,: cannot be read"),
        (["recipe=deepseek_ep", "mesh.ep=3"], "mesh.ep=3: must divide the world size (2 nodes x 2 ranks = 4 ranks)."),
        (["seed=${nope}"], "seed: Interpolation key 'nope' not found. Refer to a key that exists"),
        (["debug=${oc.env:HOME}"], "debug: While dereferencing interpolation '${oc.env:HOME}': Value"),
        (["seed=2"], "experts.layers=9:: selects no site. Use ':'."),
        (["--config-dir", "nope"], "--config-dir="),
        (["--config-name", "nope"], "--config-name: the shipped config is always the first."),
        (["-m", "mesh=cpu_1,nope"], "mesh=nope: there is no such option. Use one of auto, cpu_1,"),
        (["-m", "seed=0,1", "mesh.epp=3"], "mesh.epp=3: there is no such key."),
        (["-m", "optimizer.lr=interval(0,1)"], "BasicSweeper does not support sweep type"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(args: list[str], message: str, cwd: Path) -> None:
    result = cli(cwd, *args)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    assert list(cwd.iterdir()) == []


def test_debug_shows_where_a_mistake_was_noticed(cwd: Path) -> None:
    for args in (["mesh.ep=3"], ["mesh.epp=3"]):
        result = cli(cwd, *args, "debug=true")
        assert result.returncode == 2
        assert result.stderr.startswith("Traceback")
        assert result.stderr.splitlines()[-1].startswith(f"error: {args[0]}: ")


@pytest.mark.parametrize(
    ("seed", "code", "stderr", "left"),
    [
        (1, 0, "", []),  # a rank that works in the directory of rank 0
        (3, 1, "error: rank 1 died\n", ["overrides.txt", "resolved.yaml"]),
        (5, 130, "", ["overrides.txt", "resolved.yaml"]),
        (6, 3, "", ["overrides.txt", "resolved.yaml", "result.json"]),
        (
            7,
            2,
            "error: data.path=x: is not text. Give a text file.\n",
            ["overrides.txt", "resolved.yaml", "result.json"],
        ),
    ],
)
def test_how_a_run_ends(seed: int, code: int, stderr: str, left: list[str], cwd: Path) -> None:
    result = cli(cwd, f"seed={seed}", "hydra.run.dir=out/here")
    assert (result.returncode, result.stderr) == (code, stderr)
    assert files(cwd) == [f"out/here/{name}" for name in left]


def test_a_defect_shows_its_traceback(cwd: Path) -> None:
    result = cli(cwd, "seed=4")
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("RuntimeError: a defect\n")
    assert [Path(name).name for name in files(cwd)] == ["overrides.txt", "resolved.yaml"]


def test_a_mistake_removes_only_what_the_run_has_made(cwd: Path) -> None:
    (cwd / "there").mkdir()
    assert cli(cwd, "mesh.ep=3", "hydra.run.dir=there/a/b").returncode == 2
    assert list(cwd.rglob("*")) == [cwd / "there"]


# -- multirun ------------------------------------------------------------------------------------------------------


def test_a_failing_job_does_not_stop_a_multirun(cwd: Path) -> None:
    result = cli(cwd, "-m", "seed=0,2,4,6,0", "mesh.ep=1")
    assert result.returncode == 3, "the highest exit code of its jobs"
    (sweep,) = cwd.glob("runs/default/sweeps/*/*")
    assert [line for line in result.stdout.splitlines() if line.startswith("ran")] == [
        f"ran default {sweep / str(number)}" for number in range(5)
    ]
    assert "job 1: seed=2 mesh.ep=1\n" in result.stdout
    assert "error: experts.layers=9:: selects no site. Use ':'.\n" in result.stderr
    assert "RuntimeError: a defect\n" in result.stderr
    assert (sweep / "failures.txt").read_text().splitlines() == [
        "1\t2\texperts.layers=9:: selects no site. Use ':'.",
        "2\t1\ta defect",
        "3\t3\t",
    ]
    table = [line.split() for line in result.stdout.splitlines() if line[:1].isdigit()]
    assert [row[:3] for row in table] == [
        ["0", "seed=0", "ok"],
        ["1", "seed=2", "failed"],
        ["2", "seed=4", "failed"],
        ["3", "seed=6", "ok"],
        ["4", "seed=0", "ok"],
    ]


def test_a_job_whose_config_is_refused_has_its_row_in_the_table(cwd: Path) -> None:
    result = cli(cwd, "-m", "mesh.ep=3,1")
    assert result.returncode == 2
    assert "error: mesh.ep=3: must divide the world size" in result.stderr
    assert [line.split()[:3] for line in result.stdout.splitlines() if line[:1].isdigit()] == [
        ["0", "ep=3", "failed"],
        ["1", "ep=1", "ok"],
    ]


def test_a_multirun_over_names_has_one_directory(cwd: Path) -> None:
    result = cli(cwd, "-m", r"name='it\'s a',b", "hydra.sweep.dir=s/${name}")
    assert (result.returncode, result.stderr) == (0, "")
    assert files(cwd) == [
        "s/default/0/overrides.txt",
        "s/default/0/resolved.yaml",
        "s/default/0/result.json",
        "s/default/1/overrides.txt",
        "s/default/1/resolved.yaml",
        "s/default/1/result.json",
        "s/default/multirun.yaml",
        "s/default/report.html",
        "s/default/sweep.csv",
    ]


@pytest.mark.slow
def test_another_sweep_in_the_same_directory_is_refused(cwd: Path) -> None:
    result = cli(cwd, "-m", "seed=0,6", "hydra.run.dir=r")
    assert (result.returncode, result.stderr.strip()) == (
        2, "error: hydra.run.dir=r: is not of a sweep. Use hydra.sweep.dir=r."
    )  # fmt: skip
    assert cli(cwd, "-m", "seed=0,6", "hydra.sweep.dir=s").returncode == 3
    before = {path: path.read_bytes() for path in cwd.rglob("*") if path.is_file()}
    result = cli(cwd, "-m", "seed=0,2", "hydra.sweep.dir=s")
    assert (result.returncode, result.stderr) == (
        2, "error: hydra.sweep.dir=s: holds another sweep. Use another directory, or resume its jobs with "
        "trainer.resume=auto.\n",
    )  # fmt: skip
    assert {path: path.read_bytes() for path in cwd.rglob("*") if path.is_file()} == before
    assert cli(cwd, "-m", "seed=0,8", "hydra.sweep.dir=s", "trainer.resume=auto").returncode == 0, "old failures"


def test_a_refused_run_leaves_the_directory_of_another_one(cwd: Path) -> None:
    """Also one that has written no more than its config so far."""
    assert cli(cwd, "seed=3", "hydra.run.dir=here").returncode == 1
    assert files(cwd) == ["here/overrides.txt", "here/resolved.yaml"]
    held = cwd / "here"
    descriptor = os.open(held, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # the run is under way
    result = cli(cwd, "seed=0", "hydra.run.dir=here")
    os.close(descriptor)
    assert (result.returncode, result.stderr) == (
        2, f"error: hydra.run.dir={held}: another run is writing there. Wait for it, or use another directory.\n"
    )  # fmt: skip
    assert files(cwd) == ["here/overrides.txt", "here/resolved.yaml"]


@pytest.mark.parametrize("state", ["full", "read-only"])
def test_a_directory_that_cannot_be_written_is_left_as_it_is(state: str, cwd: Path) -> None:
    disk = cwd.parent / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        for name in ("used", "new"):
            (disk / name).mkdir()
        (disk / "used" / "resolved.yaml").write_text("task:\nmodel:\nexperts:\nmesh:\ntrainer:\n")
        if state == "full":
            with pytest.raises(OSError, match="No space left"), (disk / "rest").open("wb", buffering=0) as rest:
                while rest.write(b"\0" * 4096):
                    pass
        else:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for name, left in (("used", ["resolved.yaml"]), ("new", [])):
            result = cli(cwd, f"hydra.run.dir={disk / name}")
            assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
            reason = "No space left on device" if state == "full" else "Read-only file system"
            assert f": {reason}. A run directory must be one that can be written" in result.stderr
            found = sorted(path.name for path in (disk / name).iterdir()) if (disk / name).exists() else []
            assert found == left
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


# -- what is shown -------------------------------------------------------------------------------------------------


def test_help_lists_commands_groups_and_recipes(cwd: Path) -> None:
    result = cli(cwd, "--help", program=MODULE)
    assert (result.returncode, result.stderr) == (0, "")
    for text in (
        "python -m moecompile [group=option ...]",
        "mesh: auto, cpu_1, cpu_1x2,",
        "task: ",
        "recipe: deepseek_ep",
        "MOECOMPILE_CONFIG_DIR",
    ):
        assert text in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 120


def test_cfg_prints_the_composed_config(cwd: Path) -> None:
    result = cli(cwd, "--cfg", "job", "recipe=deepseek_ep", "model=llama_nano", "mesh=h100_8", program=MODULE)
    assert (result.returncode, result.stderr) == (0, "")
    shown = yaml.safe_load(result.stdout)
    assert (shown["name"], shown["model"]["name"], shown["hardware"]["name"]) == ("deepseek_ep", "llama_nano", "h100")
    assert list(cwd.iterdir()) == []


def test_own_config_folders(cwd: Path) -> None:
    for name in ("flag", "environment"):
        (cwd / name / "recipe").mkdir(parents=True)
        text = f"# @package _global_\ndefaults:\n  - override /mesh: cpu_1x4\nname: {name}\n"
        (cwd / name / "recipe" / f"of_{name}.yaml").write_text(text)
    environ = {"MOECOMPILE_CONFIG_DIR": "environment"}
    shown = cli(cwd, "--config-dir", "flag", "--cfg", "job", "recipe=of_flag", program=MODULE, **environ)
    assert "name: flag\n" in shown.stdout
    shown = cli(cwd, "--cfg", "job", "recipe=of_environment", program=MODULE, **environ)
    assert "name: environment\n" in shown.stdout
    listed = cli(cwd, "--config-dir", "flag", "--help", program=MODULE, **environ).stdout
    assert re.search(r"^recipe: deepseek_ep,[\w, \n]* of_environment, of_flag", listed, re.MULTILINE)
    missing = cli(cwd, "--help", program=MODULE, MOECOMPILE_CONFIG_DIR="nope")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: MOECOMPILE_CONFIG_DIR=nope: there is no such folder. Create it, or unset")


HEAVY = """
import sys
import moecompile
heavy = {"torch", "transformers", "lightning", "tokenizers", "matplotlib", "numpy"}
assert not (heavy | {"hydra", "omegaconf"}) & set(sys.modules), "import moecompile"
from moecompile.__main__ import main
for args in (["--version"], ["--help"], ["--hydra-help"], ["--cfg", "job", "recipe=deepseek_ep"]):
    sys.argv = ["moecompile", *args]
    try:
        main()
    except SystemExit as end:
        assert not end.code
    assert not heavy & set(sys.modules), args
import moecompile.tasks.launched, moecompile.tasks.verify
assert not (heavy - {"numpy"}) & set(sys.modules), "what starts ranks; they load it"
"""


def test_import_version_help_cfg_and_launchers_load_nothing_heavy(cwd: Path) -> None:
    result = cli(cwd, program=("-c", HEAVY))
    assert (result.returncode, result.stderr) == (0, "")


def test_help_looks_for_the_options_once(cwd: Path) -> None:
    """Hydra makes a copy of all its configs for each group that it lists, twice."""
    code = """
import sys
from hydra._internal.config_repository import CachingConfigRepository
from moecompile.__main__ import main
copies, make = [], CachingConfigRepository.__init__
CachingConfigRepository.__init__ = lambda self, delegate: (copies.append(1), make(self, delegate))[1]
sys.argv = ["moecompile", "--help"]
try:
    main()
finally:
    print("copies", len(copies))
"""
    shown = cli(cwd, program=("-c", code)).stdout
    assert int(shown.splitlines()[-1].split()[1]) <= 5


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--version"], r"^moecompile \d+\.\d+\.\d+\n$"),
        (["--version", "recipe=nope"], r"moecompile \d"),
        (["-h"], r"moecompile turns a PyTorch model into"),
        (["--hydra-help"], r"Hydra \(1\.\d(.|\n)+--config-dir(.|\n)+hydra/launcher:"),
        (["--hydra-help", "recipe=deepseek_ep"], r"Hydra \(1\.\d"),
        (["--info"], r"Installed Hydra Plugins"),
        (["--info", "defaults-tree"], r"mesh: cpu_1\n"),
        (["--cfg", "hydra"], r"hydra:\n  run:\n    dir: runs/"),
        (["--cfg", "job", "--resolve"], r"name: default\n(.|\n)*max_position_embeddings: 128\n"),
        (["--cfg", "job", "--package", "mesh"], r"# @package mesh\nnum_nodes: 1\n"),
        (["seed=3", "--cfg", "job", "mesh=cpu_1"], r"name: default\nseed: 3\n"),
        (["--cfg", "job", "-p", "balance.losses"], r"# @package balance.losses\nmicro_batch: null"),
        (["--shell-completion", "install=bash"], r"complete -o nospace .*moecompile\n$"),
        (["-sc", "query=bash"], r"mesh=cpu_1 mesh=cpu_1x2"),
    ],
)  # fmt: skip
def test_flags(args: list[str], text: str, cwd: Path) -> None:
    result = cli(cwd, *args, program=MODULE, COMP_LINE="moecompile mesh=cpu")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(text, result.stdout), result.stdout
    assert list(cwd.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--recipe", "mixtral_ep"], "--recipe: keys of the config are no flags. Write recipe=mixtral_ep."),
        (["-recipe=x"], "-recipe=x: keys of the config are no flags. Write recipe=x."),
        (["--bogus"], "unrecognized arguments: --bogus. --hydra-help lists the flags."),
        (["--cfg"], "argument --cfg/-c: expected one argument. --hydra-help"),
        (["--cfg", "nope"], "argument --cfg/-c: invalid choice: 'nope'"),
        (["--cfg", "job", "-m"], "Only one of --run, --multirun"),
        (["--resolve"], "The --resolve flag can only be used"),
        (["--package", "mesh"], "--package mesh: shows one group of a config. Give it with --cfg job."),
        (["--cfg", "job", "-p", "mesh.nope"], "--package mesh.nope: there is no nope. Use one of num_nodes,"),
        (["--config-path", "x"], "--config-path: the shipped configs are always used."),
        (["--experimental-rerun", "x"], "--experimental-rerun: a run keeps no pickled config."),
        (["-sc", "query=bash"], "COMP_LINE is not set"),
    ],
)
def test_a_wrong_flag_is_one_message(args: list[str], message: str, cwd: Path) -> None:
    result = cli(cwd, *args, program=MODULE)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    assert list(cwd.iterdir()) == []
