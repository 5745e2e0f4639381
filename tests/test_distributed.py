import contextlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline import distributed
from pipeline.config import ConfigError, DataConfig, DistributedConfig, OptimConfig
from pipeline.distributed import Ranks
from pipeline.errors import DataError, StorageError
from pipeline.face_set import write_faces
from pipeline.feed import open_feed
from pipeline.index import open_dataset
from pipeline.meters import Meters
from pipeline.models import Discriminator, Generator
from pipeline.order import Slice
from pipeline.philox import Stream, normal
from pipeline.players import make_players
from pipeline.step import FastStep
from tests.commands import ROOT
from tests.ranks import Launch, run_launches, run_ranks

BATCH, STEPS = 8, 5


def batches(cfg: DataConfig, shard: Slice) -> list[torch.Tensor]:
    feed = open_feed(
        cfg,
        open_dataset(cfg),
        seed=7,
        shard=shard,
        device=torch.device("cpu"),
        images_seen=0,
        threads=1,
        decoder="pillow",
        cached=None,
    )
    try:
        return [feed.next() for _ in range(STEPS)]
    finally:
        feed.close()


def sees_its_part(ranks: Ranks, cfg: DataConfig) -> None:
    """Every rank's images, put together, are the batch of a single rank; so are the latents, all different."""
    whole = batches(cfg, Slice(BATCH))
    shard = Slice(BATCH, ranks.rank, ranks.world_size)
    mine = batches(cfg, shard)
    for step in range(STEPS):
        parts = [torch.empty_like(mine[step]) for _ in range(ranks.world_size)]
        dist.all_gather(parts, mine[step])
        assert torch.equal(torch.cat(parts), whole[step]), step
        numbers = torch.from_numpy(shard.numbers(step * BATCH))
        latents = normal(7, Stream.LATENT, numbers, 10)
        drawn = [torch.empty_like(latents) for _ in range(ranks.world_size)]
        dist.all_gather(drawn, latents)
        everything = torch.cat(drawn)
        assert torch.equal(everything, normal(7, Stream.LATENT, torch.arange(step * BATCH, (step + 1) * BATCH), 10))
        assert len(torch.unique(everything, dim=0)) == BATCH


def tells_the_others(ranks: Ranks) -> None:
    """What one rank knows or suffers, all know."""
    assert distributed.broadcast(ranks.rank + 5) == 5
    assert distributed.gather(ranks.rank) == list(range(ranks.world_size))

    def fails_on_the_last() -> int:
        if ranks.rank == ranks.world_size - 1:
            raise DataError("a file is bad")
        return ranks.rank

    with pytest.raises(DataError, match="a file is bad"):
        distributed.together(fails_on_the_last)
    assert distributed.together(lambda: ranks.rank) == ranks.rank

    done = []
    first = distributed.leader_first(ranks, lambda: done.append(ranks.rank) or ranks.rank)
    assert first == ranks.rank
    assert done == [ranks.rank]

    meters = Meters(ranks.device, ranks.world_size)
    for value in (1.0, 3.0):
        meters.add(torch.full((7,), value + ranks.rank), torch.tensor([0.0, 1.0]))
    means, own_ms = meters.read(ranks.rank, own_ms=10.0 + ranks.rank)
    assert means["loss_d"] == pytest.approx(2 + (ranks.world_size - 1) / 2)
    assert means["skipped_steps"] == 2, "steps, not steps times ranks"
    assert own_ms == [10.0 + rank for rank in range(ranks.world_size)]

    network = distributed.wrap(Discriminator(2, 3, 16, 16), ranks, DistributedConfig())
    first_weight = next(network.parameters()).detach().clone()
    dist.broadcast(first_weight, 0)
    assert torch.equal(first_weight, next(network.parameters()))
    torch.manual_seed(ranks.rank)  # ranks that are forked alike draw alike
    # Two forwards of a BatchNorm network before one backward, which buffer traffic would break.
    (network(torch.randn(4, 3, 16, 16)).sum() + network(torch.randn(4, 3, 16, 16)).sum()).backward()
    statistics = next(b for n, b in network.named_buffers() if n.endswith("running_mean")).clone()
    theirs = distributed.gather(statistics)
    assert not torch.equal(theirs[0], theirs[-1]), "each rank keeps its own statistics"


def keeps_weights_equal(ranks: Ranks) -> None:
    """Different images and latents on every rank, the same weights after every step."""
    torch.manual_seed(0)
    generator, discriminator = Generator(4, 2, 3, 16, 16), Discriminator(2, 3, 16, 16)
    players = make_players(generator, discriminator, OptimConfig(), lr=2e-4, precision="fp32")
    for name in ("generator", "discriminator"):
        players.parallel[name] = distributed.wrap(getattr(players, name), ranks, DistributedConfig())
    step = FastStep(players, "fp32", channels_last=True, ema_half_life_images=100)
    torch.manual_seed(ranks.rank + 1)
    for i in range(3):
        images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
        step(images, torch.randn(2, 4), 1000 + i * BATCH, BATCH)
        weights = [*generator.parameters(), *discriminator.parameters(), *players.ema.values()]
        everyones = distributed.gather(torch.cat([w.detach().flatten() for w in weights]))
        assert all(torch.equal(theirs, everyones[0]) for theirs in everyones), i


