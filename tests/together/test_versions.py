"""Versions move in lockstep, and every package declares what an ao package declares."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
SIBLINGS = [folder for folder in PACKAGES if folder.name != "ao-core"]
CORE_REQUIREMENT = "ao-core>=0.1,<0.2"

every_package = pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: folder.name)
every_plugin = pytest.mark.parametrize(
    "folder", [*SIBLINGS, ROOT / "examples" / "ao-ternary"], ids=lambda folder: folder.name
)


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]


def core_version() -> str:
    return project(ROOT / "packages" / "ao-core")["version"]


def test_the_packages_are_found():
    assert {"ao-core", "ao-quant"} <= {folder.name for folder in PACKAGES}


@every_package
def test_versions_are_in_lockstep(folder):
    assert project(folder)["version"] == core_version()


def test_the_module_says_the_same_version():
    tree = ast.parse((ROOT / "packages/ao-core/src/ao_core/__init__.py").read_text("utf-8"))
    said = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert said == [core_version()]


def test_the_changelog_has_the_version():
    assert f"## [{core_version()}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@every_plugin
def test_a_plugin_requires_this_core_and_names_its_entry_point(folder):
    declared = project(folder)
    assert CORE_REQUIREMENT in declared["dependencies"]
    assert declared["entry-points"]["ao"]


@every_package
def test_a_package_is_typed_named_after_its_import_and_licensed(folder):
    declared = project(folder)
    assert declared["name"] == folder.name
    assert (folder / "src" / folder.name.replace("-", "_") / "py.typed").is_file()
    assert declared["requires-python"] == ">=3.10"
    assert declared["license"] == "BSD-3-Clause"
    assert (folder / "LICENSE").read_text("utf-8") == (ROOT / "LICENSE").read_text("utf-8")
