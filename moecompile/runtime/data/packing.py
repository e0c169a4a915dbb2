"""Packing: which chats share a row.

Best fit, longest first: each chat goes into the fullest row in which it still has room, or into a new one. Chats of one
length are taken in the order given, which the caller shuffles. So rows depend on lengths and that order alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pack(lengths: NDArray[np.int64], size: int) -> list[list[int]]:
    """Rows of indices into `lengths`, the longest first in each; every row has at most `size` tokens.

    Args:
        lengths: of the chats in tokens, each in 1 .. size.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]  # room in tokens -> rows, the newest last
    rooms = 0  # bit r: some row has room for r more tokens
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1  # the lowest bit: the fullest of these rows
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = size, len(rows)
            rows.append([])
        rows[row].append(index)
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows
