# SPDX-License-Identifier: MIT
"""Judge what models answer to the held-out prompts of the embedded default.

    python data/tiny/judge.py data/tiny out    # one or more model folders

Each model samples four answers per prompt of data/tiny/eval.jsonl, and a program scores them
between 0 and 1. The judge is a program and not a reward model, because a program knows the right
answer and costs nothing.
"""

import argparse
import difflib
import json
import math
import re
import sys
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

EVAL_PAIRS = Path(__file__).resolve().parent / "eval.jsonl"
SEED = 42
PROMPTS_PER_BATCH = 100
MAX_ANSWER_TOKENS = 80
VERBS = "sleeps sings waits plays hides rests dances jumps swims dreams".split()


def judge(kind, reference, answer):
    """Score an answer between 0 and 1, with partial credit.

    For most kinds of request the score is the similarity between the words of the answer and those
    of the reference; for "spell" it compares characters. For "write" the reference only tells how
    many sentences were asked for, and about what: each good sentence counts once, so that copies
    and surplus sentences lower the score.
    """
    if kind == "write":
        asked = reference.count(".")
        subject = reference.split()[1]
        sentences = [sentence.split() for sentence in answer.split(".") if sentence.strip()]
        good = {
            " ".join(words)
            for words in sentences
            if 4 <= len(words) <= 7 and words[:2] == ["The", subject] and words[2] in VERBS
        }
        score = min(len(good), asked) / max(len(sentences), asked)
        return score if answer.rstrip().endswith(".") else 0.8 * score
    if kind == "spell":
        given, wanted = re.findall(r"\S", answer), re.findall(r"\S", reference)
    else:
        given, wanted = answer.split(), reference.split()
    return difflib.SequenceMatcher(None, given, wanted, autojunk=False).ratio()


def as_messages(prompt):
    return [{"role": "user", "content": prompt}]


@torch.no_grad()
def sample(model, tokenizer, prompts, answers_per_prompt):
    """Sample answers at temperature 1: for each prompt a list of (text, number of tokens)."""
    model.eval()
    answers = []
    progress = tqdm(total=len(prompts), unit=" prompts", leave=False, disable=None)
    for first in range(0, len(prompts), PROMPTS_PER_BATCH):
        batch = prompts[first : first + PROMPTS_PER_BATCH]
        texts = [
            tokenizer.apply_chat_template(
                as_messages(prompt), tokenize=False, add_generation_prompt=True
            )
            for prompt in batch
        ]
        encoded = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        rows = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=answers_per_prompt,
            max_new_tokens=MAX_ANSWER_TOKENS,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # (prompts * answers_per_prompt, time)
        rows = rows[:, encoded["input_ids"].shape[1] :]  # without the prompt
        lengths = (rows != tokenizer.pad_token_id).sum(1).tolist()
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        sampled = list(zip(texts, lengths, strict=True))
        for start in range(0, len(sampled), answers_per_prompt):
            answers.append(sampled[start : start + answers_per_prompt])
        progress.update(len(batch))
    progress.close()
    return answers


def judge_answers(folder, rows, answers_per_prompt=4, seed=SEED):
    """Judge the model in a folder on the prompts of rows.

    Returns:
        (scores, length): the mean score of the answers to each prompt, and the mean length of all
        answers in tokens.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    prompts = [row["prompt"][0]["content"] for row in rows]
    answers = sample(model, tokenizer, prompts, answers_per_prompt)
    scores = []
    for row, sampled in zip(rows, answers, strict=True):
        total = sum(judge(row["kind"], row["reference"], text) for text, _ in sampled)
        scores.append(total / answers_per_prompt)
    tokens = sum(length for sampled in answers for _, length in sampled)
    return scores, tokens / (len(rows) * answers_per_prompt)


def report(folder, rows, answers_per_prompt=4):
    """Judge a model, and print its mean score and length, and the score of each kind of request."""
    scores, length = judge_answers(folder, rows, answers_per_prompt)
    scores_by_kind = {}
    for row, score in zip(rows, scores, strict=True):
        scores_by_kind.setdefault(row["kind"], []).append(score)
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
    error = math.sqrt(variance / len(scores))
    print(f"{folder}: {answers_per_prompt} answers to each of {len(rows)} held-out prompts")
    print(f"mean score {mean:.3f} +- {error:.3f} (standard error), mean length {length:.1f} tokens")
    kinds = [
        f"{kind} {sum(values) / len(values):.2f}" for kind, values in sorted(scores_by_kind.items())
    ]
    print("  ".join(kinds), flush=True)


def fail(message):
    print(f"judge: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = fail  # one line instead of the usage
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="a model folder, such as data/tiny or out"
    )
    folders = parser.parse_args().models
    for folder in folders:
        if not (Path(folder) / "config.json").is_file():
            fail(f"{folder}: not a model folder, because it holds no config.json")
    rows = [json.loads(line) for line in EVAL_PAIRS.read_text().splitlines()]
    for folder in folders:
        try:
            report(folder, rows)
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).partition("\n")[0]
            fail(f"{folder}: cannot be judged: {reason}")


if __name__ == "__main__":
    main()
