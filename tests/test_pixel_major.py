"""The C layers against their definitions in float64: values, gradients, running statistics, any number of threads."""

import pytest
import torch
from torch import Tensor

from kernels import native, pixel_major
from tests.numerics import load_native

# bf16 keeps 8 bits: a rounded number is off by 2^-9 at most, by 0.4 of that in the root of the mean square, and a
# result is rounded once.  What is kept in float32 is off by the order of its sum only: by that of Winograd's, whose
# terms are sums themselves, by up to 1e-6 here.
ROUNDED = {torch.bfloat16: 2.0**-9, torch.float32: 2e-6}
FLOAT32 = 1e-5
SHAPES = [
    # images, small height, small width, C_s, C_l: odd sides, a last half block of images, unequal channels
    (16, 1, 1, 32, 32),
    (48, 3, 4, 64, 32),
    (80, 5, 2, 32, 96),
    (32, 4, 4, 128, 64),
]
IN_FLOAT32 = [(1, 2, 2, 32, 32), (7, 1, 3, 160, 64), (23, 2, 1, 64, 32), (200, 2, 3, 32, 64)]
"""Numbers of images that bf16 does not take: single rows, and more than are computed at a time."""


@pytest.fixture(params=["bf16", "float32", "float32 by AVX2"])
def dtype(request, monkeypatch):
    """Whose kernels are loaded: those of the processor, or of a smaller one."""
    dtype = torch.bfloat16 if request.param == "bf16" else torch.float32
    if "AVX2" in request.param:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        monkeypatch.setattr(native, "_libraries", {})
    load_native(dtype)
    if "AVX2" in request.param:
        assert native.processor(dtype) == "x86-64-v3"
    return dtype


def skip_unless_taken(dtype: torch.dtype, images: int) -> None:
    if images % pixel_major.IMAGES[dtype]:
        pytest.skip("the kernels for bf16 take images by 16")


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers that bf16 holds exactly, in float32."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale
    return values.bfloat16().float()


def weights(*shape: int) -> Tensor:
    """As a channels-last parameter lies."""
    return random(*shape, seed=1, scale=0.02).contiguous(memory_format=torch.channels_last)


def off(ours: Tensor, exact: Tensor) -> float:
    assert ours.shape == exact.shape, (ours.shape, exact.shape)
    return float((ours.detach().double() - exact).norm() / exact.norm())


def compare(
    dtype: torch.dtype, operation, reference, inputs: list[Tensor], options: tuple = (), passes=(True, True)
) -> None:
    """Output, then the gradient of every input: activations in this type, weights in float32."""
    ours = [x.clone() if (x.dim() == 4 and x.shape[-1] == 4) or x.dim() == 1 else x.clone().to(dtype) for x in inputs]
    exact = [x.double() for x in inputs]
    for x, y, wanted in zip(ours, exact, passes, strict=True):
        x.requires_grad_(wanted)
        y.requires_grad_(wanted)
    out, expected = operation(*ours, *options), reference(*exact, *options)
    assert out.dtype == dtype
    assert off(out, expected.detach()) < ROUNDED[dtype]
    d_out = random(*out.shape, seed=7)
    out.backward(d_out.to(dtype))
    expected.backward(d_out.double())
    for x, y, wanted in zip(ours, exact, passes, strict=True):
        assert (x.grad is not None) == wanted
        if wanted:
            assert x.grad.dtype == x.dtype
            assert off(x.grad, y.grad) < (FLOAT32 if x.shape[-2:] == (4, 4) else ROUNDED[dtype]), x.shape


