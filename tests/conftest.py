"""What tests of several packages share: fake distributions, and the command line in a fresh process."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported, which decides then
    os.environ.setdefault("TRITON_INTERPRET", "1")

from ao_core import plugins

SCHEME = '''
from dataclasses import dataclass

import ao_core as ao
import torch


class WholeTensor(ao.QuantizedTensor):
    """Whole numbers as int8."""

    data_names = ("codes",)

    def dequantize(self):
        return self.codes.to(self.dtype)


@dataclass(frozen=True)
class Whole(ao.Scheme):
    name, tensor_types = {name!r}, (WholeTensor,)

    def choose_qparams(self, weight):
        return {{}}

    def encode(self, weight, qparams):
        return weight.round().clamp(-128, 127).to(torch.int8)

    def decode(self, codes, qparams):
        return codes.float()

    def pack(self, codes, qparams, *, dtype):
        return WholeTensor(codes, shape=codes.shape, dtype=dtype)


@ao.hookimpl
def ao_register_schemes():
    return [Whole]
'''
HEAD = "import ao_core as ao\n\n@ao.hookimpl\n"

# Seven ways to be broken: plugin → (stage, words of the error, words of what to do).
FAULTS = {
    "bad-import": ("import", "ZeroDivisionError: division by zero", "AO_DISABLE_PLUGINS=bad-import"),
    "bad-hook": ("hooks", "unknown hook ao_register_scheme", "ao_register_schemes"),
    "bad-raise": ("answer", "KeyError: 'lost'", "AO_DISABLE_PLUGINS=bad-raise"),
    "bad-type": ("answer", "must return a list, and returned str", "AO_DISABLE_PLUGINS=bad-type"),
    "bad-item": ("answer", "not a subclass of ao_core.Scheme", "AO_DISABLE_PLUGINS=bad-item"),
    "bad-core": ("requires", "requires ao-core>=99", "pip install -U ao-core bad-core"),
}
CLASH = ("clash-a", "clash-b")


class Site:
    """A folder of installed distributions, each with one plugin module."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def install(
        self,
        plugin: str,
        code: str,
        *,
        requires: Iterable[str] = ("ao-core>=0.1,<0.2",),
        point: str | None = None,
        target: str | None = None,
    ) -> Path:
        """Install distribution ``plugin`` 1.0 with ``code`` as its module; returns the module's path."""
        module = "fake_" + re.sub(r"\W", "_", plugin)
        info = self.path / f"{module}-1.0.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {plugin}", "Version: 1.0"]
        lines += [f"Requires-Dist: {line}" for line in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "entry_points.txt").write_text(f"[ao]\n{point or plugin} = {target or module}\n")
        path = self.path / f"{module}.py"
        path.write_text(code)
        importlib.invalidate_caches()
        return path

    def install_scheme(self, plugin: str, name: str, **options: object) -> Path:
        """Install a plugin with one working scheme."""
        return self.install(plugin, SCHEME.format(name=name), **options)

    def install_broken(self) -> Path:
        """Install the plugins of ``FAULTS`` and ``CLASH``; returns the file that must never be made."""
        marker = self.path / "was-imported"
        self.install("bad-import", "1 / 0\n")
        self.install("bad-hook", HEAD + "def ao_register_scheme():\n    return []\n")
        self.install("bad-raise", HEAD + "def ao_register_schemes():\n    return {}['lost']\n")
        self.install("bad-type", HEAD + "def ao_register_schemes():\n    return 'int8'\n")
        self.install("bad-item", HEAD + "def ao_register_schemes():\n    return [int]\n")
        self.install("bad-core", f"open({str(marker)!r}, 'w').close()\n", requires=["ao-core>=99", "torch"])
        for plugin in CLASH:
            self.install_scheme(plugin, "claimed")
        return marker

    def forget_modules(self) -> None:
        """Drop the plugins' modules from ``sys.modules``."""
        for name in [name for name in sys.modules if name.startswith("fake_")]:
            del sys.modules[name]


@pytest.fixture
def plain_environment(monkeypatch):
    """No setting of the caller's decides a test."""
    for name in ("AO_STRICT_PLUGINS", "AO_DISABLE_PLUGINS", "AO_KERNELS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def site(tmp_path, monkeypatch, plain_environment):
    """An empty site that this process sees; its plugins are forgotten afterwards."""
    made = Site(tmp_path / "site")
    monkeypatch.syspath_prepend(made.path)
    plugins.reset()
    yield made
    sys.path.remove(str(made.path))
    made.forget_modules()
    plugins.reset()


@pytest.fixture
def faults():
    """Plugin → (stage, words of the error, words of what to do) for what ``install_broken`` installs."""
    return FAULTS


@pytest.fixture
def run_python(tmp_path):
    """Run code in a fresh process that sees the site: ``run_python(code, *arguments, NAME=value)``."""

    def run(code: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("AO_")}
        plain = {"COLUMNS": "400", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
        path = filter(None, (str(tmp_path / "site"), os.environ.get("PYTHONPATH")))
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**own, **plain, "PYTHONPATH": os.pathsep.join(path), **settings},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture
def run_ao(run_python):
    """The command line in a fresh process: ``run_ao("plugins", "--json", NAME=value)``."""
    return lambda *arguments, **settings: run_python(
        "from ao_core.cli import main; main()", *arguments, **settings
    )
