"""Formats of rows in eight bits on the wire: what `dispatch.wire_dtype` calls them, and their bytes.

A row is sent as its numbers in e4m3 (OCP 8-bit floating point: 4 bits of exponent, 3 of mantissa, at most 448), one
byte each, and after them one scale for each block of consecutive numbers. The last block may be shorter.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """block: numbers that share a scale. scale_bytes: 1: a power of two, its exponent with bias 127 (E8M0); 4: fp32."""

    block: int
    scale_bytes: int

    def blocks(self, width: int) -> int:
        """Scales of a row."""
        return -(-width // self.block)

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` numbers."""
        return width + self.blocks(width) * self.scale_bytes


ROW_FORMATS: dict[str, RowFormat] = {
    "fp8": RowFormat(block=32, scale_bytes=1),  # MXFP8 (OCP Microscaling Formats 1.0)
    "fp8_128": RowFormat(block=128, scale_bytes=4),  # DeepSeek-V3 (arXiv 2412.19437, section 3.3)
}
"""By name; what is not here raises."""
