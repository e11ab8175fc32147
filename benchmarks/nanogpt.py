"""Reruns the peer of the main job: nanoGPT's CPU recipe on the same novels, scored over the whole of Persuasion.

    git clone https://github.com/karpathy/nanoGPT somewhere/nanoGPT
    python -m benchmarks.nanogpt --nanogpt=somewhere/nanoGPT --iterations=3700

Characters, 4 layers, 4 heads, width 128, block 64, batch 12, no dropout, as nanoGPT's README gives it for a CPU. The
text is what llm.data cleans out of the embedded corpus. Writes benchmarks/results/nanogpt-<iterations>.json.
"""

import argparse
import json
import math
import os
import pathlib
import pickle
import subprocess
import sys
import time

import numpy as np

from llm.data import CleanSpec, DataSpec
from llm.data.clean import stages
from llm.data.documents import Document
from llm.data.sources import read_all

BLOCK, HELD_OUT = 64, "persuasion"
RECIPE = {
    "device": "cpu", "compile": False, "dtype": "float32", "eval_iters": 20, "log_interval": 500, "block_size": BLOCK,
    "batch_size": 12, "n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0, "dataset": "austen_char",
    "always_save_checkpoint": True,
}  # fmt: skip


def write_data(folder: pathlib.Path) -> np.ndarray:
    """Writes nanoGPT's train.bin, val.bin and meta.pkl; returns the ids of the validation novel."""
    _, clean = stages(CleanSpec())[0]
    cleaned = [clean(d, lambda *_, **__: None) for d in read_all(DataSpec(), "austen")]
    novels = {d.id: d.text for d in cleaned if isinstance(d, Document)}
    characters = sorted(set("".join(novels.values())))
    index = {c: i for i, c in enumerate(characters)}

    def ids(text):
        return np.array([index[c] for c in text], np.uint16)

    folder.mkdir(parents=True, exist_ok=True)
    validation = ids(novels.pop(HELD_OUT))
    ids("".join(novels.values())).tofile(folder / "train.bin")
    validation.tofile(folder / "val.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": index}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return validation


def bits_per_byte(nanogpt: pathlib.Path, checkpoint: pathlib.Path, ids: np.ndarray) -> float:
    """Bits a byte (the text is ASCII, so a character) over all blocks of the novel, the last one shorter."""
    sys.path.insert(0, str(nanogpt))
    import torch
    from model import GPT, GPTConfig  # pyright: ignore[reportMissingImports]

    saved = torch.load(checkpoint, map_location="cpu", weights_only=False)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, BLOCK):
            x = torch.from_numpy(ids[start : start + BLOCK + 1].astype(np.int64))[None]
            _, loss = model(x[:, :-1], x[:, 1:])
            nats += float(loss) * (x.shape[1] - 1)
    return nats / math.log(2) / len(ids)


def main() -> None:
    """Prepares, trains the peer, scores it and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=pathlib.Path, required=True, help="a clone of nanoGPT")
    parser.add_argument("--iterations", type=int, default=3700)
    flags = parser.parse_args()
    if not (flags.nanogpt / "train.py").is_file():
        parser.error(f"--nanogpt={flags.nanogpt} holds no train.py: clone nanoGPT there")
    validation = write_data(flags.nanogpt / "data" / "austen_char")
    n = flags.iterations
    settings = {**RECIPE, "max_iters": n, "lr_decay_iters": n, "eval_interval": n, "out_dir": "out-austen"}
    command = [
        sys.executable,
        "train.py",
        "config/train_shakespeare_char.py",
        *(f"--{k}={v}" for k, v in settings.items()),
    ]
    began = time.perf_counter()
    subprocess.run(command, cwd=flags.nanogpt, check=True, env={**os.environ, "PYTHONPATH": ""})
    seconds = time.perf_counter() - began
    score = bits_per_byte(flags.nanogpt, flags.nanogpt / "out-austen" / "ckpt.pt", validation)
    result = {"iterations": n, "seconds": round(seconds, 1), "cpus": os.cpu_count(), "bits_per_byte": round(score, 4)}
    path = pathlib.Path(__file__).parent / "results" / f"nanogpt-{n}.json"
    path.write_text(json.dumps(result) + "\n")
    print(result, "->", path.name)


if __name__ == "__main__":
    main()
