"""Sampling text from a model, one token at a time; a function of the prompt and the seed.

Shape suffixes: T tokens, V vocabulary.
"""

import sys
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from hardy.config import UserError
from hardy.model.decoder import Decoder, KeyValueCache
from hardy.ops.packed import DocumentLayout
from hardy.rng import generator_for


class NotFiniteError(UserError):
    """The model's weights are NaN or infinite, so nothing can be drawn from it."""


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
    seed: int = 0,
) -> list[int]:
    """Continue a prompt and return the new tokens.

    Ends after `max_new_tokens`, with a token of `stop_ids` (which is returned), or when prompt and new tokens
    fill the model's `context_tokens`: nothing slides out of sight. A `Decoder` keeps keys and values in a
    cache, other models read the whole text again for every token.

    Args:
        model: called as `model(tokens_T, layout)`; its training mode is put back afterwards.
        prompt_ids: at least one token.
        max_new_tokens: most tokens to add.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: keep only that many likeliest tokens; None keeps all.
        top_p: keep the fewest likeliest tokens that have at least this share of the probability.
        stop_ids: tokens that end the text.
        seed: of the draws.

    Raises:
        UserError: an empty or too long prompt, or a number out of range.
        NotFiniteError: the model gives NaN or infinite numbers.
    """
    context_tokens = getattr(model, "context_tokens", None)
    _check(prompt_ids, context_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    limit = len(prompt_ids) + max_new_tokens
    limit = limit if context_tokens is None else min(limit, context_tokens)
    generator = generator_for(seed, "generate")
    device = next(model.parameters()).device
    cache = None
    if isinstance(model, Decoder):
        cache = KeyValueCache(num_layers=model.shape.num_layers, capacity_tokens=limit)
    text, unread = list(prompt_ids), list(prompt_ids)
    was_training = model.training
    model.eval()
    try:
        while len(text) < limit:
            tokens_T = torch.tensor(unread, device=device)
            layout = DocumentLayout.from_lengths([len(unread)], device=device)
            with _uncompiled():
                logits_TV = model(tokens_T, layout) if cache is None else model(tokens_T, layout, None, cache)
            logits_V = logits_TV[-1].double().cpu()
            if not logits_V.max().isfinite():
                raise NotFiniteError(
                    "the model's outputs are NaN or infinite: training diverged; take an earlier checkpoint "
                    "(--step N), or train again with a lower optim.lr"
                )
            token = choose(logits_V, generator=generator, temperature=temperature, top_k=top_k, top_p=top_p)
            text.append(token)
            unread = list(text) if cache is None else [token]
            if token in stop_ids:
                break
    finally:
        model.train(was_training)
    return text[len(prompt_ids) :]


def _uncompiled() -> AbstractContextManager[object]:
    """Run compiled blocks as they were: they would be compiled again for every length of the text."""
    # Asking torch.compiler costs seconds of imports, which are done already where something is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def choose(
    logits_V: Tensor,
    *,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """Draw one token; `top_k` and `top_p` both apply, `top_k` first.

    Example:
        >>> choose(torch.tensor([0.0, 5.0, 4.9]), generator=generator_for(0), temperature=0.0)
        1
    """
    if temperature == 0:
        return int(logits_V.argmax())
    sorted_V, order_V = (logits_V / temperature).sort(descending=True, stable=True)
    if top_k is not None:
        sorted_V = sorted_V[:top_k]
    shares_V = sorted_V.softmax(dim=0)
    if top_p is not None:
        before_V = shares_V.cumsum(0) - shares_V
        shares_V = shares_V.where(before_V < top_p, 0)
    return int(order_V[torch.multinomial(shares_V, 1, generator=generator)])


def _check(
    prompt_ids: Sequence[int],
    context_tokens: int | None,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    """Refuse what cannot be continued."""
    if not prompt_ids:
        raise UserError("the prompt is empty; give at least one token, such as the tokenizer's bos")
    if context_tokens is not None and len(prompt_ids) >= context_tokens:
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens and leaves no room in model.context_tokens="
            f"{context_tokens}; shorten it"
        )
    if not temperature >= 0:
        raise UserError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, got {top_k}; leave it out to keep all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, got {top_p}; leave it out to keep all tokens")
