"""What is shown while nothing else can be: a turning sign on a terminal, one plain line elsewhere."""

from __future__ import annotations

import sys
import threading

_FRAMES, _FRAME_S = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", 0.1
_CLEAR = "\r\033[2K"
_ended = threading.Event()
_ended.set()
_thread: list[threading.Thread] = []


def show(text: str, *, line: bool = True) -> None:
    """Shows `text` until `done`, in place of an earlier one. line: whether it is printed where there is no terminal."""
    done()
    if not sys.stdout.isatty():
        if line:
            print(f"{text} ...", flush=True)
        return
    _ended.clear()
    _thread.append(threading.Thread(target=_turn, args=(text,), daemon=True))
    _thread[-1].start()


def done() -> None:
    """Makes room for what is printed next."""
    _ended.set()
    while _thread:
        _thread.pop().join()


def _turn(text: str) -> None:
    i = 0
    while True:
        sys.stdout.write(f"{_CLEAR}{_FRAMES[i % len(_FRAMES)]} {text}")
        sys.stdout.flush()
        i += 1
        if _ended.wait(_FRAME_S):
            break
    sys.stdout.write(_CLEAR)
    sys.stdout.flush()
