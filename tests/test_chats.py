"""Conversations and preferences from files to answers, launched as a user launches them, and their arithmetic.

Bit-equality here: one CPU device, float32, jitted, same batch shape; dropout on in the chats.
"""

import json
import math
import shutil
import subprocess

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llm import config
from llm.data import DataSpec, ObjectiveSpec, open_prepared
from llm.data.conversations import answers
from llm.data.preparation import prepare, specials
from llm.data.sources import read_all
from llm.errors import InputError
from llm.evaluation import preferences
from llm.models import build
from llm.models.gpt import GPTSpec
from llm.tokenization import Tokenizer, TokenizerSpec
from llm.tokenization.training import train as train_tokenizer
from llm.training import losses
from tests.chats import TEMPLATE
from tests.helpers import ROOT, assert_refused, assert_refused_last, command, environment, verb
from tests.quick import quick

WHO = [("user", "Who are you?"), ("assistant", "A little model."), ("user", "Of what?"), ("assistant", "Of text.")]
EMMA = [("user", "Who wrote Emma?"), ("assistant", "Jane Austen did."), ("user", "When?"), ("assistant", "In 1815.")]
PAIR = {"prompt": "Who are you?", "chosen": "Of text.", "rejected": "A little model."}


def messages(turns) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def flags(variant, workdir, train, held, *overrides):
    settings = [f"data.train={train}", f"data.validation={held}", *overrides]
    return [f"--config=tests/chats.py:{variant}", f"--workdir={workdir}", *(f"--config.{s}" for s in settings)]


def arrays(workdir, step):
    state = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")["params"]
    return jax.tree.map(np.asarray, state)


def resumed(folder, copy, variant, step, arguments):
    """Takes the last checkpoint from a copy of a finished run, and runs its command again."""
    shutil.copytree(folder, copy)
    (copy / "summary.json").unlink()
    last = max(int(path.name) for path in (copy / "checkpoints").iterdir() if path.name.isdigit())
    shutil.rmtree(copy / "checkpoints" / str(last))
    result = verb("train", *flags(variant, copy, *arguments))
    assert result.returncode == 0 and f"resuming at step {step}" in result.stdout, result.stderr
    jax.tree.map(np.testing.assert_array_equal, arrays(copy, last), arrays(folder, last))
    old, new = (json.loads((path / "summary.json").read_text())["validation"] for path in (folder, copy))
    assert old == new


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    train = write(folder / "train.jsonl", {"messages": messages(WHO)}, {"messages": messages(EMMA)})
    return train, write(folder / "held.jsonl", {"messages": messages(WHO[:2])})


@pytest.fixture(scope="module")
def talking(files, tmp_path_factory):
    """A run that has learned two dialogues by heart."""
    workdir = tmp_path_factory.mktemp("talking") / "run"
    result = verb("train", *flags("", workdir, *files))
    assert result.returncode == 0 and "exact match" in result.stdout, result.stderr
    return workdir


