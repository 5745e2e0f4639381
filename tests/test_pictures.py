"""Grids, PNGs and GIFs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import StorageError
from pipeline.pictures import GAP, grid, grid_shape, save_gif, save_png, to_image, to_uint8


def test_levels_are_rounded_and_clamped_and_channels_move_last() -> None:
    values = torch.tensor([-3.0, -1.0, -0.999, 0.0, 0.5, 1.0, 9.0, float("nan"), float("inf")])
    images = values.view(1, 1, 1, 9).expand(2, 3, 1, 9)
    found = to_uint8(images)
    assert found.shape == (2, 1, 9, 3)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    assert found[1, 0, :, 2].tolist() == [0, 0, 0, 128, 191, 255, 255, 128, 255]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_level_survives_the_way_to_floats_and_back(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=torch.float64)
    images = (levels / 127.5 - 1).to(dtype).view(1, 1, 16, 16)
    error = (to_uint8(images).flatten().double() - levels).abs().max()
    assert error <= 127.5 * torch.finfo(dtype).eps  # the dtype's rounding, in levels; a half more is rounded away


def test_a_memory_format_changes_no_pixel() -> None:
    images = torch.rand(2, 3, 5, 7) * 2 - 1
    assert torch.equal(to_uint8(images), to_uint8(images.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize(
    ("count", "shape"), [(1, (1, 1)), (2, (1, 2)), (5, (2, 3)), (9, (3, 3)), (10, (3, 4)), (64, (8, 8))]
)
def test_grids_are_near_square(count: int, shape: tuple[int, int]) -> None:
    assert grid_shape(count) == shape


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_every_picture_stands_in_its_place(channels: int, mode: str) -> None:
    images = torch.randint(0, 256, (5, 4, 6, channels), dtype=torch.uint8)
    image = grid(images)
    assert image.mode == mode
    assert image.size == (3 * 6 + 2 * GAP, 2 * 4 + GAP)
    pixels = np.asarray(image).reshape(image.height, image.width, channels)
    for i in range(5):
        top, left = i // 3 * (4 + GAP), i % 3 * (6 + GAP)
        assert np.array_equal(pixels[top : top + 4, left : left + 6], images[i].numpy())
    assert (pixels[4:6, :, 0] == 255).all()


def test_the_gaps_of_transparent_pictures_are_transparent() -> None:
    image = grid(torch.full((3, 4, 4, 4), 255, dtype=torch.uint8))
    assert image.getchannel("A").getextrema() == (0, 255)


def test_a_png_comes_back_as_it_was(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (6, 5, 3), dtype=torch.uint8)
    save_png(to_image(pixels), tmp_path / "new" / "a.png")
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert np.array_equal(np.asarray(image), pixels.numpy())
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]


def test_what_cannot_be_written_leaves_nothing_and_says_where(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*a\.png"):
        save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*b\.png"):
        save_png(Image.new("RGB", (4, 4)), tmp_path / "file" / "b.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "file"]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_gif_repeats_for_ever_at_its_pace(tmp_path: Path, mode: str) -> None:
    frames = [Image.new("L", (8, 8), 30 * i).convert(mode) for i in range(5)]
    save_gif(frames, tmp_path / "a.gif", 70)
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.info["loop"], image.info["duration"]) == (5, 0, 70)
        image.seek(3)
        assert image.convert("L").getpixel((4, 4)) == 90
