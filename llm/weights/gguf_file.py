"""The weights in a GGUF file, in the words and names of Hugging Face's Llama family."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from llm.errors import InputError
from llm.nn.position import Rope
from llm.weights.sources import Tensor

# The architectures, and whether their rotary features are paired (0, 1), (2, 3), ...
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}
_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "block_sparse_moe.gate",
}  # fmt: skip
_EXPERTS = {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"}
_FREQUENCIES = "rope_freqs.weight"


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    """(config, tensors by name, whether rotary features are interleaved) of a GGUF; numbers are unpacked when read.

    Raises:
        InputError: no GGUF, a damaged one, or an architecture that is not of the Llama family.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise InputError(f"{path} is cut off or no GGUF file: {error}") from None
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise InputError(f"{path}: architecture {kind!r}; there are {', '.join(ARCHITECTURES)}")

    def unpack(tensor) -> Callable[[], np.ndarray]:
        def numbers() -> np.ndarray:
            # Read, not mapped: what is mapped stays in memory as long as there is room.
            packed = np.fromfile(path, tensor.data.dtype, tensor.data.size, offset=int(tensor.data_offset))
            try:
                x = gguf.quants.dequantize(packed.reshape(tensor.data.shape), tensor.tensor_type)
            except NotImplementedError:
                raise InputError(f"{path}, {tensor.name}: packed as {tensor.tensor_type.name}, unknown") from None
            return np.asarray(x, np.float32).reshape(tuple(int(n) for n in reversed(tensor.shape)))

        return numbers

    stored = {t.name: Tensor(tuple(int(n) for n in reversed(t.shape)), unpack(t)) for t in reader.tensors}
    unpacked = functools.lru_cache(1)(lambda name: stored[name].read())  # one layer's experts are unpacked once
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name != _FREQUENCIES:
            tensors |= _renamed(name, tensor, unpacked)
    config = _config(path, kind, fields, "lm_head.weight" not in tensors)
    if _FREQUENCIES in stored:
        lacking = [name for name in ("hidden_size", "num_attention_heads") if not config.get(name)]
        if lacking:
            raise InputError(f"{path} does not say its {' and '.join(lacking)}")
        config["rope_scaling"] = _llama3(path, config, stored[_FREQUENCIES].read())
    return config, tensors, ARCHITECTURES[kind]


def _renamed(name: str, tensor: Tensor, unpacked: Callable[[str], np.ndarray]) -> dict[str, Tensor]:
    """A tensor by Hugging Face's name; the experts of a layer, one tensor here, are one each there."""
    *block, base, kind = name.split(".")
    prefix = f"model.layers.{block[1]}." if len(block) == 2 and block[0] == "blk" else ""
    if base in _EXPERTS and prefix:
        return {
            f"{prefix}block_sparse_moe.experts.{e}.{_EXPERTS[base]}.{kind}": Tensor(
                tensor.shape[1:], lambda e=e: unpacked(name)[e]
            )
            for e in range(tensor.shape[0])
        }
    return {f"{prefix}{_NAMES[base]}.{kind}" if base in _NAMES else name: tensor}


def _config(path: pathlib.Path, kind: str, fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    def field(name: str, default: Any = None) -> Any:
        value = fields.get(f"{kind}.{name}", default)
        # Kept in float32; 1e-5 is meant where 9.99999975e-06 stands.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    experts = field("expert_count", 0)
    config: dict[str, Any] = {
        "model_type": "mixtral" if experts else kind,
        "vocab_size": field("vocab_size"),
        "max_position_embeddings": field("context_length"),
        "num_hidden_layers": field("block_count"),
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": field("attention.key_length"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_theta": field("rope.freq_base", 10000.0),
        "tie_word_embeddings": tied,
    }
    if experts:
        config |= {"num_local_experts": experts, "num_experts_per_tok": field("expert_used_count", 2)}
    if config["vocab_size"] is None:
        config["vocab_size"] = len(_tokens(path))
    scaling = field("rope.scaling.type", "none")
    if scaling != "none":
        original = field("rope.scaling.original_context_length")
        config["rope_scaling"] = {"rope_type": scaling, "factor": field("rope.scaling.factor")}
        config["rope_scaling"] |= {"original_max_position_embeddings": original} if original else {}
    return {name: value for name, value in config.items() if value is not None}


def _tokens(path: pathlib.Path) -> list[str]:
    import gguf

    field = gguf.GGUFReader(path).fields.get("tokenizer.ggml.tokens")
    if field is None:
        raise InputError(f"{path}: neither a vocabulary nor its size")
    return field.contents()


def _llama3(path: pathlib.Path, config: dict[str, Any], divisors: np.ndarray) -> dict[str, Any]:
    """The scaling whose divisors of the frequencies a file holds in place of its settings."""
    head_width = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    base, factor = float(config["rope_theta"]), float(divisors.max())
    for original in (8192, 4096, 2048):
        rope = Rope(base, "llama3", factor, original)
        if np.allclose(Rope(base).frequencies(head_width) / rope.frequencies(head_width), divisors, rtol=1e-3):
            return {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original,
                    "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
    raise InputError(f"{path}, {_FREQUENCIES}: not Llama 3's scaling; import the safetensors of this model")
