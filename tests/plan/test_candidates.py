"""The choosing of a search, on machines made of arithmetic: nothing is compiled."""

import itertools

import pytest

from spo_jax.plan.candidates import (
    REMAT,
    Candidate,
    Tried,
    best,
    choose,
    make_candidates,
    prune,
)


def candidates(**keys):
    sizes = {
        "devices": 8,
        "batch_sizes": (16,),
        "hidden_size": 64,
        "kv_heads": 2,
        "remat": ("none", "dots_no_batch", "full"),
        "attention": ("xla",),
        "accumulation": 1,
    }
    return make_candidates(**{**sizes, **keys})


def candidate(**keys):
    fields = {"data": 1, "fsdp": 8, "tensor": 1, "remat": "none", "accumulation": 1}
    return Candidate(**{**fields, "attention": "xla", **keys})


def test_every_candidate_divides_what_it_has_to():
    found = candidates(batch_sizes=(16, 48), accumulation=6)
    assert len(set(found)) == len(found)
    for c in found:
        assert c.data * c.fsdp * c.tensor == 8
        assert 2 % c.tensor == 0
        assert all(size % (c.data * c.fsdp * c.accumulation) == 0 for size in (16, 48))
    assert {c.tensor for c in found} == {1, 2}
    assert {c.accumulation for c in found} == {1, 2, 4}


def test_the_given_accumulation_is_tried_beside_powers_of_two():
    assert {c.accumulation for c in candidates(batch_sizes=(48,), accumulation=3)} == {1, 2, 3, 4}


def test_a_width_that_does_not_divide_is_not_cut():
    assert {c.fsdp for c in candidates(hidden_size=12)} == {1, 2, 4}


def test_no_mesh_divides_an_odd_batch():
    assert candidates(batch_sizes=(3,), kv_heads=1) == []


def test_pruning_by_arithmetic_keeps_what_may_fit():
    kept, left_out = prune(candidates(), lambda c: 100 // (c.fsdp * c.tensor), usable=30.0)
    assert all(c.fsdp * c.tensor >= 4 for c in kept)
    assert left_out
    assert all(fsdp * tensor < 4 for _, fsdp, tensor in left_out)


def needed(c):
    """A machine: state over its parts, activations by what is kept and by the micro-batch."""
    kept = {"none": 160, "dots": 100, "elementwise": 70, "dots_no_batch": 60, "full": 16}[c.remat]
    return 80 // (c.fsdp * c.tensor) + kept // c.accumulation


def seconds(c):
    again = {"none": 1.0, "dots": 1.05, "elementwise": 1.1, "dots_no_batch": 1.15, "full": 1.3}[
        c.remat
    ]
    return again + 0.02 * c.accumulation * c.fsdp + 0.3 * (c.tensor - 1)


def run(found, usable, budget=10**6):
    tried = []
    while len(tried) < budget and (c := choose(found, tried)) is not None:
        fits = needed(c) <= usable
        tried.append(Tried(c, fits, needed(c), seconds(c) if fits else None))
    return tried


@pytest.mark.wide
@pytest.mark.parametrize("usable", [20, 27, 50, 90, 200, 400])
def test_the_search_finds_the_fastest_that_fits(usable):
    found = candidates(remat=REMAT)
    fitting = [c for c in found if needed(c) <= usable]
    tried = run(found, usable)
    assert len(tried) < len(found)
    expected = min(map(seconds, fitting)) if fitting else None
    winner = best(tried)
    assert (winner.seconds if winner else None) == expected


def test_no_candidate_is_tried_twice_or_after_it_is_settled():
    tried = run(candidates(remat=REMAT), usable=50)
    assert len({t.candidate for t in tried}) == len(tried)
    for earlier, later in itertools.combinations(tried, 2):
        if earlier.fits:
            assert not later.candidate.saves_at_least(earlier.candidate)
        else:
            assert not earlier.candidate.saves_at_least(later.candidate)


def test_a_small_budget_looks_at_every_mesh_before_any_twice():
    found = candidates()
    meshes = {c.mesh for c in found}
    tried = run(found, usable=50, budget=len(meshes))
    assert {t.candidate.mesh for t in tried} == meshes


def test_what_saves_more():
    plain = candidate()
    assert candidate(remat="full").saves_at_least(plain)
    assert candidate(remat="full", accumulation=4).saves_at_least(candidate(accumulation=2))
    assert not candidate(remat="full").saves_at_least(candidate(accumulation=2))
    assert not candidate(remat="full", fsdp=4, data=2).saves_at_least(plain)
    assert not candidate(remat="full", attention="splash").saves_at_least(plain)


def test_the_best_of_none_is_none():
    assert best([Tried(candidate(), False, None, None)]) is None
    fast, slow = (Tried(candidate(remat=r), True, 5, s) for r, s in (("none", 1.0), ("full", 2.0)))
    assert best([slow, fast]) is fast


def test_keys_to_paste():
    assert candidate(remat="full", accumulation=2).keys("train") == (
        "--mesh.data 1 --mesh.fsdp 8 --mesh.tensor 1 --model.remat full --model.attention xla "
        "--train.gradient_accumulation 2"
    )
