import json
from collections import Counter
from itertools import combinations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_jax.data import LengthBuckets, choose_buckets, eval_batches, make_train_iterator
from tests.data.tiny_data import make_rows

BUCKETS = LengthBuckets((4, 12), (4, 8, 16))


def random_rows(count=103, seed=0, n=2):
    rng = np.random.default_rng(seed)
    return make_rows(
        [
            (
                rng.integers(0, 50, rng.integers(0, 13)).tolist(),
                [rng.integers(0, 50, rng.integers(1, 17)).tolist() for _ in range(n)],
            )
            for _ in range(count)
        ]
    )


ROWS = random_rows()
SETTINGS = {"batch_size": 8, "buckets": BUCKETS, "seed": 3, "num_epochs": None}


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True) if a is not None)


def joined(pieces):
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *pieces)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_an_epoch_holds_every_row_at_most_once_and_drops_less_than_a_batch():
    iterator = make_train_iterator(ROWS, **SETTINGS)
    assert iterator.steps_per_epoch == 103 // 8
    assert iterator.plan_report.dropped_rows == 103 % 8
    left_out = set()
    for _ in range(4):
        seen = np.concatenate([b.row_ids for b in take(iterator, iterator.steps_per_epoch)])
        assert len(set(seen.tolist())) == len(seen) == 96
        left_out |= set(range(103)) - set(seen.tolist())
    assert len(left_out) > 7
    iterator.close()


def test_num_epochs_ends_the_iterator():
    iterator = make_train_iterator(ROWS, **{**SETTINGS, "num_epochs": 2})
    batches = list(iterator)
    assert len(batches) == 2 * iterator.steps_per_epoch
    shapes = {(b.prompt_tokens.shape[1], b.completion_tokens.shape[2]) for b in batches}
    assert len(shapes) > 2
    assert all(p in BUCKETS.prompt and c in BUCKETS.completion for p, c in shapes)


def test_epochs_and_seeds_differ_and_runs_repeat():
    iterator = make_train_iterator(ROWS, **SETTINGS)
    steps = iterator.steps_per_epoch
    first, second = ([b.row_ids.tolist() for b in take(iterator, steps)] for _ in range(2))
    assert first != second
    again = [b.row_ids.tolist() for b in take(make_train_iterator(ROWS, **SETTINGS), steps)]
    assert again == first
    other = make_train_iterator(ROWS, **{**SETTINGS, "seed": 4})
    assert [b.row_ids.tolist() for b in take(other, steps)] != first


def test_the_order_is_fixed_for_good():
    """Another order would break the resumption of every saved run."""
    rows = make_rows([([1], [[2], [4]])] * 9)
    iterator = make_train_iterator(rows, **{**SETTINGS, "batch_size": 4})
    assert [b.row_ids.tolist() for b in take(iterator, 4)] == [
        [0, 4, 7, 1],
        [5, 6, 3, 8],
        [3, 7, 4, 8],
        [0, 6, 2, 1],
    ]


@pytest.mark.parametrize("position", [0, 1, 5, 12, 13, 30])
def test_state_is_exact_through_json(position):
    iterator = make_train_iterator(ROWS, **SETTINGS)
    take(iterator, position)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 15)
    resumed = make_train_iterator(ROWS, **SETTINGS)
    take(resumed, 3)
    resumed.set_state(state)
    assert all(map(same, take(resumed, 15), expected))
    assert resumed.get_state() == iterator.get_state()


def test_state_of_another_order_is_refused():
    state = make_train_iterator(ROWS, **SETTINGS).get_state()
    for change in (
        {"seed": 4},
        {"batch_size": 4},
        {"buckets": LengthBuckets((12,), (16,))},
    ):
        with pytest.raises(ValueError, match="another order of batches"):
            make_train_iterator(ROWS, **{**SETTINGS, **change}).set_state(state)
    with pytest.raises(ValueError, match="another order of batches"):
        make_train_iterator(random_rows(seed=1), **SETTINGS).set_state(state)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_see_slices_of_one_batch_and_resume_with_another_number(count):
    reference = np.arange(206, dtype=np.float32).reshape(103, 2)
    alone = make_train_iterator(ROWS, **SETTINGS, reference_logprobs=reference)
    parts = [
        make_train_iterator(
            ROWS, **SETTINGS, process_index=i, process_count=count, reference_logprobs=reference
        )
        for i in range(count)
    ]
    for _ in range(20):
        pieces = [next(part) for part in parts]
        assert same(joined(pieces), next(alone))
    state = parts[0].get_state()
    expected = take(alone, 5)
    alone.set_state(state)
    assert all(map(same, take(alone, 5), expected))


