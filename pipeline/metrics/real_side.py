"""The photographs that generators are held against, and what was worked out about them before.

Those are num_images of the dataset, drawn once and for all, as training crops them: resized and cut from the middle,
without mirroring, colour jitter or a random place.  What metrics need of them (pixels, features) is kept in the cache
folder's evaluation/, one file for each, named by a hash of all that it depends on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import distributed
from pipeline.cache import Cached, decoded_windows, decoder_name
from pipeline.config import DataConfig
from pipeline.decode import Decoder, Pixels, middle
from pipeline.distributed import Ranks
from pipeline.errors import StorageError
from pipeline.files import written_aside
from pipeline.index import Dataset, cache_folder
from pipeline.metrics.gathering import gathered, shares
from pipeline.order import Order
from pipeline.samples import Samples
from pipeline.sources import one_line

Arrays = dict[str, NDArray[Any]]

VERSION = 1
"""Of what is kept and of how it is worked out: a change makes other names."""
SEED = 0
"""Of the choice of photographs."""
_SPARE_DISK = 1 << 30


class RealSide:
    """A fixed choice of a dataset's images, the same on every rank."""

    def __init__(
        self,
        cfg: DataConfig,
        dataset: Dataset,
        ranks: Ranks,
        *,
        num_images: int,
        decoder: Decoder,
        cached: Cached | None,
        samples: Samples | None,
        threads: int,
        say: Callable[[str], None],
    ) -> None:
        assert num_images <= len(dataset)
        self._cfg, self._ranks, self._decoder, self._cached = cfg, ranks, decoder, cached
        self._samples, self._threads, self._say = samples or Samples(dataset), threads, say
        self.num_images = num_images
        self.decoder = cached.decoder if cached else decoder_name(decoder, ranks.device)
        """What the pixels go by."""
        # In the order of the files, which packed ones are read fastest in.
        self.items = np.sort(Order(SEED, len(dataset)).permutation(0)[:num_images])
        self._decoded: Pixels | None = None
        self._facts: dict[str, Any] = {
            "version": VERSION,
            "dataset": dataset.fingerprint,
            "num_images": num_images,
            "image_size": list(cfg.size),
            "nc": cfg.nc,
            "crop_margin": cfg.crop_margin,
            "decoder": self.decoder,
            "jpeg_fancy_upsampling": cfg.jpeg_fancy_upsampling,
        }

    # The pixels

    def open(self) -> None:
        """Have the pixels at hand: those of the cache, else decoded by all ranks together and kept; collective.

        Raises:
            DataError: no file of the dataset is good any more; on every rank.
        """
        if self._cached is None and self._decoded is None:
            self._decoded = self.shared("pixels", lambda: {"pixels": self._decode()})["pixels"]

    def _decode(self) -> Pixels:
        mine = shares(self.num_images, self._ranks)
        batches = [self.items[share.start : share.stop] for share in mine if len(share)]
        cfg, device = self._cfg, self._ranks.device

        def decode() -> list[Pixels]:
            found = decoded_windows(batches, cfg, self._samples, self._decoder, device, self._threads)
            return [np.array(middle(windows, cfg)) for windows in found] if batches else []

        made = dict(zip((s.start for s in mine), distributed.together(decode), strict=False))
        like = torch.empty((0, *cfg.size, cfg.nc), dtype=torch.uint8, device=device)
        return gathered(
            lambda share: torch.from_numpy(made[share.start]).to(device), self.num_images, self._ranks, like
        ).numpy()

    def images(self, start: int, stop: int) -> Pixels:
        """(stop - start, H, W, C) uint8 on the CPU, after open(); may be called from several threads."""
        if self._cached is None:
            assert self._decoded is not None, "open() comes first"
            return self._decoded[start:stop]
        source, items = self._cached.images, self.items[start:stop]
        if isinstance(source, torch.Tensor):
            return np.asarray(middle(source[torch.from_numpy(items).to(source.device)], self._cfg).cpu())
        return np.asarray(middle(source[items], self._cfg))

    # What is known of them

    def _file(self, name: str, parameters: dict[str, Any]) -> Path:
        text = json.dumps(self._facts | parameters, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:24]
        return cache_folder(self._cfg) / "evaluation" / f"{name}-{digest}.npz"

    def load(self, name: str, **parameters: Any) -> Arrays | None:
        """What was kept under this name for these images and parameters; None: nothing that is whole."""
        path = self._file(name, parameters)
        try:
            with np.load(path, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}  # each with its CRC-32
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            self._say(f"{path}: what was kept of the real images is damaged ({one_line(error)}) and is made again")
            return None

    def keep(self, name: str, arrays: Arrays, **parameters: Any) -> None:
        """Keep it for the next time.  A disk that refuses stops nobody: a line says so."""
        path = self._file(name, parameters)
        try:
            needed, free = sum(a.nbytes for a in arrays.values()), shutil.disk_usage(path.parent.parent).free
            if needed + _SPARE_DISK > free:
                raise StorageError(f"{path}: {needed / 2**20:.0f} MiB cannot be kept, {free / 2**20:.0f} MiB are free")
            with written_aside(path) as aside, aside.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        except StorageError as error:
            self._say(f"{error}; what is known of the real images will be worked out again the next time")

    def shared(self, name: str, build: Callable[[], Arrays], **parameters: Any) -> Arrays:
        """What was kept, else what build() gives on each rank; collective, and build may be.

        Every rank reads its machine's file; where one of them finds none, all build, and one of each machine keeps it.
        """
        found = self.load(name, **parameters)
        everywhere = all(distributed.gather(found is not None))
        if found is not None and everywhere:
            return found
        found = build()
        if self._ranks.local_rank == 0:
            self.keep(name, found, **parameters)
        return found