def everything(ranks: Ranks, cfg: DataConfig) -> None:
    sees_its_part(ranks, cfg)
    tells_the_others(ranks)
    keeps_weights_equal(ranks)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_a_batch_and_what_they_know(tmp_path, world_size):
    write_faces(tmp_path / "faces", 13, workers=1)
    cfg = DataConfig(
        dataroot=str(tmp_path / "faces"),
        cache_dir=str(tmp_path / "cache"),
        image_size=16,
        crop_margin=3,
        flip=True,
        contrast=0.2,
        decoder="pillow",
    )
    run_ranks(everything, world_size, cfg)


def fails_on_rank_1(ranks: Ranks) -> None:
    assert ranks.rank != 1, "rank 1 fails"


def test_a_rank_that_fails_fails_the_test():
    with pytest.raises(Exception, match="rank 1 fails"):
        run_ranks(fails_on_rank_1, 2)


def test_what_only_says_that_another_rank_is_gone_is_known_as_such():
    for text in ("[/x/gloo/transport/tcp/pair.cc:547] Connection closed", "Application timeout caused pair closure"):
        assert distributed.lost_peer(RuntimeError(text))
    assert distributed.lost_peer(dist.DistNetworkError("unreachable"))
    assert not distributed.lost_peer(RuntimeError("shapes do not match"))


@pytest.mark.parametrize(
    ("error", "left"),
    [(None, True), (StorageError("disk").on_every_rank(), True), (StorageError("disk"), False), (OSError(), False)],
)
def test_a_group_is_left_at_the_end_and_after_an_error_of_all(tmp_path, error, left):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with contextlib.suppress(StorageError, OSError), distributed.leaving_together():
            if error:
                raise error
        assert dist.is_initialized() is not left
    finally:
        distributed.stop()


def test_a_closed_stream_changes_no_exit_code():
    program = "import sys; from pipeline.distributed import program; sys.stdout = None; program(lambda: 65)"
    assert subprocess.run([sys.executable, "-c", program], timeout=100, cwd=ROOT).returncode == 65
    failing = "from pipeline.distributed import program; program(lambda: 1 / 0)"
    done = subprocess.run([sys.executable, "-c", failing], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


@contextlib.contextmanager
def expects_no_group_afterwards(_launch: int, _rank: int):
    yield
    assert not dist.is_initialized()


def test_ranks_that_all_meet_the_same_error_leave_their_group(tmp_path):
    """With it alive the interpreter's end has once aborted a rank, in place of its exit code 74."""
    words = ["--data.dataroot", str(tmp_path), "--run.dir", "/proc/dcgan-run"]  # read-only even for root
    assert run_launches([Launch(2, words)], expects_no_group_afterwards) == [[74, 74]]


@pytest.mark.parametrize(
    ("alone", "code", "said"), [(True, 0, "buffered last words"), (True, 74, "buffered "), (False, 0, "buffered ")]
)
def test_after_an_error_or_with_a_group_the_interpreter_is_not_taken_apart(tmp_path, alone, code, said):
    program = f"""
import atexit, sys
import torch.distributed as dist
from pipeline.distributed import end_process
if not {alone}:
    dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
atexit.register(print, "last words", end="")
print("buffered", end=" ")
end_process({code})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert (done.returncode, done.stdout) == (code, said), done.stderr


def test_one_rank_needs_no_process_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    try:
        ranks = distributed.start(DistributedConfig(threads=1))
        assert (ranks.rank, ranks.world_size, ranks.leads) == (0, 1, True)
        assert not dist.is_initialized()
        assert distributed.gather("x") == ["x"]
        distributed.set_timeout(5)
        with pytest.raises(StorageError):
            distributed.together(lambda: (_ for _ in ()).throw(StorageError("disk")))
    finally:
        torch.set_num_threads(threads)


def test_threads_are_shared_out_whatever_torchrun_sets(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda _: set(range(8)))
    assert distributed.num_threads(DistributedConfig(), 2) == 4
    assert distributed.num_threads(DistributedConfig(), 16) == 1
    assert distributed.num_threads(DistributedConfig(threads=3), 2) == 3


def test_synchronised_statistics_are_refused_on_a_cpu():
    with pytest.raises(ConfigError, match=r"distributed\.sync_batchnorm.*CPU"):
        distributed.synchronise_batchnorm(Discriminator(2, 3, 16, 16), Ranks(0, 1, 0, 1, torch.device("cpu")))


def test_two_nodes_take_different_images():
    """Sharding goes by the global rank: the second node's first rank has local rank 0 as well."""
    first, second = Slice(BATCH, rank=0, world_size=4), Slice(BATCH, rank=2, world_size=4)
    assert not set(first.numbers(0)) & set(second.numbers(0))
    assert np.array_equal(second.numbers(0), [4, 5])
