"""What a step may do beyond the tutorial: each against the algorithm written out, alone and together, on many ranks, in
low precision, across a NaN and across a restart."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from pipeline import assembly, resume
from pipeline import checkpoint as checkpoints
from pipeline.cli import train as command
from pipeline.cli.options import parse
from pipeline.config import (
    Config,
    ConfigError,
    DiscriminatorInputConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    WatchConfig,
)
from pipeline.diffaugment import diffaugment, draws
from pipeline.instance_noise import instance_noise
from pipeline.losses import Losses
from pipeline.philox import Stream, words
from pipeline.players import make_players
from pipeline.schedule import Schedule
from pipeline.step import METERS, FastStep, ReferenceStep
from pipeline.watch import CollapseWatch
from tests.commands import ROOT, rows
from tests.numbered import words as command_words
from tests.numbered import write_numbered
from tests.players import assert_same
from tests.ranks import run_ranks
from tests.test_losses import EXPECTED
from tests.test_step import N, buffers, data, gradients, make_step, networks, ranks_equal_the_oracle, relative

STEPS, TOTAL, SEED = 4, 5 * N, 11
"""Of a run of five steps the first four, so that what falls to 0 at its end does not quite get there."""
TOLERANCE = 2e-4
"""As for the tutorial's own steps in float32 (tests/test_step.py)."""

CASES = {
    "label smoothing": Config(loss=LossConfig(real_label=0.9)),
    "hinge": Config(loss=LossConfig(kind="hinge")),
    "least squares": Config(loss=LossConfig(kind="least_squares", real_label=0.8)),
    "wasserstein": Config(loss=LossConfig(kind="wasserstein", gradient_penalty=10.0)),
    "r1": Config(loss=LossConfig(r1=5.0, r1_every=2)),
    "d steps": Config(loss=LossConfig(d_steps=2)),
    "two rates": Config(optim=OptimConfig(lr_d=3e-5)),
    "falling rates": Config(optim=OptimConfig(lr_decay="linear", lr_decay_from=0.2)),
    "diffaugment": Config(d_input=DiscriminatorInputConfig(augment=["color", "translation", "cutout"])),
    "instance noise": Config(d_input=DiscriminatorInputConfig(noise=0.4, noise_images=3 * N)),
    "spectral norm": Config(model=ModelConfig(spectral_norm=True)),
    "all": Config(
        model=ModelConfig(spectral_norm=True),
        optim=OptimConfig(lr_d=3e-5, lr_decay="cosine", lr_decay_from=0.2, ema_half_life_images=100),
        loss=LossConfig(kind="hinge", gradient_penalty=1.0, r1=5.0, r1_every=3, d_steps=2),
        d_input=DiscriminatorInputConfig(augment=["translation", "color"], noise=0.4, noise_images=3 * N),
    ),
}
cases = pytest.mark.parametrize("cfg", CASES.values(), ids=CASES)
kinds = pytest.mark.parametrize("kind", [ReferenceStep, FastStep])


def options(cfg: Config) -> dict:
    """make_step's, by the settings."""
    schedule = Schedule(cfg.optim.lr_decay, cfg.optim.lr_decay_from, TOTAL)
    return {"loss": cfg.loss, "d_input": cfg.d_input, "optim": cfg.optim, "schedule": schedule, "seed": SEED}


def step_of(cfg: Config, kind=FastStep, precision="fp32", joint=False):
    half_life = cfg.optim.ema_half_life_images
    pair = networks(spectral_norm=cfg.model.spectral_norm)
    return make_step(kind, pair, precision, joint, half_life=half_life, **options(cfg))


def share_of_the_rate(cfg: Config, seen: int) -> float:
    if cfg.optim.lr_decay == "none" or seen <= cfg.optim.lr_decay_from * TOTAL:
        return 1.0
    left = (TOTAL - seen) / (TOTAL - cfg.optim.lr_decay_from * TOTAL)
    return left if cfg.optim.lr_decay == "linear" else (1 + math.cos(math.pi * (1 - left))) / 2


def slope(discriminator, images):
    images = images.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return found.square().sum((1, 2, 3))


