"""Hugging Face Llama folders, read and written without transformers: config.json beside safetensors.

The weights are the same numbers under other names, so both directions are exact.

Shape suffixes: none; tensors here are parameters of any shape.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hardy.config import UserError
from hardy.model.decoder import Decoder
from hardy.model.presets import DecoderShape

ARCHITECTURE = "LlamaForCausalLM"
INDEX_FILE = "model.safetensors.index.json"
HF_NAMES = {
    "embedding.": "model.embed_tokens.",
    "norm.": "model.norm.",
    "head.": "lm_head.",
    ".attention_norm.": ".input_layernorm.",
    ".attention.query.": ".self_attn.q_proj.",
    ".attention.key.": ".self_attn.k_proj.",
    ".attention.value.": ".self_attn.v_proj.",
    ".attention.output.": ".self_attn.o_proj.",
    ".feed_forward_norm.": ".post_attention_layernorm.",
    ".feed_forward.gate.": ".mlp.gate_proj.",
    ".feed_forward.up.": ".mlp.up_proj.",
    ".feed_forward.down.": ".mlp.down_proj.",
}
"""Our part of a parameter's name and theirs; `blocks.3` is `model.layers.3`."""


@dataclass(frozen=True, kw_only=True)
class LlamaFolder:
    """A checked Hugging Face Llama folder."""

    shape: DecoderShape
    """Sizes from config.json."""
    files: Mapping[str, Path]
    """File of each of our parameter names."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield our parameter names and their tensors, one in memory at a time, file by file."""
        for path in sorted(set(self.files.values())):
            with safe_open(path, framework="pt") as opened:  # pyright: ignore[reportGeneralTypeIssues]  # untyped
                for name in (name for name, file in self.files.items() if file == path):
                    yield name, opened.get_tensor(hf_name(name))


def hf_name(name: str) -> str:
    """Return what Hugging Face's Llama calls our parameter.

    Example:
        >>> hf_name("blocks.3.attention.query.weight")
        'model.layers.3.self_attn.q_proj.weight'
    """
    block = re.match(r"blocks\.(\d+)(\..+)", name)
    prefix, rest = (f"model.layers.{block[1]}", block[2]) if block else ("", name)
    for ours, theirs in HF_NAMES.items():
        if rest.startswith(ours):
            return prefix + theirs + rest.removeprefix(ours)
    raise ValueError(f"no parameter of a decoder is called {name!r}")


def import_folder(folder: Path) -> LlamaFolder:
    """Read and check a folder; weights are only opened, `tensors()` reads them.

    Raises:
        UserError: no such folder or file, another architecture, a variant of Llama that the decoder does not
            compute, or missing, unexpected or mis-shaped tensors.
    """
    shape = shape_from_config(_read_json(folder / "config.json"), folder=folder)
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as opened:  # pyright: ignore[reportGeneralTypeIssues]  # untyped
                for name in opened.keys():
                    found[name] = path, tuple(opened.get_slice(name).get_shape())
        except SafetensorError as error:
            raise UserError(f"{path} is no readable safetensors file ({error}); copy it again") from None
    expected = {hf_name(name): (name, size) for name, size in parameter_sizes(shape).items()}
    # Old exports store these, and a tied head is the embedding again.
    extra = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    extra |= {"lm_head.weight"} if shape.tied else set()
    _refuse_names(folder, "lacks", expected.keys() - found.keys())
    _refuse_names(folder, "has the unexpected", found.keys() - expected.keys() - extra)
    for name, (_, size) in expected.items():
        if found[name][1] != size:
            raise UserError(
                f"{folder}: tensor {name} has shape {found[name][1]}, config.json makes it {size}; "
                f"the two files do not belong together"
            )
    return LlamaFolder(shape=shape, files={ours: found[theirs][0] for theirs, (ours, _) in expected.items()})


