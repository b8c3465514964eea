"""Answers and likelihoods against one row at a time, without cache, padding or `generate`; one rank and two."""

import json
from typing import Any

import answering_ranks
import processes
import pytest
import torch
from answering_ranks import END, MOST, PAD, adapted, measured
from transformers import LlamaConfig, LlamaForCausalLM

from ideal.answering import greedy_answers, up_to_end

CONTEXT = 24


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, initializer_range=0.5, max_position_embeddings=CONTEXT, **shape)
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    """Prompts of very different lengths, an odd number of them; the last but one nearly fills the context, the last
    does. Examples with one to many tokens that count."""
    random = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(6, 40, (count,), generator=random).tolist()

    prompts = [tokens(count) for count in (3, 9, 1, 6, 2, 14, 5, 4, CONTEXT - 2, CONTEXT, CONTEXT + 1)]
    examples = []
    for length, trained in ((4, 1), (9, 5), (12, 11), (3, 2), (7, 1)):
        ids = tokens(length)
        examples.append({"input_ids": ids, "labels": [-100] * (length - trained) + ids[length - trained :]})
    return {"prompts": prompts, "examples": examples}


def answer_by_hand(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    """The whole sequence again for every token."""
    ids = list(prompt)
    while len(ids) - len(prompt) < MOST and len(ids) < CONTEXT:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in END:
            break
        ids.append(token)
    return ids[len(prompt) :]


def mean_by_hand(model: torch.nn.Module, example: dict[str, list[int]]) -> float:
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([example["input_ids"]])).logits[0].log_softmax(-1)
    found = [float(logs[place - 1, label]) for place, label in enumerate(example["labels"]) if label != -100]
    return sum(found) / len(found)


def expected(model: torch.nn.Module, cases: dict[str, Any]) -> dict[str, dict[int, Any]]:
    return {
        "answers": {row: answer_by_hand(model, prompt) for row, prompt in enumerate(cases["prompts"])},
        "means": {row: pytest.approx(mean_by_hand(model, e)) for row, e in enumerate(cases["examples"])},
    }


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_one_row_at_a_time_gives_the_same(model, cases, batch_size):
    wanted = expected(model, cases)
    lengths = {len(answer) for answer in wanted["answers"].values()}
    assert {0, 2, MOST} <= lengths and len(lengths) > 3, "some end early, some where the context ends"
    assert measured(model, cases, batch_size) == wanted


def test_a_checkpoints_own_settings_are_not_used(model, cases, caplog, recwarn):
    plain = measured(model, cases, 3)
    own = model.generation_config
    settings = {"do_sample": True, "temperature": 5.0, "top_p": 0.3, "top_k": 3, "repetition_penalty": 9.0}
    settings |= {"max_length": 2, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(6, 39)), "eos_token_id": 7}
    for key, value in settings.items():
        setattr(own, key, value)
    try:
        model.train()
        assert measured(model, cases, 3) == plain
        assert model.generation_config is own and own.temperature == 5.0 and model.training
    finally:
        model.eval()
        model.generation_config = type(own)()
    assert not caplog.records and not [w for w in recwarn if "generat" in str(w.message)]


def test_padding_may_be_an_end_token(model, cases):
    options: dict[str, Any] = {"most": MOST, "batch_size": 4, "end_ids": END, "description": ""}
    with_end = greedy_answers(model, cases["prompts"], pad_id=END[0], **options)
    assert with_end == greedy_answers(model, cases["prompts"], pad_id=PAD, **options)
    assert greedy_answers(model, [], pad_id=PAD, **options) == {}


def test_up_to_end():
    assert up_to_end([7, 8, 5, 9, 2], END) == [7, 8] and up_to_end([7], END) == [7] and up_to_end([2], END) == []


def test_two_ranks_give_the_same(model, cases, tmp_path):
    """Also where they share the weights, and so take part in each other's forward passes."""
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    processes.run(answering_ranks.on_rank, tmp_path, ranks=2)
    plain = expected(model, cases)
    changed = expected(adapted(LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)), cases)
    assert changed["answers"] != plain["answers"]
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for kind, wanted in (("whole", plain), ("sharded", plain), ("adapted", changed)):
            numbered = {part: {int(row): value for row, value in rows.items()} for part, rows in found[kind].items()}
            assert numbered == wanted, kind
