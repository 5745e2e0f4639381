"""Settings of how the networks learn and how what they learned is judged: part of pipeline/config.py."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from typing import Literal

from pipeline.config_error import ConfigError, require


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lr: float = 2e-4
    """Adam's learning rate, of both networks. Above 0."""
    beta1: float = 0.5
    """Decay of Adam's first moment. At least 0, below 1."""
    beta2: float = 0.999
    """Decay of Adam's second moment. At least 0, below 1."""
    lr_rule: Literal["none", "sqrt", "linear"] = "none"
    """How lr grows with train.batch_size / lr_rule_batch_size: not at all, by its root, or in proportion."""
    lr_rule_batch_size: int = 128
    """The batch size at which lr holds as it stands. At least 1."""
    lr_d: float = 0.0
    """The discriminator's learning rate where it has one of its own (two time-scale rule, Heusel et al. 2017); 0:
    optim.lr. At least 0."""
    lr_decay: Literal["none", "linear", "cosine"] = "none"
    """How both learning rates fall to 0 at the end of the run; raising the run's length stretches the way there."""
    lr_decay_from: float = 0.5
    """Share of the run after which they begin to fall. At least 0, below 1."""
    backend: Literal["torch", "triton", "apex"] = "torch"
    """Whose Adam: torch's fused one; triton, ours, which moves G's average in the same pass over its weights (on a CPU
    by torch's operators); or FusedAdam of NVIDIA's apex, which is built apart and for GPUs only."""
    ema_half_life_images: int = 5000
    """Images after which an older generator weighs half in the averaged one; 0: no average is kept."""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "optim.lr", "above 0 and finite", self.lr)
        require(0 <= self.lr_d < math.inf, "optim.lr_d", "at least 0 and finite", self.lr_d)
        for key in ("beta1", "beta2", "lr_decay_from"):
            require(0 <= getattr(self, key) < 1, f"optim.{key}", "at least 0 and below 1", getattr(self, key))
        require(self.lr_rule_batch_size >= 1, "optim.lr_rule_batch_size", "at least 1", self.lr_rule_batch_size)
        require(self.ema_half_life_images >= 0, "optim.ema_half_life_images", "at least 0", self.ema_half_life_images)

    def scaled_lr(self, batch_size: int) -> float:
        """The learning rate at this global batch size (linear: Goyal et al. 2017; sqrt: Krizhevsky 2014)."""
        ratio = batch_size / self.lr_rule_batch_size
        return self.lr * {"none": 1.0, "sqrt": ratio**0.5, "linear": ratio}[self.lr_rule]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    kind: Literal["bce", "hinge", "least_squares", "wasserstein"] = "bce"
    """What the two players pay: the tutorial's cross-entropy, or one of the others (Lim and Ye 2017, Mao et al. 2017,
    Arjovsky et al. 2017; the last wants loss.gradient_penalty)."""
    real_label: float = 1.0
    """What D shall say of real images, with bce and least_squares; 0.9 is one-sided label smoothing (Salimans et al.
    2016). Above 0.5, at most 1."""
    gradient_penalty: float = 0.0
    """Weight of D's penalty for a slope other than 1 between real and fake (Gulrajani et al. 2017: 10). At least 0."""
    r1: float = 0.0
    """Weight gamma of D's penalty for its slope on real images (Mescheder et al. 2018: 10). At least 0."""
    r1_every: int = 16
    """R1 only at each so many-th step, so many times as heavy (Karras et al. 2020). At least 1."""
    d_steps: int = 1
    """Steps of D for each of G; every one takes a batch of its own. At least 1."""

    def __post_init__(self) -> None:
        smoothed = self.kind in ("bce", "least_squares")
        require(0.5 < self.real_label <= 1, "loss.real_label", "above 0.5 and at most 1", self.real_label)
        require(smoothed or self.real_label == 1, "loss.real_label", f"1 with {self.kind}", self.real_label)
        for key in ("gradient_penalty", "r1"):
            require(0 <= getattr(self, key) < math.inf, f"loss.{key}", "at least 0 and finite", getattr(self, key))
        for key in ("r1_every", "d_steps"):
            require(getattr(self, key) >= 1, f"loss.{key}", "at least 1", getattr(self, key))


@dataclass(frozen=True, kw_only=True)
class DiscriminatorInputConfig:
    augment: list[Literal["color", "translation", "cutout"]] = field(default_factory=list)
    """Differentiable augmentation of real and fake images alike, for few photographs (Zhao et al. 2020)."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on real and fake images alike, of [-1, 1] pixels, at the start of the run
    (instance noise, Sonderby et al. 2017). At least 0."""
    noise_images: int = 100_000
    """Images after which that noise has fallen to nothing, in a straight line. At least 1."""

    def __post_init__(self) -> None:
        twice = len(set(self.augment)) < len(self.augment)
        require(not twice, "d_input.augment", "a list without repetition", self.augment)
        require(0 <= self.noise < math.inf, "d_input.noise", "at least 0 and finite", self.noise)
        require(self.noise_images >= 1, "d_input.noise_images", "at least 1", self.noise_images)


METRICS = {
    "swd": "lower",
    "ms_ssim": "lower",
    "fid": "lower",
    "kid": "lower",
    "inception_score": "higher",
    "precision": "higher",
    "recall": "higher",
    "density": "higher",
    "coverage": "higher",
}
"""What an evaluation can measure, and whether lower or higher is better."""

INCEPTION_METRICS = tuple(name for name in METRICS if name not in ("swd", "ms_ssim"))
"""Those that look through the Inception network, whose weights must be there."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every_images: int = 0
    """Images between evaluations of G's average, each with a checkpoint; 0: none."""
    metrics: list[str] = field(default_factory=lambda: ["swd", "ms_ssim"])
    """What is measured: swd, ms_ssim and, with Inception's weights, fid, kid, inception_score, precision, recall,
    density, coverage."""
    num_images: int = 5000
    """Generated images, and as many real ones. At least 2; published figures use 50000."""
    best: str = "swd"
    """The metric by which a checkpoint is the best so far, and is kept."""
    patience: int = 0
    """Evaluations in a row without a better one, and the run ends well; 0: it goes on."""
    inception_weights: str = ""
    """File with Inception's weights; empty: inception-2015-12-05.pth in the cache folder."""

    def __post_init__(self) -> None:
        require(self.every_images >= 0, "eval.every_images", "at least 0", self.every_images)
        for name in self.metrics:
            if name not in METRICS:
                close = difflib.get_close_matches(name, METRICS, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ConfigError(f"eval.metrics must be of {', '.join(METRICS)}, got {name!r}{hint}")
        require(bool(self.metrics), "eval.metrics", "at least one of " + ", ".join(METRICS), self.metrics)
        require(self.num_images >= 2, "eval.num_images", "at least 2", self.num_images)
        require(not self.every_images or self.best in self.metrics, "eval.best", "one of eval.metrics", self.best)
        require(self.patience >= 0, "eval.patience", "at least 0", self.patience)
