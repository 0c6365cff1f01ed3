"""Compare a run of the kernel benchmarks with a committed one, and fail where it is more than 10% slower.

hatch run bench:kernels --benchmark-json=RUN.json
python tests/benchmarks/compare.py RUN.json docs/results/BASELINE.json      # exit code 1: slower
python tests/benchmarks/compare.py RUN.json docs/results/BASELINE.json --save
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

MOST = 1.10
FIELDS = ("microseconds", "float_microseconds", "ratio_to_float", "share_of_ceiling")


def rows_of(run: dict) -> dict[str, dict]:
    """By name: what is kept of a run."""
    return {
        each["name"]: {field: round(each["extra_info"][field], 3) for field in FIELDS}
        for each in run["benchmarks"]
        if "microseconds" in each["extra_info"]
    }


def main(run_file: str, base_file: str, *options: str) -> int:
    """Print the differences; 1 if anything is slower than ``MOST`` times the baseline."""
    run = json.loads(Path(run_file).read_text())
    rows, base = rows_of(run), Path(base_file)
    if not rows:
        print(f"{run_file} holds no kernel benchmarks: make it with hatch run bench:kernels")
        return 2
    device = run["benchmarks"][0]["extra_info"].get("device", "?")
    if "--save" in options:
        command = "hatch run bench:kernels --benchmark-json=RUN.json"
        data = {"command": command, "device": device, "rows": rows}
        base.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
        print(f"{len(rows)} rows kept in {base}")
        return 0
    held = json.loads(base.read_text())
    if held["device"] != device:
        print(f"the baseline is of {held['device']}, and the run of {device}: they can't be compared")
        return 2
    slower = [
        (row["microseconds"] / held["rows"][name]["microseconds"], name)
        for name, row in rows.items()
        if name in held["rows"]
    ]
    for ratio, name in sorted(slower, reverse=True):
        if ratio > MOST or ratio < 1 / MOST:
            print(f"{ratio:5.2f} × {name}")
    missing = sorted(set(held["rows"]) - set(rows))
    print(f"{len(slower)} compared, {len(missing)} of the baseline not run")
    return int(any(ratio > MOST for ratio, _ in slower))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
