"""Published sizes by name: what each family's paper or public checkpoint is made of.

`PRESETS[family][name]` is a spec. Where a checkpoint is public its parameters are counted exactly by
`tests/models/test_presets.py`; otherwise the count is within 4 % of the paper's rounded figure.
"""

import dataclasses
from typing import Any

from llm.models.bert import BertSpec
from llm.models.classifier import ClassifierSpec
from llm.models.encdec import EncDecSpec
from llm.models.gpt import GPTSpec
from llm.models.rnn import RNNSpec
from llm.models.t5 import T5Spec


def _encdec(width: int, heads: int, dropout: float) -> EncDecSpec:
    """Vaswani et al. 2017, table 3. The vocabulary is that of English-German."""
    return EncDecSpec(vocab_size=37000, layers=6, width=width, heads=heads, dropout=dropout)


def _bert(layers: int, width: int) -> BertSpec:
    """Devlin et al. 2019 and Turc et al. 2019: heads of 64, the uncased English vocabulary."""
    return BertSpec(vocab_size=30522, layers=layers, width=width, heads=width // 64)


_GPT2 = GPTSpec(
    vocab_size=50257, context=1024, position="learned", norm="layer", norm_epsilon=1e-5, bias=True, dropout=0.1
)


def _gpt2(layers: int, width: int) -> GPTSpec:
    """Radford et al. 2019: heads of 64."""
    return dataclasses.replace(_GPT2, layers=layers, width=width, heads=width // 64)


def _gpt3(layers: int, width: int, heads: int, head_width: int) -> GPTSpec:
    """Brown et al. 2020, table 2.1: GPT-2 with dense and locally banded layers alternating, 2,048 tokens of context.

    The paper does not say how wide the bands are; here a query sees 256 keys before it.
    """
    return dataclasses.replace(
        _GPT2, context=2048, layers=layers, width=width, heads=heads, head_width=head_width, windows=(0, 256),
        dropout=0.0,
    )  # fmt: skip


_LLAMA = GPTSpec(norm_epsilon=1e-5, activation="silu", gated=True, tied=False)


def _llama(**changes: Any) -> GPTSpec:
    """RoPE, RMS norm, SwiGLU, no biases (Touvron et al. 2023), and what a model changes of it."""
    return dataclasses.replace(_LLAMA, **changes)


def _t5(width: int, heads: int, head_width: int, ff_width: int, layers: int) -> T5Spec:
    """Raffel et al. 2020. The table has 32,128 entries: 32,000 pieces, 100 sentinels, and padding."""
    return T5Spec(vocab_size=32128, layers=layers, width=width, heads=heads, head_width=head_width, ff_width=ff_width)


def _t5_1_1(width: int, heads: int, ff_width: int, layers: int) -> T5Spec:
    """Version 1.1: a gated GELU, an unembedding of its own, no dropout in pre-training."""
    return dataclasses.replace(
        _t5(width, heads, 64, ff_width, layers), activation="gelu_tanh", gated=True, tied=False, dropout=0.0
    )


PRESETS: dict[str, dict[str, Any]] = {
    "rnn": {
        # Zaremba et al. 2014: the Penn Treebank models, 10,000 words.
        "zaremba-medium": RNNSpec(vocab_size=10000, layers=2, width=650, tied=False, carry=True, dropout=0.5),
        "zaremba-large": RNNSpec(vocab_size=10000, layers=2, width=1500, tied=False, carry=True, dropout=0.65),
    },
    "classifier": {"worked-program": ClassifierSpec(vocab_size=1000, classes=10)},
    "encdec": {"base": _encdec(512, 8, 0.1), "big": _encdec(1024, 16, 0.3)},
    "bert": {
        "tiny": _bert(2, 128),
        "mini": _bert(4, 256),
        "small": _bert(4, 512),
        "medium": _bert(8, 512),
        "base": _bert(12, 768),
        "large": _bert(24, 1024),
    },
    "gpt": {
        "gpt2": _gpt2(12, 768),
        "gpt2-medium": _gpt2(24, 1024),
        "gpt2-large": _gpt2(36, 1280),
        "gpt2-xl": dataclasses.replace(_GPT2, layers=48, width=1600, heads=25),
        "gpt3-small": _gpt3(12, 768, 12, 64),
        "gpt3-medium": _gpt3(24, 1024, 16, 64),
        "gpt3-large": _gpt3(24, 1536, 16, 96),
        # The table prints 24 heads of 128, which would make 1.5 billion; the paper's 1.3 billion has 16.
        "gpt3-xl": _gpt3(24, 2048, 16, 128),
        "gpt3-2.7b": _gpt3(32, 2560, 32, 80),
        "gpt3-6.7b": _gpt3(32, 4096, 32, 128),
        "gpt3-13b": _gpt3(40, 5140, 40, 128),
        "gpt3-175b": _gpt3(96, 12288, 96, 128),
        "llama-2-7b": _llama(vocab_size=32000, context=4096, layers=32, width=4096, heads=32, ff_width=11008),
        "llama-3-8b": _llama(
            vocab_size=128256, context=8192, layers=32, width=4096, heads=32, kv_heads=8, ff_width=14336,
            rope_base=500000.0,
        ),
        "llama-3.2-1b": _llama(
            vocab_size=128256, context=131072, layers=16, width=2048, heads=32, kv_heads=8, ff_width=8192,
            rope_base=500000.0, rope_scaling="llama3", rope_factor=32.0, tied=True,
        ),
        "mistral-7b": _llama(
            vocab_size=32000, context=32768, layers=32, width=4096, heads=32, kv_heads=8, ff_width=14336,
            windows=(4095,),
        ),
        "mixtral-8x7b": _llama(
            vocab_size=32000, context=32768, layers=32, width=4096, heads=32, kv_heads=8, ff_width=14336,
            rope_base=1e6, experts=8, experts_chosen=2,
        ),
        "qwen2.5-0.5b": _llama(
            vocab_size=151936, context=32768, layers=24, width=896, heads=14, kv_heads=2, ff_width=4864,
            rope_base=1e6, norm_epsilon=1e-6, qkv_bias=True, tied=True,
        ),
        "qwen3-0.6b": _llama(
            vocab_size=151936, context=40960, layers=28, width=1024, heads=16, kv_heads=8, head_width=128,
            ff_width=3072, rope_base=1e6, norm_epsilon=1e-6, qk_norm=True, tied=True,
        ),
        "smollm2-135m": _llama(
            vocab_size=49152, context=8192, layers=30, width=576, heads=9, kv_heads=3, ff_width=1536,
            rope_base=100000.0, tied=True,
        ),
    },
    "t5": {
        "small": _t5(512, 8, 64, 2048, 6),
        "base": _t5(768, 12, 64, 3072, 12),
        "large": _t5(1024, 16, 64, 4096, 24),
        "3b": _t5(1024, 32, 128, 16384, 24),
        "11b": _t5(1024, 128, 128, 65536, 24),
        "v1.1-small": _t5_1_1(512, 6, 1024, 8),
        "v1.1-base": _t5_1_1(768, 12, 2048, 12),
        "v1.1-large": _t5_1_1(1024, 16, 2816, 24),
        "v1.1-xl": _t5_1_1(2048, 32, 5120, 24),
        "v1.1-xxl": _t5_1_1(4096, 64, 10240, 24),
    },
}  # fmt: skip
