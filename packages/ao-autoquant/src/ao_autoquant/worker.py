"""A process that measures what is not known to work: one that hangs or crashes is ended, the search goes on.

Parent and child exchange lines of JSON over pipes, and tensors in safetensors files.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

import torch

from ao_autoquant import measure
from ao_autoquant.measure import FaultError, Quality, Time
from ao_core import RejectedError


class Worker:
    """Measures in a child process; started when first asked, and again after it was ended.

    Args:
        limit_s: seconds that one request may take.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._folder = tempfile.TemporaryDirectory(prefix="ao-autoquant-")

    def measure(
        self,
        scheme: str | None,
        weight: torch.Tensor,
        sample: torch.Tensor,
        bias: torch.Tensor | None,
        rows: list[int],
        *,
        compiled: bool,
    ) -> tuple[Quality, dict[int, Time]]:
        """Quality, and the time for each number of rows, with ``scheme`` (its text), or in float.

        Raises:
            RejectedError: the scheme refuses these values.
            FaultError: what the child says, or that it hung or died.
        """
        from safetensors.torch import save_file

        file = Path(self._folder.name) / "problem.safetensors"
        tensors = {"weight": weight, "sample": sample} | ({} if bias is None else {"bias": bias})
        save_file({name: each.detach().contiguous().cpu().clone() for name, each in tensors.items()}, file)
        request = {
            "scheme": scheme,
            "file": str(file),
            "device": str(weight.device),
            "rows": rows,
            "compiled": compiled,
            "threads": torch.get_num_threads(),
        }
        answer = self._ask(json.dumps(request))
        if "rejected" in answer:
            raise RejectedError(answer["rejected"])
        if "fault" in answer:
            raise FaultError(answer["fault"])
        times = {int(key): Time(**value) for key, value in answer["times"].items()}
        return Quality(**answer["quality"]), times

    def close(self) -> None:
        """End the child."""
        self._end()
        self._folder.cleanup()

    def _ask(self, line: str) -> dict[str, Any]:
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = self._answers.get(timeout=self.limit_s)
        except queue.Empty:
            self._end()
            raise FaultError(f"it took more than {self.limit_s:g} s and was ended") from None
        except OSError:
            answer = None
        if answer is None:
            code = process.wait()
            self._end()
            raise FaultError(f"it ended its process (exit code {code})")
        found: dict[str, Any] = json.loads(answer)
        return found

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            [sys.executable, "-m", "ao_autoquant.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self._process, self._answers = process, queue.Queue()
        assert process.stdout is not None
        threading.Thread(target=_listen, args=(process.stdout, self._answers), daemon=True).start()
        try:
            ready = self._answers.get(timeout=120)  # imports, which are not the scheme's own time
        except queue.Empty:
            ready = None
        if ready is None:
            self._end()
            raise FaultError("the process to measure it in did not start")
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _listen(pipe: IO[str], answers: queue.Queue[str | None]) -> None:
    with contextlib.suppress(ValueError, OSError):  # the pipe is closed when the child is ended
        for line in pipe:
            answers.put(line)
    answers.put(None)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import load_file

    from ao_core import parse_scheme

    torch.set_num_threads(request["threads"])
    tensors = load_file(request["file"], device=request["device"])
    weight, sample, bias = tensors["weight"], tensors["sample"], tensors.get("bias")
    try:
        scheme = None if request["scheme"] is None else parse_scheme(request["scheme"])
        found, quantized = measure.quality(scheme, weight, sample, bias)
        times = {
            rows: measure.as_dict(measure.timed(quantized, sample, rows, bias, compiled=request["compiled"]))
            for rows in request["rows"]
        }
    except RejectedError as error:
        return {"rejected": str(error)}
    except Exception as error:  # noqa: BLE001 - a stranger's code: the report names it
        return {"fault": measure.explained(error)}
    return {"quality": measure.as_dict(found), "times": times}


def main() -> None:
    """Answer requests until the parent closes the pipe."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a scheme prints is no answer
    from ao_core import schemes

    with torch.no_grad():
        schemes()
        print("ready", file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(_answer(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
