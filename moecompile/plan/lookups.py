"""Which embedding tables have their rows spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass

LOOKUP_OPS = ("send_ids", "return_rows")
"""The exchanges of a lookup. Their last argument is the axis."""


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """A table whose rows are spread over all ranks with different tokens, and looked up there.

    weight: its name in the model. module: path of the module that reads it. rows, width: its shape. computed: whether
    its ids are computed of the model's inputs (hashes of n-grams), or given. ids_per_token: rows that a token reads, in
    so many `reads` of the module, which do not know of each other. by_rows: the rule by which the rows that were read
    are stepped alone; empty: as other weights are.
    """

    weight: str
    module: str
    rows: int
    width: int
    computed: bool
    ids_per_token: float
    reads: int = 1
    by_rows: str = ""

    @property
    def numbers(self) -> int:
        """Of the whole table."""
        return self.rows * self.width
