"""Answers of a Prefect server, which come in pages: of 200 unless the server is set otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar
from uuid import UUID


class _Found(Protocol):
    """What a server finds."""

    @property
    def id(self) -> UUID: ...


_F = TypeVar("_F", bound=_Found)


def read_all(read: Callable[..., Sequence[_F]], *names: str, **filters: object) -> list[_F]:
    """Return all that a question of Prefect's client finds, each thing once, in the server's order.

    No size of a page is asked for, because a server refuses one above its own. What changes while the pages are read
    may be missed: the next who asks sees it.
    """
    found: dict[UUID, _F] = {}
    read_so_far = 0
    while page := read(*names, offset=read_so_far, **filters):
        read_so_far += len(page)
        found |= {each.id: each for each in page}
    return list(found.values())
