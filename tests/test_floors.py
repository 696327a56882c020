"""Every floor imports only from floors below it."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "dpojax"
FLOORS = [
    *("errors", "configs", "paths", "options", "runfile", "progress", "processes", "cachedir", "startup", "types"),
    *("compiler", "sharding", "losses", "theory", "packing", "logprobs", "models", "data", "show", "train", "generate"),
    *("evaluate", "rl", "plan", "report", "commands", "cli", "local", "__main__"),
]


def floor_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "dpojax" and len(parts) > 1 else None


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "dpojax":
            found |= {f"dpojax.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_imports_go_down():
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        floor = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if floor == "__init__":
            continue
        seen.add(floor)
        for module in imports(path):
            below = floor_of(module)
            if below is not None:
                assert FLOORS.index(below) <= FLOORS.index(floor), f"{path.name} of {floor} imports {module}"
    assert seen == set(FLOORS)


def test_losses_see_only_log_probabilities():
    for path in (PACKAGE / "losses").glob("*.py"):
        used = {module for module in imports(path) if floor_of(module)}
        assert all(floor_of(module) in ("losses", "types") for module in used), path


def test_the_command_line_starts_light():
    """--help must answer at once, so cli.py may import nothing heavy at its top."""
    configs = ("configs/__init__.py", "configs/training.py", "configs/tools.py")
    for name in ("cli.py", "commands.py", "errors.py", "runfile.py", "__init__.py", *configs):
        tree = ast.parse((PACKAGE / name).read_text())
        top = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
            for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert not top & {"jax", "flax", "optax", "orbax", "grain", "transformers", "numpy"}, name
