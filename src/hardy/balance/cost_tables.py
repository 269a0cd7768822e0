"""Published cost coefficients of Hydraulis and FlexSP. Facts and figures; times in milliseconds.

Sources: PKU-DAIR/Hetu, examples/hydraulis (Apache-2.0), the code of arXiv 2412.07894;
PKU-DAIR/Hetu-Galvatron, branch flexsp (Apache-2.0), the code of arXiv 2412.01523. Where a is 0 a fit had too
few points: no claim that attention costs nothing.
"""

from typing import NamedTuple


class TimeRow(NamedTuple):
    """One stage's micro-batch under tensor and pipeline degrees: c + sum of (a s^2 + b s)."""

    tensor: int
    pipeline: int
    a: float
    b: float
    c: float


class MemoryRow(NamedTuple):
    """What depends on the tensor degree."""

    tensor: int
    activation_bytes: int
    """Of each token, hidden unit and layer (A_tp)."""
    util_tokens: int
    """Smallest micro-batch that uses the GPU well."""


class Machine(NamedTuple):
    """A model on a GPU; memory in MiB."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    state_bytes: int
    """B, model-state constant."""
    gpu_mib: int
    safe_mib: int
    gap_mib: int
    times: tuple[TimeRow, ...]
    memory: tuple[MemoryRow, ...]


class FlexRow(NamedTuple):
    """FlexSP on 64 GPUs: group time = sum of (a s^2 + b s) / sp + communication + beta."""

    num_layers: int
    hidden_size: int
    activation_mib: float
    """Of each token."""
    a: float
    b: float
    beta: float
    params_gi: float
    """Parameters in units of 2^30."""


HYDRAULIS: dict[str, Machine] = {
    "hydraulis-7b": Machine(
        num_layers=32,
        hidden_size=4096,
        vocab_size=30592,
        state_bytes=210,
        gpu_mib=81252,
        safe_mib=6144,
        gap_mib=5000,
        times=(
            TimeRow(1, 2, 1.37240947e-06, 0.094647781, 15.0470588),
            TimeRow(1, 4, 9.55466937e-07, 0.0455224977, 14.2736842),
            TimeRow(1, 8, 4.71839253e-07, 0.0237632988, 7.74347826),
            TimeRow(2, 1, 2.05448457e-06, 0.0967076442, 65.1789773),
            TimeRow(2, 2, 1.02663458e-06, 0.0490736142, 31.8667215),
            TimeRow(2, 4, 5.24734001e-07, 0.0249896203, 17.4716021),
            TimeRow(2, 8, 2.61470756e-07, 0.0132181135, 8.65895843),
            TimeRow(4, 1, 1.0304334e-06, 0.0564777342, 56.697764),
            TimeRow(4, 2, 5.16172276e-07, 0.0285116473, 28.9897711),
            TimeRow(4, 4, 2.579195e-07, 0.0146761838, 14.982966),
            TimeRow(8, 1, 5.06885473e-07, 0.0366182377, 44.3174778),
            TimeRow(8, 2, 2.53715597e-07, 0.0184675589, 22.9764706),
            TimeRow(16, 1, 3.01808129e-07, 0.0292311085, 65.2363459),
        ),
        memory=(
            MemoryRow(1, 38, 384),
            MemoryRow(2, 39, 512),
            MemoryRow(4, 42, 768),
            MemoryRow(8, 48, 1024),
            MemoryRow(16, 61, 1280),
        ),
    ),
    "hydraulis-13b": Machine(
        num_layers=40,
        hidden_size=5120,
        vocab_size=30592,
        state_bytes=210,
        gpu_mib=81252,
        safe_mib=8192,
        gap_mib=5000,
        times=(
            TimeRow(1, 1, 1.03359006e-05, 0.312262914, 91.375387),
            TimeRow(1, 2, 2.33212956e-06, 0.168111063, 37.8656768),
            TimeRow(1, 4, 1.25504641e-06, 0.0851150701, 20.1921514),
            TimeRow(1, 8, 7.57890093e-07, 0.0424526643, 13.3242648),
            TimeRow(2, 1, 2.93719955e-06, 0.180090146, 75.8739588),
            TimeRow(2, 2, 1.53436151e-06, 0.0900918438, 40.4805887),
            TimeRow(2, 4, 7.97420826e-07, 0.0452101722, 23.2608969),
            TimeRow(2, 8, 4.03752453e-07, 0.0233333496, 11.8038032),
            TimeRow(4, 1, 1.62871921e-06, 0.0997626395, 76.4381855),
            TimeRow(4, 2, 8.12710963e-07, 0.0500755835, 39.5393697),
            TimeRow(4, 4, 3.94357054e-07, 0.0259475095, 18.2104987),
            TimeRow(8, 1, 6.59233262e-07, 0.0666817542, 50.3769438),
        ),
        memory=(
            MemoryRow(1, 38, 640),
            MemoryRow(2, 39, 896),
            MemoryRow(4, 39, 1280),
            MemoryRow(8, 48, 1536),
        ),
    ),
    "hydraulis-32b": Machine(
        num_layers=60,
        hidden_size=6656,
        vocab_size=30592,
        state_bytes=201,
        gpu_mib=81252,
        safe_mib=10240,
        gap_mib=5000,
        times=(
            TimeRow(1, 2, 0.0, 0.48988971, 22.8823529),
            TimeRow(1, 4, 9.39192752e-07, 0.212596087, 35.9946816),
            TimeRow(2, 1, 2.97455561e-05, 0.386957078, 156.200893),
            TimeRow(2, 2, 3.73416233e-06, 0.213060059, 80.7166594),
            TimeRow(2, 4, 1.97033746e-06, 0.106558744, 42.9448858),
            TimeRow(2, 6, 1.31605318e-06, 0.0718051676, 28.6162733),
            TimeRow(4, 1, 3.86950049e-06, 0.238996833, 120.694765),
            TimeRow(4, 2, 2.04563898e-06, 0.118301177, 65.4239196),
            TimeRow(4, 4, 1.05779156e-06, 0.0592119769, 35.3353492),
            TimeRow(4, 6, 7.02993498e-07, 0.039850898, 24.0719916),
            TimeRow(8, 1, 2.12548718e-06, 0.141411593, 122.910213),
            TimeRow(8, 2, 1.06789378e-06, 0.071058246, 61.7678259),
            TimeRow(8, 3, 6.85518086e-07, 0.0482754236, 38.0697298),
            TimeRow(8, 4, 4.91076016e-07, 0.0370804063, 25.442409),
            TimeRow(16, 1, 1.37779723e-06, 0.102435387, 145.747611),
        ),
        memory=(
            MemoryRow(1, 36, 384),
            MemoryRow(2, 36, 512),
            MemoryRow(4, 37, 768),
            MemoryRow(8, 42, 1024),
            MemoryRow(16, 50, 1280),
        ),
    ),
    "hydraulis-7b-a100": Machine(
        num_layers=32,
        hidden_size=4096,
        vocab_size=50304,
        state_bytes=197,
        gpu_mib=40536,
        safe_mib=6144,
        gap_mib=14281,
        times=(
            TimeRow(1, 1, 0.0, 0.19650879, 33.00625),
            TimeRow(1, 2, 2.34319074e-06, 0.0885071471, 29.3702973),
            TimeRow(1, 4, 4.95466356e-07, 0.0494624083, 10.5619748),
            TimeRow(1, 8, 4.59723501e-07, 0.0246004879, 6.95829235),
            TimeRow(2, 1, 2.0486471e-06, 0.0972555576, 52.1713454),
            TimeRow(2, 2, 8.87526098e-07, 0.050757108, 24.6129258),
            TimeRow(2, 4, 4.17956749e-07, 0.0263047347, 12.269064),
            TimeRow(4, 1, 9.50733003e-07, 0.05557081, 51.3784736),
            TimeRow(4, 2, 4.60260699e-07, 0.0282728634, 26.1662986),
            TimeRow(8, 1, 5.11853937e-07, 0.032681625, 59.6554489),
        ),
        memory=(
            MemoryRow(1, 38, 1280),
            MemoryRow(2, 39, 2304),
            MemoryRow(4, 42, 3072),
            MemoryRow(8, 48, 4352),
        ),
    ),
}

FLEXSP: dict[str, FlexRow] = {
    "flexsp-6.7b-192k": FlexRow(32, 4096, 4.480441895, 5.128e-06, 0.1839576, 629.3563, 7.1174468994140625),
    "flexsp-6.7b-384k": FlexRow(32, 4096, 4.480441895, 5.128e-06, 0.1839576, 629.3563, 7.8498687744140625),
    "flexsp-13b-192k": FlexRow(40, 5120, 4.220439453, 9.2852e-06, 0.3060189, 1132.5632, 13.116),
    "flexsp-13b-384k": FlexRow(40, 5120, 4.220439453, 9.2852e-06, 0.3060189, 1132.5632, 14.0316),
    "flexsp-30b-192k": FlexRow(60, 6656, 3.417381836, 1.54262e-05, 0.8035742, 2789.3644, 31.525),
    "flexsp-30b-384k": FlexRow(60, 6656, 3.417381836, 1.54262e-05, 0.8035742, 2789.3644, 32.715),
}

FLEXSP_BANDWIDTH: dict[int, float] = {2: 119.54, 4: 104.07, 8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87}
"""GB/s of an all-to-all, by ranks of the group."""

STRATEGIES_32B_64: tuple[tuple[tuple[int, int, int], ...], ...] = (
    ((4, 16, 1),),
    ((1, 16, 1), (2, 8, 3)),
    ((1, 16, 1), (6, 8, 1)),
    ((1, 16, 1), (12, 4, 1)),
    ((1, 8, 3), (10, 4, 1)),
    ((1, 8, 1), (14, 4, 1)),
    ((8, 4, 2),),
)
"""Published for 64 GPUs, 32B, 32K, 200K tokens: each (replicas, tensor, pipeline)."""
