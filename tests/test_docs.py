"""Every command in the documentation runs as it stands, or says what it needs that a test does not have.

A block of commands is fenced as ```sh; what it printed stands in a ```text block of its own.  A line
`<!-- needs: ... -->` right before a block says why no test runs it.  The commands of a file run one after another in a
copy of the repository, with a few faces drawn and a tiny run already there where a reader would have made them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.commands import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S)
NEEDS = re.compile(r"<!-- needs: (.+?) -->\s*$", re.S)
SECONDS = 180
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)#\s]+)[^)]*\)")


class Block(NamedTuple):
    """One fenced block of commands."""

    line: int
    commands: str
    needs: str
    """What it needs that a test does not have; empty: it is run."""


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        if match["language"] == "sh":
            needs = NEEDS.search(text[: match.start()].rstrip(" "))
            commands = "\n".join(line.removeprefix(match["indent"]) for line in match["body"].splitlines())
            found.append(Block(text[: match.start()].count("\n") + 1, commands, needs[1] if needs else ""))
    return found


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the files that make up the repository, with what a reader has made by the time he reads on."""
    folder = tmp_path_factory.mktemp("docs") / "dcgan"
    skipped = shutil.ignore_patterns(
        ".git", ".venv", "runs", "data", "*cache*", "__pycache__", "*.egg-info", "build", ".whl"
    )
    shutil.copytree(ROOT, folder, ignore=skipped)
    for command in (
        "launch/prepare.py faces data/faces --count 200",
        "launch/prepare.py pack data/faces photos.zip",
        "launch/train.py --config configs/quickstart.yaml --data.dataroot data/faces --train.max_images 64"
        " --model.ngf 4 --model.ndf 4 --train.batch_size 16 --run.dir runs/quickstart",
    ):
        run(folder, f"{sys.executable} {command}")
    return folder


def run(folder: Path, commands: str) -> subprocess.CompletedProcess[str]:
    # The environment's own programs come first, as after `source .venv/bin/activate`.
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(folder.parent / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    words = ["bash", "-euo", "pipefail", "-c", commands]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, f"{commands}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done


@pytest.mark.docs
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_commands_of_a_page_run(page, clone):
    for block in blocks(page):
        if not block.needs:
            try:
                run(clone, block.commands)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                pytest.fail(f"{page.name}:{block.line}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere_and_blocks_say_what_they_are(page):
    text = page.read_text()
    for target in LINK.findall(text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for match in FENCE.finditer(text):
        line = text[: match.start()].count("\n") + 1
        assert match["language"], f"{page.name}:{line}: a fenced block without a language"


def test_some_commands_are_run_at_all():
    assert sum(not block.needs for page in PAGES for block in blocks(page)) >= 10
