"""Both networks through the AMX kernels: the tutorial's steps, the same state, two ranks, and when they are taken."""

import copy
import dataclasses

import pytest
import torch
from PIL import Image

from kernels import native
from pipeline.assembly import make_plan
from pipeline.candidates import settle
from pipeline.choices import Choices
from pipeline.config import Config, ConfigError, DataConfig, DistributedConfig, KernelsConfig, LossConfig, ModelConfig
from pipeline.distributed import Ranks, wrap
from pipeline.index import open_dataset
from pipeline.models import Discriminator, Generator, native_problem
from pipeline.step import METERS, FastStep, ReferenceStep
from tests.images import jpeg_bytes, portrait
from tests.numerics import load_native
from tests.ranks import run_ranks
from tests.test_step import (
    AS_CLOSE_AS_THE_TUTORIAL,
    TOLERANCE,
    TUTORIALS,
    buffers,
    data,
    make_step,
    networks,
    relative,
    tutorial_steps,
)

N, WIDTH = 32, 32


@pytest.fixture(autouse=True)
def _native():
    load_native()


def native_networks():
    pair = networks(width=WIDTH)
    for network in pair:
        network.native = True
    return pair


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("kind", [ReferenceStep, FastStep])
def test_three_steps_equal_the_tutorials(kind, joint, channels_last):
    theirs = networks(width=WIDTH)
    expected = tutorial_steps(*theirs, 3, "bf16", N)
    in_float32 = tutorial_steps(*networks(width=WIDTH), 1, "fp32", N)
    step = make_step(kind, native_networks(), "bf16", joint, channels_last)
    tolerance = TOLERANCE["bf16"]
    for i in range(3):
        meters = dict(zip(METERS, step(*data(i, N), i * N, N).tolist(), strict=True))
        for name in TUTORIALS:
            assert meters[name] == pytest.approx(expected[i]["meters"][name], rel=tolerance, abs=tolerance / 4), name
        for name in ("d", "g"):
            if i == 0:
                bound = AS_CLOSE_AS_THE_TUTORIAL * relative(expected[i][name], in_float32[i][name])
                assert relative(step.caught[name], in_float32[i][name]) < bound, name
    for ours, theirs_ in zip((step.players.generator, step.players.discriminator), theirs, strict=True):
        assert relative(buffers(ours), buffers(theirs_)) < tolerance
        assert ours.state_dict().keys() == theirs_.state_dict().keys()
        for name, value in ours.named_buffers():
            if "num_batches" in name:
                assert value == theirs_.get_buffer(name), name


def test_pictures_and_float32_go_the_plain_way():
    generator, discriminator = native_networks()
    _, latents = data(0, 5)  # five images: the kernels would not take them
    with torch.no_grad():
        images = generator(latents)
        discriminator(images)
        generator.eval()
        with torch.autocast("cpu", torch.bfloat16):
            generator(latents)
    assert images.dtype == torch.float32


@pytest.mark.parametrize(
    ("width", "spectral_norm", "images", "problem"),
    [
        (32, False, 32, ""),
        (24, False, 32, "channels by 32"),
        (32, False, 24, "images by 16"),
        (32, True, 32, "spectral norm"),
    ],
)
def test_what_they_cannot_train_is_said(width, spectral_norm, images, problem):
    pair = Generator(10, width, 3, 32, 32), Discriminator(width, 3, 32, 32, spectral_norm=spectral_norm)
    assert problem in native_problem(*pair, images)
    assert bool(problem) == bool(native_problem(*pair, images))


def two_ranks(ranks):
    native.load()
    step = make_step(FastStep, native_networks(), "bf16")
    for name in ("generator", "discriminator"):
        step.players.parallel[name] = wrap(getattr(step.players, name), ranks, DistributedConfig(bucket_cap_mb=0.01))
    for i in range(2):
        pixels, latents = data(i, N)
        share = slice(ranks.rank * N // 2, (ranks.rank + 1) * N // 2)
        step(pixels[share], latents[share], i * N, N)
    weights = torch.cat([p.detach().flatten() for p in step.players.generator.parameters()])
    mine = torch.stack([weights.sum(), weights.abs().sum()])
    all_of_them = [torch.empty_like(mine) for _ in range(2)]
    torch.distributed.all_gather(all_of_them, mine)
    assert torch.equal(all_of_them[0], all_of_them[1])
    # The first gradient of D is the mean of both ranks'; that of one rank alone lies elsewhere.
    alone = make_step(FastStep, native_networks(), "bf16")
    alone(*(x[ranks.rank * N // 2 : (ranks.rank + 1) * N // 2] for x in data(0, N)), 0, N // 2)
    first = copy.deepcopy(alone.caught["d"])
    torch.distributed.all_reduce(first)
    again = make_step(FastStep, native_networks(), "bf16")
    again.players.parallel["discriminator"] = wrap(again.players.discriminator, ranks, DistributedConfig())
    again(*(x[ranks.rank * N // 2 : (ranks.rank + 1) * N // 2] for x in data(0, N)), 0, N)
    assert relative(again.caught["d"], first / 2) < 1e-6


def test_two_ranks_average_their_gradients():
    run_ranks(two_ranks, 2)


def settled(tmp_path, cfg: Config, **choices):
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
    dataset = open_dataset(cfg.data)
    plan = make_plan(cfg, dataset, ranks)
    return settle(cfg, plan, ranks, Choices(ranks.device, cache=tmp_path / "cache", **choices))


@pytest.fixture
def config(tmp_path):
    (tmp_path / "photographs").mkdir()
    for i in range(8):
        (tmp_path / "photographs" / f"{i}.jpg").write_bytes(jpeg_bytes(Image.fromarray(portrait())))
    return Config(
        data=DataConfig(dataroot=str(tmp_path / "photographs"), cache_dir=str(tmp_path / "cache"), image_size=16),
        model=ModelConfig(ngf=32, ndf=32),
        precision="bf16",
    )


def test_a_plan_takes_them_where_a_measured_step_is_faster(tmp_path, config):
    ticks = iter(range(10**9))

    def clock() -> float:
        return next(ticks)

    # A clock that ticks once a call finds both equally fast: the plain one stays.
    assert settled(tmp_path, config, clock=clock).networks == "torch"
    assert settled(tmp_path, dataclasses.replace(config, kernels=KernelsConfig(networks="native"))).networks == "native"


def test_a_plan_says_why_they_cannot_be_had(tmp_path, config):
    cfg = dataclasses.replace(config, model=ModelConfig(ngf=8, ndf=8))
    plan = settled(tmp_path, cfg)
    assert plan.networks == "torch"
    assert any("channels by 32" in reason for reason in plan.reasons)
    cfg = dataclasses.replace(config, loss=LossConfig(r1=10.0), kernels=KernelsConfig(networks="native"))
    with pytest.raises(ConfigError, match=r"kernels\.networks must be auto or torch here.*second derivative"):
        settled(tmp_path, cfg)
