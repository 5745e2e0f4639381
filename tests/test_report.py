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
EVALUATIONS = [
    {"images_seen": 1000 * (i + 1), "num_images": 500, "seconds": 2.5, "swd": swd, "swd_16": swd + 1, "swd_8": swd - 1}
    | {"ms_ssim": 0.4, "ms_ssim_real": 0.3, "fid": 10 * swd, "precision": 0.5, "recall": 0.25, "best": i in (0, 1)}
    for i, swd in enumerate((30.0, 20.0, 25.0))
]
"""As metrics.jsonl has them; the second is the best."""


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


def add_metrics(run: Path, rows: list[dict]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


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
    assert path.stat().st_size < 3_000_000
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
    text = chart("t", [Line(name="a", style="one", xs=list(range(400)), values=values)], Scale())
    assert "The highest value, 500.00, lies above the frame." in text


def test_the_command_prints_the_path_or_one_line(tmp_path: Path, capfd) -> None:
    run = make_run(tmp_path / "run")
    assert main([str(run)]) == 0
    assert capfd.readouterr().out.strip() == str(run / "report.html")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "status.json").write_text("{")
    for arguments, code, says in (
        ([], 2, "the following arguments are required: RUN (folder of a run, "),
        ([str(run), "--out", "page.html"], 2, "--out goes with several runs"),
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


def charts(text: str) -> dict[str, dict]:
    """What each chart tells the script, by the chart's name."""
    found = re.findall(r'aria-label="([^"]*)">.*?<script type="application/json">(.*?)</script>', text, re.DOTALL)
    return {name: json.loads(values) for name, values in found}


def test_evaluations_become_curves_with_the_best_marked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "measured", stats=3)
    add_metrics(run, EVALUATIONS)
    text, page = read(run)
    drawn = charts(text)
    swd = drawn["Sliced Wasserstein distance, and its levels"]
    assert [line["y"] for line in swd["lines"]] == [[30, 20, 25], [31, 21, 26], [29, 19, 24]]
    assert swd["lines"][0]["x"] == [1000, 2000, 3000]
    assert drawn["FID"]["lines"][0]["y"] == [300, 200, 250]
    assert len(drawn["Precision and Recall"]["lines"]) == 2
    assert [line["y"][0] for line in drawn["MS-SSIM of pairs"]["lines"]] == [0.4, 0.3]
    rings = re.findall(r'<path class="ring one" d="M([\d.]+) ([\d.]+)h0"/>', text)
    assert rings[0] == ("666.7", "500.0")  # 2,000 of 3,000 images; 20 on an axis that ends at 40
    assert len(rings) == 4, "SWD, FID, precision, MS-SSIM"
    assert "kept as the best: SWD 20.00 after 2,000 images; the newest has 25.00 after 3,000 images" in page.text
    assert "Of 500 pictures each time" in page.text
    assert "MS-SSIM 0.400, pairs of photographs 0.300: the generator draws pictures that are more alike" in page.text


def test_a_run_that_measures_nothing_says_how_to(tmp_path: Path) -> None:
    _, page = read(make_run(tmp_path / "plain", stats=3))
    assert "Not measured: --eval.every_images N measures while it trains" in page.text
    assert page.text.count("Not made: the run has no checkpoint yet.") == 3  # samples, ways, neighbours


def test_bad_lines_of_evaluations_are_told_and_missing_numbers_leave_gaps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "odd", stats=3)
    odd = [{**EVALUATIONS[0], "swd": None}, EVALUATIONS[1], {"images_seen": 2500}, {"images_seen": 3000, "swd": "12"}]
    add_metrics(run, [*odd, *EVALUATIONS[:2]])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('[]\n{"images_seen": NaN}\n{"images_se')
    (run / "evaluations.jsonl").write_text('{"swd": 9.5, "num_images": 50000}\nrubbish\n{"sw')
    text, page = read(run)
    swd = charts(text)["Sliced Wasserstein distance, and its levels"]
    assert swd["lines"][0]["y"] == [None, 20, None, None]
    assert "metrics.jsonl: 4 of 9 lines" in page.text
    assert "evaluations.jsonl: line 2 of 3 is unreadable" in page.text
    assert "SWD \u2193 9.50" in page.text
    assert "num images 50000" in page.text


