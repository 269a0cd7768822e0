"""Bytes that operations move and temporaries they hold, counted on any device without a profiler.

Rules: an operation reads each tensor argument once and writes its fresh results and what its schema marks as
written; views, `empty` and detach move nothing; expanded dimensions count once; the target of `copy_`,
`fill_` and `zero_` is written, not read.
"""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WRITE_ONLY = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")
_FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias")


def _name(function):
    return function._schema.name.split("::")[-1]


def _size(tensor):
    """Bytes of memory behind a tensor, expanded dimensions once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride != 0 else min(size, 1)
    return elements * tensor.element_size()


class Accounting(TorchDispatchMode):
    """Counts while it is entered: `moved_bytes`, `num_operations`, `peak_bytes` of tensors made inside."""

    def __init__(self):
        super().__init__()
        self.moved_bytes = self.num_operations = self.peak_bytes = self.largest_bytes = 0
        self._live_bytes = 0
        self._known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = _name(function)
        arguments = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        storages = {t.untyped_storage().data_ptr() for t in arguments.values()}
        fresh = [
            t
            for t in tree_leaves(result)
            if isinstance(t, torch.Tensor)
            and id(t) not in arguments
            and (t.untyped_storage().data_ptr() not in storages or t.numel() == 0)
        ]
        for tensor in fresh:
            self._made(tensor)
        is_view = not fresh and not function._schema.is_mutable
        if name not in _FREE and not is_view:
            self._count(function, name, args, kwargs, fresh)
        return result

    def _count(self, function, name, args, kwargs, fresh):
        self.num_operations += 1
        written = []
        for place, argument in enumerate(function._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
        targets = {id(t) for t in written}
        outs = {id(t) for t in tree_leaves(kwargs.get("out")) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves((args, kwargs)):
            only_written = id(tensor) in outs or (name in _WRITE_ONLY and id(tensor) in targets)
            if isinstance(tensor, torch.Tensor) and not only_written:
                self.moved_bytes += _size(tensor)
        self.moved_bytes += sum(_size(t) for t in written) + sum(_size(t) for t in fresh)

    def _made(self, tensor):
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self._live_bytes += size
        self.largest_bytes = max(self.largest_bytes, size)
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size):
        self._live_bytes -= size
