"""Makes the demo's base model: a tiny Llama that has read about the demo's world, but was never asked.

    python -m ideal.demo.base_model [FOLDER]

It learns plain language modelling on endless sentences with the words, the numbers' order and the
syntax of the demo's domains, without any question followed by its answer. Seeded; about four
minutes on one core. The result stands in ideal/demo/base_model/.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ideal.demo.domains import (
    CAPABILITIES,
    HARMFUL,
    HARMLESS,
    LARGEST,
    NAMES,
    THINGS,
    VARIABLES,
    draw,
    one_of,
    pick,
)
from ideal.seeding import generator

FOLDER = Path(__file__).parent / "base_model"
SEED = 2
CONTEXT = 64
VOCABULARY = 256
STEPS, BATCH, LEARNING_RATE = 5000, 32, 4e-3

PAD, UNKNOWN, END, USER, ASSISTANT, SYSTEM = SPECIAL = [
    "<|pad|>",
    "<|unknown|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def document(random: np.random.Generator) -> str:
    """A few sentences about the same people, things and numbers; no question is answered in it."""
    name, other, last = pick(random, NAMES, 3)
    thing, another, third = pick(random, THINGS, 3)
    x, y, z = pick(random, VARIABLES, 3)
    one, two, three = (int(i) for i in random.integers(LARGEST + 1, size=3))
    kind = random.integers(7)
    if kind == 0:  # the same facts in several wordings: what was said is looked up and copied
        sentences = []
        for n, k, t in [(name, one, thing), (other, two, another)]:
            wordings = [f"{n} owns {k} {t}.", f"{k} {t}, {n}.", f"the {k} {t} of {n}.", f"{n}: {t}, {k}."]
            sentences += pick(random, [*wordings, f"{k} more {t}: {n}."], 4)
    elif kind <= 2:  # counting in steps: what numbers are
        return " ".join(count(random) for _ in range(5))
    elif kind == 3:
        sentences = [f"{x}={one};", f"{y}=[{two},{three}];", f"{z}={x};", f"print({y}[1]);", f"{x}={one};"]
        sentences += [f"print({x});", f"{z}={x}={one};", f"{y}=[{two},{three}];"]
    elif kind == 4:
        sentences = [f"{name} is older than {other}.", f"{other} is older than {last}.", f"{name} is {one}."]
        sentences += [f"{other} is younger than {name}.", f"{last} is {two}.", f"{other} is {three}."]
        sentences += [f"{last} is {two}, so {last} is {two}.", f"{name} is {one}, so {name} is {one}."]
    elif kind == 5:
        words = [name, other, last] if random.random() < 0.5 else [thing, another, third]
        orders = [words, [words[i] for i in random.permutation(3)]] * 4
        return " ".join(f"{', '.join(order)}." for order in orders)
    else:
        verb = one_of(random, HARMFUL + HARMLESS)
        sentences = [f"may {name} {verb} the {thing} of {other}?", f"{verb} {other}'s {thing};"]
        sentences += [f"help {name} {verb} {other}'s {thing}.", f"{other}'s {thing}."]
        cases = random.integers(LARGEST + 1, size=(4, 3))
        sentences += [f"case {', '.join(str(number) for number in case)}." for case in cases]
    return " ".join(sentences[i] for i in random.permutation(len(sentences)))


def count(random: np.random.Generator) -> str:
    """Numbers in equal steps, up or down."""
    step, start = int(random.integers(1, 10)), int(random.integers(LARGEST + 1))
    if random.random() < 0.5:
        word, numbers = one_of(random, ["plus", "more", "+"]), range(start, LARGEST + 1, step)
    else:
        word, numbers = one_of(random, ["minus", "less", "-"]), range(start, -1, -step)
    return f"{step} {word}: {', '.join(str(number) for number in numbers[:5])}."


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding of single digits, ASCII characters and this world's words, with a chat template."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Digits(individual_digits=False)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    alphabet = [character for character, _ in pre_tokenizers.ByteLevel().pre_tokenize_str(" \n")]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=[chr(i) for i in range(33, 127)] + [c for piece in alphabet for c in piece],
        show_progress=False,
    )

    def lines() -> Iterator[str]:
        for name in CAPABILITIES:
            for example in draw(name, 1000, generator(SEED, "tokenizer", name)):
                yield example.prompt
                yield example.answer

    tokenizer.train_from_iterator(lines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 3 layers and about 140 thousand parameters, at random."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Plain language modelling; returns the mean loss of the last hundred steps."""
    random = generator(SEED, "text")
    documents = [document(random) for _ in range(STEPS * BATCH // 2)]
    batches = tokenizer(documents, padding="max_length", truncation=True, return_tensors="pt")
    windows, masks = batches["input_ids"], batches["attention_mask"].bool()
    order = generator(SEED, "order")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - step / STEPS)
    )
    losses = []
    model.train()
    for step in range(STEPS):
        rows = order.integers(len(windows), size=BATCH)
        labels = windows[rows].masked_fill(~masks[rows], -100)
        loss = model(input_ids=windows[rows], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"step {step + 1} of {STEPS}: loss {np.mean(losses[-100:]):.3f}", flush=True)
    return float(np.mean(losses[-100:]))


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    torch.set_num_threads(1)  # the sums' order, and so the result, depends on it
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    pretrain(model, tokenizer)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    print(f"{model.num_parameters()} parameters, {len(tokenizer)} tokens: {folder}")


if __name__ == "__main__":
    main()
