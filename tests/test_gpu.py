"""What only a CUDA device can show; `make test-gpu` runs these and the other tests with the mark."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from pipeline import precision
from pipeline.config import OptimConfig
from pipeline.face_set import write_faces
from pipeline.models import Discriminator, Generator, initialise
from pipeline.players import make_players
from pipeline.step import METERS, FastStep, ReferenceStep

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parent.parent
N, NZ, WIDTH, SIDE = 16, 20, 16, 64


def make_step(kind, arithmetic: str, joint: bool = True):
    random = torch.Generator().manual_seed(0)
    pair = Generator(NZ, WIDTH, 3, SIDE, SIDE), Discriminator(WIDTH, 3, SIDE, SIDE)
    for network in pair:
        initialise(network, random)
        network.to(device="cuda", memory_format=torch.channels_last)
    precision.apply(arithmetic, deterministic=False)
    cfg = OptimConfig()
    players = make_players(*pair, cfg, lr=cfg.lr, precision=arithmetic)
    half_life = cfg.ema_half_life_images
    return kind(players, arithmetic, channels_last=True, ema_half_life_images=half_life, joint=joint)


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(100 + step)
    pixels = torch.randint(0, 256, (N, SIDE, SIDE, 3), generator=random, dtype=torch.uint8)
    return pixels.cuda(), torch.randn(N, NZ, generator=random).cuda()


@pytest.mark.parametrize("arithmetic", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", [ReferenceStep, FastStep])
def test_nothing_in_a_step_waits_for_the_device(kind, arithmetic):
    step = make_step(kind, arithmetic)
    batches = [data(i) for i in range(3)]
    for i in range(2):  # lazily made state, cuDNN's choice of algorithms
        step(*batches[i], 1000 + i * N, N)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        meters = step(*batches[2], 1000 + 2 * N, N)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(meters).all()


@pytest.mark.parametrize(("arithmetic", "tolerance"), [("fp32", 1e-3), ("bf16", 4e-2), ("fp16", 2e-2)])
def test_one_pass_of_both_halves_equals_the_tutorials_order(arithmetic, tolerance):
    fast, reference = make_step(FastStep, arithmetic), make_step(ReferenceStep, arithmetic)
    for step in (fast, reference):
        for scaler in (step.players.scaler_d, step.players.scaler_g):
            if scaler.is_enabled():
                scaler.load_state_dict(scaler.state_dict() | {"scale": 256.0})
    for i in range(3):
        ours, theirs = (dict(zip(METERS, s(*data(i), i * N, N).tolist(), strict=True)) for s in (fast, reference))
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance / 4), i


def test_a_run_on_the_gpu_resumes_bit_for_bit_when_asked_to_be_deterministic(tmp_path):
    write_faces(tmp_path / "faces", 40, workers=1)
    settings = {
        "data": {"image_size": 32, "cache_dir": str(tmp_path / "cache")},
        "model": {"nz": 8, "ngf": 8, "ndf": 8},
        "train": {"batch_size": 8, "num_epochs": 1000},
        "checkpoint": {"every_images": 80},
        "log": {"every_steps": 5, "grid_every_images": 0, "grid_size": 4},
        "run": {"deterministic": True},
    }
    (tmp_path / "gpu.yaml").write_text(yaml.safe_dump(settings))

    def train(run: str, images: int) -> None:
        paths = ["--config", str(tmp_path / "gpu.yaml"), "--data.dataroot", str(tmp_path / "faces")]
        options = ["--run.dir", str(tmp_path / run), "--train.max_images", str(images)]
        command = [sys.executable, str(ROOT / "launch/train.py"), *paths, *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    train("whole", 160)
    train("parts", 80)
    train("parts", 160)
    states = [
        torch.load(tmp_path / run / "checkpoints/images-000000160/state.pt", weights_only=True)
        for run in ("whole", "parts")
    ]
    for network in ("generator", "discriminator", "ema"):
        for name, value in states[0][network].items():
            assert torch.equal(value, states[1][network][name]), (network, name)
