"""The column loops of a block spread over the processes, and their results told to all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ao_core.calibrate import processes
from ao_gptq.layers import Found, Job

Solve = Callable[[Job], list[Found]]


def spread(jobs: Sequence[Job], solve: Solve) -> Iterator[Found]:
    """What ``solve`` finds for each job, on every process; each job is solved by one of them.

    The most expensive job goes to the process that has least to do, and so on down.
    """
    if processes.world() == 1:
        for job in jobs:
            yield from solve(job)
        return
    owners = _owners([job.cost for job in jobs], processes.world())
    mine = {number: solve(job) for number, job in enumerate(jobs) if owners[number] == processes.rank()}
    for number, job in enumerate(jobs):
        yield from _told(job, mine.get(number), owners[number])


def _owners(costs: Sequence[int], world: int) -> list[int]:
    """Which process solves each job."""
    load, owners = [0] * world, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        owners[number] = min(range(world), key=lambda rank: load[rank])
        load[owners[number]] += costs[number]
    return owners


def _told(job: Job, found: list[Found] | None, owner: int) -> Iterator[Found]:
    facts = processes.gathered(None if found is None else [each.facts for each in found])[owner]
    for number, (name, weight) in enumerate(job.weights.items()):
        sent = None
        if found is not None:
            sent = {"codes": found[number].codes, **{f"q {k}": v for k, v in found[number].qparams.items()}}
        got = processes.broadcast(sent, owner, weight.device)
        assert facts is not None
        qparams = {key[2:]: value for key, value in got.items() if key != "codes"}
        yield Found(name, got["codes"], qparams, facts[number])
