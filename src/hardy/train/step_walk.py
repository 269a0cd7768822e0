"""The memory of one training step of the decoder, walked through in the order of the code. Free of torch.

What a line of `model/decoder.py`, `ops/loss.py`, `ops/norm.py` or `train/step.py` allocates is taken from a
ledger, what is let go is dropped, and the ledger remembers the fullest moment. Blocks are alike, and from the
third to the third last everything moves in proportion, so those are taken at once. 0-d tensors are left out.
`tests/train/test_step_walk.py` compares the result with all live storages of real steps.
"""

from hardy.train.step_memory import CHUNK_ELEMENTS, CUDA_WORKSPACE, FP32, Ledger, Sizes, StepPlan
from hardy.train.unit_walk import UnitWalk

ENDS = 2
"""Blocks walked one by one at either end."""


def walk_step(plan: StepPlan) -> Ledger:
    """Return the ledger of one optimizer step, with the state already there."""
    walk = _Walk(plan)
    walk.rest()
    count = plan.micro_batches
    for index in sorted({0, min(1, count - 1), count - 1}):  # between the second and the last nothing is new
        walk.units.is_first, walk.units.is_last = index == 0, index == count - 1
        walk.forward()
        walk.loss()
        walk.backward()
    walk.optimizer()
    return walk.ledger


