"""Shell scripts as data: what is read of their forms, and that nothing is run."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from moecompile.errors import ConfigError
from moecompile.imports.shell import Script, read_script

HEAD = "#!/bin/bash\n"


def read(text: str, **given: str) -> Script:
    return read_script(HEAD + text, given, "a.sh")


def values(script: Script) -> dict[str, str]:
    return {key: setting.value for key, setting in script.settings.items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A=4\npython p.py --num-layers $A --x ${A}8", {"num-layers": "4", "x": "48"}),
        ('A=${A:-"7"}\npython p.py --num-layers ${A:-1} --x ${B:-${A}}', {"num-layers": "7", "x": "7"}),
        ("A=4; B=$((A * (2 + 1) / 2))\npython p.py --num-layers $B --x=1", {"num-layers": "6", "x": "1"}),
        ("A=0x10\npython p.py --num-layers $((0x800)) --x $((010 + 2#11 + A))", {"num-layers": "2048", "x": "27"}),
        ("R=(--num-layers 3\n # --y 1\n --x)\nR+=( --z 2 )\npython p.py ${R[@]}", {"num-layers": "3", "x": "true", "z": "2"}),
        ('R=" \\\n --num-layers 3 \\\n --x a b"\nR="$R --z 1"\npython p.py $R', {"num-layers": "3", "x": "a b", "z": "1"}),
        ("R=()\nR+=(--num-layers 3 --x 1)\npython p.py ${R[@]}", {"num-layers": "3", "x": "1"}),
        ("python p.py --num-layers 1 --x '$A'", {"num-layers": "1", "x": "$A"}),
        ("python p.py --num-layers 1 --num-layers 2 --a_b 3", {"num-layers": "2", "a-b": "3"}),
        ("cat <<EOF\n--num-layers 9 --w 1\nEOF\npython p.py --num-layers 1 --x 2", {"num-layers": "1", "x": "2"}),
        ("A=2\nif [ $A -gt 1 ]; then\n X='--x 1'\nelse\n X='--x 2'\nfi\npython p.py --num-layers 1 $X", {"num-layers": "1", "x": "1"}),
        ('if [[ ${P:-bf16} == "fp8" ]]; then\n X="--f"\nelif [ -z "$Q" ]; then\n X="--g"\nfi\npython p.py --num-layers 1 $X', {"num-layers": "1", "g": "true"}),
    ],
)  # fmt: skip
def test_forms(text: str, expected: dict[str, str]) -> None:
    assert values(read(text)) == expected


def test_a_number_that_is_none_has_no_value() -> None:
    script = read("python p.py --num-layers 2 --x $((08)) --y $((0xg)) --z $((1#1))")
    assert all(script.settings[key].missing for key in "xyz")


def test_the_caller_wins() -> None:
    assert values(read("TP=2\npython p.py --num-layers $TP --x $U", TP="8", U="u")) == {"num-layers": "8", "x": "u"}


def test_what_has_no_value_is_kept_as_such() -> None:
    script = read("D=$(date +'%d)')\npython p.py --num-layers $N --save $D/$1 --t `pwd`")
    assert script.settings["num-layers"].missing == ("N",)
    assert script.settings["save"].missing == ("a command's output", "1")
    assert script.settings["t"].value == "$(...)"


def test_nothing_is_run(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    script = read(f"A=$(touch {touched})\n`touch {touched}`\ntouch {touched}\npython p.py --num-layers 1 --x $A")
    assert not touched.exists() and script.settings["x"].missing


def test_what_is_not_read_is_said() -> None:
    script = read(
        "for i in 1 2; do\n python p.py --num-layers $i --lost 1\ndone\nf() {\n echo --gone 1\n}\npython p.py --num-layers 1 --x 2"
    )
    assert values(script) == {"num-layers": "1", "x": "2"}
    assert [(line, flags) for line, flags, _ in script.unread] == [(2, "--num-layers --lost"), (5, "--gone")]


def test_a_branch_that_is_not_decided() -> None:
    script = read(
        "if grep -q x y; then\n X='--x 1'\nfi\nif grep a; then\n R+=(--y 1)\nfi\npython p.py --num-layers 1 --z 1"
    )
    assert values(script) == {"num-layers": "1", "z": "1"} and [each[:2] for each in script.unread] == [
        (2, "--x"),
        (5, "--y"),
    ]


@pytest.mark.parametrize(
    "redirection",
    [
        "2>&1 | tee log.txt", "> log", ">log", ">>log 2>&1", "2> log", "&> log", "&>> log", "2>&1 &", "< /dev/null", "1>&2",
        "> >(tee -a log) 2>&1", '> "$L/a b" 2>&1', "2>/dev/null || true", ">| log",
    ],
)  # fmt: skip
def test_redirections_are_no_values(redirection: str) -> None:
    script = read(f"python p.py --num-layers 1 --x 2 --bf16 {redirection}\npython q.py --y 1")
    assert values(script) == {"num-layers": "1", "x": "2", "bf16": "true"}
    between = read(f"python p.py --num-layers 1 {redirection.partition('|')[0].rstrip('&')} --x 2")
    assert values(between) == {"num-layers": "1", "x": "2"} or "|" in redirection


def test_quoted_signs_are_values() -> None:
    script = read("python p.py --num-layers 1 --x '>a' --y \"<b> 2>&1\" --z a\\>b")
    assert values(script) == {"num-layers": "1", "x": ">a", "y": "<b> 2>&1", "z": "a>b"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('M=0\nA=4\n[ "$M" = "1" ] && A=8', "4"),
        ("M=0\nA=4\n[[ $M == 1 ]] && A=8 || A=6", "6"),
        ("M=1\nA=4\n[[ $M == 1 ]] && A=8 || A=6", "8"),
        ('A=4\n[ -n "$A" ] || A=8', "4"),
        ('A=4\n[ "$B" = "" ] && A=8', "8"),
        ('M=1\n[ -n "$A" ] || { A=8; }', "8"),
        ("M=1\nA=4\ntest $M -gt 1 && A=8", "4"),
        ("M=1\nA=4\n! [ $M -gt 1 ] &&\n A=8", "8"),
        ("M=1\nA=4\n[ $M = 1 ] && [ $M = 2 ] && A=8; B=1", "4"),
        ("M=1\nL=(4)\n[ $M = 2 ] && L=(\n8\n)\nA=$L", "4"),
        ("M=1\nA=4\n[ $M = 2 ] && echo a | tee b && A=8\n[ $M = 2 ] && if [ $M = 1 ]; then A=9; fi", "4"),
        ("M=1\nA=4\n[[ $M == 1 && $M == 2 ]] && A=8", "4"),
        ("M=1\nA=4\n(( M + 1 > 1 )) && A=8", "8"),
        ("M=7b-x\nA=4\n[[ $M == 7* && ! ( -z $M || $M == '7*' ) ]] && A=8", "8"),
        ("A=4\ncd x && A=8\nmkdir y || A=9", "8"),
        ("A=4\nfalse && A=8\n[ $A ] || A=9", "4"),
        ('M=7b\ncase $M in\n 8b|"7b") A=8 ;;\n *) A=9 ;;\nesac', "8"),
        ("M=13b\ncase ${M} in 7b) A=8 ;; '*') A=7;; 1*) A=9 ;; esac", "9"),
        (": ${A:=8}", "8"),
        ("A=(8 9)\nA=4", "4"),
    ],
)
def test_what_a_test_guards(text: str, expected: str) -> None:
    assert values(read(f"{text}\npython p.py --num-layers $A --x 1"))["num-layers"] == expected


@pytest.mark.parametrize(
    "test",
    [
        "[ -f a ]", "[[ -f a && $M != 2 ]]", "(( M > $(nproc) ))", "[ -f a ] && [ $M = 1 ]", "grep -q a b", "[[ $M =~ 1 ]]",
        "[[ $M == @(1|2) ]]",
    ],
)  # fmt: skip
def test_what_a_test_guards_that_is_not_decided(test: str) -> None:
    script = read(
        f"M=1\nA=4\n{test} && A=8 B='--y 2'\n[ -n $A ] && C=9\npython p.py --num-layers $A --x $C --z ${{B:-3}}"
    )
    assert [script.settings[key].missing for key in ("num-layers", "x", "z")] == [("A",), ("C",), ("B",)]
    said = read(f"R=()\n{test} && R+=(--y 2)\npython p.py --num-layers 1 --x 2 ${{R[@]}}")
    assert values(said) == {"num-layers": "1", "x": "2"} and said.unread[0][:2] == (3, "--y")
    assert values(read(f"{test} && A=8\nA=5\npython p.py --num-layers $A --x 1", M="1"))["num-layers"] == "5"


@pytest.mark.parametrize(
    "text",
    [
        "if [ -f a ]; then\n A=8\nfi", "if python q.py; then A=8; fi", "case $(uname) in x) A=8 ;; esac", "f() {\n A=8\n}\nf",
        "for A in 1 2; do :; done", "while read -r A; do A=8; done", "if [ -f a ]; then A=(8); fi", "((A++))", "read -r A B", "unset A", "[ -f a ] && ! A=8",
    ],
)  # fmt: skip
def test_what_is_not_decided_has_no_value(text: str) -> None:
    assert read(f"A=4\n{text}\npython p.py --num-layers $A --x 1").settings["num-layers"].missing == ("A",)
    assert values(read(f"{text}\npython p.py --num-layers $A --x 1", A="6"))["num-layers"] == "6"


def test_a_list_to_which_an_undecided_branch_adds() -> None:
    script = read('R="--num-layers 1 --x 2"\nif [ -f a ]; then\n R="$R --lost"\nfi\npython p.py $R')
    assert values(script) == {"num-layers": "1", "x": "2"} and script.unread[0][:2] == (3, "--lost")


@pytest.mark.parametrize("word", ['bash -c "python p.py $R"', 'eval "python p.py $R"', 'C="python p.py $R"\nsrun $C'])
def test_a_command_within_a_word(word: str) -> None:
    assert values(read(f"R='--num-layers 1 --x 2'\n{word}")) == {"num-layers": "1", "x": "2"}


class _Scripts:
    """Random scripts of assignments, tests, branches and lists."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def script(self) -> str:
        body = "\n".join(self.statement(2) for _ in range(self.random.randint(2, 8)))
        return f'R=()\nA=1\nB=7b\nC=\nD="x y"\n{body}\npython p.py --num-layers "q$A" --b "q$B" --c "q$C" --d "q$D" "${{R[@]}}"'

    def statement(self, depth: int) -> str:
        name, word, test = self.random.choice("ABCD"), self.word(), self.test()
        flat = [
            f"{name}={word}", f"{name}+={word}", f"{test} && {name}={word}", f"{test} || {name}={word}", f": {word}",
            f"R+=(--f{self.random.randint(0, 9)} {word})", f"{test} && {self.test()} && {name}=1 || {name}=9",
        ]  # fmt: skip
        if not depth or self.random.random() < 0.6:
            return self.random.choice(flat)
        a, b, c = (self.statement(depth - 1) for _ in range(3))
        return self.random.choice(
            (
                f"if {test}; then\n{a}\nelif {self.test()}; then\n{b}\nelse\n{c}\nfi",
                f"case {word} in\n1|2) {a} ;;\n7*) {b};;\n'x y'|*) {c} ;;\nesac",
                f"{{ {a}\n}}",
            )
        )

    def word(self) -> str:
        name = self.random.choice("ABCD")
        return self.random.choice(
            (f"${name}", f'"${name}"', f"${{{name}:-3}}", f"${{{name}-5}}", f"${{{name}:+6}}", f"${{{name}:=4}}", "$((7*2-3))",
             "'2'", f"x${name}", "1", f'"a ${name}"', "$(( 7 / -2 ))", "7b")
        )  # fmt: skip

    def test(self) -> str:
        name, word = self.random.choice("ABCD"), self.word()
        return self.random.choice(
            (f'[ "${name}" = 1 ]', f"[[ {word} == ${name} ]]", f'[ -z "${name}" ]', f"[[ -n ${name} && ${name} != 7* ]]", "true",
             f"[[ ! -z ${name} || 1 -gt 2 ]]", "(( 2 > 1 ))", f"[[ ${name} == '7*' ]]", "false", f'! [ "${name}" == 2 ]')
        )  # fmt: skip