@pytest.mark.parametrize("nested", [False, True])
def test_the_last_evaluation_is_a_table_with_what_makes_it_comparable(tmp_path: Path, nested: bool) -> None:
    run = make_run(tmp_path / "evaluated", stats=3)
    figures = {"fid": 21.4, "kid": 0.0123456, "recall": 0.25, "ms_ssim_real": 0.29}
    facts = {
        "images_seen": 4000,
        "ranks": 2,
        "device": "",
        "num_images": 50_000,
        "crop": "64 x 64 <centre>",
        "extractor": {"name": "inception"},
    }
    lines = [{"fid": 99.0}, facts | ({"metrics": figures} if nested else figures)]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = read(run)[1]
    for words in ("FID \u2193 21.40", "KID \u2193 0.01235", "Recall \u2191 0.250", "crop 64 x 64 <centre>"):
        assert words in page.text
    for words in ("num images 50000", "images seen 4000", "extractor name inception"):
        assert words in page.text
    assert "MS-SSIM of photographs 0.2900" in page.text
    assert page.text.count("21.4") == 1
    assert "device" not in page.text, "nothing is said where there is nothing"
    assert "99.0" not in page.text


def test_an_early_end_is_told_and_the_usual_one_is_not(tmp_path: Path) -> None:
    reason = "no better swd in 3 evaluation(s); best 11.9 after 20,000 images"
    early = make_run(tmp_path / "early", state="finished", reason=reason, exit_code=0)
    assert reason in read(early)[1].text
    usual = make_run(tmp_path / "usual", state="finished", reason="all images seen", exit_code=0)
    assert "all images seen" not in read(usual)[1].text


def test_negative_losses_have_an_axis_of_their_own(tmp_path: Path) -> None:
    xs = [100.0 * (i + 1) for i in range(20)]
    line = Line(name="a", style="one", xs=xs, values=[float(3 - i) for i in range(20)])
    text = chart("t", [line], Scale())
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", text.split('class="plot"')[1])]
    assert heights == sorted(heights)
    assert (heights[0], heights[-1]) == (pytest.approx(1000 * 2 / 25), pytest.approx(1000 * 21 / 25))  # 5 to -20
    shown = re.findall(r'<span style="bottom:([\d.]+)%">(-?\d+)</span>', text)
    assert shown == [
        ("0.00", "-20"),
        ("20.00", "-15"),
        ("40.00", "-10"),
        ("60.00", "-5"),
        ("80.00", "0"),
        ("100.00", "5"),
    ]


@pytest.mark.parametrize(("most", "drawn"), [(8.0, 0), (120.0, 1)])
def test_a_guide_is_drawn_only_where_the_axis_reaches_it(most: float, drawn: int) -> None:
    line = Line(name="a", style="one", xs=[0, 100], values=[1.0, most])
    assert chart("t", [line], Scale(guide=100)).count('class="guide"') == drawn


def test_curves_of_other_lengths_share_the_axis() -> None:
    long = Line(name="long", style="one", xs=[0, 100, 200], values=[1.0, 2.0, 3.0])
    short_one = Line(name="short", style="two", xs=[50], values=[3.0], best=0)
    text = chart("t", [long, short_one], Scale())
    assert 'class="one" d="M0.0 666.7L500.0 333.3L1000.0 0.0"' in text
    assert 'class="dot two" d="M250.0 0.0h0"' in text
    assert 'class="ring two" d="M250.0 0.0h0"' in text
    assert charts(text)["t"]["lines"] == [{"x": [0, 100, 200], "y": [1, 2, 3]}, {"x": [50], "y": [3]}]


def test_an_older_report_stays_when_the_disk_refuses(tmp_path: Path, monkeypatch) -> None:
    run = make_run(tmp_path / "run")
    old = write_report(run).read_bytes()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(StorageError, match="No space left on device"):
        write_report(run)
    assert (run / "report.html").read_bytes() == old
