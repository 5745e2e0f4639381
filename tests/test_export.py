"""Exports: files that draw what the run's generator draws, without this project, and a card that says what they are."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline import checkpoint as checkpoints
from pipeline import export_onnx
from pipeline.checkpoint_writer import mark_best
from pipeline.cli.export import main
from pipeline.cli.options import to_yaml
from pipeline.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig
from pipeline.export import BATCHES, Difference, check_target, compared, drawn_with, folded
from pipeline.model_card import dataset_name
from pipeline.models import Discriminator, Generator
from pipeline.players import make_players
from pipeline.sampling import recalibrated
from tests.commands import ROOT
from tests.players import MANIFEST, snapshot

NZ, WIDTH = 6, 4
FLOAT32 = 1e-5
"""Of [-1, 1]: five layers whose sums of some hundred products each round at 6e-8."""


def config(nc: int = 3, size: tuple[int, int] = (16, 16), dataroot: str = "/somewhere/private/faces.zip") -> Config:
    return Config(
        data=DataConfig(dataroot=dataroot, image_size=list(size), nc=nc, flip=True),
        model=ModelConfig(nz=NZ, ngf=WIDTH, ndf=WIDTH),
        loss=LossConfig(r1=2.5),
    )


def write_run(run: Path, cfg: Config, images_seen: int = 40, seed: int = 0) -> Path:
    """A checkpoint of networks with arbitrary weights, statistics as stale as training leaves them, and an average."""
    torch.manual_seed(seed)
    pair = Generator(NZ, WIDTH, cfg.data.nc, *cfg.data.size), Discriminator(WIDTH, cfg.data.nc, *cfg.data.size)
    for parameter in (p for network in pair for p in network.parameters()):
        nn.init.normal_(parameter, 0.1, 0.3)
    players = make_players(*pair, OptimConfig(), lr=2e-4, precision="fp32")
    for value in players.ema.values():
        value.add_(0.05 * torch.randn_like(value))
    players.generator(torch.randn(8, NZ))
    manifest = MANIFEST | {"images_seen": images_seen, "step": images_seen // 8, "identity": {"dataset": "f00d" * 16}}
    return checkpoints.write(run, snapshot(players), to_yaml(cfg), manifest)


def drawn(folder: Path, z: Tensor, weights: str = "ema") -> Tensor:
    """(N, C, H, W) float64 in [-1, 1]: the generator itself, BatchNorm and all, in double precision."""
    loaded, cfg, _ = checkpoints.open_generator(folder, weights=weights)
    with torch.no_grad():
        return recalibrated(loaded, cfg.model.nz).double()(z.double())


def opened_plainly(folder: Path) -> dict[str, object]:
    """Each file opened as its own library documents it, by file name."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return {
        "model.pt2": torch.export.load(folder / "model.pt2").module(),
        "model.onnx": lambda z: torch.from_numpy(session.run(["images"], {"latents": z.numpy()})[0]),
    }


def assert_draws_the_same(images: Tensor, wanted: Tensor) -> None:
    """
    Args:
        images: (N, C, H, W) float32, or (N, H, W, C) uint8.
        wanted: (N, C, H, W) float64.
    """
    if images.dtype == torch.float32:
        torch.testing.assert_close(images.double(), wanted, rtol=0, atol=FLOAT32)
        return
    assert images.dtype == torch.uint8
    levels = wanted.permute(0, 2, 3, 1).add(1).mul(127.5)
    # A value whose exact level is within rounding of a half may be either neighbour; every other is exact.
    undecided = ((levels - levels.floor()) - 0.5).abs() < FLOAT32 * 127.5
    off = (images.double() - levels.round()).abs()
    assert off[~undecided].max() == 0
    assert off.max() <= 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint, and the folder of its export in every format, where that goes when nobody says."""
    run = tmp_path_factory.mktemp("whole") / "run"
    checkpoint = write_run(run, config())
    assert main([str(run), "--format", "all"]) == 0
    return checkpoint, run / "exports" / "images-000000040"


@pytest.mark.parametrize(("nc", "size", "output"), [(1, (32, 16), "float"), (4, (16, 24), "uint8")])
def test_every_file_draws_what_the_generator_draws_at_any_batch(tmp_path, capsys, nc, size, output):
    checkpoint = write_run(tmp_path / "run", config(nc, size))
    out = tmp_path / "out"
    assert main([str(tmp_path / "run"), "--format", "all", "--output", output, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count("checked: read again, batches of 1, 3 and 17: ") == 3
    z = torch.randn(max(BATCHES), NZ)
    wanted = drawn(checkpoint, z)
    for name, draw in opened_plainly(out).items():
        for batch in BATCHES:
            images = draw(z[:batch])
            assert images.shape == ((batch, *size, nc) if output == "uint8" else (batch, nc, *size)), name
            assert_draws_the_same(images, wanted[:batch])
    described = json.loads((out / "config.json").read_text())
    assert_draws_the_same(drawn_with(load_file(out / "model.safetensors"), described, z), wanted)
    assert described["output"]["shape"] == ["batch", *images.shape[1:]]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["README.md", "config.json", "sample.png", "model.safetensors", "model.pt2", "model.onnx"]
    )


PROBE = """
import importlib.abc, json, re, sys

