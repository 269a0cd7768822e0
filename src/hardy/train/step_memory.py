"""What a training step of the decoder holds in memory: a ledger, and the sizes of its tensors. Free of torch.

This file has the ledger and the sizes of what recurs, `step_walk.py` the walk. Numbers are bytes, unless they
are called elements or tokens.
"""

from dataclasses import dataclass, field
from typing import Literal

from hardy.model.presets import DecoderShape

Kind = Literal["weights", "copies", "gradients", "state", "activations", "loss", "temporaries"]
KINDS: tuple[Kind, ...] = (
    *("weights", "copies", "gradients", "state"),
    *("activations", "loss", "temporaries"),
)
"""What memory is held for. `copies` are weights once more: autocast's bf16 casts, FSDP2's gathered units,
int8 weights in use."""
Precision = Literal["fp32", "bf16", "bf16_pure"]
"""fp32; matrix products in bf16 beside fp32 weights, as `train.precision`; or all in bf16 but the state."""

FP32 = 4
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Logits of one chunk, as `hardy.ops.loss` has them; a test compares."""
CUDA_WORKSPACE = 64 << 20
"""What cuBLAS keeps on an H100 (less on others): one for the forward thread, one for the backward."""


@dataclass(kw_only=True)
class Ledger:
    """Bytes held now, by kind, and at the fullest moment so far."""

    held: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    peak: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    peak_bytes: int = 0
    peak_at: str = ""
    """What was going on at the fullest moment."""
    at: str = ""
    """What is going on."""

    def take(self, kind: Kind, *sizes: int) -> None:
        """Allocate."""
        self.held[kind] += sum(sizes)
        total = sum(self.held.values())
        if total > self.peak_bytes:
            self.peak, self.peak_bytes, self.peak_at = dict(self.held), total, self.at

    def drop(self, kind: Kind, *sizes: int) -> None:
        """Let go; letting go of more than is held is a fault of the walk."""
        self.held[kind] -= sum(sizes)
        assert self.held[kind] >= 0, f"{self.at}: dropped more {kind} than were taken"


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """All that decides the memory of a step."""

    shape: DecoderShape
    tokens: int
    """Of one micro-batch."""
    micro_batches: int = 1
    precision: Precision = "fp32"
    recompute: bool = False
    """Whether blocks run again in the backward pass instead of keeping their activations."""
    release: bool = False
    """Whether a gradient is applied and let go as soon as it is complete."""
    int8: bool = False
    """Whether matrices are int8 and made bf16 where they are used."""
    shards: int = 1
    """Workers that share the model by FSDP2."""
    buckets: bool = False
    """Whether DDP keeps all gradients in buckets of its own."""
    device: Literal["cuda", "cpu"] = "cuda"
    equal_documents: bool = False
    """Whether documents are of one length; the reference attention copies its output where they are not."""
    weight_bytes: int
    """Of this worker's weights."""
    state_bytes: int
    """Of this worker's optimizer state, and what the optimizer keeps beside it."""
    optimizer_bytes: int = 0
    """Temporaries of the optimizer's step."""


class Sizes:
    """Bytes of the tensors that recur."""

    def __init__(self, plan: StepPlan) -> None:
        shape, tokens = plan.shape, plan.tokens
        hidden, inner = shape.hidden_size, shape.intermediate_size
        queries, keys = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
        sharded = plan.shards > 1
        # FSDP2's policy casts what enters its units, so that nothing wide stays but the factors of norms.
        narrow = plan.precision == "bf16_pure" or (plan.precision == "bf16" and sharded)
        self.casts = plan.precision == "bf16" and not sharded
        """Whether autocast is at work."""
        self.stream_value = 2 if narrow else FP32
        self.value = FP32 if plan.precision == "fp32" else 2
        """Of a number that enters a matrix product."""
        self.weight_value = 2 if plan.precision == "bf16_pure" else FP32
        self.grad_value = 2 if narrow else FP32
        """Of a gradient where the backward pass leaves it."""
        self.stream = tokens * hidden * self.stream_value
        """The residual stream, and norms of it."""
        self.wide = tokens * hidden * FP32
        self.hidden = tokens * hidden * self.value
        self.inner = tokens * inner * self.value
        self.queries = tokens * queries * self.value
        self.keys = tokens * keys * self.value
        self.factor = tokens * FP32
        """One number per token, fp32."""
        self.normalisers = tokens * shape.num_heads * FP32
        self.rotary = tokens * shape.head_size * FP32
        self.batch = 3 * 8 * tokens
        """Token ids, labels, positions."""
        self.query_elements = hidden * queries
        self.key_elements = hidden * keys
        self.inner_elements = hidden * inner
        self.head_elements = shape.vocab_size * hidden
        self.linear_elements = 2 * (self.query_elements + self.key_elements) + 3 * self.inner_elements
        self.block_elements = self.linear_elements + 2 * hidden
        self.root_elements = self.head_elements * (1 if shape.tied else 2) + hidden
        self.elements = shape.num_layers * self.block_elements + self.root_elements
        inputs = 5 * self.hidden if self.casts else 2 * self.stream
        """What linear modules keep of the normed stream: autocast makes a copy for each of them."""
        reference = plan.device == "cpu" or plan.precision == "fp32"
        self.output_copy = self.queries if reference and not plan.equal_documents else 0
        self.kept = 2 * self.factor + inputs + 2 * self.queries + 2 * self.keys + self.normalisers
        self.kept += self.output_copy + self.stream + 4 * self.inner
        """What a block keeps for its backward pass beside the stream that enters it."""
