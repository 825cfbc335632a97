# SPDX-License-Identifier: MIT
"""A real model, judged by a program: prompts, how answers are verified, and pairs of the answers.

A prompt asks for a short text about a subject and gives two or three instructions that a program
can verify. The score of an answer is the share of what was asked that holds. The prompts to train
on, to tune on and to judge on have the same kinds of instruction and share no subject and no word.
"""

import random
import re
import tempfile

import numpy as np
import torch
from runs import read_jsonl, train
from transformers import AutoModelForCausalLM, AutoTokenizer

SEED = 0  # of the prompts
ANSWERS = 5  # of which the best and the worst make a pair
JUDGED = 1  # answer per prompt of a trained model: more prompts tell more than more answers
EVAL = 32  # held-out pairs at which displacement is measured
PROMPTS_AT_A_TIME = 20  # with their answers: few rows are slow, and many take much memory
MAX_TOKENS = 64  # of an answer: no instruction asks for more than 40 words

# Subjects are plurals or uncountable, so that every request reads well with every one of them.
SUBJECTS = (
    "rivers trains bread cats bridges gardens coffee horses mountains rain clocks robots bees "
    "forests cheese markets snow lighthouses bicycles stars islands dogs chess tea volcanoes "
    "whales soup museums kites spiders doctors trees honey football deserts mirrors birds "
    "teachers planes gold farms glass dreams dancing lakes salt sleep castles ants pianos wind "
    "schools fish candles maps rice hats elephants ships books apples money oceans owls "
    "photography shoes roads sand poetry windows frogs tigers storms chocolate parks swimming "
    "water friends bears fire theatres cooking turtles moons painting towers sugar rabbits tents "
    "camels juice lemons rockets caves"
).split()
WORDS = (
    "green quiet morning old street yellow happy small kitchen silver night child heavy simple "
    "summer door bright table blue slow paper warm city cold evening soft early house round "
    "village brave bottle deep corner clean mother long letter sweet strong basket young circle "
    "tall dark pocket wooden season gentle golden honest winter empty music broken famous button "
    "narrow story loud picture rich shadow smooth farmer careful ticket dry voice wild engine "
    "proud hill fresh uncle light strange field lucky coat busy thick lamp modern secret tiny "
    "valley useful wall number brother"
).split()
REQUESTS = (
    "Write about {}.|Tell me about {}.|Describe {} to a child.|What is special about {}?|"
    "Why do people talk about {}?|Write something new about {}.|Say what you know about {}."
).split("|")
# The commonest words of each language: the one whose words occur most is the language of a text.
LANGUAGES = {
    "English": "the of and is a in to that for with are it on as they",
    "French": "le la les des est et une un dans pour que avec sont du de",
    "German": "der die das ist und ein eine in mit für sind den nicht zu von",
    "Spanish": "el la los las es y una un en para que con son del de",
    "Italian": "il la i gli è e una un in per che con sono del di",
}
COMMON = "the and is of to it are can".split()  # words that are hard to do without


# ------------------------------------------------------------------------------------ prompts
def length_instruction(rng):
    """An instruction as (text, its check); a check is the name of a kind and its values."""
    kind = rng.choice(["sentences", "words", "lines"])
    if kind == "sentences":
        n = rng.randint(1, 4)
        return f"Answer in exactly {n} sentence{'s' * (n > 1)}.", [kind, n]
    if kind == "words":
        n = rng.choice([8, 12, 16, 20])
        return f"Use {n} to {2 * n} words.", [kind, n, 2 * n]
    n = rng.randint(2, 5)
    return f'Answer with a list of exactly {n} lines that each start with "- ".', [kind, n]


def word_instruction(rng, words):
    """A word that must occur, one that must not, or an order."""
    kind = rng.choice(["with", "without", "order"])
    if kind == "with":
        word = rng.choice(words)
        return f'Use the word "{word}".', [kind, word]
    if kind == "without":
        word = rng.choice(COMMON)
        return f'Do not use the word "{word}".', [kind, word]
    first, second = rng.sample(words, 2)
    return f'Use the word "{first}" and, after it, the word "{second}".', [kind, first, second]


