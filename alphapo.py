# SPDX-License-Identifier: MIT
"""AlphaPO in one file: align a language model from pairs of a chosen and a rejected response.

    logp   = (1/|y|) * sum_t log pi(y_t | x, y_<t)       mean log-probability per token
    reward = (1 - exp(-alpha * logp)) / alpha            alpha -> 0 gives logp, which is SimPO
    loss   = -log sigmoid(beta * (reward(chosen) - reward(rejected)) - gamma)

    python alphapo.py                                            # the tiny model, on any CPU
    python alphapo.py --model mistral-7b-instruct --alpha 0.25   # a preset: model, data, settings
    python alphapo.py --model FOLDER --data PAIRS.jsonl --learning-rate 1e-6
    torchrun --nproc-per-node 8 alphapo.py --model mistral-7b-instruct

The method comes first: the loss, rows and log-probabilities, a step. Each section uses only what
stands above it. Left out: a reference model (the method has none), LoRA, remote code, pickles.
AlphaPO: Gupta et al. 2025, arXiv 2501.03884. SimPO: Meng et al. 2024, arXiv 2405.14734.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter, namedtuple
from datetime import timedelta
from pathlib import Path

# torch reads both when it is imported; the second, large pages, is worth 5 % of a CPU's time
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as state_dicts
import transformers
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

TORCHRUN = os.environ if dist.is_torchelastic_launched() else {}  # a stray RANK means nothing
RANK, WORLD_SIZE = int(TORCHRUN.get("RANK", 0)), int(TORCHRUN.get("WORLD_SIZE", 1))
LOCAL_WORLD_SIZE = int(TORCHRUN.get("LOCAL_WORLD_SIZE", 1))  # of this machine
GIB = 2**30


# ------------------------------------------------------------------------------------ the loss
def alphapo_reward(logps, alpha):
    """Reward (1 - exp(-alpha * logp)) / alpha of each response, before beta (arXiv 2501.03884).
    logps: mean log-probability per token (nats), any shape. alpha: 0 gives logps, SimPO's reward.
    Returns float64, same shape: expm1 keeps the digits that 1 - exp(.) loses near alpha = 0."""
    logps = logps.double()
    return -torch.expm1(-alpha * logps) / alpha if alpha else logps


def alphapo_loss(chosen_logps, rejected_logps, alpha, beta, gamma):
    """The AlphaPO loss, -log sigmoid(m) with m = beta * (r(chosen) - r(rejected)) - gamma.
    Its gradient in chosen_logps is -sigmoid(-m) * beta * exp(-alpha * chosen_logps), and in
    rejected_logps sigmoid(-m) * beta * exp(-alpha * rejected_logps) (arXiv 2501.03884).

    chosen_logps, rejected_logps: mean log-probability per token (nats), (pairs,) each.
    alpha, beta: shape and scale of the reward; alpha 0 is SimPO.
    gamma: target margin, not divided by beta; SimPO's settings give gamma / beta instead.
    Returns (losses, chosen_rewards, rejected_rewards), (pairs,) each, in the dtype of chosen_logps.
    Rewards are multiplied by beta and carry no gradient. ValueError where shapes differ, because
    broadcasting would compare the wrong responses, or where chosen_logps are integers."""
    if chosen_logps.shape != rejected_logps.shape or not chosen_logps.is_floating_point():
        found = [(tuple(logps.shape), logps.dtype) for logps in (chosen_logps, rejected_logps)]
        raise ValueError(f"need log-probabilities of one shape in floating point, not {found}")
    chosen_rewards = beta * alphapo_reward(chosen_logps, alpha)
    rejected_rewards = beta * alphapo_reward(rejected_logps, alpha)
    losses = -torch.nn.functional.logsigmoid(chosen_rewards - rejected_rewards - gamma)
    dtype = chosen_logps.dtype
    return losses.to(dtype), chosen_rewards.detach().to(dtype), rejected_rewards.detach().to(dtype)


# -------------------------------------------------------------------- rows and log-probabilities
# token ids of a preference pair, int32 arrays, and where it was read (NAME:NUMBER)
Pair = namedtuple("Pair", "prompt chosen rejected place", defaults=[""])


def pair_tokens(pair, plain_rows):
    """Tokens of the rows of a pair, the shorter of two plain rows counted as the longer."""
    head, chosen, rejected = len(pair.prompt) - 1, len(pair.chosen), len(pair.rejected)
    return 2 * (head + max(chosen, rejected)) if plain_rows else head + chosen + rejected


def make_rows(pairs, plain_rows=False, device="cpu"):
    """Lay out pairs as padded token rows. A response is predicted by the prompt's last token and by
    its own tokens but the last: these are its segment, and segment 0 is the prompt before them.

        shared: [prompt[:-1] | prompt[-1], chosen[:-1] | prompt[-1], rejected[:-1]]
        plain:  [prompt[:-1] | prompt[-1], chosen[:-1]] and the same with rejected

    Returns input_ids, position_ids, segments (padding has 0), (rows, width) each, and targets
    (response tokens,): what the tokens of segments 1 and 2 predict, in the order of the rows."""
    rows = []  # (3, tokens) each: ids, positions, segments
    for prompt, chosen, rejected, _ in pairs:
        start, sides = len(prompt) - 1, []  # the position at which both responses begin
        for segment, response in ((1, chosen), (2, rejected)):
            ids = np.append(prompt, response[:-1])
            positions = np.arange(len(ids))
            sides.append(np.stack([ids, positions, segment * (positions >= start)]))
        rows += sides if plain_rows else [np.hstack([sides[0], sides[1][:, start:]])]
    # on CUDA, attention copies a mask whose width is no multiple of 8
    width = math.ceil(max(row.shape[1] for row in rows) / 8) * 8
    table = np.zeros((3, len(rows), width), np.int64)
    for number, row in enumerate(rows):
        table[:, number, : row.shape[1]] = row
    targets = np.concatenate([ids for pair in pairs for ids in (pair.chosen, pair.rejected)])
    return [torch.from_numpy(x).to(device) for x in (*table, targets.astype(np.int64))]


def attention_masks(config, position_ids, segments, dtype):
    """Masks of shared rows, (rows, 1, width, width): one, or a dict with one for each kind of layer
    that the model's config names. A token sees the prompt and its own response, up to itself and
    within the layer's window, which counts positions. KeyError where a layer is of a third kind."""
    query, key = segments[:, :, None], segments[:, None, :]
    seen = ((key == query) | (key == 0)).tril()
    distance = position_ids[:, :, None] - position_ids[:, None, :]
    window = getattr(config, "sliding_window", None) or math.inf
    windows = {"full_attention": math.inf, "sliding_attention": window}
    kinds = getattr(config, "layer_types", None)
    # additive, as eager attention adds it, and finite also where FSDP casts it to bfloat16
    lowest, masks = torch.finfo(torch.bfloat16).min, {}
    for kind in set(kinds or ["sliding_attention"]):  # without kinds, all layers are as Mistral's
        hidden = ~seen | (distance >= windows[kind])
        masks[kind] = torch.zeros_like(seen, dtype=dtype).masked_fill_(hidden, lowest)[:, None]
    return masks if kinds else masks["sliding_attention"]


