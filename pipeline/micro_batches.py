"""A step over a batch that does not fit into memory: parts of it in turn, their gradients added up.

Losses and penalties are means over the batch, so each part's gradients count by its share.  What differs from the whole
batch at once is BatchNorm: every part is normalised by statistics of its own, as every rank's share is.  W parts on one
rank thus have the losses and gradients of W ranks with a part each.  Running statistics move once for each part, in
order, and so W times as far in a step.

G's images are drawn twice: for D without a way back, so that only one part's activations are kept at a time, and once
more for G's half.  They are the same images, since G has not moved in between.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from pipeline.step import FAKE, REAL, FastStep, Turn


class MicroBatchStep(FastStep):
    """FastStep's round with N images taken micro_batch at a time: one update and one all-reduce a network as ever."""

    def __init__(self, *args: Any, micro_batch: int, **options: Any) -> None:
        """
        Args:
            micro_batch: images of a part; divides N.
        """
        super().__init__(*args, **options)
        self.micro_batch = micro_batch

    def _parts(self, name: str, real: Tensor, latents: Tensor, turn: Turn) -> Iterator[tuple[Tensor, Tensor, Turn]]:
        """Each part's images, latents and turn; gradients travel to the other ranks with the last one only.

        Args:
            name: of the network that learns.
        """
        pieces = [each.split(self.micro_batch) for each in (real, latents, turn.numbers)]
        parallel = self.players.parallel.get(name)
        count = len(real) // self.micro_batch
        for i, (images, z, numbers) in enumerate(zip(*pieces, strict=True)):
            apart: AbstractContextManager[Any] = contextlib.nullcontext()
            if parallel is not None and i + 1 < count:
                apart = parallel.no_sync()
            with apart:
                yield images, z, dataclasses.replace(turn, numbers=numbers)

    def play(self, real: Tensor, latents: Tensor, turn: Turn) -> Tensor:
        p = self.players
        assert len(real) % self.micro_batch == 0
        share = self.micro_batch / len(real)
        fakes, logits, losses, penalties = [], [], [], []
        statistics = [(buffer, buffer.clone()) for buffer in p.generator.buffers()]
        p.optimizer_d.zero_grad()
        for i, (images, z, part) in enumerate(self._parts("discriminator", real, latents, turn)):
            with self.autocast():
                with torch.no_grad():
                    fake = p.generator(z)
                    seen_fake = self.as_d_sees(fake, FAKE, part)
                seen_real = self.as_d_sees(images, REAL, part)
                loss, *both = self.tell_apart(seen_real, seen_fake)
            penalised = self.with_penalties(loss, seen_real, seen_fake, part)
            if i == 0:
                self.before_backward()
            self.mark("forward")
            p.scaler_d.scale(share * penalised).backward()
            self.mark("backward")
            fakes.append(fake)
            losses.append(loss.detach())
            logits.append(torch.stack([each.detach() for each in both]))
            penalties.append(self.penalty.clone())
        if turn.g_learns:  # that G draws for D does not count: it draws the same again to learn
            for buffer, before in statistics:
                buffer.copy_(before)
        self.penalty.copy_(torch.stack(penalties).mean(0))
        self.update_d()

        real_logits, fake_logits = torch.cat(logits, dim=1)
        if turn.g_learns:
            loss_g, after_logits = self._teach_g(real, latents, turn)
        else:
            loss_g, after_logits = self.spare_g(fake_logits)
        loss_d = torch.stack(losses).mean()
        return self.meters((loss_d, loss_g), (real_logits, fake_logits, after_logits), real, torch.cat(fakes))

    def _teach_g(self, real: Tensor, latents: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        """G's half: its loss, and D's outputs after D's update."""
        p = self.players
        share = self.micro_batch / len(real)
        losses, logits = [], []
        p.optimizer_g.zero_grad()
        for _, z, part in self._parts("generator", real, latents, turn):
            with self.autocast():
                after = self.judge(self.as_d_sees(p.forward_g(z), FAKE, part))
                loss = self.loss_g(after)
            self.mark("forward")
            p.scaler_g.scale(share * loss).backward()
            self.mark("backward")
            losses.append(loss.detach())
            logits.append(after.detach())
        self.update_g()
        return torch.stack(losses).mean(), torch.cat(logits)
