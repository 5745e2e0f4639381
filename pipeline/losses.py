"""The loss of the two players, from logits.  (N,) logits in, float32 scalars out."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def real_loss(logits: Tensor) -> Tensor:
    """What D pays for real images: mean of -log sigmoid(logits)."""
    return F.softplus(-logits.float()).mean()


def fake_loss(logits: Tensor) -> Tensor:
    """What D pays for fake images: mean of -log(1 - sigmoid(logits))."""
    return F.softplus(logits.float()).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Binary cross-entropy with real as 1 and fake as 0, the two means summed.

    Args:
        real_logits, fake_logits: (N,), any float dtype; D's output before the sigmoid.

    Returns:
        Scalar, float32: mean of -log sigmoid(real) plus mean of -log(1 - sigmoid(fake)).  Goodfellow et al. 2014.
    """
    return real_loss(real_logits) + fake_loss(fake_logits)


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating loss: the generator wants its pictures called real.

    Args:
        fake_logits: (N,), any float dtype; D's output before the sigmoid.

    Returns:
        Scalar, float32: mean of -log sigmoid(fake).  Goodfellow et al. 2014, section 3.
    """
    return F.softplus(-fake_logits.float()).mean()
