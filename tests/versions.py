"""Both ends of the ranges in pyproject.toml, and the versions between them that `constraints.txt` pins.

    python tests/versions.py lowest     the quick tests with the lowest versions that pyproject.toml admits
    python tests/versions.py newest     ... with the newest there are
    python tests/versions.py renew      the newest and, when the tests pass, constraints.txt anew (`make constraints`)
        --python python3.12             under another Python
        --cuda                          torch with CUDA's libraries (3 GB) will do, where there is no other build of it
        --ranks                         and some tests on real ranks
        --only TESTS                    these tests instead

Each end has a virtual environment of its own, `.venv-lowest-*` and `.venv-newest-*`. Of tests that fail it says which
package broke them: one package after the other is put back to the version in constraints.txt, and they run again. Where a
Python or a build of torch is not to be had, that is said on stderr.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[1]
CONSTRAINTS = "constraints.txt"
ON_RANKS = (
    "tests/distributed/test_gradients.py", "tests/distributed/test_existing.py", "tests/distributed/test_fold.py",
    "tests/distributed/test_expert_shards.py", "tests/distributed/test_unusual_experts.py",
    "tests/distributed/test_pipeline.py",
)  # fmt: skip
EXTRAS = ("dev", "docs")
HEADER = """\
# What `make demo`, `make test`, `make docs` and `.ci/run` install: the versions with which all tests passed. `make constraints`
# renews them. A build of torch for CPUs or for CUDA will do. In an environment of your own, pyproject.toml has ranges.
"""
_BUILDS = ("torch", "torchvision")  # X.Y.Z+cpu: any build of that release
_PIP = ("-m", "pip", "--disable-pip-version-check")
_CUDA = ("nvidia", "cuda", "triton")


def main(arguments: Sequence[str] = ()) -> int:
    """The exit code of the tests, or 0 where there are none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("end", choices=("lowest", "newest", "renew"))
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--ranks", action="store_true")
    parser.add_argument("--only", nargs="+", default=[])
    options = parser.parse_args(arguments)
    if reason := why_no_python(options.python):
        return _not_tested(f"the {options.end} on {options.python}", reason)
    end = "lowest" if options.end == "lowest" else "newest"
    place = REPOSITORY / f".venv-{end}-{Path(options.python).name}"
    python = str(place / "bin" / "python")
    if not Path(python).exists():
        subprocess.run([options.python, "-m", "venv", str(place)], check=True)
    wanted = lowest() if end == "lowest" else {}
    if (torch := wanted.get("torch")) and (reason := _why_no_torch(python, torch, cuda=options.cuda)):
        _not_tested(f"torch=={torch}", reason)
        del wanted["torch"]
    _install(python, wanted)
    differ = differing(installed(python), pinned((REPOSITORY / CONSTRAINTS).read_text(encoding="utf-8")))
    print(
        f"{end}:",
        ", ".join(f"{name} {here}, tested {tested}" for name, (here, tested) in differ.items()) or "as tested",
    )
    quick = options.only or ["-n", "4", "--dist", "loadfile", "--no-loadscope-reorder"]
    code, failed = _tests(python, quick)
    if options.ranks and not options.only:
        more, others = _tests(python, ["-m", "slow or not slow", *ON_RANKS])
        code, failed = code or more, failed + others
    if failed:
        _attribute(python, failed, differ)
    elif not code and options.end == "renew":
        text = constraints(_freeze(python))
        (REPOSITORY / CONSTRAINTS).write_text(text, encoding="utf-8")
        print(f"{CONSTRAINTS} has {text.count('==')} versions")
    return code


def _not_tested(what: str, reason: str) -> int:
    print(f"{what} is NOT tested: {reason}", file=sys.stderr)
    return 0


# -- versions -------------------------------------------------------------------------------------------------------------


