"""One training step: D learns from real and fake, then G learns from D.

`ReferenceStep` is the tutorial's order of work.  `FastStep` gives the same losses, gradients and running statistics
with less: one backward for D, no weight gradients of D in G's half (9 % of the FLOPs), one all-reduce a network, and,
where a device likes large batches, real and fake in one pass of 2N with separate BatchNorm statistics.  The same round
compiled is step_compiled.py's, and as one CUDA graph step_graph.py's.

Whatever makes training hold up better is off by default and then leaves no trace: other losses (pipeline/losses.py),
penalties on D's slope (penalties.py), augmentation and noise before D (diffaugment.py, instance_noise.py), several
steps of D for one of G, learning rates that fall (schedule.py).  What of it is drawn is a function of seed and image
number, and when it happens of the images seen.

A gradient that is not finite moves nothing: the optimisers look at a flag on the device, so the host need not wait to
find out.  Gradients are averaged over the ranks before anyone looks, so all ranks skip the same steps.

Legend: N images of this rank, C channels, H x W pixels, nz the latent's length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.normalize import normalize
from pipeline import precision as precision_
from pipeline.config import DiscriminatorInputConfig, LossConfig
from pipeline.diffaugment import diffaugment, draws
from pipeline.instance_noise import instance_noise, std_at
from pipeline.losses import Losses
from pipeline.optimisers import that_averages
from pipeline.penalties import gradient_penalty, r1
from pipeline.philox import Stream, uniform_float32
from pipeline.players import Players
from pipeline.precision import Precision
from pipeline.schedule import Schedule

METERS = ("loss_d", "loss_g", "d_real", "d_fake_before", "d_fake_after", "spread_real", "spread_fake")
"""What a step measures, in this order: the tutorial's Loss_D, Loss_G, D(x), D(G(z)) before and after D's update, then
how far the real and the generated images of the batch lie apart (standard deviation over them, of [-1, 1] pixels).

Loss_D is without penalties, so that runs with and without them compare.  D(x) and D(G(z)) are in [0, 1] with every
loss (Losses.verdict).  In a step in which G does not learn, Loss_G and D(G(z)) after are those before D's update."""

SPREAD_STRIDE = 4
"""Every so many-th row and column says enough of the spread, for a sixteenth of the work."""

REAL, FAKE = 0, 1
"""Two batches share their image numbers; this tells their draws apart."""


@dataclass(frozen=True)
class Turn:
    """What is special about this step of the run."""

    numbers: Tensor
    """(N,) int64: the image numbers of this rank's batch."""
    g_learns: bool
    r1_due: bool
    noise_std: float | Tensor
    """Of instance noise; the number 0: none.  A tensor where a CUDA graph reads it."""
    ema_weight: float | Tensor
    """How far G's average moves towards G: 1 all the way."""


