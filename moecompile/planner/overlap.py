"""Predicts the time of a forward with overlapping exchanges and experts, and chooses the overlap and its chunks.

W: seconds that the rows of one MoE layer are on the wire in forward, half for dispatch and half for combine; C, S:
seconds that routed and shared experts compute; n: chunks. The wire and the device each do one thing at a time.

1. without overlap      = W + C + S                                                             -> `forward_seconds`
2. with overlap         = the end of the schedule of passes/overlap.py with these times, in which each chunk has 1/n of
                          W, and 1/n of C times the price of chunks: experts multiply fewer rows at a time, and weight
                          gradients are computed apart from those of the rows.
3. backward mirrors it  : gradients of rows take C, those of weights C too, and the shared experts 2 S. With overlap,
                          weight gradients run where shared experts do, while the rows' gradients return (passes/
                          collect.py).                                                            -> `backward_seconds`
4. auto                 = the fastest of none, shared, 2 and 4 chunks in both directions, where a chunk leaves at least
                          `LEAST_ROWS` rows per expert. `shared` is worth something without shared experts too: in
                          backward.                                                               -> `choose_overlap`
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

CHUNKS = (2, 4)
# benchmarks/chunks.py: what each of several chunks costs, of the time of routed experts in both directions, and from
# how many rows per expert and chunk on it is so little.
LEAST_ROWS, PRICE = 256, 0.03
_GAIN = 0.98  # less than 2% faster is not worth more messages


@dataclass(frozen=True, kw_only=True)
class LayerSeconds:
    """Times of the forward of one MoE layer and micro-batch on one rank: wire, routed experts, shared experts."""

    wire: float
    routed: float
    shared: float


def choose_overlap(times: LayerSeconds, rows_per_expert: float) -> tuple[str, int]:
    """(overlap, chunks) with the shortest predicted time (step 4)."""
    kinds = [("none", 1), *_candidates(rows_per_expert)]
    seconds = {kind: _both_ways(times, *kind) for kind in kinds}
    best = min(kinds, key=seconds.__getitem__)
    return best if seconds[best] < _GAIN * seconds["none", 1] else ("none", 1)


def choose_chunks(times: LayerSeconds, rows_per_expert: float) -> int:
    """The number of chunks with the shortest predicted time; 2 where more would leave too few rows."""
    allowed = [chunks for overlap, chunks in _candidates(rows_per_expert) if overlap == "chunks"]
    return min(allowed or CHUNKS[:1], key=lambda chunks: _both_ways(times, "chunks", chunks))


def _candidates(rows_per_expert: float) -> Iterator[tuple[str, int]]:
    yield "shared", 1
    yield from (("chunks", chunks) for chunks in CHUNKS if rows_per_expert / chunks >= LEAST_ROWS)


def _both_ways(times: LayerSeconds, overlap: str, chunks: int) -> float:
    return forward_seconds(times, overlap, chunks) + backward_seconds(times, overlap, chunks)


def backward_seconds(times: LayerSeconds, overlap: str, chunks: int, price: float = PRICE) -> float:
    """Predicted seconds of backward (step 3), of a layer with these times in forward."""
    weights = times.routed if overlap == "none" else times.routed * (1 + price * chunks)
    mirrored = LayerSeconds(wire=times.wire, routed=times.routed, shared=2 * times.shared + weights)
    return forward_seconds(mirrored, overlap, chunks, price)


def forward_seconds(times: LayerSeconds, overlap: str, chunks: int, price: float = PRICE) -> float:
    """Predicted seconds of forward (steps 1 and 2)."""
    if overlap == "none":
        return times.wire + times.routed + times.shared
    hop = times.wire / 2 / chunks
    routed = times.routed / chunks * (1 + price * chunks)
    wire = device = 0.0
    sent, back = [0.0] * chunks, [0.0] * chunks
    for slot in range(chunks + 2):
        for chunk in reversed(range(chunks)):
            stage = slot - chunk
            if stage == 0:
                wire = sent[chunk] = max(wire, device) + hop
            elif stage == 1:
                device = max(device, sent[chunk]) + routed
                wire = back[chunk] = max(wire, device) + hop
            elif stage == 2:
                device = max(device, back[chunk])
        if slot == 0:
            device += times.shared
    return device
