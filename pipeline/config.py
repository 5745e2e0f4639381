"""Every setting of a run, with its unit and its range.

The dataclasses are the whole truth: `--help`, configs/all_fields.yaml and the checks come from them.  A value that
cannot work raises ConfigError here, before any process group or file exists.  How command line and YAML become a
Config is pipeline/cli/options.py's business.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from pipeline.config_error import ConfigError, require
from pipeline.config_kernels import KernelsConfig
from pipeline.config_learning import (
    INCEPTION_METRICS,
    METRICS,
    DiscriminatorInputConfig,
    EvalConfig,
    LossConfig,
    OptimConfig,
)
from pipeline.config_profile import ProfileConfig

__all__ = [
    "INCEPTION_METRICS",
    "METRICS",
    "ConfigError",
    "DiscriminatorInputConfig",
    "EvalConfig",
    "KernelsConfig",
    "LossConfig",
    "OptimConfig",
    "ProfileConfig",
]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    dataroot: str = ""
    """Photographs: a folder tree, a .zip, an LMDB, a .tar, a .parquet, or shards of the latter two (a folder of them,
    or a pattern such as 'a/*.tar')."""
    workers: int = 0
    """Decode threads of a rank. At least 0; 0: this rank's share of the machine's cores."""
    prefetch: int = 3
    """Batches made ready ahead of the step. At least 1."""
    image_size: int | list[int] = 64
    """Pixels, one side or [height, width]. At least 8; the shorter 2^n times 4 to 7, the longer divisible by 2^n."""
    nc: int = 3
    """Channels: 1 (gray), 3 (RGB) or 4 (RGB and alpha)."""
    decoder: Literal["auto", "dali", "pillow"] = "auto"
    """What decodes JPEG and PNG; auto: DALI where it is installed, else Pillow."""
    cache: Literal["auto", "none", "host", "device"] = "auto"
    """Where decoded images are kept: nowhere, in a file that a node's ranks map, or in each rank's GPU memory too."""
    cache_dir: str = ""
    """Folder for indexes and decoded images; empty: $XDG_CACHE_HOME/dcgan-faces or ~/.cache/dcgan-faces."""
    flip: bool = False
    """Mirror every second image, left to right."""
    crop_margin: int = 0
    """Pixels that the resized short side exceeds the image by; the crop's place is then random. At least 0."""
    brightness: float = 0.0
    """Jitter: the image is multiplied by a factor from [1 - x, 1 + x]. 0 to 1."""
    contrast: float = 0.0
    """Jitter: the distance from mid-gray is multiplied by a factor from [1 - x, 1 + x]. 0 to 1."""
    saturation: float = 0.0
    """Jitter: the distance from gray is multiplied by a factor from [1 - x, 1 + x]. 0 to 1; nc of 3 or 4."""
    hue: float = 0.0
    """Jitter: the hue is turned by an angle from [-x, x] degrees. 0 to 180; nc of 3 or 4."""
    strict: bool = False
    """Stop at the first unreadable file instead of leaving it out."""
    max_bad_fraction: float = 0.01
    """Share of the images that may prove bad while training, each replaced by the next one; beyond it the run stops.
    0 to 1; data.strict makes it 0."""
    max_pixels: int = 64_000_000
    """A header that promises more pixels than this is refused before a decoder sees it. At least 4096."""
    hw_decoder_load: float = 0.65
    """Share of a GPU batch that its hardware JPEG decoder takes, where it has one. 0 to 1."""
    jpeg_fancy_upsampling: bool = True
    """Interpolate the JPEG's colour channels as libjpeg does, so that decoders agree."""

    def __post_init__(self) -> None:
        size = self.image_size if isinstance(self.image_size, Sequence) else [self.image_size]
        require(
            len(size) in (1, 2) and all(s >= 8 for s in size),
            "data.image_size",
            "one or two sides of at least 8",
            self.image_size,
        )
        require(self.nc in (1, 3, 4), "data.nc", "1, 3 or 4", self.nc)
        require(self.workers >= 0, "data.workers", "at least 0", self.workers)
        require(self.prefetch >= 1, "data.prefetch", "at least 1", self.prefetch)
        require(self.crop_margin >= 0, "data.crop_margin", "at least 0", self.crop_margin)
        for key in ("brightness", "contrast", "saturation", "max_bad_fraction", "hw_decoder_load"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"data.{key}", "between 0 and 1", value)
        require(0 <= self.hue <= 180, "data.hue", "between 0 and 180 degrees", self.hue)
        require(
            self.nc != 1 or self.saturation == self.hue == 0,
            "data.saturation and data.hue",
            "0 where data.nc is 1",
            (self.saturation, self.hue),
        )
        require(self.max_pixels >= 4096, "data.max_pixels", "at least 4096", self.max_pixels)
        num_halvings(*self.size)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        if isinstance(self.image_size, Sequence):
            return self.image_size[0], self.image_size[-1]
        return self.image_size, self.image_size

    def bad_allowed(self, num_images: int) -> int:
        """How many of num_images may prove bad while training."""
        # 0.29 * 100 is 28.999999999999996 in floating point, and means 29.
        return 0 if self.strict else math.floor(self.max_bad_fraction * num_images + 1e-9)


