"""Random numbers by counter: each is a function of (key, flat index, third and fourth word), drawn by nobody.

So a random matrix is the same on every worker, device and world size, any part of it can be made alone, and
nothing random is stored. The generator is Philox4x32-10, in int64 torch operations: a product of two 32-bit
words wraps at 64 bits, but shifted right by 32 and masked it still gives the right high word.

Paper: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011, section 3.3.
Letters: a counter is four 32-bit words c0 ... c3 and yields four words, its lanes. Flat index k stands in
lane k % 4 of the counter c0, c1 = low and high half of k // 4; c2 = `third`, c3 = `fourth`.
"""

import math
from collections.abc import Iterator
from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor

from hardy.config import ConfigError

Purpose = Literal["hardy.proj.v1", "hardy.sr.v1", "hardy.q8.v1"]
"""What random numbers are for: projections, stochastic rounding, int8 rounding."""

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_CHUNK_COUNTERS = 1 << 14
"""Counters made at once: 128 KiB for each of the temporaries of a round, so that they stay in cache."""


def canonical_name(name: str) -> str:
    """Return a parameter's name without what wrappers (DDP, FSDP, compile, checkpointing) add to its path.

    Example:
        >>> canonical_name("module._orig_mod.layers.0._checkpoint_wrapped_module.proj.weight")
        'layers.0.proj.weight'
    """
    *path, last = name.split(".")
    return ".".join([*(word for word in path if word not in _WRAPPERS), last])


def key_for(seed: int, name: str, *, purpose: Purpose) -> int:
    """Return the 64-bit Philox key of a parameter; `name` must be canonical.

    Raises:
        ConfigError: the seed does not fit 64 bits without sign.

    Example:
        >>> hex(key_for(0, "layers.0.attn.q_proj.weight", purpose="hardy.proj.v1"))
        '0x8d744ee0202f6924'
    """
    if not 0 <= seed < 1 << 64:
        raise ConfigError(f"seed must be at least 0 and below 2**64, got {seed}; take it modulo 2**64")
    words = purpose.encode() + b"\0" + seed.to_bytes(8, "little") + b"\0" + name.encode()
    return int.from_bytes(blake2b(words, digest_size=8).digest(), "little")


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, *, key: int) -> Tensor:
    """Return Philox4x32-10 of counters of one shape, int64 [..., 4]; all words are int64 in [0, 2**32).

    Example:
        >>> zero = torch.tensor(0)
        >>> [hex(word) for word in philox(zero, zero, zero, zero, key=0).tolist()]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    for _ in range(_ROUNDS):
        # c1 and c3 are only ever XORed, so what stands above their 32 bits is cut with the XOR's result.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = _mix(product1, c1, k0)
        c2 = _mix(product0, c3, k1)
        c1, c3 = product1, product0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1).bitwise_and_(_WORD)


def words(
    key: int,
    *,
    start: int,
    count: int,
    third: int | Tensor,
    fourth: int | Tensor = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the 32-bit words of flat indices start ... start + count - 1 as int64, shape [count].

    Args:
        key: 64 bits, with or without sign.
        start: First flat index; any, also where it is no multiple of 4.
        count: How many.
        third: c2, such as an epoch or a step; a 0-d tensor (any dtype, whole number) is not read on the host.
        fourth: c3, such as an expert's index; as `third`.
        device: Where to compute.

    Example:
        >>> [hex(word) for word in words(0, start=1, count=2, third=0).tolist()]
        ['0xe169c58d', '0xbc57ac4c']
    """
    out = torch.empty(count, dtype=torch.int64, device=device)
    for part, lanes in _chunks(key, start, count, (third, fourth), out.device):
        _copy_lanes(out, part, lanes)
    return out


