import numpy as np
import pytest
import torch

from pipeline.philox import WORD, Stream, key_of, normal, philox4x32, uniform, words

# kat_vectors of Random123 1.14 for philox4x32, 10 rounds: counter, key, result.
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD, WORD, WORD, WORD), (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
@pytest.mark.parametrize("array", [lambda c: np.array([c], np.int64), lambda c: torch.tensor([c])])
def test_published_vectors_come_out_of_numpy_and_torch(counter, key, expected, array):
    assert tuple(int(w[0]) for w in philox4x32(tuple(array(c) for c in counter), key)) == expected


def test_the_whole_seed_and_the_whole_image_number_count():
    numbers = np.array([5, 5 + (1 << 32)])
    first, second = words(1, Stream.AUGMENT, numbers)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, words(1 + (1 << 32), Stream.AUGMENT, numbers)[0])
    assert key_of((7 << 32) | 3) == (3, 7)


def test_streams_and_lanes_share_no_numbers():
    drawn = [words(3, stream, np.arange(50), lane).tobytes() for stream in Stream for lane in range(3)]
    assert len(set(drawn)) == len(drawn)


def test_uniforms_fill_the_unit_interval():
    u = uniform(1, Stream.AUGMENT, np.arange(20_000))
    assert u.min() >= 0
    assert u.max() < 1
    assert np.histogram(u, 10, (0, 1))[0].min() > 0.95 * u.size / 10


def test_normals_are_standard_and_independent_of_how_they_are_sliced():
    whole = normal(4, Stream.LATENT, torch.arange(1000), 101)
    assert whole.shape == (1000, 101)
    assert whole.dtype == torch.float32
    assert abs(whole.mean()) < 0.01
    assert abs(whole.std() - 1) < 0.01
    kurtosis = (whole**4).mean() / (whole**2).mean() ** 2
    assert abs(kurtosis - 3) < 0.1
    parts = torch.cat([normal(4, Stream.LATENT, torch.arange(a, a + 8), 101) for a in range(0, 1000, 8)])
    assert torch.equal(parts, whole)


def test_box_muller_stays_finite_at_the_ends_of_the_range():
    # The radius takes the logarithm of (u + 1) / 2^32, u the word itself: its ends are 2^-32 and 1.
    assert np.isfinite(np.sqrt(-2 * np.log((np.array([0.0, WORD]) + 1) * 2.0**-32))).all()


@pytest.mark.gpu
def test_cpu_and_gpu_draw_the_same_normals():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    cpu = normal(4, Stream.LATENT, torch.arange(4096), 100)
    gpu = normal(4, Stream.LATENT, torch.arange(4096, device="cuda"), 100).cpu()
    assert (cpu - gpu).abs().max() <= 2**-22  # one unit in the last place of numbers below 8
    assert (cpu == gpu).float().mean() > 0.999
