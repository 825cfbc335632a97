# SPDX-License-Identifier: MIT
"""Make the embedded default: a small chat model, and preference pairs sampled from it.

    python data/tiny/make_tiny.py                  # writes model, train.jsonl and eval.jsonl here
    python data/tiny/make_tiny.py --out FOLDER     # or somewhere else

It is the pipeline of the AlphaPO and SimPO papers in miniature: a supervised model, five responses
per prompt sampled from that model, scores by the judge beside this file, and the best response
against the worst.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from judge import VERBS, as_messages, judge, sample
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TINY = Path(__file__).resolve().parent
SEED = 42
TRAIN_PAIRS, EVAL_PAIRS, RESPONSES = 2000, 300, 5
SFT_STEPS, SFT_BATCH, SFT_LEARNING_RATE = 1400, 64, 3e-3
SPOILT, CHATTY = 0.3, 0.5  # shares of the supervised answers, for alignment to repair

ANIMALS = (
    "fox owl bear mouse horse duck goat wolf crab frog sheep tiger zebra whale eagle otter"
).split()
THINGS = (
    "table lamp chair spoon clock brush glass ladder "
    "bottle mirror candle basket pillow hammer pencil bucket"
).split()
OTHERS = (
    "garden river winter music island window "
    "market summer forest bridge letter silver planet yellow button cotton"
).split()
WORDS = ANIMALS + THINGS + OTHERS
PLACES = (
    "near the river|in the garden|on the hill|under the bridge|by the sea|"
    "in the snow|at night|all day|behind the barn"
).split("|")
OPENERS = (
    "Sure, here it is:|Of course, I can do that for you:|Let me think about it. I would say:|"
    "Thank you for the question. The answer is:|That is a good one. Here you go:"
).split("|")
CLOSERS = (
    "I hope that this helps you.|Is there anything else you want?|Please ask me again at any time.|"
    "This was fun to do for you.|Have a very nice day."
).split("|")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# ---------------------------------------------------------------- tasks


def make_task(rng):
    """A random request as (kind, prompt, units); units joined by spaces are the right answer."""
    kind = rng.choice(["sort", "count", "spell", "backwards", "repeat", "pick", "plus", "write"])
    if kind == "sort":
        numbers = rng.sample(range(1, 100), rng.randint(3, 6))
        prompt = f"Sort from small to large: {' '.join(map(str, numbers))}"
        units = [str(number) for number in sorted(numbers)]
    elif kind == "count":
        first = rng.randint(1, 88)
        length = rng.randint(3, 11)
        units = [str(number) for number in range(first, first + length)]
        prompt = f"Count from {first} to {units[-1]}."
    elif kind == "spell":
        words = rng.sample(WORDS, 2)
        prompt = f"Spell the words {words[0]} and {words[1]}."
        units = ["-".join(word) for word in words]
    elif kind == "backwards":
        words = rng.sample(WORDS, rng.randint(3, 6))
        prompt = f"Say these words backwards: {' '.join(words)}"
        units = words[::-1]
    elif kind == "repeat":
        words = rng.sample(WORDS, rng.randint(1, 2))
        times = rng.randint(2, 6)
        prompt = f"Say {' '.join(words)} {times} times."
        units = words * times
    elif kind == "pick":
        words = rng.sample(ANIMALS, rng.randint(2, 4)) + rng.sample(THINGS, rng.randint(1, 4))
        rng.shuffle(words)
        prompt = f"Which of these are animals? {' '.join(words)}"
        units = [word for word in words if word in ANIMALS]
    elif kind == "plus":
        a = rng.randint(1, 99)
        b = rng.randint(1, 99)
        prompt = f"What is {a} plus {b}?"
        units = [str(a), "plus", str(b), "is", str(a + b)]
    else:
        subject = rng.choice(WORDS)
        length = rng.randint(1, 5)
        endings = rng.sample([(verb, place) for verb in VERBS for place in PLACES], length)
        plural = "sentence" if length == 1 else "sentences"
        adjective = rng.choice(["short", "simple", "little", "quiet", "happy", "strange"])
        prompt = f"Write {length} {adjective} {plural} about the {subject}."
        units = [f"The {subject} {verb} {place}." for verb, place in endings]
    return kind, prompt, units


def spoil(rng, units, others):
    """Put one to three mistakes into an answer, some of them with units from `others`."""
    units = list(units)
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(units))
        mistake = rng.choice(["drop", "double", "swap", "replace", "extra"])
        if mistake == "drop" and len(units) > 1:
            del units[i]
        elif mistake == "double":
            units.insert(i, units[i])
        elif mistake == "swap" and i > 0:
            units[i - 1], units[i] = units[i], units[i - 1]
        elif mistake == "replace":
            units[i] = rng.choice(others)
        else:
            units.append(rng.choice(others))
    return units


# ---------------------------------------------------------------- supervised model


def make_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
    )


def supervised_examples(rng, count, held_out):
    """Random (prompt, answer) texts, some of them spoilt or chatty, no prompt in held_out."""
    recent = {}  # the units of the last task of each kind
    examples = []
    while len(examples) < count:
        kind, prompt, units = make_task(rng)
        if prompt in held_out:
            continue
        others = recent.get(kind, units)
        recent[kind] = units
        words = spoil(rng, units, others) if rng.random() < SPOILT else units
        if rng.random() < CHATTY:
            opener, closer = rng.choice([(1, 0), (0, 1), (1, 1)])
            words = [rng.choice(OPENERS)] * opener + words + [rng.choice(CLOSERS)] * closer
        examples.append((prompt, " ".join(words)))
    return examples


def train_supervised(model, tokenizer, examples):
    """Next-token training on the answers alone: one pass over the examples, cosine schedule."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=SFT_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, SFT_LEARNING_RATE, total_steps=SFT_STEPS, pct_start=0.05
    )
    start = time.perf_counter()
    for step in range(SFT_STEPS):
        rows = []
        starts = []  # where the answer begins in each row
        for prompt, answer in examples[step * SFT_BATCH : (step + 1) * SFT_BATCH]:
            text = tokenizer.apply_chat_template(
                as_messages(prompt), tokenize=False, add_generation_prompt=True
            )
            starts.append(len(tokenizer(text)["input_ids"]))
            rows.append(tokenizer(text + answer + "<|im_end|>")["input_ids"])
        width = max(map(len, rows))
        input_ids = torch.tensor(
            [row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]
        )
        labels = input_ids.clone()
        for row, (tokens, first) in enumerate(zip(rows, starts, strict=True)):
            labels[row, :first] = -100
            labels[row, len(tokens) :] = -100
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 99:
            seconds = time.perf_counter() - start
            print(f"step {step + 1}/{SFT_STEPS}: loss {loss:.3f}, {seconds:.0f} s", flush=True)


