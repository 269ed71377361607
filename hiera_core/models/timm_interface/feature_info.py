"""What the maps of a model are: channels, reduction and module, with timm's methods."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TypedDict, overload

from ...errors import UsageError, is_whole


class FeatureEntry(TypedDict, total=False):
    """One map of a model.

    Args:
        num_chs: Number of channels.
        reduction: Pixels that a cell of the map covers, along the last dimension.
        module: Name of the block that the map comes from.
        index: Number of the stage, counted from 0.
    """

    num_chs: int
    reduction: int
    module: str
    index: int


class FeatureInfo(list[FeatureEntry]):
    """All maps that a model has, and which of them a backbone returns.

    It is a list with an entry for each stage. The methods return values for the maps that the
    backbone returns, in this order; or, with `idx`, those of the stages of these numbers.

    Args:
        entries: One for each stage.
        out_indices: Numbers of the stages whose maps are returned.
    """

    def __init__(self, entries: Iterable[FeatureEntry], out_indices: Iterable[int]) -> None:
        super().__init__(entries)
        self.out_indices = tuple(out_indices)

    @property
    def info(self) -> list[FeatureEntry]:
        """The entries of all stages."""
        return list(self)

    @overload
    def channels(self, idx: int) -> int: ...

    @overload
    def channels(self, idx: Sequence[int] | None = None) -> list[int]: ...

    def channels(self, idx: int | Sequence[int] | None = None) -> int | list[int]:
        """Return the number of channels of each map, e.g. [192, 384, 768]."""
        return self[idx]["num_chs"] if isinstance(idx, int) else [
            entry["num_chs"] for entry in self._chosen(idx)
        ]  # fmt: skip

    @overload
    def reduction(self, idx: int) -> int: ...

    @overload
    def reduction(self, idx: Sequence[int] | None = None) -> list[int]: ...

    def reduction(self, idx: int | Sequence[int] | None = None) -> int | list[int]:
        """Return how many pixels a cell of each map covers, e.g. [8, 16, 32]."""
        return self[idx]["reduction"] if isinstance(idx, int) else [
            entry["reduction"] for entry in self._chosen(idx)
        ]  # fmt: skip

    @overload
    def module_name(self, idx: int) -> str: ...

    @overload
    def module_name(self, idx: Sequence[int] | None = None) -> list[str]: ...

    def module_name(self, idx: int | Sequence[int] | None = None) -> str | list[str]:
        """Return the name of the block that each map comes from, e.g. ["blocks.4", ...]."""
        return self[idx]["module"] if isinstance(idx, int) else [
            entry["module"] for entry in self._chosen(idx)
        ]  # fmt: skip

    @overload
    def get(self, key: str, idx: int) -> int | str: ...

    @overload
    def get(self, key: str, idx: Sequence[int] | None = None) -> list[int | str]: ...

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> int | str | list[int | str]:
        """Return the values of a key."""
        if isinstance(idx, int):
            value: int | str = self[idx][key]  # type: ignore[literal-required]
            return value
        return [entry[key] for entry in self._chosen(idx)]  # type: ignore[literal-required]

    def get_dicts(
        self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None
    ) -> FeatureEntry | list[FeatureEntry]:
        """Return the entries, or only some keys of each."""
        if isinstance(idx, int):
            return _only(self[idx], keys)
        return [_only(entry, keys) for entry in self._chosen(idx)]

    def _chosen(self, idx: Sequence[int] | None) -> list[FeatureEntry]:
        return [self[number] for number in (self.out_indices if idx is None else idx)]


def _only(entry: FeatureEntry, keys: Sequence[str] | None) -> FeatureEntry:
    if keys is None:
        return entry
    return {key: entry[key] for key in keys}  # type: ignore[return-value, literal-required]


def absolute_indices(
    indices: int | Sequence[int] | None,
    count: int,
    what: str = "stage",
    argument: str = "out_indices",
) -> list[int]:
    """Return indices counted from 0, as timm reads them.

    Args:
        indices: A sequence or array of whole numbers, in which negative ones count from the end; a
            number n for the last n; or None for all.
        count: Number of stages or blocks.
        what: What is counted, for messages.
        argument: The argument that the user gave, for messages.

    Raises:
        UsageError: There is no such stage or block, or none is chosen.
    """
    to_list = getattr(indices, "tolist", None)
    # Numbers and arrays of NumPy, and tensors, have this method.
    given: object = to_list() if callable(to_list) else indices
    if given is None:
        return [*range(count)]
    last = given if isinstance(given, int) and not isinstance(given, bool) else 0
    if 1 <= last <= count:
        return [*range(count - last, count)]
    if not isinstance(given, Sequence) or isinstance(given, str | bytes) or not given:
        raise UsageError(
            f"the model has {count} {what}s, not {given}"
            if last > count
            else f"{argument} is {indices!r:.60}",
            f"give a sequence of numbers from 0 to {count - 1}, or a number from 1 to {count} for "
            f"the last {what}s",
        )
    for number in given:
        if not is_whole(number) or not -count <= number < count:
            raise UsageError(
                f"there is no {what} {number!r:.60}",
                f"the model has {count} {what}s: use 0 to {count - 1}, or -{count} to -1 from the "
                "end",
            )
    return [number % count for number in map(operator.index, given)]
