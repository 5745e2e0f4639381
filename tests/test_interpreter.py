"""Commands under a Python that lacks their packages: one line that says what to activate."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline import interpreter
from tests.commands import ROOT

SCRIPTS = sorted(p for p in (ROOT / "launch").rglob("*.py") if p.name != "doctor.py")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_the_environment_a_command_says_in_one_line_what_to_activate(script):
    words = [sys.executable, "-S", "-E", str(script), "--help"]  # -S: without site-packages
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{script.name}: error: {sys.executable} has no ")
    assert ".venv/bin/activate" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_advice_is_the_clones_own_environment_where_it_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(interpreter, "ROOT", tmp_path)
    for made in (False, True):
        if made:
            (tmp_path / ".venv/bin").mkdir(parents=True)
            (tmp_path / ".venv/bin/activate").touch()
        with pytest.raises(SystemExit):
            interpreter.require_packages("no_such_module")
        said = capsys.readouterr().err
        assert "has no no_such_module; " in said
        assert (f"source {tmp_path}/.venv/bin/activate" in said) is made
        assert ("make train makes" in said) is not made


def test_where_all_is_installed_nothing_is_said_and_nothing_imported(capsys):
    before = set(sys.modules)
    interpreter.require_packages()
    assert capsys.readouterr() == ("", "")
    assert set(sys.modules) == before


def test_what_is_looked_for_is_what_setup_asks_for():
    asked = (ROOT / "setup.py").read_text().partition("install_requires=[")[2].partition("],\n")[0]
    named = {"torch": "torch", "torchvision": "torchvision", "yaml": "pyyaml", "PIL": "pillow"}
    for module in interpreter.NEEDED:
        assert named.get(module, module.replace("_", "-")) in asked
