"""Imports run one way (see the file tree in README.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gendist"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in PACKAGE.rglob("*.py")
}

# What a module of each room may import from the others. The root package holds the version only.
BASE = (
    "gendist",
    "gendist.errors",
    "gendist.protocols",
    "gendist.noise",
    "gendist.one_thread",
    "gendist.figures",
    "gendist.column_names",
    "gendist.cost",
)
ALLOWED = {
    "gendist.errors": (),
    "gendist.figures": (),
    "gendist.column_names": (),
    "gendist.cost": (),
    "gendist.protocols": ("gendist.errors",),
    "gendist.noise": ("gendist.protocols",),
    "gendist.secrets_in_urls": ("gendist.errors",),
    "gendist.spec_yaml": (),
    "gendist.machine": (),
    "gendist.started_by": (),
    "gendist.atomic": ("gendist.errors",),
    "gendist.storage": ("gendist.errors", "gendist.atomic", "gendist.secrets_in_urls"),
    "gendist.one_thread": (),
    "gendist.blocks": ("gendist.protocols", "gendist.one_thread", "gendist.ray_cluster"),
    "gendist.ray_cluster": (
        "gendist.protocols",
        "gendist.machine",
        "gendist.secrets_in_urls",
        "gendist.started_by",
    ),
    "gendist.data": (*BASE, "gendist.blocks", "gendist.atomic"),
    "gendist.models": BASE,
    "gendist.em": (*BASE, "gendist.blocks"),
    "gendist.train": (
        *BASE,
        "gendist.blocks",
        "gendist.machine",
        "gendist.atomic",
        "gendist.storage.patience",
        "gendist.ray_cluster",
    ),
    "gendist.evaluate": (*BASE, "gendist.blocks", "gendist.data.transforms"),
    "gendist.transformed": (*BASE, "gendist.data.transforms", "gendist.models.ops.offered"),
    "gendist.class_conditional": (*BASE, "gendist.blocks", "gendist.data.survey", "gendist.em", "gendist.models.ops"),
    "gendist.bulk": (
        *BASE,
        "gendist.blocks",
        "gendist.data",
        "gendist.evaluate",
        "gendist.artifact",
        "gendist.atomic",
        "gendist.folder_lock",
        "gendist.config",
        "gendist.execution",
        "gendist.machine",
        "gendist.storage",
        "gendist.transformed",
    ),
    "gendist.serve": (
        *BASE,
        "gendist.artifact",
        "gendist.bulk.parts",
        "gendist.config",
        "gendist.data",
        "gendist.machine",
        "gendist.pictures",
        "gendist.ray_cluster",
        "gendist.storage",
        "gendist.transformed",
    ),
    "gendist.planning": (
        *BASE,
        "gendist.blocks",
        "gendist.config",
        "gendist.data",
        "gendist.em",
        "gendist.train",
        "gendist.training_job",
    ),
    "gendist.run": (),
    "gendist.tracking": ("gendist.run",),
    "gendist.wandb_process": (),
    "gendist.folder_lock": ("gendist.protocols",),
    "gendist.pictures": (
        "gendist",
        "gendist.errors",
        "gendist.data.schema",
        "gendist.figures",
        "gendist.storage.patience",
        "gendist.plots",
    ),
    "gendist.plots": ("gendist.figures",),
}


def imports(path: Path, module: str) -> set[str]:
    """The absolute names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            found.add(node.module)
            # `from gendist.data import schema` imports a module, too.
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
    return found


def inside(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_one_way(module):
    ours = {name for name in imports(MODULES[module], module) if inside(name, "gendist")}
    for room, allowed in ALLOWED.items():
        if inside(module, room):
            for name in ours:
                fits = inside(name, room) or any(name == a if a == "gendist" else inside(name, a) for a in allowed)
                assert fits, f"{module} imports {name}"
    if not inside(module, "gendist.launch"):
        assert not any(inside(name, "gendist.launch") for name in ours), f"{module} imports the command line"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_families_do_not_know_each_other(module):
    parts = module.split(".")
    if parts[1:2] == ["models"] and len(parts) == 3:
        others = {name for name in imports(MODULES[module], module) if inside(name, "gendist.models")}
        assert all(name.startswith(("gendist.models.distributions", "gendist.models.ops")) for name in others)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_ray_is_imported_by_files_that_say_so(module):
    may = MODULES[module].name.startswith("ray_") or inside(module, "gendist.serve") or inside(module, "gendist.launch")
    assert may or not any(inside(name, "ray") for name in imports(MODULES[module], module)), module


@pytest.mark.parametrize("module", sorted(MODULES))
def test_deepspeed_is_imported_by_files_that_say_so(module):
    may = MODULES[module].name.startswith("deepspeed_")
    assert may or not any(inside(name, "deepspeed") for name in imports(MODULES[module], module)), module


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_what_knows_ray_connects_to_it(module):
    """`gendist.ray_cluster` imports ray: whoever does without ray must not import it before it is needed."""
    tree = ast.parse(MODULES[module].read_text())
    at_once = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert "gendist.ray_cluster" not in at_once or MODULES[module].name.startswith("ray_"), module


def test_importing_the_package_loads_neither_torch_nor_ray():
    program = "import sys, gendist; print(sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_shows_its_help_without_torch_or_ray():
    program = (
        "import sys\nfrom gendist.launch.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip().endswith("[]")


def test_the_name_of_no_family_stands_outside_the_families():
    """What other rooms need of a family is a method of it: neither engine nor command line asks which one it is."""
    from gendist.config import families, family_class

    names = {*families(), *(family_class(family).__name__ for family in families())}
    for module, path in MODULES.items():
        if inside(module, "gendist.models"):
            continue
        tree = ast.parse(path.read_text())
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        identifiers = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not names & (strings | identifiers), f"{module} names {names & (strings | identifiers)}"
