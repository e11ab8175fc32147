"""Writes tests/goldens/weights/: tiny random checkpoints by Hugging Face's transformers, and what they compute.

    pip install torch==2.13.0 transformers==5.24.0
    python -P tests/goldens/weights.py

    python -m tests.weights.checkpoints runs/exported       # what we write of them, in the project's environment
    python -P tests/goldens/weights.py --check runs/exported  # what transformers makes of that

Each folder holds config.json, model.safetensors and expected.npz: input ids and outputs in float32. archive.bin and
legacy.bin are the GPT-2 as torch wrote it. Weights are larger than fresh ones, and small where an epsilon must show, so
that a wrong convention does.
"""

import json
import pathlib
import sys

import numpy as np
import safetensors.torch
import torch
import transformers as hf

HERE = pathlib.Path(__file__).parent / "weights"
VOCAB, LENGTH = 262, 24
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")
LLAMA = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=256,
)  # fmt: skip
BERT = dict(
    vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=40, pad_token_id=0,
)  # fmt: skip
T5 = dict(
    vocab_size=VOCAB, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4, pad_token_id=258,
    decoder_start_token_id=258, eos_token_id=256, relative_attention_num_buckets=8, relative_attention_max_distance=20,
)  # fmt: skip
SCALINGS = {
    "linear": dict(rope_type="linear", factor=4.0),
    "dynamic": dict(rope_type="dynamic", factor=2.0),
    "llama3": dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
}


def rope(base: float = 100.0, **more) -> dict:
    """Rotary positions that turn fast enough for 24 places to tell them apart."""
    return dict(rope_parameters=dict(rope_theta=base, rope_type="default") | more)


def models() -> dict:
    """Name -> (model class, config)."""
    found = {
        "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(
            vocab_size=VOCAB, n_positions=40, n_embd=16, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256)),
        "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**LLAMA, **rope(), tie_word_embeddings=False)),
        "llama-tied": (hf.LlamaForCausalLM, hf.LlamaConfig(**LLAMA, **rope(), tie_word_embeddings=True, head_dim=6)),
        "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**LLAMA, **rope(), tie_word_embeddings=True)),
        "qwen2-window": (hf.Qwen2ForCausalLM, hf.Qwen2Config(
            **LLAMA, **rope(), use_sliding_window=True, sliding_window=6, max_window_layers=1)),
        "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**LLAMA, **rope(), head_dim=6, rms_norm_eps=1e-5)),
        "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**LLAMA, **rope(), sliding_window=6)),
        "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig(
            **LLAMA, **rope(), num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
        "bert-masked": (hf.BertForMaskedLM, hf.BertConfig(**BERT)),
        "bert-pretraining": (hf.BertForPreTraining, hf.BertConfig(**BERT)),
        "bert-classes": (hf.BertForSequenceClassification, hf.BertConfig(
            **BERT, id2label={0: "good", 1: "bad", 2: "ugly"})),
        "bert-answers": (hf.BertForQuestionAnswering, hf.BertConfig(**BERT)),
        "bert-bare": (hf.BertModel, hf.BertConfig(**BERT)),
        "t5": (hf.T5ForConditionalGeneration, hf.T5Config(**T5, feed_forward_proj="relu")),
        "t5-v1.1": (hf.T5ForConditionalGeneration, hf.T5Config(
            **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
        "marian": (hf.MarianMTModel, hf.MarianConfig(
            vocab_size=VOCAB, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=40,
            pad_token_id=258, decoder_start_token_id=258, eos_token_id=256, forced_eos_token_id=256,
            activation_function="swish", scale_embedding=True)),
    }  # fmt: skip
    for name, scaling in SCALINGS.items():
        config = hf.LlamaConfig(**LLAMA, **rope(**scaling), tie_word_embeddings=True)
        found[f"llama-{name}"] = (hf.LlamaForCausalLM, config)
    return found


# Their embeddings have a variance near the epsilon of their norms; the others' tables give logits too.
SMALL = ("bert-bare", "bert-answers", "bert-classes", "t5-v1.1")


def shake(name: str, model: torch.nn.Module, seed: int) -> None:
    """Random weights that matter: matrices of a gain above 1, biases and norms away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)

    def noise(parameter: torch.Tensor) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator)

    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "embed_positions" in path:  # Marian's sinusoids
                continue
            if any(part in path for part in ("wte", "wpe", "embed", "shared")) and "LayerNorm" not in path:
                parameter.copy_(noise(parameter) * (0.003 if name in SMALL else 0.2))
            elif "relative_attention_bias" in path:
                parameter.copy_(noise(parameter))
            elif parameter.ndim >= 2:
                parameter.copy_(noise(parameter) * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(noise(parameter) * 0.3 + (1.0 if path.endswith("weight") else 0.0))
        if name == "t5-v1.1":  # whose unembedding is its own, whatever transformers 5 ties by itself
            model.lm_head.weight = torch.nn.Parameter(noise(model.lm_head.weight) * 0.5)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(noise(model.final_logits_bias))


def expected(model, config) -> dict[str, np.ndarray]:
    """Inputs and outputs, whatever the model has of them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 250, (2, LENGTH), generator=generator)
    given = {"input_ids": ids}
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(1, 250, (2, LENGTH - 6), generator=generator)
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][1, 17:] = 0
    if config.model_type == "bert":
        given["token_type_ids"] = (torch.arange(LENGTH)[None] > 9).long().repeat(2, 1)
    with torch.no_grad():
        output = model(**given)
    names = ("logits", "prediction_logits", "seq_relationship_logits", "start_logits", "end_logits",
             "last_hidden_state")  # fmt: skip
    found = {name: output[name] for name in names if name in output}
    if isinstance(model, hf.BertModel):
        mean = output.last_hidden_state.mean(1)
        found["sentence"] = mean / mean.norm(dim=-1, keepdim=True)
    return {name: value.numpy() for name, value in (given | found).items()}


