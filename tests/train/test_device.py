"""Asking for a device or a precision that is not there names the setting and the way out."""

import pytest
import torch

from hardy.config import ConfigError
from hardy.train.device import choose_hardware, denormals_flushed


def yes():
    return True


def no():
    return False


def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(
        ConfigError, match="train.device is 'cuda', but torch finds no CUDA device.*'cpu' or 'auto', or run"
    ):
        choose_hardware("cuda", "auto", has_cuda=no)


def test_bf16_on_a_cpu_is_refused():
    with pytest.raises(ConfigError, match="train.precision is 'bf16', but on a CPU hardy trains in fp32"):
        choose_hardware("cpu", "bf16", has_cuda=yes, has_bf16=yes)


def test_a_gpu_that_lacks_bf16_is_refused():
    with pytest.raises(ConfigError, match="this GPU has no bf16 arithmetic.*train.precision to 'fp32'"):
        choose_hardware("auto", "bf16", has_cuda=yes, has_bf16=no)


@pytest.mark.parametrize(
    ("cuda", "bf16", "device", "precision", "expected"),
    [
        (no, no, "auto", "auto", ("cpu", False)),
        (yes, yes, "auto", "auto", ("cuda", True)),
        (yes, no, "auto", "auto", ("cuda", False)),
        (yes, yes, "cuda", "fp32", ("cuda", False)),
        (yes, yes, "cpu", "auto", ("cpu", False)),
    ],
)
def test_auto_takes_what_is_there(cuda, bf16, device, precision, expected):
    hardware = choose_hardware(device, precision, has_cuda=cuda, has_bf16=bf16)
    assert (hardware.device.type, hardware.bf16) == expected


def test_each_worker_of_a_machine_has_its_own_gpu():
    assert choose_hardware("cuda", "fp32", local_rank=3, has_cuda=yes).device == torch.device("cuda", 3)


def test_peak_memory_on_a_cpu_is_that_of_a_process_with_torch():
    hardware = choose_hardware("cpu", "auto")
    assert 50 < hardware.peak_memory_mb() < 100_000
    assert hardware.name == "cpu, fp32"


def test_tiny_numbers_are_zero_inside_and_only_there():
    def doubled():
        return float(torch.tensor(1e-39) * 2.0)

    assert doubled() > 0
    with denormals_flushed():
        assert doubled() == 0
        with denormals_flushed():
            assert doubled() == 0
        assert doubled() == 0
    assert doubled() > 0
