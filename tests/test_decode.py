import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline.decode
from pipeline import augment
from pipeline.config import ConfigError, DataConfig
from pipeline.decode import choose_decoder, dali_problem, window_shape
from pipeline.decode.pillow import PillowDecoder, decode
from pipeline.errors import DataError
from pipeline.index import Dataset, open_dataset
from tests.images import HEIGHT, WIDTH, jpeg_bytes, odd_images, portrait

needs_dali = pytest.mark.skipif(bool(dali_problem()), reason=f"DALI cannot be imported: {dali_problem()}")
DECODERS = ["pillow", pytest.param("dali", marks=needs_dali)]
CPU = torch.device("cpu")

# Of 255, between the decoders' pixels.  Measured on 1,024 photographs of 426 sizes in every mode below: mean 0.09 to
# 0.13, worst image 0.32 to 0.44 (DALI 2.4, Pillow 13, 2026-11).
MEAN_TOLERANCE = 0.25
WORST_TOLERANCE = 1.0


def write_photographs(folder: Path, count: int) -> None:
    """JPEGs of many sizes, shapes, qualities and subsamplings, with some grain, as photographs have it."""
    rng = np.random.default_rng(5)
    for number in range(count):
        height, width = rng.integers(70, 260, 2).tolist()
        grain = rng.normal(0, 6, (height, width, 3))
        scene = (portrait(height, width) + grain).clip(0, 255).astype(np.uint8)
        data = jpeg_bytes(Image.fromarray(scene), quality=75 + number % 20, subsampling=number % 3)
        (folder / f"photograph{number:02}.jpg").write_bytes(data)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("images")
    odd_images(folder)
    write_photographs(folder, 24)
    return open_dataset(DataConfig(dataroot=str(folder), cache_dir=str(tmp_path_factory.mktemp("cache"))))


def decoded(cfg: DataConfig, dataset: Dataset, decoder: str, threads: int = 2) -> np.ndarray:
    """All images in order, (len, H, W, C), image n augmented with the parameters of number n."""
    items = np.array_split(np.arange(len(dataset)), 3)
    params = [augment.parameters(cfg, 3, batch) for batch in items]
    if decoder == "pillow":
        height, width, channels = window_shape(cfg)
        pillow = PillowDecoder(dataset, (height, width), channels, threads)
        windows = list(pillow.windows(items))
        pillow.close()
        return np.concatenate([augment.apply_numpy(w, p, cfg.size) for w, p in zip(windows, params, strict=True)])
    from pipeline.decode.dali import DaliDecoder

    dali = DaliDecoder(cfg, dataset, device=CPU, threads=threads, max_batch=len(items[0]))
    batches = [torch.from_dlpack(output) for output in dali.images(zip(items, params, strict=True))]
    dali.close()
    return torch.cat(batches).numpy()


def by_name(dataset: Dataset, images: np.ndarray) -> dict[str, np.ndarray]:
    return {Path(dataset.key(i)).stem: image for i, image in enumerate(images)}


JITTER: dict[str, Any] = {"brightness": 0.2, "contrast": 0.2}
COLOUR: dict[str, Any] = JITTER | {"saturation": 0.3, "hue": 20.0}


@needs_dali
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nc": 1},
        {"nc": 4},
        {"image_size": [32, 64], "flip": True},
        {"crop_margin": 8, "flip": True, **COLOUR},
        {"crop_margin": 8, "flip": True, "nc": 1, **JITTER},
        {"crop_margin": 8, "flip": True, "nc": 4, **COLOUR},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_the_decoders_agree(dataset: Dataset, settings: dict[str, Any]) -> None:
    cfg = DataConfig(**settings)
    difference = np.abs(decoded(cfg, dataset, "pillow").astype(int) - decoded(cfg, dataset, "dali"))
    by_image = difference.reshape(len(dataset), -1).mean(1)
    assert by_image.mean() < MEAN_TOLERANCE
    assert by_image.max() < WORST_TOLERANCE, dataset.key(int(by_image.argmax()))


