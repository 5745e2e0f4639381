"""What the two players pay, from D's outputs.  (N,) of any float dtype in, float32 scalars out.

    kind           D for real images x           D for generated ones G(z)     G
    bce            mean softplus(-D(x))          mean softplus(D(G(z)))        mean softplus(-D(G(z)))
    hinge          mean max(0, 1 - D(x))         mean max(0, 1 + D(G(z)))      -mean D(G(z))
    least_squares  mean (D(x) - 1)^2 / 2         mean D(G(z))^2 / 2            mean (D(G(z)) - 1)^2 / 2
    wasserstein    -mean D(x)                    mean D(G(z))                  -mean D(G(z))

D's output is a logit with bce and hinge, the label itself with least_squares (1 real, 0 generated), and a score without
a zero of its own with wasserstein.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def real_loss(logits: Tensor) -> Tensor:
    """What D pays for real images: mean of -log sigmoid(logits)."""
    return F.softplus(-logits.float()).mean()


def fake_loss(logits: Tensor) -> Tensor:
    """What D pays for fake images: mean of -log(1 - sigmoid(logits))."""
    return F.softplus(logits.float()).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating loss: the generator wants its pictures called real.

    Args:
        fake_logits: (N,), any float dtype; D's output before the sigmoid.

    Returns:
        Scalar, float32: mean of -log sigmoid(fake).  Goodfellow et al. 2014, section 3.
    """
    return F.softplus(-fake_logits.float()).mean()


@dataclass(frozen=True)
class Losses:
    """One kind of loss for both players; the default is the tutorial's.

    bce: Goodfellow et al. 2014.  hinge: Lim and Ye 2017 (Geometric GAN); Miyato et al. 2018, equations 16 and 17.
    least_squares: Mao et al. 2017, equation 9, which has the targets 1 and 0.  wasserstein: Arjovsky et al. 2017,
    equation 3, with D as the critic.
    """

    kind: str = "bce"
    real_label: float = 1.0
    """What D shall say of real images, with bce and least_squares (one-sided label smoothing, Salimans et al. 2016,
    section 3.4).  G still wants to be called 1."""

    def real(self, outputs: Tensor) -> Tensor:
        """What D pays for real images."""
        if self.kind == "bce":
            loss = real_loss(outputs)
            # Cross-entropy with the label r is softplus(-x) + (1 - r) x.
            return loss if self.real_label == 1 else loss + (1 - self.real_label) * outputs.float().mean()
        if self.kind == "hinge":
            return F.relu(1 - outputs.float()).mean()
        if self.kind == "least_squares":
            return 0.5 * (outputs.float() - self.real_label).square().mean()
        assert self.kind == "wasserstein", self.kind
        return -outputs.float().mean()

    def fake(self, outputs: Tensor) -> Tensor:
        """What D pays for generated images."""
        if self.kind == "bce":
            return fake_loss(outputs)
        if self.kind == "hinge":
            return F.relu(1 + outputs.float()).mean()
        if self.kind == "least_squares":
            return 0.5 * outputs.float().square().mean()
        assert self.kind == "wasserstein", self.kind
        return outputs.float().mean()

    def discriminator(self, real_outputs: Tensor, fake_outputs: Tensor) -> Tensor:
        """What D pays for both, summed.  Goodfellow et al. 2014."""
        return self.real(real_outputs) + self.fake(fake_outputs)

    def generator(self, fake_outputs: Tensor) -> Tensor:
        """What G pays, from D's outputs for its images."""
        if self.kind == "bce":
            return generator_loss(fake_outputs)
        if self.kind == "least_squares":
            return 0.5 * (fake_outputs.float() - 1).square().mean()
        assert self.kind in ("hinge", "wasserstein"), self.kind
        return -fake_outputs.float().mean()

    def verdict(self, outputs: Tensor) -> Tensor:
        """How real D calls each image: (N,) float32 in [0, 1], what the meters D(x) and D(G(z)) are means of.

        bce: D's probability.  hinge: the sigmoid too, where 0.5 is the boundary and 0.73 the margin.  least_squares:
        the output, cut off at 0 and 1.  wasserstein: the sigmoid of the score, which is no probability: only the
        distance between D(x) and D(G(z)) says something.
        """
        return outputs.float().clamp(0, 1) if self.kind == "least_squares" else torch.sigmoid(outputs.float())

    @property
    def least_d(self) -> float:
        """The least that D can pay: 0, the entropy of a smoothed label, or minus infinity for a critic."""
        if self.kind == "wasserstein":
            return -math.inf
        if self.kind == "bce" and self.real_label < 1:
            r = self.real_label
            return -(r * math.log(r) + (1 - r) * math.log(1 - r))
        return 0.0
