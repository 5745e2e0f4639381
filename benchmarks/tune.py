"""`python -m benchmarks.data --tune`: the decoder's settings by a small search on this machine and these photographs.

One setting after the other, in the order of SEARCHED: its candidates take turns over --repeats rounds, the others as
found so far, and the one of the highest median images/s stays.  Where the best is no more than a hundredth above the
setting as it was, that one stays: a search that always moves follows the noise.  The result line `tuned` holds every
trial; `ratio_to_defaults` compares best and defaults in turns of their own, after the search, with its 95 % interval.

On a GPU: hw_decoder_load (the share of a batch that the hardware's JPEG decoder takes), threads, prefetch.  On a CPU:
threads, prefetch.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Recorder, say
from benchmarks.supplies import our_feed, timed
from pipeline.config import DataConfig
from pipeline.decode import choose_decoder
from pipeline.index import Dataset

WORTH = 1.01
"""How often as fast a candidate must be to take a setting's place."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is searched."""

    hw_decoder_load: float
    threads: int
    prefetch: int

    def words(self, device: torch.device) -> str:
        """As options of the trainer."""
        load = f"--data.hw_decoder_load {self.hw_decoder_load:g} " if device.type == "cuda" else ""
        return f"{load}--data.workers {self.threads} --data.prefetch {self.prefetch}"


def candidates(device: torch.device, cores: int) -> dict[str, list[Any]]:
    """The values to try of each setting, in the order of the search."""
    threads = sorted({max(1, cores // 4), max(1, cores // 2), cores, cores + cores // 2})
    found: dict[str, list[Any]] = {"threads": threads, "prefetch": [1, 2, 3, 5]}
    if device.type == "cuda":
        found = {"hw_decoder_load": [0.0, 0.3, 0.5, 0.65, 0.8, 0.9, 1.0]} | found
    return found


class Search:
    """Trials of settings, each a feed that is opened, drained, timed and closed.

    Args:
        args: batch, seconds and repeats of benchmarks.data.
    """

    def __init__(self, args: argparse.Namespace, cfg: DataConfig, dataset: Dataset, device: torch.device) -> None:
        self.args, self.cfg, self.dataset, self.device = args, cfg, dataset, device
        self.trials: list[dict[str, Any]] = []

    def rate(self, settings: Settings) -> float:
        """Images a second of one trial."""
        own = dataclasses.replace(
            self.cfg, cache="none", hw_decoder_load=settings.hw_decoder_load, prefetch=settings.prefetch
        )
        supply = our_feed(own, self.dataset, self.device, self.args.batch, settings.threads, None)
        return timed(supply, self.args.batch, self.args.seconds, settings.prefetch + 3, self.device)[0]

    def compare(self, settings: Sequence[Settings]) -> list[list[float]]:
        """Images a second of each, round by round, in turns."""
        by_name = {each.words(self.device): each for each in settings}
        rates: dict[str, list[float]] = {name: [] for name in by_name}
        for _, name in harness.turns(list(by_name), self.args.repeats):
            rates[name].append(self.rate(by_name[name]))
        for name, each in by_name.items():
            median = statistics.median(rates[name])
            say(f"{name:<72} {median:10,.0f} images/s")
            self.trials.append(dataclasses.asdict(each) | {"images_per_s": median})
        return list(rates.values())

    def best(self, start: Settings, wanted: dict[str, list[Any]]) -> Settings:
        """One setting after the other from these on."""
        now = start
        for name, values in wanted.items():
            tried = [now, *(dataclasses.replace(now, **{name: v}) for v in values if v != getattr(now, name))]
            medians = [statistics.median(each) for each in self.compare(tried)]
            most = max(range(len(tried)), key=lambda i: medians[i])
            if medians[most] > WORTH * medians[0]:
                now = tried[most]
        return now


def tune(args: argparse.Namespace, cfg: DataConfig, dataset: Dataset, device: torch.device, recorder: Recorder) -> str:
    """Search, record a line, and say what to set.

    Args:
        cfg: the photographs' size and folder; its prefetch and hw_decoder_load are where the search begins.
    """
    cores = len(os.sched_getaffinity(0))
    decoder = choose_decoder(cfg)[0]
    defaults = Settings(cfg.hw_decoder_load, cores, cfg.prefetch)
    search = Search(args, cfg, dataset, device)
    wanted = candidates(device, cores)
    if decoder != "dali":
        wanted.pop("hw_decoder_load", None)
    best = search.best(defaults, wanted)
    rates = search.compare([best, defaults]) if best != defaults else search.compare([defaults]) * 2
    ratio = harness.estimate(harness.ratios(*rates))
    recorder.add(
        "tuned",
        rates[0],
        None,
        ratio_to_defaults=ratio.median,
        ratio_to_defaults_interval=[ratio.low, ratio.high],
        best=dataclasses.asdict(best),
        defaults=dataclasses.asdict(defaults),
        trials=search.trials,
        decoder=decoder,
        num_images=len(dataset),
        batch_size=args.batch,
        image_size=args.size,
        device=device.type,
        pairs=args.repeats,
        seconds=args.seconds,
    )
    return f"best: {best.words(device)}\n{ratio} times the defaults ({defaults.words(device)}), decoder {decoder}"
