"""Which arithmetic `auto` means on a CPU, by what the CPU has and what oneDNN may use."""

from __future__ import annotations

import pytest
import torch

from pipeline import precision


@pytest.fixture
def cpu(monkeypatch):
    """A CPU with the named instructions under a limit for oneDNN."""

    def make(instructions: set[str], limit: str | None = None) -> str:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "AMX" in instructions)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "AVX512_BF16" in instructions)
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            monkeypatch.delenv(name, raising=False)
        if limit:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        return precision.resolve("auto", torch.device("cpu"))

    return make


def test_bf16_where_instructions_are_made_for_it(cpu):
    assert cpu({"AMX", "AVX512_BF16"}) == "bf16"
    assert cpu({"AVX512_BF16"}) == "bf16"
    assert cpu(set()) == "fp32"


@pytest.mark.parametrize(
    ("instructions", "limit", "expected"),
    [
        ({"AMX", "AVX512_BF16"}, "AVX10_1_512_AMX", "bf16"),
        ({"AMX", "AVX512_BF16"}, "AVX512_CORE_BF16", "bf16"),
        ({"AMX", "AVX512_BF16"}, "AVX2", "fp32"),
        ({"AVX512_BF16"}, "AVX512_CORE_BF16", "bf16"),
        ({"AVX512_BF16"}, "avx512_core_fp16", "bf16"),
        ({"AVX512_BF16"}, "AVX512_CORE", "fp32"),
        ({"AVX512_BF16"}, "AVX2", "fp32"),
        ({"AVX512_BF16"}, "DEFAULT", "bf16"),
    ],
)
def test_a_limit_for_onednn_counts(cpu, instructions, limit, expected):
    assert cpu(instructions, limit) == expected
