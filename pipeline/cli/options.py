"""From command line and YAML to a Config, with every mistake told in one line.

jsonargparse reads types, defaults and --help texts off the dataclasses of pipeline.config.  What it does not do by
itself is done here: an error is one line that names the key, the value and the nearest known key, a key given twice
in a YAML file is an error, and an abbreviated option is not accepted.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import warnings
from argparse import SUPPRESS
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_loader, set_parsing_settings

from pipeline.config import Config, ConfigError, did_you_mean, known_keys, to_dict

set_parsing_settings(docstring_parse_attribute_docstrings=True)


_CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
_FLAGS = ("config", "dry-run", "help", "print_config")
_RANKS = "; the number of ranks is torchrun's: torchrun --standalone --nproc_per_node=N launch/train.py ..."
_DEVICE = "; a GPU is taken where torch finds one, else the CPU"
_ELSEWHERE = {"gpus": _RANKS, "ngpu": _RANKS, "num_gpus": _RANKS, "nproc_per_node": _RANKS, "nproc": _RANKS}
_ELSEWHERE |= {"device": _DEVICE, "cuda": _DEVICE, "cpu": _DEVICE}
_ELSEWHERE |= {"niter": "; did you mean train.num_epochs?", "outf": "; did you mean run.dir?"}
_ELSEWHERE |= {"resume": "; did you mean run.resume?", "amp": "; did you mean precision?"}
"""Options of the tutorial and of other trainers that are none here, and what to do instead."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, to which `1e-4` is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


# As in YAML 1.2 only true and false are truth values, so that `wandb: off` is a word.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
    for first, rules in _Loader.yaml_implicit_resolvers.items()
}


def _refuse_duplicates(node: yaml.Node | None, prefix: str = "") -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in lines:
            raise ConfigError(f"{name} stands twice in the configuration, in lines {lines[name]} and {line}")
        lines[name] = line
        _refuse_duplicates(value, f"{name}.")


