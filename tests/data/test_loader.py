"""Batches as a function of seed and step: epochs, hosts, buckets, mixtures, prefetching."""

import dataclasses
import threading

import numpy as np
import pytest

from llm.data import objectives, pack
from llm.data.loader import Dataset, batch_at, bucket_plan, prefetch, sequential
from llm.data.mixture import BLOCK, Mixture, block_counts, interleaved
from llm.data.objectives import Specials
from llm.data.spec import ObjectiveSpec
from llm.errors import InputError
from tests.data.test_pack import shards

SPECIALS = Specials(vocab_size=200, end_of_text=0, pad=1, cls=2, sep=3, mask=4, bos=5, sentinels=(199, 198, 197, 196))


def packed(folder, rows=11, kind="causal", first=10, row_length=4):
    """`rows` full rows; the second token of a row is the number of its document plus `first`."""
    documents = [[first + n] + [9] * (row_length - 2) for n in range(rows)]
    found = shards(folder, documents, vocab_size=200, parts=2)
    path = folder / "rows.npz"
    pack.concatenate(found.lengths()[:, 0], row_length).save(path)
    return Dataset.open(found, path, ObjectiveSpec(kind=kind), SPECIALS, row_length=row_length)


def examples(folder, lengths, buckets=(8, 16, 32), **objective):
    """Unpacked examples of these lengths for classification; example n consists of id 10 + n."""
    found = shards(folder, [[10 + n] * length for n, length in enumerate(lengths)], vocab_size=200, labels=("label",))
    spec = ObjectiveSpec(kind="classification", **objective)
    return Dataset.open(found, None, spec, SPECIALS, row_length=buckets[-1], buckets=buckets, classes=len(lengths))


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def joined(parts):
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def test_batches_are_a_function_of_seed_and_step_and_drop_nothing(tmp_path):
    data = packed(tmp_path)

    def ids(step, **how):
        return (batch_at(data, how.pop("seed", 0), step, 4, **how)["tokens"][:, 1] - 10).tolist()

    assert len(data) == 11 and data.tokens == 44 and data.text_bytes == 110
    stream = [i for step in range(11) for i in ids(step)]
    for epoch in range(4):  # four epochs of 11 rows in 11 batches of 4
        assert sorted(stream[epoch * 11 : (epoch + 1) * 11]) == list(range(11))
    assert stream[:11] != stream[11:22] != list(range(11))
    assert ids(7) == ids(7) and ids(7) != ids(7, seed=1)


def test_a_token_of_its_own_opens_documents(tmp_path):
    """As models of others want it; the end of text still closes them. Rows of two and a half documents."""
    found = shards(tmp_path, [[10, 11, 12]] * 5, vocab_size=200)
    pack.concatenate(found.lengths()[:, 0], 10).save(tmp_path / "rows.npz")
    specials = dataclasses.replace(SPECIALS, opens=5)
    data = Dataset.open(found, tmp_path / "rows.npz", ObjectiveSpec(kind="causal"), specials, row_length=10)
    batch = data.rows(np.arange(2), 0, np.int64(0))
    assert batch["tokens"].reshape(-1).tolist() == [5, 10, 11, 12] * 5
    assert batch["targets"].reshape(-1).tolist() == [10, 11, 12, 0] * 5
    (row,) = objectives.UNPACKED["causal"]([(np.array([10, 11]),)], None, 4, data.objective, specials, [])["tokens"]
    assert row.tolist()[:3] == [5, 10, 11]


@pytest.mark.parametrize("kind", ["causal", "masked", "span_corruption", "prefix"])
def test_any_number_of_hosts_sees_the_same_global_batch(tmp_path, kind):
    data = packed(tmp_path, kind=kind, row_length=24)
    for step in (0, 7):
        whole = batch_at(data, 5, step, 8)
        for parts in (1, 2, 4):
            assert same(joined([batch_at(data, 5, step, 8, mine) for mine in np.arange(8).reshape(parts, -1)]), whole)
    assert not same(batch_at(data, 5, 0, 8), batch_at(data, 6, 0, 8))
    # A mesh may give a host rows that do not lie side by side.
    assert same(batch_at(data, 5, 7, 8, np.array([1, 2, 6])), {key: x[[1, 2, 6]] for key, x in whole.items()})


def test_random_objectives_differ_by_epoch(tmp_path):
    data = packed(tmp_path, rows=8, kind="masked", row_length=24)
    first, second = ({tuple(r) for r in batch_at(data, 0, step, 8)["tokens"].tolist()} for step in (0, 1))
    assert first != second


def test_sequential_shows_every_row_once_and_fills_up_with_weight_0(tmp_path):
    data = packed(tmp_path)
    batches = list(sequential(data, 4))
    assert [b["tokens"].shape for b in batches] == [(4, 4)] * 3
    kept = np.concatenate([b["tokens"][b["weights"][:, 0] > 0, 1] for b in batches]) - 10
    assert kept.tolist() == list(range(11)) and batches[-1]["weights"][3].sum() == 0
    assert sum(b["weights"].sum() for b in sequential(data, 4, limit=5)) == 20
    masked = packed(tmp_path, kind="masked")
    assert all(same(a, b) for a, b in zip(sequential(masked, 4), sequential(masked, 4)))


