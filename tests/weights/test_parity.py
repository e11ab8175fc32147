"""Imported checkpoints compute what transformers computes of them (float32, jitted, CPU); wrong conventions do not."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm import weights
from llm.errors import InputError
from llm.models import BertSpec, EncDecSpec, GPTSpec, RNNSpec, T5Spec
from llm.weights import gpt
from llm.weights.sources import Tensor
from tests.weights.checkpoints import GOLDENS, NAMES, error, export, read

CLOSE = 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_transformers(name):
    assert error(name) < CLOSE


def spec(**changes):
    return {"change": lambda imported: imported._replace(spec=dataclasses.replace(imported.spec, **changes))}


def tensor(name, change):
    def spoil(tensors):
        assert name in tensors
        old = tensors[name]
        return {**tensors, name: Tensor(old.shape, lambda: change(old.read()))}

    return {"tensors": spoil}


FAULTS = {
    "a square matrix transposed, GPT-2": ("gpt2", tensor("transformer.h.1.attn.c_proj.weight", np.transpose)),
    "a square matrix transposed, Llama": ("llama", tensor("model.layers.0.self_attn.o_proj.weight", np.transpose)),
    "a square matrix transposed, BERT": (
        "bert-masked", tensor("bert.encoder.layer.0.attention.self.query.weight", np.transpose)),
    "a square matrix transposed, Marian": (
        "marian", tensor("model.decoder.layers.1.encoder_attn.v_proj.weight", np.transpose)),
    "tanh for erf, BERT": ("bert-answers", spec(activation="gelu_tanh")),
    "erf for tanh, GPT-2": ("gpt2", spec(activation="gelu")),
    "epsilon, BERT": ("bert-bare", spec(norm_epsilon=1e-6)),
    "epsilon, T5": ("t5-v1.1", spec(norm_epsilon=1e-5)),
    "epsilon, Qwen 3": ("qwen3", spec(norm_epsilon=1e-2)),
    "no bias, GPT-2": ("gpt2", tensor("transformer.h.0.mlp.c_fc.bias", np.zeros_like)),
    "no bias, Qwen 2": ("qwen2", tensor("model.layers.1.self_attn.q_proj.bias", np.zeros_like)),
    "no bias of the logits, Marian": ("marian", tensor("final_logits_bias", np.zeros_like)),
    "no scaling of the rotary positions, linear": ("llama-linear", spec(rope_scaling="", rope_factor=1.0)),
    "no scaling of the rotary positions, llama3": ("llama-llama3", spec(rope_scaling="", rope_factor=1.0)),
    "no scaling of the rotary positions, yarn": ("llama-yarn", spec(rope_scaling="", rope_factor=1.0)),
    "another base": ("llama", spec(rope_base=10000.0)),
    "a window one wider, Mistral": ("mistral", spec(windows=(6,))),
    "a window in all layers, Qwen 2": ("qwen2-window", spec(windows=(5, 5))),
    "sinusoids in turns, Marian": ("marian", spec(position="sinusoid")),
    "one expert, Mixtral": ("mixtral", spec(experts_chosen=1)),
    "BERT's classes of next sentences in the other order": (
        "bert-pretraining", tensor("cls.seq_relationship.weight", lambda x: x[::-1])),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_convention_shows(fault):
    name, spoilt = FAULTS[fault]
    assert error(name, **spoilt) > 2 * CLOSE


def test_interleaved_rotary_order_shows_and_is_undone(monkeypatch):
    """The same weights with the features of a pair side by side, as GGUF keeps them."""
    order = [0, 2, 1, 3]  # of heads of four: the halves of theirs, two and two

    def side_by_side(tensors):
        def shuffle(old):
            return lambda: old.read().reshape(-1, 4, 16)[:, order].reshape(-1, 16)

        rotated = [n for n in tensors if "q_proj" in n or "k_proj" in n]
        assert len(rotated) == 4
        return {**tensors, **{n: Tensor(tensors[n].shape, shuffle(tensors[n])) for n in rotated}}

    assert error("llama", tensors=side_by_side) > CLOSE
    table = gpt.table
    monkeypatch.setattr(gpt, "table", lambda spec, interleaved: table(spec, True))
    assert error("llama", tensors=side_by_side) < CLOSE


@pytest.mark.parametrize("changes", [{"logit_scale": 1.0}, {"scaled": True}], ids=str)
def test_t5_without_its_scales_shows(monkeypatch, changes):
    wiring = T5Spec.wiring

    def wrong(self):
        w = wiring(self)
        if "scaled" in changes:
            attention = dataclasses.replace(w.block.attention, scaled=True)
            return dataclasses.replace(w, block=dataclasses.replace(w.block, attention=attention))
        return dataclasses.replace(w, **changes)

    assert error("t5") < CLOSE
    monkeypatch.setattr(T5Spec, "wiring", wrong)
    assert error("t5") > CLOSE


# --- both ways --------------------------------------------------------------------------------------------------------


def flat(params):
    import flax.traverse_util

    return {name: np.asarray(x) for name, x in flax.traverse_util.flatten_dict(params, sep="/").items()}


@pytest.mark.parametrize("name", NAMES)
def test_export_writes_what_was_imported_bit_by_bit(name):
    imported, _, _ = read(GOLDENS / name)
    config, written = export(name)
    same = weights.table_of(imported.spec, imported.objective).same
    theirs = load_file(GOLDENS / name / "model.safetensors")
    lost = {n for n in theirs if n not in written}
    assert all(n in same or any(w in n for w in ("pooler", "embed_positions")) for n in lost), lost
    for n, x in written.items():
        np.testing.assert_array_equal(x, theirs[n], err_msg=n)
    said = json.loads((GOLDENS / name / "config.json").read_text())
    for key, value in config.items():  # what both say; tied unembeddings are said in other ways by other releases
        if said.get(key) is not None and key not in ("tie_word_embeddings", "id2label", "label2id", "rope_parameters"):
            if (name, key) != ("marian", "max_position_embeddings"):  # of a buffer; sinusoids have no end
                assert ("silu" if said[key] == "swish" else said[key] or None) == (value or None), key
    assert config["architectures"] == said["architectures"]
    again = weights.identify(weights.Source(GOLDENS, config, dict.fromkeys(written), False, None))  # pyright: ignore
    assert again.spec == imported.spec and again.objective == imported.objective and again.labels == imported.labels


# --- refusals ---------------------------------------------------------------------------------------------------------


def spoilt(tmp_path, name, change=lambda tensors: None, **config):
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDENS / name, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | config))
    return folder


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("transformer.h.1.ln_2.bias"), "lacks transformer.h.1.ln_2.bias"),
        (lambda t: t.update({"transformer.h.2.ln_1.bias": np.zeros(16, np.float32)}), "no place for.*h.2.ln_1.bias"),
        (lambda t: t.update({"transformer.wpe.weight": np.zeros((9, 16), np.float32)}), r"wpe.* \(9, 16\).*\(40, 16\)"),
        (lambda t: t.update({"lm_head.weight": np.zeros((262, 16), np.float32)}), "lm_head.weight differs from"),
    ],
    ids=["missing", "unknown", "shape", "untied"],
)  # fmt: skip
def test_keys_are_checked_by_name(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        read(spoilt(tmp_path, "gpt2", change))


@pytest.mark.parametrize(
    "name, config, message",
    [
        ("gpt2", {"model_type": "mamba"}, "'mamba'; there are gpt2"),
        ("gpt2", {"activation_function": "quick_gelu"}, "activation_function='quick_gelu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "longrope"}}, "'longrope'"),
        ("llama", {"hidden_size": None}, "lacks hidden_size"),
        ("llama-yarn", {"rope_parameters": {"rope_theta": 100, "rope_type": "yarn", "mscale": 2}}, "mscale"),
        ("bert-bare", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("bert-classes", {"problem_type": "regression"}, "regression"),
        ("marian", {"normalize_before": True}, "normalize_before"),
        ("t5", {"scale_decoder_outputs": False}, "lm_head.weight"),
        ("bert-classes", {"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification has no place"),
        ("llama", {"rope_parameters": None, "rope_theta": "x"}, "cannot be read"),
        ("llama", {"rope_parameters": None, "rope_scaling": "linear"}, "cannot be read"),
        ("mistral", {"sliding_window": "4096"}, "cannot be read"),
        ("bert-classes", {"id2label": ["a", "b"]}, "cannot be read"),
        ("llama", {"eos_token_id": "x"}, "cannot be read"),
    ],
)  # fmt: skip
def test_what_has_no_place_here_is_refused_by_name(tmp_path, name, config, message):
    with pytest.raises(InputError, match=message):
        read(spoilt(tmp_path, name, **config))


def test_a_tied_table_may_have_either_name(tmp_path):
    def other(tensors):
        tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")

    _, _, params = read(spoilt(tmp_path, "gpt2", other))
    np.testing.assert_array_equal(params["embed"]["table"], read(GOLDENS / "gpt2")[2]["embed"]["table"])


def test_a_sentence_encoder_with_more_than_a_mean_is_refused(tmp_path):
    folder = spoilt(tmp_path, "bert-bare")
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling", "Normalize")]
    (folder / "modules.json").write_text(json.dumps(modules))
    read(folder)
    (folder / "modules.json").write_text(json.dumps([*modules, {"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(InputError, match="the module Dense"):
        read(folder)


def test_what_theirs_do_not_compute_is_not_written():
    for spec, message in (
        (T5Spec(vocab_size=9, gated=True, activation="gelu"), "approximate"),
        (GPTSpec(vocab_size=9, qkv_bias=True, qk_norm=True, gated=True), "these together"),
        (GPTSpec(vocab_size=9, scale_embedding=True), "scale_embedding=True"),
        (BertSpec(vocab_size=9, pre_norm=True), "pre_norm=True"),
        (EncDecSpec(vocab_size=9), "a Marian model has"),
        (RNNSpec(vocab_size=9), "RNNSpec has no checkpoints"),
    ):
        with pytest.raises(InputError, match=message):
            weights.their_config(spec, "masked" if isinstance(spec, BertSpec) else "causal", (), 0, (1,))


def test_names_of_the_first_conversions_and_of_bare_models(tmp_path):
    def older(tensors):
        for name in list(tensors):
            new = name.removeprefix("bert.")
            for end, old in ((".weight", ".gamma"), (".bias", ".beta")):
                new = new.removesuffix(end) + old if "LayerNorm" in new and new.endswith(end) else new
            tensors[new] = tensors.pop(name)

    _, _, params = read(spoilt(tmp_path, "bert-masked", older))
    _, _, same = read(GOLDENS / "bert-masked")
    for name, x in flat(same).items():
        np.testing.assert_array_equal(flat(params)[name], x, err_msg=name)
