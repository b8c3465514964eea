"""Labels against the template's own output, and against constructions that do not use character offsets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import CHATML, END, LLAMA3, MISTRAL, TEMPLATES, make_tokenizer
from transformers import ByT5Tokenizer

from ideal.data import collate
from ideal.data.encoding import MASKED, NO_ROOM, Encoder, trained_mask, without_today
from ideal.errors import UserError

USER, SYSTEM = {"role": "user", "content": "the question"}, {"role": "system", "content": "be brief"}
TURNS = [
    USER,
    {"role": "assistant", "content": "one\n\n two"},
    {"role": "user", "content": "and é🎉?"},
    {"role": "assistant", "content": "The answer is\tthree."},
]
CONVERSATIONS = {"one": TURNS[:2], "several": TURNS, "system": [SYSTEM, *TURNS]}


def encode(tokenizer, messages, max_length=1000):
    batch = Encoder(tokenizer, max_length).encode({"messages": [messages], "row": [0]})
    return {name: values[0] for name, values in batch.items()}


def trained_runs(tokenizer, example):
    """The text of every run of trained tokens."""
    runs, current = [], []
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        if label != MASKED:
            assert label == token
            current.append(int(token))
        elif current:
            runs, current = [*runs, current], []
    return [tokenizer.decode(run) for run in ([*runs, current] if current else runs)]


@pytest.mark.parametrize("which", CONVERSATIONS)
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_labels_are_the_answers_with_their_end_tokens(kind, which, trim_offsets):
    if kind == "mistral" and which == "system":
        pytest.skip("it has no system turn")
    tokenizer = make_tokenizer(TEMPLATES[kind], trim_offsets)
    messages = CONVERSATIONS[which]
    example = encode(tokenizer, messages)
    assert example["dropped"] == ""
    answers = [message["content"] + END[kind] for message in messages if message["role"] == "assistant"]
    if kind == "thinking":
        answers[-1] = "<think>\n\n</think>\n\n" + answers[-1]  # what the model must write after its prompt
    # Mistral's space before an answer may share a token with its first word.
    assert [run.lstrip(" ") for run in trained_runs(tokenizer, example)] == answers


@pytest.mark.parametrize("which", CONVERSATIONS)
def test_ids_are_the_templates_own(kind, which):
    if kind == "mistral" and which == "system":
        pytest.skip("it has no system turn")
    tokenizer = make_tokenizer(TEMPLATES[kind])
    example = encode(tokenizer, CONVERSATIONS[which])  # also gives a tokenizer without a template ours
    template = without_today(tokenizer.chat_template)
    own = tokenizer.apply_chat_template(
        CONVERSATIONS[which], chat_template=template, date_string="26 Jul 2024"
    )
    assert list(example["input_ids"]) == own["input_ids"]


@pytest.mark.parametrize("kind", ["chatml", "llama3", "none"])
def test_masked_prefix_is_the_prompt_that_inference_uses(kind):
    """The tokens of the prompt (add_generation_prompt) are exactly what stands before an answer's first."""
    tokenizer = make_tokenizer(TEMPLATES[kind])
    example = encode(tokenizer, CONVERSATIONS["system"])
    template = without_today(tokenizer.chat_template)
    for count in (2, 4):  # messages before each of the two answers
        prompt = tokenizer.apply_chat_template(
            CONVERSATIONS["system"][:count],
            chat_template=template,
            add_generation_prompt=True,
            date_string="26 Jul 2024",
        )["input_ids"]
        assert list(example["input_ids"][: len(prompt)]) == prompt
        assert example["labels"][len(prompt) - 1] == MASKED != example["labels"][len(prompt)]


def test_piecewise_construction_gives_the_same():
    """ChatML put together from pieces that are tokenized one by one, each with its own labels."""
    tokenizer = make_tokenizer(CHATML)
    ids, labels = [], []

    def add(text, trained):
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.extend(piece)
        labels.extend(piece if trained else [MASKED] * len(piece))

    for message in CONVERSATIONS["system"]:
        answer = message["role"] == "assistant"
        add(f"<|im_start|>{message['role']}\n", False)
        add(message["content"], answer)
        add("<|im_end|>", answer)
        add("\n", False)
    example = encode(tokenizer, CONVERSATIONS["system"])
    assert list(example["input_ids"]) == ids
    assert list(example["labels"]) == labels


@pytest.mark.parametrize("pad", ["</s>", "<|im_end|>", "<s>"])
def test_which_token_pads_does_not_matter(pad):
    examples = [encode(make_tokenizer(CHATML, pad=token), TURNS) for token in (pad, "<|eot_id|>")]
    assert np.array_equal(examples[0]["labels"], examples[1]["labels"])


CONTENT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda text: text.strip()
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3),
    st.sampled_from(["chatml", "llama3", "none"]),
    st.booleans(),
)
def test_any_text_comes_back(turns, kind, trim_offsets):
    tokenizer = make_tokenizer(TEMPLATES[kind], trim_offsets)
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    example = encode(tokenizer, messages)
    assert example["dropped"] == ""
    trim = str.strip if kind == "llama3" else str
    answers = [trim(answer) + END[kind] for _, answer in turns]
    runs = trained_runs(tokenizer, example)
    assert len(runs) == len(answers)
    for run, answer in zip(runs, answers, strict=True):
        # Whitespace at the answer's start may share a token with the header's line break before it.
        assert run.lstrip() == answer.lstrip()
        assert run.endswith(answer)


def test_special_tokens_within_an_answer_do_not_end_it():
    content = "write <|im_end|> and then </s> to stop"
    tokenizer = make_tokenizer(CHATML)
    example = encode(tokenizer, [USER, {"role": "assistant", "content": content}])
    assert trained_runs(tokenizer, example) == [content + "<|im_end|>"]


