"""The house: imports go downward only, and the method stands on torch and MMEngine's Registry alone."""
import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHOD = ROOT / 'rl_mmdet' / 'replacement'


def imported_modules(file):
    """Absolute names of the modules that a file imports, at its top or inside its functions."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.add(node.module)
    return modules


def test_import_contracts_are_kept():
    lint = 'from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))'
    # A process of its own: the linter's logging set-up closes and disables the loggers of all other tests.
    done = subprocess.run([sys.executable, '-c', lint], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_method_imports_torch_and_the_registry_only():
    for file in METHOD.rglob('*.py'):
        others = {name for name in imported_modules(file) if name.split('.')[0] not in sys.stdlib_module_names}
        if file == METHOD / 'registry.py':
            others.discard('mmengine.registry')
        assert {name.split('.')[0] for name in others} <= {'torch'}, file


def test_library_does_not_import_scripts_or_tests():
    for file in (ROOT / 'rl_mmdet').rglob('*.py'):
        imported = {name.split('.')[0] for name in imported_modules(file)}
        assert not imported & {'tools', 'tests', 'configs', 'benchmarks', 'zoo'}, file
