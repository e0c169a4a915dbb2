"""Memory of one layer's first step, in a process of its own.

torch's profiler reports every allocation of the CPU allocator, also those inside of ops. It is on from the layer's very
first call, so that what a library keeps for later steps counts too. Weights and the input are there before; what
oneDNN takes for itself past torch's allocator is not seen.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from layer import HIDDEN

from side_by_side.common import Layer, Place, Size, Weights, open_process_group

Build = Callable[[Size, Weights, Place], Layer]


def measure(build: Build, size: Size) -> dict[str, float]:
    """`kept_mib`: allocated after forward and not freed, the output included. `peak_mib`: the most at any time of
    forward and backward, gradients of all weights included.

    Raises:
        RuntimeError: the process failed.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, build, size))
    process.start()
    sender.close()
    try:
        return dict(receiver.recv())
    except EOFError:
        raise RuntimeError(f"the process that measures memory at {size} failed; its error is above") from None
    finally:
        process.join()


def _run(sender: Any, build: Build, size: Size) -> None:
    open_process_group()
    layer = build(size, Weights.random(size), Place())
    x = torch.randn(1, size.tokens, HIDDEN).bfloat16().requires_grad_()
    direction = torch.randn(1, size.tokens, HIDDEN).bfloat16()
    with _profile() as forward:
        out = layer(x)
    with _profile() as backward:
        out.backward(direction)
    kept, peak = allocated(forward)
    _, peak_backward = allocated(backward)
    sender.send({"kept_mib": kept / 2**20, "peak_mib": max(peak, kept + peak_backward) / 2**20})
    sender.close()
    os._exit(0)  # threads of libraries may abort the interpreter's own shutdown


@contextlib.contextmanager
def _profile() -> Iterator[Any]:
    """The profiler; it writes two lines to stderr, which nobody needs."""
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with open(os.devnull, "wb") as nowhere:
        stderr = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            with profile:
                yield profile
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def allocated(profile: Any) -> tuple[int, int]:
    """(bytes allocated and not freed, the most at any time) since the profile began."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return now, most
