"""Formats: parts with an index, torch's pickles old and new and those with code in them, GGUF, half precision."""

import collections
import functools
import io
import json
import pickle
import shutil
import sys
import types
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


def parts_are_read(tmp_path, parts, index, write):
    """Writes GPT-2 in two files by write(tensors, path), reads it, and loses the second; the folder is given back."""
    folder, tensors = folder_of(tmp_path), load_file(THEIRS)
    names = sorted(tensors)
    places = {name: parts[number >= 7] for number, name in enumerate(names)}
    for part in parts:
        write({name: tensors[name] for name in names if places[name] == part}, folder / part)
    (folder / index).write_text(json.dumps({"weight_map": places}))
    found = weights.open_source(str(folder)).tensors
    assert sorted(found) == names
    for name in names:
        np.testing.assert_array_equal(found[name].read(), tensors[name])
    (folder / parts[1]).unlink()
    with pytest.raises(InputError, match=f"names {parts[1]}: fetch the whole"):
        weights.open_source(str(folder))
    return folder


def test_parts_and_their_index(tmp_path):
    folder = parts_are_read(tmp_path, ["a.safetensors", "b.safetensors"], "model.safetensors.index.json", save_file)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(InputError, match="expected an object weight_map"):
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


def test_parts_of_torch_files(tmp_path, monkeypatch):
    parts = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    write = functools.partial(write_torch, monkeypatch)
    parts_are_read(tmp_path, parts, "pytorch_model.bin.index.json", write)


def write_torch(monkeypatch, tensors, path):
    """Float32 tensors as torch.save archives them."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    def _rebuild_tensor_v2(*_):
        raise NotImplementedError

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    storage = type("FloatStorage", (), {"__module__": "torch"})
    utils.__dict__["_rebuild_tensor_v2"], torch.__dict__["FloatStorage"] = _rebuild_tensor_v2, storage
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    class Numbers:
        def __init__(self, key, x):
            self.key, self.x = key, x

        def __reduce__(self):
            strides = tuple(n // 4 for n in self.x.strides)
            return _rebuild_tensor_v2, (Kept(self), 0, self.x.shape, strides, False, collections.OrderedDict())

    class Kept:
        def __init__(self, of):
            self.of = of

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", storage, obj.of.key, "cpu", obj.of.x.size) if isinstance(obj, Kept) else None

    with zipfile.ZipFile(path, "w") as file:
        data = io.BytesIO()
        Pickler(data, 2).dump({name: Numbers(str(key), x) for key, (name, x) in enumerate(tensors.items())})
        file.writestr("archive/data.pkl", data.getvalue())
        for key, x in enumerate(tensors.values()):
            file.writestr(f"archive/data/{key}", np.ascontiguousarray(x).tobytes())


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
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps",
}  # fmt: skip


def write_gguf(path, folder=GOLDENS / "llama"):
    """A golden of the Llama family as llama.cpp's converter writes it.

    Llama's and Mixtral's query and key rows of a head have pairs side by side; the experts of a layer are one tensor;
    Llama 3's scaling is a tensor of what its frequencies are divided by.
    """
    import gguf

    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"] if config["model_type"].startswith("qwen") else "llama"
    heads, rope = config["num_attention_heads"], config["rope_parameters"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(width)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    if config.get("num_local_experts"):
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", np.float32(llama3_divisors(rope, width)))
    experts = {}
    for name, x in load_file(folder / "model.safetensors").items():
        base, _, end = name.rpartition(".")
        block = ""
        if "layers." in base:
            number, _, base = base.split("layers.")[1].partition(".")
            block = f"blk.{number}."
        if "_proj" in base and kind == "llama" and base.split(".")[-1] in ("q_proj", "k_proj"):
            x = x.reshape(-1, 2, width // 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
        if ".experts." in base:
            *_, expert, base = base.split(".")
            experts.setdefault(f"{block}{GGUF_NAMES[base]}.{end}", {})[int(expert)] = x
        else:
            writer.add_tensor(f"{block}{GGUF_NAMES[base]}.{end}", x)
    for name, each in experts.items():
        writer.add_tensor(name, np.stack([each[e] for e in range(len(each))]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_divisors(rope, width):
    """1 for short waves, the factor for long ones, and between them what interpolates the frequencies."""
    wave = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    share = np.clip((rope["original_max_position_embeddings"] / wave - low) / (high - low), 0, 1)
    return 1 / ((1 - share) / factor + share)


@pytest.mark.parametrize("name", ["llama", "llama-linear", "llama-llama3", "mixtral", "qwen2", "qwen3"])
def test_gguf_is_the_same_model(tmp_path, name):
    folder = tmp_path / name
    shutil.copytree(GOLDENS / name, folder)
    if name == "llama-llama3":  # heads of eight have short, middle and long waves at a published original context
        config = json.loads((folder / "config.json").read_text())
        config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        config["rope_parameters"] |= {"rope_theta": 5e5, "original_max_position_embeddings": 8192}
        (folder / "config.json").write_text(json.dumps(config))
    imported, _, params = read(write_gguf(tmp_path / "model.gguf", folder))
    same, _, expected = read(folder)
    assert imported.spec == same.spec
    assert flat(params).keys() == flat(expected).keys()
    for key, x in flat(expected).items():
        np.testing.assert_array_equal(flat(params)[key], x, err_msg=key)


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
