"""Under TRITON_INTERPRET=1 (tests/test_triton.py sets it) the same checks are of Triton's kernels."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import native
from kernels.gather import _gather, _table, gather, gather_reference
from kernels.language import INTERPRETED
from tests.numerics import DEVICES, FLOATS, fresh_memory_is_nan, load_native

CASES = [  # M, S, T, C, H, W, N
    (5, 9, 7, 3, 9, 7, 4),
    (3, 8, 8, 1, 6, 5, 6),
    (4, 12, 33, 4, 11, 32, 2),
    (1, 20, 24, 3, 20, 24, 1),
]


@pytest.fixture(autouse=True, params=["torch", "native"])
def _by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the plain way, then the C kernel."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_libraries", {})
    elif INTERPRETED:
        pytest.skip("the interpreter is asked about Triton's kernel")
    else:
        load_native()


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with fresh_memory_is_nan():
        yield


def draw(case: tuple[int, ...], device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    m, s, t, c, h, w, n = case
    random = torch.Generator().manual_seed(sum(case))
    images = torch.randint(0, 256, (m, s, t, c), dtype=torch.uint8, generator=random)
    rows, flip, top, left = (torch.randint(0, limit, (n,), generator=random) for limit in (m, 2, s - h + 1, t - w + 1))
    found = images, rows, flip.bool(), top, left
    return tuple(each.to(device) for each in found)  # type: ignore[return-value]


def assert_equal(result: Tensor, expected: Tensor) -> None:
    """To the bit; under the interpreter, which cuts off, to one step of the type."""
    assert result.dtype == expected.dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    steps = torch.finfo(result.dtype).eps if INTERPRETED else 0.0
    torch.testing.assert_close(result, expected, rtol=steps, atol=0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES)
def test_rows_are_cropped_mirrored_and_normalised_as_the_definition_says(case: tuple, dtype: torch.dtype, device: str):
    images, rows, flip, top, left = draw(case, device)
    size = case[4], case[5]
    expected = gather_reference(*(x.cpu() for x in (images, rows, flip, top, left)), *size, dtype)
    assert_equal(gather(images, rows, dtype, flip=flip, top=top, left=left, size=size).cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_whole_images_need_no_offsets_and_may_go_unmirrored(device: str):
    images, rows, flip, *_ = draw(CASES[0], device)
    whole = gather(images, rows, torch.float32)
    exact = images.cpu()[rows.cpu()].permute(0, 3, 1, 2).double() / 127.5 - 1
    torch.testing.assert_close(whole.cpu().double(), exact, rtol=0.0, atol=torch.finfo(torch.float32).eps)
    mirrored = gather(images, rows, torch.float32, flip=flip)
    expected = torch.where(flip[:, None, None, None], whole.flip(3), whole)
    assert torch.equal(mirrored, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_byte_is_the_value_that_a_decoder_would_have_given(dtype: torch.dtype, device: str):
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    result = gather(every.to(device), torch.zeros(1, dtype=torch.int64, device=device), dtype)
    assert_equal(result.cpu(), (every.permute(0, 3, 1, 2).float() / 127.5 - 1).to(dtype))


@pytest.mark.parametrize("width", [5, 21, 22, 64])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_nothing_is_written_behind_the_last_row(channels: int, width: int):
    """What is written beyond another row's end, the next row covers."""
    if not native.loaded():
        pytest.skip("of the C kernel")
    images, rows, *_ = draw((5, 6, width, channels, 6, width, 6), "cpu")
    for flip in (None, torch.ones(6, dtype=torch.uint8)):
        memory = torch.full((6 * 6 * width * channels + 64,), 7.0, dtype=torch.bfloat16)
        tensors = (images, rows, flip, None, None, _table(torch.bfloat16), memory)
        native.library().dcgan_gather_16(*map(native.pointer, tensors), 6, 6, width, 6, width, channels)
        assert (memory[:-64].abs() <= 1).all()
        assert (memory[-64:] == 7).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("width", [5, 21, 22, 64, 70])
def test_rows_of_any_length_are_mirrored(channels: int, width: int):
    """Those of 16-bit numbers go through registers of 64 bytes."""
    case = (5, 6, width + 3, channels, 4, width, 6)
    images, rows, flip, top, left = draw(case, "cpu")
    expected = gather_reference(images, rows, flip, top, left, 4, width, torch.bfloat16)
    result = gather(images, rows, torch.bfloat16, flip=flip, top=top, left=left, size=(4, width))
    assert_equal(result, expected)


@pytest.mark.skipif(INTERPRETED, reason="of the registration, not of the kernels")
@pytest.mark.parametrize("device", DEVICES)
def test_the_operator_is_registered_as_torch_expects(device: str):
    images, rows, flip, top, left = draw(CASES[1], device)
    torch.library.opcheck(_gather, (images, rows, flip, top, left, 6, 5, torch.bfloat16))
    torch.library.opcheck(_gather, (images, rows, None, None, None, 8, 8, torch.float32))


@pytest.mark.gpu
def test_offsets_beyond_32_bits_reach_the_right_image():
    side = 1024
    images = torch.zeros(2**31 // (side * side * 3) + 2, side, side, 3, dtype=torch.uint8, device="cuda")
    images[-1] = 255
    last = torch.tensor([len(images) - 1, 0], device="cuda")
    out = gather(images, last, torch.bfloat16)
    assert (out[0] == 1).all()
    assert (out[1] == -1).all()
