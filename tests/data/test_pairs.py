import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_jax.data import FILLER, rows_to_batch
from tests.data.tiny_data import PAD, make_rows

ROWS = make_rows([([1, 2, 3], [[4, 5], [6]]), ([], [[8, 10, 12], [14, 16]])])


def test_layout_by_hand():
    batch = rows_to_batch(
        ROWS,
        np.array([1, 0, FILLER]),
        prompt_length=4,
        completion_length=3,
        reference_logprobs=np.array([[-1.0, -2.0], [-3.0, -4.0]]),
    )
    p = PAD
    assert batch.prompt_tokens.tolist() == [[p] * 4, [p, 1, 2, 3], [p] * 4]
    assert batch.prompt_mask.tolist() == [[False] * 4, [False, True, True, True], [False] * 4]
    assert batch.completion_tokens.tolist() == [
        [[8, 10, 12], [14, 16, p]],
        [[4, 5, p], [6, p, p]],
        [[p] * 3, [p] * 3],
    ]
    assert batch.completion_mask.tolist() == [
        [[True] * 3, [True, True, False]],
        [[True, False, False], [True, False, False]],
        [[False] * 3] * 2,
    ]
    assert batch.row_ids.tolist() == [1, 0, -1]
    assert batch.reference_logprobs.tolist() == [[-3, -4], [-1, -2], [0, 0]]
    assert [batch.prompt_tokens.dtype, batch.completion_tokens.dtype] == [np.int32] * 2
    assert batch.reference_logprobs.dtype == np.float32


def test_errors():
    def layout(indices, p=4, c=3, **more):
        return rows_to_batch(ROWS, np.array(indices), prompt_length=p, completion_length=c, **more)

    with pytest.raises(ValueError, match="row 0: a prompt of 3 tokens does not fit"):
        layout([1, 0], p=2)
    with pytest.raises(ValueError, match="row 1: a completion of 3 tokens does not fit"):
        layout([1, 0], c=2)
    with pytest.raises(ValueError, match=r"rows \[1, 0\]: completions of 5 tokens together do not"):
        layout([[1, FILLER, 0]], c=4)
    with pytest.raises(IndexError, match=r"in \[-1, 2\)"):
        layout([2])
    with pytest.raises(ValueError, match=r"shape \(3, 2\), the rows need \(2, 2\)"):
        layout([0], reference_logprobs=np.zeros((3, 2)))


IDS = st.integers(0, 50)


@st.composite
def tables(draw):
    n = draw(st.integers(1, 4))
    branches = st.lists(st.lists(IDS, min_size=1, max_size=6), min_size=n, max_size=n)
    rows = draw(st.lists(st.tuples(st.lists(IDS, max_size=5), branches), min_size=1, max_size=6))
    return rows, draw(st.lists(st.integers(FILLER, len(rows) - 1), min_size=1, max_size=8))


@settings(deadline=None)
@given(tables(), st.integers(0, 3), st.integers(0, 3))
def test_arrays_give_the_ids_back(table, more_p, more_c):
    rows, indices = table
    data = make_rows(rows)
    longest = max(len(c) for _, branches in rows for c in branches)
    batch = rows_to_batch(
        data,
        np.array(indices),
        prompt_length=max(len(p) for p, _ in rows) + more_p,
        completion_length=longest + more_c,
    )
    for b, i in enumerate(indices):
        prompt, branches = rows[i] if i != FILLER else ([], [[]] * data.num_completions)
        mask = batch.prompt_mask[b]
        assert batch.prompt_tokens[b][mask].tolist() == prompt
        # Right-aligned: no padding behind a token.
        assert mask.tolist() == sorted(mask.tolist())
        assert (batch.prompt_tokens[b][~mask] == PAD).all()
        for k, completion in enumerate(branches):
            tokens, scored = batch.completion_tokens[b, k], batch.completion_mask[b, k]
            size = len(completion)
            assert tokens[:size].tolist() == completion
            assert (tokens[size:] == PAD).all()
            assert scored.tolist() == [t % 2 == 0 for t in completion] + [False] * (
                len(tokens) - size
            )


@settings(deadline=None)
@given(tables(), st.integers(1, 4), st.integers(0, 3))
def test_packed_rows_are_their_examples_end_to_end(table, places, more):
    rows, indices = table
    data = make_rows(rows)
    n, indices = data.num_completions, np.array(indices)
    packed = np.concatenate([indices, np.full(-len(indices) % places, FILLER)]).reshape(-1, places)
    wanted = [[rows[i] if i != FILLER else ([], [[]] * n) for i in row] for row in packed.tolist()]
    joined = [
        ([t for p, _ in row for t in p], [[t for _, c in row for t in c[k]] for k in range(n)])
        for row in wanted
    ]
    batch = rows_to_batch(
        data,
        packed,
        prompt_length=max(len(p) for p, _ in joined) + more,
        completion_length=max(len(c) for _, branches in joined for c in branches) + more,
        reference_logprobs=np.arange(len(rows) * n, dtype=np.float32).reshape(-1, n),
    )
    np.testing.assert_array_equal(batch.row_ids, packed)
    for r, (prompt, branches) in enumerate(joined):
        start = batch.prompt_tokens.shape[1] - len(prompt)
        assert batch.prompt_tokens[r].tolist() == [PAD] * start + prompt
        assert batch.prompt_mask[r].tolist() == [False] * start + [True] * len(prompt)
        for k, completion in enumerate(branches):
            rest = batch.completion_tokens.shape[2] - len(completion)
            assert batch.completion_tokens[r, k].tolist() == completion + [PAD] * rest
            scored = [t % 2 == 0 for t in completion] + [False] * rest
            assert batch.completion_mask[r, k].tolist() == scored
        prompts = [len(p) for p, _ in wanted[r]]
        assert batch.segments.prompt_lengths[r].tolist() == prompts
        lengths = [[len(c[k]) for _, c in wanted[r]] for k in range(n)]
        assert batch.segments.completion_lengths[r].tolist() == lengths
        frozen = [[i * n + k if i >= 0 else 0 for k in range(n)] for i in packed[r].tolist()]
        assert batch.reference_logprobs[r].tolist() == frozen