def form_instruction(rng, kind):
    """A first letter, a last sign, small or capital letters, or a language."""
    if kind == "letter":
        letter = rng.choice("ABCDEFGHILMOPRSTW")
        return f"Begin with the letter {letter}.", [kind, letter]
    if kind == "end":
        sign, name = rng.choice([("?", "a question mark"), ("!", "an exclamation mark")])
        return f"End with {name}.", [kind, sign]
    if kind == "case":
        case = rng.choice(["small", "capital"])
        return f"Write in {case} letters only.", [kind, case]
    language = rng.choice(list(LANGUAGES)[1:])
    return f"Answer in {language}.", [kind, language]


def make_prompt(rng, subjects, words):
    subject = rng.choice(subjects)
    instructions = [length_instruction(rng)]
    for kind in rng.sample(["word", "letter", "end", "case", "language"], rng.randint(1, 2)):
        more = word_instruction(rng, words) if kind == "word" else form_instruction(rng, kind)
        instructions.append(more)
    kinds = {check[0] for _, check in instructions}
    if "language" in kinds and kinds & {"with", "without", "order"}:
        return make_prompt(rng, subjects, words)  # English words in another language: once more
    rng.shuffle(instructions)
    request = rng.choice(REQUESTS).format(subject)
    checks = [check for _, check in instructions]
    if "language" not in kinds:  # where the subject has another name
        checks.append(["with", subject])
    return dict(prompt=" ".join([request, *(text for text, _ in instructions)]), checks=checks)


def make_prompts(counts, seed):
    """{name: its prompts}, for counts like {"train": 700, "validation": 100, "held out": 200}.
    Each has its own subjects and words, as many as its share of all prompts."""
    rng = random.Random(seed)
    contents = [rng.sample(items, len(items)) for items in (SUBJECTS, WORDS)]
    total, before, prompts = sum(counts.values()), 0, {}
    for name, count in counts.items():
        own = [
            items[len(items) * before // total : len(items) * (before + count) // total]
            for items in contents
        ]
        found = {}
        while len(found) < count:
            prompt = make_prompt(rng, *own)
            found[prompt["prompt"]] = prompt
        prompts[name] = list(found.values())
        before += count
    return prompts


# ------------------------------------------------------------------------------------ scores
def words_of(text):
    """The words of a text in small letters, without the end of a plural or a possessive."""
    words = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())
    return [re.sub(r"(['’]s|s)$", "", word) for word in words]


def language_of(text):
    """The language whose commonest words occur most in a text, or None if there are few of them."""
    words = text.lower().split()
    counts = {name: sum(w in common.split() for w in words) for name, common in LANGUAGES.items()}
    best = max(counts, key=counts.get)
    sure = list(counts.values()).count(counts[best]) == 1 and counts[best] >= len(words) / 6
    return best if sure else None


def holds(check, text):
    """Whether an instruction holds for an answer."""
    kind, *values = check
    words, lines = words_of(text), [line for line in text.split("\n") if line.strip()]
    if kind == "sentences":
        ends = re.findall(r"[.!?]+[\"”')]*(?=\s|$)", text)
        return len(ends) == values[0] and text.rstrip(" \n\"”')")[-1:] in tuple(".!?")
    if kind == "words":
        return values[0] <= len(words) <= values[1]
    if kind == "lines":
        return len(lines) == values[0] and all(line.startswith("- ") for line in lines)
    if kind in ("with", "order"):
        wanted = [words_of(value)[0] for value in values]
        places = [words.index(word) if word in words else -1 for word in wanted]
        return -1 not in places and places == sorted(places)
    if kind == "without":
        return words_of(values[0])[0] not in words
    if kind == "letter":
        return next(filter(str.isalpha, text), "").upper() == values[0]
    if kind == "end":
        return text.rstrip().endswith(values[0])
    if kind == "case":
        return text == (text.lower() if values[0] == "small" else text.upper())
    return language_of(text) == values[0]


def is_loop(text):
    """Whether an answer says the same again and again: four words in a row that occur three times,
    or a few signs that occur eight times in a row."""
    words = words_of(text)
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return any(runs.count(run) > 2 for run in runs) or bool(re.search(r"(\S{1,8})\1{7}", text))


def score(checks, text, ended=True):
    """The share of what was asked that holds, and 0 for a loop or an answer without a word.
    ended: whether the model ended it. If not, nothing holds that depends on its length or end."""
    if not words_of(text) or is_loop(text):
        return 0.0
    open_end = () if ended else ("sentences", "words", "lines", "end")
    return sum(check[0] not in open_end and holds(check, text) for check in checks) / len(checks)