def requirements() -> list[Requirement]:
    """Those of pyproject.toml, and of the extras that tests and documents need."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (project["optional-dependencies"][name] for name in EXTRAS)
    return [Requirement(text) for texts in (project["dependencies"], *extras) for text in texts]


def lowest() -> dict[str, str]:
    """Package -> the lowest version that pyproject.toml admits, of the packages with such a bound."""
    bounds = ((each.name, bound) for each in requirements() for bound in each.specifier if bound.operator == ">=")
    return {name: re.sub(r"[ab]\d+$", "", bound.version) for name, bound in bounds}


def constraints(freeze: str) -> str:
    """The text of constraints.txt for what `pip freeze` lists."""
    lines = []
    for line in sorted(freeze.splitlines(), key=str.lower):
        name, equal, version = line.partition("==")
        if not equal or line.startswith(("#", "-e")):
            continue  # moecompile itself
        if name.lower() in _BUILDS:
            version = ".".join(version.split(".")[:2]) + ".*"
        lines.append(f"{name}=={version}")
    return HEADER + "\n".join(lines) + "\n"


def pinned(text: str) -> dict[str, str]:
    """Package -> version of a text such as that of constraints.txt."""
    rows = (line.partition("==") for line in text.splitlines() if "==" in line and not line.startswith("#"))
    return {_name(name): version for name, _, version in rows}


def installed(python: str) -> dict[str, str]:
    """Package -> version in an environment."""
    return pinned(_freeze(python))


def differing(here: Mapping[str, str], tested: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Package that pyproject.toml names -> its version here, and another one with which all tests have passed."""
    named = {_name(each.name): None for each in requirements()}
    both = ((name, here[name], tested[name]) for name in named if name in here and name in tested)
    return {name: (now, then) for name, now, then in both if not now.startswith(then.removesuffix(".*"))}


def _name(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def _freeze(python: str) -> str:
    freeze = [python, *_PIP, "freeze", "--all", "--exclude", "pip", "--exclude", "setuptools"]
    return subprocess.run(freeze, capture_output=True, text=True, check=True).stdout


def _install(python: str, versions: Mapping[str, str]) -> None:
    """The package with its extras: these versions, of all others the newest that fit."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{name}=={version}{'.*' * (name in _BUILDS)}\n" for name, version in versions.items()))
        file.flush()
        package = f"{REPOSITORY}[{','.join(EXTRAS)}]"
        words = ["install", "--quiet", "--upgrade", "--upgrade-strategy", "eager", "--constraint", file.name]
        subprocess.run([python, *_PIP, *words, "--editable", package], check=True)


# -- tests ----------------------------------------------------------------------------------------------------------------


def _tests(python: str, words: Sequence[str]) -> tuple[int, list[str]]:
    """The exit code of pytest, and the tests that failed."""
    with tempfile.TemporaryDirectory() as cache:
        run = [python, "-m", "pytest", "--tb", "short", "-o", f"cache_dir={cache}", *words]
        code = subprocess.run(run, cwd=REPOSITORY).returncode
        found = Path(cache, "v", "cache", "lastfailed")
        failed = list(json.loads(found.read_text(encoding="utf-8"))) if found.exists() else []
    return code, failed


def _attribute(python: str, failed: list[str], differ: Mapping[str, tuple[str, str]]) -> None:
    """Says which package broke which tests: they pass with its tested version, all else as it was."""
    left = set(failed)
    for name, (here, tested) in differ.items():
        changed = [python, *_PIP, "install", "--quiet", f"{name}=={tested}"]
        if subprocess.run(changed, cwd=REPOSITORY).returncode == 0:
            _, still = _tests(python, [*failed, "-q", "--no-header", "-m", "slow or not slow"])
            if mended := set(failed) - set(still):
                print(f"{name} {here} broke, and {tested} does not:", *sorted(mended), sep="\n  ")
                left -= mended
        subprocess.run([python, *_PIP, "install", "--quiet", f"{name}=={here}"], cwd=REPOSITORY)
    if left:
        print("no package alone broke:", *sorted(left), sep="\n  ")


# -- what is to be had ----------------------------------------------------------------------------------------------------


def why_no_python(name: str) -> str:
    """Why this Python cannot be run, such as a shim of pyenv without the version that it stands for; empty: it can."""
    if shutil.which(name) is None:
        return "there is no such Python"
    ran = subprocess.run([name, "-c", "import venv"], capture_output=True, text=True)
    return " ".join(ran.stderr.split())[:300] if ran.returncode else ""


def _why_no_torch(python: str, version: str, *, cuda: bool) -> str:
    asked = [*_PIP, "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-"]
    found = subprocess.run([python, *asked, f"torch=={version}.*"], capture_output=True, text=True)
    if found.returncode:
        return found.stderr.strip()[-300:]
    return "" if cuda else why_not(found.stdout)


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