class _Walk:
    """One step; `units` keeps the weights and gradients, this the activations."""

    def __init__(self, plan: StepPlan) -> None:
        self.plan, self.sizes, self.ledger = plan, Sizes(plan), Ledger()
        self.units = UnitWalk(plan, self.sizes, self.ledger)
        layers = plan.shape.num_layers
        self.middle = max(0, layers - 2 * ENDS)
        self.walked = [i for i in range(layers) if i < ENDS or i >= layers - ENDS]

    def rest(self) -> None:
        """Hold what is there before a step begins."""
        plan, ledger = self.plan, self.ledger
        ledger.at = "rest"
        ledger.take("weights", plan.weight_bytes)
        ledger.take("state", plan.state_bytes)
        ledger.take("activations", self.sizes.batch * plan.micro_batches)
        ledger.take("gradients", self.sizes.elements * self.sizes.grad_value if plan.buckets else 0)
        ledger.take("temporaries", CUDA_WORKSPACE if plan.device == "cuda" else 0)

    def forward(self) -> None:
        """Run embedding, blocks and last norm; what the backward pass needs stays."""
        sizes, ledger = self.sizes, self.ledger
        self.units.gather_root()
        ledger.take("activations", sizes.rotary, sizes.stream)
        for index in self.walked:
            ledger.at = f"forward of block {index}"
            if index == self.walked[-1] and self.middle:
                self._keep(self.middle)
            self.units.gather_in_forward()
            self._run_block()
            self.units.release_block()
            if self.plan.recompute:
                ledger.drop("activations", sizes.kept)
            ledger.take("activations", sizes.stream)
        ledger.take("activations", sizes.factor)
        ledger.take("loss", sizes.stream)

    def _keep(self, blocks: int) -> None:
        """Take what blocks that are not walked leave behind, or with a negative number let it go."""
        sizes = self.sizes
        each = sizes.stream + (0 if self.plan.recompute else sizes.kept)
        copies = sizes.linear_elements * sizes.value if sizes.casts else 0
        if blocks > 0:
            self.ledger.take("activations", blocks * each)
            self.ledger.take("copies", blocks * copies)
        else:
            self.ledger.drop("activations", -blocks * each)
            self.ledger.drop("copies", 0 if self.plan.recompute else -blocks * copies)

    def _run_block(self) -> None:
        """Run one block forward."""
        self.units.use_linears()
        self.ledger.take("activations", self.sizes.kept)

    def loss(self) -> None:
        """Compute the loss chunk by chunk with its gradients, then scale these in the backward pass."""
        plan, sizes, ledger = self.plan, self.sizes, self.ledger
        ledger.at = "loss"
        head, tokens = sizes.head_elements, plan.tokens
        masks = 9 * tokens
        ledger.take("loss", masks, sizes.stream, head * FP32)
        copy = head * sizes.value if sizes.casts else 0
        ledger.take("loss", copy)
        self._chunks()
        weight_grad = head * sizes.grad_value
        if sizes.grad_value < FP32:
            ledger.take("loss", weight_grad)
            ledger.drop("loss", head * FP32)
        ledger.drop("loss", copy, sizes.stream)  # the second is the normed stream
        if plan.recompute:  # autocast's cache ends with the forward pass
            self.units.drop_copies(plan.shape.num_layers * sizes.linear_elements)
        ledger.at = "backward of the loss"
        self.units.prefetch_last()
        ledger.take("loss", sizes.stream, weight_grad)
        ledger.drop("loss", 2 * sizes.stream, 2 * weight_grad, masks)
        ledger.take("temporaries", sizes.stream)
        if plan.shape.tied:  # waits for the embedding's part
            ledger.take("temporaries", weight_grad)
        else:
            self.units.gradient(head)

    def _chunks(self) -> None:
        """Hold the logits of a chunk, the last chunk's slopes still there if there was one."""
        sizes, ledger, tokens = self.sizes, self.ledger, self.plan.tokens
        hidden, rows = self.plan.shape.hidden_size, self.plan.shape.vocab_size
        most = max(64, CHUNK_ELEMENTS[self.plan.device] // rows)
        chunk = min(tokens, most)
        logits, scores = chunk * rows * sizes.value, chunk * rows * FP32
        narrow = sizes.value < FP32
        slope, widened = (logits, scores) if narrow else (0, 0)
        before = scores + slope if tokens > most else 0
        inputs = chunk * hidden * sizes.value
        cast = inputs if sizes.casts or self.plan.device == "cuda" else 0  # on a GPU labels are always masked
        ledger.take("loss", cast, before)
        ledger.take("loss", logits, widened, scores)
        ledger.drop("loss", logits, widened, before)
        ledger.take("loss", slope)
        if sizes.casts:
            ledger.take("loss", inputs)
            ledger.drop("loss", inputs)
        product = sizes.head_elements * sizes.value if narrow else 0
        ledger.take("loss", product)
        ledger.drop("loss", product, scores, slope, cast)

    def backward(self) -> None:
        """Go back from the last norm to the embedding."""
        plan, sizes, ledger = self.plan, self.sizes, self.ledger
        ledger.at = "backward of the last norm"
        self._norm(sizes.stream)
        ledger.drop("activations", sizes.stream)
        for index in reversed(self.walked):
            ledger.at = f"backward of block {index}"
            if index == ENDS - 1 and self.middle:
                self._keep(-self.middle)
                self.units.keep_gradients(self.middle)
            self.units.gather_in_backward(is_last=index == 0)
            if plan.recompute:
                self._run_block()
            self._feed_forward_back()
            self._attention_back()
            self.units.reduce_block()
        ledger.at = "backward of the embedding"
        table = sizes.head_elements * sizes.grad_value
        ledger.take("temporaries", table)
        ledger.drop("temporaries", sizes.stream)
        if plan.shape.tied:
            ledger.take("temporaries", table)  # their sum
            ledger.drop("temporaries", 2 * table)
        self.units.settle(sizes.head_elements)
        self.units.reduce_root()
        ledger.drop("activations", sizes.rotary)

    def _norm(self, incoming: int) -> None:
        """Go back through a norm; its gradient by the stream is left in the place of `incoming`."""
        sizes, ledger = self.sizes, self.ledger
        unfused = 2 * sizes.wide if self.plan.device == "cpu" else 0
        ledger.take("temporaries", unfused, sizes.stream)
        self.units.gradient(self.plan.shape.hidden_size)
        ledger.drop("temporaries", unfused, incoming)
        ledger.drop("activations", sizes.factor)

    def _into_stream(self, *, activation: int) -> None:
        """Let the input of a linear module go; widen its gradient where autocast made the input narrow."""
        sizes, ledger = self.sizes, self.ledger
        if sizes.casts:
            ledger.drop("activations", sizes.hidden)
            ledger.take("temporaries", sizes.stream)
            ledger.drop("temporaries", sizes.hidden)
        else:
            ledger.drop("activations", activation)

    def _add(self) -> None:
        """Add two gradients by the stream."""
        self.ledger.take("temporaries", self.sizes.stream)
        self.ledger.drop("temporaries", 2 * self.sizes.stream)

    def _feed_forward_back(self) -> None:
        """Go back through the second half of a block; a gradient by the stream is held before and after."""
        sizes, ledger = self.sizes, self.ledger
        narrowed = sizes.hidden if sizes.casts else 0
        ledger.take("temporaries", narrowed)
        self.units.linear(sizes.inner_elements, into=sizes.inner)  # down
        ledger.drop("activations", sizes.inner)
        ledger.drop("temporaries", narrowed)
        ledger.take("temporaries", 2 * sizes.inner)  # the product of gate and up
        ledger.drop("temporaries", sizes.inner)
        ledger.drop("activations", 2 * sizes.inner)
        self.units.linear(sizes.inner_elements, into=sizes.hidden)  # up
        ledger.drop("temporaries", sizes.inner)
        self._into_stream(activation=0)
        ledger.take("temporaries", sizes.inner)  # silu
        ledger.drop("temporaries", sizes.inner)
        ledger.drop("activations", sizes.inner)
        self.units.linear(sizes.inner_elements, into=sizes.hidden)  # gate
        ledger.drop("temporaries", sizes.inner)
        self._into_stream(activation=sizes.stream)
        self._add()
        self._norm(sizes.stream)
        self._add()
        ledger.drop("activations", sizes.stream)

    def _attention_back(self) -> None:
        """Go back through the first half of a block."""
        sizes, ledger = self.sizes, self.ledger
        narrowed = sizes.hidden if sizes.casts else 0
        ledger.take("temporaries", narrowed)
        self.units.linear(sizes.query_elements, into=sizes.queries)  # output
        ledger.drop("temporaries", narrowed)
        kernel = self._attention_kernel()
        ledger.take("temporaries", kernel, sizes.queries, 2 * sizes.keys)
        ledger.drop("temporaries", kernel, sizes.queries)
        held = 2 * sizes.queries + 2 * sizes.keys + sizes.normalisers + sizes.output_copy
        ledger.drop("activations", held)
        for index, width in enumerate((sizes.keys, sizes.keys, sizes.queries)):  # value, key, query
            turned = width if index else 0  # back through the rotation
            ledger.take("temporaries", turned)
            ledger.drop("temporaries", turned)
            elements = sizes.query_elements if index == 2 else sizes.key_elements
            self.units.linear(elements, into=sizes.hidden)
            ledger.drop("temporaries", width)
            self._into_stream(activation=sizes.stream if index == 2 else 0)
            if index:
                self._add()
        self._norm(sizes.stream)
        self._add()
        ledger.drop("activations", sizes.stream)

    def _attention_kernel(self) -> int:
        """Return what flash attention's backward kernel takes: fp32 sums, keys for every query head."""
        plan, sizes = self.plan, self.sizes
        if plan.device == "cpu" or sizes.value == FP32:
            return 0
        grouped = plan.shape.num_kv_heads < plan.shape.num_heads
        return sizes.queries // sizes.value * FP32 + (2 * sizes.queries if grouped else 0)

    def optimizer(self) -> None:
        """Update; released gradients were applied before."""
        self.ledger.at = "optimizer"
        if not self.plan.release:
            self.ledger.take("temporaries", self.plan.optimizer_bytes)
            self.ledger.drop("temporaries", self.plan.optimizer_bytes)