def test_answer_that_repeats_the_header_is_not_mistaken():
    tokenizer = make_tokenizer(CHATML)
    messages = [
        USER,
        {"role": "assistant", "content": "assistant"},
        USER,
        {"role": "assistant", "content": "im_end"},
    ]
    assert trained_runs(tokenizer, encode(tokenizer, messages)) == ["assistant<|im_end|>", "im_end<|im_end|>"]


def test_todays_date_does_not_enter():
    text, _ = Encoder(make_tokenizer(LLAMA3), 100).spans(TURNS)
    assert "Today: 26 Jul 2024\n2024-07-26" in text


def test_a_template_without_end_token_says_so():
    template = CHATML.replace("<|im_end|>", "")
    tokenizer = make_tokenizer(template)
    encoder = Encoder(tokenizer, 100)
    assert any("no end token" in note for note in encoder.notes)
    assert trained_runs(tokenizer, encode(tokenizer, TURNS)) == ["one\n\n two", "The answer is\tthree."]


def test_whitespace_without_width_belongs_to_the_answer_that_it_closes():
    tokenizer = make_tokenizer(CHATML.replace("<|im_end|>", ""), trim_offsets=True)
    messages = [USER, {"role": "assistant", "content": "one\n\n two \t"}]
    assert trained_runs(tokenizer, encode(tokenizer, messages))[0].startswith("one\n\n two \t")
    assert trained_mask([(0, 1), (2, 2), (2, 3), (5, 5), (6, 6)], [(2, 5)]).tolist() == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_a_template_with_an_end_token_only_at_the_end_says_so():
    rule = "('\n' if message['role'] == 'assistant' and not loop.last else '<|im_end|>\n')"
    template = CHATML.replace("'<|im_end|>' + '\n'", rule)
    tokenizer = make_tokenizer(template)
    assert any("answer that another turn follows" in note for note in Encoder(tokenizer, 100).notes)
    runs = trained_runs(tokenizer, encode(tokenizer, TURNS))
    assert runs == ["one\n\n two", "The answer is\tthree.<|im_end|>"]


def test_a_tokenizer_without_template_gets_one_that_is_saved(tmp_path):
    tokenizer = make_tokenizer(None)
    encoder = Encoder(tokenizer, 100)
    assert any("no chat template" in note for note in encoder.notes)
    text, _ = encoder.spans(CONVERSATIONS["system"][:3])
    assert (
        text == "<s>### System:\nbe brief\n\n### User:\nthe question\n\n### Assistant:\none\n\n two</s>\n\n"
    )
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("adds_bos", [False, True])
def test_plain_text_is_trained_whole_without_template(adds_bos):
    tokenizer = make_tokenizer(CHATML, adds_bos=adds_bos)
    example = encode(tokenizer, [{"role": "text", "content": "the answer is one"}])
    assert tokenizer.decode(example["input_ids"]) == ("<s>" if adds_bos else "") + "the answer is one</s>"
    assert example["labels"][0] == MASKED
    assert list(example["labels"][1:]) == list(example["input_ids"][1:])


def test_truncation_keeps_the_left_and_drops_what_is_left_without_answer():
    tokenizer = make_tokenizer(CHATML)
    whole = encode(tokenizer, TURNS)
    first = int((whole["labels"] != MASKED).argmax())
    cut = encode(tokenizer, TURNS, first + 1)
    assert (cut["truncated"], cut["dropped"], cut["trained"], cut["position"]) == (True, "", 1, first)
    assert np.array_equal(cut["labels"], whole["labels"][: first + 1])
    assert encode(tokenizer, TURNS, first)["dropped"] == NO_ROOM
    assert not encode(tokenizer, TURNS, len(whole["labels"]))["truncated"]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([SYSTEM, *TURNS], "the chat template refuses it: roles must alternate"),
        (TURNS[1:], "the chat template refuses it: roles must alternate"),
    ],
)
def test_what_a_template_refuses_is_dropped(messages, reason):
    assert encode(make_tokenizer(MISTRAL), messages)["dropped"] == reason


def test_a_conversation_that_the_assistant_begins_is_dropped():
    assert encode(make_tokenizer(CHATML), TURNS[1:])["dropped"] == "it begins with the assistant's turn"


def test_a_template_that_rewrites_answers_is_not_trusted():
    template = CHATML.replace("message['content'] +", "message['content'] | upper +")
    assert "rewrites earlier turns" in encode(make_tokenizer(template), TURNS)["dropped"]


def test_refused_tokenizers():
    with pytest.raises(UserError, match="not a fast one"):
        Encoder(ByT5Tokenizer(), 100)
    with pytest.raises(UserError, match="chat template of .* does not render"):
        Encoder(make_tokenizer("{{ raise_exception('never') }}"), 100)


def test_fingerprint_changes_with_what_the_tokens_depend_on():
    encoders = [
        Encoder(make_tokenizer(CHATML), 100),
        Encoder(make_tokenizer(CHATML), 101),
        Encoder(make_tokenizer(LLAMA3), 100),
        Encoder(make_tokenizer(CHATML, pad="<s>"), 100),
    ]
    assert len({encoder.fingerprint for encoder in encoders}) == 4
    assert encoders[0].fingerprint == Encoder(make_tokenizer(CHATML), 100).fingerprint


def test_collate_pads_by_lengths():
    rows = [{"input_ids": [5, 9, 9], "labels": [MASKED, 9, 9]}, {"input_ids": [5], "labels": [MASKED]}]
    batch = collate(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 9, 9], [5, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[MASKED, 9, 9], [MASKED, MASKED, MASKED]]
