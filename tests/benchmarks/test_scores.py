"""Which of the harness' numbers counts, on results written by hand in the form in which the harness returns them."""

import pytest

from ideal.benchmarks.scores import benchmark, harness_name, score_key


def test_names_for_models_with_and_without_a_chat_template() -> None:
    assert harness_name("humaneval", chat=True) == "humaneval_instruct"
    assert harness_name("humaneval", chat=False) == "humaneval"
    assert harness_name("truthfulqa", chat=True) == "truthfulqa_mc2"
    assert harness_name("one_of_mine", chat=True) == "one_of_mine"


def test_the_number_that_counts() -> None:
    strict_first = {"alias": "x", "exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.4}
    assert score_key("gsm8k", strict_first) == "exact_match,flexible-extract"
    assert score_key("one_of_mine", strict_first) == "exact_match,strict-match", "its first"
    assert score_key("arc_challenge", {"acc,none": 0.5, "acc_norm,none": 0.6}) == "acc_norm,none"
    # The instruct variant's filter has another name.
    assert score_key("mbpp", {"pass_at_1,extract_code": 0.2}) == "pass_at_1,extract_code"
    assert score_key("one_of_mine", {"f1_stderr,none": 0.1, "f1,none": 0.7}) == "f1,none"
    assert score_key("one_of_mine", {"alias": "x", "sample_len": 3, "acc,none": "N/A"}) is None
    assert score_key("gsm8k", {"acc,none": 0.3}) is None, "another number must not pass for the one that is meant"


def test_a_single_task() -> None:
    results = {
        "results": {"gsm8k": {"alias": "gsm8k", "sample_len": 20, "exact_match,strict-match": 0.0,
                              "exact_match_stderr,strict-match": 0.0, "exact_match,flexible-extract": 0.25,
                              "exact_match_stderr,flexible-extract": 0.1}},
        "higher_is_better": {"gsm8k": {"exact_match": True}},
        "n-samples": {"gsm8k": {"original": 1319, "effective": 20}},
        "versions": {"gsm8k": 3.0},
    }  # fmt: skip
    found = benchmark("gsm8k", "gsm8k", results, {"limit": 20}, 7.5)
    assert (found["score"], found["error"], found["rows"], found["seconds"]) == (0.25, 0.1, 20, 7.5)
    assert found["settings"] == {"limit": 20, "task": "gsm8k", "version": 3.0} and found["higher_is_better"]
    assert "sample_len" not in found["metrics"] and found["metrics"]["exact_match,strict-match"] == 0.0


def test_a_group_counts_the_rows_of_its_parts() -> None:
    """A group's aggregate stands under "groups"; its rows are those of the tasks in it."""
    whole = {"alias": "bbh", "exact_match,get-answer": 0.5, "exact_match_stderr,get-answer": "N/A"}
    results = {
        "results": {"bbh": whole, "bbh_a": {"exact_match,get-answer": 1.0}, "bbh_b": {"exact_match,get-answer": 0.25}},
        "groups": {"bbh": whole},
        "n-samples": {"bbh_a": {"effective": 10}, "bbh_b": {"effective": 20}},
    }
    found = benchmark("bbh", "bbh", results, {}, 1.0)
    assert (found["score"], found["error"], found["rows"]) == (0.5, None, 30)


def test_lower_may_be_better_and_a_result_without_a_number_is_refused() -> None:
    results = {
        "results": {"wiki": {"word_perplexity,none": 12.0}},
        "higher_is_better": {"wiki": {"word_perplexity": False}},
        "n-samples": {"wiki": {"effective": 2}},
    }
    assert not benchmark("wiki", "wiki", results, {}, 1.0)["higher_is_better"]
    with pytest.raises(ValueError, match="no score for empty"):
        benchmark("empty", "empty", {"results": {"empty": {"alias": "empty"}}}, {}, 1.0)