def export_folder(
    model: Decoder,
    folder: Path,
    *,
    state: Mapping[str, Tensor] | None = None,
    tokenizer_files: Sequence[Path] = (),
    special_ids: Mapping[str, int] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a folder that transformers and `import_folder` read; it appears whole or not at all.

    Args:
        model: the decoder; its shape becomes config.json.
        folder: where; may exist only if empty.
        state: full tensors by our names, where the model's own are sharded; None takes the model's.
        tokenizer_files: copied into the folder.
        special_ids: `bos`, `eos`, `pad` where the tokenizer has them.
        max_shard_bytes: weights above this are split over several files; one tensor is never split.

    Raises:
        UserError: the folder has something in it or cannot be written, or transformers refuses the shape.
    """
    shape = model.shape
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; choose another folder or remove it")
    if shape.hidden_size % shape.num_heads:
        raise UserError(
            f"transformers refuses a Llama whose hidden size ({shape.hidden_size}) is not a multiple of its "
            f"heads ({shape.num_heads}); it cannot be exported"
        )
    source = model.state_dict() if state is None else state
    tensors = {hf_name(name): source[name] for name in parameter_sizes(shape)}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; choose another folder") from error
    try:
        dtype = next(iter(tensors.values())).dtype
        _write_weights(tensors, beside, max_shard_bytes=max_shard_bytes)
        config = config_from_shape(shape, dtype=dtype, special_ids=special_ids or {})
        _write_json(config, beside / "config.json")
        ids = {key: value for key, value in config.items() if key.endswith("_token_id") and value is not None}
        _write_json({"_from_model_config": True, **ids}, beside / "generation_config.json")
        for file in tokenizer_files:
            shutil.copy(file, beside / file.name)
        beside.chmod(0o755)  # mkdtemp keeps others out
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    except SafetensorError as error:  # what a full disk becomes there
        raise UserError(
            f"{folder} cannot be written: {error}; make room, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # there no longer where all went well


def parameter_sizes(shape: DecoderShape) -> dict[str, tuple[int, ...]]:
    """Return the name and size of each parameter of a decoder."""
    with torch.device("meta"):
        model = Decoder(shape, attention=_no_attention)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def config_from_shape(
    shape: DecoderShape, *, dtype: torch.dtype, special_ids: Mapping[str, int]
) -> dict[str, Any]:
    """Return config.json for transformers 4.53 and later; rope's base stands where either release looks."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context_tokens,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **{f"{key}_token_id": special_ids.get(key) for key in ("bos", "eos", "pad")},
    }


def shape_from_config(config: Mapping[str, Any], *, folder: Path) -> DecoderShape:
    """Return the sizes in a config.json; refuse what the decoder would compute differently."""
    architectures = config.get("architectures") or [config.get("model_type")]
    if isinstance(config.get("model"), Mapping) and isinstance(config.get("train"), Mapping):
        raise UserError(
            f"{folder} is a run folder of hardy; go on with it by `hardy resume {folder}`, or write its "
            f"model as a Hugging Face folder by `hardy export {folder} OUT`"
        )
    if architectures == [None]:
        raise UserError(
            f"{folder}/config.json names no architecture; give a folder saved by transformers or hardy export"
        )
    if architectures != [ARCHITECTURE] and architectures != ["llama"]:
        raise UserError(f"{folder} holds {architectures}, not {ARCHITECTURE}; use --model.name hf:{folder}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    wanted: list[tuple[str, Any, Any]] = [
        ("attention_bias", config.get("attention_bias", False), False),
        ("mlp_bias", config.get("mlp_bias", False), False),
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("rope_type", rope_type, "default"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0),
    ]
    for key, value, allowed in wanted:
        if value != allowed:
            raise UserError(
                f"{folder}/config.json: {key} is {value!r}, the decoder computes only {allowed!r}; "
                f"use --model.name hf:{folder}"
            )
    try:
        hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
        return DecoderShape(
            vocab_size=config["vocab_size"],
            hidden_size=hidden_size,
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_size=config.get("head_dim") or hidden_size // num_heads,
            context_tokens=config.get("max_position_embeddings", 2048),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tied=config.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise UserError(f"{folder}/config.json lacks {error}; it is not a Llama's") from None


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, named by the index where there is one."""
    if (folder / INDEX_FILE).exists():
        names = _read_json(folder / INDEX_FILE)["weight_map"].values()
        paths = sorted({folder / name for name in names})
    else:
        paths = [folder / "model.safetensors"]
    for path in paths:
        if not path.exists():
            raise UserError(
                f"there is no {path}; a Llama folder has model.safetensors or what {INDEX_FILE} names"
            )
    return paths


def _write_weights(tensors: Mapping[str, Tensor], folder: Path, *, max_shard_bytes: int) -> None:
    """Write one file, or several with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    used_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and used_bytes + tensor.nbytes > max_shard_bytes:
            shards.append({})
            used_bytes = 0
        shards[-1][name] = tensor
        used_bytes += tensor.nbytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(names, shards, strict=True):
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
        save_file(whole, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write_json({"metadata": {"total_size": total}, "weight_map": index}, folder / INDEX_FILE)


def _refuse_names(folder: Path, verb: str, names: set[str]) -> None:
    if names:
        some = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise UserError(
            f"{folder} {verb} tensors {some}; use --model.name hf:{folder} or complete the folder"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {path}; give a folder saved by transformers or hardy export") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _write_json(value: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _no_attention(*_args: Any, **_kwargs: Any) -> Tensor:
    """Stand in where a decoder is built for its names alone."""
    raise AssertionError("this decoder is never run")
