"""What runs and draws other benchmarks: two commits in turn, all of a GPU, the search for settings, the pictures."""

import dataclasses
import json
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import compare, data, gpu, kernel_cases, kernels, plot, scaling_model, step, train, tune
from benchmarks.gpu import Part
from benchmarks.kernel_cases import Setting
from benchmarks.tune import Settings
from pipeline.face_set import write_faces

CPU = torch.device("cpu")


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Two commits

STUB = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--results") + 1])
folder.mkdir(parents=True, exist_ok=True)
rows = [{"variant": "a", "images_per_s": SPEED}, {"variant": "b", "batch_size": 4, "images_per_s": 2 * SPEED}]
(folder / "stub.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
"""


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose only benchmark claims 10 images/s in its first commit and 25 in its working tree."""
    root = tmp_path / "clone"
    (root / "benchmarks").mkdir(parents=True)
    (root / "benchmarks" / "__init__.py").touch()
    stub = root / "benchmarks" / "stub.py"
    stub.write_text(STUB.replace("SPEED", "10"))
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(root), *words], check=True)
    stub.write_text(STUB.replace("SPEED", "25"))
    monkeypatch.setattr(compare, "ROOT", root)
    return root


def test_two_commits_take_turns_and_the_ratio_is_the_trees_over_the_bases(clone, tmp_path, capsys):
    words = ["--results", str(tmp_path), "--repeats", "2", "HEAD", "--", "python", "-m", "benchmarks.stub", "--x"]
    assert compare.main(words) == 0
    a, b = lines_of(tmp_path / "compare.jsonl")
    assert (a["variant"], b["variant"]) == ("a", "b, batch 4")
    for row, rate in ((a, 25), (b, 50)):
        assert (row["images_per_s"], row["ratio_to_base"], row["ratio_to_base_interval"]) == (rate, 2.5, [2.5, 2.5])
        assert row["base_images_per_s"] == rate / 2.5
        assert row["of"] == "stub --x"
    said = capsys.readouterr()
    order = [line.split()[2] for line in said.err.splitlines() if line.startswith("repeat")]
    assert order == ["base", "tree", "tree", "base"]
    assert "2.500 [2.500, 2.500]" in said.out
    listed = subprocess.run(["git", "-C", str(clone), "worktree", "list"], capture_output=True, text=True).stdout
    assert listed.count("\n") == 1, "the base's folder is gone"


def test_what_cannot_be_compared_is_one_line(clone, capsys):
    for words, code, said in (
        ("HEAD", 2, "after BASE there must be -- and a benchmark"),
        ("HEAD -- turbo", 2, "after -- there must be a benchmark's name, got 'turbo'"),
        ("no-such-tag -- stub", 2, "BASE must be a commit of"),
    ):
        assert compare.main(["--no-record", *words.split()]) == code
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    (clone / "benchmarks" / "stub.py").write_text("raise SystemExit('stub: error: no photographs')")
    assert compare.main(["--no-record", "HEAD", "--", "stub"]) == 1
    assert "ended with 1: stub: error: no photographs" in capsys.readouterr().err


# All of a GPU


def test_a_machine_without_cuda_is_told_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "benchmarks.gpu: error: a CUDA device must be there, torch finds none\n"


def test_the_parts_fit_into_nine_minutes_and_say_what_their_programs_know(tmp_path):
    parts = gpu.parts_of("cuda", 16)
    assert sum(part.seconds for part in parts[:-1]) <= 9 * 60 - 2 * gpu.LEAST_S
    write_faces(tmp_path / "faces", 2, workers=1)
    readers = {"kernels": kernels.read_arguments, "step": step.read_arguments, "train": train.read_arguments}
    readers["data"] = data.read_arguments
    for part in parts:
        name, *options = part.words.split()
        photographs = ["--data", str(tmp_path / "faces")] if name in gpu.TAKES_PHOTOGRAPHS else []
        readers[name]([*options, *photographs])
    assert {"train", "step", "kernels", "data"} <= {part.name for part in parts}
    assert all("128,512,2048" in part.words for part in parts if part.words.startswith(("step", "kernels")))


