"""`make test-oldest`: the quick tests of what touches torch most, under the oldest torch that pyproject.toml admits.

A virtual environment of its own, and about five minutes. Where that torch can only be had with its CUDA libraries (3 GB),
or not at all, nothing is tested, which is said on stderr.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[1]
PLACE = REPOSITORY / ".venv-oldest"
TESTS = (
    "tests/ops/test_registered.py", "tests/ops/test_tracing.py", "tests/ops/test_expert_ffn.py", "tests/capture",
    "tests/passes/test_recompute.py", "tests/passes/test_shard.py", "tests/checkpoint/test_tensors.py", "tests/test_pipeline.py",
)  # fmt: skip
NEEDED = ("pytest", "hypothesis", "scipy", "peft>=0.21")
_PIP = ("-m", "pip", "--disable-pip-version-check")
_CUDA = ("nvidia", "cuda", "triton")


def main() -> int:
    """The exit code of the tests, or 0 where there are none."""
    wanted = f"torch=={oldest()}.*"
    asked = [*_PIP, "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-", wanted]
    found = subprocess.run([sys.executable, *asked], capture_output=True, text=True)
    reason = found.stderr.strip()[-300:] if found.returncode else why_not(found.stdout)
    if reason:
        print(f"{wanted} is NOT tested: {reason}", file=sys.stderr)
        return 0
    python = str(PLACE / "bin" / "python")
    if not Path(python).exists():
        venv.create(PLACE, with_pip=True)
    subprocess.run([python, *_PIP, "install", "--quiet", wanted, "--editable", str(REPOSITORY), *NEEDED], check=True)
    return subprocess.run([python, "-m", "pytest", *TESTS], cwd=REPOSITORY).returncode


def oldest() -> str:
    """Such as `2.12`, from pyproject.toml."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (torch,) = (Requirement(text) for text in project["dependencies"] if text.startswith("torch>="))
    (bound,) = torch.specifier
    return bound.version


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
    sys.exit(main())
