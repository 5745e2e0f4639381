"""How good a generator is: its images against as many of the dataset's, by the metrics of pipeline.config.METRICS.

Both sides are uint8 pixels.  The generated images are those of fixed latents, so that equal weights give equal figures;
the ranks share them, and share the work on both sides, and every rank gets the same result, whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import distributed
from pipeline.cache import Cached
from pipeline.config import INCEPTION_METRICS, METRICS, Config, ConfigError
from pipeline.config_error import require
from pipeline.decode import Decoder, Pixels
from pipeline.distributed import Ranks
from pipeline.index import Dataset, cache_folder
from pipeline.metrics import ms_ssim, swd
from pipeline.metrics.gathering import CHUNK, gathered, shares
from pipeline.metrics.inception import DEFAULT_NAME, InceptionFeatures
from pipeline.metrics.real_side import Arrays, RealSide
from pipeline.metrics.swd import Images
from pipeline.metrics.through_inception import LEAST_IMAGES, Extractor, InceptionMetrics
from pipeline.philox import Stream
from pipeline.precision import full_float32
from pipeline.samples import Samples
from pipeline.sampling import generate, latents

LATENT_SEED = 0
"""Not the run's: runs are compared by the same latents."""


@contextmanager
def one_thread() -> Iterator[None]:
    """On a CPU, one thread of torch's an operation, so that a picture is the same with any number of cores.

    Over several threads sums round otherwise, a few pixels in a million come out one level off, and SWD moves by
    5e-6 of itself (2026-11).  What is independent goes on side by side, and no thread waits for another that is held
    up by the machine's other work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Evaluation:
    """What generators are held against: opened once on every rank, used for any number of generators."""

    def __init__(
        self,
        cfg: Config,
        dataset: Dataset,
        ranks: Ranks,
        *,
        metrics: Sequence[str],
        num_images: int,
        decoder: Decoder,
        cached: Cached | None,
        samples: Samples | None = None,
        threads: int = 1,
        say: Callable[[str], None] = print,
        batch: int = CHUNK,
        extractor: Extractor | None = None,
    ) -> None:
        """Checks that all can be measured; collective.  What is slow waits for the first measurement.

        Args:
            metrics: names of METRICS.
            num_images: generated images, and as many real ones.
            decoder: what decodes, where nothing is cached.
            cached: all images of the dataset, decoded; None: the real ones are decoded here, and kept.
            samples: reads the dataset's files.
            threads: for decoding and for what is worked out on the CPU.
            say: takes a line for a person; called on every rank.
            batch: images that are generated at a time.
            extractor: in place of Inception; for tests.

        Raises:
            ConfigError: more images than the dataset has; an Inception metric of images that are not RGB, or without
                torch-fidelity.
            DataError: Inception's weights are missing, or others than they should be.
        """
        distributed.together(lambda: _check(cfg, metrics, num_images, len(dataset)))
        self._cfg, self._ranks, self._threads, self._say, self._batch = cfg, ranks, threads, say, batch
        self.metrics, self.num_images = tuple(metrics), num_images
        self.real = RealSide(
            cfg.data, dataset, ranks, num_images=num_images, decoder=decoder, cached=cached, samples=samples,
            threads=threads, say=say,
        )  # fmt: skip
        self._inception: InceptionMetrics | None = None
        self.extractor_name = ""
        """Inception's weights; empty: nothing looks through it."""
        through_inception = [name for name in metrics if name in INCEPTION_METRICS]
        if through_inception:
            found = extractor or distributed.together(lambda: InceptionFeatures(weights_path(cfg), ranks.device))
            self._inception = InceptionMetrics(found, self.real, ranks, through_inception)
            self.extractor_name = found.name

    @torch.no_grad()
    def measure(self, generator: nn.Module) -> dict[str, float]:
        """The figures of a generator, in the order of METRICS; collective, and the same on every rank.

        Nothing that training goes by is touched: no random state, no statistics.

        Args:
            generator: in eval mode, float32, with recalibrated statistics, on the ranks' device; the same on each.

        Returns:
            By name; for swd also each level's (`swd_64`, ...), for ms_ssim the real images' (`ms_ssim_real`), for kid
            and inception_score the deviation over subsets (`kid_std`, `inception_score_std`).
        """
        found: dict[str, float] = {}
        with one_thread(), ThreadPoolExecutor(self._threads, thread_name_prefix="metrics") as pool:
            fakes = self._generated(generator, pool)

            def images(start: int, stop: int) -> Pixels:
                return fakes[start:stop]

            if "swd" in self.metrics:
                found |= self._swd(images, pool)
            if "ms_ssim" in self.metrics:
                found["ms_ssim"] = self._ms_ssim(images, pool)
                found["ms_ssim_real"] = float(self.real.shared("ms_ssim", lambda: self._real_ms_ssim(pool))["mean"])
        if self._inception is not None:
            found |= self._inception.measure(images)
        order = list(METRICS)
        named = sorted(found, key=lambda name: next(i for i, m in enumerate(order) if name.startswith(m)))
        return distributed.broadcast({name: found[name] for name in named})

    def _generated(self, generator: nn.Module, pool: Executor) -> Pixels:
        cfg, device = self._cfg, self._ranks.device

        def make(share: range) -> Tensor:
            drawn = latents(LATENT_SEED, Stream.EVALUATION_LATENT, share.start, len(share), cfg.model.nz, device)
            return generate(generator, drawn, self._batch).to(device)

        like = torch.empty((0, *cfg.data.size, cfg.data.nc), dtype=torch.uint8, device=device)
        with full_float32():
            mine = [share for share in shares(self.num_images, self._ranks, self._batch) if len(share)]
            made = pool.map(make, mine) if device.type == "cpu" else map(make, mine)
            return gathered(lambda _share: next(made), self.num_images, self._ranks, like, chunk=self._batch).numpy()

    # Sliced Wasserstein distance

    def _swd(self, fakes: Images, pool: Executor) -> dict[str, float]:
        """The levels one after another; of each the ranks take blocks of directions in turn."""
        cfg, world_size = self._cfg.data, self._ranks.world_size
        sizes, onto = swd.level_sizes(*cfg.size), swd.directions(cfg.nc)
        step = swd.block_size(self.num_images, cfg.nc)
        starts = range(0, swd.DIRECTIONS, step)
        found = {}
        self.real.open()
        for level, size in enumerate(sizes):
            shape = *cfg.size, cfg.nc
            real = swd.Patches(self.real.images, self.num_images, shape, level, pool)
            fake = swd.Patches(fakes, self.num_images, shape, level, pool)
            of_level: list[float] = []
            for turn in range(0, len(starts), world_size):
                mine = starts[turn : turn + world_size][self._ranks.rank : self._ranks.rank + 1]
                apart: list[float] = []
                for start in mine:
                    apart = swd.distances(real, fake, onto[start : start + step], pool)
                for part in distributed.gather(apart):
                    of_level += part
            found[f"swd_{min(size)}"] = 1e3 * float(np.mean(of_level))
        return {"swd": float(np.mean(list(found.values())))} | found

    # Multi-scale structural similarity

    def _ms_ssim(self, images: Images, pool: Executor) -> float:
        """The mean over pairs, of which the ranks take some in turn."""
        rank, world_size = self._ranks.rank, self._ranks.world_size
        mine = ms_ssim.similarities(images, ms_ssim.pairs(self.num_images)[rank::world_size], pool)
        every = np.empty(self.num_images // 2)
        for other, part in enumerate(distributed.gather(mine)):
            every[other::world_size] = part
        return float(every.mean())

    def _real_ms_ssim(self, pool: Executor) -> Arrays:
        self.real.open()
        return {"mean": np.array(self._ms_ssim(self.real.images, pool))}


def _check(cfg: Config, metrics: Sequence[str], num_images: int, num_photographs: int) -> None:
    """
    Raises:
        ConfigError: these metrics cannot be measured with so many images of this kind.
    """
    unknown = [name for name in metrics if name not in METRICS]
    assert not unknown, unknown  # pipeline.config has told the user
    if num_images > num_photographs:
        raise ConfigError(
            f"eval.num_images must be at most the {num_photographs} images of data.dataroot, got {num_images}"
        )
    for name in (name for name in metrics if name in INCEPTION_METRICS):
        if cfg.data.nc != 3:
            raise ConfigError(
                f"eval.metrics must be of swd and ms_ssim where data.nc is {cfg.data.nc}, since Inception takes RGB "
                f"only, got {name!r}"
            )
        least = LEAST_IMAGES.get(name, 2)
        require(num_images >= least, "eval.num_images", f"at least {least} for {name}", num_images)


def weights_path(cfg: Config) -> Path:
    """Where Inception's weights are to be: eval.inception_weights, else a file in the cache folder."""
    given = cfg.eval.inception_weights
    return Path(given).expanduser() if given else cache_folder(cfg.data) / DEFAULT_NAME