def shown(scene: Image.Image) -> np.ndarray:
    """A scene of WIDTH x HEIGHT as its 64 x 64 picture should be."""
    return np.asarray(scene.resize((64, 76), Image.Resampling.BILINEAR).crop((0, 6, 64, 70))).astype(int)


def blocks(image: np.ndarray) -> np.ndarray:
    """Means of 8 x 8 pixels."""
    return image.reshape(8, 8, 8, 8, -1).mean((1, 3))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("nc", [1, 3, 4])
def test_odd_files_show_the_scene_they_hold(dataset: Dataset, decoder: str, nc: int, tmp_path: Path) -> None:
    images = by_name(dataset, decoded(DataConfig(nc=nc), dataset, decoder))
    scene = Image.fromarray(portrait())
    for name in odd_images(tmp_path):
        colourless = nc == 1 or name.startswith(("gray", "one_bit"))
        expected = shown(scene.convert("L"))[..., None] if colourless else shown(scene)
        found = images[name][..., : min(nc, 3)]
        if name == "one_bit":  # the scene is in the density of its dots
            assert np.abs(blocks(found) - blocks(expected)).mean() < 10, name
        else:  # JPEG at quality 92 and a palette of 64 colours lose a little
            assert np.abs(found - expected).mean() < 3, name


@pytest.mark.parametrize("decoder", DECODERS)
def test_alpha_is_kept_where_asked_for_and_opaque_where_there_is_none(dataset: Dataset, decoder: str) -> None:
    with_alpha = by_name(dataset, decoded(DataConfig(nc=4), dataset, decoder))
    without = by_name(dataset, decoded(DataConfig(nc=3), dataset, decoder))
    ramp = np.linspace(40, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)
    for name, image in with_alpha.items():
        np.testing.assert_array_equal(image[..., :3], without[name])
        if name in ("rgba", "gray_alpha"):
            np.testing.assert_allclose(image[..., 3], shown(Image.fromarray(ramp)), atol=1, err_msg=name)
        elif name == "palette_transparent":
            assert (image[..., 3].min(), image[..., 3].max()) == (0, 255)
        else:
            assert image[..., 3].min() == 255, name


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_number_of_threads_changes_nothing(dataset: Dataset, decoder: str) -> None:
    one, three = (decoded(DataConfig(), dataset, decoder, threads) for threads in (1, 3))
    np.testing.assert_array_equal(one, three)


def test_a_damaged_file_is_named() -> None:
    data = np.frombuffer(jpeg_bytes(Image.fromarray(portrait())), np.uint8)
    for damaged in (data[: len(data) // 2], np.zeros(100, np.uint8), data[:0]):
        with pytest.raises(DataError, match=r"^holiday/me\.jpg cannot be decoded"):
            decode(damaged, (HEIGHT, WIDTH), (64, 64), 3, "holiday/me.jpg")


def test_a_file_of_another_size_than_indexed_is_named() -> None:
    data = np.frombuffer(jpeg_bytes(Image.fromarray(portrait())), np.uint8)
    with pytest.raises(DataError, match=r"me\.jpg is 96 x 80 pixels, and was 80 x 96"):
        decode(data, (WIDTH, HEIGHT), (64, 64), 3, "me.jpg")


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.array([[0, 128, 129, 32767, 65407, 65535]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(values, 6, axis=0)).save(buffer, "PNG")
    window = decode(np.frombuffer(buffer.getvalue(), np.uint8), (6, 6), (6, 6), 1, "deep.png")
    assert window[0, :, 0].tolist() == [0, 0, 1, 127, 255, 255]


@pytest.fixture
def _no_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.decode, "dali_problem", lambda: "No module named 'nvidia.dali'")


@pytest.mark.usefixtures("_no_dali")
def test_without_dali_auto_means_pillow_and_says_why() -> None:
    decoder, reason = choose_decoder(DataConfig())
    assert decoder == "pillow"
    assert "No module named" in reason


@pytest.mark.usefixtures("_no_dali")
def test_dali_asked_for_by_name_but_missing_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"data\.decoder .*'dali'"):
        choose_decoder(DataConfig(decoder="dali"))
