"""Several data sets as one: what an epoch has of each, and batches dealt from that."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_jax.data import LengthBuckets, choose_buckets, make_train_iterator
from spo_jax.data.mixture import Mixture
from spo_jax.data.token_rows import join_rows
from tests.data.tiny_data import make_rows

LEFT = [([1, 2], [[4, 6], [8]]), ([3], [[2], [4]]), ([5, 6, 7], [[6, 6], [2]])]
RIGHT = [([9], [[8, 8], [10]]), ([10, 11], [[12], [14, 14]])]


def mixed(weights=(1.0, 1.0), records=(5, 2)):
    """Of the first data set rows 1 to 3 were read from its second to fourth of five records."""
    left = make_rows(LEFT)
    left = left.__class__(**{**vars(left), "source_rows": np.array([1, 2, 3])})
    return join_rows([left, make_rows(RIGHT)], weights, records)


def test_joined_rows_are_the_rows_of_both():
    rows, expected = mixed(), make_rows([*LEFT, *RIGHT])
    assert rows.fingerprint() == expected.fingerprint()
    assert rows.source_rows.tolist() == [1, 2, 3, 5, 6]
    assert [part.tolist() for part in rows.mixture.parts(rows.source_rows)] == [[0, 1, 2], [3, 4]]
    kept = rows.take(np.array([True, False, True, False, True]))
    assert [part.tolist() for part in kept.mixture.parts(kept.source_rows)] == [[0, 1], [2]]


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(1, 9), st.floats(0.05, 3.5)), min_size=1, max_size=4),
    seed=st.integers(0, 5),
)
def test_every_row_comes_as_often_as_its_weight_says(parts, seed):
    counts, weights = zip(*parts, strict=True)
    mixture, rows = Mixture(weights, counts), np.arange(sum(counts))
    sizes = mixture.sizes(rows)
    assert sizes == [max(1, round(w * n)) for n, w in parts]
    seen = Counter()
    for number in range(5):
        epoch = mixture.epoch(rows, seed=seed, number=number)
        assert [len(np.intersect1d(epoch, part)) > 0 for part in mixture.parts(rows)]
        seen.update(epoch.tolist())
        for part, size in zip(mixture.parts(rows), sizes, strict=True):
            often = [seen[row] for row in part.tolist()]
            # Gone through in laps: none is taken again before all others have been.
            assert sum(often) == size * (number + 1)
            assert max(often) - min(often) <= 1
    again = mixture.epoch(rows, seed=seed, number=4)
    np.testing.assert_array_equal(again, epoch)


def test_laps_are_shuffled_anew():
    mixture, rows = Mixture((0.5,), (40,)), np.arange(40)
    epochs = [mixture.epoch(rows, seed=0, number=number) for number in range(4)]
    assert {*epochs[0], *epochs[1]} == {*epochs[2], *epochs[3]} == set(range(40))
    assert set(epochs[0]) != set(epochs[2])
    assert set(epochs[0]) != set(mixture.epoch(rows, seed=1, number=0))


def iterator(rows, packing=False, **options):
    buckets = LengthBuckets((4,), (4,))
    options = {"batch_size": 2, "seed": 3, "num_epochs": None, **options}
    return make_train_iterator(rows, buckets=buckets, packing=packing, **options)


@pytest.mark.parametrize("packing", [False, True])
def test_batches_have_the_rows_of_the_mixture(packing):
    rows = mixed((2.0, 0.5))
    batches = iterator(rows, packing)
    assert rows.epoch_size == 7
    assert batches.steps_per_epoch == 3
    assert (batches.plan_report.rows, batches.plan_report.dropped_rows) == (7, 1)
    seen = Counter()
    for _ in range(3 * 40):
        ids = np.asarray(next(batches).row_ids)
        seen.update(ids[ids >= 0].tolist())
    of = [sum(seen[row] for row in part) for part in ((0, 1, 2), (3, 4))]
    assert sum(of) == 240
    # Of seven rows one is left out of each epoch, and none more often than another.
    assert of[0] / sum(of) == pytest.approx(6 / 7, abs=0.03)


def test_a_position_belongs_to_its_weights():
    batches = iterator(mixed((2.0, 0.5)))
    expected = [np.asarray(next(batches).row_ids).tolist() for _ in range(6)]
    begun = iterator(mixed((2.0, 0.5)))
    next(begun), next(begun)
    later = iterator(mixed((2.0, 0.5)))
    later.set_state(begun.get_state())
    assert [np.asarray(next(later).row_ids).tolist() for _ in range(4)] == expected[2:]
    with pytest.raises(ValueError, match="another order of batches"):
        iterator(mixed((2.0, 1.0))).set_state(begun.get_state())


def test_too_few_rows_of_an_epoch_are_named():
    with pytest.raises(ValueError, match="2 rows do not fill one batch"):
        iterator(mixed((0.2, 0.2)), batch_size=4)


@pytest.mark.parametrize("given_lengths", [{}, {"prompt": [104]}, {"completion": [8]}])
def test_buckets_are_chosen_for_what_an_epoch_has(given_lengths):
    """As if the rows of a data set that comes thrice were there three times."""
    many = [([1] * n, [[2] * n, [3]]) for n in (3, 20, 35, 50)]
    few = [([1] * n, [[2] * n, [3]]) for n in (60, 75, 90, 100)]
    options = {"most": 2, **given_lengths}
    found = {}
    for times in (1, 5):
        weighed = join_rows([make_rows(many), make_rows(few)], (float(times), 1.0), (4, 4))
        found[times] = choose_buckets(weighed, **options)
        assert found[times] == choose_buckets(make_rows([*many * times, *few]), **options)
        np.testing.assert_array_equal(weighed.times_an_epoch(), [times] * 4 + [1] * 4)
    assert found[1] != found[5]