LENGTHS = [3, 20, 7, 30, 5, 12, 6, 28, 2, 15, 31, 4, 9]


def test_bucket_plans_show_every_example_once_an_epoch_in_few_shapes(tmp_path):
    data = examples(tmp_path, LENGTHS)
    shapes = set()
    for epoch in range(3):
        seen = []
        for step in range(epoch * 4, epoch * 4 + 4):  # ceil(13 / 4) batches
            batch = batch_at(data, 3, step, 4)
            shapes.add(batch["tokens"].shape)
            real = batch["weights"] > 0
            for row, label in zip(batch["tokens"][real], batch["labels"][real]):
                ids = row[row >= 10]
                assert set(ids.tolist()) == {10 + int(label)}
                # cut to what fits beside [CLS], never short of it
                assert len(ids) == min(LENGTHS[label], batch["tokens"].shape[1] - (row == 2).sum() - (row == 3).sum())
            seen += batch["labels"][real].tolist()
        assert sorted(seen) == list(range(13))
    assert shapes <= {(4, 8), (4, 16), (4, 32)} and len(shapes) >= 2
    one, two = bucket_plan(data, 3, 0, 4), bucket_plan(data, 3, 1, 4)
    assert one.order.tolist() != two.order.tolist()
    for parts in (2, 4):
        for step in range(4):
            assert same(
                joined([batch_at(data, 3, step, 4, mine) for mine in np.arange(4).reshape(parts, -1)]),
                batch_at(data, 3, step, 4),
            )


def test_short_examples_are_padded_no_further_than_their_bucket(tmp_path):
    data = examples(tmp_path, [3] * 8 + [30] * 4)
    widths = [batch_at(data, 0, step, 4)["tokens"].shape[1] for step in range(3)]
    assert sorted(widths) == [8, 8, 32]


def test_augmentation_is_seeded_and_never_in_evaluation(tmp_path):
    found = shards(tmp_path, [list(range(10, 40))] * 4, vocab_size=200, labels=("label",))
    spec = ObjectiveSpec(kind="classification", augment=("swap", "delete"), augment_rate=0.3)
    made = [
        Dataset.open(found, None, spec, SPECIALS, row_length=48, classes=4, training=training)
        for training in (True, False)
    ]
    changed, again, later = batch_at(made[0], 0, 0, 4), batch_at(made[0], 0, 0, 4), batch_at(made[0], 0, 1, 4)
    assert same(changed, again) and not np.array_equal(np.sort(changed["tokens"]), np.sort(later["tokens"]))
    plain = batch_at(made[1], 0, 0, 4)
    ordered = [row[row >= 10].tolist() for row in plain["tokens"]]
    assert ordered == [list(range(10, 40))] * 4
    assert [row[row >= 10].tolist() for row in changed["tokens"]] != ordered
    assert sorted(plain["labels"].tolist()) == sorted(changed["labels"].tolist()) == [0, 1, 2, 3]


