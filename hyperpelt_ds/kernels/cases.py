"""The shapes that the ops are tested and timed on, as data; a name here is the name in every test and result."""

from __future__ import annotations

from dataclasses import dataclass


class _MixedBatch:
    """`samples` of so many `conditions` side by side; 0 means one for every sample (images)."""

    samples: int
    conditions: int

    @property
    def groups(self) -> int:
        return self.conditions or self.samples

    @property
    def ids(self) -> list[int]:
        """The condition of every sample, sorted, in groups as equal as they get."""
        return [sample * self.groups // self.samples for sample in range(self.samples)]


@dataclass(frozen=True)
class AdapterCase(_MixedBatch):
    """A stack of adapter sites."""

    name: str
    samples: int
    tokens: int
    size: int
    bottleneck: int
    hyper: int
    sites: int
    conditions: int

    @property
    def parameters(self) -> int:
        """Generated numbers of one site and condition (P)."""
        return 2 * self.size * self.bottleneck + self.size + self.bottleneck


@dataclass(frozen=True)
class PrefixCase(_MixedBatch):
    """Attention with prefix rows."""

    name: str
    samples: int
    queries: int
    keys: int
    heads: int
    size: int
    rows: int
    conditions: int
    hyper: int
    sites: int = 1


@dataclass(frozen=True)
class LowRankCase(_MixedBatch):
    """One linear map with a low-rank delta for every condition."""

    name: str
    samples: int
    tokens: int
    size: int
    rank: int
    conditions: int


ADAPTER_CASES = (
    AdapterCase("tasks4_B64_S32_m64", 64, 32, 768, 64, 64, 4, 4),  # the acceptance case on a CPU
    AdapterCase("tasks4_B64_S8_m64", 64, 8, 768, 64, 64, 4, 4),
    AdapterCase("tasks8_B16_S32_m24_d512", 16, 32, 512, 24, 64, 12, 8),  # launch/bench_step.py, mixed
    AdapterCase("one_task_B16_S32_m24_d512", 16, 32, 512, 24, 64, 12, 1),
    AdapterCase("images_B16_S32_m24_d512", 16, 32, 512, 24, 64, 12, 0),
    AdapterCase("images_B16_S8_m64", 16, 8, 768, 64, 64, 4, 0),
    AdapterCase("tasks8_B64_S64_m64", 64, 64, 768, 64, 64, 24, 8),
    AdapterCase("tasks8_B64_S512_m64", 64, 512, 768, 64, 64, 24, 8),
    AdapterCase("tasks8_B64_S512_m8", 64, 512, 768, 8, 64, 24, 8),
    AdapterCase("images_B64_S64_m64", 64, 64, 768, 64, 64, 24, 0),
    AdapterCase("images_B64_S512_m64", 64, 512, 768, 64, 64, 24, 0),
    AdapterCase("tasks8_B64_S64_m64_d4096", 64, 64, 4096, 64, 128, 8, 8),
    AdapterCase("images_B64_S64_m64_d4096", 64, 64, 4096, 64, 128, 4, 0),
    AdapterCase("tasks8_B256_S64_m64", 256, 64, 768, 64, 64, 24, 8),
    AdapterCase("images_B256_S64_m64", 256, 64, 768, 64, 64, 24, 0),
    AdapterCase("images_B64_S32_m24_L12", 64, 32, 768, 24, 64, 12, 0),
    AdapterCase("images_B64_S64_m64_L12", 64, 64, 768, 64, 64, 12, 0),
)

LOW_RANK_CASES = (
    LowRankCase("lora_tasks4_B64_S32_r8", 64, 32, 768, 8, 4),
    LowRankCase("lora_tasks16_B64_S8_r8", 64, 8, 768, 8, 16),
    LowRankCase("lora_images_B64_S8_r8", 64, 8, 768, 8, 0),
)

PREFIX_CASES = (
    PrefixCase("prefix_tasks4_B8_T8_P4", 8, 8, 8, 4, 16, 4, 4, 16),
    PrefixCase("prefix_images_B8_T8_P9", 8, 8, 8, 4, 16, 9, 0, 16),
    PrefixCase("prefix_tasks8_B64_T64_P16", 64, 64, 64, 12, 64, 16, 8, 64),
    PrefixCase("prefix_tasks8_B64_T512_P16", 64, 512, 512, 12, 64, 16, 8, 64),
    PrefixCase("prefix_images_B64_T20_P49", 64, 20, 20, 12, 64, 49, 0, 64),
    PrefixCase("prefix_images_B64_T8_S512_P49", 64, 8, 512, 12, 64, 49, 0, 64),  # attention to an encoder
    PrefixCase("prefix_images_B64_T64_P49_h64", 64, 64, 64, 64, 64, 49, 0, 128),
)

SUITES = {
    "smoke": ("tasks4_B64_S8_m64", "images_B16_S8_m64", *(case.name for case in PREFIX_CASES[:2])),
    "cpu": tuple(case.name for case in (*ADAPTER_CASES[:6], *LOW_RANK_CASES)),
    "gpu10": tuple(case.name for case in (*ADAPTER_CASES[6:15], *LOW_RANK_CASES, *PREFIX_CASES[2:])),
    "chunks": tuple(case.name for case in ADAPTER_CASES[15:]),
    "low_rank": tuple(case.name for case in LOW_RANK_CASES),
    "full": tuple(case.name for case in (*ADAPTER_CASES, *LOW_RANK_CASES, *PREFIX_CASES)),
}
