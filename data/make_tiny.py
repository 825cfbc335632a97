# SPDX-License-Identifier: MIT
"""Make the embedded default: a small chat model, and preference pairs sampled from it and judged by a program.

    python data/make_tiny.py              # writes data/tiny, data/train.jsonl and data/eval.jsonl
    python data/make_tiny.py judge OUT    # judge what the model in OUT answers to the held-out prompts

It is the pipeline of the AlphaPO and SimPO papers in miniature: a supervised model, five responses a prompt sampled
from that model, a judge that scores them, the best against the worst. The judge is a program instead of a reward
model, so whether the alignment worked can be measured exactly and for nothing.
"""

import argparse
import difflib
import json
import math
import random
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

DATA = Path(__file__).parent
SEED = 42
TRAIN_PAIRS, EVAL_PAIRS, RESPONSES = 2000, 300, 5
SFT_STEPS, SFT_BATCH, SFT_LEARNING_RATE = 1400, 64, 3e-3
SPOILT, CHATTY = 0.3, 0.5  # shares of the supervised answers: what alignment is to mend

ANIMALS = "fox owl bear mouse horse duck goat wolf crab frog sheep tiger zebra whale eagle otter".split()
THINGS = (
    "table lamp chair spoon clock brush glass ladder bottle mirror candle basket pillow hammer pencil bucket"
).split()
OTHERS = (
    "garden river winter music island window"
    " market summer forest bridge letter silver planet yellow button cotton"
).split()
VERBS = "sleeps sings waits plays hides rests dances jumps swims dreams".split()
PLACES = (
    "near the river,in the garden,on the hill,under the bridge,by the sea,"
    "in the snow,at night,all day,behind the barn"
)
OPENERS = (
    "Sure, here it is:|Of course, I can do that for you:|Let me think about it. I would say:|"
    "Thank you for the question. The answer is:|That is a good one. Here you go:"
).split("|")
CLOSERS = (
    "I hope that this helps you.|Is there anything else you want?|Please ask me again at any time.|"
    "This was fun to do for you.|Have a very nice day."
).split("|")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# ---------------------------------------------------------------- tasks and judge


def make_task(rng):
    """A random request as (kind, prompt, units): joined with spaces, the units are the perfect answer."""
    kind = rng.choice(["sort", "count", "spell", "backwards", "repeat", "pick", "plus", "write"])
    if kind == "sort":
        numbers = rng.sample(range(1, 100), rng.randint(3, 6))
        return (
            kind,
            f"Sort from small to large: {' '.join(map(str, numbers))}",
            [str(n) for n in sorted(numbers)],
        )
    if kind == "count":
        first, length = rng.randint(1, 88), rng.randint(3, 11)
        numbers = [str(n) for n in range(first, first + length)]
        return kind, f"Count from {first} to {numbers[-1]}.", numbers
    if kind == "spell":
        words = rng.sample(ANIMALS + THINGS + OTHERS, 2)
        return kind, f"Spell the words {words[0]} and {words[1]}.", ["-".join(word) for word in words]
    if kind == "backwards":
        words = rng.sample(ANIMALS + THINGS + OTHERS, rng.randint(3, 6))
        return kind, f"Say these words backwards: {' '.join(words)}", words[::-1]
    if kind == "repeat":
        words, times = rng.sample(ANIMALS + THINGS + OTHERS, rng.randint(1, 2)), rng.randint(2, 6)
        return kind, f"Say {' '.join(words)} {times} times.", words * times
    if kind == "pick":
        words = rng.sample(ANIMALS, rng.randint(2, 4)) + rng.sample(THINGS, rng.randint(1, 4))
        rng.shuffle(words)
        return (
            kind,
            f"Which of these are animals? {' '.join(words)}",
            [word for word in words if word in ANIMALS],
        )
    if kind == "plus":
        a, b = rng.randint(1, 99), rng.randint(1, 99)
        return kind, f"What is {a} plus {b}?", [str(a), "plus", str(b), "is", str(a + b)]
    animal, length = rng.choice(ANIMALS + THINGS + OTHERS), rng.randint(1, 5)
    ends = rng.sample([(verb, place) for verb in VERBS for place in PLACES.split(",")], length)
    plural = "sentence" if length == 1 else "sentences"
    adjective = rng.choice(["short", "simple", "little", "quiet", "happy", "strange"])
    return (
        kind,
        f"Write {length} {adjective} {plural} about the {animal}.",
        [f"The {animal} {verb} {place}." for verb, place in ends],
    )


def judge(kind, reference, response):
    """Score a response between 0 and 1, with partial credit.

    For most requests it is the similarity of the words (for spelling, of the letters) to those of the reference. For
    "write" the reference only says how many sentences and about what: each good one counts, copies and extra ones cost.
    """
    if kind == "write":
        asked, subject = reference.count("."), reference.split()[1]
        sentences = [sentence.split() for sentence in response.split(".") if sentence.strip()]
        good = {
            " ".join(s) for s in sentences if 4 <= len(s) <= 7 and s[:2] == ["The", subject] and s[2] in VERBS
        }
        finished = response.rstrip().endswith(".")
        return min(len(good), asked) / max(len(sentences), asked) * (1.0 if finished else 0.8)
    split = (lambda text: re.findall(r"\S", text)) if kind == "spell" else str.split
    return difflib.SequenceMatcher(None, split(response), split(reference), autojunk=False).ratio()


