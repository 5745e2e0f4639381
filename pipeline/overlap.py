"""A step that leaves G's gradients on their way to the other ranks while D looks at the next real images.

Nothing but G's update needs them, and nothing needs G's update before G draws again.  So a step ends with G's
gradients under way, and the next one brings G's update to its end after D's pass over the real images: the same
arithmetic in the same order for each network, equal to FastStep's to the bit.

What it costs: real and fake go through D one after the other, so the one pass of both (on a GPU) is not to be had; and
that an update of G was left out is known a step later.  Whoever looks at the players between two steps calls finish()
first.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipeline.optimisers import that_averages
from pipeline.step import REAL, FastStep, Seen, Turn


class OverlappedStep(FastStep):
    """FastStep's round, with G's update where the next step needs it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        assert not self.joint
        assert that_averages(self.players.optimizer_g) is None, "its average would follow an update still to come"
        self._late: list[float | Tensor] | None = None
        """G's learning rates of an update that is still to be made."""
        self._average: float | Tensor | None = None
        """How far G's average is to follow that update."""
        self._g_is_new = False
        """Whether `hopeless` tells of an update of G that no vote has counted yet."""

    def look(self, real: Tensor, latents: Tensor, turn: Turn) -> Seen:
        # One context for both passes: D's weights are then rounded once, and gradients added up as FastStep adds them.
        with self.autocast():
            seen_real = self.as_d_sees(real, REAL, turn)
            real_logits = self.players.forward_d(seen_real)
            self.mark("forward")
            self.finish()
            fake, seen_fake = self.draw(latents, turn)
            fake_logits = self.players.forward_d(seen_fake.detach())
            loss = self.loss_d(real_logits, fake_logits)
        return Seen(fake, seen_real, seen_fake, loss, real_logits, fake_logits)

    def update_d(self) -> None:
        """D's update; hopeless then holds what was found of G's last one as well, which the vote has not seen yet."""
        of_g = self.hopeless.clone() if self._g_is_new else None
        super().update_d()
        if of_g is not None:
            self.hopeless += of_g
        self._g_is_new = False

    def update_g(self) -> None:
        """G's update, left for finish()."""
        self.mark("backward")
        rates = [group["lr"] for group in self.players.optimizer_g.param_groups]
        self._late = [lr.clone() if isinstance(lr, Tensor) else lr for lr in rates]

    def _move_average(self, weight: float | Tensor) -> None:
        if self._late is None:  # G did not learn in this step
            super()._move_average(weight)
        else:
            self._average = weight

    def finish(self) -> None:
        if self._late is None:
            return
        if self.players.late is not None:
            self.players.late.wait()
            self.mark("communication")
        groups = self.players.optimizer_g.param_groups
        now = [group["lr"] for group in groups]
        for group, lr in zip(groups, self._late, strict=True):
            group["lr"] = lr
        self.hopeless.zero_()
        super().update_g()
        if self.guarded and not self.players.scaler_g.is_enabled():
            # Left out because D's was: that was counted with D's, a step ago.
            self.skipped[1] = (self.skipped[1] - self.skipped[0]).clamp(min=0)
            self.hopeless.copy_(self.skipped[1])
        self._g_is_new = True
        for group, lr in zip(groups, now, strict=True):
            group["lr"] = lr
        self._late = None
        if self._average is not None:
            super()._move_average(self._average)
            self._average = None
