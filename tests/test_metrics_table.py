from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from moecompile.metrics_table import METRICS, read_rows
from moecompile.runtime.saving import rows_until, write_again

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory")
ROWS = [{"step": 1.0, "train_loss": 2.5}, {"step": 2.0, "train_loss": 2.25, "val_loss": 3.125}]


def write(folder: Path, rows: list[dict[str, float]]) -> Path:
    logger = CSVLogger(folder, name="", version="")
    for row in rows:
        logger.log_metrics(row, step=int(row["step"]))
        logger.save()
    return folder / METRICS


def test_a_row_that_was_cut_off_is_none_and_those_before_it_stay(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    whole = path.read_bytes()
    first = whole.index(b"\n", whole.index(b"\n") + 1) + 1  # the end of the first row
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert read_rows(path) == ROWS[: int(length >= first)], whole[:length]
    path.write_bytes(whole)
    assert read_rows(path) == ROWS
    path.write_bytes(whole.replace(b"1,2.5,\r\n", b"1,2.5,\r\n2,2.3\r\n"))  # cut off before another attempt wrote
    assert read_rows(path) == ROWS
    assert read_rows(path, without=("train",)) == [{"step": 1.0}, {"step": 2.0, "val_loss": 3.125}]


def test_a_resumed_run_has_the_rows_of_the_earlier_one_whole(tmp_path: Path) -> None:
    path, checkpoint = write(tmp_path, ROWS), tmp_path / "checkpoints" / "step-1"
    path.write_bytes(path.read_bytes() + b"3,2.1")  # killed while it was written
    logger = CSVLogger(tmp_path, name="", version="")
    write_again(logger, rows_until(checkpoint, step=2))
    assert read_rows(path) == ROWS  # on disk before the first new row
    logger.log_metrics({"train_loss": 2.0, "lr": 0.5}, step=3)
    logger.save()
    assert read_rows(path) == [*ROWS, {"step": 3.0, "train_loss": 2.0, "lr": 0.5}]


def test_earlier_rows_that_cannot_be_written_stay_where_they_are(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    before = path.read_bytes()
    broken: list[dict[str, float]] = [*ROWS, {"step": "no number"}]  # type: ignore[dict-item]
    with pytest.raises(AttributeError):
        write_again(CSVLogger(tmp_path, name="", version=""), broken)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [METRICS]
