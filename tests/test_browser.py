"""The reports and TensorBoard in a real browser.  Needs Debian's chromium: `make test-system`."""

import contextlib
import html
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import report as report_command
from pipeline.cli import train as command
from pipeline.face_set import write_faces

pytestmark = pytest.mark.system

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
QUIET += ["--disable-component-update", "--no-sandbox", "--headless"]
DARK = "--blink-settings=preferredColorScheme=0"
PAPER = {False: "rgb(251, 250, 247)", True: "rgb(22, 22, 20)"}
"""The page's background, light and dark."""
WIDTHS = {"wide": 1300, "phone": 375}

PROBE = """
<script>
addEventListener("load", () => {
  const box = (e) => { const b = e.getBoundingClientRect(); return [b.width, b.height]; };
  const natural = (e) => [e.naturalWidth, e.naturalHeight];
  const images = [...document.images].map((e) => ({ alt: e.alt, natural: natural(e), box: box(e) }));
  const curves = [...document.querySelectorAll(".plot")].map((plot) => ({
    name: plot.closest("figure").getAttribute("aria-label"),
    box: box(plot),
    paths: [...plot.querySelectorAll("path")].map((e) => ({
      style: e.getAttribute("class"),
      points: e.getAttribute("d").split(/[ML]/).length - 1,
      length: e.getTotalLength(),
      colour: getComputedStyle(e).stroke,
    })),
  }));
  const chart = document.querySelector(".plot");
  const legend = () => chart && chart.closest("figure").querySelector(".legend").textContent;
  const before = legend();
  if (chart) {
    const b = chart.getBoundingClientRect();
    chart.dispatchEvent(new PointerEvent("pointermove", { clientX: b.left + 1, clientY: b.top + 1 }));
  }
  const page = {
    images, curves, before, after: legend(),
    paper: getComputedStyle(document.body).backgroundColor,
    beyond: document.documentElement.scrollWidth - innerWidth,
    text: document.body.innerText,
  };
  parent.postMessage(JSON.stringify(page), "*");
});
</script>
"""
FRAME = """<!DOCTYPE html><body style="margin:0"><pre></pre><iframe src="{page}" width="{width}" height="900"></iframe>
<script>addEventListener("message", (e) => {{ document.querySelector("pre").textContent = e.data; }});</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium: install Debian's package of that name")
    found = tmp_path_factory.mktemp("browser")
    write_faces(found / "faces", 8, workers=1)
    return found


def train(folder: Path, name: str, *options: str) -> Path:
    arguments = ["--data.dataroot", str(folder / "faces"), "--data.cache_dir", str(folder / "cache")]
    arguments += ["--run.dir", str(folder / name), "--data.image_size", "16", "--model.ngf", "2", "--model.ndf", "2"]
    arguments += ["--train.batch_size", "4", "--train.num_epochs", "100", "--log.every_steps", "2"]
    arguments += ["--log.grid_every_images", "20", "--log.grid_size", "4", "--eval.num_images", "8", *options]
    assert command.main(arguments) == 0
    return folder / name


@pytest.fixture(scope="module")
def run(folder):
    watched = ("--watch.collapse_images", "4", "--watch.min_diversity", "1")  # nobody draws so variedly: an event
    return train(folder, "run", "--train.max_images", "80", "--eval.every_images", "20", *watched)


@pytest.fixture(scope="module")
def compared(folder, run):
    """A page of that run, a shorter one with another rate, and one that measures nothing."""
    short = train(folder, "short", "--train.max_images", "40", "--eval.every_images", "20", "--optim.lr", "1e-3")
    plain = train(folder, "plain", "--train.max_images", "60")
    assert report_command.main([str(run), str(short), str(plain), "--out", str(folder / "compare.html")]) == 0
    return folder / "compare.html"


def page(url: str, profile: Path, *options: str) -> str:
    """The document as it stands once its scripts have run."""
    arguments = [CHROMIUM, *QUIET, f"--user-data-dir={profile}", "--virtual-time-budget=10000", "--dump-dom", *options]
    return subprocess.run([*arguments, url], capture_output=True, text=True, timeout=120, check=True).stdout


def seen(path: Path, folder: Path, width: int = 1300, dark: bool = False) -> dict:
    """What a browser of that width has drawn of a page: its pictures, curves, colours, and whether all of it fits."""
    text = path.read_text(encoding="utf-8")
    (folder / "probed.html").write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(page="probed.html", width=width))
    options = ["--window-size=1400,1000", "--allow-file-access-from-files", *([DARK] if dark else [])]
    document = page((folder / "frame.html").as_uri(), folder / "profile", *options)
    return json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", document, re.DOTALL)[1]))


def assert_drawn(found: dict, dark: bool) -> None:
    """Each picture has pixels, each curve has length and a colour of its own, and nothing is wider than the page."""
    assert found["paper"] == PAPER[dark]
    assert found["beyond"] <= 0, "the page scrolls sideways"
    for image in found["images"]:
        assert min(image["natural"]) >= 8, image
        assert min(image["box"]) >= 8, image
    for chart in found["curves"]:
        assert min(chart["box"]) > 60, chart
        curves = [path for path in chart["paths"] if path["points"] > 1]
        assert curves, chart["name"]
        for path in curves:
            assert path["length"] > 100, path  # of the drawing's 1000 units
            assert path["colour"] not in ("none", PAPER[dark]), path


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_shows_its_pictures_and_curves(run, tmp_path, width, dark):
    found = seen(run / "report.html", tmp_path, WIDTHS[width], dark)
    assert_drawn(found, dark)
    names = [chart["name"] for chart in found["curves"]]
    for name in (
        "Losses of discriminator",
        "D(x) against",
        "Images a second",
        "Sliced Wasserstein",
        "MS-SSIM of pairs",
    ):
        assert any(name in n for n in names), names
    swd = next(chart for chart in found["curves"] if "Sliced" in chart["name"])
    assert [path["points"] for path in swd["paths"] if path["style"] == "one"] == [4], "evaluations"
    assert sum("ring" in path["style"] for path in swd["paths"]) == 1, "the best"
    alts = [image["alt"] for image in found["images"]]
    assert sum("A sample and the photographs" in alt for alt in alts) == 16
    assert sum("between two latents" in alt for alt in alts) == 5
    for alt in ("144 random samples", "Grid of photographs", "Grid of generated pictures", "After 80 images"):
        assert alt in alts, alts
    assert "at 8 images" in found["after"], "the pointer reads the chart out"
    assert "at 8 images" not in found["before"]
    for word in ("Losses", "D(x)", "D(G(z))", "Quality", "Diversity", "Between latents", "Nearest photographs"):
        assert word in found["text"], word


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_of_several_runs_shows_them_all(compared, tmp_path, width, dark):
    found = seen(compared, tmp_path, WIDTHS[width], dark)
    assert_drawn(found, dark)
    charts = {chart["name"]: chart for chart in found["curves"]}
    for name, runs in (("Loss D", 3), ("D(x)", 3), ("SWD", 2), ("MS-SSIM", 2)):
        colours = {path["colour"] for path in charts[name]["paths"] if path["points"] > 1}
        assert len(colours) == runs, name
    assert len(found["images"]) == 6, "the newest grids, and those at the shortest run's length"
    for word in ("3 runs compared", "optim.lr", "eval.every_images", "after 80 images", "after 40 images"):
        assert word in found["text"], word


def test_the_pages_open_without_a_network(run, compared, tmp_path):
    for path in (run / "report.html", compared):
        document = page(path.as_uri(), tmp_path / "profile")
        assert not re.findall(r"(?:src|href)=\"(?!data:|#)", document)


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


def asked(address: str, path: str, **body: object) -> Any:
    """What TensorBoard's server says there, as JSON; with a body, to a POST."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(f"{address}/data/plugin/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def wait_for_tags(address: str) -> dict[str, Any]:
    """Tags of the curves, once the server has read the run."""
    deadline = time.monotonic() + 90
    tags: dict[str, Any] = {}
    while "Metrics/swd" not in tags and time.monotonic() < deadline:
        tags = asked(address, "scalars/tags").get("tensorboard", {})
    return tags