class Step:
    """What the loop calls: (images, latents) in, meters out.  Nothing in it waits for the device."""

    def __init__(
        self,
        players: Players,
        precision: Precision,
        *,
        channels_last: bool,
        ema_half_life_images: int,
        joint: bool = False,
        guarded: bool = True,
        min_loss_scale: float = 1.0,
        loss: LossConfig | None = None,
        d_input: DiscriminatorInputConfig | None = None,
        schedule: Schedule | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            joint: real and fake in one pass of 2N.
            guarded: skip updates that are not finite; fp16's scalers do so in any case.
            min_loss_scale: where an fp16 scale halves no further, and a skipped update counts as hopeless.
            loss, d_input: what is paid, and what is done to images before D sees them; None: the tutorial's.
            schedule: of both learning rates, whose whole values are those the optimisers come with.
            seed: of what is drawn for penalties, augmentation and noise.
        """
        self.players = players
        self.precision = precision
        self.channels_last = channels_last
        self.ema_half_life_images = ema_half_life_images
        self.joint = joint
        self.guarded = guarded
        self.min_loss_scale = min_loss_scale
        self.loss = loss or LossConfig()
        self.losses = Losses(self.loss.kind, self.loss.real_label)
        self.d_input = d_input or DiscriminatorInputConfig()
        self.schedule = schedule or Schedule()
        self.seed = seed
        self._whole_lr = [
            (each, float(each.param_groups[0]["lr"])) for each in (players.optimizer_g, players.optimizer_d)
        ]
        self.device = next(players.generator.parameters()).device
        self.before_backward: Callable[[], None] = lambda: None
        """Called once a step where this rank's own work ends and waiting for the others begins."""
        self.mark: Callable[[str], None] = lambda _phase: None
        """Called where a part of the step ends, with its name: one of pipeline.profiling.PHASES."""
        self.skipped = torch.zeros(2, device=self.device)
        """(2,) 0 or 1: whether the last step left out D's and G's update."""
        self.hopeless = torch.zeros((), device=self.device)
        """() above 0: an update was left out for another reason than an fp16 scale that may still fall."""
        self.penalty = torch.zeros(2, device=self.device)
        """(2,) what D paid in the last step for its slope, by loss.gradient_penalty and loss.r1, and 1 where it did."""
        self._one = torch.ones((), device=self.device)
        self._statistics = [
            b for n in (players.generator, players.discriminator) for b in n.buffers() if b.is_floating_point()
        ]
        self._statistics_before = [b.clone() for b in self._statistics]

    def __call__(
        self, images: Tensor, latents: Tensor, images_seen: int, batch_size: int, numbers: Tensor | None = None
    ) -> Tensor:
        """Train both networks on one batch.

        Args:
            images: (N, H, W, C) uint8 on the training device, or what kernels.normalize makes of it.
            latents: (N, nz) float32.
            images_seen: global images before this step; paces the average's ramp, the learning rates and the noise, and
                says whether R1 and G's half are due.
            batch_size: images of the global batch.
            numbers: (N,) int64 on the device, the images' numbers, from which penalties, augmentation and noise are
                drawn; None: those of one rank that never went back.

        Returns:
            (7,) float32 on the device: METERS, of this rank's images; not finite where the forward pass was not.
        """
        self.mark("data")
        if self.schedule.kind != "none":
            self._scale_learning_rates(self.schedule.factor(images_seen))
        return self._run(images, latents, self._turn(images_seen, batch_size, len(images), numbers))

    def _run(self, images: Tensor, latents: Tensor, turn: Turn) -> Tensor:
        """The step's work on the device, all of it: what differs from step to step comes as tensors or in the turn."""
        real = images
        if not images.is_floating_point():
            real = normalize(images, precision_.dtype_of(self.precision), self.channels_last)
        if self.guarded:
            torch._foreach_copy_(self._statistics_before, self._statistics)
        averaging = that_averages(self.players.optimizer_g) if turn.g_learns else None
        if averaging:
            averaging.ema_weight = turn.ema_weight
        meters = self.play(real, latents, turn)
        self.mark("rest")
        if self.guarded:  # running statistics would keep a NaN for ever
            bad = ~torch.isfinite(meters[:2]).all()
            for now, before in zip(self._statistics, self._statistics_before, strict=True):
                torch.where(bad, before, now, out=now)
        if self.players.ema and not averaging:
            self._move_average(turn.ema_weight)
        self.mark("optimiser")
        return meters

    def _turn(self, images_seen: int, batch_size: int, count: int, numbers: Tensor | None) -> Turn:
        if numbers is None:
            numbers = torch.arange(images_seen, images_seen + count, device=self.device)
        number = images_seen // batch_size
        return Turn(
            numbers,
            g_learns=(number + 1) % self.loss.d_steps == 0,
            r1_due=bool(self.loss.r1) and number % self.loss.r1_every == 0,
            noise_std=std_at(self.d_input.noise, self.d_input.noise_images, images_seen),
            ema_weight=self.ema_weight(images_seen, batch_size),
        )

    def apart(self) -> contextlib.AbstractContextManager[None]:
        """The context to wrap the networks in for many ranks."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Let go of what must not outlive the ranks' process group; no step may follow."""

    def news(self) -> str:
        """What a person should know of the steps since this was last asked; mostly nothing."""
        return ""

    def play(self, real: Tensor, latents: Tensor, turn: Turn) -> Tensor:
        """One round of the game; real is (N, C, H, W) in [-1, 1]."""
        raise NotImplementedError

    def finish(self) -> None:
        """Bring to its end what a step has left under way; to be called before anybody else looks at the players."""

    def _scale_learning_rates(self, factor: float) -> None:
        """Both networks' at this share of their whole values."""
        for optimizer, whole in self._whole_lr:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):  # a CUDA graph reads it where it lies
                    group["lr"].fill_(factor * whole)
                else:
                    group["lr"] = factor * whole

    def as_d_sees(self, images: Tensor, part: int, turn: Turn) -> Tensor:
        """The images augmented, then under noise: what D judges, and what its penalties are taken at.

        Args:
            images: (N, C, H, W) in [-1, 1].
            part: REAL or FAKE.

        Returns:
            (N, C, H, W), differentiable in the images; the images themselves where neither is on.
        """
        if self.d_input.augment:
            images = diffaugment(images, self.d_input.augment, draws(self.seed, turn.numbers, part))
        if not isinstance(turn.noise_std, Tensor) and not turn.noise_std:
            return images
        return instance_noise(images, turn.noise_std, self.seed, part, turn.numbers)

    def draw(self, latents: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        """G's images, and the same as D sees them in both halves; without a way back where G does not learn."""
        with torch.set_grad_enabled(turn.g_learns):
            fake = self.players.forward_g(latents)
            return fake, self.as_d_sees(fake, FAKE, turn)

    def with_penalties(self, loss: Tensor, real: Tensor, fake: Tensor, turn: Turn) -> Tensor:
        """D's loss and what it pays for its slope in this step; the loss itself where nothing is due.

        Args:
            real, fake: (N, C, H, W), as D sees them.
        """
        # D unwrapped: its parameters are the same, and one backward after all forward passes is one all-reduce.
        discriminator, cfg = self.players.discriminator, self.loss
        paid = []
        if cfg.gradient_penalty:
            mix = uniform_float32(self.seed, Stream.PENALTY, turn.numbers, 1)[:, 0]
            paid.append(cfg.gradient_penalty * gradient_penalty(discriminator, real, fake, mix, self.precision))
        if turn.r1_due:
            paid.append(cfg.r1 * cfg.r1_every * r1(discriminator, real, self.precision))
        self.penalty.zero_()
        for penalty in paid:
            loss = loss + penalty
            self.penalty[0] += penalty.detach()
            self.penalty[1] = 1
        return loss

    def ema_weight(self, images_seen: int, batch_size: int) -> float:
        """How far G's average moves towards G in the step that begins after images_seen images.

        The half-life grows with the images seen, to one twentieth of them at most, so that the average does not
        drag the first noise along (Karras et al. 2020, StyleGAN2's ramp-up).
        """
        half_life = min(self.ema_half_life_images, 0.05 * images_seen)
        keep = 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0
        return 1.0 - keep

    def average(self, images_seen: int, batch_size: int) -> None:
        """Move G's average towards G."""
        self._move_average(self.ema_weight(images_seen, batch_size))

    def _move_average(self, weight: float | Tensor) -> None:
        live = [p.detach() for p in self.players.generator.parameters()]
        averages = list(self.players.ema.values())
        if isinstance(weight, float):
            torch._foreach_lerp_(averages, live, weight)
            return
        # No lerp takes one weight for all that lies on the device.  Where the weight is 1 this is off by a rounding.
        steps = torch._foreach_sub(live, averages)
        torch._foreach_mul_(steps, weight)
        torch._foreach_add_(averages, steps)

    def autocast(self) -> Any:
        return precision_.autocast(self.precision, self.device)

    def judge(self, images: Tensor) -> Tensor:
        """(N,) D's outputs for images of G's half: the gradient reaches the images, and no parameter of D.

        D unwrapped, since nothing of it is to be averaged over the ranks.
        """
        discriminator = self.players.discriminator.requires_grad_(False)
        outputs = discriminator(images)
        discriminator.requires_grad_(True)
        return outputs

    def update_d(self) -> None:
        """D's update, left out where a gradient is not finite."""
        self.mark("backward")
        self._update(self.players.optimizer_d, self.players.scaler_d, 0)
        self.mark("optimiser")

    def update_g(self) -> None:
        """G's update, left out where a gradient is not finite or, without scalers, D's was left out."""
        self.mark("backward")
        self._update(self.players.optimizer_g, self.players.scaler_g, 1)
        self.mark("optimiser")

    def loss_d(self, real_outputs: Tensor, fake_outputs: Tensor) -> Tensor:
        """What D pays, before penalties."""
        return self.losses.discriminator(real_outputs, fake_outputs)

    def loss_g(self, fake_outputs: Tensor) -> Tensor:
        """What G pays."""
        return self.losses.generator(fake_outputs)

    def spare_g(self, fake_outputs: Tensor) -> tuple[Tensor, Tensor]:
        """G does not learn in this step; what it would pay, and D's outputs, both before D's update."""
        self.skipped[1] = 0
        return self.losses.generator(fake_outputs.detach()), fake_outputs

    def _update(self, optimizer: Any, scaler: Any, player: int) -> None:
        if scaler.is_enabled():
            scaler.unscale_(optimizer)
            # The sum that GradScaler.step hands to a fused optimiser; its public way to know is .item().
            found = sum(scaler._found_inf_per_device(optimizer).values())
            at_the_floor = scaler._scale <= self.min_loss_scale
            scaler.step(optimizer)
            scaler.update()
            scaler._scale.clamp_(min=self.min_loss_scale)
            hopeless = found * at_the_floor
        elif self.guarded:
            found = torch.zeros((), device=self.device) if player == 0 else self.skipped[0].clone()
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, self._one)
            optimizer.grad_scale, optimizer.found_inf = None, found
            optimizer.step()
            hopeless = found
        else:
            optimizer.step()
            return
        self.skipped[player] = found
        if player == 0:
            self.hopeless.copy_(hopeless)
        else:
            self.hopeless += hopeless

    def meters(
        self, losses: tuple[Tensor, Tensor], logits: tuple[Tensor, Tensor, Tensor], real: Tensor, fake: Tensor
    ) -> Tensor:
        """(7,) METERS from D's and G's losses, D's logits of real and of fake before and after, and both batches."""
        probabilities = [self.losses.verdict(each.detach()).mean() for each in logits]
        spreads = [
            batch.detach()[:, :, ::SPREAD_STRIDE, ::SPREAD_STRIDE].float().std(0, correction=0).mean()
            for batch in (real, fake)
        ]
        return torch.stack([*(loss.detach() for loss in losses), *probabilities, *spreads])


