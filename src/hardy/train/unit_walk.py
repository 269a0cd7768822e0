"""Weights and gradients during a step: gathered, copied, added up, reduced and applied. Free of torch.

Three ways: alone; under DDP, whose buckets hold all gradients all the time; under FSDP2, which gathers a unit
(a block, or the root: embedding, last norm, head) before use, keeps the root from the forward to the end of
the backward pass, gathers one block ahead in the backward pass, and holds the input of one reduction until
the next.
"""

from hardy.train.step_memory import FP32, Ledger, Sizes, StepPlan


class UnitWalk:
    """The weights' side of a walk through a step."""

    def __init__(self, plan: StepPlan, sizes: Sizes, ledger: Ledger) -> None:
        self.plan, self.sizes, self.ledger = plan, sizes, ledger
        self.is_first = True
        """Whether no micro-batch of this step has left gradients yet."""
        self.is_last = True
        """Whether this is the micro-batch after which gradients are reduced."""
        self.gathered = 0
        """Bytes of the flat buffer of the last gathering."""
        self.reduced = 0
        """Bytes of the input of the last reduction."""

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 is at work."""
        return self.plan.shards > 1

    def gather_root(self) -> None:
        """Gather the root for the whole pass."""
        self._gather(self.sizes.root_elements)

    def gather_in_forward(self) -> None:
        """Gather a block."""
        self._gather(self.sizes.block_elements)

    def _gather(self, elements: int) -> None:
        """Fill a flat buffer, then the weights, then let the buffer before this one go."""
        if self.sharded:
            size = elements * self.sizes.value
            self.ledger.take("copies", size, size)
            self.ledger.drop("copies", self.gathered)
            self.gathered = size

    def release_block(self) -> None:
        """Let a gathered block go, as after its forward pass."""
        if self.sharded:
            self.ledger.drop("copies", self.sizes.block_elements * self.sizes.value)

    def prefetch_last(self) -> None:
        """Fill the buffer of the last block, as before the backward pass."""
        if self.sharded:
            self.ledger.drop("copies", self.gathered)
            self.gathered = self.sizes.block_elements * self.sizes.value
            self.ledger.take("copies", self.gathered)

    def gather_in_backward(self, *, is_last: bool) -> None:
        """Take a block's weights from its buffer, and fill the next one's unless this is the last."""
        if not self.sharded:
            return
        size = self.sizes.block_elements * self.sizes.value
        self.ledger.take("copies", size)
        self.ledger.drop("copies", self.gathered)
        self.gathered = 0 if is_last else size
        self.ledger.take("copies", self.gathered)

    def use_linears(self) -> None:
        """Make bf16 weights where a block needs them: autocast keeps them, of int8 one is made at a time."""
        sizes, ledger = self.sizes, self.ledger
        if sizes.casts:
            ledger.take("copies", sizes.linear_elements * sizes.value)
        if self.plan.int8:
            largest = max(sizes.inner_elements, sizes.query_elements) * sizes.value
            ledger.take("copies", largest)
            ledger.drop("copies", largest)

    def drop_copies(self, elements: int) -> None:
        """Let autocast's casts of weights go."""
        if self.sizes.casts:
            self.ledger.drop("copies", elements * self.sizes.value)

    def linear(self, elements: int, *, into: int) -> None:
        """Go back through a linear module: its weight's gradient, then its input's, of `into` bytes."""
        if self.plan.int8:  # its input's first, and then the weight made for that goes
            self.ledger.take("copies", elements * self.sizes.value)
            self.ledger.take("temporaries", into)
            self.ledger.drop("copies", elements * self.sizes.value)
            self.gradient(elements)
            return
        if self.sizes.casts:
            narrow = elements * self.sizes.value
            self.ledger.take("temporaries", narrow)
            self.ledger.take("temporaries", elements * self.sizes.grad_value)
            self.ledger.drop("temporaries", narrow)
            self.settle(elements)
        else:
            self.gradient(elements)
        self.ledger.take("temporaries", into)
        self.drop_copies(elements)

    def gradient(self, elements: int) -> None:
        """A parameter's gradient arrives."""
        self.ledger.take("temporaries", elements * self.sizes.grad_value)
        self.settle(elements)

    def settle(self, elements: int) -> None:
        """Keep a gradient that has arrived, add it to what is there or to a bucket, or apply it at once."""
        size, ledger = elements * self.sizes.grad_value, self.ledger
        ledger.drop("temporaries", size)
        if self.plan.buckets:
            # Gradients of micro-batches before the last lie beside the buckets, until it moves them there.
            ledger.take("gradients", size if self.is_first and not self.is_last else 0)
            ledger.drop("gradients", size if self.is_last and not self.is_first else 0)
        elif self.sharded:
            # Gradients narrower than what is reduced arrive anew each time; `_accumulate` adds them up.
            ledger.take("gradients", size if self.is_first or self.sizes.grad_value < FP32 else 0)
        elif self.plan.release and self.is_last:
            ledger.take("temporaries", size, self.plan.optimizer_bytes)
            ledger.drop("temporaries", size, self.plan.optimizer_bytes)
            ledger.drop("gradients", 0 if self.is_first else size)
        elif self.is_first:
            ledger.take("gradients", size)

    def reduce_block(self) -> None:
        """End the backward pass of a block."""
        self.release_block()
        self._reduce(self.sizes.block_elements)

    def reduce_root(self) -> None:
        """End the backward pass of the root, and of the micro-batch."""
        if self.sharded:
            self.ledger.drop("copies", self.sizes.root_elements * self.sizes.value)
            self._reduce(self.sizes.root_elements)
            self.ledger.drop("temporaries", self.reduced)
            self.reduced = 0

    def keep_gradients(self, blocks: int) -> None:
        """Keep the gradients of blocks that are not walked."""
        for _ in range(blocks):
            self.ledger.take("temporaries", self.sizes.block_elements * self.sizes.grad_value)
            self.settle(self.sizes.block_elements)
            self._reduce(self.sizes.block_elements)

    def _reduce(self, elements: int) -> None:
        """Add up a unit's gradients over the workers, if this is the micro-batch for it."""
        if not self.sharded:
            return
        sizes, ledger = self.sizes, self.ledger
        narrow = elements * sizes.grad_value if sizes.grad_value < FP32 else 0
        wide = elements * FP32
        if not self.is_last:
            if narrow:
                ledger.take("gradients", wide if self.is_first else 0)
                ledger.drop("gradients", narrow)
            return
        ledger.drop("gradients", 0 if self.is_first else narrow)
        ledger.drop("temporaries", self.reduced)
        ledger.take("temporaries", wide)
        self.reduced = wide
        shard = -(-elements // self.plan.shards) * sizes.weight_value
        ledger.take("gradients", shard)
        ledger.drop("gradients", narrow if narrow and self.is_first else wide)
        if self.plan.device == "cpu":  # gloo works on a copy
            ledger.take("temporaries", wide)
            ledger.drop("temporaries", wide)
        if self.plan.release:
            ledger.take("temporaries", self.plan.optimizer_bytes)
            ledger.drop("temporaries", self.plan.optimizer_bytes)
            ledger.drop("gradients", shard)
