"""The arrow launch, benchmarks, tests -> pipeline -> kernels -> torch, and that the names are ours."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {"kernels": set(), "pipeline": {"kernels"}, "benchmarks": {"pipeline", "kernels"}, "launch": {"pipeline"}}
OURS = {"kernels", "pipeline", "benchmarks", "launch", "tests"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module}
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        first = {name.split(".")[0] for name in imports(path)} & OURS
        assert first <= MAY_IMPORT[folder] | {folder}, path


def test_config_imports_nothing_of_ours_but_its_own_parts():
    for path in (ROOT / "pipeline").glob("config*.py"):
        ours = [name for name in imports(path) if name.split(".")[0] in OURS]
        assert all(name.startswith("pipeline.config_") for name in ours), (path, ours)


def test_only_the_commands_import_the_commands():
    for path in (ROOT / "pipeline").glob("*.py"):
        assert not any(name.startswith("pipeline.cli") for name in imports(path)), path


def test_launch_scripts_are_thin_and_bear_no_standard_name():
    for path in (ROOT / "launch").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 30, path
        assert path.stem not in sys.stdlib_module_names


def test_kernels_is_ours_even_beside_a_vendors(tmp_path):
    """A package of that name exists on PyPI; the launch scripts put the clone first."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise ImportError('not ours')")
    probe = "import runpy\n"
    probe += f"runpy.run_path({str(ROOT / 'launch/train.py')!r}); import kernels; print(kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", probe], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.strip() == str(ROOT / "kernels/__init__.py"), done.stderr


def test_no_file_is_too_long():
    for folder in ("pipeline", "kernels", "launch", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = [
                line for line in path.read_text().splitlines() if line.strip() and not line.strip().startswith("#")
            ]
            assert len(lines) <= 400, (path, len(lines))


def calls(path: Path):
    """Name and keywords of every call in a file, `module.function` as written."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_nothing_reads_code_where_it_expects_data():
    """What SECURITY.md promises: weights_only, safe YAML, no pickle, no members unpacked under their own names."""
    forbidden = {"eval", "exec", "pickle.load", "pickle.loads", "marshal.loads", "shelve.open", "joblib.load"}
    seen = set()
    for folder in ("pipeline", "kernels", "launch", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for name, keywords in calls(path):
                assert name not in forbidden, (path, name)
                assert not name.endswith((".extractall", ".extract")), (path, name)
                if name == "torch.load":
                    assert keywords.get("weights_only") == "True", path
                if name == "np.load":
                    assert keywords.get("allow_pickle") == "False", path
                if name.startswith("yaml.") and name.endswith("load") and name != "yaml.safe_load":
                    assert keywords.get("Loader") in ("_Loader", "yaml.BaseLoader"), path
                seen.add(name)
    assert {"torch.load", "np.load", "yaml.load"} <= seen, "this test looks at the calls it is about"
