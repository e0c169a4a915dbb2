"""`make test-oldest`: tests of what touches torch most, under the oldest torch that pyproject.toml admits.

    python tests/oldest.py                              the quick ones, under the Python that runs it
    python tests/oldest.py --python python3.12          under another one
    python tests/oldest.py --cuda --whole               with CUDA's libraries, if there is no other build; all quick tests,
                                                        and some on real ranks

A virtual environment of its own, and about five minutes; twenty for the whole. Where that Python or that torch is not to be had,
or the torch only with its CUDA libraries (3 GB) without `--cuda`, nothing is tested, which is said on stderr.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

REPOSITORY = Path(__file__).parents[1]
TESTS = (
    "tests/ops/test_registered.py", "tests/ops/test_tracing.py", "tests/ops/test_expert_ffn.py", "tests/capture",
    "tests/passes/test_recompute.py", "tests/passes/test_shard.py", "tests/checkpoint/test_tensors.py", "tests/test_pipeline.py",
)  # fmt: skip
ON_RANKS = (
    "tests/distributed/test_gradients.py", "tests/distributed/test_existing.py", "tests/distributed/test_fold.py",
    "tests/distributed/test_expert_shards.py", "tests/distributed/test_unusual_experts.py",
    "tests/distributed/test_pipeline.py",
)  # fmt: skip
NEEDED = ("pytest", "hypothesis", "scipy", "peft>=0.21")
_PIP = ("-m", "pip", "--disable-pip-version-check")
_CUDA = ("nvidia", "cuda", "triton")


def main(arguments: Sequence[str] = ()) -> int:
    """The exit code of the tests, or 0 where there are none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="such as python3.12")
    parser.add_argument("--cuda", action="store_true", help="a build with CUDA's libraries will do")
    parser.add_argument("--whole", action="store_true", help="all quick tests, and some on real ranks")
    options = parser.parse_args(arguments)
    wanted = f"torch=={oldest()}.*"
    if reason := why_no_python(options.python):
        return _not_tested(f"{wanted} on {options.python}", reason)
    place = REPOSITORY / f".venv-oldest-{Path(options.python).name}"
    python = str(place / "bin" / "python")
    if not Path(python).exists():
        subprocess.run([options.python, "-m", "venv", str(place)], check=True)
    asked = [*_PIP, "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-", wanted]
    found = subprocess.run([python, *asked], capture_output=True, text=True)
    if found.returncode:
        return _not_tested(wanted, found.stderr.strip()[-300:])
    if not options.cuda and (reason := why_not(found.stdout)):
        return _not_tested(wanted, reason)
    package = [f"{REPOSITORY}[dev]"] if options.whole else [str(REPOSITORY), *NEEDED]
    subprocess.run([python, *_PIP, "install", "--quiet", wanted, "--editable", *package], check=True)
    quick = ("-n", "4", "--dist", "loadfile", "--no-loadscope-reorder") if options.whole else TESTS
    failed = subprocess.run([python, "-m", "pytest", *quick], cwd=REPOSITORY).returncode
    if failed or not options.whole:
        return failed
    return subprocess.run([python, "-m", "pytest", "-m", "slow or not slow", *ON_RANKS], cwd=REPOSITORY).returncode


def _not_tested(what: str, reason: str) -> int:
    print(f"{what} is NOT tested: {reason}", file=sys.stderr)
    return 0


def why_no_python(name: str) -> str:
    """Why this Python cannot be run, such as a shim of pyenv without the version that it stands for; empty: it can."""
    if shutil.which(name) is None:
        return "there is no such Python"
    ran = subprocess.run([name, "-c", "import venv"], capture_output=True, text=True)
    return " ".join(ran.stderr.split())[:300] if ran.returncode else ""


def oldest() -> str:
    """Such as `2.11`, from pyproject.toml."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (torch,) = (Requirement(text) for text in project["dependencies"] if text.startswith("torch>="))
    (bound,) = torch.specifier
    return ".".join(map(str, Version(bound.version).release[:2]))


def why_not(report: str) -> str:
    """The reason why what pip would install, as its report says, is not to be installed for tests; empty: it is."""
    (entry,) = json.loads(report)["install"]
    if libraries := cuda_packages(entry["metadata"].get("requires_dist", ())):
        return f"{len(libraries)} packages of CUDA, about 3 GB, would come with it ({libraries[0]}, ...)"
    return ""


def cuda_packages(requires: Iterable[str]) -> list[str]:
    """Those that would be installed here."""
    needed = (Requirement(text) for text in requires)
    here = (each for each in needed if each.marker is None or each.marker.evaluate({"extra": ""}))
    return [each.name for each in here if each.name.startswith(_CUDA)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
