import dataclasses
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

from pipeline.cli import train as command
from pipeline.cli.options import load_yaml, parse, to_yaml
from pipeline.config import Config, ConfigError, DataConfig, OptimConfig, TrainConfig, from_dict, known_keys, to_dict

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

# What a user types wrongly, and what the one line must hold.
MISTAKES = [
    (["--data.nc", "2"], ["data.nc", "1, 3 or 4", "2"]),
    (["--data.nc", "x"], ["data.nc", "int", "x"]),
    (["--data.ncc", "3"], ["--data.ncc", "data.nc?"]),
    (["--nc", "3"], ["--nc", "data.nc?"]),
    (["--prec", "bf16"], ["--prec", "precision?"]),
    (["--precision", "bf17"], ["precision", "bf16", "bf17"]),
    (["--train.batch_size=1e3"], ["train.batch_size", "int", "1000.0"]),
    (["--train.batchsize", "3"], ["--train.batchsize", "train.batch_size?"]),
    (["--train.batch_size", "1"], ["train.batch_size", "at least 2", "1"]),
    (["--optim.lr", ".nan"], ["optim.lr", "above 0", "nan"]),
    (["--optim.beta1", "1"], ["optim.beta1", "below 1", "1"]),
    (["--run.resum", "x"], ["--run.resum", "run.resume?"]),
    (["--run.seed", "-1"], ["run.seed", "-1"]),
    (["--data.image_size", "66"], ["data.image_size", "divisible by 16", "66"]),
    (["--data.image_size", "[64, 32, 3]"], ["data.image_size", "one or two sides"]),
    (["--data.flip", "maybe"], ["data.flip", "bool", "maybe"]),
    (["--data.image_size", "[64, wide]"], ["data.image_size", "int or list[int] (64 or [64,48])", "wide"]),
    (["--data", "3"], ["data is a section", "--data.dataroot VALUE", "3"]),
    (["--watch", "off"], ["watch is a section", "off"]),
    (["--data.nc"], ["--data.nc", "expected one argument"]),
    (["--train.num_epochs", ".inf"], ["train.num_epochs", "finite", "inf"]),
    (["--data.nc", "1", "--data.hue", "5"], ["data.hue", "data.nc is 1"]),
    (["--train.max_minutes", "-1"], ["train.max_minutes", "at least 0", "-1"]),
    (["--checkpoint.milestone_images", "[100, 0]"], ["checkpoint.milestone_images", "at least 1", "0"]),
    (["--checkpoint.milestone_images", "[soon]"], ["checkpoint.milestone_images", "int", "soon"]),
    (["--distributed.bucket_cap_mb", ".inf"], ["distributed.bucket_cap_mb", "finite", "inf"]),
    (["--log.grid_size", "1025"], ["log.grid_size", "between 1 and 1024", "1025"]),
    (["--watch.max_skipped_steps", "0"], ["watch.max_skipped_steps", "at least 1", "0"]),
    (["--watch.max_rollbacks", "-1"], ["watch.max_rollbacks", "at least 0", "-1"]),
    (["--watch.min_loss_scale", "0"], ["watch.min_loss_scale", "above 0", "0"]),
    (["--watch.min_loss_d", ".inf"], ["watch.min_loss_d", "finite", "inf"]),
    (["--watch.min_diversity", "1.5"], ["watch.min_diversity", "between 0 and 1", "1.5"]),
    (["--watch.slow_rank_ratio", "1"], ["watch.slow_rank_ratio", "above 1", "1.0"]),
    (["--watch.slow_rank_ratio", ".nan"], ["watch.slow_rank_ratio", "nan"]),
    (["--watch.hang_s", "-1"], ["watch.hang_s", "at least 0", "-1"]),
    (["--watch.hang_s", "1.5"], ["watch.hang_s", "int", "1.5"]),
    (["--watch.collapse_images", "-1"], ["watch.collapse_images", "at least 0", "-1"]),
    (["--watch.on_collapse", "panic"], ["watch.on_collapse", "alert, stop, rollback", "panic"]),
    (["--watch.skip_nonfinite", "true"], ["--watch.skip_nonfinite", "watch.skip_non_finite?"]),
    (["--data.dataroot", ""], ["data.dataroot", "photographs", "--data.dataroot PATH"]),
    (["photos/"], ["photos/", "belongs to no option"]),
    (["--config", "nowhere.yaml"], ["--config", "nowhere.yaml"]),
    (["--config", "quickstart"], ["--config names no file", "configs/quickstart.yaml?"]),
    (["--config", str(ROOT / "configs/celeba.yaml")], ["configs/celeba64.yaml?"]),
    (["--dry_run"], ["--dry_run is no option", "--dry-run?"]),
    (["--gpus", "8"], ["--gpus is no option", "torchrun --standalone --nproc_per_node=N"]),
    (["--device", "cuda"], ["--device is no option", "a GPU is taken where torch finds one"]),
    (["--niter=5"], ["--niter=5 is no option", "train.num_epochs?"]),
    (["train.batch_size=8"], ["belongs to no option", "--train.batch_size=8?"]),
    (["--config", "."], ["--config"]),
]
FILES = [
    ("data:\n  nc: 3\n  nc: 1\n", ["data.nc", "twice", "lines 2 and 3"]),
    ("data: {nc: 3}\ndata: {flip: true}\n", ["data", "twice"]),
    ("data:\n  ncc: 3\n", ["data.ncc", "data.nc?"]),
    ("dat:\n  nc: 3\n", ["dat.nc", "data.nc?"]),
    ("data:\n  nc: two\n", ["data.nc", "int", "two"]),
    ("data: [unclosed\n", ["not YAML", "line 2"]),
    ("", ["no settings"]),
    ("optim: {lr: fast}\n", ["optim.lr", "float", "fast"]),
    ("watch: 3\n", ["watch is a section", "3"]),
    ("watch:\n", ["watch is a section", "None"]),
    ("data: [nc, 3]\n", ["data is a section", "nc"]),
    ("watch: {hang_s: null}\n", ["watch.hang_s", "null"]),
    ("watch: {hang_s: [5]}\n", ["watch.hang_s", "int", "[5]"]),
    ("precision: {kind: bf16}\n", ["precision", "bf16"]),
    ("- data\n", ["no settings"]),
    ("train:\n\tbatch_size: 8\n", ["not YAML", "line 2"]),
    ("data: &a [*a]\n", ["anchor that refers to itself"]),
    ("data: {nc: !!python/name:os.system }\n", ["not YAML", "python/name:os.system"]),
    ("\ufeff\x00", ["not YAML"]),
]


