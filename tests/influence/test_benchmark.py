"""The benchmark: its check against explicit matrices, the peers' conventions of positions, and a run of it all."""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import (
    World,
    counted,
    ekfac_dense,
    explicit_matrix,
    kfac_dense,
    layer_pairs,
    sequence_gradients,
    total_tokens,
    weights_of,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from ideal.footprint import fake
from ideal.influence import DomainSample, InfluenceConfig, compute_influence, products, selection
from ideal.influence.passes import Passes
from ideal.influence.rehearsal import rehearse
from ideal.influence.samples import draw_domain, whole_reference

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "peers")]

import benchmark_influence  # noqa: E402
from comparison import agreement, cosine  # noqa: E402
from exchange import ALL_BUT_LAST, EVERY_TOKEN, IGNORED, LAST_LABEL, Rows, Workload  # noqa: E402
from first_position import matrix_without  # noqa: E402
from flops import Tokens, forward_backward, head_size, phase_flops  # noqa: E402
from sides import PEER_PYTHON, Worker, engine_side, variant  # noqa: E402
from workloads import QUICK, SHAPES, random_sets  # noqa: E402

EVERYTHING = InfluenceConfig(sample_fraction=1.0, factor_fraction=1.0, error_sequences=0)
OWN = np.eye(3, dtype=bool)


# The check


def engine_matrix(world: World, dtype: torch.dtype, convention: str = LAST_LABEL) -> np.ndarray:
    """The engine's M on a copy of the world's model, with positions counted by `convention`."""
    domains = {
        name: DomainSample(replace(as_rows(domain.examples), convention=convention), domain.counts)
        for name, domain in world.domains.items()
    }
    model = copy.deepcopy(world.model).to(dtype)
    return compute_influence(model, domains, world.references, EVERYTHING, 0).matrix


def passes(found: np.ndarray, expected: np.ndarray, world: World) -> bool:
    tokens = np.array(list(total_tokens(world).values()))
    return agreement(found, expected, tokens / tokens.sum(), OWN).same


def test_check_passes_in_float32(world: World):
    """Explicit matrices in float64 play the peer: the engine in float32 is the same to them."""
    assert passes(engine_matrix(world, torch.float32), explicit_matrix(world, ekfac_dense(world)), world)


def kfac_eigenvalues(world: World) -> np.ndarray:
    """K-FAC's eigenvalues in place of EK-FAC's."""
    return explicit_matrix(world, kfac_dense(world))


def doubled_damping(world: World) -> np.ndarray:
    return explicit_matrix(world, ekfac_dense(world), damping=0.2)


def transposed_bases(world: World) -> np.ndarray:
    """EK-FAC with the right eigenvalues between the wrong rotations: Q V Q^T for Q^T V Q."""
    dense, tokens = {}, sum(total_tokens(world).values())
    for name in weights_of(world.model):
        A, S, _ = covariances(world, name, LAST_LABEL)
        basis = torch.kron(torch.linalg.eigh(S)[1], torch.linalg.eigh(A)[1])
        gradients, counts = gradients_of(world, name)
        eigenvalues = (counts[:, None] * (gradients @ basis) ** 2).sum(0) / tokens
        dense[name] = basis.T @ torch.diag(eigenvalues) @ basis
    return explicit_matrix(world, dense)


@pytest.mark.parametrize("planted", [kfac_eigenvalues, transposed_bases, doubled_damping])
def test_planted_errors_fail_the_check(world: World, planted: Callable[[World], np.ndarray]):
    assert not passes(planted(world), engine_matrix(world, torch.float64), world)


def test_each_part_of_the_check_alone():
    """An error on the diagonal shows in the largest entry, one of small off-diagonal entries in the cosine."""
    matrix, shares = np.diag([3.0, 2.0, 1.0]), np.full(3, 1 / 3)
    matrix[~OWN] = [1e-5, 2e-5, 3e-5, 4e-5, 5e-5, 6e-5]
    assert agreement(matrix, matrix, shares, OWN).same
    diagonal = matrix + np.diag([4e-4, 0, 0])
    assert agreement(diagonal, matrix, shares, OWN).cosine == pytest.approx(1) and not passes_with(diagonal, matrix)
    mirrored = np.where(OWN, matrix, matrix.T)
    assert agreement(mirrored, matrix, shares, OWN).error < 1e-4 and not passes_with(mirrored, matrix)


