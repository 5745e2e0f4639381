"""What launch/k8s/render.py renders from: values with their defaults, checked before anything is printed.

launch/k8s/values.yaml says what each value means.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from pipeline.cli.options import load_yaml, parse
from pipeline.config import ConfigError, did_you_mean, known_keys

ROOT = Path(__file__).resolve().parent.parent.parent

NOT_YOURS = {
    "data.dataroot": "dataset.claim and dataset.path",
    "data.cache_dir": "cache",
    "run.dir": "run.claim and name",
}
OURS = {"HOME", "USER", "DCGAN_GRACE_S"}
OPERATORS = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
OPERATORS |= {"PET_RDZV_BACKEND", "PET_RDZV_ENDPOINT", "PET_RDZV_CONF", "PET_STANDALONE"}

LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
OBJECT_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?")
QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
SCALE = {"m": 1e-3, None: 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
SCALE |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def _require(holds: object, key: str, rule: str, found: object) -> None:
    if not holds:
        raise ConfigError(f"{key} must be {rule}, got {found!r}")


def quantity(key: str, text: str) -> float:
    """The number that Kubernetes reads there: cores or bytes, above 0."""
    match = QUANTITY.fullmatch(text)
    number = float(match[1]) * SCALE[match[2]] if match else 0.0
    _require(number > 0, key, "a quantity such as 8, 500m or 16Gi, above 0", text)
    return number


@dataclass(frozen=True, kw_only=True)
class Dataset:
    claim: str = "dcgan-data"
    path: str = "img_align_celeba.zip"
    size: str = "20Gi"
    storage_class: str = ""

    def __post_init__(self) -> None:
        _require(OBJECT_NAME.fullmatch(self.claim), "dataset.claim", "the name of a claim", self.claim)
        inside = not self.path.startswith("/") and ".." not in PurePosixPath(self.path).parts
        _require(inside, "dataset.path", "a path within the claim", self.path)
        quantity("dataset.size", self.size)


@dataclass(frozen=True, kw_only=True)
class Run:
    claim: str = "dcgan-runs"
    size: str = "50Gi"
    storage_class: str = ""

    def __post_init__(self) -> None:
        _require(OBJECT_NAME.fullmatch(self.claim), "run.claim", "the name of a claim", self.claim)
        quantity("run.size", self.size)


@dataclass(frozen=True, kw_only=True)
class Cache:
    size: str = "50Gi"
    storage_class: str = ""

    def __post_init__(self) -> None:
        quantity("cache.size", self.size)


@dataclass(frozen=True, kw_only=True)
class Values:
    """All values; launch/k8s/values.yaml says what each means."""

    name: str = "dcgan"
    namespace: str = "default"
    labels: dict[str, str] = field(default_factory=dict)
    image: str = "dcgan-faces:0.1.0"
    image_pull_secrets: list[Any] = field(default_factory=list)
    workdir: str = "/opt/dcgan-faces"
    python: str = "python"
    nodes: int = 2
    gpus_per_node: int = 8
    gpu_resource: str = "nvidia.com/gpu"
    ranks_per_node: int = 0
    cpu: str = "32"
    memory: str = "128Gi"
    shared_memory: str = "8Gi"
    scratch: str = "10Gi"
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[Any] = field(default_factory=list)
    priority_class: str = ""
    config: str = "configs/celeba64.yaml"
    options: dict[str, Any] = field(default_factory=dict)
    dataset: Dataset = field(default_factory=Dataset)
    run: Run = field(default_factory=Run)
    cache: Cache = field(default_factory=Cache)
    env: dict[str, str] = field(default_factory=dict)
    user_id: int = 10001
    group_id: int = 10001
    time_limit_minutes: int = 0
    restarts: int = 10
    grace_s: int = 90
    start_timeout_s: int = 900

    def __post_init__(self) -> None:
        short = LABEL.fullmatch(self.name) and len(self.name) <= 40  # pods' names append up to 23 more of 63
        _require(short, "name", "at most 40 small letters, digits and dashes, a letter first", self.name)
        fits = OBJECT_NAME.fullmatch(self.namespace) and "." not in self.namespace and len(self.namespace) <= 63
        _require(fits, "namespace", "the name of a namespace", self.namespace)
        _require(re.fullmatch(r"[^\s]+", self.image), "image", "the name of an image", self.image)
        _require(self.workdir.startswith("/"), "workdir", "an absolute path", self.workdir)
        _require(self.python, "python", "a program", self.python)
        _require("/" in self.gpu_resource, "gpu_resource", "a name such as nvidia.com/gpu", self.gpu_resource)
        for key, least in (("nodes", 1), ("user_id", 1), ("group_id", 1), ("grace_s", 1), ("start_timeout_s", 1)):
            _require(getattr(self, key) >= least, key, f"at least {least}", getattr(self, key))
        for key in ("gpus_per_node", "ranks_per_node", "time_limit_minutes", "restarts"):
            _require(getattr(self, key) >= 0, key, "at least 0", getattr(self, key))
        if self.gpus_per_node:
            _require(self.ranks <= self.gpus_per_node, "ranks_per_node", "at most gpus_per_node", self.ranks)
        _require(self.run.claim != self.dataset.claim, "run.claim", "another than dataset.claim", self.run.claim)
        quantity("cpu", self.cpu)
        quantity("scratch", self.scratch)
        below = quantity("shared_memory", self.shared_memory) < quantity("memory", self.memory)
        _require(below, "shared_memory", f"below memory, {self.memory}", self.shared_memory)
        for secret in self.image_pull_secrets:
            _require(isinstance(secret, str) and secret, "image_pull_secrets", "names of Secrets", secret)
        for toleration in self.tolerations:
            _require(isinstance(toleration, dict), "tolerations", "mappings such as {operator: Exists}", toleration)
        for key in self.env:
            _require(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key), "env", "names of environment variables", key)
            _require(key not in OPERATORS, "env", "without what the operator sets", key)
            _require(key not in OURS, "env", "without what follows from other values", key)
        self._check_training()

    @property
    def ranks(self) -> int:
        """Ranks of a node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    def settings(self) -> list[str]:
        """The trainer's words for `options`."""
        return [f"--{key}={_word(value)}" for key, value in _leaves(self.options)]

    def _check_training(self) -> None:
        """The trainer's own checks, here and now instead of in the first pod."""
        for key, _ in _leaves(self.options):
            if key in NOT_YOURS:
                raise ConfigError(f"options.{key} follows from {NOT_YOURS[key]}: leave it out")
            if key not in known_keys():
                raise ConfigError(f"options.{key} is no setting of the trainer{did_you_mean(key)}")
        path = ROOT / self.config
        inside = path.resolve().is_relative_to(ROOT) and path.is_file()
        _require(inside, "config", "a file of the clone such as configs/celeba64.yaml", self.config)
        parse([f"--config={path}", *self.settings()]).config.per_rank(self.nodes * self.ranks)


