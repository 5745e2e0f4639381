from typing import Any

import numpy as np
import pytest
import torch

from pipeline import augment
from pipeline.augment import Parameters, parameters
from pipeline.config import DataConfig
from pipeline.decode import dali_problem

EVERYTHING: dict[str, Any] = {"flip": True, "crop_margin": 6, "brightness": 0.3, "contrast": 0.4}
COLOUR: dict[str, Any] = {"saturation": 0.5, "hue": 30.0}


def windows(count: int, height: int, width: int, channels: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8, generator=generator)


def settings_of(channels: int) -> dict[str, Any]:
    return {"nc": channels} | EVERYTHING | ({} if channels == 1 else COLOUR)


def test_half_of_the_images_are_mirrored_and_every_crop_occurs() -> None:
    params = parameters(DataConfig(flip=True, crop_margin=6), 7, np.arange(4000))
    assert params.flip is not None
    assert params.top is not None
    assert params.left is not None
    assert abs(params.flip.mean() - 0.5) < 0.03
    for places in (params.top, params.left):
        counts = np.bincount(places, minlength=7)
        assert len(counts) == 7
        assert abs(counts - 4000 / 7).max() < 110  # 5 standard deviations


def test_factors_fill_their_ranges() -> None:
    params = parameters(DataConfig(**EVERYTHING, **COLOUR), 7, np.arange(4000))
    assert params.factors is not None
    for column, (middle, spread) in enumerate([(1, 0.3), (1, 0.4), (1, 0.5), (0, 30)]):
        values = params.factors[:, column]
        assert middle - spread <= values.min() < middle - 0.98 * spread
        assert middle + 0.98 * spread < values.max() <= middle + spread


def test_a_parameter_depends_on_seed_and_image_number_alone() -> None:
    cfg = DataConfig(**EVERYTHING, **COLOUR)
    whole = parameters(cfg, 7, np.arange(100))
    part = parameters(cfg, 7, np.arange(40, 60))
    for field in ("flip", "top", "left", "factors"):
        np.testing.assert_array_equal(getattr(whole, field)[40:60], getattr(part, field))
    other = parameters(cfg, 8, np.arange(100))
    assert whole.factors is not None
    assert other.factors is not None
    assert not (whole.factors == other.factors).any()


def test_switching_one_off_leaves_the_others_as_they_were() -> None:
    numbers = np.arange(50)
    everything = parameters(DataConfig(**EVERYTHING, **COLOUR), 7, numbers)
    crop_alone = parameters(DataConfig(crop_margin=6), 7, numbers)
    hue_alone = parameters(DataConfig(hue=30.0), 7, numbers)
    np.testing.assert_array_equal(everything.top, crop_alone.top)
    np.testing.assert_array_equal(everything.factors[:, 3], hue_alone.factors[:, 3])  # type: ignore[index]
    assert (hue_alone.factors[:, :3] == 1).all()  # type: ignore[index]


def test_nothing_is_copied_where_nothing_is_on() -> None:
    images = windows(4, 16, 16, 3)
    done = augment.apply(images, parameters(DataConfig(), 7, np.arange(4)), (16, 16))
    assert done.data_ptr() == images.data_ptr()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_crop_and_mirror_are_what_slicing_gives(channels: int) -> None:
    images = windows(20, 22, 30, channels)
    params = parameters(DataConfig(flip=True, crop_margin=6), 7, np.arange(20))
    done = augment.apply(images, params, (16, 24))
    for i in range(20):
        top, left = int(params.top[i]), int(params.left[i])  # type: ignore[index]
        cut = images[i, top : top + 16, left : left + 24]
        assert torch.equal(done[i], cut.flip(1) if params.flip[i] else cut)  # type: ignore[index]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_colour_is_its_float64_definition_rounded(channels: int) -> None:
    images = windows(30, 8, 8, channels)
    cfg = DataConfig(**(settings_of(channels) | {"flip": False, "crop_margin": 0}))
    params = parameters(cfg, 7, np.arange(30))
    done = augment.apply(images, params, (8, 8)).numpy()
    before = images.numpy().astype(float)
    for i, (brightness, contrast, saturation, hue) in enumerate(params.factors):  # type: ignore[arg-type]
        colours = before[i, ..., : min(channels, 3)]
        if channels > 1:
            y, u, v = np.moveaxis(colours @ augment.YIQ.T, -1, 0)
            turned = saturation * np.exp(-1j * np.deg2rad(hue)) * (u + 1j * v)
            colours = np.stack([y, turned.real, turned.imag], -1) @ np.linalg.inv(augment.YIQ).T
        expected = (brightness * (contrast * (colours - 128) + 128)).clip(0, 255)
        assert np.abs(done[i, ..., : min(channels, 3)] - expected).max() < 0.501  # a half, and float32's own rounding
    if channels == 4:
        np.testing.assert_array_equal(done[..., 3], before[..., 3])