@pytest.fixture(autouse=True)
def _nothing_begins(monkeypatch, tmp_path):
    """One of two ranks, which would meet the other at once: a mistake is told before that, and before any folder."""
    monkeypatch.setattr(dist, "init_process_group", lambda *_args, **_keys: pytest.fail("a process group was made"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    yield
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".yaml"] == []


def complaint(capsys, monkeypatch, arguments) -> str:
    monkeypatch.delenv("RANK", raising=False)
    assert command.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def check(text: str, parts: list[str]) -> None:
    assert text.count("\n") == 1, text
    assert text.startswith("train.py: error: ")
    for part in parts:
        assert part in text, text


# row 30
@pytest.mark.parametrize(("arguments", "parts"), MISTAKES, ids=lambda v: " ".join(v))
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(capsys, monkeypatch, arguments, parts):
    check(complaint(capsys, monkeypatch, arguments), parts)


# row 30
@pytest.mark.parametrize(("text", "parts"), FILES, ids=lambda v: repr(v)[:40])
def test_a_mistake_in_the_file_is_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path, text, parts):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    check(complaint(capsys, monkeypatch, ["--config", str(path)]), parts)


# row 30
def test_a_file_that_is_no_text_is_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xd8\xff\xe0 a photograph")
    check(complaint(capsys, monkeypatch, ["--config", str(path)]), ["--config", "no text"])


# row 30
def test_two_config_files_are_refused(capsys, monkeypatch):
    both = ["--config", str(CONFIGS[0]), "--config", str(CONFIGS[1])]
    check(complaint(capsys, monkeypatch, both), ["--config takes one file"])


# row 30
def test_a_batch_that_the_ranks_cannot_share_is_refused_before_they_meet(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    check(complaint(capsys, monkeypatch, []), ["train.batch_size", "3 ranks", "128"])
    monkeypatch.setenv("WORLD_SIZE", "128")
    check(complaint(capsys, monkeypatch, []), ["train.batch_size", "256 or more", "128"])


def test_only_rank_0_complains(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert command.main(["--data.nc", "2"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_is_valid(path):
    options = parse(["--config", str(path)])
    assert options.config_name == path.stem
    assert parse(["--config", str(path), "--optim.lr", "1e-4"]).config.optim.lr == 1e-4


def test_celeba64_is_the_tutorial():
    cfg = parse(["--config", str(ROOT / "configs/celeba64.yaml")]).config
    assert (cfg.data.image_size, cfg.data.nc, cfg.model.nz, cfg.model.ngf, cfg.model.ndf) == (64, 3, 100, 64, 64)
    assert (cfg.optim.lr, cfg.optim.beta1, cfg.train.batch_size, cfg.train.num_epochs) == (2e-4, 0.5, 128, 5)
    assert cfg.train.num_steps(202_599) == 7915
    assert not cfg.data.flip


def test_all_fields_yaml_holds_every_field_with_its_default():
    values = yaml.safe_load((ROOT / "configs/all_fields.yaml").read_text())
    assert values == to_dict(Config()), "run: python -m pipeline.cli.all_fields > configs/all_fields.yaml"


def test_a_config_survives_yaml_and_back():
    cfg = Config(
        data=DataConfig(image_size=[64, 96], flip=True), optim=OptimConfig(lr=1e-5), train=TrainConfig(batch_size=64)
    )
    assert from_dict(load_yaml(to_yaml(cfg))) == cfg
    assert from_dict(yaml.safe_load(to_yaml(cfg))) == cfg


def test_values_of_an_unknown_key_are_refused():
    with pytest.raises(ConfigError, match=r"data\.ncc.*data\.nc\?"):
        from_dict({"data": {"ncc": 3}})


def test_every_field_has_a_text_for_help(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for key in known_keys():
        assert f"--{key} " in text, key
    assert "Images a step, over all ranks together" in text.replace("\n", " ")


def test_print_config_prints_the_resolved_settings(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--train.batch_size", "64", "--print_config"])
    assert ended.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["batch_size"] == 64


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("sqrt", 2.0), ("linear", 4.0)])
def test_the_learning_rate_grows_by_its_rule(rule, factor):
    assert OptimConfig(lr=1e-4, lr_rule=rule).scaled_lr(512) == pytest.approx(1e-4 * factor)


@pytest.mark.parametrize(
    ("epochs", "limit", "images", "batch", "steps"),
    [
        (5, 0, 202_599, 128, 7915),
        (5, 1000, 202_599, 128, 8),
        (1, 0, 3, 128, 1),
        (0.5, 0, 100, 10, 5),
        (1, 10, 1000, 4, 3),
    ],
)
def test_a_run_has_the_promised_number_of_steps(epochs, limit, images, batch, steps):
    assert TrainConfig(num_epochs=epochs, max_images=limit, batch_size=batch).num_steps(images) == steps


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().data.nc = 1
