"""What a search finds: candidates, the front of speed against memory, and why others were rejected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from moecompile.plan import FITS


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that fits. settings: dotted key -> value, what makes a plan of it. runs: whether this package runs it.

    seconds: of a step. tokens_per_second_per_rank: predicted. memory_bytes: of a rank with an even load.
    memory_bytes_uneven: with the load that is to be expected. fits: `yes` with it, or `if even`.
    """

    settings: Mapping[str, object]
    runs: bool
    seconds: float
    tokens_per_second_per_rank: float
    memory_bytes: int
    memory_bytes_uneven: int
    fits: str

    @property
    def overrides(self) -> str:
        """The line for the command line."""
        return " ".join(f"{key}={_text(value)}" for key, value in self.settings.items())


@dataclass(kw_only=True)
class Reason:
    """Why candidates were rejected: the rule, how many, and what the first one was."""

    rule: str
    count: int = 0
    example: str = ""


@dataclass(kw_only=True)
class Rejected:
    """Reasons, each counted. least: (bytes, settings) of the smallest runnable one that is too large."""

    reasons: dict[str, Reason] = field(default_factory=dict)
    least: tuple[int, Mapping[str, object]] | None = None

    def add(self, rule: str, example: str, count: int = 1) -> None:
        """Counts `count` candidates that break `rule`."""
        reason = self.reasons.setdefault(rule, Reason(rule=rule, example=example))
        reason.count += count

    def too_large(self, needed: int, limit: float, settings: Mapping[str, object] | None = None) -> None:
        """Counts a candidate that needs more memory than there is; settings: of one that runs."""
        if settings is not None and (self.least is None or needed < self.least[0]):
            self.least = (needed, settings)
        self.add(f"needs more than the {limit / 2**30:.4g} GiB of a rank", f"{needed / 2**30:.4g} GiB")

    @property
    def total(self) -> int:
        """Candidates that were rejected."""
        return sum(reason.count for reason in self.reasons.values())

    @property
    def listed(self) -> list[Reason]:
        """The reasons, the most frequent first."""
        return sorted(self.reasons.values(), key=lambda reason: -reason.count)


def front(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that no other one beats in both speed and memory with the expected load, the fastest first.

    If some fit with that load, only they count. Of equal ones the first counts, which is that with the fewest changes.
    """
    candidates = list(candidates)
    candidates = [each for each in candidates if each.fits == FITS] or candidates
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (-c.tokens_per_second_per_rank, c.memory_bytes_uneven)):
        if not kept or candidate.memory_bytes_uneven < kept[-1].memory_bytes_uneven:
            kept.append(candidate)
    return kept


def tight(candidates: Iterable[Candidate], best: Candidate | None) -> Candidate | None:
    """The fastest that fits only if the load is even, if it is faster than the best."""
    found = [each for each in candidates if each.fits != FITS]
    fastest = max(found, key=lambda each: each.tokens_per_second_per_rank, default=None)
    if fastest is None or best is None or best.tokens_per_second_per_rank >= fastest.tokens_per_second_per_rank:
        return None
    return fastest


def _text(value: object) -> str:
    return "null" if value is None else str(value)
