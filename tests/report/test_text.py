"""Numbers with units, and folded module paths."""

from __future__ import annotations

import pytest

from moecompile.report.text import bytes_text, count_text, fold_paths, plural, unsuffixed


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (0.5, "0.50 B"), (1024, "1 KiB"), (1536, "1.50 KiB"), (1023.9 * 1024, "1.00 MiB"),
     (12.34 * 2**20, "12.3 MiB"), (274 * 2**30, "274 GiB")],
)  # fmt: skip
def test_bytes(count: float, expected: str) -> None:
    assert bytes_text(count) == expected


@pytest.mark.parametrize(("count", "expected"), [(999, "999"), (1234, "1.23K"), (671_026_419_200, "671B")])
def test_counts(count: int, expected: str) -> None:
    assert count_text(count) == expected


def test_plural() -> None:
    assert [plural(n, "rank") for n in (0, 1, 2)] == ["0 ranks", "1 rank", "2 ranks"]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([7], "7"), ([0, 1], "{0..1}"), ([0, 1, 2, 3], "{0..3}"), ([0, 2, 4], "{0..4..2}"), ([0, 2], "{0,2}"),
     ([0, 3, 4, 5, 9], "{0,3..5,9}")],
)  # fmt: skip
def test_layers_fold_as_a_shell_would_expand_them(numbers: list[int], expected: str) -> None:
    folded = fold_paths((f"model.layers.{n}.mlp", "same") for n in numbers)
    assert folded == [(f"model.layers.{expected}.mlp", list(range(len(numbers))))]


def test_layers_that_differ_stay_apart_and_in_order() -> None:
    items = [("layers.0.mlp", "dense"), ("layers.1.mlp", "moe"), ("layers.2.mlp", "dense"), ("head", "dense")]
    assert fold_paths(items) == [("layers.{0,2}.mlp", [0, 2]), ("layers.1.mlp", [1]), ("head", [3])]


def test_the_number_that_varies_is_folded() -> None:
    block = [(f"encoder.block.{n}.layer.1.ff", 0) for n in range(3)]
    stages = [(f"stages.{stage}.blocks.{n}.mlp", 0) for stage in range(2) for n in range(3)]
    assert [path for path, _ in fold_paths(block)] == ["encoder.block.{0..2}.layer.1.ff"]
    assert [path for path, _ in fold_paths(stages)] == ["stages.0.blocks.{0..2}.mlp", "stages.1.blocks.{0..2}.mlp"]


def test_alike_reasons_are_equal_without_the_numbers_of_names() -> None:
    assert unsuffixed("layers.3 uses silu_3") == unsuffixed("layers.12 uses silu_12")
    assert unsuffixed("width in is 64") != unsuffixed("width in is 128")
