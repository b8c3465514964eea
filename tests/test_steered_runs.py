"""Whole runs of the methods that steer an inner loop from within."""

from pathlib import Path
from typing import Any

import pytest
from miniature import DOMAINS, read, run, run_on_ranks

FEW = {"data__max_examples": 16, "train__num_train_epochs": 2, "mixing__rounds": 1}


def rounds(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("round_*"))


def drawn(folder: Path, number: int) -> dict[str, Any]:
    return dict(read(folder / f"round_{number:02d}/training.json")["observed"])


def test_odm(data, tmp_path, quick):
    assert run(data, tmp_path / "joint", **FEW, mixing__method="joint") == 0
    assert run(data, tmp_path / "run", **FEW, mixing__method="odm") == 0
    assert rounds(tmp_path / "run") == ["round_00"]
    observed, mixture = drawn(tmp_path / "run", 0), read(tmp_path / "run/mixture.json")
    assert sum(observed["probabilities"].values()) == pytest.approx(1)
    joint = read(tmp_path / "joint/mixture.json")
    # Rows of one pass of two, rounded to whole ones; tokens to a row of the longest domain and the last step's.
    assert mixture["total_tokens"] == pytest.approx(joint["total_tokens"], rel=0.1)
    for name in DOMAINS:
        assert mixture["domains"][name]["size"] == int(observed["rows"][name] / 2 + 0.5)
    assert mixture != joint
    q = [read(tmp_path / name / "round_00/evaluation.json")["Q"] for name in ("run", "joint")]
    assert q[0] != q[1] and q[0] < read(tmp_path / "run/base/evaluation.json")["Q"]


def test_a_domain_of_ratio_0_stays_out(data, tmp_path, quick):
    ratios = "{math: 1, reasoning: 0, safety: 1}"
    assert run(data, tmp_path / "run", **FEW, mixing__method="odm", mixing__ratios=ratios) == 0
    assert drawn(tmp_path / "run", 0)["rows"].keys() == {"math", "safety"}
    assert read(tmp_path / "run/mixture.json")["domains"]["reasoning"]["size"] == 0


def test_doremi(data, tmp_path, quick):
    """Reference, proxy, final model; the final mixture's shares are the proxy's mean weights."""
    assert run(data, tmp_path / "run", **FEW, mixing__method="doremi") == 0
    assert rounds(tmp_path / "run") == ["round_00", "round_01", "round_02"]
    shares = drawn(tmp_path / "run", 1)["shares"]
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 1e-3 / 3
    first, last = (read(tmp_path / f"run/round_{number:02d}/mixture.json") for number in (0, 2))
    assert last["domains"] != first["domains"]
    for name in DOMAINS:
        assert last["domains"][name]["share"] == pytest.approx(shares[name], abs=0.05)
    assert read(tmp_path / "run/mixture.json")["round"] in (0, 2), "a proxy is no result"


def test_doge(data, tmp_path, quick):
    """A proxy, then the final model on its mean weights."""
    assert run(data, tmp_path / "run", **FEW, mixing__method="doge") == 0
    assert rounds(tmp_path / "run") == ["round_00", "round_01"]
    shares = drawn(tmp_path / "run", 0)["shares"]
    last = read(tmp_path / "run/round_01/mixture.json")
    assert last["domains"] != read(tmp_path / "run/round_00/mixture.json")["domains"]
    for name in DOMAINS:
        assert last["domains"][name]["share"] == pytest.approx(shares[name], abs=0.05)
    assert read(tmp_path / "run/mixture.json")["round"] == 1, "a proxy is no result"


def test_skillit(data, tmp_path, quick):
    """A short round on each domain alone, then the steered one."""
    assert run(data, tmp_path / "run", **FEW, mixing__method="skillit") == 0
    assert rounds(tmp_path / "run") == [f"round_{number:02d}" for number in range(4)]
    for number, name in enumerate(DOMAINS):
        domains = read(tmp_path / f"run/round_{number:02d}/mixture.json")["domains"]
        assert [other for other in DOMAINS if domains[other]["size"]] == [name]
        before = read(tmp_path / "run/base/evaluation.json")["reference_loss"]
        after = read(tmp_path / f"run/round_{number:02d}/evaluation.json")["reference_loss"]
        for capability in DOMAINS:
            expected = (before[capability] - after[capability]) / before[capability]
            assert drawn(tmp_path / "run", 3)["graph"][name][capability] == pytest.approx(expected)
    assert read(tmp_path / "run/mixture.json")["round"] == 3


def test_aioli(data, tmp_path, quick):
    assert run(data, tmp_path / "run", **{**FEW, "train__num_train_epochs": 3}, mixing__method="aioli") == 0
    assert rounds(tmp_path / "run") == ["round_00"]
    observed = drawn(tmp_path / "run", 0)
    assert sum(observed["probabilities"].values()) == pytest.approx(1)
    total = sum(sum(row.values()) for row in observed["coefficients"].values())
    assert total == pytest.approx(1)


def test_doge_refuses_sharded_weights(data, tmp_path, capsys):
    assert run(data, tmp_path / "run", **FEW, mixing__method="doge", train__fsdp="full_shard") == 2
    assert capsys.readouterr().err.startswith("error: train.fsdp: doge ")


def test_doremi_on_two_processes(data, tmp_path, quick):
    """The whole of it, the reference model's losses included: as one process finds it, to float32's rounding."""
    done = run_on_ranks(data, tmp_path / "two", **FEW, mixing__method="doremi")
    assert done.returncode == 0, done.stderr[-3000:]
    assert run(data, tmp_path / "one", **FEW, mixing__method="doremi") == 0
    one, two = (drawn(tmp_path / name, 1) for name in ("one", "two"))
    assert one["rows"] == two["rows"] and one["shares"] == pytest.approx(two["shares"], rel=1e-3)
    for name in ("one", "two"):
        assert not [*(tmp_path / name).glob("round_*/model")], "no model stays that was read once"