def pair_logps(model, pairs, plain_rows=False, device="cpu"):
    """(chosen_logps, rejected_logps), (pairs,) each: mean log-probabilities per token (nats) by the
    model's own forward pass, in which only response tokens meet the vocabulary."""
    input_ids, position_ids, segments, targets = make_rows(pairs, plain_rows, device)
    inputs = dict(logits_to_keep=segments > 0, use_cache=False)  # booleans need transformers 5.22
    if not plain_rows:  # plain rows need no mask: padding stands on the right, where no token looks
        masks = attention_masks(model.config.get_text_config(), position_ids, segments, model.dtype)
        inputs.update(position_ids=position_ids, attention_mask=masks)
    logits = model(input_ids, **inputs).logits.float()  # (response tokens, vocabulary)
    logps = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    lengths = [len(ids) for pair in pairs for ids in (pair.chosen, pair.rejected)]
    means = torch.stack([response.mean() for response in logps.split(lengths)])
    return means[0::2], means[1::2]


# ------------------------------------------------------------------------------------ a step
METRICS = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
METRICS += ["logps/chosen", "logps/rejected"]  # TRL's names; rewards include beta


def micro_batches(order, tokens, micro_tokens):
    """Split indices into lists of at most micro_tokens, before their rows are padded, or of one
    pair. order: longest first, so that the first decides the width. tokens: of each index."""
    batches, width = [], 0
    for i in order:
        if not batches or (len(batches[-1]) + 1) * width > micro_tokens:
            batches.append([])
            width = tokens[i]
        batches[-1].append(i)
    return batches


def run_pairs(model, pairs, indices, loss_fn, config, training=False):
    """Mean METRICS of the pairs at these indices; in training, the gradient of their mean loss too.
    Each loss is divided by the number of all pairs, so micro-batches and processes do not matter.
    Raises FloatingPointError, which names pairs, where a loss is not finite."""
    tokens = [pair_tokens(pairs[i], config.plain_rows) for i in indices]
    order = sorted(range(len(indices)), key=tokens.__getitem__, reverse=True)
    shares = [order[rank::WORLD_SIZE] for rank in range(WORLD_SIZE)]
    splits = [micro_batches(share, tokens, config.micro_tokens) for share in shares]
    passes = max(map(len, splits))  # as many in each process, because FSDP waits for all of them
    table = torch.zeros(len(METRICS), len(indices), dtype=torch.float64, device=config.device)
    for number in range(passes):
        idle = number >= len(splits[RANK])  # then any pair, times zero, as other processes go on
        columns = order[:1] if idle else splits[RANK][number]
        batch = [indices[column] for column in columns]
        if training and config.offload == "keep":  # weights and sums stay on the device for a step
            model.set_requires_gradient_sync(number == passes - 1)
            model.set_reshard_after_backward(number == passes - 1)
        with torch.set_grad_enabled(training):
            logps = pair_logps(model, [pairs[i] for i in batch], config.plain_rows, config.device)
            losses, chosen_rewards, rejected_rewards = loss_fn(*logps, pairs, batch)
        if training:
            (losses.sum() * (not idle) / len(indices)).backward()
        margins = chosen_rewards - rejected_rewards
        values = losses, chosen_rewards, rejected_rewards, margins, margins > 0, *logps  # METRICS
        if not idle:
            table[:, columns] = torch.stack([value.detach().double() for value in values])
    if WORLD_SIZE > 1:  # one GPU needs no communicator, which takes memory
        dist.all_reduce(table)  # each process filled its own columns
    means = dict(zip(METRICS, table.mean(1).tolist()))  # waits for the device
    if not math.isfinite(means["loss"]):
        bad = {pairs[i].place for i, loss in zip(indices, table[0]) if not loss.isfinite()}
        raise FloatingPointError(f"the loss is not finite, at {sorted(bad)[:10]}")
    return means


# ------------------------------------------------------------------------------------ settings
class UserError(Exception):
    """What a user can act on, printed as one line: UserError(message, exit status if not 2)."""


@contextlib.contextmanager
def user_error(what, remedy):
    """Turn what a library raises inside into one line: what failed, the remedy, its own words."""
    try:
        yield
    except (Exception, dcp.CheckpointException) as error:  # dcp's is a BaseException
        failures = list(getattr(error, "failures", {}).values())  # of dcp: (error, traceback)
        cause = failures[0][0] if failures else error
        why = str(cause).strip().split("\n")[0] or repr(cause)
        raise UserError(f"{what}; {remedy} ({why:.300})") from error


TINY = Path(__file__).resolve().parent / "data" / "tiny"
# fmt: off
PRESETS = {
    "tiny": dict(model=str(TINY), data=f"{TINY}/train.jsonl", eval_data=f"{TINY}/eval.jsonl",
        gamma=0.1, learning_rate=2e-4, batch_size=32, epochs=2, eval_every=16),
    # AlphaPO's Table 3 (gamma / beta: 0.1, 0.3, 0.5), as a public note quotes it
    "mistral-7b-instruct": dict(model="mistralai/Mistral-7B-Instruct-v0.2", learning_rate=7e-7,
        data="princeton-nlp/mistral-instruct-ultrafeedback", alpha=0.25, beta=2.5, gamma=0.25),
    "llama-3-8b-instruct": dict(model="meta-llama/Meta-Llama-3-8B-Instruct", learning_rate=1.1e-6,
        data="princeton-nlp/llama3-ultrafeedback-armorm", alpha=0.25, beta=10.0, gamma=3.0),
    "gemma-2-9b-it": dict(model="google/gemma-2-9b-it", learning_rate=8e-7,
        data="princeton-nlp/gemma2-ultrafeedback-armorm", alpha=0.1, beta=10.0, gamma=5.0),
}


def setting(default, help, *allowed):
    """A field of Config. allowed: the words for it, or its least and its greatest number."""
    return dataclasses.field(default=default, metadata=dict(help=help, allowed=allowed))


@dataclasses.dataclass
class Config:
    """Every setting of a run, each also a flag. In Python, a preset is Config(**PRESETS[name])."""

    model: str = setting("tiny", "a preset, a model folder or a hub id")
    data: str | None = setting(None, "pairs: a file or OWNER/NAME[:SPLIT] of the hub")
    eval_data: str | None = setting(None, "held-out pairs, named likewise")
    eval_split: float = setting(0.02, "share of pairs to hold out without --eval-data", 0, 0.99)
    out: str = setting("out", "new folder for the aligned model and the run's figures")
    alpha: float = setting(0.25, "shape of the reward; 0 is SimPO", -1e6, 1e6)
    beta: float = setting(2.5, "scale of the reward", 1e-12, 1e12)
    gamma: float = setting(0.25, "target margin; SimPO's settings divide it by beta", 0, 1e12)
    learning_rate: float = setting(7e-7, "peak, between a warm-up and a cosine", 1e-12, 1e3)
    batch_size: int = setting(128, "pairs per optimizer step", 1, 1e9)
    epochs: int = setting(1, "passes over the pairs", 1, 1e9)
    max_steps: int | None = setting(None, "end the run and its cosine at this step", 1, 1e9)
    warmup_ratio: float = setting(0.1, "share of the steps that warm up", 0, 0.99)
    max_grad_norm: float = setting(1.0, "clip the gradient to this norm", 1e-12, 1e12)
    max_length: int = setting(2048, "tokens of prompt and response together", 2, 1e9)
    micro_tokens: int | None = setting(None, "tokens of a forward pass (default: fit)", 1, 1e9)
    gradient_checkpointing: bool | None = setting(None, "recompute layers (default: if needed)")
    plain_rows: bool = setting(False, "compute each prompt twice, as other trainers do")
    device: str = setting("auto", "where the model computes", "auto", "cuda", "cpu")
    dtype: str = setting("auto", "what to compute in", "auto", "bfloat16", "float32")
    offload: str = setting(
        "auto", "float32 weights and AdamW on the host; true is keep (fast) or layers (small)",
        "auto", "true", "false", "keep", "layers")
    plan: bool = setting(False, "say what the run needs, load no weights, and stop")
    eval_every: int | None = setting(None, "also evaluate every so many steps", 1, 1e9)
    save_every: int | None = setting(None, "write a checkpoint every so many steps", 1, 1e9)
    resume: bool = setting(False, "continue from the newest checkpoint in --out")
    seed: int = setting(42, "decides the order of the pairs and what is held out", 0, 2**63)