class ReferenceStep(Step):
    """The tutorial's order: D on real and backward, D on fake and backward, D steps; D on that fake, G steps."""

    def play(self, real: Tensor, latents: Tensor, turn: Turn) -> Tensor:
        p = self.players
        p.optimizer_d.zero_grad()
        with self.autocast():
            seen_real = self.as_d_sees(real, REAL, turn)
            real_logits = p.forward_d(seen_real)
            loss_real = self.losses.real(real_logits)
        self.before_backward()
        self.mark("forward")
        p.scaler_d.scale(loss_real).backward()
        self.mark("backward")
        with self.autocast():
            fake, seen_fake = self.draw(latents, turn)
            fake_logits = p.forward_d(seen_fake.detach())
            loss_fake = self.losses.fake(fake_logits)
        penalised = self.with_penalties(loss_fake, seen_real, seen_fake, turn)
        self.mark("forward")
        p.scaler_d.scale(penalised).backward()
        self.update_d()
        if turn.g_learns:
            p.optimizer_g.zero_grad()
            with self.autocast():
                after_logits = p.discriminator(seen_fake)
                loss_g = self.losses.generator(after_logits)
            self.mark("forward")
            p.scaler_g.scale(loss_g).backward()
            self.update_g()
        else:
            loss_g, after_logits = self.spare_g(fake_logits)
        return self.meters((loss_real + loss_fake, loss_g), (real_logits, fake_logits, after_logits), real, fake)