@pytest.mark.parametrize("threads", [1, 8])
def test_reading_ahead_keeps_the_order(threads):
    iterator = make_train_iterator(ROWS, **SETTINGS, num_threads=threads, read_ahead=50)
    plain = make_train_iterator(ROWS, **SETTINGS, num_threads=0, read_ahead=0)
    for _ in range(40):
        assert same(next(iterator), next(plain))
        assert iterator.get_state() == plain.get_state()


def test_going_back_over_epochs():
    iterator = make_train_iterator(ROWS, **SETTINGS)
    start = iterator.get_state()
    first = take(iterator, 10 * iterator.steps_per_epoch)[0]
    iterator.set_state(start)
    assert same(next(iterator), first)


def test_reference_logprobs_come_by_row():
    reference = np.stack([np.arange(103), -np.arange(103)], 1).astype(np.float32)
    batch = next(make_train_iterator(ROWS, **SETTINGS, reference_logprobs=reference))
    assert batch.reference_logprobs[:, 0].tolist() == batch.row_ids.tolist()
    assert next(make_train_iterator(ROWS, **SETTINGS)).reference_logprobs is None


def test_rare_long_rows_are_trained_on_too():
    rows = make_rows([([1], [[2], [4]])] * 30 + [([1] * 12, [[2] * 16, [4]])] * 2)
    iterator = make_train_iterator(rows, **{**SETTINGS, "batch_size": 5, "num_epochs": 3})
    seen = Counter(i for b in iterator for i in b.row_ids.tolist())
    assert seen[30] + seen[31] > 3


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 3), st.integers(0, 9))
def test_eval_sees_every_row_once(count, batch_size, n, seed):
    rows = random_rows(count, seed, n)
    batches = eval_batches(rows, batch_size=batch_size, buckets=BUCKETS)
    assert len(batches) == -(-count // batch_size)
    found = np.concatenate([b.row_ids for b in batches])
    assert sorted(found[found >= 0].tolist()) == list(range(count))
    assert (np.concatenate([b.row_ids for b in batches]) == found).all()
    for batch in list(batches)[:-1]:
        assert (batch.row_ids >= 0).all()
    last = batches[len(batches) - 1]
    assert not last.completion_mask[last.row_ids < 0].any()


def test_eval_slices_over_processes():
    whole = eval_batches(ROWS, batch_size=8, buckets=BUCKETS)
    halves = [
        eval_batches(ROWS, batch_size=8, buckets=BUCKETS, process_index=i, process_count=2)
        for i in range(2)
    ]
    for batch, left, right in zip(whole, *halves, strict=True):
        assert same(joined([left, right]), batch)


def test_clear_errors():
    with pytest.raises(
        ValueError,
        match="batch_size=10 does not divide over 4 processes: use a multiple of 4",
    ):
        make_train_iterator(ROWS, **{**SETTINGS, "batch_size": 10}, process_count=4)
    with pytest.raises(ValueError, match="103 rows do not fill one batch: set batch_size to at"):
        make_train_iterator(ROWS, **{**SETTINGS, "batch_size": 104})
    with pytest.raises(ValueError, match=r"prompt of 12 tokens is longer.*prompt_buckets=\[4\]"):
        eval_batches(ROWS, batch_size=8, buckets=LengthBuckets((4,), (16,)))
    for lengths in ((), (8, 4), (4, 4), (0, 4)):
        with pytest.raises(ValueError, match="ascending"):
            LengthBuckets(lengths, (4,))


def test_chosen_buckets_cover_the_data_with_the_least_padding():
    rows = make_rows([([1] * p, [[2] * c, [4]]) for p, c in ((0, 3), (7, 30), (9, 8), (16, 300))])
    buckets = choose_buckets(rows)
    shapes = ((8, 8), (16, 8), (8, 32), (16, 320))
    assert buckets == LengthBuckets((8, 16), (8, 32, 320), shapes)
    assert choose_buckets(rows, most=2).shapes == ((16, 32), (16, 320))
    assert choose_buckets(rows, prompt=[20], most=1) == LengthBuckets((20,), (320,))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 120), min_size=1, max_size=40), st.integers(1, 3))
def test_no_other_choice_of_buckets_pads_less(lengths, most):
    rows = make_rows([([1] * length, [[2]]) for length in lengths])
    sizes = sorted({-(-length // 8) * 8 for length in lengths})

    def padded(chosen):
        return sum(min(s for s in chosen if s >= length) for length in lengths)

    best = min(
        padded([*others, sizes[-1]]) for k in range(most) for others in combinations(sizes[:-1], k)
    )
    assert padded(choose_buckets(rows, completion=[8], most=most).prompt) == best
