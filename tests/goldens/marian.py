"""Writes tests/goldens/marian/: a pair of tokenizers as Opus-MT publishes them, and what transformers makes of them.

    pip install torch==2.13.0 transformers==5.24.0 sentencepiece==0.2.3
    python -P tests/goldens/marian.py

The folder holds source.spm, target.spm, vocab.json and tokenizer_config.json; marian.json beside it has texts, their
ids as sources and as targets, and what transformers writes with tests/goldens/weights/marian, whose ids these are.
"""

import io
import json
import lzma
import pathlib

import sentencepiece
import torch
import transformers as hf

HERE = pathlib.Path(__file__).parent
MADE = HERE / "marian"
MODEL = HERE / "weights" / "marian"
CORPUS = HERE.parent.parent / "llm/data/corpora/austen/northanger_abbey.txt.xz"
GERMAN = [
    "Es ist eine allgemein anerkannte Wahrheit, dass ein alleinstehender Mann eine Frau braucht.",
    "Der schnelle braune Fuchs springt \u00fcber den faulen Hund; die Gr\u00f6\u00dfe z\u00e4hlt nicht.",
    "Speichern Sie die Datei, bevor Sie den Rechner ausschalten! Wollen Sie wirklich beenden?",
    "Wir haben das Haus gesehen, in dem sie wohnte, und die Stra\u00dfe, die zum Fluss f\u00fchrt.",
]
TEXTS = [
    "It is a truth universally acknowledged", "Save the file?", "  two  spaces and a tail ", "",
    "caf\u00e9 \u6f22\u5b57 \ufb01n", "die Gr\u00f6\u00dfe der Datei", ">>deu<< Save the file.", ">>xyz<< Save",
    ">> no code",
]  # fmt: skip


def trained(lines: list[str], rule: str) -> bytes:
    """A small SentencePiece model with Marian's settings."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=made, model_type="unigram", vocab_size=165, num_threads=1,
        hard_vocab_limit=False, minloglevel=2, normalization_rule_name=rule,
    )  # fmt: skip
    return made.getvalue()


def main() -> None:
    """Writes all."""
    english = lzma.open(CORPUS, "rt", encoding="utf-8").read()[:60_000].split("\n")
    MADE.mkdir(exist_ok=True)
    pieces: set[str] = set()
    english = [line for line in english if line.strip()]
    # Both have nmt_nfkc where they are published; its table, 240 kB, is here once.
    for name, lines, rule in (("source", english, "nmt_nfkc"), ("target", GERMAN * 50, "identity")):
        data = trained(lines, rule)
        (MADE / f"{name}.spm").write_bytes(data)
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        pieces |= {model.id_to_piece(i) for i in range(3, model.get_piece_size())}  # after <unk>, <s>, </s>
    entries = [*sorted(pieces), ">>deu<<"]
    entries += [f">>x{n}<<" for n in range(len(entries), 256)]
    vocab = {piece: i for i, piece in enumerate(entries)}
    assert len(vocab) == 256
    vocab |= {"</s>": 256, "<unk>": 257, "<pad>": 258}  # as the model has them
    (MADE / "vocab.json").write_text(json.dumps(vocab))
    (MADE / "tokenizer_config.json").write_text('{"source_lang": "en", "target_lang": "de", "model_max_length": 512}\n')

    tokenizer = hf.MarianTokenizer.from_pretrained(MADE)
    sources = [tokenizer(text).input_ids[:-1] for text in TEXTS]
    targets = [tokenizer(text_target=text).input_ids[:-1] for text in TEXTS]
    model = hf.MarianMTModel.from_pretrained(MODEL).eval()
    written = []
    for text in TEXTS:
        with torch.no_grad():
            (ids,) = model.generate(
                **tokenizer(text, return_tensors="pt"), num_beams=1, do_sample=False, max_new_tokens=12,
                bad_words_ids=[[258]], forced_eos_token_id=None,
            ).tolist()  # fmt: skip
        written.append(tokenizer.decode(ids, skip_special_tokens=True))
    made = {"texts": TEXTS, "sources": sources, "targets": targets, "written": written}
    made["decoded"] = [tokenizer.decode(row) for row in targets]
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in made.items())
    (HERE / "marian.json").write_text(f"{{\n{rows}\n}}\n")


if __name__ == "__main__":
    main()
