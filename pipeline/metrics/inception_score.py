"""Inception Score: each picture clearly of one class, all classes among the pictures (Salimans et al. 2016, section 4).

The classes are ImageNet's, and faces are none of them: on faces it compares runs with each other and says little else.

Legend: N images, C classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.config_error import require


def inception_score(logits: Tensor, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Mean and standard deviation over parts of exp(mean of KL(p(class | image) || p(class))): from 1 to C.

    Args:
        logits: (N, C) float, Inception's without bias.
        splits: parts of the images; each has a p(class) of its own, so that the score depends on N / splits.
        seed: of the images' order; as it stands, torch-fidelity's.

    Raises:
        ConfigError: fewer images than parts.
    """
    count = len(logits)
    require(count >= splits, "eval.num_images", f"at least {splits} for inception_score", count)
    # NumPy's generator, whose numbers never change, and not philox: so the parts are torch-fidelity's.
    order = torch.from_numpy(np.random.RandomState(seed).permutation(count)).to(logits.device)
    logs = logits[order].double().log_softmax(1)
    scores = []
    for i in range(splits):
        part = logs[i * count // splits : (i + 1) * count // splits]
        overall = part.exp().mean(0).log()
        scores.append((part.exp() * (part - overall)).sum(1).mean().exp())
    drawn = torch.stack(scores)
    return float(drawn.mean()), float(drawn.std(correction=0))
