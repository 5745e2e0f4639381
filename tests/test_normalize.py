from collections.abc import Iterator

import pytest
import torch

from kernels.normalize import _normalize, normalize, normalize_reference


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """An element that the kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 8, 8, 1), (2, 8, 12, 3), (3, 7, 5, 4), (16, 96, 64, 3)]


def pictures(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_is_its_float64_value_rounded(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    exact = every.double().permute(0, 3, 1, 2) / 127.5 - 1
    rounding = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps  # half a unit, and float32's steps
    result = normalize(every, dtype)
    assert (result.double() - exact).abs().max() <= rounding
    assert result.min() == -1
    assert result.max() == 1


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_operator_equals_its_reference_in_value_and_layout(shape: tuple[int, ...], channels_last: bool) -> None:
    images = pictures(*shape)
    for dtype in DTYPES:
        expected = normalize_reference(images, dtype, channels_last)
        result = normalize(images, dtype, channels_last)
        assert torch.equal(result, expected)
        assert result.stride() == expected.stride()
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert result.is_contiguous(memory_format=layout)


def test_images_that_are_a_strided_view_come_out_right() -> None:
    images = pictures(2, 8, 16, 3)[:, :, ::2]
    assert torch.equal(normalize(images, torch.float32), normalize_reference(images, torch.float32))


def test_the_operator_is_registered_as_torch_expects() -> None:
    torch.library.opcheck(_normalize, (pictures(2, 8, 12, 3), torch.bfloat16, True))
    torch.library.opcheck(_normalize, (pictures(2, 8, 8, 1), torch.float32, False))