def test_a_mixture_draws_in_proportion_at_every_prefix(tmp_path):
    parts = []
    for number, rows in enumerate((11, 7, 5)):
        (tmp_path / str(number)).mkdir()
        parts.append(packed(tmp_path / str(number), rows=rows, first=10 + 50 * number))
    weights = (0.5, 0.3, 0.2)
    mixture = Mixture(parts, weights)
    assert len(mixture) == 23 and mixture.tokens == 92
    stream = np.concatenate([batch_at(mixture, 1, step, 8)["tokens"][:, 1] for step in range(50)])
    owner = (stream - 10) // 50
    for k, weight in enumerate(weights):
        count = np.cumsum(owner == k)
        assert np.abs(count - weight * np.arange(1, 401)).max() <= 1
        # each walks its own epochs
        mine, size = stream[owner == k], len(parts[k])
        for epoch in range(len(mine) // size):
            assert len(set(mine[epoch * size : (epoch + 1) * size].tolist())) == size
    for hosts in (2, 4):
        for step in (0, 9):
            split = joined([batch_at(mixture, 1, step, 8, mine) for mine in np.arange(8).reshape(hosts, -1)])
            assert same(split, batch_at(mixture, 1, step, 8))
    kept = np.concatenate([b["tokens"][b["weights"][:, 0] > 0, 1] for b in sequential(mixture, 4)])
    assert sorted(kept.tolist()) == [*range(10, 21), *range(60, 67), *range(110, 115)]
    # over the border of a block
    far = [batch_at(mixture, 1, BLOCK // 8 + k, 8)["tokens"][:, 1] for k in (-1, 0)]
    assert all(len(f) == 8 for f in far)
    with pytest.raises(InputError, match="rows of one length"):
        (tmp_path / "long").mkdir()
        Mixture([parts[0], packed(tmp_path / "long", row_length=8)], (1, 1))


def test_pairs_of_sentences_do_not_depend_on_hosts(tmp_path):
    found = shards(tmp_path, [[10 + n] * 12 for n in range(16)], vocab_size=200, parts=2)
    spec = ObjectiveSpec(kind="masked", next_sentence=True, mask_rate=0.01)
    data = Dataset.open(found, None, spec, SPECIALS, row_length=24)
    consecutive = []
    for step in range(20):
        whole = batch_at(data, 2, step, 8)
        assert same(joined([batch_at(data, 2, step, 8, mine) for mine in np.arange(8).reshape(4, -1)]), whole)
        for row, label in zip(whole["targets"], whole["labels"]):
            owners = set(row[(row >= 10) & (row < 26)].tolist())
            assert len(owners) <= (1 if label else 2)
        consecutive += whole["labels"].tolist()
    assert 0.3 < np.mean(consecutive) < 0.7


@pytest.mark.parametrize(
    "weights", [(0.5, 0.3, 0.2), (0.5, *[0.01] * 50), (0.7, *[0.03] * 10), (3, 1), (1_000_003, 17, 9), (1,), (1, 1, 1)]
)
def test_every_prefix_of_a_mixture_has_its_shares(weights):
    counts = block_counts(weights)
    assert counts.min() >= 1 and counts.sum() <= BLOCK
    share, owner = counts / counts.sum(), interleaved(counts)
    assert np.bincount(owner, minlength=len(counts)).tolist() == counts.tolist()
    had = np.cumsum(owner[:, None] == np.arange(len(counts)), axis=0)
    wanted = np.arange(1, len(owner) + 1)[:, None] * share
    assert np.abs(had - wanted).max() <= 1 - 1 / max(2 * len(counts) - 2, 1) + 1e-9 or len(counts) == 1
    exact = np.array(weights) / sum(weights)
    # small whole proportions are exact, others rounded to a block; a share too small for that is one row of a block
    assert np.abs(share - exact).max() < (
        1e-12 if sum(weights) <= 3.5 or weights == (3, 1) else (len(weights) + 1) / BLOCK
    )


def test_examples_for_next_tokens_are_not_empty(tmp_path):
    found = shards(tmp_path, [[7, 8, 9], [10]], vocab_size=200)
    data = Dataset.open(found, None, ObjectiveSpec(), SPECIALS, row_length=4)
    (batch,) = sequential(data, 2)
    assert batch["targets"].tolist() == [[7, 8, 9, 0], [10, 0, 0, 0]] and batch["weights"].sum() == 6


def test_pairs_of_sentences_need_two_examples(tmp_path):
    found = shards(tmp_path, [[7, 8, 9]], vocab_size=200)
    with pytest.raises(InputError, match="only one"):
        Dataset.open(found, None, ObjectiveSpec("masked", next_sentence=True), SPECIALS, row_length=8)


def test_answers_need_their_labels(tmp_path):
    """Before a device works: what was prepared without answers, or before windows were numbered, is refused."""
    for labels in ((), ("start", "end")):
        found = shards(tmp_path, [([7], [8, 9])], vocab_size=200, fields=("question", "text"), labels=labels)
        with pytest.raises(InputError, match=f"start, end, window, the data have {', '.join(labels) or 'none'}: "):
            Dataset.open(found, None, ObjectiveSpec("span_qa"), SPECIALS, row_length=8)


def test_what_the_tokenizer_lacks_is_named(tmp_path):
    found = shards(tmp_path, [[7, 8, 9]], vocab_size=200)
    pack.concatenate(np.array([3]), 4).save(tmp_path / "rows.npz")
    bare = Specials(vocab_size=200, end_of_text=0, pad=None, cls=None, sep=None, mask=None, bos=None, sentinels=())
    for kind, name in (("masked", "mask"), ("span_corruption", "sentinels")):
        with pytest.raises(InputError, match=name):
            Dataset.open(found, tmp_path / "rows.npz", ObjectiveSpec(kind=kind), bare, row_length=4)
    with pytest.raises(InputError, match="packing"):
        Dataset.open(found, tmp_path / "rows.npz", ObjectiveSpec(kind="classification"), SPECIALS, row_length=4)


def test_prefetch_keeps_order_passes_errors_on_and_stops():
    assert list(prefetch(lambda n: {"n": n}, range(5))) == [{"n": n} for n in range(5)]

    def fails(n):
        if n == 2:
            raise ValueError("row 2")
        return {"n": n}

    with pytest.raises(ValueError, match="row 2"):
        list(prefetch(fails, range(5)))
    before = threading.active_count()
    stream = prefetch(lambda n: {"n": n}, range(10**9))
    assert next(stream) == {"n": 0}
    stream.close()
    assert threading.active_count() == before
