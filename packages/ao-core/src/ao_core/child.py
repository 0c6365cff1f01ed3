"""Calling a function in a process of its own, which is ended when a call takes too long.

For what a stranger's code, a compiler or a device may do: hang, or take the whole process with it. Parent and
child exchange lines of JSON over pipes. The process is started when first asked, used again, and replaced
after it was ended.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
from typing import IO, Any

from ao_core.errors import AoError

_START_S = 300  # for imports, which are not the call's own time
_END_S = 60  # a driver may take a while to stop what runs on its device


class ChildError(AoError):
    """A call that did not come back; the message says why, as "it took more than 5 s and was ended".

    Attributes:
        hung: whether it took too long; else the process ended by itself.
    """

    def __init__(self, message: str, *, hung: bool = False) -> None:
        super().__init__(message)
        self.hung = hung


class Child:
    """A process that calls one function. A context: the process ends with the block.

    Args:
        function: ``"package.module:name"``. It takes what is JSON-able, and returns such. What it prints
            goes to standard error.
    """

    def __init__(self, function: str) -> None:
        self.function = function
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, request: Any, limit_s: float) -> Any:
        """What the function returns for ``request``.

        Args:
            request: JSON-able.
            limit_s: seconds that it may take.

        Raises:
            ChildError: it took longer, or its process ended; an exception that the function does not catch
                ends the process too.
            AoError: the process did not start.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = self._answers.get(timeout=limit_s)
        except queue.Empty:
            self.close()
            raise ChildError(f"it took more than {limit_s:g} s and was ended", hung=True) from None
        except OSError:
            answer = None
        if answer is None:
            code = self._ended(process)
            raise ChildError(f"it ended its process ({code})")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _ended(self, process: subprocess.Popen[str]) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        self.close()
        code = process.returncode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            [sys.executable, "-m", "ao_core.child", self.function],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self._process, self._answers = process, queue.Queue()
        assert process.stdout is not None
        threading.Thread(target=_listen, args=(process.stdout, self._answers), daemon=True).start()
        try:
            ready = self._answers.get(timeout=_START_S)
        except queue.Empty:
            self.close()
            raise AoError(f"a process to call {self.function} in did not start in {_START_S} s.") from None
        if ready is None:
            code = self._ended(process)
            raise AoError(f"a process to call {self.function} in did not start ({code}); see above.")
        return process


def _listen(pipe: IO[str], answers: queue.Queue[str | None]) -> None:
    with contextlib.suppress(ValueError, OSError):  # the pipe is closed when the child is ended
        for line in pipe:
            answers.put(line)
    answers.put(None)


def _main(function: str) -> None:
    """Answer requests until the parent closes the pipe."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the function prints is no answer
    module, _, name = function.partition(":")
    call = getattr(importlib.import_module(module), name)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(call(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
