import inspect

from hardy._compat import accepts, varlen_attention


def test_accepts_looks_at_the_signature():
    def function(a, *, b=1):
        return a, b

    assert accepts(function, "a") and accepts(function, "b")
    assert not accepts(function, "c")


def test_the_kernel_is_torchs_and_takes_what_the_wrapper_gives():
    kernel, takes_groups = varlen_attention()
    parameters = inspect.signature(kernel).parameters
    assert {"scale", "window_size"} <= parameters.keys()
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert takes_groups == ("enable_gqa" in parameters)