# fmt: on


def resolve(config: Config) -> Config:
    """A config of the right types, with what depends on the machine filled in, or UserError. Types
    are read from text, because int(1.5) would be 1, and bool("no") True."""
    config = dataclasses.replace(config)
    for field in dataclasses.fields(Config):
        value, allowed = getattr(config, field.name), field.metadata["allowed"]
        if value is None and field.default is None:
            continue
        kind = getattr(field.type, "__args__", [field.type])[0]  # int of int | None
        words = {bool: ("true", "false"), str: allowed}.get(kind, ())
        with user_error(f"--{field.name.replace('_', '-')} {value}", "see --help"):
            text = str(value).lower() if words else str(value)
            text.encode()  # a name that is not UTF-8 would fail when the model is saved
            if words and text not in words:
                raise ValueError(f"not {' or '.join(words)}")
            value = (text == "true") if kind is bool else kind(text)
            if kind in (int, float) and not allowed[0] <= value <= allowed[1]:
                raise ValueError(f"not from {allowed[0]:g} to {allowed[1]:g}")
            setattr(config, field.name, value)
    if config.data is None:
        raise UserError("--data is missing: name a file of pairs, or a preset as --model (--help)")
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    if config.device == "cuda" and not on_gpu:
        raise UserError("--device cuda: torch sees no GPU")
    config.device = "cuda" if on_gpu else "cpu"
    if config.dtype == "auto":
        config.dtype = "bfloat16" if on_gpu else "float32"
    return config


# ------------------------------------------------------------------------------------ pairs
MEDIA = "image", "images", "video", "videos", "audio"  # a text model sees nothing of these
BEYOND_TEXT = "tool_calls", "function_call", "reasoning_content", "thinking", *MEDIA
PROMPTS = "prompt", "system", "system_prompt", "question", "instruction", "input", "query"
PROMPTS += "problem", "context", "history", "messages", "conversations"  # columns of a prompt
MESSAGES_AS_TEXT = re.compile(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:.*\]\s*", re.S)
ROLES = "system", "developer", "user", "assistant", "tool"
# sets of token ids: those at which the model stops, and these with all special ones
Endings = namedtuple("Endings", "stops special")


def load_pretrained(kind, name, **options):
    """Load a config, tokenizer or model from a folder, the hub or its cache, or raise UserError."""
    remedy = f"name a preset ({', '.join(PRESETS)}; tiny is data/tiny beside alphapo.py), a folder"
    remedy += " or a hub id with safetensors; a gated one needs its licence and `hf auth login`"
    with user_error(f"--model {name}: not loaded", remedy):
        return kind.from_pretrained(name, **options)


def read_examples(name):
    """The examples of a file or hub data set: rows, or lines of JSON in bytes."""
    kind = Path(name).suffix.lower()
    if kind in (".json", ".jsonl"):  # a list of rows, or one a line, whatever the file is called
        content = Path(name).read_bytes().removeprefix(b"\xef\xbb\xbf")
        is_list = content.lstrip().startswith(b"[")
        return json.loads(content) if is_list else content.split(b"\n")
    import datasets  # here, because it takes seconds

    if kind == ".parquet":
        return datasets.Dataset.from_parquet(name)
    if os.path.isfile(name):  # the hub would be asked for it, again and again
        raise ValueError(f"files {kind} are not read")
    repository, _, split = name.partition(":")
    return datasets.load_dataset(repository, split=split or "train")


def parse_example(example):
    """(prompt, chosen, rejected, template options) of a row in a preference format of TRL: texts or
    messages, each response without the prompt. UserError where a part would be lost."""
    if not isinstance(example, dict):
        raise UserError(f"must be an object with columns, not {ascii(example):.80}")
    filled = {key for key, value in example.items() if value not in (None, "", [], {})}
    asked = {key for key in filled if key.lower() in PROMPTS}
    prompt, chosen, rejected = (example.get(name) for name in ("prompt", "chosen", "rejected"))
    if lost := filled.intersection(MEDIA):
        raise UserError(f"{min(lost)!r} would be lost, as only text is trained; drop such rows")
    for text in (prompt, chosen, rejected):
        if isinstance(text, str) and MESSAGES_AS_TEXT.fullmatch(text):
            raise UserError("a list of messages as text: write it as a list, in JSON lines")
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str | None):
        # {"prompt": "2+2=", "chosen": "4", "rejected": "5"}, or the same without a prompt
        asked |= filled.intersection(["tools", "chat_template_kwargs"])  # which need messages
        for name in sorted(asked):
            if str(example[name]) not in (prompt or ""):
                raise UserError(f"{name!r} would be lost: put it into the prompt, or drop it")
        repeated = prompt and chosen.startswith(prompt) and rejected.startswith(prompt)
        start = len(prompt) if repeated and len(prompt) >= 20 else 0  # a short "a" begins "apple"
        return prompt, chosen[start:], rejected[start:], {}
    lists = isinstance(chosen, list) and isinstance(rejected, list)
    if not lists or not isinstance(prompt, list | str | None):
        types = {key: type(example[key]).__name__ for key in sorted(filled)}
        raise UserError(f"needs 'chosen' and 'rejected', both texts or both lists, not {types!a}")
    if not isinstance(prompt, list):  # "Hi" with [assistant] twice, or [user, assistant] twice
        question = [] if prompt is None else [dict(role="user", content=prompt)]
        prompt = chosen[:-1] or question  # a text beside [user, assistant] is checked below
    for message in [*prompt, *chosen, *rejected]:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(f"a message needs a role ({', '.join(ROLES)}): {ascii(message):.80}")
        if lost := list(filter(message.get, BEYOND_TEXT)):
            raise UserError(f"{lost[0]!r} of a message would be lost; pass rendered texts")
        if not isinstance(message.get("content"), str):
            raise UserError(f"a message needs a text as its content: {ascii(message):.80}")
    head, *sides = ([(m["role"], m["content"]) for m in x] for x in (prompt, chosen, rejected))
    rest = [side[len(head) :] if side[: len(head)] == head else side for side in sides]
    roles = [[role for role, _ in side] for side in rest]
    if not prompt or prompt[-1]["role"] == "assistant" or roles != [["assistant"]] * 2:
        raise UserError(f"needs one prompt, then one assistant message each; responses are {roles}")
    present = [*prompt, *chosen, *rejected, *(message["content"] for message in prompt)]
    for name in sorted(asked):
        parts = example[name] if isinstance(example[name], list) else [example[name]]
        if not all(part in present for part in parts):
            raise UserError(f"{name!r} would be lost: make it a message of the prompt, or drop it")
    given = example.get("chat_template_kwargs") or {}  # Parquet fills in None
    options = {key: value for key, value in given.items() if value is not None}
    if "tools" in filled:
        tools = example["tools"]
        options["tools"] = json.loads(tools) if isinstance(tools, str) else tools
    return prompt, chosen[-1], rejected[-1], options


def common_prefix(*sequences):
    """How many letters or tokens at the start are the same in all sequences."""
    differ = (i for i, items in enumerate(zip(*sequences)) if len(set(items)) > 1)
    return next(differ, min(map(len, sequences)))


