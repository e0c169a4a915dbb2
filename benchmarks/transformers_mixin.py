"""transformers' own common tests on models as they are and on rewritten ones, side by side.

    python benchmarks/transformers_mixin.py                    all four families
    python benchmarks/transformers_mixin.py --only Llama       one of them
    python benchmarks/transformers_mixin.py --only Mixtral -k save_load

The tests (`ModelTesterMixin`) are in transformers' source distribution, which pip downloads once into a cache folder in
the version that is installed. There they import two more mixins that the distribution leaves out, for `generate` and
for export; both are empty here (tests/test_nothing_else_changes.py tests `generate`).

In the second run every constructor ends with a compilation: dense FFNs become four copies with top-2, Mixtral keeps its
experts. Prints each test that does not end alike, with the reason from benchmarks/mixin/explained.yaml, writes
benchmarks/results/transformers_mixin.json, and exits with 1 if one is not explained there. Needs `pip install
moecompile[mixin]`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import yaml

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results") / "transformers_mixin.json"
EXPLAINED = Path(__file__).with_name("mixin") / "explained.yaml"
FAMILIES = ("Llama", "Qwen3", "Bert", "Mixtral")
ABSENT = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}


def common_tests(cache: Path) -> Path:
    """A folder with the package `transformers_tests`, from the source distribution of the installed version."""
    wanted = version("transformers")
    folder = cache / f"transformers-{wanted}"
    if (folder / "transformers_tests").is_dir():
        return folder
    with TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*command, "--dest", download, f"transformers=={wanted}"], check=True)
        (archive,) = Path(download).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(download, filter="data")
        (tests,) = Path(download).glob("*/tests")
        for path, name in ABSENT.items():
            (tests / path).parent.mkdir(exist_ok=True)
            (tests / path).write_text(f"class {name}:\n    pass\n")
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mv", str(tests), str(folder / "transformers_tests")], check=True)
    return folder


def run(tests: Path, arguments: list[str], *, rewritten: bool) -> tuple[dict[str, tuple[str, str]], dict[str, int]]:
    """(`LlamaTest::test_save_load` -> (status, first line of the error), class -> sites) of one run."""
    with TemporaryDirectory() as folder:
        report, counts, ini = (Path(folder) / name for name in ("report.xml", "counts.json", "pytest.ini"))
        ini.write_text("[pytest]\n")
        environment = {
            **os.environ, "MOECOMPILE_REWRITE": str(int(rewritten)), "MOECOMPILE_REWRITTEN_COUNTS": str(counts),
            "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(tests))), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-c",
            str(ini),
            "--rootdir",
            str(REPOSITORY),
            "-p",
            "no:cacheprovider",
        ]
        where = str(REPOSITORY / "benchmarks" / "mixin" / "test_models.py")
        done = subprocess.run(
            [*command, f"--junitxml={report}", where, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 1):
            sys.exit(done.stdout + done.stderr)
        return read(report), json.loads(counts.read_text())


def read(report: Path) -> dict[str, tuple[str, str]]:
    """Test -> (passed, skipped or failed; first line of why) of a JUnit report."""
    found = {}
    for test in ElementTree.parse(report).iter("testcase"):
        name = f"{test.attrib['classname'].rpartition('.')[2]}::{test.attrib['name']}"
        bad = next((child for child in test if child.tag in ("failure", "error")), None)
        if bad is not None:
            found[name] = ("failed", bad.attrib.get("message", "").strip().partition("\n")[0][:200])
        else:
            found[name] = ("skipped" if test.find("skipped") is not None else "passed", "")
    return found


def explanation(test: str, explained: dict[str, str]) -> str | None:
    """The reason for one test, which the table gives for it alone or for all families."""
    return explained.get(test) or explained.get(test.partition("::")[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=FAMILIES, action="append", help="run these families alone")
    parser.add_argument("-k", default="", help="pytest's -k within them")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "moecompile")
    options = parser.parse_args()
    families = tuple(options.only or FAMILIES)
    chosen = " or ".join(f"{family}Test" for family in families)
    arguments = ["-k", f"({chosen}) and ({options.k})" if options.k else chosen]
    tests = common_tests(options.cache)
    plain, _ = run(tests, arguments, rewritten=False)
    changed, sites = run(tests, arguments, rewritten=True)
    explained = yaml.safe_load(EXPLAINED.read_text())
    rows = [
        {
            "test": test, "plain": plain[test][0], "rewritten": status, "error": error,
            "explanation": explanation(test, explained),
        }
        for test, (status, error) in changed.items()
        if status != plain[test][0]
    ]  # fmt: skip
    for family in families:
        mine = [
            {k: v[0] for k, v in results.items() if k.startswith(f"{family}Test::")} for results in (plain, changed)
        ]
        held = {name: count for name, count in sites.items() if name.startswith(family)}
        print(f"{family}: as it is {dict(Counter(mine[0].values()))}, rewritten {dict(Counter(mine[1].values()))}")
        print(f"  rewritten sites of the last model of each class: {held}")
    for row in rows:
        print(f"{row['test']}: {row['plain']} -> {row['rewritten']}: {row['error']}")
        print(f"  {row['explanation'] or 'NOT EXPLAINED'}")
    both = [test for test, (status, _) in plain.items() if status == "failed" == changed[test][0]]
    print(f"{len(both)} fail in both runs: {', '.join(both) or '-'}")
    if not options.k and families == FAMILIES:
        RESULTS.write_text(
            json.dumps(
                {
                    "transformers": version("transformers"),
                    "plain": Counter(status for status, _ in plain.values()),
                    "rewritten": Counter(status for status, _ in changed.values()),
                    "sites": sites, "differ": rows, "fail_in_both": both,
                },
                indent=2,
            ) + "\n"
        )  # fmt: skip
    return int(any(row["explanation"] is None for row in rows))


if __name__ == "__main__":
    sys.exit(main())