def test_as_bash_reads() -> None:
    """Beside bash itself, whose `python` prints its words."""
    compared = 0
    for seed in range(60):
        text = _Scripts(seed).script()
        found = read(text)
        function = 'python() { shift; for w in "$@"; do printf "%s\\n" "$w"; done; }\n'
        done = subprocess.run(["bash", "-c", function + text], capture_output=True, text=True, check=False, timeout=20)
        if done.stderr or found.unread or any(each.missing for each in found.settings.values()):
            continue
        flags: dict[str, list[str]] = {}
        for word in done.stdout.splitlines():
            if word.startswith("--"):
                flags[word[2:]] = []
            else:
                flags[list(flags)[-1]].append(word)
        assert values(found) == {key: " ".join(words) or "true" for key, words in flags.items()}, text
        compared += 1
    assert compared > 40


def test_the_parser_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="pip install shfmt-py"):
        read("python p.py --num-layers 1 --x 1")


def test_quotes_within_a_list_that_do_not_end() -> None:
    with pytest.raises(ConfigError, match="No closing quotation"):
        read('R="--x \'a"\npython p.py --num-layers 1 $R')


def test_ranks_of_the_launcher() -> None:
    script = read(
        "#SBATCH --nodes=4\n#SBATCH --ntasks-per-node 8\nG=8\ntorchrun --nproc_per_node $G --nnodes 2 p.py --num-layers 1 --x 2"
    )
    assert {key: script.launch[key].value for key in ("nodes", "ntasks-per-node", "nproc-per-node", "nnodes")} == {
        "nodes": "4", "ntasks-per-node": "8", "nproc-per-node": "8", "nnodes": "2",
    }  # fmt: skip
    assert values(script) == {"num-layers": "1", "x": "2"}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (
            "python p.py --num-layers 'a",
            "is no shell script that can be read: line 2: reached EOF without closing quote",
        ),
        ("python p.py --num-layers $((1 + 2", "line 2: reached EOF without matching"),
        (
            "python p.py --num-layers 1 --x 1\npython p.py --num-layers 2 --x 1",
            "has several commands that train (lines 2, 3)",
        ),
    ],
)
def test_refused(text: str, rule: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(text)
    assert rule in str(error.value)
