"""Wheels of what a machine with torch and transformers lacks for moecompile, to be installed there without a network.

    python benchmarks/wheelhouse.py                     for the Python that runs it, into wheelhouse/
    python benchmarks/wheelhouse.py --python 3.12       for another one

Where there is a network, it builds the wheel of this checkout, and downloads those of the packages that it needs, in
the versions of the environment that runs it, without all that torch and transformers bring. Carry the folder over, and

    python -m pip install --no-index --find-links wheelhouse moecompile
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]
GIVEN = ("torch", "transformers")
"""What the machine has, with all that they need."""
TESTS = ("pytest",)
"""For `pytest -m gpu`."""


def main() -> None:
    """Fills the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}", help="such as 3.12")
    parser.add_argument("--folder", type=Path, default=Path("wheelhouse"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    wanted = [f"{name}=={distribution(name).version}" for name in sorted(needed(options.python))]
    if options.python == parser.get_default("python"):
        _wheel(options.folder, str(REPOSITORY), *wanted)
    else:
        _wheel(options.folder, str(REPOSITORY))
        for each in wanted:
            _fetch(each, options.python, options.folder)
    wheels = sorted(options.folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    print(f"{len(wheels)} wheels, {size:.0f} MiB, for Python {options.python}: {options.folder}")


def needed(python: str) -> set[str]:
    """Names of the packages of moecompile and its tests, without those that the machine has."""
    given = _closure(GIVEN, python, known=set())
    return _closure(("moecompile", *TESTS), python, known=given) - {"moecompile"}


def _closure(names: Iterable[str], python: str, known: set[str]) -> set[str]:
    """These packages and all that they need, as far as it is not known; as the environment's metadata say."""
    found, seen = set[str](), set[tuple[str, frozenset[str]]]()
    wanted = [Requirement(name) for name in names]
    while wanted:
        next_ = wanted.pop()
        name, extras = canonicalize_name(next_.name), frozenset(next_.extras)
        if (name, extras) in seen or (name in known and not extras):  # an extra may need more than is known
            continue
        seen.add((name, extras))
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:  # not for this system
            continue
        found.add(name)
        wanted += [each for each in map(Requirement, requires) if _applies(each, extras, python)]
    return found - known


def _applies(requirement: Requirement, extras: Iterable[str], python: str) -> bool:
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    marker = requirement.marker
    return marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in (*extras, ""))


def _fetch(requirement: str, python: str, folder: Path) -> None:
    """A wheel for another Python on Linux; what has only sources is built here."""
    machine = platform.machine()
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in range(34, 4, -1)]
    platforms += [f"--platform=manylinux2014_{machine}", f"--platform=manylinux2010_{machine}", "--platform=any"]
    only = ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp", *platforms]
    if _pip("download", "--no-deps", "--dest", str(folder), *only, requirement, check=False):
        return
    _wheel(folder, requirement)


def _wheel(folder: Path, *requirements: str) -> None:
    """Downloads or builds wheels, but none for this machine alone."""
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), *requirements)
    if built := [wheel.name for wheel in folder.glob("*.whl") if "-linux_" in wheel.name]:
        raise SystemExit(f"{built[0]} was built for this machine alone: there is no wheel of it in the registry")


def _pip(*arguments: str, check: bool = True) -> bool:
    done = subprocess.run(
        [sys.executable, "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check", *arguments[1:]],
        capture_output=True, text=True,
    )  # fmt: skip
    if check and done.returncode:
        raise SystemExit(f"pip {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return not done.returncode


if __name__ == "__main__":
    main()
