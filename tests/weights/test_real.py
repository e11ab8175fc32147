"""Published weights do what they are published to do. `python -m tests.weights.fetch` brings them."""

import json
import pathlib
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.generation import SamplingSpec, generate
from llm.models import EncDecSpec, RNNSpec, build
from llm.tokenization.loading import tokenizer_from
from llm.weights.layout import Row, Table, linear, load, norm
from llm.weights.sources import Tensor
from llm.weights.torch_pickle import TorchFile
from tests.helpers import ROOT, assert_refused, verb
from tests.weights.checkpoints import read
from tests.weights.fetch import place

pytestmark = pytest.mark.long


def weights_of(name: str) -> pathlib.Path:
    path = place(name)
    if not path.exists():
        pytest.skip(f"{path} is not here: run python -m tests.weights.fetch")
    return path


def params_of(table: Table, tensors: dict[str, np.ndarray], model, *batch):
    """The parameters of a model from arrays of other names."""
    import flax.linen as nn
    import flax.traverse_util

    def touch(module, batch):
        return module.unembed(module(batch).hidden_BTD)

    shapes = jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), *batch, method=touch)["params"]))
    flat = {name: x.shape for name, x in flax.traverse_util.flatten_dict(shapes, sep="/").items()}
    given = {name: Tensor(x.shape, lambda x=x: x) for name, x in tensors.items()}
    arrays = load(table, given, flat).arrays
    return jax.tree.map(jnp.asarray, flax.traverse_util.unflatten_dict(dict(arrays), sep="/"))


