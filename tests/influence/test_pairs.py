"""Pairs that are kept: the same numbers, fewer sequences through the model, and no more on disk than allowed."""

import os
import shutil
import tempfile
import threading
from collections import namedtuple
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tiny import World, difference, make_world

from ideal.errors import UserError
from ideal.influence import DomainSample, InfluenceConfig, compute_influence, pairs, scratch, selection
from ideal.influence.layers import Group
from ideal.influence.pairs import KeptPairs, room_for_pairs
from ideal.influence.samples import SequenceSet
from ideal.influence.statistics import Tracker, make_positions

EXACT = 1e-10
"""As in test_engine.py: rounding in float64 is a thousandth of it."""
BASE = InfluenceConfig(
    sample_fraction=0.95, factor_fraction=0.5, eigenvalue_fraction=0.8, error_sequences=11, pair_budget=1
)
PER_POSITION = 8 * (2 * 16 + 3 * 24)
"""Bytes of one block's pairs, float64: gate and up read 16 numbers and write 24 each, down reads 24 and writes 16."""


@pytest.fixture(scope="module")
def two_layers() -> World:
    return make_world(layers=2)


class Watched(KeptPairs):
    """Says what it came to."""

    most = 0
    admitted = 0

    def admit(self, *args):
        found = super().admit(*args)
        Watched.admitted += sum(len(chosen.rows) for chosen in found[0])
        return found

    def close(self):
        self._watch()
        super().close()

    def _forget(self):
        self._watch()
        super()._forget()

    def _watch(self):
        Watched.most = max(Watched.most, self.file.end if self.file else 0)


def computed(world: World, config: InfluenceConfig, seed: int = 3):
    """The influence, how many sequences went through the model, and the bytes of its pairs' file."""
    passed = []
    run = Tracker.run

    def counted(self, batch, *accumulators):
        passed.append(len(batch.input_ids))
        run(self, batch, *accumulators)

    Watched.most = Watched.admitted = 0
    with (
        patch.multiple(selection, LEAST_SEQUENCES=8, FACTOR_SEQUENCES=8),
        patch.object(Tracker, "run", counted),
        patch("ideal.influence.passes.KeptPairs", Watched),
    ):
        found = compute_influence(world.model, world.domains, world.references, config, seed)
    return found, sum(passed), Watched.most


