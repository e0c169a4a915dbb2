"""Stores and the cache: documents come back, shards are invisible, results are whole or not there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from moecompile.errors import ConfigError
from moecompile.runtime.data.cache import cache_folder, content_of, key_of, made
from moecompile.runtime.data.store import StoreWriter, TokenStore

DOCUMENTS = [[5, 6, 7], [1], [2**15] * 12, [9, 8]]  # the third one spans four shards


def written(folder: Path, vocab_size: int = 2**16, *, has_targets: bool = True) -> TokenStore:
    folder.mkdir(exist_ok=True)
    with StoreWriter(folder, vocab_size, has_targets=has_targets, shard=4) as writer:
        for document in DOCUMENTS:
            tokens = np.array(document, dtype=np.int64)
            writer.add(tokens, tokens % 2 == 1 if has_targets else None)
        writer.end({"records": 4})
    return TokenStore(folder)


@pytest.mark.parametrize(("vocab_size", "bytes_"), [(2**16, 2), (2**16 + 1, 4)])
def test_documents_come_back(vocab_size: int, bytes_: int, tmp_path: Path) -> None:
    store = written(tmp_path / "s", vocab_size)
    assert (store.num_documents, store.num_tokens, store.counts) == (4, 18, {"records": 4})
    for number, document in enumerate(DOCUMENTS):
        start, stop = store.bounds(number)
        assert store.tokens(start, stop).tolist() == document
        assert store.targets(start, stop).tolist() == [token % 2 == 1 for token in document]
    assert store.lengths().tolist() == [3, 1, 12, 2] and store.lengths(1, 3).tolist() == [1, 12]
    flat = [token for document in DOCUMENTS for token in document]
    for start in range(18):
        assert store.tokens(start, 18).tolist() == flat[start:]
    assert [path.stat().st_size for path in sorted(store.folder.glob("tokens-*"))] == [4 * bytes_] * 4 + [2 * bytes_]


def test_a_token_that_its_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, 2**16) as writer:
        writer.add(np.array([2**16 - 1]))
        for token in (2**16, -1):
            with pytest.raises(ValueError, match=f"tokens {token} to {token} are not below 65536"):
                writer.add(np.array([token]))


def test_a_damaged_store_is_named(tmp_path: Path) -> None:
    store = written(tmp_path / "s", has_targets=False)
    file = store.folder / "tokens-00002.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError) as caught:
        TokenStore(store.folder)
    assert str(caught.value) == (
        f"data.cache={store.folder}: is damaged: tokens-00002.bin has 7 bytes, not 8. Delete this folder."
    )
    (store.folder / "meta.json").unlink()
    with pytest.raises(ConfigError, match="is damaged"):
        TokenStore(store.folder)


# -- the cache -------------------------------------------------------------------------------------------------------


def _make_slowly(cache: Path, number: int) -> None:
    def make(folder: Path) -> None:
        (folder / f"made by {number}").write_text("x")
        time.sleep(0.3)
        (folder / "whole").write_text("x")

    folder = made(cache, "key", make)
    assert (folder / "whole").is_file()


def _make_and_die(cache: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "half").write_text("x")
        os.kill(os.getpid(), signal.SIGKILL)

    made(cache, "key", make)


def test_one_of_many_processes_makes_a_result_and_a_killed_one_leaves_none(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    dying = fork.Process(target=_make_and_die, args=(tmp_path,))
    dying.start()
    dying.join(20)
    assert dying.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".key.*.tmp/half"))) == 1 and not (tmp_path / "key").exists()
    processes = [fork.Process(target=_make_slowly, args=(tmp_path, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 4
    names = sorted(path.name for path in (tmp_path / "key").iterdir())
    assert len(names) == 2 and names[0].startswith("made by") and names[1] == "whole"
    assert not list(tmp_path.glob("*.tmp"))


def test_a_result_that_fails_is_not_there(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ConfigError("data.path", "f line 3", "is bad", "Correct it")

    for _ in range(2):
        with pytest.raises(ConfigError, match="f line 3: is bad"):
            made(tmp_path, "key", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]


def test_without_locks_the_second_result_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*args: object) -> None:
        raise OSError("no locks")

    monkeypatch.setattr("fcntl.flock", no_locks)

    def make(folder: Path) -> None:
        (folder / "mine").write_text("x")
        (tmp_path / "key").mkdir()
        (tmp_path / "key" / "theirs").write_text("x")  # another process was faster

    assert [path.name for path in made(tmp_path, "key", make).iterdir()] == ["theirs"]
    assert not list(tmp_path.glob("*.tmp"))


def test_content_counts_and_not_names_or_times(tmp_path: Path) -> None:
    cache = cache_folder(str(tmp_path / "cache"))
    a, b, c = (tmp_path / name for name in "abc")
    a.write_text("same")
    b.write_text("same")
    c.write_text("more")
    assert content_of(a, cache) == content_of(b, cache) != content_of(c, cache)
    before = content_of(c, cache)
    c.write_text("MORE")
    os.utime(c, ns=(1, 1))
    assert content_of(c, cache) != before
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x").write_text("1")
    first = content_of(folder, cache)
    (folder / "y").write_text("1")
    assert content_of(folder, cache) != first
    assert key_of("a", 1) == key_of("a", 1) != key_of("a1")


def test_a_known_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = tmp_path / "a", cache_folder(str(tmp_path / "cache"))
    path.write_text("x" * 100)
    first = content_of(path, cache)
    monkeypatch.setattr("moecompile.runtime.data.cache._digest", lambda path: pytest.fail("read again"))
    assert content_of(path, cache) == first


def test_the_cache_is_where_caches_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "moecompile" / "data"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data.cache=.*file/x: cannot be created: Not a directory"):
        cache_folder(str(tmp_path / "file" / "x"))
