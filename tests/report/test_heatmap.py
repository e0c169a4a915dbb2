"""The load history's file, and the picture that is made of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.image import imread

from moecompile.load_history import NO_EXPERT, LoadHistory
from moecompile.report.heatmap import chosen_steps, load_ratios, short_names, write_heat_map

LAYERS = ("model.layers.1.mlp.router", "model.layers.2.mlp.router")


def history(*rows: tuple[list[int], list[int]]) -> LoadHistory:
    made = LoadHistory()
    for i, row in enumerate(rows):
        made.add(10 * i + 1, dict(zip(LAYERS, row, strict=True)))
    return made


# -- history ---------------------------------------------------------------------------------------------------------


def test_a_history_is_read_back(tmp_path: Path) -> None:
    """Layers with fewer experts are filled up."""
    history(([4, 0, 2], [3, 3]), ([1, 2, 3], [6, 0])).save(tmp_path / "load.npz")
    again = LoadHistory.read(tmp_path / "load.npz")
    assert (again.layers, again.steps) == (list(LAYERS), [1, 11])
    assert np.stack(again.loads).tolist() == [
        [[4, 0, 2], [3, 3, NO_EXPERT]],
        [[1, 2, 3], [6, 0, NO_EXPERT]],
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["load.npz"]


def test_layers_do_not_change_on_the_way() -> None:
    with pytest.raises(ValueError, match=r"step 2 has the layers \['a'\], earlier steps have"):
        history(([1], [1])).add(2, {"a": [1]})


# -- picture ---------------------------------------------------------------------------------------------------------


def test_ratios_by_hand() -> None:
    ratios = load_ratios(np.array([[6, 0, 3], [1, 3, NO_EXPERT], [0, 0, 0]]))
    assert ratios[0].tolist() == [2.0, 0.0, 1.0]
    assert ratios[1, :2].tolist() == [0.5, 1.5] and np.isnan(ratios[1, 2])
    assert ratios[2].tolist() == [0.0, 0.0, 0.0]


def test_steps_are_evenly_spaced_with_both_ends() -> None:
    assert chosen_steps(1, 6) == [0]
    assert chosen_steps(4, 6) == [0, 1, 2, 3]
    assert chosen_steps(101, 6) == [0, 20, 40, 60, 80, 100]
    assert chosen_steps(8, 3) == [0, 4, 7]


def test_names_lose_what_they_share() -> None:
    assert short_names([f"model.layers.{i}.mlp.router" for i in (1, 2, 30)]) == ["1", "2", "30"]
    assert short_names(["encoder.block.1.layer.1.ffn.router", "decoder.block.1.layer.2.ffn.router"]) == [
        "encoder.block.1.layer.1", "decoder.block.1.layer.2",
    ]  # fmt: skip
    assert short_names(["a.router"]) == ["a.router"]


def holds(path: Path, where: float) -> bool:
    """Whether the picture has an area (no line, no letter) in the colour of `where` on the scale, 0 to 1."""
    wanted = np.array(colormaps["viridis"](where)[:3])
    return bool((np.abs(imread(path)[..., :3] - wanted).max(-1) < 0.01).sum() > 5000)


def test_colours_say_what_the_load_is(tmp_path: Path) -> None:
    """Even is the middle of the scale, four times the mean and more its end, a quarter and less its beginning."""
    even, starved = tmp_path / "even.png", tmp_path / "starved.png"
    write_heat_map(history(([5, 5, 5, 5], [9, 9, 9, 9])), even, title="a run")
    write_heat_map(history(([10, 0, 0, 0], [0, 0, 0, 7])), starved, title="a run")
    assert [holds(even, where) for where in (0.0, 0.5, 1.0)] == [False, True, False]
    assert [holds(starved, where) for where in (0.0, 0.5, 1.0)] == [True, False, True]


@pytest.mark.parametrize(("layers", "experts", "rows"), [(1, 1, 1), (4, 16, 6), (61, 256, 40), (3, 10, 5)])
def test_any_size_is_a_picture(tmp_path: Path, layers: int, experts: int, rows: int) -> None:
    made, random = LoadHistory(), np.random.default_rng(0)
    for step in range(rows):
        made.add(step, {f"layers.{i}.router": random.integers(0, 9, experts).tolist() for i in range(layers)})
    write_heat_map(made, tmp_path / "load.png", title="deepseek_ep")
    height, width, _ = imread(tmp_path / "load.png").shape
    assert 300 < height < 3000 and 400 < width < 3000


def test_neither_torch_nor_lightning_nor_a_display_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys; from moecompile.report.heatmap import write_heat_map; from moecompile.load_history import *\n"
        "h = LoadHistory(); h.add(1, {'a': [1, 2]}); write_heat_map(h, __import__('pathlib').Path('load.png'), title='t')\n"
        "print(sorted({'torch', 'lightning', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"MPLBACKEND": "tkagg"},
    )
    assert run.stdout.strip() == "[]", run.stderr
    assert (tmp_path / "load.png").is_file()