def passes_with(found: np.ndarray, expected: np.ndarray) -> bool:
    return agreement(found, expected, np.full(3, 1 / 3), OWN).same


def test_cosine_of_tiny_matrices():
    """Not torch's: that clamps norms at 1e-8."""
    one, other = np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, -3.0])
    assert cosine(1e-12 * one, 1e-12 * other) == pytest.approx(cosine(one, other))


# The conventions of positions


def covariances(world: World, name: str, convention: str) -> tuple[Tensor, Tensor, float]:
    """A, S and their positions by a loop over sequences; `tiny.layer_pairs` knows only one convention."""
    layer, seen = world.model.get_submodule(name), {}
    A, S, positions = torch.tensor(0.0), torch.tensor(0.0), 0.0
    for domain in world.domains.values():
        for row, count in counted(domain):
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])

            def keep(module: Any, args: Any, output: Tensor) -> None:
                output.retain_grad()
                seen["x"], seen["output"] = args[0][0].detach(), output

            handle = layer.register_forward_hook(keep)
            logits = world.model(input_ids=ids).logits[0, :-1]
            handle.remove()
            torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").backward()
            world.model.zero_grad()
            used = {
                LAST_LABEL: int(torch.nonzero(labels != IGNORED).max()),
                ALL_BUT_LAST: len(labels) - 1,
                EVERY_TOKEN: len(labels),
            }[convention]
            x, d = seen["x"][:used], seen["output"].grad[0, :used]
            A, S, positions = A + count * x.T @ x, S + count * d.T @ d, positions + count * used
    return A / positions, S / positions, positions


def gradients_of(world: World, name: str) -> tuple[Tensor, Tensor]:
    """All sequences' gradients of a layer [m, O I], and their counts [m]."""
    found = [sequence_gradients(world.model, domain.examples, name)[name] for domain in world.domains.values()]
    counts = np.concatenate([domain.counts for domain in world.domains.values()])
    return torch.cat(found).flatten(1), torch.tensor(counts, dtype=torch.float64)


@pytest.mark.parametrize("convention", [LAST_LABEL, ALL_BUT_LAST, EVERY_TOKEN])
def test_positions_by_convention(world: World, convention: str):
    """Fed such rows, the engine gives the EK-FAC of a peer that counts so, and no other's."""
    dense, tokens = {}, sum(total_tokens(world).values())
    for name in weights_of(world.model):
        A, S, _ = covariances(world, name, convention)
        basis = torch.kron(torch.linalg.eigh(S)[1], torch.linalg.eigh(A)[1])
        gradients, counts = gradients_of(world, name)
        dense[name] = basis @ torch.diag((counts[:, None] * (gradients @ basis) ** 2).sum(0) / tokens) @ basis.T
    expected = explicit_matrix(world, dense)
    for counted_by in (LAST_LABEL, ALL_BUT_LAST, EVERY_TOKEN):
        found = engine_matrix(world, torch.float64, counted_by)
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        assert (error < 1e-9) == (counted_by == convention)


# The workload and its sides


def test_padding_of_the_engines_batches(world: World):
    """The part of what goes through the model that is no position; the engine's batches are of similar lengths."""
    rows = as_rows(world.references["down"])
    passes = Passes(world.model, {}, InfluenceConfig(batch_size=2), 0)
    batches = list(passes.batches([whole_reference("down", rows)], drawn=False))
    size = sum(batch.input_ids.numel() for batch in batches)
    expected = 1 - sum(sum(batch.positions.sizes) for batch in batches) / size
    assert rows.padding(2) == pytest.approx(expected, abs=1e-12)
    assert rows.padding(2) < rows.padding(2, longest_first=False)