@pytest.fixture(autouse=True)
def _memory_full_of_nan():
    """An element that a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("n", "height", "width", "cs", "cl"), SHAPES + IN_FLOAT32)
def test_a_convolution_and_its_gradients_are_the_definitions(dtype, n, height, width, cs, cl):
    skip_unless_taken(dtype, n)
    inputs = [random(2 * height, 2 * width, n, cl), weights(cs, cl, 4, 4)]
    compare(dtype, pixel_major.conv, pixel_major.conv_reference, inputs)


@pytest.mark.parametrize(("n", "height", "width", "cs", "cl"), SHAPES + IN_FLOAT32)
def test_a_transposed_convolution_and_its_gradients_are_the_definitions(dtype, n, height, width, cs, cl):
    skip_unless_taken(dtype, n)
    inputs = [random(height, width, n, cs), weights(cs, cl, 4, 4)]
    compare(dtype, pixel_major.conv_transpose, pixel_major.conv_transpose_reference, inputs)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("n", "height", "width", "cs"), [(16, 1, 2, 32), (48, 3, 5, 64), (80, 4, 4, 32), (1, 2, 1, 32), (23, 3, 2, 64)]
)
def test_the_ends_and_their_gradients_are_the_definitions(dtype, n, height, width, cs, channels):
    skip_unless_taken(dtype, n)
    weight = weights(cs, channels, 4, 4)
    images = random(n, channels, 2 * height, 2 * width).contiguous(memory_format=torch.channels_last)

    def image_conv(x, w):
        return pixel_major.image_conv(x, w, 1.0)

    def image_conv_reference(x, w):
        return pixel_major.image_conv_reference(x, w, 1.0)

    both = [images.double().to(dtype).requires_grad_(), weight.clone().requires_grad_()]
    exact = [images.double().requires_grad_(), weight.double().requires_grad_()]
    out, expected = image_conv(*both), image_conv_reference(*exact)
    assert off(out, expected.detach()) < ROUNDED[dtype]
    d_out = random(*out.shape, seed=7)
    out.backward(d_out.to(dtype))
    expected.backward(d_out.double())
    assert off(both[0].grad, exact[0].grad) < ROUNDED[dtype]
    assert off(both[1].grad, exact[1].grad) < FLOAT32
    compare(
        dtype,
        pixel_major.image_conv_transpose,
        pixel_major.image_conv_transpose_reference,
        [random(height, width, n, cs), weight],
    )


def test_the_leaky_relu_of_the_first_layer_lets_through_what_its_output_says(dtype):
    images = random(16, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    weight = weights(32, 3, 4, 4)
    ours = images.clone().to(dtype).requires_grad_(), weight.clone().requires_grad_()
    exact = images.double().requires_grad_(), weight.double().requires_grad_()
    out = pixel_major.image_conv(*ours, 0.2)
    expected = pixel_major.image_conv_reference(*exact, 0.2)
    assert off(out, expected.detach()) < ROUNDED[dtype]
    d_out = random(*out.shape, seed=7)
    out.backward(d_out.to(dtype))
    expected.backward(d_out.double())
    # The gradient below 0 is rounded before it goes on: one more rounding.
    assert off(ours[0].grad, exact[0].grad) < 2 * ROUNDED[dtype]
    assert off(ours[1].grad, exact[1].grad) < ROUNDED[dtype]


@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("height", "width", "n", "c"), [(1, 1, 16, 32), (3, 2, 48, 64), (4, 4, 32, 96)])
def test_batchnorm_its_gradients_and_running_statistics_are_the_definitions(dtype, height, width, n, c, groups, slope):
    x = (random(height, width, n, c) * 3 + random(c, seed=2)).bfloat16().float()
    weight, bias = 1 + random(c, seed=3, scale=0.1), random(c, seed=4, scale=0.1)
    ours = [x.clone().to(dtype).requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    exact = [x.double().requires_grad_(), weight.double().requires_grad_(), bias.double().requires_grad_()]
    running = torch.zeros(c), torch.ones(c)
    running_exact = torch.zeros(c).double(), torch.ones(c).double()
    out = pixel_major.batchnorm_act(*ours, *running, 0.1, 1e-5, slope, groups)
    expected = pixel_major.batchnorm_act_reference(*exact, *running_exact, 0.1, 1e-5, slope, groups)
    assert off(out, expected.detach()) < ROUNDED[dtype]
    for mine, theirs in zip(running, running_exact, strict=True):
        assert off(mine, theirs) < FLOAT32
    d_out = random(*out.shape, seed=7)
    out.backward(d_out.to(dtype))
    expected.backward(d_out.double())
    assert off(ours[0].grad, exact[0].grad) < ROUNDED[dtype]
    for mine, theirs in zip(ours[1:], exact[1:], strict=True):
        assert off(mine.grad, theirs.grad) < FLOAT32


def test_a_large_mean_does_not_eat_a_small_variance(dtype):
    x = (random(4, 4, 32, 32) + 100).to(dtype)
    exact = x.double()
    y = pixel_major.batchnorm_act(x, torch.ones(32), torch.zeros(32), None, None, 0.1, 1e-5, 1.0)
    expected = pixel_major.batchnorm_act_reference(
        exact, torch.ones(32).double(), torch.zeros(32).double(), None, None, 0.1, 1e-5, 1.0
    )
    # The mean, 100 deviations large, is a float32 itself.
    assert off(y, expected) < max(ROUNDED[dtype], 100 * 2.0**-24)


def test_a_nan_in_one_image_shows_in_the_output(dtype):
    x = random(4, 4, 16, 32).to(dtype)
    x[2, 1, 3, 5] = torch.nan
    found = pixel_major.conv(x, weights(32, 32, 4, 4)).isnan()
    reached = torch.zeros(2, 2, 16, dtype=torch.bool)
    reached[:, :, 3] = torch.tensor([[True, True], [True, True]])  # row 2 lies under both, and so does column 1
    assert torch.equal(found.all(dim=3), reached)
    assert torch.equal(found.any(dim=3), reached)
    normed = pixel_major.batchnorm_act(x, torch.ones(32), torch.zeros(32), None, None, 0.1, 1e-5, 0.2)
    assert normed[..., 5].isnan().all()
    assert not normed[..., 4].isnan().any()


@pytest.mark.parametrize(
    ("dtype_", "flags", "limit", "expected"),
    [
        (torch.float32, native._FOR_AVX2 | native._FOR_AVX512, "", "x86-64-v4"),
        (torch.float32, native._FOR_AVX2 | native._FOR_AVX512, "AVX512_CORE", "x86-64-v4"),
        (torch.float32, native._FOR_AVX2 | native._FOR_AVX512, "avx2", "x86-64-v3"),
        (torch.float32, native._FOR_AVX2, "", "x86-64-v3"),
        (torch.float32, native._FOR_AVX2, "SSE41", "ONEDNN_MAX_CPU_ISA=SSE41 forbids AVX2"),
        (torch.float32, {"sse2", "avx2"}, "", "the processor lacks bmi1, bmi2, f16c, fma, movbe"),
        (torch.bfloat16, native._FOR_AMX, "", "sapphirerapids"),
        (torch.bfloat16, native._FOR_AMX, "AVX512_CORE_AMX", "sapphirerapids"),
        (torch.bfloat16, native._FOR_AMX, "AVX512_CORE", "ONEDNN_MAX_CPU_ISA=AVX512_CORE forbids AMX"),
        (torch.bfloat16, native._FOR_AVX2, "", "the processor has no AMX"),
    ],
)
def test_what_they_are_compiled_for_is_what_the_processor_has_and_no_limit_forbids(
    monkeypatch, dtype_, flags, limit, expected
):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(native, "_cpu_flags", lambda: set(flags))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx_tile" in flags)
    try:
        found = native.processor(dtype_)
    except native.NativeError as error:
        found = str(error)
    assert found == expected


def test_the_number_of_threads_changes_no_bit(dtype):
    """Each element is summed by one thread, in one order."""
    large, small = random(8, 8, 48, 64).to(dtype), random(4, 4, 48, 192).to(dtype)
    weight, image_weight = weights(192, 64, 4, 4), weights(192, 3, 4, 4)
    images = random(48, 3, 8, 8).contiguous(memory_format=torch.channels_last).to(dtype)
    one, zero = torch.ones(192), torch.zeros(192)

    def everything() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (large, weight, small, image_weight, images, one, zero)]
        big, w, little, iw, pictures, scale, shift = leaves
        out = pixel_major.conv(big, w).float().sum() + pixel_major.conv_transpose(little, w).float().pow(2).sum()
        out = out + pixel_major.image_conv(pictures, iw, 0.2).float().pow(2).sum()
        out = out + pixel_major.image_conv_transpose(little, iw).float().pow(2).sum()
        normed = pixel_major.batchnorm_act(little, scale, shift, None, None, 0.1, 1e-5, 0.2, 3)
        (out + normed.float().pow(3).sum()).backward()
        return [leaf.grad for leaf in leaves]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = everything()
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            for ours, theirs in zip(everything(), expected, strict=True):
                assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(before)
