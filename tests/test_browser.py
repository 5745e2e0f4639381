"""The report and TensorBoard in a real browser.  Needs Debian's chromium: `make test-system`."""

import contextlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cli import train as command
from pipeline.face_set import write_faces

pytestmark = pytest.mark.system

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
QUIET += ["--disable-component-update", "--no-sandbox", "--headless"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium: install Debian's package of that name")
    folder = tmp_path_factory.mktemp("browser")
    write_faces(folder / "faces", 8, workers=1)
    arguments = ["--data.dataroot", str(folder / "faces"), "--data.cache_dir", str(folder / "cache")]
    arguments += ["--run.dir", str(folder / "run"), "--data.image_size", "16", "--model.ngf", "2", "--model.ndf", "2"]
    arguments += ["--train.batch_size", "4", "--train.max_images", "80", "--train.num_epochs", "100"]
    arguments += ["--log.every_steps", "2", "--log.grid_every_images", "20", "--log.grid_size", "4"]
    assert command.main(arguments) == 0
    return folder / "run"


def page(url: str, profile: Path, *options: str) -> str:
    """The document as it stands once its scripts have run."""
    arguments = [CHROMIUM, *QUIET, f"--user-data-dir={profile}", "--virtual-time-budget=10000", "--dump-dom", *options]
    return subprocess.run([*arguments, url], capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_report_shows_curves_pictures_and_the_growth(run, tmp_path):
    document = page((run / "report.html").as_uri(), tmp_path / "profile")
    assert len(re.findall(r"<path[^>]* d=\"M", document)) >= 4, "curves"
    assert document.count("data:image/") >= 6, "real, fake and the frames of the growth"
    for word in ("Loss", "D(x)", "D(G(z))", "finished"):
        assert word in document, word
    assert not re.findall(r"(?:src|href)=\"https?:", document), "it opens without a network"


@contextlib.contextmanager
def tensorboard(folder: Path):
    arguments = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(folder),
        "--port",
        "0",
        "--host",
        "localhost",
    ]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as server:
        try:
            deadline = time.monotonic() + 90
            address = None
            while address is None and time.monotonic() < deadline:
                address = re.search(r"http://localhost:\d+", server.stderr.readline())
            assert address, "TensorBoard did not start"
            yield address.group(0)
        finally:
            server.terminate()
            server.communicate(timeout=30)


def test_tensorboard_shows_the_curves_by_their_names(run, tmp_path):
    with tensorboard(run) as address:
        document = page(f"{address}/?darkMode=false#timeseries", tmp_path / "profile", "--window-size=1400,4000")
    for tag in ("D(x)", "D(G(z))/after", "Loss", "Timing", "fakes", "reals"):
        assert tag in document, tag