def num_halvings(height: int, width: int) -> int:
    """How often both sides halve until the shorter is 4 to 7 pixels: the number of stride-2 layers of each network.

    Raises:
        ConfigError: a side is not divisible by 2 to that power.
    """
    n = 0
    while min(height, width) >> (n + 1) >= 4:
        n += 1
    if height % (1 << n) or width % (1 << n):
        raise ConfigError(f"data.image_size must have both sides divisible by {1 << n}, got {height} x {width}")
    return n


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    nz: int = 100
    """Length of the latent vector. At least 1."""
    ngf: int = 64
    """Channels of the generator's last hidden layer; the others double from it, up to 8 times. At least 1."""
    ndf: int = 64
    """Channels of the discriminator's first layer; the others double from it, up to 8 times. At least 1."""
    spectral_norm: bool = False
    """Divide each of D's weights by its largest singular value (Miyato et al. 2018)."""

    def __post_init__(self) -> None:
        for key in ("nz", "ngf", "ndf"):
            require(getattr(self, key) >= 1, f"model.{key}", "at least 1", getattr(self, key))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    batch_size: int = 128
    """Images a step, over all ranks together. At least 2 a rank."""
    num_epochs: float = 5.0
    """Walks through the dataset, as a fraction where wanted. Above 0."""
    max_images: int = 0
    """Images after which training ends, if num_epochs does not end it sooner; 0: no such limit."""
    max_minutes: float = 0.0
    """Minutes after which this start saves and stops as if preempted, for a queue's time limit; 0: no such limit."""
    mode: Literal["auto", "eager", "reference", "compile", "graph"] = "auto"
    """How a step runs: reference is the tutorial's arrangement, eager a faster one of equal results, compile the same
    by torch.compile, graph the same as one CUDA graph; auto: on a GPU the fastest of eager, graph and, in long runs,
    compile, measured at the run's first start; on a CPU eager, unless kernels.choices says otherwise."""
    micro_batch: int = 0
    """Images of a rank that go through the networks at a time, for batches that do not fit into memory; 0: all of them.
    Gradients add up over these; BatchNorm has its own statistics for each. At least 2, a divisor of a rank's part."""
    channels_last: bool = True
    """Keep images and convolution weights with the channels innermost (NHWC)."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 2, "train.batch_size", "at least 2", self.batch_size)
        require(0 < self.num_epochs < math.inf, "train.num_epochs", "above 0 and finite", self.num_epochs)
        require(self.max_images >= 0, "train.max_images", "at least 0", self.max_images)
        require(
            self.micro_batch == 0 or self.micro_batch >= 2, "train.micro_batch", "0 or at least 2", self.micro_batch
        )
        require(0 <= self.max_minutes < math.inf, "train.max_minutes", "at least 0 and finite", self.max_minutes)

    def num_steps(self, num_images: int) -> int:
        """Steps of a whole run over a dataset of num_images: ceil(min(num_epochs * len, max_images) / batch_size)."""
        images = self.num_epochs * num_images
        if self.max_images:
            images = min(images, self.max_images)
        return max(1, -int(-images // self.batch_size))


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    bucket_cap_mb: float = 4.0
    """Gradients travel in buckets of about this many MiB while backward goes on. Above 0."""
    compress: Literal["none", "bf16"] = "none"
    """How gradients travel: as float32, or rounded to bf16, which halves the bytes; they are added up in that type."""
    overlap_g: bool = False
    """Let G's gradients travel while D looks at the next real images. Costs a step of two passes in place of one."""
    sync_batchnorm: bool = False
    """BatchNorm statistics over all ranks instead of each rank's own. GPU only."""
    start_timeout_s: int = 1800
    """Seconds the ranks wait for each other until the first step is done. At least 1."""
    step_timeout_s: int = 300
    """Seconds they wait for each other afterwards. At least 1."""
    threads: int = 0
    """Threads of a rank for arithmetic on the CPU. At least 0; 0: cores / ranks on this machine."""

    def __post_init__(self) -> None:
        finite = 0 < self.bucket_cap_mb < math.inf
        require(finite, "distributed.bucket_cap_mb", "above 0 and finite", self.bucket_cap_mb)
        for key in ("start_timeout_s", "step_timeout_s"):
            require(getattr(self, key) >= 1, f"distributed.{key}", "at least 1", getattr(self, key))
        require(self.threads >= 0, "distributed.threads", "at least 0", self.threads)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_images: int = 25_000
    """Images between checkpoints; 0: only at the end."""
    keep: int = 3
    """The newest so many stay. At least 1."""
    milestone_images: list[int] = field(default_factory=list)
    """The first checkpoint at or after each of these counts stays for good."""

    def __post_init__(self) -> None:
        require(self.every_images >= 0, "checkpoint.every_images", "at least 0", self.every_images)
        require(self.keep >= 1, "checkpoint.keep", "at least 1", self.keep)
        require(
            all(m >= 1 for m in self.milestone_images),
            "checkpoint.milestone_images",
            "at least 1 each",
            self.milestone_images,
        )


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    skip_non_finite: bool = True
    """Leave out an update whose gradients are not finite, on all ranks alike."""
    max_skipped_steps: int = 10
    """So many of them in a row, and the run goes back to its last good checkpoint and on with other images. At least 1.
    With fp16, only those at min_loss_scale count."""
    max_rollbacks: int = 3
    """Going back so often without getting past the trouble ends the run with 76. At least 0."""
    min_loss_scale: float = 1.0
    """Where fp16's loss scale halves no further. Above 0."""
    on_collapse: Literal["alert", "stop", "rollback"] = "alert"
    """What a collapse leads to: a line in log, TensorBoard and status.json; besides, the end with 76, or going back."""
    collapse_images: int = 20_000
    """A collapse is one of the next two for so many images. At least 1; 0: nobody looks."""
    min_loss_d: float = 0.01
    """D has won, and G learns nothing more, while D's loss is below this. At least 0."""
    min_diversity: float = 0.05
    """G draws one picture while its images differ less than this share of what the real ones do. 0 to 1."""
    slow_rank_ratio: float = 1.5
    """A rank is named when its own part of a step takes so many times the median rank's. Above 1; 0: nobody looks."""
    hang_s: int = 900
    """Seconds without a step, then: every thread's stack into the run folder, and out. At least 1; 0: nobody looks.
    More than distributed.step_timeout_s, which ends a rank that only waits for another."""

    def __post_init__(self) -> None:
        require(self.max_skipped_steps >= 1, "watch.max_skipped_steps", "at least 1", self.max_skipped_steps)
        require(self.max_rollbacks >= 0, "watch.max_rollbacks", "at least 0", self.max_rollbacks)
        require(0 < self.min_loss_scale < math.inf, "watch.min_loss_scale", "above 0 and finite", self.min_loss_scale)
        require(self.collapse_images >= 0, "watch.collapse_images", "at least 0", self.collapse_images)
        require(0 <= self.min_loss_d < math.inf, "watch.min_loss_d", "at least 0 and finite", self.min_loss_d)
        require(0 <= self.min_diversity <= 1, "watch.min_diversity", "between 0 and 1", self.min_diversity)
        require(
            self.slow_rank_ratio == 0 or 1 < self.slow_rank_ratio < math.inf,
            "watch.slow_rank_ratio",
            "0 or above 1 and finite",
            self.slow_rank_ratio,
        )
        require(self.hang_s >= 0, "watch.hang_s", "at least 0", self.hang_s)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every_steps: int = 50
    """Steps between lines of stats.jsonl and points in TensorBoard. At least 1."""
    grid_every_images: int = 25_000
    """Images between pictures of the fixed latents; 0: only at the end."""
    grid_size: int = 64
    """Pictures in a grid. 1 to 1024."""
    report: bool = True
    """Write report.html when training ends."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases beside TensorBoard: offline writes into run.dir/wandb only, online sends it there as well."""
    wandb_project: str = "dcgan-faces"
    """The project there."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, "log.every_steps", "at least 1", self.every_steps)
        require(self.grid_every_images >= 0, "log.grid_every_images", "at least 0", self.grid_every_images)
        require(1 <= self.grid_size <= 1024, "log.grid_size", "between 1 and 1024", self.grid_size)
        require(bool(self.wandb_project), "log.wandb_project", "a name", self.wandb_project)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    dir: str = ""
    """Folder of everything the run writes, on a disk that all its machines see; empty: runs/<name of the config>."""
    seed: int = 999
    """Origin of weights, order, augmentation and latents. 0 to 2^63 - 1."""
    resume: str = "auto"
    """auto: go on from the newest good checkpoint in run.dir, or begin; none: begin; else the path of a checkpoint."""
    force: bool = False
    """Resume although model, image size, channels, seed or dataset differ from the checkpoint's."""
    init_from: str = ""
    """A checkpoint whose weights a new run begins with, its counters at zero."""
    deterministic: bool = False
    """Only algorithms that repeat bit for bit on a GPU. Slower."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 1 << 63, "run.seed", "between 0 and 2^63 - 1", self.seed)
        require(bool(self.resume), "run.resume", "auto, none or a path", self.resume)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    """Photographs in."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The two networks."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How their weights move."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What the two players pay for."""
    d_input: DiscriminatorInputConfig = field(default_factory=DiscriminatorInputConfig)
    """What is done to images before D sees them."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long, how much at a time."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Arithmetic of the convolutions; auto: bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU."""
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    """Which implementation does the work."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Many ranks."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is saved."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """What is noticed when training goes wrong, and what follows."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """How good the pictures are, measured while training goes on."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is shown."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """A look at single steps."""
    run: RunConfig = field(default_factory=RunConfig)
    """Where, and from where."""

    def per_rank(self, world_size: int) -> int:
        """Images of a step on each rank.

        Raises:
            ConfigError: the ranks cannot share the batch evenly, or a rank would get one image (BatchNorm needs 2).
        """
        if self.train.batch_size % world_size:
            raise ConfigError(
                f"train.batch_size must be divisible by the {world_size} ranks, got {self.train.batch_size}"
            )
        share = self.train.batch_size // world_size
        if share < 2:
            raise ConfigError(
                f"train.batch_size must be {2 * world_size} or more for {world_size} ranks, got {self.train.batch_size}"
            )
        if self.train.micro_batch and share % self.train.micro_batch:
            raise ConfigError(
                f"train.micro_batch must divide the {share} images of a rank's batch, got {self.train.micro_batch}"
            )
        return share