def normals(
    key: int,
    *,
    start: int,
    count: int,
    third: int | Tensor,
    fourth: int | Tensor = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return standard normal numbers for a flat range, fp32 [count]; arguments as for `words`.

    Box-Muller on the lane pairs (0, 1) and (2, 3) of a counter, with u = (2 (word // 512) + 1) / 2**24, which
    fp32 holds exactly and which is never 0 or 1; so no value is beyond 5.77. Computed in fp64 where the
    device has it: an angle in fp32 would cost up to 1.4e-6.

    Example:
        >>> normals(0, start=0, count=2, third=0).shape
        torch.Size([2])
    """
    out = torch.empty(count, dtype=torch.float32, device=device)
    compute = torch.float32 if out.device.type == "mps" else torch.float64
    for part, lanes in _chunks(key, start, count, (third, fourth), out.device):
        uniform = lanes.bitwise_right_shift_(9).mul_(2).add_(1).to(compute).mul_(2.0**-24)
        length = uniform[:, 0::2].log().mul_(-2.0).sqrt_()
        angle = uniform[:, 1::2] * (2.0 * math.pi)
        uniform[:, 0::2] = angle.cos().mul_(length)
        uniform[:, 1::2] = angle.sin_().mul_(length)
        _copy_lanes(out, part, uniform)
    return out


def signs(
    key: int,
    *,
    start: int,
    count: int,
    third: int | Tensor,
    fourth: int | Tensor = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return +1 (bit 31 of the word is 0) or -1 for a flat range, fp32 [count]; arguments as for `words`.

    Example:
        >>> signs(0, start=0, count=4, third=0).tolist()
        [1.0, -1.0, -1.0, -1.0]
    """
    out = torch.empty(count, dtype=torch.float32, device=device)
    for part, lanes in _chunks(key, start, count, (third, fourth), out.device):
        _copy_lanes(out, part, lanes.bitwise_right_shift_(31).mul_(-2).add_(1))
    return out


def grid_words(
    key: int, *, start: int, stride: int, shape: tuple[int, int], third: int | Tensor, device: torch.device
) -> Tensor:
    """Return the words of a part of a larger row-major tensor, int64 [rows, cols]; all at once, in no chunks.

    Element (i, j) is flat index start + i * stride + j, as in `hardy.ops.updates.Place`; c3 is 0.

    Example:
        >>> grid = grid_words(0, start=2, stride=3, shape=(2, 2), third=0, device=torch.device("cpu"))
        >>> torch.equal(grid.flatten(), words(0, start=2, count=5, third=0)[[0, 1, 3, 4]])
        True
    """
    rows, cols = shape
    if stride == cols or rows == 1:
        first, skip = divmod(start, 4)
        counters = torch.arange(first, (start + rows * cols + 3) // 4, device=device)
        lanes = _block(key, counters, (third, 0)).view(-1)
        return lanes[skip : skip + rows * cols].view(rows, cols)
    starts_R1 = torch.arange(rows, device=device).mul_(stride).add_(start).unsqueeze_(1)
    counters = torch.arange(cols // 4 + 2, device=device) + starts_R1.bitwise_right_shift(2)
    lanes = _block(key, counters, (third, 0)).view(rows, -1)
    if stride % 4 == 0:
        return lanes[:, start % 4 : start % 4 + cols]
    return lanes.gather(1, torch.arange(cols, device=device) + starts_R1.bitwise_and(3))


def _chunks(
    key: int, start: int, count: int, tail: tuple[int | Tensor, int | Tensor], device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (which of the flat range, words [n, 4] of whole counters); the slice may begin below 0."""
    for first in range(start // 4, (start + count + 3) // 4, _CHUNK_COUNTERS):
        last = min(first + _CHUNK_COUNTERS, (start + count + 3) // 4)
        counters = torch.arange(first, last, device=device)
        yield slice(4 * first - start, 4 * last - start), _block(key, counters, tail)


def _copy_lanes(out: Tensor, part: slice, lanes: Tensor) -> None:
    """Copy what lies inside `out`; the first and the last counter of a range may stick out."""
    low, high = max(part.start, 0), min(part.stop, len(out))
    out[low:high].copy_(lanes.view(-1)[low - part.start : high - part.start])


def _block(key: int, counters: Tensor, tail: tuple[int | Tensor, int | Tensor]) -> Tensor:
    """Return the words of 61-bit `counters`, int64 [..., 4], all in [0, 2**32)."""
    c2, c3 = (_filled(counters, value) for value in tail)
    return philox(counters & _WORD, counters >> 32, c2, c3, key=key)


def _mix(product: Tensor, other: Tensor, key: int) -> Tensor:
    return (product >> 32).bitwise_xor_(other).bitwise_xor_(key).bitwise_and_(_WORD)


def _filled(like: Tensor, value: int | Tensor) -> Tensor:
    """Return `value` everywhere; a 0-d tensor on the host may meet tensors of any device in a sum."""
    if isinstance(value, Tensor):
        return torch.zeros_like(like).add_(value.to(torch.int64) & _WORD)
    return torch.full_like(like, value & _WORD)
