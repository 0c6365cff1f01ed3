"""The built wheels, installed into a clean environment, work there without this checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TERNARY = ROOT / "examples" / "ao-ternary"

# Packages, and the commands that they add.
ALONE = {
    "ao-sparsity": (),
    "ao-quant": (),
    "ao-gptq": (),
    "ao-kernels": ("kernels tune",),
    "ao-autoquant": ("autoquant", "plan"),
}

GPTQ = """
import torch, ao_core as ao, ao_gptq
from ao_gptq.torchao_compat import Int4WeightOnlyGPTQQuantizer

assert "gptq" in ao.algorithms()
model, batches = torch.nn.Sequential(torch.nn.Linear(128, 64)).eval(), [torch.randn(300, 128)]
report = ao.compress_(model, "gptq", batches, scheme="int4-weight-only:group_size=32")
assert report.notes["0"]["gptq"] == "done", report.notes
print(ao_gptq.__file__)
"""

CONFORMANCE = """
from ao_core.testing import parametrize_scheme_checks

@parametrize_scheme_checks("int8-weight-only", "int8-dynamic")
def test_conformance(check): check()
"""

ROUND_TRIP = """
import torch, ao_core as ao

def factory():
    return torch.nn.Sequential(torch.nn.Linear(128, 64))

model = factory().eval()
report = ao.quantize_(model, "ternary")
ao.save(model, "saved")
x = torch.randn(3, 128)
assert isinstance(model[0].weight, ao.QuantizedTensor), report
assert torch.equal(ao.load("saved", model=factory)(x), model(x))
"""

TINY_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=96)).save_pretrained("tiny")
"""

QUANTIZED_MODEL = """
import ao_core as ao

model = ao.load("tiny-ternary")
assert any(isinstance(weight, ao.QuantizedTensor) for weight in model.parameters())
"""