class Seen(NamedTuple):
    """What a step has of D's first look at a batch."""

    fake: Tensor
    """(N, C, H, W): G's images."""
    seen_real: Tensor
    """(N, C, H, W), as D sees them."""
    seen_fake: Tensor
    """(N, C, H, W), as D sees them, with the way back to G."""
    loss_d: Tensor
    real_logits: Tensor
    fake_logits: Tensor


class FastStep(Step):
    """The same round with less work."""

    def tell_apart(self, seen_real: Tensor, seen_fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """D's loss, and its outputs for real and for fake images; no gradient reaches G."""
        # One pass of 2N suits a GPU, where launches count; on a CPU two passes are as fast (232 and 231 images/s
        # at N = 128 in bf16, 2026-11) and need no copy of the two halves.
        if self.joint:
            both = torch.cat([seen_real, seen_fake.detach()])
            real_logits, fake_logits = self.players.forward_d(both, num_groups=2).chunk(2)
        else:
            real_logits, fake_logits = self.players.forward_d(seen_real), self.players.forward_d(seen_fake.detach())
        return self.loss_d(real_logits, fake_logits), real_logits, fake_logits

    def look(self, real: Tensor, latents: Tensor, turn: Turn) -> Seen:
        """Draw, and let D judge what is real and what is drawn."""
        with self.autocast():
            fake, seen_fake = self.draw(latents, turn)
            seen_real = self.as_d_sees(real, REAL, turn)
            return Seen(fake, seen_real, seen_fake, *self.tell_apart(seen_real, seen_fake))

    def play(self, real: Tensor, latents: Tensor, turn: Turn) -> Tensor:
        p = self.players
        fake, seen_real, seen_fake, loss_d, real_logits, fake_logits = self.look(real, latents, turn)
        p.optimizer_d.zero_grad()
        penalised = self.with_penalties(loss_d, seen_real, seen_fake, turn)
        self.before_backward()
        self.mark("forward")
        p.scaler_d.scale(penalised).backward()
        self.update_d()

        if turn.g_learns:
            with self.autocast():
                after_logits = self.judge(seen_fake)
                loss_g = self.loss_g(after_logits)
            p.optimizer_g.zero_grad()
            self.mark("forward")
            p.scaler_g.scale(loss_g).backward()
            self.update_g()
        else:
            loss_g, after_logits = self.spare_g(fake_logits)
        return self.meters((loss_d, loss_g), (real_logits, fake_logits, after_logits), real, fake)
