"""A small Llama-like decoder over packed documents: RMSNorm, rotary positions, SwiGLU, grouped queries.

Attention is an argument, so that back ends, context parallelism and tests bring their own. The model has no
batch dimension: it sees one row of T tokens and a layout that says where documents begin. The mathematics is
that of Hugging Face's Llama, so weights are exchanged unchanged (`hardy.model.convert`).

Shape suffixes: T packed tokens, D hidden size, F intermediate size, H heads, K head size, V vocabulary,
S tokens in the cache.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint

from hardy.model.presets import DecoderShape
from hardy.ops.attention import PackedAttention
from hardy.ops.loss import linear_correct_sum, linear_cross_entropy_sum
from hardy.ops.norm import rms_norm
from hardy.ops.packed import DocumentLayout
from hardy.ops.rotary import Rotary, rotary_table, rotate


class KeyValueCache:
    """Keys and values of one document's tokens so far, for generation; `capacity_tokens` have room."""

    def __init__(self, *, num_layers: int, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.num_tokens = 0
        """Tokens every layer has seen; moved on by `Decoder.forward`."""
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    def extend(self, layer: int, key_THK: Tensor, value_THK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values of one layer; return those of all tokens, (S, H, K) each."""
        end = self.num_tokens + key_THK.shape[0]
        if end > self.capacity_tokens:
            raise ValueError(f"the cache holds {self.capacity_tokens} tokens, got {end}")
        stored: list[Tensor] = []
        for buffers, new_THK in ((self._keys, key_THK), (self._values, value_THK)):
            buffer = buffers[layer]
            if buffer is None:
                buffer = buffers[layer] = new_THK.new_empty(self.capacity_tokens, *new_THK.shape[1:])
            buffer[self.num_tokens : end] = new_THK
            stored.append(buffer[:end])
        return stored[0], stored[1]


class RMSNorm(nn.Module):
    """Scale each token to unit mean square, in fp32 at least, then by a learned weight."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the normed tokens in their own dtype."""
        return rms_norm(x_TD, self.weight, eps=self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; who sees whom is up to the callable and the layout."""

    def __init__(self, shape: DecoderShape, *, layer: int, attention: PackedAttention) -> None:
        super().__init__()
        self.layer, self.head_size, self.attention = layer, shape.head_size, attention
        kv_size = shape.num_kv_heads * shape.head_size
        self.query = nn.Linear(shape.hidden_size, shape.num_heads * shape.head_size, bias=False)
        self.key = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.value = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.output = nn.Linear(shape.num_heads * shape.head_size, shape.hidden_size, bias=False)

    def forward(
        self, x_TD: Tensor, rotary: Rotary, layout: DocumentLayout, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Return what each token takes from the tokens of its document that it sees."""
        heads = (-1, self.head_size)
        query_THK = rotate(self.query(x_TD).unflatten(-1, heads), rotary)
        key_THK = rotate(self.key(x_TD).unflatten(-1, heads), rotary)
        value_THK = self.value(x_TD).unflatten(-1, heads)
        keys = None
        if cache is not None:
            key_THK, value_THK = cache.extend(self.layer, key_THK, value_THK)
            keys = DocumentLayout.from_lengths([key_THK.shape[0]], device=key_THK.device)
        out_THK = self.attention(query_THK, key_THK, value_THK, layout, keys=keys)
        return self.output(out_THK.flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: silu(gate(x)) * up(x), projected down."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the block's change to the residual stream."""
        return self.down(silu(self.gate(x_TD)) * self.up(x_TD))


class Block(nn.Module):
    """Attention, then feed-forward, each on the normed residual stream."""

    def __init__(self, shape: DecoderShape, *, layer: int, attention: PackedAttention) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.attention = Attention(shape, layer=layer, attention=attention)
        self.feed_forward_norm = RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.feed_forward = FeedForward(shape)

    def forward(
        self, x_TD: Tensor, rotary: Rotary, layout: DocumentLayout, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Return the residual stream after this block."""
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), rotary, layout, cache)
        return x_TD + self.feed_forward(self.feed_forward_norm(x_TD))


class Decoder(nn.Module):
    """The model: embedding, blocks, norm, head. Without buffers, so meta construction and moves are safe."""

    pretrained = False
    """Whether the weights come with the model; if not, `hardy.model.init.initialise` draws them."""

    def __init__(
        self,
        shape: DecoderShape,
        *,
        attention: PackedAttention,
        recompute: Literal["nothing", "blocks"] = "nothing",
    ) -> None:
        """Build the modules on the current default device, with torch's default weights.

        Args:
            shape: every size.
            attention: what attends within documents, such as `packed_attention` or a partial call of it.
            recompute: blocks runs each block again in the backward pass instead of keeping its activations.
        """
        super().__init__()
        self.shape, self.recompute = shape, recompute
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        blocks = [Block(shape, layer=layer, attention=attention) for layer in range(shape.num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.head = None if shape.tied else nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)

    @property
    def context_tokens(self) -> int:
        """Longest document the model may attend over."""
        return self.shape.context_tokens

    def unit_names(self) -> list[str]:
        """Return the names of the blocks."""
        return [f"blocks.{layer}" for layer in range(self.shape.num_layers)]

    def forward(
        self,
        tokens_T: Tensor,
        layout: DocumentLayout,
        labels_T: Tensor | None = None,
        cache: KeyValueCache | None = None,
        *,
        with_correct: bool = False,
    ) -> Tensor:
        """Return the summed negative log-likelihood of the labels (0-d, fp32), or without them the logits.

        With `with_correct` and labels: [2], that sum and how many labels have the largest logit.

        Args:
            tokens_T: token ids of the packed documents, int64.
            layout: the documents' borders.
            labels_T: what each token must predict; `IGNORED_LABEL` counts nothing.
            cache: earlier tokens of the one document in the row; it takes up the new ones.
        """
        positions_T = layout.positions_T
        if cache is not None:
            if len(layout.lengths) != 1:
                raise ValueError(f"a cache continues one document, the layout has {len(layout.lengths)}")
            positions_T = positions_T + cache.num_tokens
        rotary = rotary_table(positions_T, head_size=self.shape.head_size, theta=self.shape.rope_theta)
        x_TD = self.embedding(tokens_T)
        for block in self.blocks:
            if self.recompute == "blocks" and torch.is_grad_enabled() and cache is None:
                x_TD = checkpoint(block, x_TD, rotary, layout, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TD = block(x_TD, rotary, layout, cache)
        if cache is not None:
            cache.num_tokens += tokens_T.shape[0]
        weight_VD = self.embedding.weight if self.head is None else self.head.weight
        x_TD = self.norm(x_TD)
        if labels_T is None:
            return linear(x_TD, weight_VD)
        nll = linear_cross_entropy_sum(x_TD, weight_VD, labels_T)
        return torch.stack([nll, linear_correct_sum(x_TD, weight_VD, labels_T)]) if with_correct else nll


def unit_names(model: nn.Module) -> list[str]:
    """Return the names of the modules that are sharded, compiled and synchronised as one: its blocks."""
    names: Any = getattr(model, "unit_names", None)
    if names is None:
        raise TypeError(f"a {type(model).__name__} does not say what its units are")
    return names()


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile every unit in place by torch.compile; parameter names stay as they are.

    Args:
        model: a decoder or another model with units.
        options: passed to torch.compile, such as `backend`.
    """
    for name in unit_names(model):
        model.get_submodule(name).compile(**options)