def _leaves(options: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def from_dict(given: dict[str, Any]) -> Values:
    """The values, defaults where nothing is given.

    Raises:
        ConfigError: a key is unknown or a value cannot work.
    """
    return _build(Values, given, "")


def _build(cls: Any, given: object, prefix: str) -> Any:
    if not isinstance(given, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'the values'} must be a mapping, got {given!r}")
    kinds = typing.get_type_hints(cls)
    for key in given:
        if key not in kinds:
            near = difflib.get_close_matches(str(key), list(kinds), n=1)
            raise ConfigError(f"{prefix}{key} is no value{f'; did you mean {prefix}{near[0]}?' if near else ''}")
    # A heading with nothing below it is None to YAML, and means its default here.
    return cls(
        **{
            key: _typed(kinds[key], value, f"{prefix}{key}")
            for key, value in given.items()
            if value is not None or kinds[key] in (int, str)
        }
    )


def _typed(kind: Any, value: Any, key: str) -> Any:
    origin = typing.get_origin(kind) or kind
    if dataclasses.is_dataclass(origin):
        return _build(origin, value, f"{key}.")
    number = isinstance(value, int) and not isinstance(value, bool)
    if origin is int:
        _require(number, key, "an integer", value)
    elif origin is str:
        _require(isinstance(value, str) or number, key, "a text", value)
        return str(value)
    else:
        what = "a list" if origin is list else "a mapping"
        _require(isinstance(value, origin), key, what, value)
        if kind == dict[str, str]:
            return {str(k): _typed(str, v, f"{key}.{k}") for k, v in value.items()}
    return value


def set_value(given: dict[str, Any], assignment: str) -> None:
    """Apply `section.key=value`, the value read as YAML.  Names of labels, selectors and variables may hold dots."""
    key, equals, text = assignment.partition("=")
    if not key or not equals:
        raise ConfigError(f"--set must be key=value, got {assignment!r}")
    names = key.split(".")
    if typing.get_type_hints(Values).get(names[0]) == dict[str, str]:
        names = key.split(".", 1)
    place: Any = given
    for name in names[:-1]:
        if place.get(name) is None:
            place[name] = {}
        place = place[name]
        if not isinstance(place, dict):
            raise ConfigError(f"{key} is no value: {name} has no parts")
    place[names[-1]] = _yaml(text, f"--set {key}")


def _yaml(text: str, where: str) -> Any:
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        told = str(error).replace('in "<unicode string>", ', "")
        raise ConfigError(f"{where} is not YAML: {told}") from None


def read_values(path: Path, assignments: Sequence[str]) -> Values:
    """A file of values with --set on top."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--values {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    given = _yaml(text, str(path))
    if given is not None and not isinstance(given, dict):
        raise ConfigError(f"{path} must hold key: value, got {type(given).__name__}")
    given = given or {}
    for assignment in assignments:
        set_value(given, assignment)
    return from_dict(given)
