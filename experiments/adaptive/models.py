"""The two models that the tasks train: a perceptron, and a small pre-norm Transformer.

Shape suffixes: N examples, T tokens, D hidden size, H heads, K head size, O outputs.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  as everywhere

Use = Literal["next token", "whole text", "each token"]


def perceptron(sizes: tuple[int, ...]) -> nn.Module:
    """Return linear layers of these sizes with ReLU between them."""
    layers: list[nn.Module] = []
    for width_in, width_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a LayerNorm and added to its input."""

    def __init__(self, *, width: int, num_heads: int, is_causal: bool) -> None:
        super().__init__()
        self.num_heads, self.is_causal = num_heads, is_causal
        self.norm_before_mix, self.norm_before_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden_NTD: Tensor) -> Tensor:
        """Return the next hidden states."""
        mixed = self.query_key_value(self.norm_before_mix(hidden_NTD))
        heads_3NHTK = mixed.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed_NHTK = F.scaled_dot_product_attention(*heads_3NHTK.unbind(), is_causal=self.is_causal)
        hidden_NTD = hidden_NTD + self.output(mixed_NHTK.transpose(1, 2).flatten(2))
        return hidden_NTD + self.down(F.gelu(self.up(self.norm_before_feed(hidden_NTD))))


class Transformer(nn.Module):
    """Two blocks over token and position embeddings.

    Args:
        vocab_size: different tokens.
        num_tokens: longest text.
        num_outputs: values of the head.
        use: "next token" attends to the past and gives outputs for each token, "whole text" gives them for
            the mean of all tokens, "each token" for each, and shows the first token, which asks, to all.
        width: hidden size.
    """

    def __init__(
        self, *, vocab_size: int, num_tokens: int, num_outputs: int, use: Use, width: int = 64
    ) -> None:
        super().__init__()
        self.use = use
        self.embedding, self.position = nn.Embedding(vocab_size, width), nn.Embedding(num_tokens, width)
        blocks = [Block(width=width, num_heads=4, is_causal=use == "next token") for _ in range(2)]
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(width)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, tokens_NT: Tensor) -> Tensor:
        """Return logits, [N, T, O], or [N, O] for a whole text."""
        places = torch.arange(tokens_NT.shape[1], device=tokens_NT.device)
        hidden_NTD = self.embedding(tokens_NT) + self.position(places)
        if self.use == "each token":
            # Else the match of question and span is found within 600 steps or not, by luck of the seed.
            hidden_NTD = hidden_NTD + self.embedding(tokens_NT[:, :1])
        hidden_NTD = self.norm(self.blocks(hidden_NTD))
        return self.head(hidden_NTD.mean(1) if self.use == "whole text" else hidden_NTD)
