"""The column loops of a block spread over the processes, and their results told to all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ao_core.calibrate import processes
from ao_gptq.layers import Found, Job

Solve = Callable[[Job], list[Found]]


def spread(jobs: list[Job], solve: Solve) -> Iterator[Found]:
    """What ``solve`` finds for each job, on every process; each job is solved by one of them.

    The most expensive job goes to the process that has least to do, and so on down. No job is split, so that
    what is found for it does not depend on how many processes there are. ``jobs`` is emptied as they are
    done: Hessians are the largest things in memory.
    """
    if processes.world() == 1:
        while jobs:
            yield from solve(jobs.pop(0))
        return
    owners = _owners([job.cost for job in jobs], processes.world())
    devices = [next(iter(job.weights.values())).device for job in jobs]
    own = [(number, job) for number, job in enumerate(jobs) if owners[number] == processes.rank()]
    jobs.clear()
    mine: dict[int, list[Found]] = {}
    while own:
        number, job = own.pop(0)
        mine[number] = solve(job)
        del job
    yield from _told(mine, owners, devices)


def _owners(costs: Sequence[int], world: int) -> list[int]:
    """Which process solves each job."""
    load, owners = [0] * world, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        owners[number] = min(range(world), key=lambda rank: load[rank])
        load[owners[number]] += costs[number]
    return owners


def _told(
    mine: dict[int, list[Found]], owners: Sequence[int], devices: Sequence[torch.device]
) -> Iterator[Found]:
    """What every process found: facts and shapes of all jobs at once, then a job's tensors in one go."""
    said = processes.gathered(
        {
            str(number): [
                {"name": each.name, "facts": each.facts, "shapes": processes.outline(_tensors(each))}
                for each in found
            ]
            for number, found in mine.items()
        }
    )
    for number, owner in enumerate(owners):
        layers: list[dict[str, Any]] = said[owner][str(number)]
        shapes = {
            f"{i} {name}": shape for i, each in enumerate(layers) for name, shape in each["shapes"].items()
        }
        found = mine.pop(number, None)
        sent = (
            None
            if found is None
            else {
                f"{i} {name}": tensor
                for i, each in enumerate(found)
                for name, tensor in _tensors(each).items()
            }
        )
        got = processes.broadcast(sent, owner, devices[number], shapes)
        for i, each in enumerate(layers):
            qparams = {name: got[f"{i} {name}"] for name in each["shapes"] if name != _CODES}
            yield Found(each["name"], got[f"{i} {_CODES}"], qparams, each["facts"])


_CODES = " codes"  # no parameter bears such a name


def _tensors(found: Found) -> dict[str, torch.Tensor]:
    return {_CODES: found.codes, **found.qparams}
