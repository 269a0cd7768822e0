"""Which device and precision a run uses, or why it cannot."""

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hardy.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Where this worker's tensors live and how its matrix products are computed."""

    device: torch.device
    bf16: bool

    @property
    def name(self) -> str:
        """Words for people, such as "cpu, fp32" or "NVIDIA H100, bf16"."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return f"{name}, {'bf16' if self.bf16 else 'fp32'}"

    def peak_memory_mb(self) -> float:
        """Return the largest memory held so far in MB (10**6 bytes): allocated on CUDA, resident on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Take numbers too small for full precision (below 1e-38 in fp32) as zero while entered, on a CPU.

    As a model learns, more and more of its gradients and moments become so small, and a CPU computes with
    such numbers many times slower. Threads started inside inherit the setting.
    """
    was_flushed = float(torch.tensor(1e-39) * 1.0) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_flushed)


def choose_hardware(
    device: str,
    precision: str,
    *,
    local_rank: int = 0,
    has_cuda: Callable[[], bool] = torch.cuda.is_available,
    has_bf16: Callable[[], bool] = torch.cuda.is_bf16_supported,
) -> Hardware:
    """Return the hardware that `train.device` and `train.precision` ask for.

    Args:
        device: auto, cpu or cuda.
        precision: auto, fp32 or bf16.
        local_rank: which of the machine's GPUs is this worker's.
        has_cuda: whether there is a GPU.
        has_bf16: whether the GPU computes in bf16.

    Raises:
        ConfigError: CUDA is asked for where there is none, or the device lacks bf16.
    """
    if device == "cuda" and not has_cuda():
        raise ConfigError(
            "train.device is 'cuda', but torch finds no CUDA device here; set train.device to 'cpu' or "
            "'auto', or run `hardy doctor`"
        )
    on_cuda = device != "cpu" and has_cuda()
    if precision == "bf16" and not on_cuda:
        raise ConfigError(
            "train.precision is 'bf16', but on a CPU hardy trains in fp32 (few CPUs have a fast bf16 matrix "
            "product); set train.precision to 'fp32' or 'auto'"
        )
    if precision == "bf16" and not has_bf16():
        raise ConfigError(
            "train.precision is 'bf16', but this GPU has no bf16 arithmetic (compute capability 8.0 or later "
            "has); set train.precision to 'fp32' or 'auto'"
        )
    bf16 = on_cuda and precision != "fp32" and has_bf16()
    return Hardware(device=torch.device("cuda", local_rank) if on_cuda else torch.device("cpu"), bf16=bf16)
