"""Whether a model fits into the memory that is free, before it is built."""

from __future__ import annotations

from pathlib import Path

import pytest

from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.models import room
from moecompile.tasks.inputs import check_inputs
from tests.test_cli import MODULE, cli

WIDTHS = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}  # fmt: skip
LLAMA = ["model=llama_nano", *(f"model.config.{key}={value}" for key, value in WIDTHS.items())]


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}, 4096 * 1024),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "1000\n", "sys/fs/cgroup/a/memory.current": "600\n",
          "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 100\n"}, 500),
        ({"proc/self/cgroup": "3:cpu:/x\n4:memory:/j\n", "sys/fs/cgroup/memory/j/memory.limit_in_bytes": "1000\n",
          "sys/fs/cgroup/memory/j/memory.usage_in_bytes": "900\n", "sys/fs/cgroup/memory/j/memory.stat": "cache 1\n"}, 100),
    ],
)  # fmt: skip
def test_free_memory_is_within_all_limits(files: dict[str, str], free: int | None, tmp_path: Path) -> None:
    if files:
        write(tmp_path, {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    4096 kB\n", **files})
    assert room.free_memory(tmp_path) == free


@pytest.mark.parametrize("words", [["task=train", "mesh=cpu_1"], ["task=plan", "mesh=cpu_1x2"], ["task=compile"]])
def test_a_model_of_7b_is_refused_before_it_is_built(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda: 2 * 2**30)
    with pytest.raises(ConfigError) as error:
        check_inputs(compose_config([*LLAMA, *words]))
    assert str(error.value) == (
        "model.architecture=llama: needs 24.2 GiB for 6.48 B weights, and 2.0 GiB of memory are free here. Give its "
        "widths (model.config.hidden_size, model.config.num_hidden_layers) or a larger machine; model.device=meta needs none."
    )


def test_each_rank_is_counted_and_what_needs_none_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda: 60 * 2**30)
    whole = [*LLAMA, "mesh=cpu_1x4", "model.load=full"]
    with pytest.raises(ConfigError, match=r"on each of 4 ranks of this machine, and 60.0 GiB .* fewer ranks"):
        room.check_room(compose_config(whole), 4)
    room.check_room(compose_config(whole), 2)
    room.check_room(compose_config([*LLAMA, "mesh=cpu_1x4"]), 4)  # by shards
    room.check_room(compose_config([*whole, "model.device=meta"]), 4)
    monkeypatch.setattr(room, "free_memory", lambda: 2 * 2**30)
    check_inputs(compose_config([*whole, "task=rehearse"]))


def test_the_command_refuses_at_once_what_no_machine_holds(tmp_path: Path) -> None:
    words = ["model=llama_nano", "model.config.hidden_size=65536", "model.config.num_hidden_layers=64", "mesh=cpu_1"]
    done = cli(tmp_path, *words, "hydra.run.dir=out", program=MODULE)
    assert done.returncode == 2
    assert done.stderr.startswith("error: model.architecture=llama: needs ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