def load_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ConfigError: a key stands twice.
        yaml.YAMLError: it is not YAML.
    """
    _refuse_duplicates(yaml.compose(text, Loader=_Loader))
    return yaml.load(text, Loader=_Loader)


set_loader("yaml_strict", load_yaml, exceptions=(yaml.YAMLError,))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="train.py",
        usage="train.py [--config FILE] [--section.key VALUE ...] [--dry-run] [--print_config]",
        description="Train a DCGAN on photographs.  The same command again resumes.  Under torchrun: many ranks.",
        epilog="Most used: --data.dataroot, --run.dir, --train.num_epochs, --train.batch_size, --data.image_size.  "
        "Exit code 0 done, 2 settings, 65 data, 74 input or output, 75 saved and stopped, 76 diverged: docs/faults.md.",
        parser_mode="yaml_strict",
        exit_on_error=False,
        allow_abbrev=False,
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="A YAML file of settings; options after it override it.")
    parser.add_argument("--dry-run", action="store_true", help="Print what would run, and end.")
    parser.add_class_arguments(Config, None)
    sections = {key.partition(".")[0] for key in known_keys() if "." in key}
    for action in parser._actions:
        if action.dest in sections:  # jsonargparse lets a section be a file of its own; a run has one file
            action.help = SUPPRESS
        if action.dest == "print_config":
            action.help = "Print the settings as they come to, as YAML, and end."
    return parser


@dataclasses.dataclass(frozen=True)
class Options:
    """What a command line asked for."""

    config: Config
    config_name: str
    """Stem of the --config file, or "default": names the run where run.dir does not."""
    dry_run: bool

    @property
    def run_folder(self) -> Path:
        """run.dir, or runs/ and the name of the config file."""
        return Path(self.config.run.dir or Path("runs") / self.config_name)


def parse(argv: list[str]) -> Options:
    """Read a command line; --help and --print_config print and end the program.

    Raises:
        ConfigError: one line with the key, the rule, what was found and the nearest known key.
    """
    parser = _parser()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jsonargparse announces its next major version here
            namespace = parser.parse_args(argv)
            _refuse_gaps(namespace)
            values = (
                parser.instantiate(namespace)
                if hasattr(parser, "instantiate")
                else parser.instantiate_classes(namespace)
            )
    except ArgumentError as error:
        raise ConfigError(_one_line(str(error))) from None
    except yaml.YAMLError as error:
        raise ConfigError(_one_line(f"Problems parsing config: {error}")) from None
    except UnicodeDecodeError:
        raise ConfigError("--config names a file that is no text") from None
    except OSError as error:
        raise ConfigError(f"--config names a file that cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError("the configuration has an anchor that refers to itself") from None
    sections = {f.name: values[f.name] for f in dataclasses.fields(Config)}
    files = values.get("config") or []
    if len(files) > 1:
        raise ConfigError(f"--config takes one file, got {len(files)}: {', '.join(str(f) for f in files)}")
    return Options(Config(**sections), Path(str(files[0])).stem if files else "default", values["dry_run"])


def _refuse_gaps(namespace: Namespace) -> None:
    """A file may leave a section or a value empty, or give a section one value; jsonargparse then stumbles."""
    for key in known_keys():
        section = key.rpartition(".")[0]
        if section and not isinstance(namespace[section], Namespace):
            raise ConfigError(_section_wanted(section, namespace[section]))
        if namespace[key] is None:
            raise ConfigError(f"{key} must have a value, got null")


def _section_wanted(section: str, found: object) -> str:
    first = next(key for key in known_keys() if key.startswith(f"{section}."))
    return f"{section} is a section and takes its settings one by one (--{first} VALUE, ...), got {found}"


def _near_config(path: Path) -> str:
    """The file of settings that a wrong path is like: one beside it, or one that comes along."""
    beside = path.parent.glob("*.yaml") if path.parent.is_dir() else ()
    known = {each.stem: each for each in (*_CONFIGS.glob("*.yaml"), *beside)}
    near = difflib.get_close_matches(path.stem, known, n=1, cutoff=0.7)
    if not near:
        return ""
    found = known[near[0]]
    return f"; did you mean {found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found}?"


def _near_option(word: str) -> str:
    """The option that an unknown word on the command line is like, or where what it wants is to be had."""
    name = word.removeprefix("--").split("=")[0]
    if not word.startswith("--"):
        return f"; did you mean --{word}?" if "=" in word and name in known_keys() else ""
    if flag := difflib.get_close_matches(name, _FLAGS, n=1, cutoff=0.8):
        return f"; did you mean --{flag[0]}?"
    return _ELSEWHERE.get(name, "") or did_you_mean(name)


def _one_line(message: str) -> str:
    """jsonargparse's message of several lines as one of ours."""
    text = " ".join(message.split())
    if match := re.search(r'Parser key "([\w.]+)": Expected an? (.*?)\. Got value: (.*)$', text):
        key, kind, found = match.groups()
        kind = re.sub(r"<class '(\w+)'>|typing\.", lambda m: m.group(1) or "", kind)
        if kind.startswith("Literal"):
            kind = "one of " + kind[len("Literal[") : -1].replace("'", "")
        return f"{key} must be {kind}, got {found}"
    if match := re.search(r"unrecognized arguments: (.*)$", text):
        first = match.group(1).split()[0]
        return f"{first} {'is no' if first.startswith('--') else 'belongs to no'} option{_near_option(first)}"
    if match := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text):
        key = f"{match.group(1)}.{match.group(2)}"
        return f"{key} is no setting{did_you_mean(key)}"
    if match := re.search(r"Option '([\w.]+)' is not accepted", text):
        return f"{match.group(1)} is no setting{did_you_mean(match.group(1))}"
    if match := re.search(r"(?:File does not exist|Path is not a file): '(.*)'", text):
        return f"--config names no file: {match.group(1)}{_near_config(Path(match.group(1)))}"
    if match := re.search(r"""Parser key "([\w.]+)": Unable to load config ['"](.*?)['"]""", text):
        return _section_wanted(*match.groups())
    if match := re.search(r'Parser key "([\w.]+)": .* Union subtypes Subtypes: \[(.*?)\] Errors: .*value: (.*)$', text):
        key, kinds, found = match.groups()
        kinds = (
            re.sub(r"<class '(.*?)'>", r"\1", kinds)
            .replace(", ", " or ")
            .replace("list[int]", "list[int] (64 or [64,48])")
        )
        return f"{key} must be {kinds}, got {found}"
    if text.startswith("Unexpected config:"):
        return "the configuration holds no settings" + text.removeprefix("Unexpected config").rstrip(": ")
    return text.replace("Problems parsing config:", "the configuration is not YAML:").replace(
        'in "<unicode string>", ', ""
    )


def to_yaml(config: Config) -> str:
    """The settings as YAML that `--config` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