def main(names: list[str]) -> None:
    """Writes those named, or all."""
    for number, (name, (kind, config)) in enumerate(sorted(models().items())):
        if names and name not in names:
            continue
        model = kind(config).eval()
        shake(name, model, number)
        folder = HERE / name
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        if name == "t5-v1.1":  # as the published ones say it and hold it
            path = folder / "config.json"
            path.write_text(path.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
            tensors = {key: x.contiguous() for key, x in model.state_dict().items() if "embed_tokens" not in key}
            safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(folder / "expected.npz", **expected(model, config))
        print(name, sum(p.numel() for p in model.parameters()))
    if not names:
        pickles()


def pickles() -> None:
    """The GPT-2 as torch writes it, in archives and before them."""
    source = hf.GPT2LMHeadModel.from_pretrained(HERE / "gpt2").state_dict()
    torch.save(source, HERE / "archive.bin")
    # Numbers of another size, which no tensor by name has, lie between the storages.
    mixed = {"aside": [torch.arange(7) for _ in range(40)]} | source
    torch.save(mixed, HERE / "legacy.bin", _use_new_zipfile_serialization=False)


def check(folder: pathlib.Path) -> None:
    """Prints how far transformers is from the goldens' outputs with the checkpoints in a folder, and keys it misses."""
    for exported in sorted(path for path in folder.iterdir() if path.is_dir()):
        name = json.loads((exported / "config.json").read_text())["architectures"][0]
        model, info = getattr(hf, name).from_pretrained(exported, output_loading_info=True)
        golden = dict(np.load(HERE / exported.name / "expected.npz"))
        given = {key: torch.tensor(golden.pop(key)) for key in INPUTS if key in golden}
        with torch.no_grad():
            output = model.eval()(**given)
        compared = [key for key in golden if key in output]
        assert compared, name
        worst = max(float(np.abs(output[key].numpy() - golden[key]).max()) for key in compared)
        missing = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
        print(f"{exported.name:18} {name:32} {worst:.1e} {' '.join(missing)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        check(pathlib.Path(sys.argv[2]))
    else:
        main(sys.argv[1:])