def plain_steps(cfg: Config, generator, discriminator) -> list[dict]:
    """The algorithm in the papers' words, channels first, float32, on the same data."""
    on_real, on_fake, on_g = EXPECTED[cfg.loss.kind, cfg.loss.real_label]
    rates = cfg.optim.lr, cfg.optim.lr_d or cfg.optim.lr
    adams = [
        torch.optim.Adam(n.parameters(), lr=lr, betas=(0.5, 0.999))
        for n, lr in zip((generator, discriminator), rates, strict=True)
    ]
    statistics = [b for n, b in discriminator.named_buffers() if not n.endswith((".u", ".v"))]
    found = []
    for number in range(STEPS):
        seen = number * N
        for adam, lr in zip(adams, rates, strict=True):
            adam.param_groups[0]["lr"] = lr * share_of_the_rate(cfg, seen)
        pixels, latents = data(number)
        numbers = torch.arange(seen, seen + N)

        def altered(images, part, numbers=numbers, seen=seen):
            if cfg.d_input.augment:
                images = diffaugment(images, cfg.d_input.augment, draws(SEED, numbers, part))
            std = cfg.d_input.noise * max(0, 1 - seen / cfg.d_input.noise_images)
            return instance_noise(images, std, SEED, part, numbers)

        fake = generator(latents)
        real, fake = altered(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, 0), altered(fake, 1)
        discriminator.zero_grad()
        of_real, of_fake = discriminator(real), discriminator(fake.detach())
        loss_d = on_real(of_real) + on_fake(of_fake)
        before = [b.clone() for b in statistics]
        penalised = loss_d
        if cfg.loss.gradient_penalty:
            mix = torch.from_numpy((words(SEED, Stream.PENALTY, numbers.numpy())[:, 0] >> 8) / 2**24)
            mix = mix.float().view(-1, 1, 1, 1)
            slopes = slope(discriminator, mix * real + (1 - mix) * fake).sqrt()
            penalised = penalised + cfg.loss.gradient_penalty * ((slopes - 1) ** 2).mean()
        if cfg.loss.r1 and number % cfg.loss.r1_every == 0:
            penalised = penalised + cfg.loss.r1_every * cfg.loss.r1 / 2 * slope(discriminator, real).mean()
        penalised.backward()
        for buffer, kept in zip(statistics, before, strict=True):
            buffer.copy_(kept)
        row = {"d": gradients(discriminator), "loss_d": loss_d.item(), "loss_g": on_g(of_fake).item()}
        adams[1].step()
        if number % cfg.loss.d_steps == cfg.loss.d_steps - 1:
            generator.zero_grad()
            loss_g = on_g(discriminator(fake))
            loss_g.backward()
            row |= {"g": gradients(generator), "loss_g": loss_g.item()}
            adams[0].step()
        found.append(row)
    return found


def compare(cfg: Config, kind, joint: bool) -> None:
    theirs = networks(spectral_norm=cfg.model.spectral_norm)
    begun = [copy.deepcopy(network) for network in theirs]
    step = step_of(cfg, kind, joint=joint)
    for number, expected in enumerate(plain_steps(cfg, *theirs)):
        step.caught.clear()
        meters = dict(zip(METERS, step(*data(number), number * N, N).tolist(), strict=True))
        for name in ("loss_d", "loss_g"):
            assert meters[name] == pytest.approx(expected[name], rel=TOLERANCE, abs=TOLERANCE / 4), (number, name)
        assert step.caught.keys() == expected.keys() & {"d", "g"}
        for name, gradient in step.caught.items():
            assert relative(gradient, expected[name]) < TOLERANCE, (number, name)
    for ours, plain, first in zip((step.players.generator, step.players.discriminator), theirs, begun, strict=True):
        # Spectral norm takes one power iteration a pass: after fewer of them the weights have another scale, which
        # BatchNorm takes out again, so that it shows in the running statistics alone.
        assert (joint and cfg.model.spectral_norm) or relative(buffers(ours), buffers(plain)) < TOLERANCE
        moved, expected = (
            torch.cat([(p - q).flatten() for p, q in zip(n.parameters(), first.parameters(), strict=True)]).detach()
            for n in (ours, plain)
        )
        # Adam moves a weight by its whole rate whichever way a gradient near 0 points.
        assert relative(moved, expected) < 1e-2


