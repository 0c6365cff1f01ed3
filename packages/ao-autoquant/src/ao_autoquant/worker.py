"""A process that measures what is not known to work: one that hangs or crashes is ended, the search goes on.

Parent and child exchange lines of JSON over pipes, and tensors in safetensors files. A weight is written and
read once for all the candidates that are asked for in a row. Where kernels have to be compiled, several
children do so side by side before one of them measures.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch

from ao_autoquant import measure
from ao_autoquant.measure import EndedError, FaultError, Quality, Reference, Time
from ao_core import RejectedError

_MOST = 8  # children that compile
_BYTES_EACH = 4 << 30  # of a GPU's memory, for one of them
_LARGEST = 1 << 27  # elements of a weight that they all hold


class Worker:
    """Measures in a child process; started when first asked, and again after it was ended.

    Args:
        limit_s: seconds that one request may take.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._weight: tuple[object, torch.Tensor, str] | None = None
        self._count = 0
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
        once: bool = False,
    ) -> tuple[Quality, dict[int, Time]]:
        """Quality, and the time for each number of rows, with ``scheme`` (its text), or in float.

        ``once``: each number of rows is only run, and none timed.

        Raises:
            RejectedError: the scheme refuses these values.
            FaultError: what the child says, or that it hung or died.
        """
        inputs = {"sample": sample} | ({} if bias is None else {"bias": bias})
        request = {
            "scheme": scheme,
            "weight": self._written(weight),
            "inputs": self._save("inputs", inputs),
            "device": str(weight.device),
            "rows": rows,
            "compiled": compiled,
            "once": once,
            "threads": torch.get_num_threads(),
        }
        answer = self._ask(json.dumps(request))
        if "rejected" in answer:
            raise RejectedError(answer["rejected"])
        if answer.get("broken"):
            self._end()
        if "fault" in answer:
            raise FaultError(answer["fault"])
        times = {int(key): Time(**value) for key, value in answer["times"].items()}
        return Quality(**answer["quality"]), times

    def _written(self, weight: torch.Tensor) -> str:
        """The file that holds ``weight``; the one from before is taken away."""
        mark = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype)
        if self._weight is None or self._weight[0] != mark:
            if self._weight is not None:
                with contextlib.suppress(OSError):  # Windows keeps what the child has open
                    Path(self._weight[2]).unlink()
            self._count += 1
            # The weight is held, so that no other one gets its address.
            self._weight = mark, weight, self._save(f"weight{self._count}", {"weight": weight})
        return self._weight[2]

    def _save(self, name: str, tensors: dict[str, torch.Tensor]) -> str:
        from safetensors.torch import save_file

        file = str(Path(self._folder.name) / f"{name}.safetensors")
        held = {key: each.detach().cpu().contiguous() for key, each in tensors.items()}
        save_file(held, file)
        return file

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
            raise EndedError(f"it took more than {self.limit_s:g} s and was ended", hung=True) from None
        except OSError:
            answer = None
        if answer is None:
            code = process.wait()
            self._end()
            raise EndedError(f"it ended its process (exit code {code})", hung=False)
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


class Workers:
    """One child that measures, and others that run what it will, so that kernels are compiled side by side.

    Args:
        limit_s: seconds that one request may take.
    """

    def __init__(self, limit_s: float) -> None:
        self.first = Worker(limit_s)
        self._all = [self.first]

    def prepare(
        self, schemes: Sequence[str], layer: Reference, rows: list[int], *, compiled: bool
    ) -> dict[str, EndedError]:
        """Run each scheme once; Triton and Inductor keep on disk what they compile.

        Nothing is done where no second child has room, or nothing is compiled.

        Returns:
            Schemes that ended their child; other faults come again, and are told then.
        """
        weight = layer.weight
        count = min(_crew(weight.device, compiled), len(schemes))
        if count < 2 or weight.numel() > _LARGEST:
            return {}
        self._all += [Worker(self.first.limit_s) for _ in range(count - len(self._all))]
        free: queue.Queue[Worker] = queue.Queue()
        for worker in self._all:
            free.put(worker)
        ended = {}

        def run(scheme: str) -> None:
            worker = free.get()
            try:
                worker.measure(scheme, weight, layer.sample, layer.bias, rows, compiled=compiled, once=True)
            except EndedError as error:
                ended[scheme] = error
            except (FaultError, RejectedError):
                pass  # the child that measures says so again
            finally:
                free.put(worker)

        with ThreadPoolExecutor(count) as threads:
            list(threads.map(run, schemes))
        return ended

    def close(self) -> None:
        """End all children."""
        for worker in self._all:
            worker.close()


def _crew(device: torch.device, compiled: bool) -> int:
    """How many children compile at once: half of the processors, as far as a GPU's free memory holds them."""
    if device.type != "cuda" and not compiled:
        return 1
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = torch.cuda.mem_get_info(device)[0] // _BYTES_EACH if device.type == "cuda" else _MOST
    return max(min(processors // 2, room, _MOST), 1)


def _listen(pipe: IO[str], answers: queue.Queue[str | None]) -> None:
    with contextlib.suppress(ValueError, OSError):  # the pipe is closed when the child is ended
        for line in pipe:
            answers.put(line)
    answers.put(None)


class _Files:
    """What was read last, of the weight."""

    def __init__(self) -> None:
        self._held: tuple[str, int, torch.Tensor] | None = None

    def load(self, request: dict[str, Any]) -> Reference:
        """The layer that is asked for; a weight that a scheme has changed in place is read again."""
        from safetensors.torch import load_file

        name, device = request["weight"], request["device"]
        if self._held is None or self._held[0] != name or self._held[2]._version != self._held[1]:
            self._held = None  # before the next one takes as much
            weight = load_file(name, device=device)["weight"]
            self._held = name, weight._version, weight
        inputs = load_file(request["inputs"], device=device)
        return Reference(self._held[2], inputs["sample"], inputs.get("bias"))


def _answer(request: dict[str, Any], files: _Files) -> dict[str, Any]:
    from ao_core import parse_scheme

    torch.set_num_threads(request["threads"])
    layer = files.load(request)
    try:
        scheme = None if request["scheme"] is None else parse_scheme(request["scheme"])
        found, quantized = measure.quality(scheme, layer)
        call = measure.called if request["once"] else measure.timed
        made = {
            rows: call(quantized, layer.sample, rows, layer.bias, compiled=request["compiled"])
            for rows in request["rows"]
        }
    except RejectedError as error:
        return {"rejected": str(error)}
    except Exception as error:  # noqa: BLE001 - a stranger's code: the report names it
        return {"fault": measure.explained(error), "broken": not _usable(layer.weight.device)}
    times = {rows: measure.as_dict(each) for rows, each in made.items() if isinstance(each, Time)}
    return {"quality": measure.as_dict(found), "times": times}


def _usable(device: torch.device) -> bool:
    """Whether the device still answers: what goes wrong in a kernel ends all that its process does there."""
    try:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    except RuntimeError:
        return False
    return True


def main() -> None:
    """Answer requests until the parent closes the pipe."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a scheme prints is no answer
    from ao_core import schemes

    files = _Files()
    with torch.no_grad():
        schemes()
        print("ready", file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(_answer(json.loads(line), files)), file=out, flush=True)


if __name__ == "__main__":
    main()
