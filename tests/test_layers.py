"""Imports go one way, the method and the loop know no settings and no model library, and the package starts light."""

from __future__ import annotations

import ast
import functools
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import rebel

ROOT = Path(rebel.__file__).parent

ORDER = """
    types errors seeds
    pairing algorithm margins credit gains ppo_clip
    stepsize data winrates iterates evaluate report rewards policies samplers micro_batches learner
    against measures way checkpoint collect evaluators fit
    train
    offline rounds
    convert elsewhere config from_trl settings validate model_card plan trackers signals loading run_folder record
    build job rollout_job
    stages versus trainer tasks doctor cli __main__
"""
"""Modules and packages from the inside to the outside: each may import those before it, and no other."""

SEE_CONFIG = """
    from_trl settings validate model_card plan trackers run_folder record build job rollout_job versus trainer tasks
"""
"""What is about settings, or puts a run together from them. The method, its parts and the loop are not."""

PURE = {"jaxtyping", "torch"}
FOREIGN = {
    "types": PURE,
    "errors": set(),
    "seeds": set(),
    "pairing": PURE,
    "credit": PURE,
    "gains": PURE,
    "ppo_clip": PURE,
    "algorithm": PURE,
    "margins": PURE,
    "stepsize": set(),
    "micro_batches": set(),
    "evaluate": PURE,
    "measures": PURE,
    "way": set(),
    "offline": PURE | {"accelerate", "datasets", "safetensors", "trl"},
    "fit": PURE,
    "train": set(),
    "collect": {"accelerate", "torch"},
    "evaluators": {"accelerate"},
    "winrates": {"numpy", "scipy"},
    "against": set(),
    "rounds": PURE | {"accelerate", "datasets", "numpy", "pyarrow"},
    "signals": set(),
    "learner": PURE | {"accelerate"},
    "checkpoint": {"torch", "numpy", "safetensors"},
    "data": {"torch", "datasets"},
    "iterates": {"torch", "safetensors"},
    "policies": PURE | {"transformers", "peft", "trl", "diffusers", "numpy"},
    "samplers": PURE | {"transformers", "peft", "numpy", "safetensors", "httpx", "packaging"},
    "rewards": PURE | {"transformers", "trl", "openai", "safetensors"},
    "report": {"rich", "jinja2", "markupsafe", "yaml"},
    "convert": {"yaml"},
    "config": set(),
    "elsewhere": set(),
    "from_trl": set(),
    "settings": {"yaml"},
    "validate": set(),
    "cli": set(),
    "__main__": set(),
}
"""What else a part may import, beyond the standard library. Those outside the loop may import what they need."""

LATE = {"cli", "doctor", "job"}
"""Modules that import within functions: what starts light, and what looks for parts that may be missing."""


def files() -> dict[str, Path]:
    """Every module by its name below `rebel`."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def part(name: str) -> str:
    """The module or the package right below `rebel` that a module belongs to."""
    return name.split(".")[0]


@functools.cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """(imported module, whether at the top of the file) of a module; those for type checkers alone are left out."""
    tree = ast.parse(path.read_text("utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node in tree.body) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"rebel.{a.name}" for a in node.names] if node.module == "rebel" else [node.module or ""]
            found += [(name, node in tree.body) for name in names]
    return found


def ours(path: Path) -> set[str]:
    """The parts of rebel that a module imports, other than its own package."""
    names = {part(name.removeprefix("rebel.")) for name, _ in imports(path) if name.startswith("rebel.")}
    own = part(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return names - {own}


def test_every_module_has_its_place() -> None:
    assert sorted({part(name) for name in files()} - {"__init__"}) == sorted(ORDER.split())


@pytest.mark.parametrize("name", sorted(files()))
def test_imports_go_one_way(name: str) -> None:
    places = {part: place for place, part in enumerate(ORDER.split())}
    if name == "__init__":
        assert not {imported for imported, top in imports(files()[name]) if top and imported.startswith("rebel")}
        return
    outward = {imported for imported in ours(files()[name]) if places[imported] > places[part(name)]}
    assert not outward, f"{name} may not import {outward}"


def test_only_what_is_about_settings_sees_them() -> None:
    seeing = {part(name) for name, path in files().items() if "config" in ours(path)} - {"__init__"}
    assert seeing <= set(SEE_CONFIG.split())


def test_the_loop_sees_protocols_and_no_model_sampler_or_reward() -> None:
    pure = {"rewards.groups"}  # arithmetic on scored groups
    for name in (
        "algorithm",
        "learner",
        "measures",
        "way",
        "fit",
        "collect",
        "evaluators",
        "rounds",
        "offline",
        "train",
    ):
        seen = {i.removeprefix("rebel.") for i, _ in imports(files()[name]) if i.startswith("rebel.")}
        concrete = {i for i in seen - pure if part(i) in ("policies", "samplers", "rewards", "report", "trackers")}
        assert not concrete, f"{name} imports {concrete}"


def test_checks_of_settings_know_nothing_of_each_other() -> None:
    """Only the list of what each command checks knows all of them, and every one of them is in it."""
    checks = {name for name in files() if part(name) == "validate"} - {"validate", "validate.commands"}
    seen = {name: {i.removeprefix("rebel.") for i, _ in imports(files()[name])} for name in files()}
    assert {other for name in checks for other in seen[name] & checks} == {"validate.said"}
    assert checks <= seen["validate.commands"]


@pytest.mark.parametrize("name", sorted(name for name in files() if part(name) in FOREIGN))
def test_other_libraries_stay_where_they_belong(name: str) -> None:
    foreign = {imported.split(".")[0] for imported, _ in imports(files()[name])}
    foreign -= {"rebel", "__future__", *sys.stdlib_module_names}
    allowed = FOREIGN[part(name)]
    assert foreign <= allowed, f"{name} may not import {foreign - allowed}"


def test_imports_stand_at_the_top() -> None:
    late = {part(name) for name, path in files().items() if not all(top for _, top in imports(path))}
    assert late <= LATE


@pytest.mark.parametrize("name", sorted(files()))
def test_every_module_can_be_imported(name: str) -> None:
    module = importlib.import_module(f"rebel.{name}" if name != "__init__" else "rebel")
    assert module.__file__ == str(files()[name])


def without_torch(code: str) -> subprocess.CompletedProcess[str]:
    """Python in which an import of torch, or of what would bring it, fails."""
    blocked = "import sys\nfor name in ('torch', 'transformers', 'datasets', 'accelerate'): sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, timeout=60)


def test_help_settings_and_reports_need_no_torch() -> None:
    done = without_torch(
        "import rebel, rebel.config, rebel.report, rebel.validate\n"
        "from rebel import RebelConfig, RebelError\n"
        "from rebel.cli import main\n"
        "for argv in (['--help'], ['train', '--help']):\n"
        "    try: main(argv)\n"
        "    except SystemExit as end: assert not end.code\n"
        "assert main(['train', '--num_generations', '1']) == 2\n"
    )
    assert done.returncode == 0, done.stderr
    assert "rebel quickstart" in done.stdout and "--num_generations" in done.stdout
    assert without_torch("from rebel import RebelTrainer").returncode != 0, "the test would see torch"
