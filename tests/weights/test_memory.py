"""What an import and an export need of memory: little more than the largest parameter, not the whole."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm.tokenization import Tokenizer, TokenizerSpec, train
from tests.helpers import ROOT, environment
from tests.weights.checkpoints import GOLDENS

# Converts a small checkpoint, so that all is loaded, then the large one; the bytes that this one added to the peak.
SCRIPT = """
import pathlib, resource, sys
from llm import convert
from llm.run_folder import open_run

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

small, large = [arguments.split(",") for arguments in sys.argv[2:]]
verb = {"in": convert.take_in, "out": lambda run, to: convert.write(open_run(run, values=False), pathlib.Path(to))}
verb[sys.argv[1]](*small)
before = peak()
verb[sys.argv[1]](*large)
print(peak() - before)
"""
WIDTH, LAYERS, FF_WIDTH = 512, 8, 2048


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A Llama of 134 MB, whose largest parameters, three of them, have 34."""
    folder = tmp_path_factory.mktemp("large")
    said = json.loads((GOLDENS / "llama" / "config.json").read_text())
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "intermediate_size": FF_WIDTH, "head_dim": WIDTH // 4}
    (folder / "config.json").write_text(json.dumps(said | sizes))
    width = {16: WIDTH, 8: WIDTH // 2, 24: FF_WIDTH}
    rng, tensors = np.random.default_rng(0), {}
    for name, x in load_file(GOLDENS / "llama" / "model.safetensors").items():
        shape = [width.get(n, n) for n in x.shape]
        for i in range(LAYERS) if "layers.0." in name else [0] * ("layers" not in name):
            tensors[name.replace("layers.0.", f"layers.{i}.")] = rng.standard_normal(shape, np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


def added(*arguments) -> int:
    """The bytes that the large conversion needs beyond the small one."""
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1])


def test_a_conversion_needs_the_memory_of_one_parameter(large, tmp_path):
    """Reading and writing one takes its memory two or three times; the whole has four times that of one."""
    tokenizer, largest = tmp_path / "tokenizer.json", 4 * LAYERS * WIDTH * FF_WIDTH
    made = train(TokenizerSpec(kind="bytes", special_tokens=("<a>",)), [])
    made.save(tokenizer)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "<a>"}')
    runs, folders = [tmp_path / "small", tmp_path / "large"], [tmp_path / "small-out", tmp_path / "large-out"]
    sources = [GOLDENS / "llama", large]
    read = added("in", *(f"{source},{run},{tokenizer}" for source, run in zip(sources, runs)))
    written = added("out", *(f"{run},{folder}" for run, folder in zip(runs, folders)))
    assert max(read, written) < 2.5 * largest, (read, written, largest)
    assert Tokenizer.load(runs[0] / "tokenizer.json").opens == made.special_tokens["<a>"]  # before each document
    again = load_file(folders[1] / "model.safetensors")
    for name, x in load_file(large / "model.safetensors").items():
        np.testing.assert_array_equal(again[name], x, err_msg=name)