# ------------------------------------------------------------------------------------ answers
@torch.no_grad()
def sample(folder, prompts, count, seed):
    """Answers at temperature 1: for each prompt a list of [text, tokens, whether it ended]."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    stops = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    answers = []
    for first in range(0, len(prompts), PROMPTS_AT_A_TIME):
        chats = [as_messages(prompt) for prompt in prompts[first : first + PROMPTS_AT_A_TIME]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        rows = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            num_return_sequences=count,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=list(stops),
            pad_token_id=tokenizer.pad_token_id,
        )  # (prompts * count, time)
        sampled = []
        for row in rows[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((i for i, token in enumerate(row) if token in stops), len(row))
            text = tokenizer.decode(row[:end], skip_special_tokens=True)
            sampled.append([text, end, end < len(row)])
        answers += [sampled[i : i + count] for i in range(0, len(sampled), count)]
    return answers


def as_messages(text, role="user"):
    return [dict(role=role, content=text)]


def sampling_jobs(name, prompts):
    """The answers that pairs are made of, in jobs of few prompts, so that little is lost by a stop.
    prompts: {name: prompts}, as make_prompts gives them. No pairs are made to tune on."""
    asked = [prompt["prompt"] for part in ("train", "held out") for prompt in prompts[part]]
    starts = range(0, len(asked), PROMPTS_AT_A_TIME)
    parts = [asked[start : start + PROMPTS_AT_A_TIME] for start in starts]
    return [
        dict(kind="answers", model=name, prompts=part, count=ANSWERS, seed=seed)
        for seed, part in enumerate(parts)
    ]


def run_sampling(job, folder):
    return job | dict(answers=sample(folder, job["prompts"], job["count"], job["seed"]))


def make_pairs(prompts, answers, count):
    """The best answer against the worst, for the prompts at which these differ most.

    prompts: from make_prompts. answers: {prompt: [[text, tokens, whether it ended], ...]}. One that
    was cut is never chosen, because training would add an end of its turn.
    """
    pairs = []
    for prompt in prompts:
        scored = [
            (score(prompt["checks"], text, ended), text, ended)
            for text, _, ended in answers[prompt["prompt"]]
            if words_of(text)
        ]
        best = max((x for x in scored if x[2]), key=lambda x: x[0], default=None)
        worst = min(scored, key=lambda x: x[0], default=None)
        if best and best[0] > worst[0]:
            pair = dict(prompt=as_messages(prompt["prompt"]))
            pair["chosen"] = as_messages(best[1], "assistant")
            pair["rejected"] = as_messages(worst[1], "assistant")
            pairs.append(pair | dict(scores=[best[0], worst[0]]))
    pairs.sort(key=lambda pair: pair["scores"][1] - pair["scores"][0])  # keeps the order of equals
    return pairs[:count]


# ------------------------------------------------------------------------------------ runs
def run_real(job, work, folder):
    """Train the model in a folder as a job says, and judge its answers: for tuning to the prompts
    of validation.jsonl, else to those of eval_prompts.jsonl, each of which keeps its figures."""
    result, tuning = dict(job), job["kind"] == "real-map"
    with tempfile.TemporaryDirectory(dir=work) as new:
        if job["kind"] != "real-start":
            settings = dict(batch_size=8, epochs=1, dtype="float32", model=folder, out=f"{new}/out")
            if tuning:  # its displacement would take time and decide nothing
                settings.update(eval_data=None, eval_split=0.0)
            _, logps = train(job, work, **settings)
            folder = settings["out"]
            if not tuning:
                changes = (logps[:, -1] - logps[:, 0]).round(4)  # (pairs, 2)
                result["chosen_change"], result["rejected_change"] = changes.T.tolist()
        prompts = read_jsonl(f"{work}/{'validation' if tuning else 'eval_prompts'}.jsonl")
        answers = sample(folder, [prompt["prompt"] for prompt in prompts], JUDGED, job["seed"])
    figures = np.array(
        [
            [[score(p["checks"], text, ended), n, is_loop(text)] for text, n, ended in own]
            for p, own in zip(prompts, answers)
        ]
    )  # (prompts, answers, figures)
    if tuning:
        means = figures.mean((0, 1)).round(5).tolist()
        result["validation"], result["length"], result["loops"] = means
    else:
        result["scores"], result["lengths"], result["loops"] = figures.mean(1).T.round(4).tolist()
        result["example"] = [prompts[0]["prompt"], answers[0][0][0], figures[0, 0, 0]]
    return result
