"""Formats: parts with an index, torch's pickles old and new and those with code in them, GGUF, half precision."""

import json
import pickle
import shutil
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm import weights
from llm.errors import InputError
from tests.weights.checkpoints import GOLDENS, read
from tests.weights.test_parity import flat

THEIRS = GOLDENS / "gpt2" / "model.safetensors"
PACKED = json.loads((GOLDENS.parent / "gguf_blocks.json").read_text())


def folder_of(tmp_path, name="gpt2"):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copyfile(GOLDENS / name / "config.json", folder / "config.json")
    return folder


def test_parts_and_their_index(tmp_path):
    folder, tensors = folder_of(tmp_path), load_file(THEIRS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for part, mine in parts.items():
        save_file({name: tensors[name] for name in mine}, folder / part)
    index = {"weight_map": {name: part for part, mine in parts.items() for name in mine}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = weights.open_source(str(folder)).tensors
    assert sorted(found) == names
    for name in names:
        np.testing.assert_array_equal(found[name].read(), tensors[name])
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(InputError, match="expected an object weight_map"):
        weights.open_source(str(folder))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "b.safetensors").unlink()
    with pytest.raises(InputError, match="names b.safetensors: fetch the whole"):
        weights.open_source(str(folder))


@pytest.mark.parametrize("kind", ["archive", "legacy"])
def test_torch_files(tmp_path, kind):
    folder = folder_of(tmp_path)
    shutil.copyfile(GOLDENS / f"{kind}.bin", folder / "pytorch_model.bin")
    _, _, params = read(folder)
    _, _, same = read(GOLDENS / "gpt2")
    for name, x in flat(same).items():
        np.testing.assert_array_equal(flat(params)[name], x, err_msg=name)
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="pytorch_model.bin"):
        read(folder)


class Code:
    """What a pickle can ask for."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (__import__("os").mkdir, (str(self.path),))


def test_a_pickle_with_code_is_refused_and_nothing_of_it_is_run(tmp_path):
    folder, made = folder_of(tmp_path), tmp_path / "made"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"wte.weight": Code(made)}))
    with pytest.raises(InputError, match="mkdir, which is no tensor; nothing of it was run"):
        read(folder)
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"wte.weight": Code(made)}))
    with pytest.raises(InputError, match="mkdir, which is no tensor"):
        read(folder)
    assert not made.exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_float32(tmp_path, dtype):
    import ml_dtypes

    half = np.dtype(getattr(ml_dtypes, dtype, dtype))
    folder, tensors = folder_of(tmp_path), load_file(THEIRS)
    save_file({name: x.astype(half) for name, x in tensors.items()}, folder / "model.safetensors")
    for name, tensor in weights.open_source(str(folder)).tensors.items():
        found = tensor.read()
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, tensors[name].astype(half).astype(np.float32))


def test_a_cut_off_file_is_refused(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "model.safetensors").write_bytes(THEIRS.read_bytes()[:-100])
    with pytest.raises(InputError, match="model.safetensors is damaged"):
        read(folder)


def test_where_nothing_is(tmp_path):
    for name, message in ((tmp_path / "none", "no such file"), (tmp_path, "no weights; what can be read")):
        with pytest.raises(InputError, match=message):
            weights.open_source(str(name))
    shutil.copyfile(THEIRS, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="config.json is missing"):
        weights.open_source(str(tmp_path))


# --- GGUF -------------------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(path):
    """The golden Llama as llama.cpp's converter writes it: query and key rows of a head with pairs side by side."""
    import gguf

    config = json.loads((GOLDENS / "llama" / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    for name, x in load_file(GOLDENS / "llama" / "model.safetensors").items():
        *layer, rest = name.removesuffix(".weight").split("layers.")[-1].partition(".")[::2] if "layers" in name else (
            name.removesuffix(".weight"),)  # fmt: skip
        prefix = f"blk.{layer[0]}." if layer else ""
        if "q_proj" in name or "k_proj" in name:
            heads = x.shape[0] // 4
            x = x.reshape(heads, 2, 2, 16).swapaxes(1, 2).reshape(x.shape)
        writer.add_tensor(f"{prefix}{GGUF_NAMES[rest]}.weight", x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_is_the_same_model(tmp_path):
    imported, _, params = read(write_gguf(tmp_path / "model.gguf"))
    same, _, expected = read(GOLDENS / "llama")
    assert imported.spec == same.spec
    for name, x in flat(expected).items():
        np.testing.assert_array_equal(flat(params)[name], x, err_msg=name)


def read_packed(path, packed, kind):
    """What is read of a GGUF with one tensor of packed rows."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for field, value in (("context_length", 8), ("embedding_length", 64), ("block_count", 1)):
        getattr(writer, f"add_{field}")(value)
    writer.add_vocab_size(8)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights.open_source(str(path)).tensors["model.embed_tokens.weight"].read()


@pytest.mark.parametrize("kind", PACKED)
def test_packed_numbers_are_those_of_the_published_layout(tmp_path, kind):
    """`tests/goldens/gguf_blocks.py` worked them out one by one."""
    packed = np.array([list(bytes.fromhex(block)) for block in PACKED[kind]["bytes"]], np.uint8)
    numbers = np.array(PACKED[kind]["numbers"])
    found = read_packed(tmp_path / "x.gguf", packed, kind)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, numbers, rtol=0, atol=1e-6 * np.abs(numbers).max())


def test_half_precision_in_a_gguf(tmp_path):
    x = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float16)
    np.testing.assert_array_equal(read_packed(tmp_path / "x.gguf", x, "F16"), x.astype(np.float32))


def test_a_cut_off_gguf_and_another_architecture_are_refused(tmp_path):
    import gguf

    path = write_gguf(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match="cut off or no GGUF"):
        weights.open_source(str(path))
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="architecture 'mamba'; there are llama"):
        weights.open_source(str(tmp_path / "other.gguf"))
