"""The rules of the house that a program can check."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import liger_fn.functional
from liger_fn.testing.specs import OPS, specs

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "liger_fn"
SOURCES = sorted(PACKAGE.rglob("*.py"))
OP_FILES = [
    path for path in sorted((PACKAGE / "functional").rglob("*.py")) if path.parent.name != "core"
]
# A choice of backend, a function of functions, and one whose gradient is a result.
NO_OPS = {
    "using",
    "preference",
    "tiled_mlp",
    "fused_linear_cross_entropy_accumulate",
    "vocab_parallel_cross_entropy",
    "fused_linear_vocab_parallel_cross_entropy",
}

# Who may import whom; `testing` and `training` may import all of them.
LAYERS = {
    "functional.core": ("functional.core",),
    "functional": ("functional",),
    "nn": ("functional", "nn"),
    "hf": ("functional", "nn", "hf"),
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def every(paths):
    return pytest.mark.parametrize("path", [pytest.param(p, id=name(p)) for p in paths])


def imports(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name(path)} imports relatively"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


# The door


def test_the_door_and_the_registry_name_the_same_ops():
    door = liger_fn.functional.__all__
    assert sorted(set(door) - NO_OPS) == sorted(OPS)
    assert list(door) == sorted(door)
    assert [spec.name for spec in specs()] == list(OPS)
    for spec in specs():
        assert getattr(liger_fn.functional, spec.name) is spec.op


@pytest.mark.parametrize("door", ["functional", "nn", "hf"])
def test_what_a_door_shows_is_documented(door):
    module = importlib.import_module(f"liger_fn.{door}")
    assert module.__all__
    for public in module.__all__:
        documented = getattr(module, public)
        if callable(documented):
            assert inspect.getdoc(documented), f"{door}.{public} has no docstring"


@every(SOURCES)
def test_modules_are_documented(path):
    assert path.name == "__init__.py" or ast.get_docstring(ast.parse(path.read_text()))


# Imports point one way


@every(SOURCES)
def test_imports_point_one_way(path):
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    layer = next((layer for layer in LAYERS if within(module, layer)), None)
    if layer is None:
        return
    for imported in imports(path):
        if within(imported, "liger_fn") and imported != "liger_fn":
            allowed = any(within(imported, f"liger_fn.{below}") for below in LAYERS[layer])
            assert allowed, f"{module} imports {imported}"
        if layer != "hf":
            assert not within(imported, "transformers"), f"{module} imports transformers"
        if layer.startswith("functional") and module not in TRITON_IMPORTERS:
            assert not within(imported, "triton"), f"{module} imports triton past core.launch"


# launch.py answers for Triton's absence; backend.py needs its interpreter, and only if asked.
TRITON_IMPORTERS = ("functional.core.launch", "functional.core.backend")


def _python(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("triton", ["present", "absent"])
def test_importing_the_ops_is_light(triton):
    _python(
        f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

if {triton == "absent"}:
    sys.meta_path.insert(0, Absent())
import liger_fn.functional
from liger_fn.functional.core.launch import TRITON_MISSING

assert bool(TRITON_MISSING) == {triton == "absent"}
heavy = {{"transformers", "matplotlib", "liger_fn.testing"}} & set(sys.modules)
assert not heavy, heavy
"""
    )


def test_importing_the_package_imports_nothing():
    _python("import sys, liger_fn; assert 'torch' not in sys.modules")


# Kernels


FORBIDDEN = {
    "item": "waits for the device",
    "tolist": "waits for the device",
    "cpu": "waits for the device",
    "nonzero": "waits for the device",
    "synchronize": "waits for the device",
    "environ": "makes results depend on the environment",
    "getenv": "makes results depend on the environment",
    "autotune": "chooses a launch by measuring",
    "libdevice": "is missing in Triton's interpreter",
}


# Here every element has one writer in a launch, and so its sum an order.
ATOMICS_IN_ORDER = {"liger_fn/functional/linear_loss/products.py": ["desc.atomic_add"]}


@every(OP_FILES)
def test_ops_are_pure(path):
    atomics = []
    for node in ast.walk(ast.parse(path.read_text())):
        used = getattr(node, "attr", getattr(node, "id", ""))
        assert used not in FORBIDDEN, f"line {node.lineno}: {used} {FORBIDDEN.get(used)}"
        if used.startswith("atomic_"):
            atomics.append(ast.unparse(node))
    in_order = ATOMICS_IN_ORDER.get(path.relative_to(ROOT).as_posix(), [])
    assert atomics == in_order, "atomics have no fixed order"


def test_every_kernel_is_compiled_offline():
    """Some spec names it, so that `liger_fn.testing.compilation` meets it."""
    kernels = {
        f"{module.name}.{kernel}"
        for module in pkgutil.walk_packages(liger_fn.functional.__path__, "liger_fn.functional.")
        for kernel, value in vars(importlib.import_module(module.name)).items()
        if kernel.endswith("_kernel") and value.fn.__module__ == module.name
    }
    named = {
        f"{c.kernel.fn.__module__}.{c.kernel.fn.__name__}" for s in specs() for c in s.kernels()
    }
    assert kernels
    assert kernels <= named, f"no spec compiles {sorted(kernels - named)}"


def test_no_kernel_takes_a_float_at_run_time():
    """Triton passes it in 32 bits, and float64 would not go through; its interpreter hides that."""
    for spec in specs():
        for c in spec.kernels():
            floats = {n for n, t in c.signature.items() if t.startswith(("fp", "bf"))}
            assert not floats, f"{spec.name}, {c.id}: {floats}"


# Names and texts


@every(SOURCES)
def test_names_say_something(path):
    vague = {"utils", "util", "common", "helper", "helpers", "misc", "impl"}
    assert not vague & {path.stem, path.parent.name}


@every([p for f in ("liger_fn", "tests", "benchmarks") for p in sorted((ROOT / f).rglob("*.py"))])
def test_texts_are_clean(path):
    text = path.read_text()
    assert not re.search(r"/(home|root|work|Users)/\w", text), "a path of one machine"
    assert not re.search(r"^\s*#\s*[-=#*]{4,}", text, re.MULTILINE), "a banner"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text.replace("(TODO|FIXME|XXX)", "")), (
        "unfinished"
    )