def test_smollm2_knows_the_capital_of_france(tmp_path):
    """76 tokens, which open Pride and Prejudice, lines joined; an independent forward pass in numpy gave 29.94."""
    run = tmp_path / "run"
    result = verb("convert", f"--from={weights_of('smollm2')}", f"--workdir={run}", JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    assert result.returncode == 0, result.stderr
    assert "134,515,008 in 272 tensors" in result.stdout
    assert "writes      ' Paris." in result.stdout, result.stdout
    perplexity, tokens = re.search(r"perplexity +([\d.]+) of a paragraph of (\d+)", result.stdout).groups()  # pyright: ignore
    assert int(tokens) == 75 and abs(float(perplexity) - 29.94) < 0.02
    assert json.loads((run / "config.json").read_text())["model"]["kv_heads"] == 3
    # In context and packed, each of which README has by itself.
    shots = f"--few-shot={ROOT / 'experiments' / 'capitals.jsonl'}", "--prompt=Japan", "--weights=int8"
    how = f"--workdir={run}", "--temperature=0", "--max-tokens=8"
    result = verb("generate", *how, *shots, JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    assert result.returncode == 0 and result.stdout.strip() == "Tokyo", (result.stdout, result.stderr)
    assert "MB in place of 538" in result.stderr, result.stderr


def test_minilm_gives_the_similarities_of_its_card(tmp_path):
    path = weights_of("minilm")
    run = tmp_path / "run"
    result = verb("convert", f"--from={path}", f"--workdir={run}")
    assert result.returncode == 0 and "left out    bert.pooler.dense.bias" in result.stdout, result.stderr
    assert_refused(verb("generate", f"--workdir={run}", "--prompt=x"), "writes nothing")
    imported, model, params = read(path)
    assert imported.objective == "contrastive"
    tokenizer = tokenizer_from(path)
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    rows = [[tokenizer.cls, *ids, tokenizer.sep] for ids in tokenizer.encode_batch(texts)]
    tokens, segments = np.zeros((2, 3, max(map(len, rows))), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)], segments[number, : len(row)] = row, 1
    batch = {"tokens": jnp.asarray(tokens), "segments": jnp.asarray(segments)}
    hidden = model.apply({"params": params}, batch).hidden_BTD
    vectors = np.asarray(model.apply({"params": params}, hidden, batch, method="sentence"))
    found = vectors @ vectors.T
    np.testing.assert_allclose([found[0, 1], found[0, 2], found[1, 2]], [0.6660, 0.1046, 0.1411], atol=1e-4)


# An amine and an acid make an amide: the example of the package's own page.
REACTION = (
    "Nc1cccc2cnccc12.O=C(O)c1cc([N+](=O)[O-])c(Sc2c(Cl)cncc2Cl)s1>>"
    "O=C(Nc1cccc2cnccc12)c1cc([N+](=O)[O-])c(Sc2c(Cl)cncc2Cl)s1"
)
_SMILES = re.compile(
    r"(\%\([0-9]{3}\)|\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\||\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$"
    r"|\%[0-9]{2}|[0-9])"
)


def test_the_bert_of_reactions_fills_masks():
    path = weights_of("rxnfp")
    imported, model, params = read(path)
    assert imported.objective == "masked"
    vocabulary = {token: i for i, token in enumerate((path / "vocab.txt").read_text().split("\n"))}
    row = [vocabulary[t] for t in ("[CLS]", *_SMILES.findall(REACTION), "[SEP]")]
    places = np.arange(1, len(row) - 1)
    tokens = np.tile(np.asarray(row, np.int32), (len(places), 1))
    tokens[np.arange(len(places)), places] = vocabulary["[MASK]"]
    hidden = model.apply({"params": params}, {"tokens": jnp.asarray(tokens)}).hidden_BTD
    at_mask = hidden[jnp.arange(len(places)), places]
    filled = np.asarray(model.apply({"params": params}, at_mask, method="unembed")).argmax(-1)
    right = int((filled == np.asarray(row)[places]).sum())
    assert (right, len(places)) == (98, 103)


def annalog_table() -> Table:
    """The names of a Transformer that is written after a well-known tutorial: tables and places for each side."""

    def side(name: str) -> list[Row]:
        layer, ours = f"{name}.layers.{{i}}", f"{name}/layers"
        rows = []
        for theirs, mine in [("self", "attention")] + [("encoder", "cross_attention")] * (name == "decoder"):
            for one, other in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
                rows += linear(
                    f"{layer}.{theirs}_attention.fc_{one}", f"{ours}/{mine}/{other}", inputs=1 + (one == "o")
                )
            rows += norm(f"{layer}.{'self' if theirs == 'self' else 'enc'}_attn_layer_norm", f"{ours}/{mine}_norm")
        return [
            *rows,
            *linear(f"{layer}.positionwise_feedforward.fc_1", f"{ours}/mlp/up"),
            *linear(f"{layer}.positionwise_feedforward.fc_2", f"{ours}/mlp/down"),
            *norm(f"{layer}.ff_layer_norm", f"{ours}/mlp_norm"),
        ]

    return Table([
        Row("encoder.tok_embedding.weight", ("embed_source/table",)),
        Row("encoder.pos_embedding.weight", ("embed_source_position/table",)),
        Row("decoder.tok_embedding.weight", ("embed/table",)),
        Row("decoder.pos_embedding.weight", ("embed_position/table",)),
        *side("encoder"),
        *side("decoder"),
        Row("decoder.fc_out.weight", ("unembedding_projection/kernel",), transposed=True),
        Row("decoder.fc_out.bias", ("logit_bias",), inputs=None),
    ])  # fmt: skip


class _Plain(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"{module}.{name}")


def test_the_encoder_decoder_of_molecules_copies_aspirin_and_caffeine():
    folder = weights_of("annalog")
    with (folder / "stereo_experiment_vocab_ttf.pkl").open("rb") as file:
        entries = _Plain(file).load()["itos"]
    file = TorchFile(folder / "Lev_extended.pt")
    spec = EncDecSpec(
        vocab_size=len(entries), layers=3, width=256, heads=8, ff_width=512, position="learned", context=102,
        norm_epsilon=1e-5, shared=False, tied=False, logit_bias=True,
    )  # fmt: skip
    model = build(spec)
    ones = jnp.ones((1, 1), jnp.int32)
    tensors = {name: file.read(name) for name in file.stored}
    params = params_of(annalog_table(), tensors, model, {"tokens": ones, "source_tokens": ones})
    start, end = entries.index("<sos>"), entries.index("<eos>")
    for molecule in ("CC(=O)Oc1ccccc1C(=O)O", "Cn1c(=O)c2c(ncn2C)n(C)c1=O"):
        ids = [entries.index(token) for token in _SMILES.findall(molecule)]
        written = generate(
            model, params, [[start]], 60, SamplingSpec(0.0), context=102, vocab_size=len(entries), end_of_text=end,
            sources=[[start, *ids, end]],
        )[0]  # fmt: skip
        assert "".join(entries[i] for i in written) == molecule  # and so ended by <eos>, with 60 allowed


VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW"
CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH"
# What g2p-en writes: four marks, then the phonemes in order, vowels with each of three stresses; UW also without.
PHONEMES = ["<pad>", "<unk>", "<s>", "</s>", *sorted(
    [f"{vowel}{stress}" for vowel in VOWELS.split() for stress in "012"] + CONSONANTS.split() + ["UW"]
)]  # fmt: skip


def test_the_gru_of_letters_spells_attention():
    arrays = np.load(weights_of("g2p"))

    def gru(side: str, entries: int):
        model = build(RNNSpec(vocab_size=entries, cell="gru", layers=1, width=256, tied=True))
        cell = "layers/cell/forward"
        table = Table([
            Row(f"{side}_emb", ("embed/table",)),
            Row(f"{side}_w_ih", (f"{cell}_input_kernel",), transposed=True, inputs=2),
            Row(f"{side}_w_hh", (f"{cell}_recurrent_kernel",), transposed=True, inputs=2),
            Row(f"{side}_b_ih", (f"{cell}_input_bias",), inputs=None),
            Row(f"{side}_b_hh", (f"{cell}_recurrent_bias",), inputs=None),
        ])  # fmt: skip
        mine = {name: arrays[name] for name in arrays.files if name.startswith(side)}
        return model, params_of(table, mine, model, {"tokens": jnp.ones((1, 1), jnp.int32)})

    def step(part, token: int, state):
        model, params = part
        output = model.apply({"params": params}, {"tokens": jnp.asarray([[token]])}, cache=state)
        return np.asarray(output.hidden_BTD)[0, 0], output.cache

    encoder, decoder = gru("enc", 29), gru("dec", 74)
    assert len(PHONEMES) == 74
    state = encoder[0].init_cache(1, 0)
    for letter in [*(3 + ord(c) - ord("a") for c in "attention"), 2]:
        _, state = step(encoder, letter, state)
    token, spelt = 2, []
    for _ in range(20):
        hidden, state = step(decoder, token, state)
        token = int((hidden @ arrays["fc_w"].T + arrays["fc_b"]).argmax())
        if token == 3:
            break
        spelt.append(PHONEMES[token])
    assert " ".join(spelt) == "AH0 T EH1 N SH AH0 N"
