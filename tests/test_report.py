"""The report of a run, whole or barely begun."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.cli.report import main
from pipeline.errors import StorageError
from pipeline.pictures import grid, save_png, to_image
from pipeline.report import write_report
from pipeline.report_charts import Line, Scale, chart, envelope, evenly, short, smoothed, ticks
from pipeline.report_run import MOST_FRAMES, read_run

CONFIG = "data:\n  dataroot: photos/faces.zip\n  image_size: 8\nlog:\n  grid_size: 9\noptim:\n  lr: 2e-4\n"
VOID = {"meta", "img", "input", "path", "line"}


class Page(HTMLParser):
    """Elements that balance, what the page would fetch, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for key, value in attrs if key in ("src", "href", "data", "srcset", "poster")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def lines(count: int) -> list[dict[str, float | None]]:
    keys = ("loss_d", "loss_g", "d_real", "d_fake_before", "d_fake_after", "images_per_s", "data_wait_percent")
    return [
        {"step": i, "images_seen": 100 * (i + 1), "epoch": i / 10, "elapsed_s": 0.5 * i}
        | {key: abs(math.sin(i + k)) for k, key in enumerate(keys)}
        for i in range(count)
    ]


def noise(count: int, side: int) -> torch.Tensor:
    """Pictures that no format can compress well."""
    random = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=random)


def make_run(run: Path, *, stats: int = 0, grids: int = 0, side: int = 8, **status: object) -> Path:
    (run / "samples").mkdir(parents=True)
    (run / "status.json").write_text(json.dumps({"state": "running", **status}))
    (run / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(stats)))
    (run / "config.yaml").write_text(CONFIG)
    (run / "env.json").write_text(
        json.dumps({"command": "train.py --a <b>", "commit": "abc", "hardware": {"cpu": "Some CPU"}})
    )
    for i in range(grids):
        save_png(grid(noise(9, side)), run / "samples" / f"fakes-{1000 * i:09d}.png")
    return run


def read(run: Path) -> tuple[str, Page]:
    text = write_report(run).read_text(encoding="utf-8")
    return text, Page(text)


def test_a_finished_run_shows_all_its_parts_and_fetches_nothing(tmp_path: Path) -> None:
    figures = {"images_seen": 30_000, "total_images": 30_000, "precision": "bf16", "decoder": "dali", "cache": "host"}
    run = make_run(tmp_path / "night-1", stats=300, grids=5, state="finished", world_size=2, **figures)
    save_png(Image.new("RGB", (28, 28), "red"), run / "samples" / "reals.png")
    text, page = read(run)
    for part in ("night-1", "Finished", "30,000 of 30,000 images", "bf16", "Some CPU", "faces.zip", "8 \xd7 8 pixels"):
        assert part in page.text
    for part in ("Real beside generated", "Growth", "Losses", "Who is winning", "Speed", "2e-4", "train.py --a <b>"):
        assert part in page.text
    assert text.count('<figure class="chart"') == 4
    assert len(page.sources) == 2 + 5 + 5  # real and generated, frames, strip
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|localStorage", text)
    assert "default-src 'none'" in text
    assert [p.name for p in run.iterdir() if p.name.startswith(".")] == []


def test_the_embedded_pictures_are_the_runs_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", grids=4)
    newest = (run / "samples" / "fakes-000003000.png").read_bytes()
    found = read_run(run)
    assert found.fakes is not None
    assert base64.b64decode(found.fakes.uri.split(",")[1]) == newest
    assert [f.images_seen for f in found.growth] == [0, 1000, 2000, 3000]
    with Image.open(io.BytesIO(base64.b64decode(found.strip[-1].uri.split(",")[1]))) as image:
        assert image.size == (3 * 8 + 2 * 2, 8)


@pytest.mark.parametrize(("stats", "grids"), [(0, 0), (1, 0), (1, 1), (2, 2), (60, 3)])
def test_a_young_run_shows_what_there_is(tmp_path: Path, stats: int, grids: int) -> None:
    text, page = read(make_run(tmp_path / "young", stats=stats, grids=grids, total_images=10_000))
    assert ("Nothing measured yet." in page.text) == (stats == 0)
    assert ("still to come" in page.text) == (grids == 0)
    assert ('type="range"' in text) == (grids > 1)
    assert ("dot one" in text) == (stats == 1)  # a single value is a dot, not an invisible line


def test_a_folder_with_a_status_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("{}")
    assert "State unknown" in read(tmp_path)[1].text


def test_a_failed_run_says_why_and_hostile_text_stays_text(tmp_path: Path) -> None:
    reason = "<script>alert(1)</script> & </style>"
    run = make_run(
        tmp_path / "<b>run",
        stats=3,
        state="failed",
        reason=reason,
        exit_code=65,
        fallbacks=["<img src=x>"],
        decoder="<i>",
    )
    (run / "config.yaml").write_text(CONFIG + "run:\n  dir: '<script>'\n")
    text, page = read(run)
    assert f"{reason} (exit code 65)" in page.text
    assert "<img src=x>" in page.text
    assert "<script>alert" not in text
    assert page.sources == []