def render(tokenizer, prompt, responses, options):
    """Text of the prompt, texts of prompt and response, and what follows a response in them, as the
    next header in some templates. Others move or drop a part of the prompt once a response follows,
    or drop a part of a response: UserError shows what is lost. The text of a special token in a
    message becomes that token, as it does at inference."""
    if not tokenizer.chat_template:
        raise UserError("the tokenizer of --model has no chat template: pass texts, or give it one")
    template = functools.partial(tokenizer.apply_chat_template, tokenize=False, **options)
    begin = template(prompt, add_generation_prompt=True)
    mark = "\ue000"  # a character for private use, so it is in no template
    after = template([*prompt, responses[0] | {"content": mark}]).rpartition(mark)[2]
    whole = [template([*prompt, response]) for response in responses]
    bare = functools.partial(re.sub, r"\s", "")  # templates strip and add white space
    lost, rest = [], bare(begin)
    for message in prompt:  # in their order, because one text may occur in another
        text = bare(message["content"])
        if text not in rest:
            lost.append(message["content"])
        rest = rest[rest.find(text) + len(text) :]  # after a loss, anything: the first is shown
    if options.get("tools") and begin == template(prompt, add_generation_prompt=True, tools=None):
        lost.append("tools")
    for text, response in zip(whole, responses):
        answer = bare(text.removeprefix(begin.rstrip()).removesuffix(after))
        if not text.startswith(begin.rstrip()):
            lost.append(begin[common_prefix(begin, text) :])
        elif not text.endswith(after) or not answer.endswith(bare(response["content"])):
            lost.append(response["content"])
    if lost:
        raise UserError(f"the chat template loses or moves {lost[0]!r:.100}; pass rendered texts")
    return begin, whole, after


def tokenize(tokenizer, endings, text, after):
    """Token ids of prompt and response up to the end of its turn: the first token after the
    response at which the model stops, else the first special one, else EOS, if there is one.
    after: the text behind the response, or None for a row of texts, which may hold that end."""
    ids = kept = tokenizer.encode(text, add_special_tokens=False)
    if after is not None:
        kept = tokenizer.encode(text.removesuffix(after), add_special_tokens=False)
    elif endings.special.intersection(ids):  # the end that it holds comes off, and is found again
        while kept and (kept[-1] in endings.special or not tokenizer.decode(kept[-1]).strip()):
            kept = kept[:-1]
    start = common_prefix(kept, ids)  # a token less than kept, where its last one merges with after
    for kind in endings:  # stops first
        for i in range(start, len(ids)):
            if ids[i] in kind:
                return ids[: i + 1]
    return kept if tokenizer.eos_token_id is None else [*kept, tokenizer.eos_token_id]


def encode(example, tokenizer, endings, config, notes):
    """Token ids (prompt, chosen, rejected) of a row, int32, or None where it cannot teach. Prompt
    and response are tokenized together, because tokenizers merge across the boundary. Where a pair
    is too long, the prompt loses its beginning, then responses their ends. notes: counts this."""
    prompt, *responses, options = parse_example(example)
    if isinstance(prompt, list):
        begin, texts, after = render(tokenizer, prompt, responses, options)
        responses = [message["content"] for message in responses]
    else:
        begin, texts, after = prompt, [(prompt or "") + response for response in responses], None
    encoded = [tokenize(tokenizer, endings, text, after) for text in texts]
    if begin is not None:
        encoded.append(tokenizer.encode(begin, add_special_tokens=False))
    bos = [tokenizer.bos_token_id]
    if after is None and tokenizer.encode("")[:1] == bos:  # a template writes it itself
        encoded = [ids if ids[:1] == bos else bos + ids for ids in encoded]
    split = min(common_prefix(*encoded), len(encoded[0]) - 1, len(encoded[1]) - 1)
    prompt, chosen, rejected = encoded[0][:split], encoded[0][split:], encoded[1][split:]
    for ids in (chosen, rejected):  # for without a prompt, a text is more than its response
        words = [i for i in ids if i not in endings.special]
        responses.append(tokenizer.decode(words))
    if not prompt or not all(map(str.strip, responses)):
        notes["pairs dropped, because the prompt or a response is empty"] += 1
        return None
    longest = max(len(chosen), len(rejected))
    most = config.max_length - min(longest, 248, config.max_length // 2)  # SimPO's 1800 of 2048
    if len(prompt) > most:
        notes["prompts truncated"] += 1
        head = bos if prompt[:1] == bos else []
        prompt = head + prompt[len(prompt) - most + len(head) :]
    room = config.max_length - len(prompt)
    if longest > room:
        notes["pairs with a response truncated"] += 1
    if chosen[:room] == rejected[:room]:
        notes["pairs dropped, because the responses are equal"] += 1
        return None
    return [np.array(ids, np.int32) for ids in (prompt, chosen[:room], rejected[:room])]


def load_pairs(name, tokenizer, endings, config, notes, digest):
    """A list of Pair, or UserError with the reasons for which rows are refused. notes: counts what
    was dropped or cut. digest: takes in rows as they were read, as a template may add a date."""
    pairs, refused, before = [], {}, notes.copy()
    digest.update(b"file")  # a row that moves from one to the other makes another digest
    with user_error(f"{name}: not loaded", "name a .jsonl, .json or .parquet file, or a hub id"):
        for n, example in tqdm(enumerate(read_examples(name), 1), name, leave=False, disable=None):
            if isinstance(example, bytes) and not example.strip():  # an empty line is no row
                continue
            place = f"{name}:{n}"
            try:
                example = json.loads(example) if isinstance(example, bytes) else example
                digest.update(json.dumps([example], default=str).encode())
                if ids := encode(example, tokenizer, endings, config, notes):
                    pairs.append(Pair(*ids, place))
            except Exception as error:  # ours, or of JSON, of a template, or what nobody foresaw
                reason = str(error) if isinstance(error, UserError) else f"not read: {error!r:.200}"
                refused.setdefault(reason, []).append(place)
    if refused:
        lines = [f"{places[0]}: {reason} ({len(places)})" for reason, places in refused.items()]
        raise UserError("\n".join(lines[:10]))
    if not pairs:
        raise UserError(f"{name}: has no usable pair: {dict(notes - before) or 'it is empty'}")
    return pairs


def load_data(config):
    """(tokenizer, pairs to train on, held-out pairs, notes, SHA-256 of rows and tokenizer)."""
    tokenizer = load_pretrained(transformers.AutoTokenizer, config.model)
    stops = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError, ValueError, TypeError):  # without this file, EOS is all
        eos = transformers.GenerationConfig.from_pretrained(config.model).eos_token_id
        stops.update(eos if isinstance(eos, list) else [eos])
    stops.discard(None)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    endings = Endings(stops, special - {tokenizer.unk_token_id} | stops)  # unknown words are text
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    source = json.dumps([rules, tokenizer.chat_template, sorted(stops)], sort_keys=True)
    notes, digest = Counter(), hashlib.sha256(source.encode())
    pairs = load_pairs(config.data, tokenizer, endings, config, notes, digest)
    for part, ids in zip(Pair._fields, pairs[0][:3]):  # to see what the template makes of it
        print(f"first {part:9} ... {tokenizer.decode(ids[-20:])!r}")
    pairs = [pairs[i] for i in np.random.default_rng(config.seed).permutation(len(pairs))]
    if config.eval_data:
        eval_pairs = load_pairs(config.eval_data, tokenizer, endings, config, notes, digest)
    else:
        count = math.ceil(config.eval_split * (len(pairs) - 1))  # one is left to train on
        eval_pairs, pairs = pairs[:count], pairs[count:]
    print(f"{len(pairs)} pairs to train on, {len(eval_pairs)} held out")
    for what, count in notes.items():
        print(f"note: {count} {what}")
    return tokenizer, pairs, eval_pairs, notes, digest.hexdigest()


