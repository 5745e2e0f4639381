"""Settings of which implementation does the work: part of pipeline/config.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    networks: Literal["auto", "torch", "native"] = "auto"
    """What computes both networks: torch's operators, or C kernels (in bf16 with AMX, in fp32 with AVX2 or
    AVX-512); auto: the fastest here, measured at the run's first start."""
    batchnorm: Literal["auto", "torch", "triton"] = "auto"
    """What computes BatchNorm with its activation; auto: the fastest here, measured at the run's first start."""
    image_ends: Literal["auto", "torch", "triton"] = "auto"
    """What computes the layers at the images with their activations, D's first and G's last; auto: the fastest here,
    measured at the run's first start."""
    gather: Literal["auto", "torch", "triton", "native"] = "auto"
    """What picks a batch from decoded images, mirrors it and turns its bytes into [-1, 1]; auto: the fastest here,
    measured at the run's first start."""
    choices: str = ""
    """A JSON file such as a run's choices.json, whose choices stand above all others and are not measured."""
