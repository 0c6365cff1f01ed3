"""Turn pytest-benchmark's JSON into the table and the small JSON that the documents hold.

python tests/benchmarks/summary.py RUN.json docs/results/cpu.json
"""

from __future__ import annotations

import json
import platform
import re
import sys
from pathlib import Path

import torch


def main(run: str, out: str) -> None:
    """Write ``out``, and print a Markdown table of the ratios to float."""
    benchmarks = json.loads(Path(run).read_text())["benchmarks"]
    rows = [
        {"group": each["group"], "scheme": each["params"]["scheme"], **each["extra_info"]}
        for each in benchmarks
    ]
    data = {
        "command": "hatch run bench:run --benchmark-json=RUN.json",
        "device": _cpu(),
        "threads": 2,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": rows,
    }
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(data, indent=1) + "\n")
    schemes = sorted({row["scheme"] for row in rows})
    print("| what | " + " | ".join(schemes) + " |")
    print("|---|" + "---|" * len(schemes))
    for group in dict.fromkeys(row["group"] for row in rows):
        ratios = {row["scheme"]: row["ratio_to_float"] for row in rows if row["group"] == group}
        cells = [f"{ratios[scheme]:.2f}" if scheme in ratios else "" for scheme in schemes]
        print(f"| {group} | " + " | ".join(cells) + " |")


def _cpu() -> str:
    """The processor's name, and the instructions that decide which kernel runs."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = re.search(r"model name\s*: (.*)", text)
    flags = [flag for flag in ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni") if flag in text]
    return f"{name.group(1) if name else platform.processor()} ({', '.join(flags)})"


if __name__ == "__main__":
    main(*sys.argv[1:])