# ------------------------------------------------------------------------------------ the model
def make_skeleton(name):
    """The model on the meta device: its modules and shapes without weights, or UserError."""
    config = load_pretrained(transformers.AutoConfig, name)
    if getattr(config, "quantization_config", None):
        raise UserError(f"--model {name}: is quantized; name its bfloat16 or float32 version")
    with user_error(f"--model {name}", "choose a causal language model"), torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def load_model(name):
    """The model in float32 on the CPU. UserError where weights are missing, or would be made up."""
    if Path(name, "adapter_config.json").exists():
        raise UserError(f"--model {name}: holds an adapter beside its weights; merge or remove it")
    options = dict(dtype=torch.float32, use_safetensors=True)
    options.update(ignore_mismatched_sizes=True, output_loading_info=True)  # refused below
    model, report = load_pretrained(transformers.AutoModelForCausalLM, name, **options)
    for problem, found in report.items():
        if found:
            names = ", ".join(sorted(map(str, found)))
            raise UserError(f"--model {name}: {problem} {names:.200}; take all files of one model")
    return model


@torch.no_grad()
def check_model(model, pairs):
    """(why shared rows are wrong for this model or None, the pair that was run, its logps in plain
    rows). UserError where the model is not causal or not finite."""
    device, config = model.device, model.config.get_text_config()
    pair = max(pairs, key=lambda pair: pair_tokens(pair, plain_rows=True))
    window = getattr(config, "sliding_window", None) or math.inf
    if pair_tokens(pair, plain_rows=True) / 2 < window:  # no window cuts it: a short one will do
        pair = Pair(pair.prompt[-256:], pair.chosen[:128], pair.rejected[:128])
    ids = make_rows([pair], plain_rows=True, device=device)[0][:1, :384].repeat(2, 1)  # of chosen
    ids[1, -1] = (ids[1, -1] + 1) % config.vocab_size  # a copy with another last token
    with user_error("--model", "its forward pass must take logits_to_keep, as most do"):
        plain = torch.cat(pair_logps(model, [pair], plain_rows=True, device=device)).cpu()
        logits, others = model(ids, use_cache=False).logits[:, :-1]
    if not plain.isfinite().all():
        raise UserError("--model: its log-probabilities are not finite; download the weights again")
    if (logits - others).abs().max() > 1e-5 * logits.abs().max():  # a random BERT's: 6e-4
        raise UserError("--model: its tokens see later ones; choose a causal language model")
    try:
        shared = torch.cat(pair_logps(model, [pair], device=device)).cpu()
        off = (shared - plain).abs().max() / max(1, plain.abs().max())
        # 5e-7 where shared rows are right, 1e-3 where layers keep a state; NaN is not below 1e-4
        reason = None if off < 1e-4 else f"they are off by {off:.1e}"
    except Exception as error:  # models of other kinds raise errors of their own
        reason = repr(error)
    return reason, pair, plain


def layers_of(model):
    """The decoder's layers: the list of modules with most parameters (a vision tower has fewer)."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=[])


def on_first(function, *arguments):
    """Call a function on the first process, and give its result, or what it raises, to all."""
    outcome = [None, None]  # a result and an error
    if RANK == 0:
        try:
            outcome[0] = function(*arguments)
        except Exception as error:
            outcome[1] = error
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(outcome, device=torch.device("cpu"))
    if outcome[1]:
        raise outcome[1]
    return outcome[0]


def shard(whole, skeleton, config, pin_memory):
    """The model to train. FSDP2 keeps float32 weights and gradients and computes in config.dtype;
    one process in float32 on a CPU needs no engine. whole: the loaded model on the first process,
    None on the others, which receive their shards into the skeleton."""
    model = whole if WORLD_SIZE == 1 else skeleton
    on_host = config.offload != "false"
    if config.gradient_checkpointing:  # transformers' own needs training mode, which has dropout
        recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        for layer in layers_of(model):
            layer.forward = functools.partial(recompute, layer.forward)
    if config.device == "cpu" and config.dtype == "float32" and WORLD_SIZE == 1 and not on_host:
        return model
    dtypes = MixedPrecisionPolicy(getattr(torch, config.dtype), reduce_dtype=torch.float32)
    options = dict(mesh=dist.init_device_mesh(config.device, (WORLD_SIZE,)), mp_policy=dtypes)
    if on_host:
        options.update(offload_policy=CPUOffloadPolicy(pin_memory=pin_memory))
    options["reshard_after_forward"] = False if config.offload == "keep" else None  # all but root
    for module in [*layers_of(model), model]:
        fully_shard(module, **options)
        module.set_gradient_divide_factor(1.0)  # a sum, as each loss is divided by all pairs
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other (pytorch issue 190747)
    if WORLD_SIZE > 1:
        model.to_empty(device="cpu" if on_host else config.device)
        weights = whole.state_dict() if whole else {}
        how = state_dicts.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        state_dicts.set_model_state_dict(model, weights, options=how)
        model.generation_config = on_first(lambda: whole.generation_config)  # ours is made up
        buffers = on_first(lambda: dict(whole.named_buffers()))  # rotary tables, in no state dict
        for name, buffer in model.named_buffers():
            buffer.data = buffers[name].to(config.device)
    return model


def make_optimizer(model):
    """(AdamW, every tensor that a run needs to go on, by name), before any forward pass, since FSDP
    may show other parameters after it. Weights are float32: at a rate of 1e-6 an update is about
    1e-6, and bfloat16 numbers near 0.02 lie 1e-4 apart."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    tensors = {}
    for name, param in model.named_parameters():
        moments = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[param] = moments | dict(step=torch.zeros((), device=param.device))
        tensors[name] = param.detach()
        tensors |= {f"{name}.{key}": tensor for key, tensor in optimizer.state[param].items()}
    return optimizer, tensors


# ------------------------------------------------------------------------------------ the plan
def free_memory(device):
    """GiB that a run may take: a GPU loses 5 % to fragmentation, and a container has a limit."""
    if device == "cuda":
        return 0.95 * torch.cuda.mem_get_info()[0] / GIB
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB]
    with contextlib.suppress(OSError, ValueError):  # there is none, or it says "max"
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()) / GIB)
    return min(sizes)


def activation_memory(model, config, pairs):
    """GiB of a micro-batch beside the weights, at most, fitted to Llama, Mistral and Gemma-2."""
    text, item = model.config.get_text_config(), getattr(torch, config.dtype).itemsize
    sizes = [pair_tokens(pair, config.plain_rows) for pair in pairs]
    longest = max(sizes)
    tokens = min(max(config.micro_tokens, longest), config.batch_size * longest)
    share = max((len(p.chosen) + len(p.rejected)) / size for p, size in zip(pairs, sizes))
    hidden = text.hidden_size
    inner = int(np.max(getattr(text, "intermediate_size", None) or 4 * hidden))  # or one a layer
    layer = item * (16 * hidden + 4 * inner)  # bytes a token
    if getattr(text, "attn_logit_softcapping", None):  # then scores of every head are kept
        layer += 12 * longest // (1 + config.plain_rows) * text.num_attention_heads
    kept = text.num_hidden_layers * (item * hidden if config.gradient_checkpointing else layer)
    logits = 12 * share * text.vocab_size + 4 * item * hidden
    masks = 0 if config.plain_rows else 3 * item * longest
    return tokens * (kept + max(1.2 * layer, logits) + masks) / GIB  # 1.2: in its backward pass


