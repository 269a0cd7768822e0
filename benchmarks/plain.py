"""The shortest plain PyTorch training of a Llama-like model: what hardy's speed is measured against.

Rectangular batches (B sequences of T tokens), one dense causal attention per block, cross-entropy over all
logits at once, torch's fused AdamW. No document borders, no metrics file, no checkpoint: it does less.
"""

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.h, self.kv, self.k = shape.num_heads, shape.num_kv_heads, shape.head_size
        self.q = nn.Linear(shape.hidden_size, self.h * self.k, bias=False)
        self.kv_proj = nn.Linear(shape.hidden_size, 2 * self.kv * self.k, bias=False)
        self.o = nn.Linear(self.h * self.k, shape.hidden_size, bias=False)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.h, self.k).transpose(1, 2)
        k, v = self.kv_proj(x).view(b, t, 2, self.kv, self.k).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.h != self.kv)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


def rotate(x, cos, sin):
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Block(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps) for _ in range(2))
        self.attention = Attention(shape)
        self.gate, self.up = (
            nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False) for _ in range(2)
        )
        self.down = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm1(x), cos, sin)
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class PlainLlama(nn.Module):
    def __init__(self, shape, *, max_tokens):
        super().__init__()
        self.embed = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        if shape.tied:
            self.head.weight = self.embed.weight
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
        rates = shape.rope_theta ** (-torch.arange(0, shape.head_size, 2) / shape.head_size)
        angles = torch.outer(torch.arange(max_tokens), rates).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens, labels):
        x = self.embed(tokens)
        t = tokens.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:t], self.sin[:t])
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def plain_step(model, optimizer, tokens, labels):
    loss = model(tokens, labels)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()