def test_workload_keeps_its_rows(tmp_path: Path):
    training, references = random_sets(QUICK, 64, seed=3)
    training["ragged"] = Rows([[1, 2, 3], [4]], [[IGNORED, 2, 3], [IGNORED]])
    workload = Workload(tmp_path, training, references, ["some.layer"], batch_size=3, seed=5)
    workload.save()
    assert asdict(Workload.load(tmp_path)) == asdict(workload)
    assert training["ragged"].trained_tokens.tolist() == [2, 0]


def test_random_domains_differ():
    """References are of their domain's statistics, and no two domains of the same."""
    training, references = random_sets(replace(QUICK, training=64, references=64), 32, seed=0)

    def pairs(rows: Rows) -> np.ndarray:
        counts = np.zeros((32, 32))
        for ids in rows.input_ids:
            np.add.at(counts, (ids[:-1], ids[1:]), 1)
        return counts

    for name, rows in references.items():
        likeness = {other: cosine(pairs(rows), pairs(of)) for other, of in training.items()}
        assert likeness.pop(name) > 0.9 and max(likeness.values()) < 0.5


@pytest.mark.parametrize("leave_out", [False, True])
def test_first_positions_left_out(world: World, leave_out: bool):
    """Against explicit matrices whose A, S and eigenvalues know nothing of first positions; or the engine's own."""
    shapes = {name: weight.shape for name, weight in weights_of(world.model).items()}
    training, dense = counted_once(world), {}
    tokens = sum(total_tokens(training).values())
    for name in shapes:
        pairs = [layer_pairs(world.model, row, name) for d in training.domains.values() for row, _ in counted(d)]
        pairs = [(x[leave_out:], d[leave_out:]) for x, d in pairs]
        A, S = (sum(part.T @ part for part in parts) for parts in zip(*pairs, strict=True))
        basis = torch.kron(torch.linalg.eigh(S)[1], torch.linalg.eigh(A)[1])
        gradients = torch.stack([(d.T @ x).flatten() for x, d in pairs])
        dense[name] = basis @ torch.diag(((gradients @ basis) ** 2).sum(0) / tokens) @ basis.T
    workload = Workload(
        Path(),
        {name: as_rows(domain.examples) for name, domain in training.domains.items()},
        {name: as_rows(rows) for name, rows in training.references.items()},
        list(shapes),
    )
    found = matrix_without(workload, training.model, EVERYTHING, leave_out)
    np.testing.assert_allclose(found, explicit_matrix(training, dense), rtol=1e-8, atol=1e-12)
    engine = engine_matrix(training, torch.float64)
    assert np.allclose(found, engine, rtol=1e-8, atol=1e-12) == (not leave_out)


def counted_once(world: World) -> World:
    """The world with every row in its mixture once."""
    ones = {name: DomainSample(d.examples, np.ones_like(d.counts)) for name, d in world.domains.items()}
    return replace(world, domains=ones)


def as_rows(examples: Any) -> Rows:
    rows = [examples[row] for row in range(len(examples))]
    return Rows([row["input_ids"] for row in rows], [row["labels"] for row in rows])


def test_operations_of_a_pass():
    """torch's own counter, over a forward and backward pass without weight gradients, attention as plain products."""
    shape = {**SHAPES["tiny"], "attn_implementation": "eager", "head_dim": 24}
    model = LlamaForCausalLM(LlamaConfig(**shape)).requires_grad_(False)
    embedded = torch.randn(3, 17, model.config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded).logits.sum().backward()
    assert forward_backward(model.config, Tokens(3 * 17, 3 * 17**2, 3 * 17)) == counter.get_total_flops()