def find_settings(config, model, pairs):
    """The first settings with which a run fits this machine, or the last, and what it takes (GiB).
    A parameter takes 16 bytes in float32 (weight, gradient, two moments) over all processes. The
    device also holds the copies to compute with, and with "keep" the sums of gradients; with
    "layers", three layers at a time. Pinned memory comes in blocks of powers of two."""
    on_gpu, item = config.device == "cuda", getattr(torch, config.dtype).itemsize
    unit = model.num_parameters() / GIB  # GiB of a byte for each parameter
    absent = sum(p.numel() for layer in layers_of(model)[:-3] for p in layer.parameters()) / GIB
    weights = {  # GiB of the device
        "false": 16 * unit / WORLD_SIZE + (2 * unit if item == 2 else 0),
        "keep": (item + 4) * unit,
        "layers": 12 * (unit - absent),  # weight, copy and gradient of all that is there
    }
    groups = {"auto": list(weights) if on_gpu else ["false"], "true": ["keep", "layers"]}
    wanted = groups.get(config.offload, [config.offload])
    # logits of 2 GiB at most; a CPU is no faster with more than 384 tokens
    most = 2**29 // model.config.get_text_config().vocab_size if on_gpu else 384
    recomputes = [x for x in (False, True) if config.gradient_checkpointing in (None, x)]
    # on an H100, a 7B step of 4096 tokens without recomputing beats one of 8192 with it by 12 %
    fast = [(recompute, min(8192 if recompute else 4096, most)) for recompute in recomputes]
    # layer by layer, every micro-batch moves all weights, so it is as large as memory allows
    large = [(recompute, 2**n) for n in range(15, 8, -1) for recompute in recomputes]
    choices = {"false": fast, "keep": fast, "layers": large if on_gpu else fast}
    ways = [(where, *choice) for where in wanted for choice in choices[where]]
    for offload, recompute, tokens in ways:  # until one fits
        settings = dict(offload=offload, gradient_checkpointing=recompute)
        settings["micro_tokens"] = config.micro_tokens or tokens
        tried = dataclasses.replace(config, **settings)
        on_device = weights[offload] + activation_memory(model, tried, pairs)
        on_host = 0.5 + (0 if offload == "false" else 16 * unit / WORLD_SIZE)  # 0.5: Python
        on_host += 0 if on_gpu else on_device
        # the first process takes 4 bytes a parameter as it loads, and 6 as it saves
        memory = {config.device: on_device, "cpu": max(LOCAL_WORLD_SIZE * on_host, 6 * unit)}
        if fits := all(gib < free_memory(device) for device, gib in memory.items()):
            break
    sizes = [4 * p.numel() / WORLD_SIZE for p in model.parameters()]
    more = 2 * sum(2 ** math.ceil(math.log2(size)) - size for size in sizes) / GIB
    pinned = memory["cpu"] + LOCAL_WORLD_SIZE * more  # weights and gradients, each in a block
    pin_memory = on_gpu and offload != "false" and pinned < free_memory("cpu")
    if pin_memory:
        memory["cpu"] = pinned
    return dict(settings=settings, memory=memory, fits=fits, pin_memory=pin_memory)