@cases
@kinds
def test_a_step_is_the_papers_algorithm(kind, cfg):
    compare(cfg, kind, joint=False)


@cases
def test_one_pass_of_both_halves_changes_nothing(cfg):
    compare(cfg, FastStep, joint=True)


def options_on_two_ranks(ranks) -> None:
    for name, kind, joint in (
        ("wasserstein", FastStep, True),
        ("r1", FastStep, False),
        ("all", FastStep, False),
        ("all", ReferenceStep, False),
    ):
        cfg = CASES[name]
        try:
            ranks_equal_the_oracle(ranks, joint, kind, cfg.model.spectral_norm, **options(cfg))
        except AssertionError as error:
            raise AssertionError(f"{name}, {kind.__name__}, {joint=}") from error


def test_two_ranks_equal_one_process_with_two_groups_of_statistics_with_every_technique():
    run_ranks(options_on_two_ranks, 2)


def everything_of(step) -> dict:
    """All that a step changes, copied."""
    return copy.deepcopy(checkpoints.snapshot(step.players, [checkpoints.buffers_of(step.players)]))


@kinds
def test_in_a_step_of_d_alone_g_stands_still_and_its_loss_is_that_of_the_same_images_before(kind):
    step = step_of(Config(loss=LossConfig(d_steps=3)), kind)
    before, generator, discriminator = (copy.deepcopy(n) for n in (step.players.generator, *networks()))
    meters = dict(zip(METERS, step(*data(0), 0, N).tolist(), strict=True))
    assert "g" not in step.caught
    pairs = zip(step.players.generator.parameters(), before.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert not step.players.optimizer_g.state
    outputs = discriminator(generator(data(0)[1]))
    assert meters["loss_g"] == pytest.approx(torch.nn.functional.softplus(-outputs).mean().item(), rel=1e-4)
    assert meters["d_fake_after"] == meters["d_fake_before"]
    step(*data(1), N, N)
    assert "g" not in step.caught
    step(*data(2), 2 * N, N)
    assert "g" in step.caught


@kinds
def test_which_steps_g_learns_in_and_r1_is_taken_in_follows_from_the_images_seen(kind):
    cfg = Config(loss=LossConfig(d_steps=3, r1=5.0, r1_every=2))
    onward, anew = step_of(cfg, kind), step_of(cfg, kind)
    for number in range(4):
        onward(*data(number), number * N, N)
    state = everything_of(onward)
    checkpoints.restore(anew.players, state, 0, 1)
    for number in range(4, 7):
        both = [step(*data(number), number * N, N) for step in (onward, anew)]
        assert torch.equal(*both), number
    assert_same(everything_of(onward), everything_of(anew))


@cases
def test_a_step_that_is_not_finite_moves_nothing_and_is_counted_once(cfg):
    step = step_of(cfg)
    for number in range(2):
        step(*data(number), number * N, N)
    before = everything_of(step)
    pixels, latents = data(2)
    step(pixels, latents * torch.nan, 2 * N, N)
    g_learns = (2 + 1) % cfg.loss.d_steps == 0
    assert step.skipped.tolist() == [1, g_learns]
    assert step.hopeless > 0
    after = everything_of(step)
    for name in ("generator", "discriminator"):
        moving = [key for key in before[name] if "num_batches" not in key]
        assert all(torch.equal(before[name][key], after[name][key]) for key in moving)
    assert all(torch.isfinite(value).all() for value in after["ema"].values())
    weights = [p.clone() for p in step.players.discriminator.parameters()]
    step(*data(3), 3 * N, N)
    assert step.skipped.tolist() == [0, 0]
    assert not step.hopeless
    assert not any(torch.equal(*pair) for pair in zip(step.players.discriminator.parameters(), weights, strict=True))


@cases
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_near_float32(precision, cfg):
    exact, low = step_of(cfg), step_of(cfg, precision=precision)
    for scaler in (low.players.scaler_d, low.players.scaler_g):
        if scaler.is_enabled():
            scaler.load_state_dict(scaler.state_dict() | {"scale": 256.0})
    for number in range(STEPS):
        expected, found = (step(*data(number), number * N, N) for step in (exact, low))
        assert torch.allclose(found, expected, rtol=5e-2, atol=5e-2), number
        assert low.skipped.tolist() == [0, 0]


def test_the_penalties_draw_by_image_number_and_the_seed():
    cfg = CASES["wasserstein"]
    gradients_of = []
    for seed, first in ((SEED, 0), (SEED, 0), (SEED, 1000), (SEED + 1, 0)):
        step = make_step(FastStep, networks(), **options(cfg) | {"seed": seed})
        step(*data(0), 0, N, torch.arange(first, first + N))
        gradients_of.append(step.caught["d"])
    assert torch.equal(gradients_of[0], gradients_of[1])
    assert not torch.equal(gradients_of[0], gradients_of[2])
    assert not torch.equal(gradients_of[0], gradients_of[3])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_numbered(tmp_path_factory.mktemp("techniques") / "images", 6)


EVERYTHING = {
    "model__spectral_norm": "true",
    "optim__lr_d": 1e-4,
    "optim__lr_decay": "linear",
    "optim__lr_decay_from": 0.2,
    "loss__kind": "wasserstein",
    "loss__gradient_penalty": 1.0,
    "loss__r1": 1.0,
    "loss__r1_every": 3,
    "loss__d_steps": 2,
    "d_input__augment": "[color, translation, cutout]",
    "d_input__noise": 0.2,
    "d_input__noise_images": 20,
}


def test_a_run_with_everything_is_the_same_when_it_is_stopped_and_goes_on(images, tmp_path, monkeypatch):
    settings = EVERYTHING | {"train__max_images": 44, "checkpoint__every_images": 12}
    monkeypatch.setenv("DCGAN_FAULT", "nan:0:3,nan:0:4")  # two bad steps go back: other images, other draws
    settings |= {"watch__max_skipped_steps": 2}
    assert command.main(command_words(images, tmp_path / "whole", **settings)) == 0
    monkeypatch.setenv("DCGAN_FAULT", "nan:0:3,nan:0:4,term:0:6")
    assert command.main(command_words(images, tmp_path / "parts", **settings)) == 75
    monkeypatch.setenv("DCGAN_FAULT", "")
    assert command.main(command_words(images, tmp_path / "parts", **settings)) == 0
    assert_same(*(checkpoints.load(checkpoints.newest(tmp_path / run)) for run in ("whole", "parts")))
    keys = ("images_seen", "loss_d", "loss_g", "d_real", "d_fake_after", "learning_rate")
    both = [rows(tmp_path / run / "stats.jsonl") for run in ("whole", "parts")]
    whole, parts = ([[row[key] for key in keys] for row in found] for found in both)
    assert whole == parts
    rates = [row[-1] for row in whole]
    assert rates[0] == 2e-4
    assert rates[-1] == pytest.approx(2e-4 * (44 - 40) / (44 - 0.2 * 44)), "that of the step after 40 of 44 images"


REFUSED = [
    ({"loss__kind": "wasserstein"}, ["loss.kind wasserstein", "loss.gradient_penalty"]),
    ({"loss__r1": 1.0, "distributed__sync_batchnorm": "true"}, ["distributed.sync_batchnorm", "loss.r1"]),
    (
        {"loss__gradient_penalty": 1.0, "distributed__sync_batchnorm": "true"},
        ["distributed.sync_batchnorm", "loss.gradient_penalty"],
    ),
]


@pytest.mark.parametrize(("settings", "parts"), REFUSED)
def test_what_does_not_go_together_is_one_line_and_exit_code_2(images, tmp_path, capsys, settings, parts):
    for more in ([], ["--dry-run"]):
        capsys.readouterr()
        assert command.main([*command_words(images, tmp_path / "run", **settings), *more]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: error: ")]
        assert all(part in line for part in parts), line
        assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_bounded_critic_is_accepted():
    for bound in ({"loss": {"gradient_penalty": 10.0}}, {"loss": {"r1": 1.0}}, {"model": {"spectral_norm": True}}):
        loss = LossConfig(kind="wasserstein", **bound.get("loss", {}))
        assembly._refuse_what_does_not_go_together(Config(loss=loss, model=ModelConfig(**bound.get("model", {}))))


def test_spectral_norm_makes_another_run_of_it_but_an_older_checkpoint_had_none():
    said: list[str] = []
    without, normed = Config(), Config(model=ModelConfig(spectral_norm=True))
    older = resume.identity(without, "photographs")
    del older["model.spectral_norm"]
    for identity in (older, resume.identity(without, "photographs")):
        found = SimpleNamespace(manifest={"identity": identity}, folder=Path("checkpoint"))
        resume.check_identity(without, "photographs", found, said.append)
        with pytest.raises(ConfigError, match=r"model\.spectral_norm is True, but the checkpoint .* with False"):
            resume.check_identity(normed, "photographs", found, said.append)
    assert said == []


@pytest.mark.parametrize(("lr", "ratio"), [(2e-4, 1.0), (8e-4, 4.0)])
def test_ds_own_rate_grows_with_the_batch_as_gs_does(lr, ratio):
    players = make_players(*networks(), OptimConfig(lr_d=5e-5), lr=lr, precision="fp32")
    assert players.optimizer_g.param_groups[0]["lr"] == lr
    assert players.optimizer_d.param_groups[0]["lr"] == pytest.approx(5e-5 * ratio, rel=1e-12)


SHIPPED = sorted((ROOT / "configs/techniques").glob("*.yaml"))


def test_every_technique_has_a_config():
    configs = [parse(["--config", str(path)]).config for path in [*SHIPPED, ROOT / "configs/celeba64_ttur.yaml"]]
    default = Config()
    for section in ("loss", "d_input"):
        for field in dataclasses.fields(getattr(default, section)):
            if field.name not in ("r1_every", "noise_images"):
                values = [getattr(getattr(cfg, section), field.name) for cfg in configs]
                assert any(value != field.default for value in values), f"{section}.{field.name}"
    assert {cfg.loss.kind for cfg in configs} >= {"hinge", "least_squares", "wasserstein"}
    assert any(cfg.model.spectral_norm for cfg in configs)
    assert any(cfg.optim.lr_d for cfg in configs)
    assert any(cfg.optim.lr_decay != "none" for cfg in configs)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_techniques_config_trains(path, images, tmp_path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    tiny = command_words(images, tmp_path / "run", train__max_images=8, optim__ema_half_life_images=100)
    keys = {word for word in tiny if word.startswith("--")}
    given = yaml.safe_load(path.read_text())
    assert not keys & {f"--{section}.{key}" for section in ("loss", "d_input") for key in given.get(section, {})}
    assert command.main(["--config", str(path), *tiny]) == 0
    assert [math.isfinite(row["loss_d"]) for row in rows(tmp_path / "run/stats.jsonl")] == [True, True]


def test_the_collapse_watch_reads_ds_loss_above_the_least_that_it_can_be():
    watch = WatchConfig(collapse_images=10, min_loss_d=0.01, min_diversity=0.0)
    least = Losses("bce", 0.9).least_d
    for loss_d, losses, won in (
        (0.005, Losses(), True),
        (0.02, Losses(), False),
        (least + 0.005, Losses("bce", 0.9), True),
        (least + 0.02, Losses("bce", 0.9), False),
        (0.0, Losses("hinge"), True),
        (-50.0, Losses("wasserstein"), False),
    ):
        told = CollapseWatch(watch, losses.least_d).look({"loss_d": loss_d, "diversity": 1.0}, 10)
        assert told.startswith("D has won") is won, (loss_d, losses)


def test_a_critic_that_pays_less_than_nothing_is_no_collapse_in_a_run(images, tmp_path, monkeypatch):
    monkeypatch.setattr(Losses, "real", lambda _self, outputs: outputs.float().mean() * 0 - 50)
    settings = {"loss__kind": "wasserstein", "loss__gradient_penalty": 1.0, "train__max_images": 24}
    settings |= {"watch__collapse_images": 8, "watch__on_collapse": "stop", "watch__min_diversity": 0}
    assert command.main(command_words(images, tmp_path / "run", **settings)) == 0
    assert all(row["loss_d"] < -40 for row in rows(tmp_path / "run/stats.jsonl"))
