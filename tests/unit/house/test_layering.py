"""Which package may know which (docs/architecture.md, "Folders"), read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from devtool.project import PRODUCT, ROOT

#: package → modules of other packages of ours that it may import; a bare package name stands for all of it.
ALLOWED = {
    "base": set(),
    "ipc": {"base"},
    "vmm": {"base", "ipc"},
    "vcpu_worker": {"base", "ipc"},
    "jailer": {"base", "ipc", "vmm.main", "vmm.cli", "vcpu_worker.main"},
    "cellblock": {
        "base",
        "ipc",
        "vmm.cpu_config",
        "vmm.snapshot",
        "vmm.json",
        "vmm.config",
        "vmm.files",
        "vmm.version",
    },
}
#: The rooms of the controller, in order: each may import only what stands before it, and what stands beside it.
ROOMS = (
    ("errors", "version", "files", "file_limit", "layout", "placement"),
    ("cli",),
    ("json",),
    ("observe",),
    ("boot", "cpu_config", "mmds", "devices"),
    ("config",),
    ("cells",),
    ("operations",),
    ("snapshot",),
    ("machine",),
    ("session",),
    ("api",),
    ("main",),
)
#: They cost more at a cold start, or bring more code into a cell, than they are worth there.
KEPT_OUT = {
    "aiohttp", "argparse", "asyncio", "concurrent", "dataclasses", "inspect", "logging", "multiprocessing", "numpy",
    "pathlib", "pydantic", "pyroute2", "requests", "shutil", "subprocess", "tempfile", "unittest",
}  # fmt: skip
#: Programs that run on the host, never in a cell or on the way to one.
HOST_SIDE_PACKAGES = ("cellblock",)
HOST_SIDE = {"jailer/seccomp/compile.py"}
PACKAGES = {*PRODUCT, "lab", "devtool", "bench", "tests"}


def imports(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line, module and imported name ("" for `import module`) of every import, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            yield from ((node.lineno, node.module or "", alias.name) for alias in node.names)


def may_import(package: str, module: str, name: str) -> bool:
    """Tell whether `package` may import `module`, or `name` from it."""
    top = module.partition(".")[0]
    if top not in PACKAGES or top == package:
        return True
    full = f"{module}.{name}" if name else module
    return any(full == target or full.startswith(f"{target}.") for target in ALLOWED[package])


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", [name for name in PRODUCT if (ROOT / name).is_dir()])
def test_package_knows_only_what_it_may(package):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: imports {module}{'.' if name else ''}{name}"
        for path in sources(package)
        for line, module, name in imports(path)
        if not may_import(package, module, name)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", [name for name in PRODUCT if name not in HOST_SIDE_PACKAGES])
def test_package_keeps_heavy_modules_out(package):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: imports {module}"
        for path in sources(package)
        if str(path.relative_to(ROOT)) not in HOST_SIDE
        for line, module, _ in imports(path)
        if module.partition(".")[0] in KEPT_OUT
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", [name for name in PRODUCT if (ROOT / name).is_dir()])
def test_modules_form_no_circle(package):
    """Looks at what is imported when a module loads; imports inside functions and for type checkers do not count."""
    edges = {name: set(_loaded_with(path)) for path in sources(package) for name in [_module_name(path)]}
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        assert module not in trail, "circle: " + " → ".join([*trail[trail.index(module) :], module])
        if module in done or module not in edges:
            return
        for needed in sorted(edges[module]):
            visit(needed, [*trail, module])
        done.add(module)

    for module in sorted(edges):
        visit(module, [])


def _loaded_with(path: Path) -> Iterator[str]:
    known = {_module_name(other) for other in sources(path.relative_to(ROOT).parts[0])}
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                target = submodule if submodule in known else node.module
                if target in known and target != _module_name(path):
                    yield target


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_check_sees_what_it_should(tmp_path):
    (tmp_path / "x.py").write_text("def f():\n    from vmm import vmm\nimport vmm.main\nfrom vcpu_worker import main\n")
    found = [(module, name, may_import("jailer", module, name)) for _, module, name in imports(tmp_path / "x.py")]
    assert sorted(found) == [("vcpu_worker", "main", True), ("vmm", "vmm", False), ("vmm.main", "", True)]
