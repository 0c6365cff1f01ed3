"""Compare kernel results with a baseline, and fail where a kernel is more than 10% slower.

hatch run bench:kernels --baseline docs/results/h200-kernels.json          # measures, then compares
python tests/benchmarks/compare.py RUN.json [docs/results/h200-kernels.json]    # two files

Exit code 1: something is slower, or no longer runs; 2: they can't be compared. What counts is the ratio to
the bfloat16 linear, which is measured in turns with each kernel: a card that clocks lower slows both.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from kernel_results import elsewhere, read

MOST = 1.10
BASELINE = "docs/results/h200-kernels.json"


@dataclass
class Comparison:
    """Of a run with a baseline.

    Attributes:
        refused: why they can't be compared, or nothing.
        slower: lines about cells that lost more than ``MOST``.
        faster: lines about those that won as much.
        gone: lines about cells that had a time and have none now.
        compared: cells that both have.
        new: cells that the baseline does not have.
        left: cells of the baseline that the run did not try.
        notes: what else differs, such as versions.
    """

    refused: str = ""
    slower: list[str] = field(default_factory=list)
    faster: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    compared: int = 0
    new: int = 0
    left: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        if self.refused:
            return 2
        return int(bool(self.slower or self.gone))

    def lines(self) -> list[str]:
        """What to tell."""
        if self.refused:
            return [f"not compared: {self.refused}"]
        counts = f"{self.compared} cells compared, {self.new} new, {self.left} of the baseline not tried"
        found = [*self.notes, *(f"faster: {line}" for line in self.faster)]
        found += [*(f"SLOWER: {line}" for line in self.slower), *(f"GONE: {line}" for line in self.gone)]
        return [*found, counts]


def compare(run: dict, base: dict) -> Comparison:
    """``run`` against ``base``, both as :func:`kernel_results.read` gives them."""
    if differ := elsewhere(run["about"], base["about"]):
        return Comparison(refused=f"the run and the baseline are of different devices: {differ}")
    found = Comparison()
    for key in sorted({*run["about"], *base["about"]}):
        was, now = base["about"].get(key, "none"), run["about"].get(key, "none")
        if was != now and key in ("torch", "triton", "cuda", "ao"):
            found.notes.append(f"note: {key} {was} in the baseline, {now} in the run")
    changes = []
    for name, cell in run["cells"].items():
        if name in base["cells"]:
            changes.append((base["cells"][name]["ratio"] / cell["ratio"], name))
        else:
            found.new += 1
    for change, name in sorted(changes, reverse=True):
        was, now = base["cells"][name], run["cells"][name]
        line = (
            f"{name}: {was['ratio']:.2f} -> {now['ratio']:.2f} times bf16 "
            f"({was['us']:.1f} of {was['float_us']:.1f} µs -> {now['us']:.1f} of {now['float_us']:.1f})"
        )
        if change > MOST:
            found.slower.append(line)
        elif change < 1 / MOST:
            found.faster.append(line)
    missing = set(base["cells"]) - set(run["cells"])
    found.gone = [f"{name}: {run['not_run'][name]}" for name in sorted(missing) if name in run["not_run"]]
    found.compared, found.left = len(changes), len(missing) - len(found.gone)
    if not changes and not found.gone:
        found.refused = "they have no cell in common. Run with the shapes and rows of the baseline."
    return found


def main(run_file: str, base_file: str = BASELINE) -> int:
    """Print the differences."""
    try:
        found = compare(read(Path(run_file)), read(Path(base_file)))
    except ValueError as error:
        print(f"not compared: {error}")
        return 2
    print("\n".join(found.lines()))
    return found.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