def test_each_part_ends_by_itself_and_the_file_holds_what_was_measured(tmp_path, capsys):
    parts = [
        Part("model", 100, "scaling --model-only --step-ms 128=2"),
        Part("wrong", 100, "scaling --turbo"),
        Part("long", 0.2, "scaling --model-only"),
    ]
    found = gpu.run_parts(parts, "", 200.0)
    found += gpu.run_parts([Part("late", 100, "scaling")], "", gpu.LEAST_S - 1)
    assert [part["state"] for part in found] == ["done", "failed", "out of time", "skipped"]
    assert [len(part["rows"]) for part in found] == [2, 0, 0, 0]
    assert found[1]["error"].endswith("--turbo is no option")
    assert found[0]["command"] == "python -m benchmarks.scaling --model-only --step-ms 128=2"
    assert "late: skipped, 14 s are left" in capsys.readouterr().err
    gpu.write(found, ["--minutes", "3"], tmp_path / "gpu.json", tmp_path / "results")
    whole = json.loads((tmp_path / "gpu.json").read_text())
    assert whole["parts"] == found
    assert whole["command"] == "python -m benchmarks.gpu --minutes 3"
    assert {"commit", "dirty", "hardware", "versions", "date"} <= whole.keys()
    assert lines_of(tmp_path / "results" / "scaling.jsonl") == found[0]["rows"]


# The search for settings


def make_search(rates: dict[Settings, float], monkeypatch: pytest.MonkeyPatch) -> tune.Search:
    class Args:
        repeats = 3

    search = tune.Search(Args(), None, None, torch.device("cuda"))  # type: ignore[arg-type]
    monkeypatch.setattr(search, "rate", lambda settings: rates.get(settings, 1.0))
    return search


def test_the_search_takes_the_best_of_one_setting_after_the_other(monkeypatch):
    start = Settings(0.65, 4, 3)
    rates = {start: 100.0, Settings(0.9, 4, 3): 120.0, Settings(0.9, 8, 3): 150.0, Settings(0.9, 8, 5): 151.0}
    rates[Settings(0.65, 8, 3)] = 1000.0  # not on the way
    search = make_search(rates, monkeypatch)
    wanted = tune.candidates(torch.device("cuda"), 8)
    assert list(wanted) == ["hw_decoder_load", "threads", "prefetch"]
    # The last step is worth less than a hundredth: it stays.
    assert search.best(start, wanted) == Settings(0.9, 8, 3)
    assert {"hw_decoder_load": 0.9, "threads": 8, "prefetch": 3, "images_per_s": 150.0} in search.trials


def test_a_cpu_has_no_hardware_decoder_to_search():
    assert tune.candidates(CPU, 2) == {"threads": [1, 2, 3], "prefetch": [1, 2, 3, 5]}
    assert Settings(0.65, 2, 3).words(CPU) == "--data.workers 2 --data.prefetch 3"


def test_the_best_settings_are_printed_and_recorded(tmp_path, monkeypatch, capsys):
    write_faces(tmp_path / "faces", 6, workers=1)
    monkeypatch.setattr(tune, "candidates", lambda device, cores: {"threads": [1], "prefetch": [2]})
    words = f"--tune --data {tmp_path / 'faces'} --device cpu --batch 4 --size 16 --seconds 0.01 --repeats 1"
    assert data.main([*words.split(), "--results", str(tmp_path)]) == 0
    (row,) = lines_of(tmp_path / "data.jsonl")
    assert row["variant"] == "tuned"
    assert row["best"]["prefetch"] in (2, 3)
    assert len(row["trials"]) >= 3
    assert row["ratio_to_defaults_interval"][0] <= row["ratio_to_defaults"]
    assert capsys.readouterr().out.startswith(f"best: --data.workers {row['best']['threads']}")


# The pictures

HARDWARE = {"cpu": "a CPU", "cores": 2, "gpus": []}
MACHINE = {"commit": "a", "dirty": False, "hardware": HARDWARE, "threads": 2, "device": "cpu"}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(MACHINE | {"command": "c"} | row) + "\n" for row in rows))


def trained(variant: str, ratio: float, **facts) -> dict:
    interval = {"ratio_interval": [0.9 * ratio, 1.1 * ratio], "image_size": 64, "batch_size": 128}
    interval |= {"precision": "bf16", "ngf": 64, "data": "photos.zip"}
    return {"variant": variant, "ratio_to_tutorial": ratio} | interval | facts


def test_pictures_are_drawn_from_the_newest_clean_rows(tmp_path, capsys):
    write_rows(tmp_path / "train.jsonl", [trained("tutorial", 1.0), trained("loader-2", 2.0), trained("trainer", 4.0)])
    write_rows(tmp_path / "data.jsonl", [{"variant": name, "images_per_cpu_s": 2000.0} for name in plot.FED])
    facts = {"operation": "bn", "batch_size": 128, "precision": "bf16", "gemm_gflops_per_s": 1e3, "copy_gb_per_s": 9.0}
    kinds = [{"pass": p, "way": w, "fraction_of_bound": 0.5} for p in ("forward", "both") for w in ("eager", "ours")]
    write_rows(
        tmp_path / "kernels.jsonl", [facts | each | {"variant": f"bn/{each['pass']}/{each['way']}"} for each in kinds]
    )
    ranks = [
        {"variant": f"{kind}-{n}", "ranks": n, "efficiency": 0.9, "efficiency_interval": [0.8, 1.0], "batch_size": 8}
        for kind, n in (("weak", 1), ("weak", 2), ("strong", 2))
    ]
    point = dataclasses.asdict(scaling_model.Point(8, 512, 0.006, 0.001, 6e5, 0.9))
    model = {"batch_size": 512, "step_ms_from": "a step", "cluster": dataclasses.asdict(scaling_model.Cluster())}
    write_rows(tmp_path / "scaling.jsonl", [*ranks, model | {"variant": "model-weak", "points": [point]}])
    assert plot.main(["--results", str(tmp_path), "--folder", str(tmp_path)]) == 0
    for name in plot.PICTURES:
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 1000, name
    assert capsys.readouterr().out.count(".png") == 3


