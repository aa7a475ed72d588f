"""The packages are linked by files alone, and the builder needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"builder", "trainer", "evaluator"}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_package_imports_no_other(package: str):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    crossing = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported(path) & (PACKAGES - {package} | {"tests"})
    }
    assert crossing == set()


def test_builder_loads_no_torch():
    modules = [
        f"builder.{path.stem}"
        for path in sorted((ROOT / "builder").glob("*.py"))
        if path.stem not in ("__init__", "__main__")
    ]
    program = f"import sys, {', '.join(modules)}\nprint('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["trainer", "pretrain", "--data", ".", "--out", "x", "--loss", "direct"], "train"),
        (["evaluator", "padim", "--data", ".", "--out", "x", "--backbone", "random:a"], "eval"),
    ],
)
def test_command_without_torch_says_what_to_install(words: list[str], extra: str):
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"  # as if it were not installed
        f"from {words[0]}.cli import main\n"
        f"main({words[1:]})\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 1
    line = (
        f"Error: torch is not installed; pip install 'semiformula[{extra}]' brings all it needs\n"
    )
    assert run.stderr == line


def test_builder_declares_all_that_it_imports_in_the_base_dependencies():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {line.split(">=")[0] for line in project["dependencies"]}
    base = {{"pillow": "PIL"}.get(name, name) for name in base}
    # Packages of an extra, and the only file or folder that may import each.
    extras = {"pyarrow": "publish", "ray": "ray_engine.py"}
    for path in (ROOT / "builder").rglob("*.py"):
        own = {name for name, place in extras.items() if place in path.parts}
        assert imported(path) - set(sys.stdlib_module_names) - {"builder"} <= base | own, path


# Numba's cache on disk does not notice an edit in another file.
def test_compiled_files_import_only_math_numba_and_numpy():
    assert imported(ROOT / "builder" / "_kernel.py") == {"math", "numba", "numpy"}
    assert imported(ROOT / "builder" / "_philox.py") == {"numba", "numpy"}
    assert imported(ROOT / "evaluator" / "_kernel.py") == {"numba"}
