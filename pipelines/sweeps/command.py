"""`sdlora sweep`: from arguments to a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pipelines.orchestration.server import server_missing
from pipelines.project.errors import InputError
from pipelines.runtime.console import echo
from pipelines.sweeps.grid import MANY_CHAINS, checked_name, default_name, make_chains, read_axes
from pipelines.sweeps.results import as_json, result_table, write_table


def run_sweep(arguments: Sequence[str], *, out: Path | None, local: int | None, yes: bool) -> int:
    """Compute all combinations of the values, and leave a table of them in `out`. Return the exit status.

    With `local`, or where PREFECT_API_URL is not set, here, that many at a time; else on the workers of the pool.
    """
    axes = read_axes(arguments)
    chains = make_chains(axes)
    out = out or Path("sweep") / default_name(axes)
    name = checked_name(out.name)
    if len(chains) > MANY_CHAINS and not yes:
        raise InputError(f"sweep: these are {len(chains)} chains; if you mean it, add --yes")
    if local is None and os.environ.get("PREFECT_API_URL"):
        missing = server_missing()
        if missing:
            raise InputError(
                f"sweep: no Prefect server ({missing}); start it, or add --local 1 to compute here"
            )
        from pipelines.sweeps.pool import run_on_pool

        results = run_on_pool(name, chains)
    else:
        from pipelines.sweeps.here import run_here

        results = run_here(name, chains, at_once=local or 1)
    table = as_json(axes, chains, results)
    write_table(out, table)
    from rich.console import Console

    Console().print(result_table(table))
    echo(f"table    {out}/table.csv, {out}/table.json")
    return int(any(result.error is not None for result in results))
