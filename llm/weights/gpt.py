"""GPT-2 and the Llama family (Llama, Qwen 2 and 3, Mistral, Mixtral): their configs and names, and ours."""

from collections.abc import Mapping
from typing import Any

from llm.errors import InputError
from llm.models import GPTSpec
from llm.weights.layout import Row, Table, linear, norm
from llm.weights.settings import Settings

BLOCK = "stack/layers"
LLAMAS = ("llama", "mistral", "mixtral", "qwen2", "qwen3")

# --- GPT-2 ------------------------------------------------------------------------------------------------------------


def gpt2_spec(config: Mapping[str, Any]) -> GPTSpec:
    """The settings of a GPT-2.

    Raises:
        InputError: something that this family does not compute.
    """
    s = Settings(config, "gpt2")
    s.expect(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False,
             add_cross_attention=False, tie_word_embeddings=True)  # fmt: skip
    width = s.count("n_embd")
    return GPTSpec(
        vocab_size=s.count("vocab_size"),
        context=s.count("n_positions"),
        layers=s.count("n_layer"),
        width=width,
        heads=s.count("n_head"),
        ff_width=s.count("n_inner", 4 * width),
        position="learned",
        norm="layer",
        norm_epsilon=s.number("layer_norm_epsilon", 1e-5),
        activation=s.activation("activation_function", "gelu_new"),
        bias=True,
        dropout=s.number("resid_pdrop", 0.1),
    )


