"""Several runs on one page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.cli.report import main
from pipeline.report_charts import NONE
from pipeline.report_compare import STYLES, comparison, unique_names, write_comparison
from pipeline.report_run import read_run
from tests.test_report import CONFIG, EVALUATIONS, Page, add_metrics, charts, make_run


def read(folders: list[Path], out: Path) -> tuple[str, Page]:
    text = write_comparison(folders, out).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A finished run with evaluations, a running one with others, one that has only begun."""
    long = make_run(tmp_path / "long", stats=60, grids=7, state="finished", images_seen=6000, precision="bf16")
    short = make_run(tmp_path / "short", stats=30, grids=4, images_seen=3000, precision="fp32")
    begun = make_run(tmp_path / "begun")
    add_metrics(long, EVALUATIONS)
    add_metrics(short, [{**EVALUATIONS[0], "swd": 19.0, "fid": None}])
    (short / "config.yaml").write_text(CONFIG.replace("2e-4", "1e-3") + "loss:\n  kind: hinge\nrun:\n  dir: a\n")
    (begun / "config.yaml").write_text(CONFIG + "run:\n  dir: b\n")
    return [long, short, begun]


def row_of(text: str, name: str) -> list[str]:
    """The cells of a row of the page's tables."""
    row = next(part for part in text.split("<tr>") if part.startswith(f"<th>{name}</th>"))
    return [cell.split("</td>")[0].split(">", 1)[1] for cell in row.split("<td")[1:]]


def test_runs_of_other_lengths_share_a_page(runs: list[Path], tmp_path: Path) -> None:
    text, page = read(runs, tmp_path / "compare.html")
    assert "3 runs compared" in page.text
    assert row_of(text, "State") == ["Finished", "Running", "Running"]
    assert row_of(text, "Images seen") == ["6,000", "3,000", NONE]
    assert row_of(text, "Precision") == ["bf16", "fp32", NONE]
    assert row_of(text, "SWD ↓, newest") == ["25.00", "19.00", NONE]
    assert row_of(text, "SWD ↓, best checkpoint") == ["20.00", "19.00", NONE]
    assert "<td class=best>19.00</td>" in text
    assert row_of(text, "FID ↓, newest") == ["250.00", NONE, NONE]
    assert "<td class=best>250.00</td>" not in text, "one alone is not the better"
    assert "default-src 'none'" in text
    assert all(source.startswith("data:image/") for source in page.sources)


def test_only_settings_that_differ_are_listed(runs: list[Path], tmp_path: Path) -> None:
    text, _ = read(runs, tmp_path / "compare.html")
    assert row_of(text, "optim.lr") == ["2e-4", "1e-3", "2e-4"]
    assert row_of(text, "loss.kind") == [NONE, "hinge", NONE]
    for same in ("data.image_size", "log.grid_size", "run.dir"):
        assert f"<th>{same}</th>" not in text
    assert "The settings are the same." in read([runs[0], runs[2]], tmp_path / "same.html")[1].text


def test_curves_share_axes_and_keep_each_runs_own_positions(runs: list[Path], tmp_path: Path) -> None:
    drawn = charts(read(runs, tmp_path / "compare.html")[0])
    assert [line["x"][-1] for line in drawn["Loss D"]["lines"]] == [6000, 3000]
    assert drawn["Loss D"]["right"] == 6000
    assert [line["x"] for line in drawn["SWD"]["lines"]] == [[1000, 2000, 3000], [1000]]
    assert [line["y"] for line in drawn["SWD"]["lines"]] == [[30, 20, 25], [19]]
    assert len(drawn["FID"]["lines"]) == 1


def test_grids_stand_side_by_side_also_at_the_shortest_runs_length(runs: list[Path], tmp_path: Path) -> None:
    text, page = read(runs, tmp_path / "compare.html")
    assert len(page.sources) == 4
    assert page.text.count("No pictures yet.") == 2
    grids = text.split('<div class="grids">')[1:]
    assert [part.count("after 6,000 images") for part in grids] == [1, 0]
    assert [part.count("after 3,000 images") for part in grids] == [1, 2]
    assert read([runs[0]] * 1 + [runs[2]], tmp_path / "one.html")[0].count('<div class="grids">') == 1


def test_runs_without_anything_measured_have_a_page_too(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text("{}")
    _, page = read([tmp_path / "a", tmp_path / "b"], tmp_path / "c.html")
    assert "Not measured while they trained" in page.text
    assert page.text.count("Nothing measured yet.") == 6


def test_names_are_unique_and_hostile_ones_stay_text(tmp_path: Path) -> None:
    paths = [Path("/a/x/run"), Path("/b/x/run"), Path("/b/other")]
    assert unique_names(paths) == ["a/x/run", "b/x/run", "other"]
    folders = [make_run(tmp_path / f"{i}" / "<b>run", stats=3, reason="<script>") for i in (1, 2)]
    text, page = read(folders, tmp_path / "c.html")
    assert "1/<b>run" in page.text
    assert "2/<b>run" in page.text
    assert "<b>run" not in text


def test_unreadable_lines_are_told_with_their_run(runs: list[Path], tmp_path: Path) -> None:
    (runs[1] / "metrics.jsonl").write_text("garbage\n" + json.dumps(EVALUATIONS[0]) + "\n")
    assert "short: metrics.jsonl: 1 of 2 lines" in read(runs, tmp_path / "c.html")[1].text


def test_the_page_of_many_long_runs_stays_small(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"run-{i}", stats=3000, grids=2) for i in range(len(STYLES))]
    text = comparison([read_run(folder) for folder in folders])
    assert len(text) < 3_000_000


def test_the_command_compares_or_says_in_one_line_why_not(runs: list[Path], tmp_path: Path, capfd, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(run) for run in runs]) == 0
    assert capfd.readouterr().out.strip() == "compare.html"
    assert "3 runs compared" in (tmp_path / "compare.html").read_text()
    assert main([*map(str, runs[:2]), "--out", "pages/two.html"]) == 0
    assert (tmp_path / "pages" / "two.html").exists()
    capfd.readouterr()
    one, other = str(runs[0]), str(runs[1])
    (tmp_path / "link").symlink_to(runs[0])
    for arguments, code, says in (
        ([one, one], 2, f"each run must be given once, got {one} twice"),
        ([one, other, "link"], 2, "got link twice"),
        ([one, "nowhere"], 74, "nowhere must be the folder of a run, found nothing"),
        ([one, str(tmp_path / "pages")], 74, "holds no run"),
        ([one] * 9, 2, "at most 8 runs can be compared, got 9"),
        ([one, other, "--out", "two.txt"], 2, "--out must be a file that ends in .html, got two.txt"),
        ([one, other, "--data", "x"], 2, "--data goes with one run"),
        ([one, other, "--quick"], 2, "--quick goes with one run"),
        ([one, other, "--out", f"{one}/status.json/x.html"], 74, "cannot write"),
    ):
        assert main(arguments) == code, arguments
        err = capfd.readouterr().err
        assert err.startswith("report.py: error: ")
        assert err.count("\n") == 1
        assert says in err