# ---------------------------------------------------------------- pairs


def make_pairs(model, tokenizer, tasks, count):
    """Best of five responses against the worst, for the first `count` tasks where they differ."""
    pairs = []
    for first in range(0, len(tasks), 500):
        batch = tasks[first : first + 500]
        prompts = [prompt for _, prompt, _ in batch]
        answers = sample(model, tokenizer, prompts, RESPONSES)
        for (kind, prompt, units), sampled in zip(batch, answers, strict=True):
            reference = " ".join(units)
            texts = [text for text, _ in sampled if text.strip()]
            scored = sorted((judge(kind, reference, text), text) for text in texts)
            if not scored:
                continue
            (worst_score, worst), (best_score, best) = scored[0], scored[-1]
            if worst_score == best_score:
                continue
            pair = {
                "prompt": as_messages(prompt),
                "chosen": [{"role": "assistant", "content": best}],
                "rejected": [{"role": "assistant", "content": worst}],
                "kind": kind,
                "reference": reference,
                "scores": [round(best_score, 3), round(worst_score, 3)],
            }
            pairs.append(pair)
        print(f"{len(pairs)} pairs from {first + len(batch)} prompts", flush=True)
        if len(pairs) >= count:
            return pairs[:count]
    raise SystemExit(f"only {len(pairs)} of {count} pairs: the responses are too often alike")


def make(out):
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    tasks = []
    seen = set()
    while len(tasks) < 2 * (TRAIN_PAIRS + EVAL_PAIRS):
        task = make_task(rng)
        if task[1] not in seen:
            seen.add(task[1])
            tasks.append(task)
    examples = supervised_examples(rng, SFT_STEPS * SFT_BATCH, seen)
    texts = [text for example in examples[:20000] for text in (*example, "user", "assistant")]
    tokenizer = make_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=144,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train_supervised(model, tokenizer, examples)
    model = model.bfloat16().float()  # sample from the weights as they are written
    pairs = make_pairs(model, tokenizer, tasks, TRAIN_PAIRS + EVAL_PAIRS)
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    for name, rows in (("eval.jsonl", pairs[:EVAL_PAIRS]), ("train.jsonl", pairs[EVAL_PAIRS:])):
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=TINY, help="where to write model and pairs")
    out = parser.parse_args().out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"make_tiny: --out {out}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    make(out)


if __name__ == "__main__":
    main()
