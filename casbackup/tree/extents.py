"""Lists of extents of one leaf: normal form, slicing, overlaying."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from casbackup.spec.node import Extent, zero_extent


def normalised(extents: Iterable[Extent]) -> list[Extent]:
    """Merge neighbouring zero extents, and neighbouring slices that continue each other; drop empty ones."""
    result: list[Extent] = []
    for extent in extents:
        if extent.length == 0:
            continue
        if result:
            last = result[-1]
            continues = extent.is_zero or last.skip + last.length == extent.skip
            if last.id == extent.id and continues:
                result[-1] = last._replace(length=last.length + extent.length)
                continue
        result.append(extent)
    return result


def all_zero(extents: Sequence[Extent]) -> bool:
    return all(extent.is_zero for extent in extents)


def sliced(extents: Iterable[Extent], start: int, end: int) -> list[Extent]:
    """The part [start, end) of the bytes that ``extents`` describe from offset 0; chunks at its ends become slices."""
    result: list[Extent] = []
    position = 0
    for extent in extents:
        first, last = max(start, position), min(end, position + extent.length)
        if first < last:
            skip = 0 if extent.is_zero else extent.skip + first - position
            result.append(Extent(last - first, skip, extent.id))
        position += extent.length
        if position >= end:
            break
    return result


def overlaid(base: Sequence[Extent], changes: Iterable[tuple[int, Sequence[Extent]]]) -> list[Extent]:
    """``base`` with each ``(offset, extents)`` of ``changes`` laid over it; changes are in order and do not overlap.

    Chunks of the base that are cut stay referenced through slices, so nothing around a change is read or stored again.
    A change may reach beyond the end of the base; a gap before it reads as zeros.
    """
    span = sum(extent.length for extent in base)
    result: list[Extent] = []
    position = 0
    for offset, extents in changes:
        result += sliced(base, position, min(offset, span))
        result.append(zero_extent(max(0, offset - max(position, span))))
        result += extents
        position = offset + sum(extent.length for extent in extents)
    result += sliced(base, position, span)
    return normalised(result)
