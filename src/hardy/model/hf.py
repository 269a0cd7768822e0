"""Any local Hugging Face causal language model under the decoder's contract: packed documents, summed loss.

transformers asks its attention registry for the function named in the model's config; ours attends within the
documents of a layout that travels as a keyword, so recomputed blocks see it too. That a model hands it down,
and computes positions and masks so that documents stay apart, is not assumed: `HFCausalLM` tries it on two
small documents before the first step. The only file of this room that imports transformers.

Shape suffixes: T packed tokens, D hidden size, H heads, K head size, V vocabulary, 1 the batch they want.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from hardy.config import UserError
from hardy.model.presets import HF_PREFIX, check_folder
from hardy.ops.attention import Backend, packed_attention
from hardy.ops.attention_backends import AttentionRule
from hardy.ops.loss import linear_correct_sum, linear_cross_entropy_sum
from hardy.ops.packed import IGNORED_LABEL, DocumentLayout

ATTENTION_NAME = "hardy_packed"
FOREIGN_TERMS = ("softcap", "s_aux", "position_bias", "head_mask", "attention_sink")
"""Keywords by which some models change the scores; packed attention has no such terms."""
PROBE_TOLERANCE = 1e-5


class HFCausalLM(nn.Module):
    """A causal language model of transformers; `forward` is that of `hardy.model.decoder.Decoder`."""

    pretrained = True
    """The weights come with the model."""

    def __init__(
        self,
        path: str | Path,
        *,
        backend: Backend = "auto",
        recompute: Literal["nothing", "blocks"] = "nothing",
    ) -> None:
        """Load the model of a local folder in fp32 on the CPU, in training mode.

        Args:
            path: folder with config.json and weights, as `save_pretrained` writes it.
            backend: which packed attention, as `model.attention`.
            recompute: blocks switches the model's own activation checkpointing on.

        Raises:
            UserError: transformers is missing, the folder holds no such model, or its documents leak.
        """
        super().__init__()
        self.name, self.backend = str(path), backend
        self.model: Any = _load(Path(path))
        self.vocab_size = int(self.model.get_input_embeddings().weight.shape[0])
        if recompute == "blocks":
            _recompute_layers(self.model, name=self.name)
        self.has_plain_head = False
        self._probe()

    def forward(
        self,
        tokens_T: Tensor,
        layout: DocumentLayout,
        labels_T: Tensor | None = None,
        *,
        with_correct: bool = False,
    ) -> Tensor:
        """Return the summed negative log-likelihood (0-d, fp32), or without labels the logits (T, V).

        With `with_correct` and labels: [2], that sum and how many labels have the largest logit.

        The loss goes chunk by chunk through the head's weight where the probe found the head to be a plain
        product; a model that caps, scales or shifts its logits computes all of them.
        """
        if labels_T is None or not self.has_plain_head:
            logits_TV = self._run(self.model, tokens_T, layout).logits[0]
            if labels_T is None:
                return logits_TV
            nll = cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORED_LABEL, reduction="sum")
            return torch.stack([nll, (logits_TV.argmax(-1) == labels_T).sum()]) if with_correct else nll
        hidden_TD = self._run(self.model.base_model, tokens_T, layout).last_hidden_state[0]
        weight_VD = self.model.get_output_embeddings().weight
        nll = linear_cross_entropy_sum(hidden_TD, weight_VD, labels_T)
        return torch.stack([nll, linear_correct_sum(hidden_TD, weight_VD, labels_T)]) if with_correct else nll

    @property
    def context_tokens(self) -> int | None:
        """Longest document the model may attend over, where its config says."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def unit_names(self) -> list[str]:
        """Return the names of the decoder layers: the list of modules as long as the config says."""
        count = self.model.config.num_hidden_layers
        for name, module in self.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return [f"{name}.{index}" for index in range(count)]
        raise UserError(
            f"{self.name} has no list of {count} layers; it cannot be sharded or compiled by layer"
        )

    def _run(self, module: Any, tokens_T: Tensor, layout: DocumentLayout) -> Any:
        """Call the model, or its base, on one row of packed documents."""
        return module(
            input_ids=tokens_T.unsqueeze(0),
            position_ids=layout.positions_T.unsqueeze(0),
            attention_mask=None,
            use_cache=False,
            hardy_layout=layout,
            hardy_backend=self.backend,
        )

    @torch.no_grad()
    def _probe(self) -> None:
        """Refuse a model whose documents see each other; find out whether the head is a plain product."""
        lengths, count = (5, 7), self.vocab_size
        tokens_T = torch.arange(sum(lengths)) * 7 % count
        changed_T = tokens_T.clone()
        changed_T[2] = (changed_T[2] + 1) % count
        layout = DocumentLayout.from_lengths(lengths)
        alone = DocumentLayout.from_lengths(lengths[1:])
        self.model.eval()
        backend, self.backend = self.backend, "reference"  # the probe is on the CPU
        try:
            logits_TV = self(tokens_T, layout)
            others = {
                "one document changed the other": self(changed_T, layout)[lengths[0] :],
                "a packed document differs from the same alone": self(tokens_T[lengths[0] :], alone),
            }
            hidden_TD = self._run(self.model.base_model, tokens_T, layout).last_hidden_state[0]
        finally:
            self.backend = backend
            self.model.train()
        for fault, other_TV in others.items():
            if not _close(other_TV, logits_TV[lengths[0] :]):
                raise UserError(
                    f"model.name=hf:{self.name}: {fault} in the isolation probe, so this model does not keep "
                    f"packed documents apart ({type(self.model).__name__}); choose another model"
                )
        head = self.model.get_output_embeddings()
        self.has_plain_head = (
            isinstance(head, nn.Linear)
            and head.in_features == hidden_TD.shape[1]
            and _close(linear(hidden_TD, head.weight), logits_TV)
        )


