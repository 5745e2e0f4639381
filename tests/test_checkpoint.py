import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint as checkpoints
from pipeline.checkpoint_writer import Writer, mark_best
from pipeline.cli.options import to_yaml
from pipeline.config import OptimConfig
from pipeline.errors import StorageError
from pipeline.models import Discriminator, Generator
from pipeline.players import make_players
from tests.players import CFG, MANIFEST, assert_same, snapshot, tiny_players, train_some, write


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_everything_comes_back_to_the_bit_and_training_goes_on_the_same(tmp_path, precision):
    players = tiny_players(precision=precision)
    train_some(players, 3, precision)
    write(tmp_path, players, 12)
    other = tiny_players(precision=precision, seed=1)
    checkpoints.restore(other, checkpoints.load(checkpoints.newest(tmp_path)), 0, 1)
    assert_same(snapshot(other), snapshot(players))
    train_some(players, 2, precision)
    train_some(other, 2, precision)
    assert_same(snapshot(other), snapshot(players))


def test_a_snapshot_is_not_touched_by_the_training_that_follows():
    players = tiny_players()
    train_some(players)
    state = snapshot(players)
    weights = state["generator"]["layers.0.weight"].clone()
    moments = state["optimizer_g"]["state"][0]["exp_avg"].clone()
    train_some(players)
    assert torch.equal(state["generator"]["layers.0.weight"], weights)
    assert torch.equal(state["optimizer_g"]["state"][0]["exp_avg"], moments)


def test_a_changed_learning_rate_stays_changed_on_resume():
    old, new = tiny_players(lr=1e-3), tiny_players(lr=1e-5)
    train_some(old)
    checkpoints.restore(new, snapshot(old), 0, 1)
    assert new.optimizer_g.param_groups[0]["lr"] == new.optimizer_d.param_groups[0]["lr"] == 1e-5
    assert new.optimizer_g.state_dict()["state"][0]["step"] == 2


def test_each_rank_gets_its_own_statistics_and_another_world_size_their_mean():
    players = tiny_players()
    buffers = checkpoints.buffers_of(players)
    state = checkpoints.snapshot(players, [buffers, buffers + 2])
    for rank, expected in ((0, buffers), (1, buffers + 2)):
        checkpoints.restore(players, state, rank, 2)
        assert torch.equal(checkpoints.buffers_of(players), expected)
    checkpoints.restore(players, state, 0, 1)
    assert torch.equal(checkpoints.buffers_of(players), buffers + 1)


def flip_a_bit(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-5])


FILES = ("state.pt", "config.yaml", "manifest.json")
DAMAGE = {
    f"{name} {what}": lambda folder, do=do, name=name: do(folder / name)
    for name in FILES
    for what, do in {"cut short": cut_short, "with a bit flipped": flip_a_bit, "missing": Path.unlink}.items()
} | {
    "manifest of something else": lambda folder: (folder / "manifest.json").write_text("[1, 2]"),
    "another format": lambda folder: (folder / "manifest.json").write_text(
        json.dumps(json.loads((folder / "manifest.json").read_text()) | {"format": 99})
    ),
}


# rows 11, 12 and 13
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_the_loader_walks_back_over_a_damaged_checkpoint_and_says_so(tmp_path, damage):
    players = tiny_players()
    write(tmp_path, players, 10)
    damage(write(tmp_path, players, 20))
    said = []
    found = checkpoints.newest(tmp_path, said.append)
    assert found.images_seen == 10
    assert len(said) == 1
    assert "images-000000020" in said[0]


# row 12
def test_wherever_a_bit_flips_in_a_manifest_nothing_wrong_is_believed(tmp_path):
    folder = write(tmp_path, tiny_players(), 10)
    manifest = checkpoints.verify(folder).manifest
    path = folder / "manifest.json"
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found = checkpoints.newest(tmp_path, lambda _: None)
        refused += found is None
        # Only the name of the sum itself is not summed.
        assert found is None or manifest.items() <= found.manifest.items(), (place, found.manifest)
    assert refused > 0.9 * len(whole)


def test_a_manifest_of_a_version_without_its_own_sum_is_read(tmp_path):
    path = write(tmp_path, tiny_players(), 10) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    assert checkpoints.newest(tmp_path).images_seen == 10


def test_a_partial_write_is_no_checkpoint_and_the_next_write_clears_it(tmp_path):
    folder = write(tmp_path, tiny_players(), 10)
    partial = folder.with_name(".images-000000020.partial")
    shutil.copytree(folder, partial)
    assert checkpoints.newest(tmp_path).images_seen == 10
    write(tmp_path, tiny_players(), 20)
    assert not partial.exists()
    assert checkpoints.newest(tmp_path).images_seen == 20


def test_a_disk_that_refuses_leaves_the_old_checkpoint_and_nothing_half_written(tmp_path, monkeypatch):
    players = tiny_players()
    write(tmp_path, players, 10)

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        write(tmp_path, players, 20)
    assert caught.value.exit_code == 74
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["images-000000010"]


class Marker:
    """Pickles into a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    state = {"generator": Marker(tmp_path / "ran")}
    folder = checkpoints.write(tmp_path, state, to_yaml(CFG), MANIFEST | {"images_seen": 10})
    with pytest.raises(StorageError, match=r"state\.pt holds no state that may be read") as caught:
        checkpoints.load(checkpoints.verify(folder))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_bytes_that_are_not_the_manifests_are_not_loaded(tmp_path):
    """The manifest is rank 0's; the file is what this machine sees."""
    found = checkpoints.verify(write(tmp_path, tiny_players(), 10))
    flip_a_bit(found.folder / "state.pt")
    with pytest.raises(StorageError, match=r"state\.pt is not the file of the manifest.*every machine"):
        checkpoints.load(found)
    (found.folder / "state.pt").unlink()
    with pytest.raises(StorageError, match=r"cannot read the checkpoint .*No such file.*every machine"):
        checkpoints.load(found)