def make_plan(config, model, pairs, eval_pairs):
    """Print and return what a run takes, or UserError where, but for --plan, it does not fit."""
    everything, count = [*pairs, *eval_pairs], model.num_parameters()
    text = model.config.get_text_config()
    longest = max(pair_tokens(pair, plain_rows=True) // 2 for pair in everything)
    limit = getattr(text, "max_position_embeddings", None) or math.inf
    if math.ceil(longest / 8) * 8 > limit:  # as rows are padded
        raise UserError(f"--max-length {limit // 8 * 8} at most: the model has no more positions")
    if max(np.concatenate(pair[:3]).max() for pair in everything) >= text.vocab_size:
        raise UserError(f"--model {config.model}: the tokenizer has ids beyond the embedding")
    steps_per_epoch = math.ceil(len(pairs) / config.batch_size)
    steps = min(config.max_steps or math.inf, steps_per_epoch * config.epochs)
    # bytes: 2 a parameter for the model, 12 for a checkpoint, of which --save-every keeps two and
    # writes a third, and a signal writes one
    disk = (2 + (36 if config.save_every else 12)) * count / GIB
    out = Path(config.out).absolute()
    room = shutil.disk_usage(next(p for p in (out, *out.parents) if p.exists())).free / GIB
    plan = find_settings(config, model, everything)
    ratio = config.gamma / config.beta
    print(f"alpha {config.alpha:g}, beta {config.beta:g}, gamma {config.gamma:g} (/beta {ratio:g})")
    print(f"{count / 1e6:,.1f} M parameters in {config.dtype} on {WORLD_SIZE} x {config.device}")
    print(f"{steps} steps of {config.batch_size} pairs; disk: {disk:.2f} of {room:.2f} GiB")
    print(" ".join(f"--{k.replace('_', '-')} {v}".lower() for k, v in plan["settings"].items()))
    for device, gib in plan["memory"].items():
        print(f"memory of {device}: {gib:.2f} of {free_memory(device):.2f} GiB")
    if not plan["fits"] and not config.plan:
        raise UserError("does not fit in memory: lower --micro-tokens, or add GPUs or host memory")
    if disk > room and not config.plan and not config.resume:
        raise UserError(f"--out {config.out}: the disk has no room for {disk:.2f} GiB")
    return plan | dict(parameters=count, steps=steps, steps_per_epoch=steps_per_epoch)


# ------------------------------------------------------------------------------------ checkpoints
# settings that may change when a run is resumed; rows are compared themselves, not their files
MAY_CHANGE = ["data", "eval_data", "out", "learning_rate", "device", "offload", "micro_tokens"]
MAY_CHANGE += ["gradient_checkpointing", "eval_every", "save_every", "resume"]
MAY_CHANGE += ["config.json: transformers_version"]


def checkpoints(out):
    """The folders checkpoint-STEP in out, newest first, also where a step has seven digits."""
    folders = Path(out).glob("checkpoint-*[0-9]")
    return sorted(folders, key=lambda path: (len(path.name), path), reverse=True)


def claim(config, on_exit):
    """Make --out, and lock it for the run. UserError if it holds more than a run to resume."""
    out = Path(config.out)
    with user_error(f"--out {out}: not taken", "pass another, as another run may be writing there"):
        if not out.exists():
            out.mkdir(parents=True)
            # a run that writes nothing leaves no folder, so that the same command works again
            on_exit.callback(lambda: None if os.listdir(out) else out.rmdir())
        lock = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
        on_exit.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if config.resume and (not checkpoints(out) or (out / "summary.json").exists()):
        raise UserError(f"--resume: {out} has no checkpoint of an unfinished run; start a new one")
    if os.listdir(out) and not config.resume:
        raise UserError(f"--out {out}: is not empty; pass another, or --resume an unfinished run")
    shutil.rmtree(out / ".partial", ignore_errors=True)  # of a run that was killed amid a save


def load_checkpoint(config, state, tensors):
    """Load the newest checkpoint in --out into the tensors, and return its state. state: of the run
    that would begin. UserError where that is another run, or a file is of another checkpoint."""
    folder = checkpoints(config.out)[0]
    remedy = "pass what its run was passed, restore its files or libraries, or take the one before"
    with user_error(f"{folder}: not loaded", remedy):
        saved = json.loads((folder / "state.json").read_text())
        known = dict(rows_and_tokenizer=None) | saved["config"] | saved["made_from"]
        for name, value in (state["config"] | state["made_from"]).items():
            old = known.get(name, value)  # a checkpoint may be older than a setting
            if old != value and name not in MAY_CHANGE:
                raise ValueError(f"{name} is {value}, and was {old} in that run")
        named = {f"{saved['step']}.{name}": tensor for name, tensor in tensors.items()}
        # it raises where a tensor is missing or has another shape
        dcp.load(named, storage_reader=dcp.HuggingFaceStorageReader(folder))
        if RANK == 0:
            shutil.copy(folder / "metrics.jsonl", config.out)  # without the steps that came after
    print(f"resumed after step {saved['step']}")
    return saved | dict(config=state["config"])


def save_checkpoint(out, state, tensors):
    """Write checkpoint-STEP, named when all of it is on the disk; keep it and the one before."""
    partial = out / ".partial"
    # names with the step, so that no file of another checkpoint passes for one of this
    named = {f"{state['step']}.{name}": tensor for name, tensor in tensors.items()}
    # a file for each, because the writer holds a whole file in memory
    files = {name: number for number, name in enumerate(named, 1)}
    writer = dcp.HuggingFaceStorageWriter(partial, files, save_distributed=True)
    with user_error("a checkpoint was not written", "--resume takes the one before"):
        dcp.save(named, storage_writer=writer)
    if RANK == 0:
        (partial / "state.json").write_text(json.dumps(state))
        shutil.copy(out / "metrics.jsonl", partial)
        os.sync()
        partial.rename(out / f"checkpoint-{state['step']:06}")
        for older in checkpoints(out)[2:]:
            shutil.rmtree(older)
    dist.barrier()  # torchrun ends all when one exits, and the first may still be writing


# ------------------------------------------------------------------------------------ training
def learning_rate_at(step, steps, config):
    """Linear warm-up, then a cosine to zero. step counts from 0; no step has a rate of zero."""
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    return config.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def start_processes(config, on_exit):
    """Join torchrun's processes until the run ends, or be a group of one."""
    if config.device == "cuda":
        torch.cuda.set_device(int(TORCHRUN.get("LOCAL_RANK", 0)))
        torch.backends.cuda.enable_cudnn_sdp(False)  # masks can give NaN (pytorch issue 196678)
        # AdamW may run on the host, for which torchrun sets one thread
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // LOCAL_WORLD_SIZE))
    if not dist.is_initialized():
        alone = {} if TORCHRUN else dict(store=dist.HashStore(), rank=0, world_size=1)
        backend = "cpu:gloo,cuda:nccl" if config.device == "cuda" else "gloo"
        # all wait while the first downloads a model, or writes it
        dist.init_process_group(backend, timeout=timedelta(hours=3), **alone)

        def leave(error, *_):  # a process that fails alone would wait here for the others
            if error in (None, UserError):
                dist.destroy_process_group()

        on_exit.push(leave)


def catch_signals(on_exit):
    """A list that grows by each signal from now on; the run ends after the step of the first."""
    received = []
    with contextlib.suppress(ValueError):  # only the main thread catches signals
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                before = signal.signal(number, lambda caught, frame: received.append(caught))
                on_exit.callback(signal.signal, number, before)
        print("Ctrl-C finishes the step at hand and saves; Ctrl-\\ quits at once", flush=True)
    return received


def clip_gradient(optimizer, max_norm):
    """Clip the gradient, and return its norm before. FloatingPointError if that is not finite."""
    params = [param for param in optimizer.param_groups[0]["params"] if param.grad is not None]
    # on a CPU, torch takes one core for the norm of a matrix, and all of them for those of its rows
    norms = [torch.linalg.vector_norm(param.grad, dim=-1) for param in params]
    norm = torch.nn.utils.get_total_norm(norms)
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient norm is {norm}")
    return norm


def rehearse(model, optimizer, pairs, checked, loss_fn, config):
    """Run now what would fail hours later: the checked pair as the run computes it, and gradients
    of the micro-batches with most tokens and most response tokens. UserError where one is wrong."""
    probe, exact = checked
    tokens = np.array([pair_tokens(pair, config.plain_rows) for pair in pairs])
    answers = np.array([len(pair.chosen) + len(pair.rejected) for pair in pairs])
    copies = np.clip(config.micro_tokens // tokens, 1, min(config.batch_size, len(pairs)))
    largest = (copies * tokens).argmax(), (copies * answers).argmax()
    indices = [i for i in largest for _ in range(copies[i] * WORLD_SIZE)]
    # copies of both in one micro-batch would be more than a step has
    config = dataclasses.replace(config, micro_tokens=int((copies * tokens).max()))
    try:
        with torch.no_grad():
            found = torch.cat(pair_logps(model, [probe], config.plain_rows, config.device)).cpu()
        bound = 0.05 if config.dtype == "bfloat16" else 1e-3  # at least ten times the rounding
        if not (found - exact).abs().max() < bound * max(1.0, exact.abs().max()):  # or NaN
            raise FloatingPointError(f"log-probabilities {found.tolist()}, not {exact.tolist()}")
        run_pairs(model, pairs, indices, loss_fn, config, training=True)
        clip_gradient(optimizer, config.max_grad_norm)  # raises where it is not finite
    except FloatingPointError as error:
        raise UserError(f"rehearsal: {error}; lower --alpha or choose --dtype float32") from error
    optimizer.zero_grad()


def write_metrics(config, step, metrics):
    """Append a line to metrics.jsonl. A run that fails before its first line leaves no file."""
    if RANK == 0:
        with open(Path(config.out, "metrics.jsonl"), "a") as file:
            file.write(json.dumps({"step": step} | metrics) + "\n")


def evaluate(model, pairs, loss_fn, config, step):
    """The METRICS of held-out pairs, named eval_ and written too. FSDP may keep what it gathers
    until the next backward pass, which does no harm, because weights change only after one."""
    means = run_pairs(model, pairs, range(len(pairs)), loss_fn, config) if pairs else {}
    means = {f"eval_{key}": value for key, value in means.items()}
    write_metrics(config, step, means)
    return means


def save_model(model, tokenizer, summary, out):
    """Write the model in bfloat16, the tokenizer, and last summary.json: where that is, all is.
    All of it comes from memory, because the folder that was read may have changed."""
    model.to(torch.bfloat16)
    options = state_dicts.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = state_dicts.get_model_state_dict(model, options=options)  # of the first process only
    if RANK == 0:
        for name in model.all_tied_weights_keys:  # a tensor of two names is written once
            weights.pop(name, None)
        model.save_pretrained(out, state_dict=weights)
        tokenizer.save_pretrained(out)
        for path in out.glob("*.safetensors"):  # safetensors lets only the owner read them
            shutil.copymode(out / "config.json", path)
        (out / ".summary").write_text(json.dumps(summary, indent=2) + "\n")
        os.sync()
        (out / ".summary").rename(out / "summary.json")
    dist.barrier()


def train(config: Config, loss_fn=None, model=None) -> dict | None:
    """Align a model, write it and its figures to config.out, and return what summary.json holds, or
    None on all processes but the first, and for a plan.
    loss_fn: a loss in place of alphapo_loss, (chosen_logps, rejected_logps, pairs, batch) ->
        (losses, chosen_rewards, rejected_rewards), (pairs,) each. batch: indices into pairs.
    model: one that is loaded, on the CPU, in place of the weights that config.model names; it is
        changed, to bfloat16 too.
    Raises UserError, before anything is written, where settings, data or model cannot be used, and
    later where a checkpoint cannot be, or after a signal, once all is saved; FloatingPointError
    where a loss or gradient is not finite; torch.OutOfMemoryError."""
    config = resolve(config)
    out, constants = Path(config.out), (config.alpha, config.beta, config.gamma)
    loss_fn = loss_fn or (lambda chosen, rejected, *_: alphapo_loss(chosen, rejected, *constants))
    with contextlib.ExitStack() as on_exit:
        start_processes(config, on_exit)
        if not config.plan:
            on_first(claim, config, on_exit)
        tokenizer, pairs, eval_pairs, notes, digest = on_first(load_data, config)
        skeleton = make_skeleton(config.model)
        plan = on_first(make_plan, config, skeleton, pairs, eval_pairs)
        if config.plan:
            return None
        config = dataclasses.replace(config, **plan["settings"])
        loaded = []  # not returned, as what on_first returns is sent to all
        on_first(lambda: loaded.append((model or load_model(config.model)).float().eval()))
        reason, *checked = on_first(lambda: check_model(loaded[0], pairs))
        if reason:
            print(f"note: plain rows, which are slower, since shared ones are wrong here: {reason}")
            config = dataclasses.replace(config, plain_rows=True)
        policy = shard(loaded.pop() if loaded else None, skeleton, config, plan["pin_memory"])
        optimizer, tensors = make_optimizer(policy)
        rehearse(policy, optimizer, pairs, checked, loss_fn, config)
        about = json.loads(skeleton.config.to_json_string(use_diff=False))
        made_from = {f"config.json: {name}": value for name, value in about.items()}
        made_from["rows_and_tokenizer"] = digest
        state = dict(step=0, config=dataclasses.asdict(config), made_from=made_from)
        evaluate_at = functools.partial(evaluate, policy, eval_pairs, loss_fn, config)
        if config.resume:
            state = load_checkpoint(config, state, tensors)
        else:
            state["before"] = evaluate_at(0)
        steps, signals = plan["steps"], catch_signals(on_exit)
        # no bar without a terminal: writing it to a closed pipe would raise (Ctrl-C ends tee first)
        options = dict(initial=state["step"], total=steps, unit="step", disable=RANK > 0 or None)
        progress = on_exit.enter_context(tqdm(range(state["step"] + 1, steps + 1), **options))
        for step in progress:
            epoch, number = divmod(step - 1, plan["steps_per_epoch"])
            order = np.random.default_rng([config.seed, epoch]).permutation(len(pairs))
            begin = number * config.batch_size
            indices = order[begin : begin + config.batch_size].tolist()
            optimizer.param_groups[0]["lr"] = rate = learning_rate_at(step - 1, steps, config)
            start = time.perf_counter()
            try:
                metrics = run_pairs(policy, pairs, indices, loss_fn, config, training=True)
                middle = time.perf_counter()
                metrics["grad_norm"] = clip_gradient(optimizer, config.max_grad_norm)
            except FloatingPointError as error:
                raise FloatingPointError(f"step {step}: {error}; lower --learning-rate") from error
            optimizer.step()
            optimizer.zero_grad()
            end = time.perf_counter()
            state["step"] = step
            tokens = sum(len(ids) for i in indices for ids in pairs[i][:3])
            metrics.update(learning_rate=rate, epoch=step / plan["steps_per_epoch"], tokens=tokens)
            metrics.update(pairs=len(indices), seconds=end - start, optimizer_seconds=end - middle)
            write_metrics(config, step, metrics)
            progress.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
            if config.eval_every and step % config.eval_every == 0 and step < steps:
                evaluate_at(step)
            stop = torch.tensor(signals[0] if signals else 0)
            dist.all_reduce(stop, dist.ReduceOp.MAX)  # so that all processes stop, or none
            if stop or (config.save_every and step % config.save_every == 0):
                save_checkpoint(out, state, tensors)
            if stop:
                said = f"stopped after step {step} and saved; the same with --resume goes on"
                raise UserError(said, 128 + stop.item())
        for param in optimizer.param_groups[0]["params"]:  # evaluate what will be saved
            param.detach().copy_(param.detach().bfloat16())
        # gathering the weights takes no more memory than training did, without these
        tensors.clear()
        optimizer.state.clear()
        summary = state | dict(after=evaluate_at(steps), plan=plan, notes=notes)
        summary.update(pairs=len(pairs), eval_pairs=len(eval_pairs), processes=WORLD_SIZE)
        unit = 1 if sys.platform == "darwin" else 1024  # bytes, of ru_maxrss
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        peak = torch.cuda.max_memory_allocated() if config.device == "cuda" else resident
        summary.update(peak_memory_gib=peak / GIB, torch=torch.__version__)
        summary.update(transformers=transformers.__version__)
        save_model(policy, tokenizer, summary, out)
        return summary if RANK == 0 else None


# ------------------------------------------------------------------------------------ report
def read_log(run):
    """The metrics of a run's steps, and of its evaluations."""
    log = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    steps = [metrics for metrics in log if "loss" in metrics]
    return steps, [metrics for metrics in log if "eval_loss" in metrics]


def report(summary):
    """Print what a run did to the held-out pairs and how fast it was, and draw curves.png: a panel
    for each metric, in which dots are the held-out pairs."""
    print(f"{summary['eval_pairs']:5} held-out pairs{'before':>14}{'after':>10}{'change':>10}")
    for key, before in summary["before"].items():
        name, after = key.removeprefix("eval_"), summary["after"][key]
        print(f"{name:24}{before:10.4f}{after:10.4f}{after - before:+10.4f}")
    out = Path(summary["config"]["out"])
    steps, evaluations = read_log(out)
    seconds, pairs, tokens = (sum(m[key] for m in steps) for key in ("seconds", "pairs", "tokens"))
    speed = f"{pairs / seconds:.2f} pairs/s, {tokens / seconds:.0f} tokens/s"
    print(f"{speed}, peak memory {summary['peak_memory_gib']:.2f} GiB")
    print(f"the aligned model is in {out}")
    with contextlib.suppress(ImportError, OSError):  # a picture is not worth a run
        from matplotlib.figure import Figure

        figure = Figure(figsize=(14, 6), layout="constrained")
        for number, key in enumerate(METRICS, 1):
            axis = figure.add_subplot(2, 4, number, title=key, xlabel="step")
            axis.plot([m["step"] for m in steps], [m[key] for m in steps], alpha=0.4)
            held_out = [m[f"eval_{key}"] for m in evaluations]
            axis.plot([m["step"] for m in evaluations], held_out, "o-")
        figure.savefig(out / "curves.png", dpi=110)


# ------------------------------------------------------------------------------------ command line
def fail(message, status=2):
    if RANK == 0 or status == 1:  # 2 is found by all processes, and 1 perhaps by one of the others
        print(f"alphapo: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def parse_arguments(argv):
    """The settings of a command line, over those of the preset that --model names."""
    about = dict(description=__doc__.split("\n")[0], epilog=f"presets: {PRESETS}")
    options = dict(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser = argparse.ArgumentParser(**about, **options)
    parser.error = fail  # in place of a screen of usage
    for field in dataclasses.fields(Config):
        spellings = dict.fromkeys(["--" + field.name.replace("_", "-"), "--" + field.name])
        default = "" if field.default is None else f" (default: {field.default})"
        # --plan alone is --plan true
        switch = dict(nargs="?", const=True) if "bool" in str(field.type) else {}
        parser.add_argument(*spellings, help=field.metadata["help"] + default, **switch)
    given = vars(parser.parse_args(argv))
    name = given.pop("model", "tiny")
    preset = PRESETS.get(name, dict(model=name))
    if "data" in given:
        given.setdefault("eval_data", None)  # a preset's held-out pairs belong to its own data
    return Config(**preset | given)


def main(argv=None):
    if RANK:
        sys.stdout = open(os.devnull, "w")
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # no terminal's encoding ends a run
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if summary := train(parse_arguments(argv)):
            report(summary)
    except UserError as error:
        fail(*error.args)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
        remedy = "lower --micro-tokens if it is memory; --resume takes the last checkpoint, if any"
        fail(f"{error}; {remedy}", 1)


if __name__ == "__main__":
    main()