def test_gray_stays_gray_under_hue_and_saturation() -> None:
    grays = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(10, 16, 16, 3).contiguous()
    params = parameters(DataConfig(**COLOUR), 7, np.arange(10))
    assert (augment.apply(grays, params, (16, 16)).int() - grays.int()).abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_path_for_gpus_gives_the_same_bits(channels: int) -> None:
    images = windows(50, 22, 30, channels)
    items = np.random.default_rng(3).integers(0, 50, 33)
    for settings in ({"nc": channels}, {"nc": channels, "flip": True}, settings_of(channels)):
        cfg = DataConfig(**settings)
        params = parameters(cfg, 7, np.arange(33))
        size = (16, 24) if cfg.crop_margin else (22, 30)
        host = augment.take_numpy(images.numpy(), items, params, size)
        device = augment.take_device(images, torch.from_numpy(items), params, size)
        assert torch.equal(torch.from_numpy(host), device)
        assert device.is_contiguous()


def test_a_batch_in_two_parts_gives_the_same_bits() -> None:
    images = windows(21, 22, 22, 3)
    cfg = DataConfig(**EVERYTHING, **COLOUR)
    whole = augment.apply(images, parameters(cfg, 7, np.arange(21)), (16, 16))
    parts = [
        augment.apply(images[part], parameters(cfg, 7, np.arange(21)[part]), (16, 16))
        for part in (slice(0, 10), slice(10, 21))
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_the_source_is_never_written_to() -> None:
    images = windows(6, 16, 16, 3)
    before = images.clone()
    augment.apply(images, parameters(DataConfig(brightness=0.5), 7, np.arange(6)), (16, 16))
    assert torch.equal(images, before)


@pytest.mark.skipif(bool(dali_problem()), reason=f"DALI cannot be imported: {dali_problem()}")
@pytest.mark.parametrize("channels", [1, 3])
def test_colour_is_that_of_dali(channels: int) -> None:
    import nvidia.dali

    dali: Any = nvidia.dali  # its stubs know less than it does
    fn = dali.fn
    images = windows(64, 16, 16, channels).numpy()
    cfg = DataConfig(**(settings_of(channels) | {"flip": False, "crop_margin": 0}))
    params = parameters(cfg, 7, np.arange(64))
    assert params.factors is not None
    names = ("brightness", "contrast", "saturation", "hue")[: 4 if channels == 3 else 2]
    factors = list(np.ascontiguousarray(params.factors.T, np.float32))[: len(names)]

    @dali.pipeline_def(batch_size=64, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph() -> Any:
        pixels, *given = fn.external_source(
            lambda: (images, *factors), num_outputs=1 + len(names), batch=True, layout=["HWC"] + [""] * len(names)
        )
        arguments = dict(zip(names, given, strict=True))
        if channels == 1:
            return fn.brightness_contrast(pixels, contrast_center=augment.MID_GRAY, **arguments)
        return fn.color_twist(pixels, **arguments)

    theirs = np.array(graph().run()[0].as_tensor()).astype(int)
    ours = augment.apply_numpy(images, Parameters(None, None, None, params.factors), (16, 16))
    assert np.abs(theirs - ours).max() <= 1
    assert (theirs != ours).mean() < 1e-3  # ties that a fused multiply-add breaks the other way