def test_numbers_that_are_missing_or_not_finite_leave_gaps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "nan")
    bad = (
        '{"images_seen": 100, "loss_d": NaN, "loss_g": 1.0}\n{"images_seen": 200, "loss_d": null, "loss_g": Infinity}\n'
    )
    (run / "stats.jsonl").write_text(bad + '{"images_seen": 300, "loss_d": 2.0}\n')
    text, page = read(run)
    assert "NaN" not in text.split("</style>")[1].split("<script>")[0]
    assert "Loss D 2.00" in page.text
    assert page.text.count("Nothing measured yet.") == 3  # D(x), images/s and data wait


def test_a_line_cut_short_is_passed_over_and_a_bad_one_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "cut", stats=3)
    whole = (run / "stats.jsonl").read_text()
    (run / "stats.jsonl").write_text(whole + '{"images_se')
    assert (len(read_run(run).stats), read_run(run).notes) == (3, [])
    (run / "stats.jsonl").write_text("garbage\n" + whole + whole)
    assert len(read_run(run).stats) == 3
    assert "4 of 7 lines" in read(run)[1].text


def test_a_broken_picture_is_told_and_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "broken", grids=2)
    (run / "samples" / "reals.png").write_bytes((run / "samples" / "fakes-000000000.png").read_bytes()[:60])
    (run / "samples" / "fakes-000009000.png").write_text("no picture")
    text, page = read(run)
    assert "reals.png could not be read" in page.text
    assert "fakes-000009000.png could not be read" in page.text
    assert "after 1,000 images" in text


def test_many_lines_and_many_large_pictures_stay_a_small_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "large", stats=5_000, grids=3, side=160)
    big = (run / "samples" / "fakes-000001000.png").read_bytes()
    for i in range(40):
        (run / "samples" / f"fakes-{50_000 + i:09d}.png").write_bytes(big)
    save_png(to_image(noise(1, 700)[0]), run / "samples" / "reals.png")
    path = write_report(run)
    assert path.stat().st_size < 8_000_000
    text = path.read_text(encoding="utf-8")
    assert text.count("data-images=") == MOST_FRAMES
    assert "After 50,039 images" in text
    assert max(d.count("L") for d in re.findall(r' d="([^"]*)"', text)) <= 1000


def test_thinning_keeps_the_ends_and_every_peak() -> None:
    assert evenly(3, 24) == [0, 1, 2]
    assert (evenly(100, 24)[0], evenly(100, 24)[-1], len(set(evenly(100, 24)))) == (0, 99, 24)
    values: list[float | None] = [0.0] * 5000
    values[1234], values[4321], values[7] = 9.0, -9.0, None
    kept = envelope(values, 1000)
    assert len(kept) <= 1000
    assert {1234, 4321} <= set(kept)


def test_smoothing_is_a_centred_mean_over_what_is_known() -> None:
    assert smoothed([1.0, 2.0, 6.0, None, None, None], 3) == [1.5, 3.0, 4.0, 6.0, None, None]


def test_axes_have_round_numbers() -> None:
    assert ticks(300_000, 6) == [0, 50_000, 100_000, 150_000, 200_000, 250_000, 300_000]
    assert ticks(0.7, 6) == pytest.approx([0, 0.2, 0.4, 0.6])
    assert ticks(1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert [short(v) for v in (0, 0.5, 250, 40_000, 1_500_000, 2e9)] == ["0", "0.5", "250", "40k", "1.5M", "2G"]


def test_a_lone_spike_does_not_press_the_curve_flat() -> None:
    values = [1.0 + 0.1 * math.sin(i) for i in range(400)]
    values[200] = 500.0
    text = chart("t", list(range(400)), [Line(name="a", style="one", values=values)], Scale())
    assert "The highest value, 500.00, lies above the frame." in text


def test_the_command_prints_the_path_or_one_line(tmp_path: Path, capfd) -> None:
    run = make_run(tmp_path / "run")
    assert main([str(run)]) == 0
    assert capfd.readouterr().out.strip() == str(run / "report.html")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "status.json").write_text("{")
    for arguments, code, says in (
        ([], 2, "the following arguments are required: RUN"),
        ([str(tmp_path / "missing")], 74, "found nothing"),
        ([str(tmp_path / "empty")], 74, "holds no run"),
        ([str(tmp_path / "torn")], 74, "status.json must be JSON"),
    ):
        assert main(arguments) == code
        err = capfd.readouterr().err
        assert err.startswith("report.py: error: ")
        assert err.count("\n") == 1
        assert says in err
    assert list((tmp_path / "empty").iterdir()) == []


def test_an_older_report_stays_when_the_disk_refuses(tmp_path: Path, monkeypatch) -> None:
    run = make_run(tmp_path / "run")
    old = write_report(run).read_bytes()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(StorageError, match="No space left on device"):
        write_report(run)
    assert (run / "report.html").read_bytes() == old