def test_every_operation_is_in_one_of_the_gpus_parts():
    cases = [case.name for make in kernel_cases.ALL.values() for case in make(Setting(2, CPU, "fp32", 64, 2))]
    for name in cases:
        found = [any(fnmatch(name, p) for p in each.split(",")) for each in (gpu.FUSED, gpu.CONVOLUTIONS)]
        assert sum(found) == 1, name


def test_a_picture_without_rows_is_left_as_it_is(tmp_path, capsys):
    write_rows(tmp_path / "train.jsonl", [trained("tutorial", 1.0, dirty=True), trained("trainer", 4.0, dirty=True)])
    assert plot.main(["--results", str(tmp_path), "--folder", str(tmp_path)]) == 74
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("performance.png is left as it is: ")
    assert said[0].endswith("train.jsonl holds no clean run of tutorial, trainer")
    assert said[-1] == "benchmarks.plot: error: there is nothing to draw"


def test_the_newest_run_is_the_last_that_has_all(tmp_path):
    rows = [trained(v, r, command=c) for c, v, r in (("1", "tutorial", 1), ("1", "trainer", 2), ("2", "tutorial", 1))]
    rows += [trained("tutorial", 1, command="3"), trained("trainer", 3, command="3")]
    rows += [trained("trainer", 9, command="3", dirty=True), trained("trainer", 5, command="1")]
    write_rows(tmp_path / "train.jsonl", rows)
    path = tmp_path / "train.jsonl"
    found = {row["variant"]: row for row in plot.newest_run(path, ["tutorial", "trainer"])}
    assert found["trainer"]["ratio_to_tutorial"] == 5
    more = [trained(v, r, command="4") for v, r in (("tutorial", 1), ("trainer", 6), ("loader-2", 2))]
    write_rows(path, [*more, *rows])
    found = {row["variant"]: row for row in plot.newest_run(path, ["tutorial", "trainer"], fullest=True)}
    assert found["trainer"]["ratio_to_tutorial"] == 6


def test_other_sizes_stand_beside_the_newest_run_where_all_else_is_alike(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [
        trained("trainer", 3.0, command="1", batch_size=64),
        trained("trainer", 4.0, command="2", batch_size=64),
        trained("tutorial", 1.0, command="3"),
        trained("trainer", 6.0, command="3"),
        trained("trainer", 7.0, command="4", batch_size=256),
        trained("trainer", 1.3, command="5", precision="fp32"),
        trained("trainer", 9.0, command="6", batch_size=512, ngf=32),
        trained("trainer", 5.0, command="7", image_size=128),
        trained("trainer", 5.0, command="8", batch_size=32, ratio_to_tutorial=None),
    ]
    write_rows(path, rows)
    found = plot.sizes_beside(path, MACHINE | rows[3])
    sizes = [(row["image_size"], row["batch_size"], row["ratio_to_tutorial"]) for row in found]
    assert sizes == [(64, 64, 4.0), (64, 128, 6.0), (64, 256, 7.0), (128, 128, 5.0)]


def test_an_operation_measured_again_takes_its_own_line_only(tmp_path):
    facts = {"batch_size": 128, "precision": "bf16"}
    rows = [
        {"operation": name, "command": command, "variant": f"{name}/{way}", "way": way, **facts, **extra}
        for name, command, way, extra in (
            ("bn", "all", "eager", {}),
            ("gather", "all", "eager", {}),
            ("gather", "all", "old", {}),
            ("conv", "elsewhere", "eager", {"batch_size": 64}),
            ("gather", "one", "eager", {}),
            ("gather", "one", "new", {}),
        )
    ]
    write_rows(tmp_path / "kernels.jsonl", rows)
    found = [
        (row["operation"], row["command"], row["way"]) for row in plot.newest_operations(tmp_path / "kernels.jsonl")
    ]
    assert found == [("bn", "all", "eager"), ("gather", "one", "eager"), ("gather", "one", "new")]