def test_operations_of_the_phases(monkeypatch: pytest.MonkeyPatch):
    """Beside the products that the engine makes, counted by the planner: all of them but for attention, which the
    planner counts as fused (the pass has a test of its own above), with the squares' other half."""
    monkeypatch.setattr(products, "TRIANGLE_BLOCKS", 1)
    monkeypatch.setattr(selection, "POSITIONS_PER_DIMENSION", 0)
    ids = [list(range(1, 14))] * 40
    rows = Rows(ids, [[IGNORED] * 5 + row[5:] for row in ids])
    workload = Workload(Path(), {"a": rows, "b": rows}, {"r": rows, "s": rows}, [])
    config = LlamaConfig(**SHAPES["tiny"])
    with fake():
        sets = [draw_domain(name, DomainSample(rows, np.ones(40, dtype=int)), 1.0, 0) for name in workload.domains]
        references = [whole_reference(name, rows) for name in workload.references]
        every = replace(EVERYTHING, eigenvalue_fraction=1.0, sketch_fraction=1.0)
        model = LlamaForCausalLM(config)
        found = rehearse(
            model, sets, references, every, 1, vocabulary=config.vocab_size, pair_room=0, on_gpu=True
        ).phases
    for phase, flops in phase_flops(config, workload).items():
        of = 0 if phase == "inverse" else 40 * 2
        attention = 12 * config.num_hidden_layers * of * 12**2 * config.num_attention_heads * head_size(config)
        squares = config.num_hidden_layers * of * 12 * (2 * config.hidden_size**2 + 3 * config.intermediate_size**2)
        assert found[phase].work.wide == flops - attention + squares * (phase == "covariances"), phase


def test_variant():
    side = variant("two halves: keep_layers=0.5, solver=cg, processes=2")
    assert side == engine_side("two halves", processes=2, keep_layers=0.5, solver="cg")


def run(arguments: list[str], tmp_path: Path) -> dict[str, Any]:
    """The benchmark's JSON by section."""
    file = tmp_path / "found.json"
    benchmark_influence.main([*arguments, "--json", str(file), "--scratch", str(tmp_path)])
    return {section["title"].split(",")[0]: section for section in json.loads(file.read_text())["sections"]}


def test_sides_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Every side answers every time; two processes give the engine's matrix."""
    sides = ["--sides", "floor", "padded-floor", "engine", "--repeats", "2"]
    found = run(["--quick", *sides, "--variant", "pair: processes=2, batch_size=3"], tmp_path)
    answers, agreed = found["Time"]["answers"], found["Agreement with the engine"]["agreement"]
    assert list(answers) == ["floor", "padded-floor", "engine", "pair"]
    assert all(
        len(runs) == 2 and all(one["seconds"] > 0 and one["peak"] > 1e8 for one in runs) for runs in answers.values()
    )
    # The same sequences, so the same loss; sums of 1536 float32 terms in another order.
    assert answers["floor"][0]["loss"] == pytest.approx(answers["padded-floor"][0]["loss"], rel=1e-5)
    assert agreed["pair"]["same"]
    assert sum(answers["engine"][0]["phases"].values()) <= answers["engine"][0]["seconds"]
    printed = capsys.readouterr().out
    assert "| side | s (median) |" in printed and "| pair |" in printed


def test_fractions(tmp_path: Path):
    """Each draw's matrix is compared with the one from all: near it, and another one for other sequences or factors."""
    variants = ["--variant", "kfac: factors=kfac"]
    found = run(["--quick", "--fractions", "0.1", "1", "--draws", "2", *variants], tmp_path)["Fewer sequences"]
    assert list(found["agreement"]) == [f"{name}, draw {draw}" for name in ("0.1", "1", "kfac") for draw in (0, 1)]
    assert min(found["agreement"][f"kfac, draw {draw}"]["error"] for draw in (0, 1)) > 1e-3
    fewer, every = ([found["agreement"][f"{name}, draw {draw}"]["error"] for draw in range(2)] for name in ("0.1", "1"))
    # All of them in another order: float32 sums of some thousand terms.
    assert max(every) < 1e-5 < 1e-4 < min(fewer) and fewer[0] != fewer[1]
    # 48 positions for each of 128 dimensions are 199 of 256 sequences of 31.
    used = {name: found["answers"][name][0]["factor_sequences"] for name in ("0.1", "1")}
    assert 198 <= used["0.1"] <= 202 and used["1"] == 256