def attend(
    module: nn.Module,
    query_1HTK: Tensor,
    key_1HTK: Tensor,
    value_1HTK: Tensor,
    attention_mask: Tensor | None,
    *,
    attention: Callable[..., Tensor] = packed_attention,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' attention functions do, within the documents of the keyword `hardy_layout`.

    Args:
        module: the model's attention.
        query_1HTK: queries of one row.
        key_1HTK: its keys.
        value_1HTK: its values.
        attention_mask: must be None.
        attention: `packed_attention`, or what takes its place and arguments.
        more: what the model hands down.

    Returns:
        The output (1, T, H, K), and None for the weights.

    Raises:
        UserError: no layout arrived, a mask did, or the model wants dropout or terms that we do not compute.
    """
    layout: DocumentLayout | None = more.get("hardy_layout")
    kind = type(module).__name__
    if layout is None:
        raise UserError(f"{kind} does not hand the borders of documents down; choose another model")
    if attention_mask is not None:
        raise UserError(
            f"{kind} makes a mask of its own, which packed attention has not; choose another model"
        )
    foreign = [term for term in FOREIGN_TERMS if more.get(term) is not None]
    if foreign:
        raise UserError(f"{kind} adds {', '.join(foreign)} to attention, which packed attention has not")
    if more.get("dropout"):
        raise UserError(
            f"{kind} wants attention dropout {more['dropout']}, packed attention has none; "
            f"set it to 0 in its config.json"
        )
    window = more.get("sliding_window")
    rule = AttentionRule(
        causal=bool(more.get("is_causal", getattr(module, "is_causal", True))),
        window=None if window is None else window - 1,  # theirs counts the token itself
        scale=more.get("scaling"),
    )
    out_THK = attention(
        query_1HTK[0].transpose(0, 1),
        key_1HTK[0].transpose(0, 1),
        value_1HTK[0].transpose(0, 1),
        layout,
        rule=rule,
        backend=more.get("hardy_backend", "auto"),
    )
    return out_THK.unsqueeze(0), None


def _load(path: Path) -> nn.Module:
    """Load a folder's model with our attention."""
    transformers = _transformers()
    progress = transformers.utils.logging
    is_4 = transformers.__version__.startswith("4.")  # ends with the last supported transformers 4
    dtype = {"torch_dtype" if is_4 else "dtype": torch.float32}
    check_folder(f"{HF_PREFIX}{path}")
    shows_progress = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, attn_implementation=ATTENTION_NAME, **dtype
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.name=hf:{path}: transformers cannot load it: {error}") from error
    finally:
        if shows_progress:
            progress.enable_progress_bar()
    used = getattr(model.config, "_attn_implementation", None)  # no public name for it
    if used != ATTENTION_NAME:
        raise UserError(
            f"model.name=hf:{path}: {type(model).__name__} brings its own attention ({used}) and would mix "
            f"documents; choose another model"
        )
    dropout = getattr(model.config, "attention_dropout", None) or getattr(model.config, "attn_pdrop", None)
    if dropout:
        raise UserError(
            f"model.name=hf:{path}: attention dropout {dropout}, packed attention has none; set "
            f"attention_dropout (attn_pdrop in GPT-2) to 0 in its config.json"
        )
    return model


def _recompute_layers(model: Any, *, name: str) -> None:
    """Switch the model's own activation checkpointing on; transformers 5 renamed it."""
    switch_on = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        switch_on({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"model.recompute='blocks': {error} (hf:{name}); set it to 'nothing'") from None


@cache
def _transformers() -> ModuleType:
    """Import transformers and register our attention with it, once."""
    try:
        import transformers
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise UserError(
            f"model.name=hf:PATH needs transformers ({error}); install it by pip install 'hardy[hf]'"
        ) from None
    AttentionInterface.register(ATTENTION_NAME, attend)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
    return transformers


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """Return no mask: the layout says who sees whom."""


def _close(left: Tensor, right: Tensor) -> bool:
    """Whether logits agree to fp32 rounding, relative to their size."""
    return bool((left - right).abs().max() <= PROBE_TOLERANCE * right.abs().max().clamp(min=1))