def known_keys(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Every key, as `section.key`."""
    for f in fields(cls):
        if isinstance(f.default_factory, type) and is_dataclass(f.default_factory):
            yield from known_keys(f.default_factory, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}"


def did_you_mean(key: str) -> str:
    """ "; did you mean data.nc?" where a known key is near, else nothing."""
    keys = list(known_keys())
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not close:  # a key without its section, or under another one
        leaves = difflib.get_close_matches(key.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in keys], n=1)
        close = [k for k in keys if leaves and k.rsplit(".", 1)[-1] == leaves[0]][:1]
    return f"; did you mean {close[0]}?" if close else ""


def to_dict(config: Config) -> dict[str, Any]:
    """The settings as plain values."""
    return asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The Config that `to_dict` gave.

    Raises:
        ConfigError: a key is unknown or a value cannot work.
    """
    sections = {f.name: f.default_factory for f in fields(Config)}
    chosen: dict[str, Any] = {}
    for name, value in values.items():
        section = sections.get(name)
        if name not in sections:
            raise ConfigError(f"{name} is no setting{did_you_mean(name)}")
        if isinstance(section, type) and is_dataclass(section):
            for key in value:
                if key not in {f.name for f in fields(section)}:
                    raise ConfigError(f"{name}.{key} is no setting{did_you_mean(f'{name}.{key}')}")
            chosen[name] = section(**value)
        else:
            chosen[name] = value
    return Config(**chosen)
