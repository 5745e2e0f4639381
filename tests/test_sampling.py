"""Samples that depend on nothing but seed and weights, and the command that draws them."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from pipeline import checkpoint, philox
from pipeline.checkpoint_writer import mark_best
from pipeline.cli.sample import main
from pipeline.config import Config, DataConfig, ModelConfig
from pipeline.models import Generator
from pipeline.philox import Stream
from pipeline.pictures import grid, to_image
from pipeline.sampling import generate, latents, recalibrated, slerp

NZ = 12
CONFIG = Config(data=DataConfig(image_size=16), model=ModelConfig(nz=NZ, ngf=8))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small only wait for each other on several threads, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained() -> Generator:
    """A small generator whose running statistics are as stale as training leaves them."""
    torch.manual_seed(3)
    generator = Generator(NZ, 8, 3, 16, 16)
    for parameter in generator.parameters():
        nn.init.normal_(parameter, 0.1, 0.3)
    generator.train()
    for _ in range(3):
        generator(torch.randn(8, NZ))
    return generator


def test_latents_are_the_numbers_of_their_stream_wherever_one_begins() -> None:
    whole = latents(7, Stream.SAMPLE_LATENT, 0, 10, NZ)
    assert torch.equal(latents(7, Stream.SAMPLE_LATENT, 4, 3, NZ), whole[4:7])
    assert torch.equal(whole, philox.normal(7, Stream.SAMPLE_LATENT, torch.arange(10), NZ))
    assert not torch.equal(whole, latents(8, Stream.SAMPLE_LATENT, 0, 10, NZ))


def test_slerp_keeps_ends_lengths_and_equal_angles() -> None:
    a, b = torch.randn(2, 5, NZ, dtype=torch.float64)
    a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    way = torch.stack([slerp(a, b, i / 8) for i in range(9)])
    torch.testing.assert_close(way[0], a)
    torch.testing.assert_close(way[-1], b)
    torch.testing.assert_close(way.norm(dim=-1), torch.ones(9, 5, dtype=torch.float64))
    cosines = (way[1:] * way[:-1]).sum(-1)
    torch.testing.assert_close(cosines, cosines[:1].expand_as(cosines))


def test_slerp_of_quarter_turn_is_known() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(slerp(a, b, torch.tensor([[1 / 3]])), torch.tensor([[3**0.5 / 2, 0.5]]))


@pytest.mark.parametrize("factor", [1.0, 2.0, 1.0 + 1e-7, -1.0, 0.0])
def test_slerp_of_parallel_vectors_is_the_straight_line(factor: float) -> None:
    a = torch.randn(4, NZ)
    torch.testing.assert_close(slerp(a, factor * a, 0.25), a + 0.25 * (factor * a - a))


def test_recalibrating_leaves_the_original_and_the_random_state_alone() -> None:
    generator = trained()
    before, random_state = copy.deepcopy(generator.state_dict()), torch.get_rng_state()
    twin = recalibrated(generator, NZ, images=64, batch=16)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[key]) for key, value in generator.state_dict().items())
    assert all(m.training for m in generator.modules())
    assert not any(m.training for m in twin.modules())
    assert [m.momentum for m in twin.modules() if isinstance(m, nn.BatchNorm2d)] == [0.1, 0.1]


def test_recalibrated_statistics_are_the_means_over_fixed_latents() -> None:
    generator = trained()
    twin = recalibrated(generator, NZ, images=64, batch=16)
    first = next(m for m in twin.modules() if isinstance(m, nn.BatchNorm2d))
    z = latents(0, Stream.RECALIBRATE_LATENT, 0, 64, NZ)
    with torch.no_grad():
        activations = generator.layers[0](z[:, :, None, None]).double()
    batches = activations.split(16)
    mean = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    variance = torch.stack([b.transpose(0, 1).flatten(1).var(1) for b in batches]).mean(0)
    torch.testing.assert_close(first.running_mean, mean.float())
    torch.testing.assert_close(first.running_var, variance.float())


def test_stale_statistics_do_not_change_a_sample_but_weights_do() -> None:
    generator, z = trained(), latents(0, Stream.SAMPLE_LATENT, 0, 4, NZ)
    sample = generate(recalibrated(generator, NZ, images=64), z)
    for module in generator.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    assert torch.equal(generate(recalibrated(generator, NZ, images=64), z), sample)
    with torch.no_grad():
        generator.layers[0].weight.mul_(torch.linspace(0.2, 2, NZ).view(-1, 1, 1, 1))
    assert not torch.equal(generate(recalibrated(generator, NZ, images=64), z), sample)


def test_other_kinds_of_batch_norm_and_none_at_all_are_recalibrated_too() -> None:
    class Shaped(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(NZ, 12), norm)

        def forward(self, z: Tensor) -> Tensor:
            return self.layers(z)

    flat = recalibrated(Shaped(nn.BatchNorm1d(12)), NZ, images=32)
    assert flat.layers[1].num_batches_tracked == 1
    synced = recalibrated(nn.SyncBatchNorm.convert_sync_batchnorm(trained()), NZ, images=32)
    plain = recalibrated(trained(), NZ, images=32)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in synced.modules())
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in synced.state_dict().items())
    assert not recalibrated(Shaped(nn.Identity()), NZ).training


def test_a_sample_depends_on_its_latent_only() -> None:
    generator = recalibrated(trained(), NZ, images=64)
    z = latents(1, Stream.SAMPLE_LATENT, 0, 10, NZ)
    together = generate(generator, z)
    assert together.shape == (10, 16, 16, 3)
    assert together.dtype == torch.uint8
    assert together.float().std() > 5  # pictures, not one gray
    alone = generate(generator, z, batch=1)
    assert (together.int() - alone.int()).abs().max() <= 1
    assert torch.equal(generate(generator, z), together)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    generator = trained()
    state = {"generator": generator.state_dict(), "ema": {"layers.0.weight": generator.layers[0].weight.detach() * -1}}
    checkpoint.write(folder, state, yaml.safe_dump(dataclasses.asdict(CONFIG)), {"images_seen": 640})
    return folder


def expected(run: Path, seed: int, count: int) -> Tensor:
    generator, _, _ = checkpoint.open_generator(run)
    return generate(recalibrated(generator, NZ), latents(seed, Stream.SAMPLE_LATENT, 0, count, NZ))


def test_the_command_draws_the_same_grid_for_the_same_seed(run: Path, tmp_path: Path, capfd) -> None:
    out = tmp_path / "grid.png"
    assert main([str(run), "--num", "5", "--seed", "4", "--out", str(out)]) == 0
    assert f"{out}  (ema weights after 640 images)" in capfd.readouterr().out
    with Image.open(out) as image:
        assert image.tobytes() == grid(expected(run, 4, 5)).tobytes()
    first = out.read_bytes()
    folder = run / "checkpoints" / "images-000000640"
    assert main(["--checkpoint", str(folder), "--num", "5", "--seed", "4", "--out", str(out)]) == 0
    assert out.read_bytes() == first
    assert main([str(run), "--num", "5", "--seed", "4", "--weights", "live", "--out", str(out)]) == 0
    assert out.read_bytes() != first


def test_single_files_are_the_grids_pictures(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "faces"
    assert main([str(run), "--num", "3", "--single", "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["000000.png", "000001.png", "000002.png"]
    assert [p.name for p in out.parent.iterdir()] == ["faces"]
    for i, pixels in enumerate(expected(run, 0, 3)):
        with Image.open(out / f"{i:06d}.png") as image:
            assert image.tobytes() == to_image(pixels).tobytes()


def test_the_best_the_last_and_a_path_name_the_checkpoint(run: Path, tmp_path: Path) -> None:
    source = tmp_path / "run"
    shutil.copytree(run, source)
    other = {"generator": Generator(NZ, 8, 3, 16, 16).state_dict(), "ema": {}}
    newest = checkpoint.write(source, other, yaml.safe_dump(dataclasses.asdict(CONFIG)), {"images_seen": 1280})
    mark_best(source, source / "checkpoints" / "images-000000640")
    pictures = {}
    for which in ("best", "last", str(newest), None):
        options = ["--checkpoint", which] if which else []
        out = tmp_path / "grid.png"
        assert main([str(source), *options, "--num", "2", "--out", str(out)]) == 0
        pictures[which] = out.read_bytes()
    assert pictures["last"] == pictures[str(newest)] == pictures[None] != pictures["best"]


def test_truncation_moves_every_picture_and_a_far_limit_none(run: Path, tmp_path: Path) -> None:
    pictures = []
    for options in ([], ["--truncation", "1e9"], ["--truncation", "0.5"]):
        out = tmp_path / "grid.png"
        assert main([str(run), "--num", "4", "--out", str(out), *options]) == 0
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_photographs_stand_beside_what_comes_nearest_and_the_latents_are_kept(run: Path, tmp_path: Path, capfd) -> None:
    photographs = [tmp_path / f"{name}.png" for name in "abc"]
    for i, path in enumerate(photographs):
        to_image(expected(run, 5, 3)[i]).save(path)
    out = tmp_path / "found.png"
    assert main([str(run), "--project", *map(str, photographs), "--steps", "20", "--out", str(out)]) == 0
    said = capfd.readouterr().out
    with np.load(tmp_path / "found.npz") as kept:
        assert kept["photographs"].tolist() == [str(p) for p in photographs]
        generator, _, _ = checkpoint.open_generator(run)
        pictures = generate(recalibrated(generator, NZ), torch.from_numpy(kept["latents"]))
        errors = (pictures.double() - expected(run, 5, 3).double()).abs().mean((1, 2, 3))
        np.testing.assert_allclose(kept["errors"], errors, atol=0.1)
        for path, error in zip(photographs, kept["errors"], strict=True):
            assert f"{path}: off by {error:.1f} of 255" in said
    pairs = torch.stack([expected(run, 5, 3), pictures], 1).flatten(0, 1)
    with Image.open(out) as image:
        shown = np.asarray(image).astype(int)
    assert np.abs(shown - np.asarray(grid(pairs, columns=2))).max() <= 1
    first = out.read_bytes()
    assert main([str(run), "--project", *map(str, photographs), "--steps", "20", "--out", str(out)]) == 0
    assert out.read_bytes() == first


def test_arithmetic_shows_operands_means_and_the_sum(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "sum.png"
    assert main([str(run), "--arithmetic", "0,2 - 1 + 3,3", "--seed", "4", "--out", str(out)]) == 0
    generator, _, _ = checkpoint.open_generator(run)
    z = latents(4, Stream.SAMPLE_LATENT, 0, 4, NZ)
    by_hand = torch.stack([(z[0] + z[2]) / 2, z[3], (z[0] + z[2]) / 2 - z[1] + z[3]])
    wanted = [*expected(run, 4, 3)[[0, 2, 1]], *generate(recalibrated(generator, NZ), by_hand)]
    with Image.open(out) as image:
        pixels = torch.from_numpy(np.asarray(image).astype(np.uint8))
    for picture in wanted:
        corners = pixels.unfold(0, 16, 1).unfold(1, 16, 1)  # (y, x, C, 16, 16)
        distances = (corners.int() - picture.permute(2, 0, 1).int()).abs().amax((2, 3, 4))
        assert distances.min() <= 1  # another batch may round otherwise


def test_walks_go_there_and_back(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "walk.gif"
    assert main([str(run), "--interpolate", "3", "--frames", "8", "--ms", "100", "--out", str(out)]) == 0
    with Image.open(out) as image:
        assert (image.n_frames, image.info["duration"], image.size) == (8, 100, (34, 34))
        frames = []
        for i in range(8):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")).astype(int))
    assert np.abs(frames[1] - frames[7]).max() == 0
    assert np.abs(frames[0] - frames[4]).max() > 20


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "give RUN, or --checkpoint with"),
        (["--checkpoint", "last"], 2, "give RUN, or --checkpoint with"),
        (["RUN", "--checkpoint", "x"], 74, "x: no such run or checkpoint"),
        (["RUN", "--checkpoint", "best"], 74, "has marked no checkpoint as its best"),
        (["missing"], 74, "missing: no such run or checkpoint folder in /"),
        (["ful"], 74, "ful: no such run or checkpoint folder; did you mean full?"),
        (["full"], 74, "full holds no checkpoint that can be read: it is no run's folder, or"),
        (["RUN", "--num", "0"], 2, "--num: must be an integer of at least 1, got '0'"),
        (["RUN", "--num", "many"], 2, "got 'many'"),
        (["RUN", "--seed", "-1"], 2, "--seed: must be an integer of at least 0"),
        (["RUN", "--num", "5000"], 2, "at most 4096 pictures, got 5000"),
        (["RUN", "--see", "1"], 2, "unrecognized arguments: --see 1; did you mean --seed?"),
        (["RUN", "--out", "grid.jpg"], 2, "--out must end in .png"),
        (["RUN", "--out", "folder.png"], 2, "is a folder"),
        (["RUN", "--single", "--out", "full"], 2, "new or empty folder"),
        (["RUN", "--interpolate", "2", "--single"], 2, "--single does not go with --interpolate"),
        (["RUN", "--ms", "50"], 2, "--ms goes with --interpolate only"),
        (["RUN", "--weights", "best"], 2, "invalid choice: 'best'"),
        (["RUN", "--truncation", "0"], 2, "--truncation: must be a number above 0, got '0'"),
        (["RUN", "--truncation", "nan"], 2, "got 'nan'"),
        (["RUN", "--project", "face.jpg", "--truncation", "1"], 2, "--truncation does not go with --project"),
        (["RUN", "--project", "face.jpg", "--arithmetic", "1"], 2, "--project does not go with --arithmetic"),
        (["RUN", "--project", "face.jpg", "--num", "3"], 2, "--num does not go with --project"),
        (["RUN", "--project", *["face.jpg"] * 65], 2, "at most 64 photographs, got 65"),
        (["RUN", "--project", "face.jpg"], 65, "face.jpg: No such file"),
        (["RUN", "--project", "full/a"], 65, "full/a is empty"),
        (["RUN", "--steps", "5"], 2, "--steps goes with --project only"),
        (["RUN", "--arithmetic", "0,1 - x"], 2, "--arithmetic must be like '0,3,5 - 1,2 + 7'"),
        (["RUN", "--arithmetic", ""], 2, "--arithmetic must be like"),
        (["RUN", "--arithmetic", "1", "--out", "a.gif"], 2, "--out must end in .png"),
        (["RUN", "--device", "abacus"], 2, "--device must be a device of this machine, got 'abacus'; torch finds cpu"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    run: Path, tmp_path: Path, capfd, monkeypatch, arguments: list[str], code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    assert main([str(run) if a == "RUN" else a for a in arguments]) == code
    err = capfd.readouterr().err
    assert err.startswith("sample.py: error: ")
    assert err.count("\n") == 1
    assert says in err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "folder.png", "full"]


def test_a_checkpoint_that_changed_on_disk_is_refused(run: Path, tmp_path: Path, capfd) -> None:
    folder = tmp_path / "images-000000640"
    folder.mkdir()
    for file in (run / "checkpoints" / "images-000000640").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.pt"]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main(["--checkpoint", str(folder), "--out", str(tmp_path / "grid.png")]) == 74
    assert "state.pt does not match its manifest" in capfd.readouterr().err
    assert not (tmp_path / "grid.png").exists()