class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pipeline", "kernels", "benchmarks"):
            raise ImportError(f"{name} of this project was wanted")

sys.meta_path.insert(0, Without())
found = []
for block in re.findall(r"```python\\n(.*?)```", open("README.md").read(), re.S):
    names = {}
    exec(block, names)
    found.append([list(names["images"].shape), str(names["images"].dtype)])
    if "draw" in names:
        z = names["torch"].arange(12.0).sin().reshape(2, 6)
        found[-1].append(names["draw"](z).tolist())
print(json.dumps(found))
"""


def test_the_cards_own_lines_use_each_file_without_this_project(whole):
    checkpoint, out = whole
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    words = [sys.executable, "-P", "-c", PROBE]
    done = subprocess.run(words, cwd=out, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    by_weights, by_torch, by_onnx = json.loads(done.stdout)
    assert by_weights == [[16, 3, 16, 16], "torch.float32"]
    assert by_torch[:2] == [[16, 16, 16, 3], "torch.uint8"]
    assert by_onnx == [[16, 16, 16, 3], "uint8"]
    z = torch.arange(12.0).sin().reshape(2, NZ)
    assert_draws_the_same(torch.tensor(by_torch[2], dtype=torch.uint8), drawn(checkpoint, z))


def test_folding_changes_neither_the_pictures_nor_the_generator(tmp_path):
    checkpoint = write_run(tmp_path, config())
    loaded, _, _ = checkpoints.open_generator(checkpoint)
    generator = recalibrated(loaded, NZ)
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    layers = folded(generator)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in layers)
    assert all(torch.equal(v, before[k]) for k, v in generator.state_dict().items())
    z = torch.randn(5, NZ)
    assert_draws_the_same(layers(z[:, :, None, None]), drawn(checkpoint, z))


def test_the_best_is_taken_where_one_is_marked_and_the_weights_that_are_asked_for(tmp_path, capsys):
    run, z = tmp_path / "run", torch.randn(4, NZ)
    first, second = (write_run(run, config(), images, seed=images) for images in (40, 80))

    def exported(*options: str) -> tuple[Tensor, dict]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert main([str(run), "--format", "safetensors", "--out", str(out), *options]) == 0
        described = json.loads((out / "config.json").read_text())
        return drawn_with(load_file(out / "model.safetensors"), described, z), described

    assert_draws_the_same(exported()[0], drawn(second, z))
    mark_best(run, first)
    images, described = exported()
    assert_draws_the_same(images, drawn(first, z))
    assert described["images_seen"] == 40
    assert_draws_the_same(exported("--checkpoint", "last")[0], drawn(second, z))
    images, described = exported("--checkpoint", str(second), "--weights", "live")
    assert_draws_the_same(images, drawn(second, z, "live"))
    assert described["weights"] == "live"
    assert (drawn(second, z, "live") - drawn(second, z)).abs().max() > 0.01


def test_a_file_that_draws_other_pictures_is_not_kept(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "run", config())
    opened = export_onnx.opened
    monkeypatch.setattr(export_onnx, "opened", lambda path: lambda z: opened(path)(z + 0.1))
    assert main([str(tmp_path / "run"), "--format", "all", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"export.py: error: model.onnx does not draw the generator's pictures: .*\n", error)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("difference", "harmless"),
    [
        (Difference(1e-6, 0.9, False), True),
        (Difference(1e-2, 1e-6, False), False),
        (Difference(float("inf"), 0.1, False), False),
        (Difference(1, 1e-4, True), True),
        (Difference(1, 0.2, True), False),
        (Difference(2, 1e-6, True), False),
    ],
)
def test_what_rounding_explains_is_harmless_and_nothing_else(difference, harmless):
    assert difference.harmless is harmless


def test_a_difference_is_told_in_the_units_of_what_comes_out():
    assert str(Difference(1.23e-6, 0.9, False)) == "largest difference 1.2e-06 of [-1, 1]"
    assert str(Difference(1, 1e-5, True)) == "largest difference 1 of 255, in 0.0010% of the values"
    assert str(Difference(0, 0, True)) == "no value of 255 differs"


def test_pictures_of_nan_are_a_difference():
    expected, z = torch.zeros(max(BATCHES), 1, 2, 2), torch.zeros(max(BATCHES), NZ)
    assert not compared(lambda z: torch.full((len(z), 1, 2, 2), torch.nan), expected, z).harmless
    assert compared(lambda z: torch.zeros(len(z), 1, 2, 2), expected, z) == Difference(0.0, 0.0, False)


def test_nothing_says_where_on_this_machine_it_was_made(whole):
    checkpoint, out = whole
    private = [str(checkpoint.parent), str(ROOT), str(Path(torch.__file__).parent), "/somewhere"]
    for path in out.iterdir():
        content = path.read_bytes()
        assert not [word for word in private if word.encode() in content], path.name


def test_an_export_is_replaced_whole_and_only_when_asked_and_nothing_else_ever(tmp_path, capsys):
    run, out = str(write_run(tmp_path / "run", config()).parent.parent), tmp_path / "out"
    assert main([run, "--format", "torch", "--out", str(out)]) == 0
    assert main([run, "--format", "safetensors", "--out", str(out)]) == 2
    assert "--out must be a new or empty folder" in capsys.readouterr().err
    assert main([run, "--format", "safetensors", "--out", str(out), "--overwrite"]) == 0
    assert not (out / "model.pt2").exists()
    assert (out / "model.safetensors").exists()
    (out / "thesis.txt").write_text("years of work")
    assert main([run, "--format", "safetensors", "--out", str(out), "--overwrite"]) == 2
    assert "holds other things: thesis.txt" in capsys.readouterr().err
    assert main([run, "--format", "torch", "--out", str(out / "thesis.txt")]) == 2
    assert "--out must be a folder, got the file" in capsys.readouterr().err
    assert (out / "thesis.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_a_disk_that_refuses_leaves_nothing_and_keeps_the_former_export(tmp_path, capsys, monkeypatch):
    run, out = str(write_run(tmp_path / "run", config()).parent.parent), tmp_path / "out"
    assert main([run, "--format", "safetensors", "--out", str(out)]) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    capsys.readouterr()

    def refuse(self, data):
        self.open("wb").close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert main([run, "--format", "torch", "--out", str(out), "--overwrite"]) == 74
    assert capsys.readouterr().err == f"export.py: error: cannot write {out}: No space left on device\n"
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["{none}", "--format", "torch"], 74, "no such run or checkpoint folder"),
        (["{empty}", "--format", "torch"], 74, "holds no checkpoint that can be read"),
        (["{run}", "--format", "torch", "--checkpoint", "best"], 74, "has marked no checkpoint as its best"),
        (["{run}", "--format", "torch", "--checkpoint", "{none}"], 74, "no such run or checkpoint folder"),
        (["{run}", "--format", "onxx"], 2, "must be safetensors, torch, onnx or all, got 'onxx'; did you mean onnx?"),
        (["{run}"], 2, "the following arguments are required: --format (safetensors, "),
        (["{run}", "--format", "torch", "--output", "int8"], 2, "invalid choice: 'int8'"),
        (["{nan}", "--format", "torch"], 76, "the generator's weights are not finite"),
    ],
)
def test_bad_input_is_one_line_with_the_code_of_its_reason(tmp_path, capsys, options, code, message):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run", config())
    if options[0] == "{nan}":
        folder = write_run(tmp_path / "nan", config())
        state = checkpoints.load(checkpoints.verify(folder))
        state["ema"]["layers.0.weight"][0] = torch.nan
        checkpoints.write(tmp_path / "nan", state, to_yaml(config()), MANIFEST | {"images_seen": 80})
    words = [word.format(**{name: tmp_path / name for name in ("none", "empty", "run", "nan")}) for word in options]
    assert main([*words, "--out", str(tmp_path / "out")]) == code
    error = capsys.readouterr().err
    assert error.startswith("export.py: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "package"), [("onnx", "onnxscript"), ("safetensors", "safetensors")])
def test_a_missing_extra_is_named_with_what_installs_it(tmp_path, capsys, monkeypatch, kind, package):
    write_run(tmp_path / "run", config())
    monkeypatch.setitem(sys.modules, package, None)
    assert main([str(tmp_path / "run"), "--format", kind, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"export.py: error: --format {kind} needs the package {package}, which is missing: pip install -e '.[export]'\n"
    )
    assert main([str(tmp_path / "run"), "--format", "torch", "--out", str(tmp_path / "out")]) == 0


def card_of(run: Path, out: Path, *options: str) -> tuple[dict, str]:
    """A card's front matter and what follows it."""
    assert main([str(run), "--format", "safetensors", "--out", str(out), *options]) == 0
    _, front, body = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_says_what_was_learnt_from_what_and_how_good_these_weights_are(tmp_path):
    run = write_run(tmp_path / "run", config(), 40).parent.parent
    write_run(run, config(), 80)
    (run / "stats.jsonl").write_text(json.dumps({"images_seen": 48, "epoch": 48 / 37}) + '\n{"images_se')
    metrics = [{"images_seen": n, "num_images": 500, "swd": n / 10, "ms_ssim": 0.25} for n in (40, 80)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    evaluated = {"checkpoint": "images-000000080", "num_images": 5000, "crop": "centre 16 x 16", "resize": "linear"}
    rows = [
        evaluated | {"weights": "ema", "fid": 31.4159, "swd": 7.5, "extractor": "inception", "real": "of f00df00df00d"},
        evaluated | {"weights": "live", "fid": 99.9, "extractor": "inception"},
        evaluated | {"weights": "ema", "fid": 77.7, "extractor": "inception", "real": "of other photographs"},
    ]
    (run / "evaluations.jsonl").write_text("\n".join(map(json.dumps, rows)))

    front, body = card_of(run, tmp_path / "out")
    assert front["pipeline_tag"] == "unconditional-image-generation"
    assert front["license"] == "other"
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"]["name"] == "faces.zip"
    assert {m["type"]: m["value"] for m in result["metrics"]} == {"swd": 7.5, "ms_ssim": 0.25, "fid": 31.4159}
    for line in (
        "| name | faces.zip |",
        "| photographs | 37 |",
        f"| fingerprint | `{'f00d' * 16}` |",
        "| images seen | 80 |",
        "| steps | 10 |",
        "| epochs | 2.2 |",
        "| `data.flip` | `True` |",
        "| `loss.r1` | `2.5` |",
        "| `optim.lr` | `0.0002` |",
        "| swd | 7.5 | lower | 5,000 | centre 16 x 16 | linear | inception |",
        "| ms_ssim | 0.25 | lower | 500 | the training crop | as in training | - |",
        "| fid | 31.42 | lower | 5,000 | centre 16 x 16 | linear | inception |",
    ):
        assert line in body, line
    assert "`loss.kind`" in body
    assert "`loss.d_steps`" not in body  # as it always is

    _, body = card_of(run, tmp_path / "first", "--checkpoint", str(checkpoints.folder_of(run, 40)))
    assert "| swd | 4 | lower | 500 |" in body
    assert "fid" not in body
    _, body = card_of(run, tmp_path / "live", "--weights", "live")
    assert "| fid | 99.9 |" in body
    assert "| swd |" not in body  # while training, the average is measured


def test_a_card_of_weights_that_nobody_measured_says_so(tmp_path):
    moved = tmp_path / "elsewhere"
    write_run(tmp_path / "run", config()).rename(moved)
    front, body = card_of(moved, tmp_path / "out")
    assert "model-index" not in front
    assert "Not measured" in body
    assert "| photographs | not recorded with this checkpoint |" in body


def test_a_run_without_an_average_exports_its_live_weights_and_says_so(tmp_path):
    cfg = dataclasses.replace(config(), optim=OptimConfig(ema_half_life_images=0))
    run = write_run(tmp_path / "run", cfg, 40).parent.parent
    (run / "metrics.jsonl").write_text(json.dumps({"images_seen": 40, "num_images": 500, "swd": 3.5}))
    _, body = card_of(run, tmp_path / "out")
    assert "as training left them" in body
    assert "| swd | 3.5 |" in body
    assert json.loads((tmp_path / "out/config.json").read_text())["weights"] == "live"


def test_a_name_with_markup_in_it_stays_a_name(tmp_path):
    write_run(tmp_path / "run", config(dataroot="/x/a|b\n# <i>.zip"))
    _, body = card_of(tmp_path / "run", tmp_path / "out")
    assert r"| name | a\|b\\n\# \<i\>.zip |" in body


@pytest.mark.parametrize(
    ("dataroot", "name"),
    [
        ("/data/celeba.zip", "celeba.zip"),
        ("data/faces/", "faces"),
        ("/a/b/shards/*.tar", "shards/*.tar"),
        ("", "unnamed"),
    ],
)
def test_a_dataset_is_called_by_its_name_and_not_by_its_place(dataroot, name):
    cfg = dataclasses.replace(config(), data=DataConfig(dataroot=dataroot))
    assert dataset_name(cfg) == name


def test_a_new_folder_needs_no_leave(tmp_path):
    check_target(tmp_path / "new", overwrite=False)
    check_target(tmp_path, overwrite=False)