def assert_same_points(address: str, rows: list[dict]) -> None:
    """The curve of a metric is the one of metrics.jsonl."""
    points = asked(address, "scalars/scalars?run=tensorboard&tag=Metrics/swd")
    assert [step for _, step, _ in points] == [row["images_seen"] for row in rows]
    assert [value for _, _, value in points] == pytest.approx([row["swd"] for row in rows], rel=1e-6)


def assert_table_of_runs(address: str, newest: dict) -> None:
    """HParams has the run's settings and its newest figures."""
    experiment = asked(address, "hparams/experiment", experimentName="")
    assert {"optim.lr", "model.nz"} <= {info["name"] for info in experiment["hparamInfos"]}
    states = [f"STATUS_{state}" for state in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
    columns = [{"metric": info["name"]} for info in experiment["metricInfos"]]
    wanted = {"startIndex": 0, "sliceSize": 10, "colParams": columns, "allowedStatuses": states}
    (group,) = asked(address, "hparams/session_groups", **wanted)["sessionGroups"]
    assert group["hparams"]["optim.lr"] == 2e-4
    values = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
    assert values["Metrics/swd"] == pytest.approx(newest["swd"], rel=1e-6)


def test_tensorboard_shows_curves_pictures_events_and_the_table_of_runs(run, tmp_path):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with tensorboard(run) as address:
        tags = wait_for_tags(address)
        for tag in ("Loss/D", "Loss/G", "Metrics/swd", "Metrics/ms_ssim", "Metrics/best_swd"):
            assert tag in tags, tags
        assert_same_points(address, rows)
        assert_table_of_runs(address, rows[-1])
        assert {"fakes", "reals"} <= asked(address, "images/tags")["tensorboard"].keys()
        (events,) = asked(address, "text/tags")["tensorboard"]
        assert "collapse" in asked(address, f"text/text?run=tensorboard&tag={urllib.parse.quote(events)}")[0]["text"]
        document = page(f"{address}/?darkMode=false#timeseries", tmp_path / "profile", "--window-size=1400,4000")
    for tag in ("D(x)", "D(G(z))/after", "Loss", "Timing", "Metrics", "fakes", "reals"):
        assert tag in document, tag
    for tab in ("hparams", "text", "images"):
        assert f'data-plugin-id="{tab}"' in document, tab