def test_joint_solver_beside_the_engine_at_a_damping_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture):
    """How far it came is kept and printed; the engine that it is compared with has the same damping."""
    arguments = ["--quick", "--fractions", "--draws", "1", "--variant", "joint: solver=cg, solver_iterations=3"]
    found = {
        damping: run([*arguments, "--damping", damping], tmp_path)["Fewer sequences"] for damping in ("0.1", "1e8")
    }
    solver = found["0.1"]["answers"]["joint"][0]["solver"]
    assert solver["iterations"] == len(solver["residuals"]) == 3
    last = f"| joint | 3 | {max(solver['residuals'][-1]):.3f} | {max(solver['ratios']):.4g} |"
    assert last in capsys.readouterr().out
    # No eigenvalue is above its layer's mean times 128 x 48 entries, nor the joint one above 6 layers' together: 4e-4
    # of such a damping. At the usual one what EK-FAC leaves out counts.
    errors = {damping: section["agreement"]["joint, draw 0"]["error"] for damping, section in found.items()}
    assert errors["1e8"] < 1e-3 < errors["0.1"]


def test_kronfluence_has_one_damping(capsys: pytest.CaptureFixture):
    """Said at once, not by its process after the engine's."""
    with pytest.raises(SystemExit):
        benchmark_influence.parse(["--damping", "1", "--sides", "engine", "kronfluence"])
    assert "--damping" in capsys.readouterr().err


def test_shape(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Known sizes with random weights, made by each side for itself; how fast each phase computes is said."""
    arguments = ["--shape", "tiny", "--sequences", "8", "--references", "4", "--length", "32", "--repeats", "1"]
    sections = run([*arguments, "--blocks", "1", "--sides", "engine"], tmp_path)
    found = sections["Time"]["answers"]["engine"][0]
    assert np.isfinite(found["matrix"]).all() and len(found["first_position_share"]) == 3
    flops, printed = sections["Phases"]["flops"]["engine"], capsys.readouterr().out
    assert set(flops) == {"covariances", "eigenvalues", "reference gradients", "inverse"}
    for phase, count in flops.items():
        seconds = found["phases"][phase]
        assert f"| engine | {phase} | {seconds:.3f} | {count / seconds / 1e12:.3g} |" in printed


def test_what_was_measured_before_a_side_fails_is_kept(tmp_path: Path):
    with pytest.raises(RuntimeError, match="broken failed"):
        run(["--quick", "--sides", "floor", "--variant", "broken: nonsense=1"], tmp_path)
    so_far = json.loads((tmp_path / "found.json").read_text())["so far"]["answers"]
    assert len(so_far["floor"]) == 1 and so_far["floor"][0]["seconds"] > 0 and so_far["broken"] == []


def test_peers_that_are_not_there_are_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(benchmark_influence, "PEER_PYTHON", Path("/nowhere/python"))
    with pytest.raises(SystemExit):
        benchmark_influence.main(["--quick", "--sides", "engine", "bergson"])
    assert "bergson: /nowhere/python is not there; run scripts/setup_peers.sh first" in capsys.readouterr().err


def test_a_failing_side_says_why(tmp_path: Path):
    Workload(tmp_path, {}, {}, []).save()
    worker = Worker(engine_side("engine"), tmp_path, threads=1)
    with pytest.raises(RuntimeError, match=r"engine failed \(exit codes \[1\].*\n(.|\n)*OSError"):
        worker.run()


@pytest.mark.skipif(not PEER_PYTHON.exists(), reason="scripts/setup_peers.sh has not been run")
def test_peers_agree(tmp_path: Path):
    found = run(["--quick", "--sides", "engine", "kronfluence", "bergson", "--repeats", "1"], tmp_path)
    agreed = found["Agreement with the engine"]["agreement"]
    assert agreed["kronfluence"]["same"] and agreed["bergson"]["same"]
