"""One fit on several machines: the processes that torchrun starts, and how the first has the others share its fits.

The first process does all of the work, and writes all that is written. The others wait for its fits. They talk through
the store that torchrun keeps for its processes. Only the sums of a fit go another way.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from pipelines.project.display import as_line
from pipelines.project.error_text import user_message
from pipelines.project.errors import InputError
from pipelines.runtime.console import log_line
from pipelines.runtime.processes import TERMINATED
from pipelines.runtime.ranks import Member

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_GIVEN = (*_NUMBERS, "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE")
"""What torchrun sets for each of its processes."""
_POLL_SECONDS = 0.1
_TIMEOUT = timedelta(minutes=10)
"""How long the processes wait for each other before a fit begins."""
_END = "end"


class Launched(NamedTuple):
    """What torchrun says of a process: its number among all, and among those of its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def launched() -> Launched | None:
    """Return what torchrun says of this process. None where it is the only one.

    Raises:
        InputError: some of it is missing, or cannot be.
    """
    if os.environ.get("RANK", "0") == "0" and os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    missing = [name for name in _GIVEN if not os.environ.get(name)]
    if missing:
        raise _refusal(f"{', '.join(missing)} not set")
    for name in _NUMBERS:
        if not os.environ[name].isdecimal():
            raise _refusal(f"{name} is {os.environ[name]!r}")
    if os.environ["TORCHELASTIC_USE_AGENT_STORE"] != "True":
        raise _refusal("torchrun keeps no store (TORCH_DISABLE_SHARE_RDZV_TCP_STORE)")
    found = Launched(*(int(os.environ[name]) for name in _NUMBERS[:-1]))
    if found.rank >= found.size or found.local_rank >= found.local_size:
        raise _refusal(f"the RANK is {found.rank}, the LOCAL_RANK {found.local_rank} of {found.local_size}")
    return found


def _refusal(fault: str) -> InputError:
    sizes = ", ".join(f"{name} {os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if name in os.environ)
    return InputError(
        f"{sizes}: one of several processes that share a fit, but {fault}; start all by torchrun, or unset both"
    )


def devices_of_fit(chosen: int) -> int:
    """Return how many devices of this machine a fit takes: one for each process of torchrun, else those chosen.

    Raises:
        InputError: another number is chosen.
    """
    place = launched()
    if place is None:
        return chosen
    if chosen not in (1, place.local_size):
        raise InputError(
            f"params.yaml: training.devices is {chosen}, but torchrun started {place.local_size} processes on this "
            f"machine; start --nproc-per-node {chosen}"
        )
    return place.local_size


@contextlib.contextmanager
def other_machines(place: Launched, order: Mapping[str, Any]) -> Iterator[Member]:
    """Have the other processes share a fit, as `order` tells them to. Give this one's place among them.

    Where another is lost this process ends as if by SIGTERM: the same again may go well.

    Raises:
        InputError: another process cannot share it.
    """
    with _none_lost(place):
        store = _store()
        meeting = f"fit/{store.add('fits', 1)}"
        store.set(meeting, json.dumps(order))
        answers = [f"{meeting}/{rank}" for rank in range(1, place.size)]
        store.wait(answers, _TIMEOUT)
        refusals = [line for line in (json.loads(store.get(answer)) for answer in answers) if line]
        store.set(f"{meeting}/goes", json.dumps(not refusals))
        if refusals:
            raise InputError(refusals[0])
        yield _member(place, store, meeting)


def share_orders(
    place: Launched, accept: Callable[[Mapping[str, Any]], Callable[[Member], object]]
) -> NoReturn:
    """Share each fit of the first process until that comes to its end, and end as it does.

    Where another process is lost this one ends as if by SIGTERM.

    Args:
        place: Which this process is.
        accept: Returns what shares the fit of an order, or refuses it by an error that the user can mend.

    Raises:
        InputError: torchrun has started this process a second time.
    """
    with _none_lost(place):
        store, number = _store(), 1
        if store.add(f"started/{place.rank}", 1) > 1:
            raise InputError(
                "torchrun started its processes a second time; end it on all machines, and start it again"
            )
        while not store.check([_END]):
            meeting = f"fit/{number}"
            if not store.check([meeting]):
                time.sleep(_POLL_SECONDS)
                continue
            share, refusal = _decide(accept, json.loads(store.get(meeting)))
            store.set(f"{meeting}/{place.rank}", json.dumps(refusal))
            if json.loads(store.get(f"{meeting}/goes")):
                assert share is not None
                share(_member(place, store, meeting))
            number += 1
        # Of a machine whose processes end well, torchrun would wait minutes for one where they do not.
        raise SystemExit(json.loads(store.get(_END)))


def tell_end(status: int) -> None:
    """Tell the other processes that no more fits come, and how this one ends."""
    from torch.distributed import DistError

    with contextlib.suppress(DistError):  # they have gone
        _store().set(_END, json.dumps(status))


def _decide(
    accept: Callable[[Mapping[str, Any]], Callable[[Member], object]], order: Mapping[str, Any]
) -> tuple[Callable[[Member], object] | None, str | None]:
    """Return what shares a fit, or the line of a refusal."""
    try:
        return accept(order), None
    except Exception as error:
        line = user_message(error)
        if line is None:
            raise
        return None, line


@contextlib.contextmanager
def _none_lost(place: Launched) -> Iterator[None]:
    """End this process where another has gone. One of each machine says so."""
    from torch.distributed import DistError

    try:
        yield
    except DistError as error:
        if place.local_rank == 0:
            log_line(
                f"a process on another machine has gone, or did not come ({as_line(str(error))}); start all again, "
                "and the fit goes on from its last checkpoint"
            )
        raise SystemExit(TERMINATED) from None


def _store() -> TCPStore:
    from torch.distributed import TCPStore

    return TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_TIMEOUT
    )


def _member(place: Launched, store: TCPStore, meeting: str) -> Member:
    from torch.distributed import PrefixStore

    return Member(place.rank, place.size, place.local_rank, place.local_size, PrefixStore(meeting, store))