CASES = {
    "ekfac": BASE,
    "all for all": replace(BASE, factor_fraction=1.0, eigenvalue_fraction=1.0),
    "few eigenvalues": replace(BASE, factor_fraction=1.0, eigenvalue_fraction=0.3),
    "sketch": replace(BASE, factor_fraction=1.0, eigenvalue_fraction=0.3, sketch_fraction=0.4),
    "kfac": replace(BASE, factors="kfac"),
    "diagonal": replace(BASE, factors="diagonal"),
    "sampled": replace(BASE, fisher="sampled"),
    "one at a time": replace(BASE, batch_size=1),
    "half of the layers": replace(BASE, keep_layers=0.5),
    "turns": replace(BASE, memory_budget=92e-6),
    "parts": replace(BASE, memory_budget=30e-6),
    "sampled, no errors": replace(BASE, fisher="sampled", error_sequences=0),
    "auto": replace(BASE, sample_fraction="auto"),
    "joint": replace(BASE, solver="cg", solver_iterations=1, layers=["*.down_proj"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_with_fewer_passes(two_layers, case):
    without, all_of_them, nothing = computed(two_layers, replace(CASES[case], pair_budget=0))
    assert nothing == 0
    kept, fewer, size = computed(two_layers, CASES[case])
    some, between, part = computed(two_layers, replace(CASES[case], pair_budget=size / 2e9))
    # No part of a sequence is kept, so the smaller file may come to less than it may hold.
    assert fewer < between < all_of_them and 0 < part <= size / 2
    for found in (kept, some):
        assert difference(found.matrix, without.matrix) < EXACT
        for covariance in ("training_covariance", "reference_covariance"):
            expected = getattr(without, covariance)
            scale = np.nanmax(np.abs(expected), initial=0.0)
            np.testing.assert_allclose(getattr(found, covariance), expected, rtol=0, atol=EXACT * scale)
        for layer, share in without.first_position_share.items():
            assert found.first_position_share[layer] == pytest.approx(share, rel=EXACT)


@pytest.mark.parametrize("case", ["ekfac", "few eigenvalues", "kfac", "turns"])
def test_a_sequence_goes_through_the_model_once(two_layers, case):
    """Whether it serves covariances, eigenvalues, gradients, errors or several of them."""
    found, passed, _ = computed(two_layers, CASES[case])
    assert (found.training_covariance != 0).any(), "no domain's errors were asked for"
    assert passed == sum(found.sequences.values()) + sum(found.reference_sequences.values())


def test_the_file_holds_all_that_is_needed_again(two_layers):
    config = replace(CASES["all for all"], sample_fraction=1.0)
    used = {
        name: int(((domain.counts > 0) & (domain.examples.trained_tokens > 0)).sum())
        for name, domain in two_layers.domains.items()
    }
    references = sum(int((rows.trained_tokens > 0).sum()) for rows in two_layers.references.values())
    found, passed, size = computed(two_layers, config)
    assert passed == sum(used.values()) + references and found.sequences == used
    # All training pairs, and those of 11 reference rows of each capability (they have 9): all.
    positions = sum(
        int(examples.positions[(counts > 0) & (examples.trained_tokens > 0)].sum())
        for examples, counts in [
            *((domain.examples, domain.counts) for domain in two_layers.domains.values()),
            *((rows, np.ones(len(rows))) for rows in two_layers.references.values()),
        ]
    )
    assert size == 2 * PER_POSITION * positions


@pytest.mark.parametrize("same_examples", [True, False])
def test_a_set_of_the_same_name_is_not_taken_for_another(two_layers, same_examples):
    """A domain and a capability that share their name and, it may be, their examples; their order differs."""
    name = next(iter(two_layers.references))
    examples = two_layers.references[name]
    domain = DomainSample(examples, np.ones(len(examples), dtype=int))
    rows = examples if same_examples else type(examples)(examples.rows[::-1])
    world = World(two_layers.model, {**two_layers.domains, name: domain}, {**two_layers.references, name: rows})
    found, expected = (computed(world, replace(BASE, pair_budget=budget))[0] for budget in (1, 0))
    assert difference(found.matrix, expected.matrix) < EXACT
    assert difference(found.reference_covariance, expected.reference_covariance) < EXACT


def test_picked_positions_are_those_of_their_sequences():
    sizes, weights, slots = [2, 3, 1, 4], [1.0, 2.0, 0.0, 5.0], [7, 8, 7, 9]
    whole = make_positions(0, [list(zip(sizes, weights, slots, strict=True))], torch.device("cpu"), torch.float64)
    positions, ranges = whole.picked(2, {9: 3.0, 7: 0.5, 4: 1.0})
    # The third is a filler: weight zero where it was kept.
    assert ranges == [(0, 2), (6, 10)]
    assert (positions.set_index, positions.sizes, positions.slots) == (2, [2, 4], [7, 9])
    assert positions.position_weights.tolist() == [0.5] * 2 + [3.0] * 4 and positions.starts.tolist() == [0, 2]
    nothing, nowhere = whole.picked(0, {})
    assert nothing.sizes == nowhere == []
    assert whole.picked(0, {7: 1.0, 8: 1.0})[1] == [(0, 5)]


def test_bfloat16_products_are_of_pairs_in_bfloat16(two_layers):
    """2^-9 relative is what rounding to 8 bits may do to each number; sums of them cancel by a factor of a few."""
    single = make_world(layers=2)
    single.model.float()
    halves = replace(BASE, product_dtype="bfloat16")
    with patch("ideal.influence.products.Products.narrow", lambda self, device: self.bf16):
        found, _, size = computed(single, halves)
        expected, _, _ = computed(single, replace(halves, pair_budget=0))
    wide = computed(single, BASE)[2]
    assert size * 2 == wide
    assert 0 < difference(found.matrix, expected.matrix) < 0.02


@pytest.mark.parametrize("way", ["written", "failed"])
def test_nothing_is_left_behind(two_layers, tmp_path, monkeypatch, way):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files = []
    right = KeptPairs.close

    def close(self):
        files.append(self.file)
        right(self)

    monkeypatch.setattr(KeptPairs, "close", close)
    if way == "failed":
        monkeypatch.setattr("ideal.influence.curvature.eigenbasis", lambda matrix: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compute_influence(two_layers.model, two_layers.domains, two_layers.references, BASE, 0)
    else:
        compute_influence(two_layers.model, two_layers.domains, two_layers.references, BASE, 0)
    assert len(files) == 1 and files[0].file.closed
    assert list(tmp_path.iterdir()) == []


def failing_disk(monkeypatch, writes, reads):
    """A disk that fails after some writes, or reads."""
    left = {"pwrite": writes, "preadv": reads}

    def limited(kind):
        right = getattr(os, kind)

        def call(*args):
            left[kind] -= 1
            if left[kind] < 0:
                raise OSError(28, "No space left on device")
            return right(*args)

        return call

    for kind in left:
        monkeypatch.setattr(os, kind, limited(kind))


# Whether a file may go past the page cache is tried with one write and one read of its own.
@pytest.mark.parametrize(("writes", "reads"), [(0, 0), (1, 0), (5, 100), (10**9, 5)])
def test_a_full_disk_is_said_in_a_line(two_layers, monkeypatch, writes, reads):
    monkeypatch.setattr(scratch, "BUFFER_BYTES", scratch.PAGE)
    failing_disk(monkeypatch, writes, reads)
    threads = threading.active_count()
    with pytest.raises(UserError, match=r"^influence.pair_budget: .* failed .*No space left.*TMPDIR") as caught:
        compute_influence(two_layers.model, two_layers.domains, two_layers.references, BASE, 0)
    assert "\n" not in str(caught.value)
    assert threading.active_count() == threads


def test_files_in_memory_are_not_taken_by_default(tmp_path, monkeypatch):
    assert not pairs._in_memory("/proc/self") and pairs._in_memory("/dev/shm/a/b")
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    assert room_for_pairs(None, on_gpu=False) == 0 < room_for_pairs(1, on_gpu=False)


def test_half_of_the_free_disk_at_most(two_layers, monkeypatch):
    size = computed(two_layers, BASE)[2]
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10 * size, 9 * size, size))
    assert 0 < computed(two_layers, BASE)[2] <= size / 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert 0 < computed(two_layers, BASE)[2] <= size / 10


def test_pairs_of_other_layers_or_labels_are_not_taken(two_layers):
    layers = {name: torch.nn.Linear(3, 2) for name in ("gate", "up")}
    both = Group("gate", layers)
    domain = next(iter(two_layers.domains.values()))
    rows = SequenceSet("set", domain.examples, np.arange(4), np.ones(4), 1.0, 4, np.arange(4))
    kept = KeptPairs({"gate": 0}, 1e9, None)
    assert len(kept.admit([both], [rows], [rows], False)[0][0].rows) == 4
    for groups, drawn, here in [([both], False, 4), ([both], True, 0), ([both.only({"gate"})], False, 0)]:
        found, others = kept.split(groups, [rows], drawn)
        assert (len(found[0].rows), len(others[0].rows)) == (here, 4 - here)


def test_quantised_layers_hand_on_floats():
    """Their weights are bytes; rounding pairs to these would destroy them."""
    layer = torch.nn.Linear(3, 2)
    layer.weight = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.uint8), requires_grad=False)
    kept = KeptPairs({"a": 0}, 1e9, None)
    group = Group("a", {"a": layer})
    rows = SequenceSet("set", None, np.array([0]), np.ones(1), 1.0, 1, np.array([0]))
    kept.keys, x, d = [pairs._key(rows)], torch.randn(4, 3), torch.randn(4, 2)
    kept.add(group, x, {"a": d}, make_positions(0, [[(4, 1.0, 0)]], x.device, x.dtype))
    seen = []

    class Seen:
        def add(self, group, x_NI, outputs, positions):
            seen.append((x_NI, outputs["a"]))

    assert len(list(kept.replay([rows], [Seen()], x.device))) == 1
    assert torch.equal(seen[0][0], x) and torch.equal(seen[0][1], d)
    kept.close()


def test_none_on_a_gpu_unless_asked_for(monkeypatch):
    monkeypatch.setattr(pairs, "_in_memory", lambda folder: False)
    assert room_for_pairs(None, on_gpu=True) == 0 < room_for_pairs(None, on_gpu=False)
    assert room_for_pairs(3, on_gpu=True) == room_for_pairs(3, on_gpu=False) == 3e9