def spoil(rng, units, others):
    """Return the answer with one to three mistakes: left out, said twice, swapped, replaced, or gone on with."""
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
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
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
    """Random (prompt, answer) texts, a share of them spoilt, none with a prompt of the preference data."""
    recent, examples = {}, []
    while len(examples) < count:
        kind, prompt, units = make_task(rng)
        if prompt in held_out:
            continue
        others, recent[kind] = recent.get(kind, units), units
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
        rows, starts = [], []
        for prompt, answer in examples[step * SFT_BATCH : (step + 1) * SFT_BATCH]:
            text = tokenizer.apply_chat_template(
                as_messages(prompt), tokenize=False, add_generation_prompt=True
            )
            starts.append(len(tokenizer(text)["input_ids"]))
            rows.append(tokenizer(text + answer + "<|im_end|>")["input_ids"])
        width = max(map(len, rows))
        input_ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
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
            print(
                f"supervised step {step + 1}/{SFT_STEPS}: loss {loss:.3f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )


# ---------------------------------------------------------------- sampling and pairs


def as_messages(prompt):
    return [{"role": "user", "content": prompt}]


@torch.no_grad()
def sample(model, tokenizer, prompts, responses):
    """Sample responses from the model at temperature 1: a list of (text, tokens) for each prompt."""
    model.eval()
    out = []
    for first in range(0, len(prompts), 100):
        texts = [
            tokenizer.apply_chat_template(as_messages(prompt), tokenize=False, add_generation_prompt=True)
            for prompt in prompts[first : first + 100]
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=responses,
            max_new_tokens=80,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[:, batch["input_ids"].shape[1] :]
        ends = (ids != tokenizer.pad_token_id).sum(1).tolist()
        answers = list(zip(tokenizer.batch_decode(ids, skip_special_tokens=True), ends, strict=True))
        out += [answers[i : i + responses] for i in range(0, len(answers), responses)]
    return out


def make_pairs(model, tokenizer, tasks, count):
    """Best against worst of five sampled responses, for the first `count` tasks where the judge tells them apart."""
    pairs = []
    for first in range(0, len(tasks), 500):
        some = tasks[first : first + 500]
        answers = sample(model, tokenizer, [prompt for _, prompt, _ in some], RESPONSES)
        for (kind, prompt, units), responses in zip(some, answers, strict=True):
            reference = " ".join(units)
            scored = sorted((judge(kind, reference, text), text) for text, _ in responses if text.strip())
            if len(scored) > 1 and scored[0][0] < scored[-1][0]:
                pairs.append(
                    {
                        "prompt": as_messages(prompt),
                        "chosen": [{"role": "assistant", "content": scored[-1][1]}],
                        "rejected": [{"role": "assistant", "content": scored[0][1]}],
                        "kind": kind,
                        "reference": reference,
                        "scores": [round(scored[-1][0], 3), round(scored[0][0], 3)],
                    }
                )
        print(f"{len(pairs)} pairs from {first + len(some)} prompts", flush=True)
        if len(pairs) >= count:
            return pairs[:count]
    raise SystemExit(f"only {len(pairs)} of {count} pairs: the model's responses are too often all alike")


def make(out):
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    tasks, seen = [], set()
    while len(tasks) < 2 * (TRAIN_PAIRS + EVAL_PAIRS):
        task = make_task(rng)
        if task[1] not in seen:
            seen.add(task[1])
            tasks.append(task)
    examples = supervised_examples(rng, SFT_STEPS * SFT_BATCH, seen)
    tokenizer = make_tokenizer(
        text for prompt, answer in examples[:20000] for text in (prompt, answer, "user", "assistant")
    )
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
    model = model.bfloat16().float()  # what is written is what the responses are sampled from
    pairs = make_pairs(model, tokenizer, tasks, TRAIN_PAIRS + EVAL_PAIRS)
    model.bfloat16().save_pretrained(out / "tiny")
    tokenizer.save_pretrained(out / "tiny")
    for name, rows in (("eval.jsonl", pairs[:EVAL_PAIRS]), ("train.jsonl", pairs[EVAL_PAIRS:])):
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def judge_answers(folder, rows, responses=4, seed=SEED):
    """Sample responses to each row's prompt: their mean score a row, and the mean length in tokens."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = sample(model, tokenizer, [row["prompt"][0]["content"] for row in rows], responses)
    scores = [
        sum(judge(row["kind"], row["reference"], text) for text, _ in texts) / responses
        for row, texts in zip(rows, answers, strict=True)
    ]
    return scores, sum(tokens for texts in answers for _, tokens in texts) / (len(rows) * responses)


def judge_model(folder, responses=4):
    """Print the mean score and length of sampled responses to the held-out prompts, and the score for each kind."""
    rows = [json.loads(line) for line in (DATA / "eval.jsonl").read_text().splitlines()]
    means, length = judge_answers(folder, rows, responses)
    kinds = {}
    for row, mean in zip(rows, means, strict=True):
        kinds.setdefault(row["kind"], []).append(mean)
    score = sum(means) / len(means)
    error = math.sqrt(sum((mean - score) ** 2 for mean in means) / (len(means) - 1) / len(means))
    print(f"{folder}: {responses} responses to each of {len(rows)} held-out prompts")
    print(f"mean score {score:.3f} +- {error:.3f} (standard error), mean length {length:.1f} tokens")
    print("  ".join(f"{kind} {sum(values) / len(values):.2f}" for kind, values in sorted(kinds.items())))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    actions = parser.add_subparsers(dest="action")
    judging = actions.add_parser("judge", help="judge a model on the held-out prompts")
    judging.add_argument("model", help="a model folder, such as data/tiny or out")
    parser.add_argument("--out", type=Path, default=DATA, help="where to write the model and the pairs")
    args = parser.parse_args()
    judge_model(args.model) if args.action == "judge" else make(args.out)
