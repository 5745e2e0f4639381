"""Both networks through the C kernels: the tutorial's steps, the same state, two ranks, and when they are taken."""

import copy
import dataclasses

import pytest
import torch
from PIL import Image

from kernels import native, native_layers
from pipeline.assembly import make_plan
from pipeline.candidates import settle
from pipeline.choices import Choices
from pipeline.config import Config, ConfigError, DataConfig, DistributedConfig, KernelsConfig, LossConfig, ModelConfig
from pipeline.distributed import Ranks, wrap
from pipeline.index import open_dataset
from pipeline.models import Discriminator, Generator, native_problem
from pipeline.precision import dtype_of
from pipeline.sampling import recalibrated
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


@pytest.fixture(params=["bf16", "fp32"])
def precision(request):
    load_native(dtype_of(request.param))
    return request.param


def native_networks(precision):
    pair = networks(width=WIDTH)
    for network in pair:
        network.native = dtype_of(precision)
    return pair


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("kind", [ReferenceStep, FastStep])
def test_three_steps_equal_the_tutorials(kind, joint, channels_last, precision):
    theirs = networks(width=WIDTH)
    expected = tutorial_steps(*theirs, 3, precision, N)
    in_float32 = tutorial_steps(*networks(width=WIDTH), 1, "fp32", N)
    step = make_step(kind, native_networks(precision), precision, joint, channels_last)
    tolerance = TOLERANCE[precision]
    for i in range(3):
        meters = dict(zip(METERS, step(*data(i, N), i * N, N).tolist(), strict=True))
        for name in TUTORIALS:
            assert meters[name] == pytest.approx(expected[i]["meters"][name], rel=tolerance, abs=tolerance / 4), name
        for name in ("d", "g"):
            # Later an activation that is almost 0 may fall to the other side, as with torch's own kernels for AVX2.
            if i == 0 and precision == "fp32":
                assert relative(step.caught[name], expected[i][name]) < tolerance / 10, name
            elif i == 0:
                bound = AS_CLOSE_AS_THE_TUTORIAL * relative(expected[i][name], in_float32[i][name])
                assert relative(step.caught[name], in_float32[i][name]) < bound, name
    for ours, theirs_ in zip((step.players.generator, step.players.discriminator), theirs, strict=True):
        assert relative(buffers(ours), buffers(theirs_)) < tolerance
        assert ours.state_dict().keys() == theirs_.state_dict().keys()
        for name, value in ours.named_buffers():
            if "num_batches" in name:
                assert value == theirs_.get_buffer(name), name


def test_pictures_and_other_precisions_go_the_plain_way(precision, monkeypatch):
    def never(*_arguments: object) -> None:
        raise AssertionError("a C kernel was called")

    monkeypatch.setattr(native_layers, "_function", never)
    generator, discriminator = native_networks(precision)
    _, latents = data(0, 5)  # five images: those for bf16 would not take them
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "fp32"):
        discriminator(generator(latents))
    with torch.no_grad():
        recalibrated(generator, latents.shape[1], images=10, batch=5)
        generator.eval()
        generator(latents)
        with torch.autocast("cpu", torch.bfloat16):
            generator(latents)


@pytest.mark.parametrize(
    ("width", "spectral_norm", "images", "dtype", "problem"),
    [
        (32, False, 32, torch.bfloat16, ""),
        (24, False, 32, torch.float32, "channels by 32"),
        (32, False, 24, torch.bfloat16, "images by 16"),
        (32, False, 23, torch.float32, ""),
        (32, True, 32, torch.bfloat16, "spectral norm"),
    ],
)
def test_what_they_cannot_train_is_said(width, spectral_norm, images, dtype, problem):
    pair = Generator(10, width, 3, 32, 32), Discriminator(width, 3, 32, 32, spectral_norm=spectral_norm)
    found = native_problem(*pair, images, dtype)
    assert problem in found
    assert bool(problem) == bool(found)


def two_ranks(ranks, precision):
    native.load(dtype=dtype_of(precision))
    step = make_step(FastStep, native_networks(precision), precision)
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
    alone = make_step(FastStep, native_networks(precision), precision)
    alone(*(x[ranks.rank * N // 2 : (ranks.rank + 1) * N // 2] for x in data(0, N)), 0, N // 2)
    first = copy.deepcopy(alone.caught["d"])
    torch.distributed.all_reduce(first)
    again = make_step(FastStep, native_networks(precision), precision)
    again.players.parallel["discriminator"] = wrap(again.players.discriminator, ranks, DistributedConfig())
    again(*(x[ranks.rank * N // 2 : (ranks.rank + 1) * N // 2] for x in data(0, N)), 0, N)
    assert relative(again.caught["d"], first / 2) < 1e-6


def test_two_ranks_average_their_gradients(precision):
    run_ranks(two_ranks, 2, precision)


def settled(tmp_path, cfg: Config, **choices):
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
    dataset = open_dataset(cfg.data)
    plan = make_plan(cfg, dataset, ranks)
    return settle(cfg, plan, ranks, Choices(ranks.device, cache=tmp_path / "cache", **choices))


@pytest.fixture
def config(tmp_path, precision):
    (tmp_path / "photographs").mkdir()
    for i in range(8):
        (tmp_path / "photographs" / f"{i}.jpg").write_bytes(jpeg_bytes(Image.fromarray(portrait())))
    return Config(
        data=DataConfig(dataroot=str(tmp_path / "photographs"), cache_dir=str(tmp_path / "cache"), image_size=16),
        model=ModelConfig(ngf=32, ndf=32),
        precision=precision,
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
