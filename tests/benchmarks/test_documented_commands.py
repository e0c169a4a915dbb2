"""Every command that a page or a program says of `benchmarks/` runs: once, by night, in small sizes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PLACES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")), *(REPOSITORY / "docs").rglob("*.md"),
    *(REPOSITORY / "benchmarks").glob("*.md"), *(REPOSITORY / "benchmarks").glob("*.py"),
]  # fmt: skip

# Options that make a program small. They follow those of the command, so that they win.
SMALL = {
    "adapters.py": "",
    "architectures.py": "llama",
    "balance.py": "--seeds 1 --out .",
    "checksums.py": "--mib 4 --rounds 1",
    "chunks.py": "--rounds 1",
    "compile_time.py": "--layers 4",
    "dispatch_bytes.py": "--tokens 32",
    "few_rows.py": "--rows 6 --rounds 1",
    "foresight.py": "",
    "full_models.py": "--rounds 1 --sequences 1 --hidden 128",
    "gpu.py": "--report gpu.json",
    "growth.py": "--rounds 1 --scale 16",
    "imports.py": "",
    "import_memory.py": "--ranks 2 --hidden 128",
    "layer.py": "--sizes 8,2,128,256 --rounds 1",
    "lend.py": "--rounds 2 --tokens 256",
    "memory.py": "'mixtral_ep cpu_1x2'",
    "moments.py": "--steps 4 --seeds 0",
    "narrow_rows.py": "--steps 4 --seeds 0",
    "overhead.py": "--rounds 1",
    "peers.py": "--sizes 8,2,128,256 --rounds 1",
    "placement.py": "--steps 24",
    "ranks_start.py": "--rounds 1",
    "rewrite_time.py": "llama",
    "scale.py": "--points 1",
    "search.py": "",
    "soak.py": "--steps 24",
    "startup.py": "--rounds 1",
    "tables.py": "--rounds 1 --rows 1000 --steps 4",
    "this_machine.py": "--rounds 1",
    "two_nodes.py": "--rate-mbit 1000 --hidden 64 --rounds 1",
    "widen.py": "--seeds 1 --steps 8",
}
STANDS_FOR = {"KEY=VALUE": "routing.top_k=1", "ROWS": "benchmarks/published/published.yaml",
              "FEATURES": "benchmarks/published/published_features.yaml"}  # fmt: skip

# Commands that a machine with this package alone does not run: (a pattern, why).
LEFT = (
    (r"gpu\.py(?!.*--device cpu).*", "needs a GPU"),
    (r"wheelhouse\.py.*", "downloads the packages that a bare machine lacks"),
    (r"transformers_mixin\.py.*", "downloads the tests of transformers"),
    (r"peers\.py(?!.*--only).*", "needs the virtual environment of `make peers`"),
    (r"ranks_start\.py --against REV", "needs another commit of this repository"),
    (r"balance\.py --sweep FOLDER", "needs the jobs of an earlier call; test_balance.py reads some"),
)
AS_ROOT = ("two_nodes.py",)
# These exit with 1 if what they measured is not good enough, which small sizes on a busy machine need not be.
JUDGING = (
    "balance.py", "compile_time.py", "growth.py", "import_memory.py", "lend.py", "memory.py", "overhead.py",
    "placement.py", "rewrite_time.py", "scale.py", "startup.py", "this_machine.py",
)  # fmt: skip
NOT_HERE = ("there is no kernel here", "two nodes cannot be made here")
_SAID = re.compile(r"python benchmarks/(\w+\.py(?: [^`\n]*)?)")
_COMMENT = re.compile(r"(?:\s{2,}|\s+#|\s\()\S.*$|[.,:;)]+$")


def commands() -> set[str]:
    """`full_models.py --ranks 2` and so on, without what is said behind them."""
    found = set()
    for place in PLACES:
        for line in place.read_text(encoding="utf-8").splitlines():
            for said in _SAID.findall(line):
                found.add(_COMMENT.sub("", said).strip())
    return found


def why_left(command: str) -> str | None:
    return next((reason for pattern, reason in LEFT if re.fullmatch(pattern, command)), None)


def small() -> list[str]:
    """The commands to run, in small sizes. Those that differ in sizes alone, such as `two_nodes.py --pairs --rate-mbit 200`
    and `800`, are one, with the options of all: each is parsed.
    """
    sizes: dict[tuple[str, ...], list[str]] = {}
    for command in COMMANDS:
        if why_left(command) is None:
            program, *given = shlex.split(command)
            kept, size = [program], list[str]()
            is_size = False
            for word in given:
                is_size = word in shlex.split(SMALL[program]) if word.startswith("--") else is_size
                (size if is_size and "=" not in word else kept).append(STANDS_FOR.get(word, word))
            sizes.setdefault(tuple(kept), []).extend(size)
    return [shlex.join([*kept, *size, *shlex.split(SMALL[kept[0]])]) for kept, size in sizes.items()]


COMMANDS = sorted(commands())


def test_every_documented_command_is_run_or_left_for_a_reason() -> None:
    programs = {command.partition(" ")[0] for command in COMMANDS}
    assert len(COMMANDS) > 50
    assert {path.name for path in (REPOSITORY / "benchmarks").glob("*.py")} - programs == {
        "nodes.py",
        "overlap.py",
        "pairs.py",
    }
    run = {command.partition(" ")[0] for command in COMMANDS if why_left(command) is None}
    assert run == set(SMALL)
    for pattern, _ in LEFT:
        assert any(re.fullmatch(pattern, command) for command in COMMANDS), pattern


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: programs write their results and what pages show. Beside it is what is beside this one."""
    copy = tmp_path_factory.mktemp("beside") / "checkout"
    if (shared := REPOSITORY.parent / "shared").is_dir():
        (copy.parent / "shared").symlink_to(shared)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if os.path.lexists(REPOSITORY / name) and not name.startswith("tests/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, copy / name, follow_symlinks=False)
    return copy


@pytest.mark.nightly
@pytest.mark.parametrize("command", small())
def test_a_documented_command_runs(command: str, checkout: Path) -> None:
    program, *options = shlex.split(command)
    if program in AS_ROOT and os.geteuid() != 0:
        pytest.skip("makes network namespaces, as root")
    if program == "architectures.py" and not (checkout.parent / "shared" / "zoo").is_dir():
        pytest.skip("there are no rules for tiny models")
    line = [sys.executable, f"benchmarks/{program}", *options]
    environ = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=checkout, env=environ, capture_output=True, text=True, timeout=1800)
    if any(reason in done.stderr for reason in NOT_HERE):
        pytest.skip(done.stderr.strip())
    said = f"{shlex.join(line)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    assert done.returncode in ((0, 1) if program in JUDGING else (0,)) and "Traceback" not in done.stderr, said