def run(*command: str | Path, cwd: Path) -> str:
    """The command's standard output; a failure shows all that it printed."""
    # hatch takes the environment it is run in for the one to build with.
    drop = re.compile("AO_.*|PYTHONPATH|HATCH_ENV_ACTIVE")
    keep = {name: value for name, value in os.environ.items() if not drop.fullmatch(name)}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=keep | {"AO_STRICT_PLUGINS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Clean:
    """A virtual environment that has seen nothing but wheels, and a folder to work in."""

    folder: Path
    wheels: Path

    @property
    def bin(self) -> Path:
        return self.folder / "venv" / ("Scripts" if os.name == "nt" else "bin")

    def wheel(self, name: str, extra: str = "") -> str:
        (path,) = self.wheels.glob(f"{name}-*.whl")
        return f"{path}{extra}"

    def install(self, *requirements: str) -> None:
        constraints = ROOT / "constraints.txt"
        self.python("-m", "pip", "install", "--quiet", "-c", constraints, *requirements)

    def python(self, *arguments: str | Path) -> str:
        return run(self.bin / "python", *arguments, cwd=self.folder)

    def ao(self, *arguments: str) -> str:
        return run(shutil.which("ao", path=self.bin), *arguments, cwd=self.folder)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    hatch = (sys.executable, "-m", "hatch", "build", "--target", "wheel")
    run(*hatch, "--all", folder, cwd=ROOT)
    run(*hatch, folder, cwd=TERNARY)
    return folder


@pytest.fixture(scope="module")
def core(wheels, tmp_path_factory):
    """ao-core alone; what else a test installs it takes away again, but for other people's libraries."""
    clean = Clean(tmp_path_factory.mktemp("core"), wheels)
    run(sys.executable, "-m", "venv", clean.folder / "venv", cwd=clean.folder)
    clean.install(clean.wheel("ao_core"))
    return clean


@pytest.fixture(scope="module")
def clean(core):
    """The same environment, with ao-quant, ao-gptq and the conformance kit; tests of core come before."""
    core.install(core.wheel("ao_core", "[testing]"), core.wheel("ao_quant"), core.wheel("ao_gptq"))
    return core


@pytest.fixture(scope="module")
def with_ternary(clean):
    """The same, and then a stranger's package."""
    assert "ternary" not in clean.ao("schemes", "--json")
    clean.install(clean.wheel("ao_ternary"), clean.wheel("ao_core", "[hf]"))
    return clean


def test_every_member_builds_a_typed_wheel(wheels):
    members = {path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")}
    names = {path.name.partition("-")[0] for path in wheels.glob("*.whl")}
    assert names == {name.replace("-", "_") for name in members} | {"ao_ternary"}


# Those that need least come first, so that what one declares does not serve the next.
@pytest.mark.parametrize("name", ALONE)
def test_each_package_alone(core, name):
    members = {path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")} - {"ao-core"}
    module, plugin = name.replace("-", "_"), name.removeprefix("ao-")
    core.install(core.wheel(module))
    try:
        core.python("-m", "pip", "check")
        installed = {each["name"] for each in json.loads(core.python("-m", "pip", "list", "--format=json"))}
        assert installed & members == {name}
        code = f"import {module}; print({module}.__file__, {module}.__version__)"
        file, version = core.python("-c", code).split()
        assert Path(file).is_relative_to(core.folder)
        (listed,) = json.loads(core.ao("plugins", "--json"))
        assert (listed["plugin"], listed["distribution"]) == (plugin, f"{name} {version}")
        assert listed["state"] == ("in part" if name == "ao-kernels" else "ok")
        for problem in listed["problems"]:  # its kernels are of ops that ao-quant defines
            assert problem["error"].endswith("is not installed"), problem
        assert "plugins" in core.ao("--help")
        for command in ALONE[name]:
            assert "Usage" in core.ao(*command.split(), "--help")
    finally:
        core.python("-m", "pip", "uninstall", "--quiet", "--yes", name)


def test_the_packages_alone_are_all_of_them():
    assert set(ALONE) == {path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")} - {"ao-core"}


def test_nothing_of_the_checkout_is_imported(clean):
    code = "import ao_core, ao_quant; print(ao_core.__file__, ao_quant.__file__)"
    for path in clean.python("-c", code).split():
        assert Path(path).is_relative_to(clean.folder)


def test_the_plugin_and_its_schemes_are_listed(clean):
    assert "ao-quant" in json.dumps(json.loads(clean.ao("plugins", "--json")))
    schemes = json.dumps(json.loads(clean.ao("schemes", "--json")))
    assert "int8-weight-only" in schemes
    assert "int8-dynamic" in schemes


def test_gptq_runs_from_its_wheel(clean):
    assert Path(clean.python("-c", GPTQ).strip()).is_relative_to(clean.folder)


def test_the_conformance_kit_passes(clean):
    (clean.folder / "test_conformance.py").write_text(CONFORMANCE, "utf-8")
    assert " passed" in clean.python("-m", "pytest", "-q", "test_conformance.py")


def test_a_strangers_scheme_is_listed(with_ternary):
    schemes = json.dumps(json.loads(with_ternary.ao("schemes", "--json")))
    assert "ternary" in schemes
    assert "ao-ternary" in json.dumps(json.loads(with_ternary.ao("plugins", "--json")))


def test_a_strangers_scheme_passes_its_own_tests(with_ternary):
    shutil.copytree(TERNARY / "tests", with_ternary.folder / "ternary-tests")
    assert " passed" in with_ternary.python("-m", "pytest", "-q", "ternary-tests")


def test_a_strangers_scheme_is_saved_and_loaded(with_ternary):
    with_ternary.python("-c", ROUND_TRIP)


def test_a_strangers_scheme_quantizes_a_model_on_the_command_line(with_ternary):
    with_ternary.python("-c", TINY_MODEL)
    with_ternary.ao("quantize", "tiny", "--scheme", "ternary", "-o", "tiny-ternary")
    with_ternary.python("-c", QUANTIZED_MODEL)