def test_the_generator_opens_from_a_run_or_a_checkpoint_folder(tmp_path):
    players = tiny_players()
    train_some(players)
    folder = write(tmp_path, players, 10)
    for path in (tmp_path, folder):
        generator, cfg, images_seen = checkpoints.open_generator(path)
        assert (cfg, images_seen) == (CFG, 10)
        for name, p in generator.named_parameters():
            assert torch.equal(p, players.ema[name])
    live, _, _ = checkpoints.open_generator(tmp_path, weights="live")
    assert torch.equal(live.layers[0].weight, players.generator.layers[0].weight)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()], ids=["missing", "empty"])
def test_a_path_without_a_checkpoint_is_one_line_that_names_it(tmp_path, make):
    make(tmp_path / "run")
    with pytest.raises(StorageError, match=str(tmp_path / "run")):
        checkpoints.open_generator(tmp_path / "run")


def test_a_command_gets_the_best_the_last_or_the_one_at_a_path(tmp_path):
    run, players = tmp_path / "run", tiny_players()
    for images in (8, 16, 24):
        write(run, players, images)
    with pytest.raises(StorageError, match="has marked no checkpoint as its best"):
        checkpoints.chosen(run, "best")
    mark_best(run, checkpoints.folder_of(run, 8))
    assert checkpoints.chosen(run, "best").images_seen == 8
    assert checkpoints.chosen(run, "last").images_seen == 24
    assert checkpoints.chosen(run, str(checkpoints.folder_of(run, 16))).images_seen == 16
    for garbled in ('["images-000000008"]', '{"checkpoint": "../images-000000008"}', "", "\\0{", '{"best": 1}', "\xe4"):
        (run / "checkpoints" / "best.json").write_bytes(garbled.encode("latin-1"))
        with pytest.raises(StorageError, match=r"best\.json names no checkpoint"):
            checkpoints.chosen(run, "best")
    mark_best(run, checkpoints.folder_of(run, 8))
    (checkpoints.folder_of(run, 8) / "state.pt").write_bytes(b"")
    with pytest.raises(StorageError, match="does not match its manifest"):  # never another one in its place
        checkpoints.chosen(run, "best")
    for which in ("best", "last"):
        with pytest.raises(StorageError, match="no such run"):
            checkpoints.chosen(tmp_path / "none", which)


def test_weights_of_another_width_are_refused(tmp_path):
    state = snapshot(tiny_players())
    torch.manual_seed(0)
    wider = make_players(Generator(4, 3, 3, 16, 16), Discriminator(3, 3, 16, 16), OptimConfig(), lr=1, precision="fp32")
    with pytest.raises(StorageError, match="do not fit this model"):
        checkpoints.restore_weights(wider, state)


@pytest.mark.parametrize("before", [torch.contiguous_format, torch.channels_last])
def test_adams_moments_follow_their_parameters_memory_format(before):
    """The fused kernel walks parameter and moments as flat memory: other strides would mix up their elements."""
    after = torch.channels_last if before == torch.contiguous_format else torch.contiguous_format

    one, other = tiny_players(memory_format=before), tiny_players(memory_format=after)
    train_some(one)
    checkpoints.restore(other, snapshot(one), 0, 1)
    for optimizer in (other.optimizer_g, other.optimizer_d):
        for parameter, moments in optimizer.state.items():
            assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == parameter.stride()
    train_some(one)
    train_some(other)
    for (name, p), q in zip(one.generator.named_parameters(), other.generator.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-3, atol=1e-5), name


def test_newest_is_by_number_and_strangers_are_passed_over(tmp_path):
    players = tiny_players()
    folder = write(tmp_path, players, 999_999_936)
    write(tmp_path, players, 1_000_000_064)
    shutil.copytree(folder, folder.with_name("images-2000000000-good"))
    assert checkpoints.newest(tmp_path).images_seen == 1_000_000_064
    writer = Writer(tmp_path, keep=1, milestone_images=[])
    writer.save(snapshot(players), to_yaml(CFG), MANIFEST | {"images_seen": 1_000_000_128})
    writer.wait()
    writer.close()
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["images-1000000128", "images-2000000000-good"]


def test_checkpoints_that_a_run_does_not_go_on_from_neither_count_nor_vanish(tmp_path):
    players = tiny_players()
    for images_seen in (25, 50, 75):
        write(tmp_path, players, images_seen)
    for images_seen in (50, 75):
        flip_a_bit(checkpoints.folder_of(tmp_path, images_seen) / "state.pt")
    found = checkpoints.newest(tmp_path, lambda _: None)
    aside = checkpoints.set_aside_after(tmp_path, found.images_seen)
    assert [p.name for p in aside] == ["images-000000050.abandoned", "images-000000075.abandoned"]
    writer = Writer(tmp_path, keep=2, milestone_images=[])
    writer.save(snapshot(players), to_yaml(CFG), MANIFEST | {"images_seen": 35})
    writer.wait()
    writer.close()
    assert checkpoints.newest(tmp_path).images_seen == 35
    assert [checkpoints.count_of(p) for p in checkpoints.folders(tmp_path)] == [25, 35]


def test_a_manifest_that_speaks_of_other_images_is_passed_over(tmp_path):
    folder = write(tmp_path, tiny_players(), 10)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"images_seen": 18}))
    assert checkpoints.newest(tmp_path, lambda _: None) is None