@pytest.fixture(scope="module")
def preferring(talking, tmp_path_factory):
    """(A run that started from that one and prefers another answer, what it was made of)."""
    folder = tmp_path_factory.mktemp("preferring")
    train = write(
        folder / "train.jsonl", {**PAIR, "rejected": "A little model, text."}, {**PAIR, "prompt": messages(EMMA[:1])}
    )
    held = write(folder / "held.jsonl", PAIR)
    start = (f"training.start_from={talking}", f"tokenizer.path={talking}/tokenizer.json")
    result = verb("train", *flags("preferences", folder / "run", train, held, *start))
    assert result.returncode == 0 and "preference accuracy" in result.stdout, result.stderr
    return folder / "run", (train, held, *start)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_answers_what_it_has_learned(talking):
    said = "Who wrote Emma?\nWhen?\n"
    result = subprocess.run(
        command("generate", f"--workdir={talking}", "--chat", "--temperature=0"), cwd=ROOT, env=environment(),
        input=said, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout == "Jane Austen did.\nIn 1815.\n", (result.stdout, result.stderr)
    # And the other one in the scores of the run.
    (record,) = [json.loads(line) for line in (talking / "validation.jsonl").read_text().splitlines()]
    assert record["answer"] == record["reference"] == "A little model." and record["exact_match"] == 1
    numbers = json.loads((talking / "summary.json").read_text())["validation"]
    tokens = len(Tokenizer.load(talking / "tokenizer.json").encode("A little model.")) + 1
    assert numbers["exact_match"] == 1 and numbers["tokens"] == tokens and "bits_per_byte" not in numbers


@pytest.mark.long
def test_a_resumed_chat_is_the_same(talking, files, tmp_path):
    resumed(talking, tmp_path / "again", "", 30, files)


def test_weights_are_exactly_what_the_assistant_says(talking):
    """Read back from the prepared folder: by text, and by what generation would be given at each answer."""
    prepared = open_prepared(talking, ObjectiveSpec(kind="chat"))
    tokenizer, data = prepared.tokenizer, prepared.train
    batch = data.rows(np.arange(len(data)), 0, np.int64(0))
    seen = []
    for row in range(len(data)):
        for segment in range(1, batch["segments"][row].max() + 1):
            here = batch["segments"][row] == segment
            tokens, targets, weights = (batch[name][row, here] for name in ("tokens", "targets", "weights"))
            assert set(weights) <= {0, 1} and (tokens[1:] == targets[:-1]).all()
            np.testing.assert_array_equal(batch["positions"][row, here], np.arange(here.sum()))
            seen.append(tokenizer.decode(targets[weights == 1]))
            turns = WHO if "model" in seen[-1] else EMMA
            for number, place in enumerate(np.flatnonzero(np.diff(weights, prepend=0) == 1)):
                asked = tokenizer.chat(messages(turns[: 2 * number + 1]))
                assert tokens[: place + 1].tolist() == asked
    assert sorted(seen) == ["A little model.<|end|>Of text.<|end|>", "Jane Austen did.<|end|>In 1815.<|end|>"]
    assert (batch["weights"][batch["segments"] == 0] == 0).all()


@pytest.mark.long
def test_a_preference_turns_round_and_begins_at_log_2(preferring):
    workdir, _ = preferring
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert abs(rows[0]["loss"] - math.log(2)) < 1e-4
    assert max(abs(rows[0][name]) for name in ("margin", "chosen_reward", "rejected_reward")) < 1e-3
    assert rows[-1]["accuracy"] == 1 and rows[-1]["margin"] > 1
    assert any("validation.accuracy" in row for row in rows)
    with np.load(workdir / "reference.npz") as kept:
        ((chosen, rejected),) = kept["validation"]
    (record,) = [json.loads(line) for line in (workdir / "validation.jsonl").read_text().splitlines()]
    # A reward is beta = 0.1 times what was added to the log-probability.
    assert chosen < rejected
    assert chosen + record["chosen_reward"] / 0.1 > rejected + record["rejected_reward"] / 0.1


@pytest.mark.long
def test_a_resumed_preference_is_the_same_and_needs_its_reference(preferring, tmp_path):
    workdir, arguments = preferring
    resumed(workdir, tmp_path / "again", "preferences", 6, arguments)
    scored = verb("evaluate", f"--workdir={tmp_path / 'again'}")
    assert scored.returncode == 0, scored.stderr
    found, old = (json.loads((tmp_path / "again" / name).read_text()) for name in ("evaluation.json", "summary.json"))
    np.testing.assert_allclose(found["validation"]["margin"], old["validation"]["margin"], rtol=1e-4)
    (tmp_path / "again" / "reference.npz").unlink()
    gone = verb("train", *flags("preferences", tmp_path / "again", *arguments))
    assert_refused_last(gone, "reference.npz is missing")


@pytest.mark.long
def test_adapters_learn_a_preference_from_the_same_beginning(preferring, tmp_path):
    _, (train, held, *start) = preferring
    settings = (*start, "training.lora_rank=2", "training.steps=6", "optimizer.learning_rate=0.02")
    result = verb("train", *flags("preferences", tmp_path / "run", train, held, *settings))
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert abs(rows[0]["loss"] - math.log(2)) < 1e-4 and rows[-1]["margin"] > rows[0]["margin"] + 0.1


# --- arithmetic -------------------------------------------------------------------------------------------------------


def oracle(policy, reference, beta, smoothing):
    """The loss of each pair in float64, from the definition of the logistic function."""
    margin = beta * ((policy[:, 0] - reference[:, 0]) - (policy[:, 1] - reference[:, 1]))
    sigmoid = 1 / (1 + np.exp(-margin))
    return -(1 - smoothing) * np.log(sigmoid) - smoothing * np.log(1 - sigmoid)


def test_scores_of_pairs_by_hand():
    found, reference = np.array([[-1.0, -9.0], [-4.0, -2.0], [-3.0, -8.0]]), np.array([[-2.0, -4.0]] * 3)
    scores = preferences.scores(found, reference, 0.5)
    margins = 0.5 * np.array([1 + 5, -2 - 2, -1 + 4])  # what each answer has gained, chosen less rejected
    assert scores["margin"] == pytest.approx(margins.mean()) and scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["loss"] == pytest.approx(np.log(1 + np.exp(-margins)).mean()) and scores["examples"] == 3
    rewards = scores["chosen_reward"], scores["rejected_reward"]
    assert rewards == pytest.approx((0.5 * (1 - 2 - 1) / 3, 0.5 * (-5 + 2 - 4) / 3))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_and_its_gradient(smoothing):
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(size=(2, 5, 2)) * 8
    found = losses.preference_terms(jnp.float32(policy), jnp.float32(reference), 0.3, smoothing)
    np.testing.assert_allclose(found["loss"], oracle(policy, reference, 0.3, smoothing), rtol=2e-5)
    gradient = jax.grad(lambda p: losses.preference_terms(p, jnp.float32(reference), 0.3, smoothing)["loss"].sum())(
        jnp.float32(policy)
    )
    for place in np.ndindex(policy.shape):
        step = np.zeros_like(policy)
        step[place] = 1e-5
        sides = [oracle(policy + side * step, reference, 0.3, smoothing).sum() for side in (1, -1)]
        np.testing.assert_allclose(gradient[place], (sides[0] - sides[1]) / 2e-5, rtol=1e-3, atol=1e-5)
    same = losses.preference_terms(jnp.float32(policy), jnp.float32(policy), 0.3, smoothing)
    np.testing.assert_allclose(same["loss"], math.log(2), rtol=1e-6)
    assert not np.asarray(same["margin"]).any() and not np.asarray(same["accuracy"]).any()


def test_pairs_in_a_row_are_two_texts_and_parts_of_a_batch_add_up():
    """Log-probabilities by running each answer by itself, in float64 from the model's logits."""
    from llm.data.examples import preference

    model = build(GPTSpec(vocab_size=23, context=32, layers=1, width=16, heads=2, attention="reference"))
    tokenizer = train_tokenizer(TokenizerSpec(kind="bytes"), ["a"])
    rng = np.random.default_rng(1)
    pairs = [[rng.integers(1, 23, n) for n in sizes] for sizes in ((3, 2, 4), (1, 1, 1), (5, 3, 1), (2, 6, 2))]
    batch = preference(pairs, None, 24, ObjectiveSpec(), specials(tokenizer), [])
    reference = rng.normal(size=(4, 2)).astype(np.float32)
    batch |= {"reference": reference}
    touch = losses.OBJECTIVES["preference"].touch
    params = quick(lambda: nn.unbox(model.init(jax.random.key(0), method=lambda m: touch(m, batch))["params"]))()
    params = jax.tree.map(lambda x: 5 * x, params)

    @quick
    def logits(tokens, segments):
        hidden = model.apply({"params": params}, {"tokens": tokens, "segments": segments}).hidden_BTD
        return model.apply({"params": params}, hidden, method="unembed")[0]

    def alone(prompt, answer):
        ids = np.concatenate([prompt, answer])
        real = len(ids) - 1
        tokens, segments = (np.pad(x, (0, 9 - real))[None] for x in (ids[:-1], np.ones(real, np.int32)))
        found = np.float64(logits(tokens, segments))[:real]
        nats = np.log(np.exp(found).sum(-1)) - found[np.arange(real), ids[1:]]
        return -nats[len(prompt) - 1 :].sum()

    wanted = np.array([[alone(prompt, answer) for answer in both] for prompt, *both in pairs])
    for chunk in (None, 7):
        found = quick(losses.pair_log_probabilities(model, chunk))(params, batch)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    settings = losses.Settings(7, smoothing=0.1, beta=0.5)
    loss = quick(losses.sums(model, "preference", settings))
    whole = loss(params, batch)
    np.testing.assert_allclose(whole["loss"][0], oracle(wanted, reference, 0.5, 0.1).sum(), rtol=1e-4)
    assert whole["loss"][1] == whole["margin"][1] == 4
    # The z-loss is a mean over the answers' tokens, and counts once a pair.
    beside = quick(losses.sums(model, "preference", settings._replace(z_loss=0.1)))(params, batch)
    plain = quick(losses.sums(model, "chat", losses.Settings(7, z_loss=0.1)))(params, batch)["z_loss"]
    np.testing.assert_allclose(beside["loss"][0] - whole["loss"][0], 4 * plain[0] / plain[1], rtol=1e-3)
    # A row of zeros fills up a batch, and weighs nothing.
    halves = [{name: np.concatenate([x[at : at + 2], 0 * x[:2]]) for name, x in batch.items()} for at in (0, 2)]
    parts = [loss(params, half) for half in halves]
    for name, pair in whole.items():
        for number in (0, 1):
            np.testing.assert_allclose(sum(p[name][number] for p in parts), pair[number], rtol=1e-5, atol=1e-5)


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    text = "user assistant\n\n  Jane Austen wrote it .  \n\n" * 9
    spec = TokenizerSpec(vocab_size=290, special_tokens=("<|turn|>", "<|end|>"), chat_template=TEMPLATE)
    return train_tokenizer(spec, [text])


@pytest.mark.parametrize("answer", [" it", "\n\nit .\n", "<|end|>", "it<|turn|>user", ": it"], ids=ascii)
def test_no_token_spans_the_border_of_an_answer(tokenizer, answer):
    turns = messages([("user", "Jane"), ("assistant", answer), ("user", "it"), ("assistant", answer)])
    ids, learned = tokenizer.chat_answers(turns)
    assert ids == tokenizer.chat(turns, add_generation_prompt=False)[: len(ids)]
    for asked in (tokenizer.chat(turns[:1]), tokenizer.chat(turns[:3])):
        assert ids[: len(asked)] == asked and learned[len(asked)] and not learned[len(asked) - 1]
    end = tokenizer.end_of_turn
    assert [i for i, x in zip(ids, learned) if x] == 2 * [*tokenizer.encode(answer), end]


def test_templates_that_cannot_be_learned_from_are_refused(tokenizer):
    turns = messages(WHO)
    endless = tokenizer.with_chat_template("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    with pytest.raises(InputError, match="ends an answer by no special token"):
        endless.chat_answers(turns)
    hiding = tokenizer.with_chat_template(
        "{% for m in messages %}<|turn|>{{ m.content if loop.last or m.role == 'user' else '-' }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}{{ messages | length }}<|turn|>{% endif %}"
    )
    with pytest.raises(InputError, match="ends an answer by no special token|before answer 0 otherwise"):
        hiding.chat_answers(turns)
    assert tokenizer.ids_fingerprint == hiding.ids_fingerprint == endless.ids_fingerprint
    assert len({t.fingerprint for t in (tokenizer, hiding, endless)}) == 3


def test_long_conversations_are_cut_or_dropped_and_counted(tmp_path):
    """Rows hold 60 places: the first dialogue keeps one answer, the next is dropped, the last fits."""
    loaded = config.load("tests/chats.py")
    texts = [WHO, [("user", "a" * 60), ("assistant", "b")], [("user", "Hi"), ("assistant", "Yo")]]
    path = write(tmp_path / "train.jsonl", *({"messages": messages(turns)} for turns in texts))
    held = write(tmp_path / "held.jsonl", {"messages": messages(EMMA[:2])})
    settings = {"data.train": path, "data.validation": held, "data.row_length": 60, "tokenizer.kind": "bytes"}
    spec = config.resolve(config.override(loaded, [(name, str(value)) for name, value in settings.items()]))
    prepared = prepare(spec.preparation, tmp_path, lambda _: None, quiet=True)
    assert prepared is not None
    (stage,) = [stage for stage in prepared.report["stages"] if stage["stage"] == "conversations"]
    assert stage["changed"]["cut to the answers that fit a row"][0] == 1
    assert stage["dropped"]["longer than a row"][0] == 1 and stage["documents_out"] == 3
    shards, decode = prepared.train.shards, prepared.tokenizer.decode
    said = [[decode(answer) for _, answer in answers(shards, n)] for n in range(len(shards))]
    assert said == [["A little model."], ["Yo"]]


# --- bad input --------------------------------------------------------------------------------------------------------

CHATS = [
    ({"messages": [{"role": "bot", "content": "x"}]}, "messages, message 0: the role 'bot' is unknown"),
    ({"messages": messages([("user", "x")])}, "no turn is the assistant's"),
    ({"messages": messages([("user", " "), ("assistant", "y")])}, "message 0 (user): its content is ' '"),
    ({"messages": messages([("assistant", "y")])}, "the assistant answers before a user has spoken"),
    ({"messages": "x"}, "messages is 'x', expected a list"),
    ({"messages": []}, "messages is [], expected a list"),
    ({"messages": ["x"]}, "message 0 is 'x', expected an object"),
    ({"text": "x"}, "there is no 'messages', only 'text'"),
    ("{", "not JSON"),
    ({"messages": messages([("user", "\ud800"), ("assistant", "y")])}, "lone surrogate U+D800"),
]
PREFERENCES = [
    ({**PAIR, "chosen": ""}, "chosen is '', expected a text that is not empty"),
    ({**PAIR, "rejected": PAIR["chosen"] + " "}, "chosen and rejected are one text"),
    ({**PAIR, "prompt": messages(WHO[:2])}, "its last turn is the assistant's"),
    ({"prompt": "x"}, "there is no 'chosen'"),
    ({**PAIR, "prompt": 3}, "prompt is 3, expected a list of messages"),
]


def test_bad_records_are_named_by_file_and_line(tmp_path):
    for form, packing, good, cases in (
        ("chat", "best_fit", {"messages": messages(WHO)}, CHATS), ("preference", "whole", PAIR, PREFERENCES)
    ):  # fmt: skip
        for number, (record, said) in enumerate(cases):
            path = write(tmp_path / f"{form}{number}.jsonl", good, record)
            with pytest.raises(InputError) as refused:
                read_all(DataSpec(form=form, packing=packing), str(path))
            assert str(refused.value).startswith(f"{path}:2: ") and said in str(refused.value), refused.value


def test_refusals_are_one_line_before_anything_is_trained(files, tmp_path):
    path = write(tmp_path / "bad.jsonl", {"messages": messages(WHO)}, CHATS[0][0])
    assert_refused(verb("prepare", *flags("", tmp_path / "a", path, files[1])), f"{path}:2: ", "the role 'bot'")
    twice = write(tmp_path / "twice.jsonl", {"messages": messages([("user", "a"), *WHO])})
    result = verb("prepare", *flags("", tmp_path / "b", twice, files[1]))
    assert_refused_last(result, f"{twice}:1: the chat template refuses the conversation: two users in a row")


SETTINGS = [
    ({"data.packing": "concatenate"}, "data.form='chat' keeps conversations whole; set 'best_fit'"),
    ({"data.label": "x"}, "data.label='x': data.form='chat' does not read it"),
    ({"data.form": "texts"}, "data.form='texts': there are text, chat, preference"),
    ({"training.preference_beta": "0"}, "training.preference_beta=0.0: must be above 0"),
    ({"objective.kind": "preference"}, "name it in training.start_from"),
]


def test_settings_that_do_not_fit_are_refused(tmp_path):
    for changes, said in SETTINGS:
        with pytest.raises(InputError) as refused:
            config.resolve(config.override(config.load("tests/chats.py"), list(changes.items())))
        assert said in str(refused.value)
    for changes, said in (
        ({"objective.kind": "causal"}, "objective.kind='causal' learns from data.form='text', the data are of 'chat'"),
        ({"tokenizer.chat_template": ""}, "the tokenizer has no chat template"),
        ({"tokenizer.chat_template": "{{ messages[0].content }}"}, "ends an answer by no special token"),
        ({"dedup.document_lines": "true"}, "dedup.document_lines: messages of data.form='chat' are kept whole"),
    ):
        loaded = config.override(config.load("tests/chats.py"), list(changes.items()))
        with pytest.raises(InputError) as refused:
            prepare(config.resolve(loaded).preparation, tmp_path)
        assert said in str(refused.value)
