"""As many batches on every rank.

Every forward exchanges rows with all ranks. A rank that has no batch left would leave the others waiting, or exchange
rows of its validation with those of their training.

Algorithm, for each loader of Lightning, on all ranks:
  1. Lightning's sampler of predictions repeats no sample, and gives some ranks more: it becomes that of validation.
  2. Lengths are compared. Where the number of batches is certain (torch's samplers, ours), that is all: if they differ,
     every rank has the shortest one's.
  3. Else (an IterableDataset, any iterable, a batch sampler of your own) it is compared before each batch: the first
     rank that has none ends the epoch of all.
The user's loader is not changed: a copy of it, of a subclass, has the even batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSamplerWrapper
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from moecompile.errors import ConfigError
from moecompile.kept_groups import cpu_group
from moecompile.runtime.data.batches import GlobalBatchSampler, ValidationSampler

_CERTAIN = (SequentialSampler, RandomSampler, DistributedSampler, DistributedSamplerWrapper)
"""Samplers that have the number of samples that they say."""


class Even:
    """The batches of a loader that all ranks have: what a subclass of its class does.

    even_of: the loader; None: these are known to be even. even_length: of the loader with the fewest; None: its own.
    even_unknown: no length is told, since a rank knows none. even_timeout: None: nothing is compared.
    """

    even_of: Any = None
    even_length: int | None = None
    even_unknown = False
    even_timeout: timedelta | None = None
    even_has_begun = False

    def __len__(self) -> int:
        if self.even_unknown:
            raise TypeError("a rank does not know its length before it ends")
        if self.even_length is not None:
            return self.even_length
        own: int = super().__len__()  # type: ignore[misc]
        return own

    def __iter__(self) -> Iterator[Any]:
        batches = super().__iter__()  # type: ignore[misc]
        if self.even_timeout is not None:
            return self._compared(batches, self.even_timeout)
        return itertools.islice(batches, self.even_length)

    def _compared(self, batches: Iterator[Any], timeout: timedelta) -> Iterator[Any]:
        nothing = object()
        for number in itertools.count():
            batch = next(batches, nothing)
            have = [bool(has) for has in _of_ranks(int(batch is not nothing), timeout)]
            if not all(have):
                if any(have):  # one that goes on where it stopped may have nothing left
                    _tell(have, number, is_first=not self.even_has_begun and not hasattr(self, "state_dict"))
                return
            self.even_has_begun = True
            yield batch


class _Wrapped:
    """An iterable that is no DataLoader."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class _WrappedWithState(_Wrapped):
    """One whose position Lightning saves."""

    def state_dict(self) -> Any:
        """Its own."""
        return self.batches.state_dict()  # type: ignore[attr-defined]

    def load_state_dict(self, state: Any) -> None:
        """Its own."""
        self.batches.load_state_dict(state)  # type: ignore[attr-defined]


def even(loader: Any, timeout: timedelta) -> Any:
    """A loader with as many batches on every rank, which is `loader` itself where that is known. All ranks call it.

    Raises:
        ConfigError: some ranks have no batch.
    """
    if isinstance(loader, Even):  # Lightning leaves it in a CombinedLoader of the user's
        if loader.even_of is None:
            return loader
        loader = loader.even_of
    for each in (loader, getattr(loader, "batch_sampler", None)):
        if isinstance(sampler := getattr(each, "sampler", None), UnrepeatedDistributedSamplerWrapper):
            _repeat(sampler)  # Step 1
    if dist.get_world_size() == 1:
        return loader
    lengths = _of_ranks(_length(loader), timeout)  # Step 2
    are_certain = all(_of_ranks(int(_is_certain(loader)), timeout))
    if not are_certain:
        return made_even(loader, None if -1 in lengths else min(lengths), timeout, of=loader)
    if len(set(lengths)) == 1:
        return loader
    _tell([length > min(lengths) for length in lengths], min(lengths), is_first=True)
    return made_even(loader, min(lengths), None, of=loader)


def made_even(loader: Any, length: int | None, timeout: timedelta | None = None, *, of: Any = None) -> Any:
    """A copy of a loader that is an `Even`. Without `of` it is known to be even, and as long as is said."""
    has_state = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    wrap = _WrappedWithState if has_state else _Wrapped
    given = loader if isinstance(loader, DataLoader) else wrap(loader)
    kind: Any = type(type(loader).__name__, (Even, type(given)), {})
    made = kind.__new__(kind)
    vars(made).update(vars(given), even_of=of, even_length=length, even_unknown=length is None, even_timeout=timeout)
    return made


def _is_certain(loader: Any) -> bool:
    """Whether a loader has as many batches as it says."""
    if type(loader) is not DataLoader:
        return False
    sampler = loader.batch_sampler
    if sampler is None or type(sampler) is BatchSampler:
        return isinstance(loader.sampler if sampler is None else sampler.sampler, _CERTAIN)
    return isinstance(sampler, GlobalBatchSampler | ValidationSampler)


def _length(loader: Any) -> int:
    """-1: not known."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return -1


def _of_ranks(number: int, timeout: timedelta) -> list[int]:
    numbers = torch.zeros(dist.get_world_size(), dtype=torch.int64, device="cpu")  # whatever the default device is
    numbers[dist.get_rank()] = number
    dist.all_reduce(numbers, group=cpu_group("comparing batches", timeout))
    found: list[int] = numbers.tolist()
    return found


def _tell(have: list[bool], number: int, *, is_first: bool) -> None:
    """Prints which ranks have no batch after `number` ones.

    Raises:
        ConfigError: they have none at all, in the first pass.
    """
    without = ", ".join(str(rank) for rank, has in enumerate(have) if not has)
    if number == 0 and is_first:
        raise ConfigError(
            "dataloader", "no batch", f"every forward exchanges rows with all ranks, and these have no data: {without}",
            "Give every rank a part of the data, or use fewer ranks",
        )  # fmt: skip
    rank_zero_info(
        f"data: ranks without a batch after {number}: {without}. Every forward exchanges rows with all ranks, so all "
        "end there, and what the others have left is not used"
    )


def _repeat(sampler: UnrepeatedDistributedSamplerWrapper) -> None:
    """Changes a sampler to that of validation, which gives all ranks equally many samples; prints if some repeat."""
    number, ranks = sampler.total_size, sampler.num_replicas
    # In place: a batch sampler has it, which Lightning has wrapped.
    sampler.__class__ = DistributedSamplerWrapper  # type: ignore[assignment]
    DistributedSampler.__init__(
        sampler, sampler.dataset, ranks, sampler.rank, shuffle=sampler.shuffle, seed=sampler.seed
    )
    if more := sampler.total_size - number:
        rank_zero_info(
            f"predict: {number} samples for {ranks} ranks; every forward exchanges rows, so all ranks predict "
            f"{sampler.num_samples}, and {more} of the samples twice"
        )