def gpt2_config(spec: GPTSpec) -> dict[str, Any]:
    """The config.json of a GPT-2."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": spec.vocab_size,
        "n_positions": spec.context,
        "n_ctx": spec.context,
        "n_layer": spec.layers,
        "n_embd": spec.width,
        "n_head": spec.heads,
        "n_inner": spec.ff_width,
        "layer_norm_epsilon": spec.norm_epsilon,
        "activation_function": Settings.activation_name(spec.activation, gated=False),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), spec.dropout),
    }


def _gpt2_table() -> Table:
    def conv(theirs: str, *ours: str, inputs: int = 1) -> list[Row]:  # GPT-2's Conv1D is inputs first, like ours
        theirs = f"transformer.h.{{i}}.{theirs}"
        paths = [tuple(f"{BLOCK}/{path}/{part}" for path in ours) for part in ("kernel", "bias")]
        return [Row(f"{theirs}.weight", paths[0], inputs=inputs), Row(f"{theirs}.bias", paths[1], inputs=None)]

    return Table(
        [
            Row("transformer.wte.weight", ("embed/table",)),
            Row("transformer.wpe.weight", ("embed_position/table",)),
            *norm("transformer.h.{i}.ln_1", f"{BLOCK}/attention_norm"),
            *conv("attn.c_attn", "attention/query", "attention/key", "attention/value"),
            *conv("attn.c_proj", "attention/output", inputs=2),
            *norm("transformer.h.{i}.ln_2", f"{BLOCK}/mlp_norm"),
            *conv("mlp.c_fc", "mlp/up"),
            *conv("mlp.c_proj", "mlp/down"),
            *norm("transformer.ln_f", "final_norm"),
        ],
        prefix="transformer.",
        same={"lm_head.weight": "transformer.wte.weight"},
        computed=("*.attn.bias", "*.attn.masked_bias"),
    )


def _is_gpt2(spec: GPTSpec) -> bool:
    return (
        spec.position == "learned" and spec.norm == "layer" and spec.bias and spec.tied and not spec.gated
        and not spec.experts and not spec.windows and not spec.scale_embedding and not spec.qk_norm
        and spec.width_base is None
        and spec.kv_heads in (None, spec.heads) and spec.head_width in (None, spec.width // spec.heads)
    )  # fmt: skip


# --- Llama ------------------------------------------------------------------------------------------------------------


def llama_spec(config: Mapping[str, Any]) -> GPTSpec:
    """The settings of a Llama, Mistral, Mixtral, Qwen 2 or Qwen 3.

    Raises:
        InputError: something that this family does not compute.
    """
    kind = config.get("model_type", "llama")
    s = Settings(config, kind)
    s.expect(mlp_bias=False, pretraining_tp=1)
    heads = s.count("num_attention_heads")
    bias = s.flag("attention_bias", kind == "qwen2")
    if bias and kind != "qwen2":
        raise InputError("config.json, attention_bias=True: a bias of the output projection alone has no place here")
    experts = s.count("num_local_experts", 0) if kind == "mixtral" else 0
    layers = s.count("num_hidden_layers")
    tied = s.flag("tie_word_embeddings", False)
    return GPTSpec(
        vocab_size=s.count("vocab_size"),
        context=s.count("max_position_embeddings"),
        layers=layers,
        width=s.count("hidden_size"),
        heads=heads,
        kv_heads=s.count("num_key_value_heads", heads),
        head_width=s.count("head_dim", s.count("hidden_size") // heads),
        ff_width=s.count("intermediate_size"),
        norm_epsilon=s.number("rms_norm_eps", 1e-6),
        activation=s.activation("hidden_act", "silu"),
        gated=True,
        qkv_bias=bias,
        qk_norm=kind == "qwen3",
        windows=_windows(s, kind, layers),
        experts=experts,
        experts_chosen=s.count("num_experts_per_tok", 2) if experts else 2,
        tied=tied,
        **_rope(s),
    )


def _windows(s: Settings, kind: str, layers: int) -> tuple[int, ...]:
    """Keys before the query that each layer sees, in the shortest pattern that repeats."""
    width = s.config.get("sliding_window")
    if kind.startswith("qwen") and not s.flag("use_sliding_window", False):
        width = None
    if kind == "llama" or width is None:
        return ()
    kinds = s.config.get("layer_types")
    if kinds is None:
        first = s.count("max_window_layers", 28) if kind.startswith("qwen") else 0
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    unknown = sorted({str(k) for k in kinds} - {"sliding_attention", "full_attention"})
    if unknown or len(kinds) != layers:
        raise InputError(f"config.json, layer_types: {', '.join(unknown) or len(kinds)} cannot be read")
    windows = tuple(width - 1 if k == "sliding_attention" else 0 for k in kinds)  # theirs counts the query itself
    if not any(windows):
        return ()
    period = next(p for p in range(1, layers + 1) if layers % p == 0 and windows == windows[:p] * (layers // p))
    return windows[:period]


def _rope(s: Settings) -> dict[str, Any]:
    """Rotary positions: `rope_parameters`, or `rope_theta` and `rope_scaling` of older configs."""
    said = s.config.get("rope_parameters") or {}
    base = said.get("rope_theta", s.config.get("rope_theta", 10000.0))
    scaling = {**(s.config.get("rope_scaling") or {}), **said}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    found: dict[str, Any] = {"rope_base": float(base)}
    if scaling.get("partial_rotary_factor", s.config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise InputError("config.json, partial_rotary_factor: heads that turn in part have no place here")
    if kind in ("default", "dynamic"):  # the dynamic one changes nothing up to max_position_embeddings
        return found
    if kind not in ("linear", "llama3", "yarn"):
        raise InputError(f"config.json, rope type {kind!r}: there are default, linear, dynamic, llama3, yarn")
    original = scaling.get("original_max_position_embeddings", s.config.get("original_max_position_embeddings"))
    factor = scaling.get("factor")
    context = s.count("max_position_embeddings")
    if kind == "yarn":
        original = original or context
        factor = factor or context / original
        for name, value in (("attention_factor", None), ("beta_fast", 32), ("beta_slow", 1), ("mscale", None),
                            ("mscale_all_dim", None), ("truncate", True)):  # fmt: skip
            if scaling.get(name, value) not in (value, None):
                raise InputError(f"config.json, rope {name}={scaling[name]}: only {value} has a place here")
    if not factor or (kind != "linear" and not original):
        raise InputError(f"config.json: the rope of type {kind!r} lacks its factor or original context")
    found |= {"rope_scaling": kind, "rope_factor": float(factor)}
    if original:
        found["rope_original_context"] = int(original)
    if kind == "llama3":
        found["rope_low_frequency"] = float(scaling.get("low_freq_factor", 1.0))
        found["rope_high_frequency"] = float(scaling.get("high_freq_factor", 4.0))
    return found


def llama_config(spec: GPTSpec) -> dict[str, Any]:
    """The config.json of the member of the Llama family that computes what `spec` does.

    Raises:
        InputError: none of them does.
    """
    kind = _llama_kind(spec)
    rope: dict[str, Any] = {"rope_theta": spec.rope_base, "rope_type": spec.rope_scaling or "default"}
    if spec.rope_scaling == "ntk":  # a base that is raised, which every reader knows
        width = spec.attention_settings().head_width
        rope = {"rope_theta": spec.rope_base * spec.rope_factor ** (width / (width - 2)), "rope_type": "default"}
    elif spec.rope_scaling:
        rope["factor"] = spec.rope_factor
        if spec.rope_scaling != "linear":
            rope["original_max_position_embeddings"] = spec.rope_original_context
    if spec.rope_scaling == "llama3":
        rope |= {"low_freq_factor": spec.rope_low_frequency, "high_freq_factor": spec.rope_high_frequency}
    attention = spec.attention_settings()
    config: dict[str, Any] = {
        "model_type": kind,
        "architectures": [_ARCHITECTURES[kind]],
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.context,
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.width,
        "intermediate_size": spec.block_settings().ff_width,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_width,
        "rms_norm_eps": spec.norm_epsilon,
        "hidden_act": Settings.activation_name(spec.activation, gated=False),
        "tie_word_embeddings": spec.tied,
        # In both spellings: readers before transformers 5 know the second alone.
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
    }
    if kind in ("llama", "qwen3"):
        config |= {"attention_bias": False}
    if kind == "mixtral":
        config |= {"num_local_experts": spec.experts, "num_experts_per_tok": spec.experts_chosen}
    windows = spec.windows_in_turn() * (spec.layers // len(spec.windows_in_turn()))
    sizes = sorted({w for w in windows if w})
    if kind in ("mistral", "mixtral"):
        config["sliding_window"] = sizes[0] + 1 if sizes else None
    elif kind.startswith("qwen"):
        config |= {"use_sliding_window": bool(sizes), "sliding_window": sizes[0] + 1 if sizes else None}
        config["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    return config


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip


def _llama_kind(spec: GPTSpec) -> str:
    windows = set(spec.windows_in_turn())
    wrong = [
        name for name, wanted in (("position", "rope"), ("norm", "rms"), ("gated", True), ("bias", False),
                                  ("scale_embedding", False), ("width_base", None)) if getattr(spec, name) != wanted
    ]  # fmt: skip
    if wrong:
        names = ", ".join(f"model.{name}={getattr(spec, name)}" for name in wrong)
        raise InputError(f"{names}: neither GPT-2 nor a member of the Llama family computes this; it cannot be written")
    kinds = {
        "qwen3": spec.qk_norm and not spec.qkv_bias and not spec.experts,
        "qwen2": spec.qkv_bias and not spec.qk_norm and not spec.experts
        and spec.head_width in (None, spec.width // spec.heads),
        "mixtral": bool(spec.experts) and not (spec.qkv_bias or spec.qk_norm) and len(windows) == 1,
        "mistral": windows != {None} and len(windows) == 1 and not (spec.qkv_bias or spec.qk_norm or spec.experts),
        "llama": windows == {None} and not (spec.qkv_bias or spec.qk_norm or spec.experts),
    }  # fmt: skip
    found = next((kind for kind, fits in kinds.items() if fits), None)
    if found is None or len(windows - {None}) > 1:
        raise InputError(
            f"model.qk_norm={spec.qk_norm}, qkv_bias={spec.qkv_bias}, experts={spec.experts}, windows={spec.windows}: "
            "no member of the Llama family has these together; it cannot be written"
        )
    return found


def _llama_table(spec: GPTSpec, interleaved: bool) -> Table:
    half = spec.attention_settings().head_width // 2
    # Ours pairs feature j with j + H/2; theirs lie side by side.
    order = tuple(range(0, 2 * half, 2)) + tuple(range(1, 2 * half, 2)) if interleaved else ()
    layer, attention = "model.layers.{i}", f"{BLOCK}/attention"
    rows = [
        Row("model.embed_tokens.weight", ("embed/table",)),
        *norm(f"{layer}.input_layernorm", f"{BLOCK}/attention_norm", bias=False),
        *linear(f"{layer}.self_attn.q_proj", f"{attention}/query", spec.qkv_bias, order=order),
        *linear(f"{layer}.self_attn.k_proj", f"{attention}/key", spec.qkv_bias, order=order),
        *linear(f"{layer}.self_attn.v_proj", f"{attention}/value", spec.qkv_bias),
        *linear(f"{layer}.self_attn.o_proj", f"{attention}/output", bias=False, inputs=2),
        *norm(f"{layer}.self_attn.q_norm", f"{attention}/query_norm", bias=False),
        *norm(f"{layer}.self_attn.k_norm", f"{attention}/key_norm", bias=False),
        *norm(f"{layer}.post_attention_layernorm", f"{BLOCK}/mlp_norm", bias=False),
        *norm("model.norm", "final_norm", bias=False),
        *linear("lm_head", "unembedding_projection", bias=False),
    ]
    if spec.experts:
        expert = f"{layer}.block_sparse_moe.experts.{{e}}"
        rows += [
            Row(f"{layer}.block_sparse_moe.gate.weight", (f"{BLOCK}/moe/router",), True),
            *(Row(f"{expert}.{theirs}.weight", (f"{BLOCK}/moe/{ours}",), True)
              for theirs, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down"))),
        ]  # fmt: skip
    else:
        rows += [r for n in ("gate", "up", "down") for r in linear(f"{layer}.mlp.{n}_proj", f"{BLOCK}/mlp/{n}", False)]
    same = {"lm_head.weight": "model.embed_tokens.weight"} if spec.tied else {}
    windows = len(spec.windows_in_turn())
    return Table(rows, same=same, computed=("*.rotary_emb.inv_freq",), windows=windows)


def table(spec: GPTSpec, interleaved: bool = False) -> Table:
    """The names of the checkpoints of a decoder-only Transformer: GPT-2's or Llama's, as its settings are.

    Args:
        spec: the settings.
        interleaved: as in `llm.weights.sources.Source`.
    """
    return _gpt2_table() if _is_gpt2(spec) else _llama_table(spec, interleaved)


def config_of(spec: GPTSpec) -> dict[str, Any]:
    """The config.json of a decoder-only Transformer.

    Raises:
        InputError: neither GPT-2 nor a member of the Llama family computes what it does.
    """
    return gpt2_config(spec) if _is_gpt2(spec) else llama_config(spec)
