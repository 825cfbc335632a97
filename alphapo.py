# SPDX-License-Identifier: MIT
"""AlphaPO in one file: align a language model from pairs of a chosen and a rejected response.

    logp   = (1/|y|) * sum_t log pi(y_t | x, y_<t)       mean log-probability per token
    reward = (1 - exp(-alpha * logp)) / alpha            alpha -> 0 gives logp, which is SimPO
    loss   = -log sigmoid(beta * (reward(chosen) - reward(rejected)) - gamma)

    python alphapo.py                                            # the tiny model, on any CPU
    python alphapo.py --model mistral-7b-instruct --alpha 0.25   # a preset: model, data, settings
    python alphapo.py --model FOLDER --data PAIRS.jsonl --learning-rate 1e-6
    torchrun --nproc-per-node 8 alphapo.py --model mistral-7b-instruct

Left out on purpose: a reference model (the method needs none), a second pass over the prompt, whole
logits (a model that needs those two gets them), LoRA, and code or pickles that come with a model.

Each section uses only what stands above it: loss, settings, pairs, model, rows and
log-probabilities, gradients, weights, checkpoints, plan, training, command line.

AlphaPO: Gupta et al. 2025, arXiv 2501.03884. SimPO: Meng et al. 2024, arXiv 2405.14734.
"""

import argparse
import contextlib
import difflib
import fcntl
import functools
import hashlib
import json
import logging
import math
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the slow imports without a traceback

import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.hf_argparser import HfArg


# ------------------------------------------------------------------------------------ the loss
def alphapo_reward(logps, alpha):
    """Reward (1 - exp(-alpha * logp)) / alpha of each response, before beta (arXiv 2501.03884).

    logps: mean log-probability per token (nats), any shape. alpha: 0 gives logps, SimPO's reward.
    Returns float64, same shape: expm1 keeps the digits that 1 - exp(.) loses near alpha = 0.
    """
    logps = logps.double()
    return -torch.expm1(-alpha * logps) / alpha if alpha else logps


def alphapo_loss(chosen_logps, rejected_logps, alpha, beta, gamma):
    """The AlphaPO loss, -log sigmoid(m) with m = beta * (r(chosen) - r(rejected)) - gamma.

    Its gradient is -sigmoid(-m) * beta * exp(-alpha * chosen_logps) for the chosen log-probability,
    and sigmoid(-m) * beta * exp(-alpha * rejected_logps) for the rejected one (arXiv 2501.03884).

    Args:
        chosen_logps, rejected_logps: mean log-probability per token (nats), (pairs,) each.
        alpha: shape of the reward; 0 is SimPO.
        beta: scale of the reward.
        gamma: target margin. It is the margin itself, while SimPO's settings state gamma / beta.

    Returns:
        (losses, chosen_rewards, rejected_rewards), (pairs,) each, in the dtype of chosen_logps.
        Rewards are multiplied by beta and carry no gradient.

    Raises:
        ValueError: the shapes differ, so that broadcasting would compare the wrong responses.
    """
    if chosen_logps.shape != rejected_logps.shape:
        raise ValueError(f"shapes differ: {chosen_logps.shape} and {rejected_logps.shape}")
    chosen_rewards = beta * alphapo_reward(chosen_logps, alpha)
    rejected_rewards = beta * alphapo_reward(rejected_logps, alpha)
    losses = -torch.nn.functional.logsigmoid(chosen_rewards - rejected_rewards - gamma)
    dtype = chosen_logps.dtype
    return losses.to(dtype), chosen_rewards.detach().to(dtype), rejected_rewards.detach().to(dtype)


# ------------------------------------------------------------------------------------ settings
class UserError(Exception):
    """A mistake that the user can correct: printed as one line, exit status 2."""


RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun
TINY = Path(__file__).resolve().parent / "data" / "tiny"
# fmt: off
PRESETS = {
    "tiny": dict(
        model=str(TINY), data=str(TINY / "train.jsonl"), eval_data=str(TINY / "eval.jsonl"),
        alpha=0.25, beta=2.5, gamma=0.1, learning_rate=2e-4, batch_size=32, epochs=2,
        eval_every=16),
    # AlphaPO's Table 3 as quoted by TRL's paper index and a public implementation note. The table
    # states gamma / beta (0.1, 0.3, 0.5); our gamma is that times beta.
    "mistral-7b-instruct": dict(
        model="mistralai/Mistral-7B-Instruct-v0.2", alpha=0.25, beta=2.5, gamma=0.25,
        data="princeton-nlp/mistral-instruct-ultrafeedback", learning_rate=7e-7),
    "llama-3-8b-instruct": dict(
        model="meta-llama/Meta-Llama-3-8B-Instruct", alpha=0.25, beta=10.0, gamma=3.0,
        data="princeton-nlp/llama3-ultrafeedback-armorm", learning_rate=1.1e-6),
    "gemma-2-9b-it": dict(
        model="google/gemma-2-9b-it", alpha=0.1, beta=10.0, gamma=5.0,
        data="princeton-nlp/gemma2-ultrafeedback-armorm", learning_rate=8e-7),
}
Device = Literal["auto", "cuda", "cpu"]


@dataclass
class Config:
    """Every setting of a run, each also a flag. Config(**PRESETS[name]) is a preset."""

    model: str = HfArg(default="tiny", help="a preset, a model folder or a hub id")
    data: str | None = HfArg(default=None, help="pairs: a file or OWNER/NAME[:SPLIT] of the hub")
    eval_data: str | None = HfArg(default=None, help="held-out pairs, named likewise")
    eval_split: float = HfArg(default=0.02, help="share of pairs to hold out without --eval-data")
    out: str = HfArg(default="out", help="folder for the aligned model and the run's figures")
    alpha: float = HfArg(default=0.25, help="shape of the reward; 0 is SimPO")
    beta: float = HfArg(default=2.5, help="scale of the reward")
    gamma: float = HfArg(default=0.25, help="target margin; SimPO's gamma/beta times beta")
    learning_rate: float = HfArg(default=7e-7, help="peak, after warm-up and before a cosine")
    batch_size: int = HfArg(default=128, help="pairs per optimizer step")
    epochs: int = HfArg(default=1, help="passes over the pairs")
    max_steps: int | None = HfArg(default=None, help="stop after so many optimizer steps")
    warmup_ratio: float = HfArg(default=0.1, help="share of the steps that warm up")
    max_grad_norm: float = HfArg(default=1.0, help="clip the gradient to this norm")
    max_length: int = HfArg(default=2048, help="tokens of prompt and response together")
    max_prompt_length: int | None = HfArg(default=None, help="of a cut prompt (max-length - 248)")
    micro_tokens: int | None = HfArg(default=None, help="per forward pass (cuda 16384, cpu 512)")
    gradient_checkpointing: bool | None = HfArg(default=None, help="recompute layers (cuda: true)")
    plain_rows: bool = HfArg(default=False, help="compute each prompt twice, as other trainers do")
    device: Device = HfArg(default="auto", help="where the model computes")
    dtype: Literal["auto", "bfloat16", "float32"] = HfArg(default="auto", help="of the computation")
    master_device: Device = HfArg(default="auto", help="where float32 weights and moments live")
    compile: bool = HfArg(default=False, help="compile the layers: slow to start, then faster")
    plan: bool = HfArg(default=False, help="say what the run needs, load no weights, and stop")
    eval_every: int | None = HfArg(default=None, help="evaluate every so many steps too")
    save_every: int | None = HfArg(default=None, help="write a checkpoint every so many steps")
    resume: bool = HfArg(default=False, help="continue from the newest checkpoint in --out")
    seed: int = HfArg(default=42, help="of the order of the pairs and the held-out share")
# fmt: on


def resolve(config: Config) -> Config:
    """Fill in the settings that depend on the machine or on others; UserError for a wrong one."""
    may_be_0 = "gamma", "seed", "eval_split", "warmup_ratio"
    for name, value in asdict(config).items():
        shown = f"--{name.replace('_', '-')} {value}: must be"
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{shown} a finite number")
        if name in may_be_0 and value < 0:
            raise UserError(f"{shown} 0 or more")
        if name in ("eval_split", "warmup_ratio") and value >= 1:
            raise UserError(f"{shown} below 1")
        if type(value) in (int, float) and value <= 0 and name not in (*may_be_0, "alpha"):
            raise UserError(f"{shown} above 0")
    if config.data is None:
        presets = ", ".join(PRESETS)
        raise UserError(f"--data is missing: name a file, or one of these as --model: {presets}")
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    if "cuda" in (config.device, config.master_device) and not on_gpu:
        raise UserError("--device cuda, --master-device cuda: torch sees no GPU; leave them out")
    config = replace(config, device="cuda" if on_gpu else "cpu")
    config.dtype = config.dtype.replace("auto", "bfloat16" if on_gpu else "float32")
    config.micro_tokens = config.micro_tokens or (16384 if on_gpu else 512)
    if config.gradient_checkpointing is None:
        config.gradient_checkpointing = on_gpu
    room = min(248, config.max_length // 2)  # what a cut prompt leaves to its responses
    config.max_prompt_length = config.max_prompt_length or config.max_length - room
    if config.max_prompt_length >= config.max_length:
        raise UserError("--max-prompt-length: must be below --max-length")
    if os.path.isdir(config.model):
        config.model = os.path.abspath(config.model)  # a resumed run may start in another folder
    return config


def first_line(error):
    """What an exception says, without the paragraphs that some libraries add."""
    return getattr(error, "strerror", None) or str(error).strip().split("\n")[0] or repr(error)


@contextlib.contextmanager
def one_line(what, remedy):
    """Turn whatever a library raises inside into one line: what failed, why, and the remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {first_line(error)} ({remedy})") from error


@functools.cache
def ask_hub():
    """Find out once whether the hub answers: without a network, libraries retry for a minute."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:
        os.environ["HF_HUB_OFFLINE"] = "1"
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def from_pretrained(kind, name, **options):
    """Load a config, tokenizer or model from a folder, the hub or its cache, or raise UserError."""
    remedy = "a model folder holds config.json, a tokenizer and safetensors; try: git lfs pull"
    if not os.path.isdir(name):
        ask_hub()
        remedy = "no such folder; a hub id needs a network or a filled cache, and for a gated "
        remedy += "model (Llama, Gemma) its licence accepted on the hub and: hf auth login"
        near = difflib.get_close_matches(name, PRESETS, 1)
        if near and "/" not in name:
            remedy = f"did you mean {near[0]}?"
    with one_line(f"--model {name}: not loaded", remedy):
        return kind.from_pretrained(name, **options)


# ------------------------------------------------------------------------------------ pairs
@dataclass
class Pairs:
    """Tokenized pairs in flat arrays: a million pairs of 1,000 tokens take 4 GB."""

    tokens: np.ndarray  # int32: prompt, chosen, rejected, prompt, ...
    bounds: np.ndarray  # int64 (pairs, 4): where prompt, chosen and rejected start, and the end
    places: list[str]  # file:line of each pair, for messages
    notes: Counter  # what was dropped or truncated while reading, by reason

    def __len__(self):
        return len(self.bounds)

    def __getitem__(self, i):
        start, chosen, rejected, end = self.bounds[i]
        return self.tokens[start:chosen], self.tokens[chosen:rejected], self.tokens[rejected:end]

    def take(self, indices):
        """The pairs at these indices, in this order, over the same tokens."""
        places = [self.places[i] for i in indices]
        return Pairs(self.tokens, self.bounds[indices], places, Counter())

    def row_tokens(self, plain):
        """Tokens that each pair takes in a micro-batch before padding, (pairs,)."""
        prompt, chosen, rejected = np.diff(self.bounds).T
        return 2 * (prompt + np.maximum(chosen, rejected)) if plain else prompt + chosen + rejected


def read_rows(name):
    """Yield (place, row) from a file or hub data set. JSON lines stay bytes until parse_row."""
    if name.endswith((".jsonl", ".json")):
        content = Path(name).read_bytes()
        if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            lines = enumerate(content.split(b"\n"), 1)
            yield from ((f"{name}:{number}", line) for number, line in lines if line.strip())
            return
        rows = json.loads(content, parse_int=float)
    elif name.endswith((".parquet", ".csv")) and os.path.isfile(name):
        import datasets  # takes seconds

        rows = datasets.load_dataset(Path(name).suffix[1:], data_files=name, split="train")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) and not os.path.exists(name):
        ask_hub()  # before the import, which looks whether the hub is to be used
        import datasets

        repository, _, split = name.partition(":")
        rows = datasets.load_dataset(repository, split=split or "train")
    else:
        raise ValueError("neither a .jsonl, .json, .parquet or .csv file nor a hub id")
    yield from ((f"{name}: row {number}", row) for number, row in enumerate(rows, 1))


def messages_of(value, key):
    """The role and content of each message of a conversation, or ValueError."""
    expected = f'"{key}" must be a text, or messages with texts as "role" and "content"'
    if not value or not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise ValueError(expected)
    messages = [{"role": m.get("role"), "content": m.get("content")} for m in value]
    texts = [text for message in messages for text in message.values()]
    if not all(isinstance(text, str) for text in texts) or any(m.get("tool_calls") for m in value):
        raise ValueError(f"{expected}, and without tool_calls")
    return messages


def parse_row(row):
    """A data row in one of TRL's preference formats as (prompt, chosen, rejected), or ValueError.

    All are texts or all are messages, and both responses begin with the prompt. A prompt of None
    stands for whatever two texts have in common.
    """
    if isinstance(row, bytes):
        try:  # as float, since an integer of 5,000 digits in some other column would be an error
            row = json.loads(row.decode("utf-8-sig"), parse_int=float)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
        raise ValueError('not an object with "chosen" and "rejected"')
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if all(isinstance(text, str) for text in (prompt or "", chosen, rejected)):
        # {"prompt": "2+2=", "chosen": "4", "rejected": "5"}, or the same without a prompt
        return prompt, (prompt or "") + chosen, (prompt or "") + rejected
    chosen, rejected = messages_of(chosen, "chosen"), messages_of(rejected, "rejected")
    if isinstance(prompt, str) and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        # {"prompt": "Hi", "chosen": [assistant], "rejected": [assistant]}
        prompt = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, str | None):
        # {"chosen": [user, assistant], "rejected": [user, assistant]}; UltraFeedback adds a text
        prompt = chosen[:-1]
    else:
        # {"prompt": [user], "chosen": [assistant], "rejected": [assistant]}
        prompt = messages_of(prompt, "prompt")
    sides = [s if s[: len(prompt)] == prompt else prompt + s for s in (chosen, rejected)]
    roles = [[message["role"] for message in side[len(prompt) :]] for side in sides]
    if not prompt or prompt[-1]["role"] == "assistant" or roles != [["assistant"], ["assistant"]]:
        raise ValueError("must be a prompt that ends with the user, then one assistant message")
    return prompt, *sides


def render(prompt, chosen, rejected, tokenizer):
    """Token ids of the prompt, of prompt + chosen and of prompt + rejected, with one BOS at most.

    Prompt and response are tokenized together, because tokenizers merge across the boundary.
    """
    texts = [chosen if prompt is None else prompt, chosen, rejected]
    is_chat = isinstance(chosen, list)
    if is_chat and not tokenizer.chat_template:
        raise UserError("the pairs are conversations: --model must have a chat template")
    try:
        if is_chat:
            template = functools.partial(tokenizer.apply_chat_template, tokenize=False)
            texts = [template(prompt, add_generation_prompt=True), *map(template, texts[1:])]
        # a template writes BOS itself or wants none
        encoded = tokenizer(texts, add_special_tokens=not is_chat)["input_ids"]
    except Exception as error:  # jinja and tokenizers raise kinds of their own
        raise ValueError(f"chat template or tokenizer refuse it: {first_line(error)}") from error
    bos = tokenizer.bos_token_id
    return [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in encoded]


def end_turn(ids, tokenizer, special):
    """Cut a response after its first end-of-turn token, or add one: (ids, whether it has content).

    Templates write white space (ChatML) or a second special token (Phi-3) after the end of a turn,
    and the mean over the response's tokens must not count those.
    """
    end, end_of_turn = len(ids), None  # walk back to the last token that says something
    while end and (ids[end - 1] in special or not tokenizer.decode(ids[end - 1]).strip()):
        end -= 1
        end_of_turn = end if ids[end] in special else end_of_turn
    if end_of_turn is not None:
        return ids[: end_of_turn + 1], end > 0
    return ids + [i for i in [tokenizer.eos_token_id] if i is not None], end > 0


def encode_row(row, tokenizer, special, max_length, max_prompt_length, notes):
    """Token ids (prompt, chosen, rejected) of a data row, None if it cannot teach, or ValueError.

    Where a pair is too long, the prompt loses its beginning, then the responses lose their ends.
    """
    prompt, chosen, rejected = parse_row(row)
    encoded = render(prompt, chosen, rejected, tokenizer)
    shared = len(os.path.commonprefix(encoded))  # which takes lists too
    if prompt is None:  # each response keeps one token at least
        shared = min(shared, len(encoded[1]) - 1, len(encoded[2]) - 1)
    prompt = encoded[0][:shared]
    chosen, chosen_speaks = end_turn(encoded[1][shared:], tokenizer, special)
    rejected, rejected_speaks = end_turn(encoded[2][shared:], tokenizer, special)
    if not (prompt and chosen_speaks and rejected_speaks):
        notes[f"pairs dropped for an empty {'response' if prompt else 'prompt'}"] += 1
        return None
    if not {chosen[-1], rejected[-1]} <= special:
        notes["pairs without an end of turn, because the tokenizer has no EOS token"] += 1
    if len(prompt) + max(len(chosen), len(rejected)) > max_length:
        if len(prompt) > max_prompt_length:
            notes["prompts truncated"] += 1
            bos = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
            prompt = bos + prompt[len(prompt) - max_prompt_length + len(bos) :]
        room = max_length - len(prompt)
        if max(len(chosen), len(rejected)) > room:
            notes["pairs with a response truncated"] += 1
        chosen, rejected = chosen[:room], rejected[:room]
    if chosen == rejected:
        notes["pairs dropped for equal responses"] += 1
        return None
    return prompt, chosen, rejected


def load_pairs(name, tokenizer, max_length, max_prompt_length) -> Pairs:
    """Read, check and tokenize pairs; UserError names the first ten bad rows as file:line."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = special.union(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    tokens, lengths, places, notes, errors = [], [], [], Counter(), []
    limits = max_length, max_prompt_length
    with one_line(f"{name}: not loaded", "name a file of pairs, or a hub data set within reach"):
        rows = tqdm(read_rows(name), f"reading {name}", unit=" rows", leave=False, disable=None)
        for place, row in rows:
            try:
                pair = encode_row(row, tokenizer, special, *limits, notes)
            except ValueError as error:
                errors.append(f"{place}: {first_line(error)}")
                continue
            if pair:
                tokens.append(np.concatenate(pair).astype(np.int32))
                lengths.append([len(part) for part in pair])
                places.append(place)
    if errors:
        more = [f"... and {len(errors) - 10} more bad rows"] if len(errors) > 10 else []
        raise UserError("\n".join(errors[:10] + more))
    if not places:
        reasons = ", ".join(f"{count} {what}" for what, count in notes.items())
        raise UserError(f"{name}: has no usable pair: {reasons or 'it is empty'}")
    ends = np.cumsum(lengths).reshape(-1, 3)
    bounds = np.column_stack([np.append(0, ends[:-1, 2]), ends])
    return Pairs(np.concatenate(tokens), bounds, places, notes)


def load_data(config):
    """(tokenizer, pairs to train on, held-out pairs); UserError where none is left to train on."""
    tokenizer = from_pretrained(AutoTokenizer, config.model)
    limits = config.max_length, config.max_prompt_length
    read = load_pairs(config.data, tokenizer, *limits)
    order = np.random.default_rng(config.seed).permutation(len(read))
    held_out = 0 if config.eval_data else math.ceil(config.eval_split * len(read))
    if held_out == len(read):
        raise UserError(f"--eval-split {config.eval_split}: holds out all {held_out}; lower it")
    pairs, eval_pairs = read.take(order[held_out:]), read.take(order[:held_out])
    if config.eval_data:
        eval_pairs = load_pairs(config.eval_data, tokenizer, *limits)
    pairs.notes = read.notes + eval_pairs.notes
    print("the first pair as the model sees it:")
    for part, ids in zip(("prompt", "chosen", "rejected"), read[0]):
        text = repr(tokenizer.decode(ids))
        print(f"  {part:9}{text if len(text) < 87 else f'{text[:41]} ... {text[-41:]}'}")
    print(f"{len(pairs)} pairs to train on, {len(eval_pairs)} held out")
    for what, count in pairs.notes.items():
        print(f"note: {count} {what}")
    return tokenizer, pairs, eval_pairs


# ------------------------------------------------------------------------------------ the model
def load_config(name):
    """The config of a model, with every dropout off."""
    config = from_pretrained(AutoConfig, name)
    for part in (config, config.get_text_config()):
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


def empty_model(name):
    """The model on the meta device, without weights, or UserError."""
    config = load_config(name)
    with one_line(f"--model {name}", "choose a causal language model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if model.get_output_embeddings() is None:
            raise ValueError("it has no projection onto a vocabulary")
        return model


def load_model(name, checkpointing=False):
    """A causal language model in float32 on the CPU. UserError where files and config disagree,
    because transformers would make up the weights that are missing."""
    options = dict(config=load_config(name), dtype=torch.float32, use_safetensors=True)
    options |= dict(ignore_mismatched_sizes=True, output_loading_info=True)
    model, report = from_pretrained(AutoModelForCausalLM, name, **options)
    for kind, keys in report.items():
        if keys:
            what = f"{len(keys)} {kind.replace('_', ' ')}, such as {min(map(str, keys))}"
            raise UserError(f"--model {name}: {what}; download config and weights again")
    embedding = model.get_input_embeddings()
    # a tied weight has a dense gradient from the projection; the lookup then adds a few rows to it
    embedding.sparse = model.get_output_embeddings().weight is embedding.weight
    if checkpointing:
        name = "gradient_checkpointing_enable"  # before transformers 5.18
        enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, name)
        enable({"use_reentrant": False})
    return model.train(checkpointing)  # layers are recomputed in training mode only


# -------------------------------------------------------------------- rows and log-probabilities
@dataclass
class Rows:
    """A micro-batch of pairs as padded token rows, and where their response tokens are."""

    input_ids: torch.Tensor  # (rows, time)
    position_ids: torch.Tensor  # (rows, time): rejected starts again where chosen started
    segments: torch.Tensor  # (rows, time): 0 prompt, 1 chosen, 2 rejected, -1 padding
    sources: torch.Tensor  # (tokens,): index into rows * time that predicts each response token
    targets: torch.Tensor  # (tokens,): response tokens, pair by pair, chosen before rejected
    lengths: list[int]  # (2 * pairs,): tokens of each response
    plain: bool  # two rows [prompt | chosen] and [prompt | rejected] per pair instead of one


def make_rows(pairs, plain=False, device="cpu") -> Rows:
    """Lay out pairs (prompt, chosen, rejected: arrays of token ids) as one row each,
    [prompt | chosen | rejected], or as two plain rows that repeat the prompt. Returns Rows on
    device."""
    layouts = []  # per row: its parts as (segment, token ids), the prompt first
    for prompt, chosen, rejected in pairs:
        parts = [(0, prompt), (1, chosen), (2, rejected)]
        layouts += [parts[:2], parts[::2]] if plain else [parts]
    width = max(sum(len(ids) for _, ids in parts) for parts in layouts)
    width = math.ceil(width / 8) * 8  # on CUDA, attention copies a mask of any other width
    input_ids, position_ids = np.zeros((2, len(layouts), width), np.int64)
    segments, sources, targets = np.full((len(layouts), width), -1), [], []
    for row, parts in enumerate(layouts):
        end, prompt_end = 0, len(parts[0][1])
        for segment, ids in parts:
            start, end = end, end + len(ids)
            input_ids[row, start:end], segments[row, start:end] = ids, segment
            position_ids[row, start:end] = np.arange(len(ids)) + (prompt_end if segment else 0)
            if segment:  # the last token of the prompt predicts the first of either response
                sources.append(row * width + np.append(prompt_end - 1, np.arange(start, end - 1)))
                targets.append(ids.astype(np.int64))
    arrays = input_ids, position_ids, segments, np.concatenate(sources), np.concatenate(targets)
    tensors = map(torch.from_numpy, arrays)
    if torch.device(device).type == "cuda":  # out of pinned memory, the copy does not wait
        tensors = (tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
    return Rows(*tensors, [len(ids) for ids in targets], plain)


def attention_masks(config, rows, dtype):
    """Mask of shared rows, (rows, 1, time, time), or a dict of masks where layers are of two kinds.

    A token sees the prompt and its own response, up to itself and within the layer's window. Raises
    NotImplementedError where layers are not attention over the row.
    """
    query, key = rows.segments[:, :, None], rows.segments[:, None, :]
    seen = ((key == query) | (key == 0)).tril()
    distance = rows.position_ids[:, :, None] - rows.position_ids[:, None, :]

    def additive(window):
        # eager attention adds the mask to the scores, so a bool mask would be silently wrong
        masked = ~seen if window is None else ~(seen & (distance < window))
        mask = torch.zeros(masked.shape, dtype=dtype, device=masked.device)
        return mask.masked_fill_(masked, torch.finfo(dtype).min)[:, None]

    windows = {"full_attention": None, "sliding_attention": getattr(config, "sliding_window", None)}
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds <= windows.keys():
        raise NotImplementedError(f"it has layers of kind {', '.join(sorted(kinds))}")
    masks = {kind: additive(windows[kind]) for kind in kinds}
    return masks or additive(windows["sliding_attention"])


class ProjectedLogps(torch.autograd.Function):
    """Log-probabilities of target tokens from hidden states, one chunk of logits at a time.

    The backward pass computes the logits again, so only one chunk of them exists at any time.
    """

    # logits per chunk: on CUDA larger, because each chunk reads the whole projection again
    chunk = {"cpu": 2**24, "cuda": 2**28, "meta": 2**28}

    @staticmethod
    def logits(hidden, weight, softcap):
        logits = (hidden @ weight.T).float()
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap):
        """hidden (tokens, width), weight (vocabulary, width), targets (tokens,) -> (tokens,)."""
        size = max(1, ProjectedLogps.chunk[hidden.device.type] // len(weight))
        ctx.softcap, ctx.size = softcap, size  # of tokens
        normalizers, logps = [], []
        for h, t in zip(hidden.split(size), targets.split(size)):
            logits = ProjectedLogps.logits(h, weight, softcap)
            normalizers.append(logits.logsumexp(1))
            logps.append(logits.gather(1, t[:, None])[:, 0] - normalizers[-1])
        ctx.save_for_backward(hidden, weight, targets, torch.cat(normalizers))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, normalizers = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        chunks = [x.split(ctx.size) for x in (hidden, grad_hidden, targets, normalizers, grad)]
        for h, grad_h, t, normalizer, g in zip(*chunks):
            logits = ProjectedLogps.logits(h, weight, ctx.softcap)
            slope = 1.0 if ctx.softcap is None else 1.0 - (logits / ctx.softcap) ** 2
            # d logp / d logits = onehot(target) - softmax(logits)
            grad_logits = logits.sub_(normalizer[:, None]).exp_().mul_(-g[:, None])
            grad_logits.scatter_add_(1, t[:, None], g[:, None])
            grad_logits = grad_logits.mul_(slope).to(h.dtype)
            torch.mm(grad_logits, weight, out=grad_h)
            product = (grad_logits.T @ h).float()  # float32, because the chunks are summed
            grad_weight = product if grad_weight is None else grad_weight.add_(product)
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def pair_logps(model, rows: Rows):
    """Mean log-probability per token (nats) in float32: (chosen_logps, rejected_logps), (pairs,).

    Shared rows run through the decoder under our masks, and only response tokens are projected onto
    the vocabulary. Plain rows run through the model's own forward pass. Raises NotImplementedError
    where shared rows do not cover a part of the model.
    """
    inputs = dict(input_ids=rows.input_ids, use_cache=False)
    if rows.plain:
        logits = model(**inputs, attention_mask=(rows.segments >= 0).long()).logits
        logits = logits.flatten(0, 1)[rows.sources].float()
        token_logps = logits.gather(1, rows.targets[:, None])[:, 0] - logits.logsumexp(1)
    else:
        head, config = model.get_output_embeddings(), model.config.get_text_config()
        if getattr(head, "bias", None) is not None:
            raise NotImplementedError("its projection has a bias")
        masks = attention_masks(config, rows, model.get_input_embeddings().weight.dtype)
        output = model.base_model(**inputs, position_ids=rows.position_ids, attention_mask=masks)
        hidden = output[0].flatten(0, 1)[rows.sources]
        softcap = getattr(config, "final_logit_softcapping", None)
        token_logps = ProjectedLogps.apply(hidden, head.weight, rows.targets, softcap)
    means = [response.mean() for response in token_logps.split(rows.lengths)]
    return torch.stack(means[0::2]), torch.stack(means[1::2])


@torch.no_grad()
def check_model(model, pair):
    """Compare shared rows with the model's own forward pass, on one pair and in float32.

    Returns (None or why shared rows are wrong for this model, plain log-probabilities (2,)). Right
    rows agree to 5e-7; recurrent layers, or logits scaled after the projection, are 1e-3 off and
    more, so 1e-4 tells them apart. Raises UserError where the model is not causal or not finite.
    """
    tokens = torch.from_numpy(np.append(*pair[:2]).astype(np.int64))[None]
    after = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    before = model(input_ids=tokens[:, :-1], use_cache=False).logits[0]
    plain = torch.stack(pair_logps(model, make_rows([pair], plain=True)))[:, 0]
    if not plain.isfinite().all():
        raise UserError("--model: its log-probabilities are not finite; download the weights again")
    if (before - after).abs().max() > 1e-3 * before.abs().max():
        raise UserError("--model: its tokens see later ones; choose a causal language model")
    rows = make_rows([pair])
    try:
        shared = torch.stack(pair_logps(model, rows))[:, 0]
    except (NotImplementedError, TypeError, ValueError) as error:  # what models raise at our masks
        return first_line(error), plain
    difference, bound = (shared - plain).abs().max().item(), 1e-4 * max(1.0, plain.abs().max())
    return None if difference <= bound else f"they are off by {difference:.1e}", plain


class Policy(torch.nn.Module):
    """The model with its layout of rows. FSDP gathers embedding and projection for its forward."""

    def __init__(self, model, plain_rows):
        super().__init__()
        self.model, self.plain_rows = model, plain_rows

    def forward(self, pairs, device):
        return pair_logps(self.model, make_rows(pairs, self.plain_rows, device))


# ------------------------------------------------------------------------------------ gradients

METRICS = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
METRICS += ["logps/chosen", "logps/rejected"]


def micro_batches(row_tokens, order, micro_tokens):
    """Split indices, the longest row first, into lists whose rows, padded to the longest, take at
    most micro_tokens tokens. row_tokens: of the row of each index."""
    batches = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * row_tokens[batches[-1][0]] <= micro_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def run_pairs(policy, pairs, indices, loss_fn, config, train=False):
    """Mean metrics over the pairs at these indices; to train, sum up the gradients of their loss.

    A micro-batch contributes the sum of its losses over the number of all pairs, so neither its
    size nor the number of processes matters. FloatingPointError names pairs whose loss is not
    finite.
    """
    row_tokens = dict(zip(indices, pairs.take(list(indices)).row_tokens(policy.plain_rows)))
    order = sorted(indices, key=lambda i: -row_tokens[i])
    shares = [order[rank::WORLD_SIZE] for rank in range(WORLD_SIZE)]
    batches = [micro_batches(row_tokens, share, config.micro_tokens) for share in shares]
    work = [(batch, 1) for batch in batches[RANK]]
    # FSDP hangs where processes run unequally many micro-batches, so some run one more for nothing
    work += [(order[:1], 0)] * (max(map(len, batches)) - len(work))
    figures, done = [torch.zeros(len(METRICS), 0, dtype=torch.float64, device=config.device)], []
    for batch, weight in work:
        with torch.set_grad_enabled(train):
            chosen, rejected = policy([pairs[i] for i in batch], config.device)
            losses, chosen_rewards, rejected_rewards = loss_fn(chosen, rejected, pairs, batch)
        if train:  # FSDP averages over processes, hence times their number
            (losses.sum() * (weight * WORLD_SIZE / len(order))).backward()
        margins = chosen_rewards - rejected_rewards
        values = losses, chosen_rewards, rejected_rewards, margins, margins > 0, chosen, rejected
        if weight:
            figures.append(torch.stack([value.detach().double() for value in values]))
            done += batch
    figures = torch.cat(figures, 1)
    sums = figures.sum(1)
    if WORLD_SIZE > 1:
        dist.all_reduce(sums)
    means = dict(zip(METRICS, (sums / len(order)).tolist()))  # the only wait for the device
    if not math.isfinite(means["loss"]):
        losses = zip(done, figures[0].tolist())
        places = {pairs.places[i]: None for i, loss in losses if not math.isfinite(loss)}
        where = ", ".join(list(places)[:10]) or "pairs of another process"
        raise FloatingPointError(f"the loss is not finite, at {where}")
    return means


def learning_rate_at(step, steps, config):
    """Linear warm-up, then a cosine to zero; no step of the run has a rate of zero."""
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    return config.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


# ------------------------------------------------------------------------------------ weights
class MasterAdamW:
    """AdamW on float32 master weights, whatever the model computes in and wherever masters live.

    At a learning rate of 1e-6 an update is a few millionths of a weight, and bfloat16 keeps eight
    bits: on bfloat16 weights nearly every update rounds to nothing. So the model computes with
    copies of the masters, and gradients are summed in float32. Masters and moments take 12 bytes
    per parameter and live on master_device, sums take 4 and live on sum_device.
    """

    def __init__(self, model, device, dtype, master_device, sum_device):
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters, self.adamws, self.sums, self.sum_device = {}, {}, {}, sum_device
        copies = dtype != torch.float32 or len({device, master_device, sum_device}) > 1
        for name, param in self.params.items():
            master = param.detach().to(master_device) if copies else param
            if copies:
                param.data = master.to(device, dtype)
            param.register_post_accumulate_grad_hook(functools.partial(self.add_gradient, name))
            # one AdamW per parameter, so that gradients visit the host one at a time, and moments
            # from the start, so that a checkpoint can be read into them
            adamw = torch.optim.AdamW([master], betas=(0.9, 0.999), weight_decay=0.0, fused=True)
            moments = dict(exp_avg=torch.zeros_like(master), exp_avg_sq=torch.zeros_like(master))
            adamw.state[master] = dict(step=torch.zeros((), device=master_device), **moments)
            self.masters[name], self.adamws[name] = master, adamw
        model.to(device)
        self.buffer = None
        if master_device != device:  # conversion into fresh, pageable memory takes 15 times as long
            largest = max(master.numel() for master in self.masters.values())
            self.buffer = torch.empty(largest, dtype=dtype, pin_memory=True)

    def add_gradient(self, name, param):
        grad = param.grad.to(self.sum_device)
        self.sums[name] = self.sums[name].add_(grad) if name in self.sums else grad.float()
        param.grad = None

    def release(self):
        """Free masters and moments: to write the model takes no more memory than to train it."""
        self.masters, self.adamws, self.sums, self.buffer = {}, {}, {}, None

    def norm(self):
        """Norm of the summed gradients; FloatingPointError where it is not finite."""
        norm = torch.nn.utils.get_total_norm([self.sums[n] for n in self.params if n in self.sums])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of FSDP's shards
        if not norm.isfinite():
            raise FloatingPointError(f"the gradient norm is {norm.item()}")
        return norm

    @torch.no_grad()
    def step(self, learning_rate, max_norm):
        """Clip the gradients, update masters and model, forget the gradients; return their norm.

        Raises FloatingPointError, before any weight changes, where the norm is not finite.
        """
        norm = self.norm()
        clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for name, gradient in self.sums.items():
            master, adamw = self.masters[name], self.adamws[name]
            master.grad = gradient.mul_(clip).to(master.device)
            adamw.param_groups[0]["lr"] = learning_rate
            adamw.step()
            adamw.zero_grad()
            self.copy_to_model(name)
        self.sums.clear()
        return norm.item()

    def copy_to_model(self, name):
        """Copy a master into the model, unless it is the model's own parameter."""
        master, param = self.masters[name], self.params[name]
        if self.buffer is not None:
            master = self.buffer[: master.numel()].view_as(master).copy_(master)
        if master is not param:
            param.data.copy_(master)

    def state(self):
        """Masters and moments by name: the tensors themselves, to be written or read into."""
        tensors = {f"{name}.master": master.detach() for name, master in self.masters.items()}
        for name, adamw in self.adamws.items():
            for key, value in adamw.state[self.masters[name]].items():
                tensors[f"{name}.{key}"] = value
        return tensors


# ------------------------------------------------------------------------------------ checkpoints
GIB = 2**30
# What a resumed run may change; each change is recorded. The data are compared by their hash.
MAY_CHANGE = "data eval_data out learning_rate device micro_tokens gradient_checkpointing compile "
MAY_CHANGE += "master_device eval_every save_every"


def all_agree(flag):
    """Whether the flag is true on every process; none goes on before all have asked."""
    if WORLD_SIZE == 1:
        return flag
    flags = torch.tensor(int(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flags, dist.ReduceOp.MIN)
    return bool(flags)


def checkpoints(out):
    """The folders checkpoint-STEP in out, newest first. Folders of other names are not ours."""
    folders = {path.name.removeprefix("checkpoint-"): path for path in out.glob("checkpoint-*")}
    steps = sorted((step for step in folders if step.isdecimal()), key=int, reverse=True)
    return [folders[step] for step in steps]


def check_out(config):
    """UserError where --out holds something else than the run to start or to resume."""
    out = Path(config.out)
    with one_line(f"--out {out}", "choose another folder"):
        names = os.listdir(out) if os.path.lexists(out) else []
    if config.resume and "summary.json" in names:
        raise UserError(f"--out {out}: the run in it has finished; choose another folder")
    if config.resume and not checkpoints(out):
        raise UserError(f"--resume: there is no checkpoint in {out}; start without --resume")
    if not config.resume and not {"metrics.jsonl", ".partial"}.issuperset(names):
        raise UserError(f"--out {out}: is not empty; choose another, or --resume its run")


def open_run(config, pairs, eval_pairs, optimizer, on_exit):
    """Lock --out until on_exit ends, and return the state of its run: a new one, or with --resume
    that of the newest whole checkpoint, read into optimizer and model. UserError where it is not
    the run to resume."""
    out, digest = Path(config.out), hashlib.sha256()
    for part in (pairs, eval_pairs):
        digest.update(part.tokens.tobytes() + part.bounds.tobytes())
    state = dict(step=0, log_bytes=0, data_sha256=digest.hexdigest(), changes=[])
    state["config"] = asdict(replace(config, resume=False))
    if RANK == 0:
        with one_line(f"--out {out}", "another run may be writing there; choose another folder"):
            out.mkdir(parents=True, exist_ok=True)
            lock = os.open(out, os.O_RDONLY)
            on_exit.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            check_out(config)  # again, since another run may have been here meanwhile
    all_agree(True)
    if not config.resume:
        return state
    for folder in checkpoints(out):
        try:
            old = json.loads((folder / "state.json").read_text())
            if old["data_sha256"] != state["data_sha256"]:
                raise UserError("--data, --eval-data, --seed: not the pairs of the run to resume")
            for name, value in state["config"].items():
                before, flag = old["config"].get(name), f"--{name.replace('_', '-')} {value}"
                if before != value and name not in MAY_CHANGE.split():
                    raise UserError(f"{flag}: the run to resume has {before}")
                if before != value:
                    change = f"{name} from {before} to {value} after step {old['step']}"
                    old["changes"].append(change)
            dcp.load(optimizer.state(), storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
        except UserError:
            raise
        except (Exception, dcp.CheckpointException):  # the latter is no Exception
            print(f"note: {folder} is damaged; going back to the one before")
            continue
        for name in optimizer.masters:
            optimizer.copy_to_model(name)
        print(f"resumed after step {old['step']}")
        return old | {"config": state["config"]}
    raise UserError(f"--resume: no checkpoint in {out} is whole; start in another --out")


def save_checkpoint(out, state, optimizer):
    """Write checkpoint-STEP as safetensors and JSON, and remove all but the one before it.

    The folder gets its name when all of it is on the disk, so a folder of that name is whole.
    """
    folder, partial = out / f"checkpoint-{state['step']:06}", out / ".partial"
    tensors, files, size = optimizer.state(), {}, 0
    for key, tensor in tensors.items():  # torch builds a file in memory, so about a GiB each
        files[key] = 1 + size // GIB
        size += tensor.nbytes
    if RANK == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    all_agree(True)
    options = dict(fqn_to_index_mapping=files, save_distributed=True)
    dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(partial), **options))
    if RANK == 0:
        (partial / "state.json").write_text(json.dumps(state))
        os.sync()
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        partial.rename(folder)
        os.sync()
        found = checkpoints(out)
        for older in found[found.index(folder) + 2 :]:
            shutil.rmtree(older)
    all_agree(True)


# ------------------------------------------------------------------------------------ plan
# bfloat16 operations per second from data sheets, without sparsity; the first name that fits
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
PEAKS |= {"L40S": 362e12, "RTX 4090": 165e12}
PLACEMENTS = {  # where masters and gradient sums live beside a GPU, the fastest first
    "all on the GPU": ("cuda", "cuda"),
    "masters on the host": ("cpu", "cuda"),
    "masters and gradient sums on the host": ("cpu", "cpu"),
}


def pair_flops(model, pairs):
    """Floating-point operations to train on each pair, (pairs,): what is needed, without repeats.

    Six per weight and token, the projection for response tokens only, and twelve per layer, channel
    of attention and (query, key) that attends. Source: PaLM, arXiv 2204.02311, appendix B.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    body = model.num_parameters() - head.numel() * (1 if tied else 2)
    heads = config.num_attention_heads
    channels = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    prompt, chosen, rejected = np.diff(pairs.bounds).T.astype(float)
    responses = chosen + rejected
    attending = (prompt**2 + chosen**2 + rejected**2) / 2 + prompt * responses
    attention = 12 * config.num_hidden_layers * channels * attending
    return 6 * (body * (prompt + responses) + head.numel() * responses) + attention


def memory_needed(model, config, longest, master_device, sum_device):
    """GiB by kind at the peak of a step, on the device and on the host: {device: {kind: GiB}}.

    Weights, gradients, masters and moments are exact; activations are an estimate, fitted to what
    Llama, Mistral and Gemma-2 layers keep for the backward pass. longest: tokens of a row.
    """
    text, count = model.config.get_text_config(), model.num_parameters() / GIB / WORLD_SIZE
    item = 2 if config.dtype == "bfloat16" else 4
    tokens = min(max(config.micro_tokens, longest), config.batch_size * longest) / GIB
    width, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    hidden = getattr(text, "intermediate_size", None) or 4 * width
    layer = tokens * item * (16 * width + 4 * hidden)
    if model.config._attn_implementation == "eager":  # it keeps the scores of every head
        layer += 15 * tokens * text.num_attention_heads * longest
    chunk = min(tokens * vocabulary, ProjectedLogps.chunk[config.device] / GIB)
    logits = 12 * chunk + 15 * vocabulary * width / GIB
    needs = {"cpu": {"python": 0.5}}
    device = needs.setdefault(config.device, {})
    device["weights"] = (item if WORLD_SIZE == 1 else 4) * count
    device["activations"] = layer * layers + logits
    if config.gradient_checkpointing:
        device["activations"] = tokens * item * width * layers + max(layer, logits)
    device["masks"] = 3 * tokens * longest * item
    needs[sum_device]["gradient sums"] = 4 * count
    copied = item == 2 or master_device != config.device
    needs[master_device]["masters and moments"] = (12 if copied else 8) * count
    return needs


def totals(needs):
    return {device: sum(sizes.values()) for device, sizes in needs.items()}


def free_memory(device):
    """GiB that a run may take: a GPU loses 5 % to fragmentation, and a container has a limit."""
    if device == "cuda":
        return 0.95 * torch.cuda.mem_get_info()[0] / GIB
    limit = Path("/sys/fs/cgroup/memory.max")
    limit = limit.read_text().strip() if limit.exists() else "max"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (min(total, int(limit)) if limit.isdigit() else total) / GIB


def make_plan(config, pairs, eval_pairs):
    """What the run needs and where masters go, from the model's config and the pairs alone.

    Raises UserError where the pairs do not suit the model.
    """
    model = empty_model(config.model)
    longest = max(int(p.row_tokens(True).max()) // 2 for p in (pairs, eval_pairs) if p)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    positions = positions // 8 * 8 if positions else longest  # make_rows rounds widths up to 8
    if longest > positions:
        what = f"a pair takes {longest} positions, and it has {positions}"
        raise UserError(f"--model {config.model}: {what}; pass --max-length {positions}")
    most = max(p.tokens.max() for p in (pairs, eval_pairs))
    if most >= model.get_input_embeddings().num_embeddings:
        raise UserError(f"--model {config.model}: the tokenizer has ids beyond the embedding")
    steps = math.ceil(len(pairs) / config.batch_size) * config.epochs
    steps = min(config.max_steps or steps, steps)
    epochs = min(steps * config.batch_size / len(pairs), config.epochs)
    name = torch.cuda.get_device_name() if config.device == "cuda" else ""
    plan = dict(
        parameters=model.num_parameters(),
        steps=steps,
        tokens=int(np.diff(pairs.bounds).sum() * epochs),
        pflop=float(pair_flops(model, pairs).sum() * epochs) / 1e15,
        peak_flops=next((peak for key, peak in PEAKS.items() if key in name), None),
        # a checkpoint has 12 bytes per parameter, and three exist for a moment; the model has 2
        disk_gib=(2 + 12 * (3 if config.save_every else 1)) * model.num_parameters() / GIB,
    )
    rows = longest if config.plain_rows else int(pairs.row_tokens(False).max())
    plan["one_gpu_gib"] = {}
    gpu = replace(config, device="cuda", dtype="bfloat16", gradient_checkpointing=True)
    gpu.micro_tokens = config.micro_tokens if name else 16384
    for title, places in PLACEMENTS.items():
        plan["one_gpu_gib"][title] = totals(memory_needed(model, gpu, rows, *places))
    places = list(PLACEMENTS.values()) if name and WORLD_SIZE == 1 else [(config.device,) * 2]
    places = [place for place in places if config.master_device in ("auto", place[0])]
    if not places:
        raise UserError(f"--master-device {config.master_device}: not in this run; leave it out")
    for place in places:  # the first that fits, or else the last
        needs = memory_needed(model, config, rows, *place)
        plan["places"], plan["memory_gib"] = place, needs
        plan["fits"] = all(gib <= free_memory(device) for device, gib in totals(needs).items())
        if plan["fits"]:
            break
    return plan


def plan_text(config, plan):
    """The plan in words; with --plan also what one GPU would need, on any machine."""
    lines = [f"{plan['parameters'] / 1e6:,.1f} M parameters in {config.dtype} on {config.device}"]
    lines.append(f"{plan['tokens']:,} tokens in {plan['steps']} steps of {config.batch_size} pairs")
    for device, gib in totals(plan["memory_gib"]).items():
        lines.append(f"memory on {device}: {gib:.1f} GiB, of {free_memory(device):.0f}")
        if config.plan:
            lines += [f"  {k:20}{gib:8.2f}" for k, gib in plan["memory_gib"][device].items()]
    lines.append(f"disk: {plan['disk_gib']:.2f} GiB; work: {plan['pflop']:.3g} PFLOP")
    for title, needs in plan["one_gpu_gib"].items() if config.plan else ():
        lines.append("one GPU, {}: {cuda:.1f} GiB, host {cpu:.1f}".format(title, **needs))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ training
class Stopped(Exception):
    """A signal ended the run after a step that was saved: Stopped(signal number, step)."""


def catch_signals(on_exit):
    """A list that gets the number of each signal that asks to end the run after the step."""
    received = []

    def receive(number, frame):
        if RANK == 0 and not received:
            os.write(2, b"\nfinishing this step and saving; again to quit now\n")
        received.append(number)
        if WORLD_SIZE == 1:  # torchrun passes one Ctrl-C on a second time
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            on_exit.callback(signal.signal, number, signal.signal(number, receive))
    return received


def peak_memory(device):
    """GiB that the process took at most, on the GPU or on a machine without one."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def build(config, places, pairs, loss_fn):
    """(policy, optimizer), checked in float32 and rehearsed in the training dtype: the largest
    micro-batch runs forward and backward, so that what would fail hours later fails now."""
    model = load_model(config.model, config.gradient_checkpointing)
    prompt, chosen, rejected = pairs[int(pairs.row_tokens(False).argmax())]
    pair = prompt[-256:], chosen[:128], rejected[:128]  # seconds on a CPU, for 7B too
    reason, exact = check_model(model, pair)
    plain_rows = config.plain_rows or not all_agree(reason is None)
    if plain_rows and not config.plain_rows:
        print(f"note: falling back to plain rows, slower and right; with shared rows, {reason}")
    policy, dtype = Policy(model, plain_rows), getattr(torch, config.dtype)
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = max(lists, key=len, default=[])  # the decoder is the longest
    if config.compile:
        # a layer is compiled anew for each kind of mask, with gradients and without
        torch._dynamo.config.recompile_limit = 64
        for layer in layers:
            layer.compile(dynamic=True)
    if WORLD_SIZE > 1:  # layer by layer from the CPU: a GPU holds its shards and one whole layer
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        mesh = dist.init_device_mesh(config.device, (WORLD_SIZE,))
        for module in [*layers, policy]:
            fully_shard(module, mesh=mesh, mp_policy=precision)
        dtype = torch.float32  # of the shards, which are the masters
    optimizer = MasterAdamW(model, config.device, dtype, *places)
    row_tokens = pairs.row_tokens(plain_rows)
    longest = int(row_tokens.argmax())
    copies = config.micro_tokens // int(row_tokens[longest])
    copies = max(1, min(copies, config.batch_size)) * WORLD_SIZE
    bound = 0.05 if config.dtype == "bfloat16" else 1e-3  # ten times what rounding was seen to do
    try:
        with torch.no_grad():
            rounded = torch.cat(policy([pair], config.device)).cpu()
        if (rounded - exact).abs().max() > bound * max(1.0, exact.abs().max()):
            raise FloatingPointError(f"log-probabilities {rounded.tolist()}, not {exact.tolist()}")
        run_pairs(policy, pairs, [longest] * copies, loss_fn, config, train=True)
        optimizer.norm()
    except FloatingPointError as error:
        remedy = "lower --alpha, or compute in --dtype float32"
        raise UserError(f"rehearsal of the longest pair: {error}; {remedy}") from error
    optimizer.sums.clear()
    print(f"the longest pair took {peak_memory(config.device):.2f} GiB, forward and backward")
    return policy, optimizer


def save_model(model, tokenizer, summary, out):
    """Write model (bfloat16), tokenizer, and summary.json last: then all is there."""
    state, written = {}, {}
    for name, param in model.state_dict(keep_vars=True).items():
        if id(param) not in written:  # tied weights are one parameter under two names
            whole = param.full_tensor() if hasattr(param, "full_tensor") else param
            dtype = torch.bfloat16 if whole.is_floating_point() else whole.dtype
            written[id(param)] = whole.detach().to("cpu", dtype) if RANK == 0 else None
        state[name] = written[id(param)]
    if RANK:
        return
    folder, name = out / ".partial", summary["config"]["model"]
    shutil.rmtree(folder, ignore_errors=True)  # of a save that was killed
    shell = empty_model(name).to(torch.bfloat16)  # its config then says bfloat16
    shell.config = from_pretrained(AutoConfig, name)  # with the dropouts of its authors
    shell.generation_config = model.generation_config
    shell.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    umask = os.umask(0)
    os.umask(umask)
    os.sync()
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "summary.json"):
        path.chmod(0o666 & ~umask)  # safetensors makes files that only their owner can read
        path.replace(out / path.name)
    folder.rmdir()


def summarize(config, plan, state):
    """Settings, versions and speed of a run that ends; the speed is read from its log."""
    with open(Path(config.out) / "metrics.jsonl") as file:
        log = [json.loads(line) for line in file]
    steps = [metrics for metrics in log if "loss" in metrics]
    keys = "pairs", "tokens", "tflops", "seconds", "optimizer_seconds"
    sums = {key: sum(metrics[key] for metrics in steps) for key in keys}
    seconds, peak = sums["seconds"] or math.inf, plan["peak_flops"]
    rates = {f"{key}_per_second": sums[key] / seconds for key in ("pairs", "tokens", "tflops")}
    return dict(
        config=asdict(config),
        changes=state["changes"],
        versions=dict(torch=torch.__version__, transformers=transformers.__version__),
        data_sha256=state["data_sha256"],
        plan=plan,
        processes=WORLD_SIZE,
        steps=plan["steps"],
        seconds=sums["seconds"],
        **rates,
        share_of_peak=peak and 1e12 * rates["tflops_per_second"] / peak / WORLD_SIZE,
        optimizer_share=sums["optimizer_seconds"] / seconds,
        peak_memory_gib=peak_memory(config.device),
    )


def train(config: Config, loss_fn=None) -> dict | None:
    """Align a model and write it and its figures to config.out.

    Args:
        config: the settings.
        loss_fn: a loss in place of alphapo_loss: (chosen_logps, rejected_logps, pairs, batch) ->
            (losses, chosen_rewards, rejected_rewards), one value per pair. batch holds the indices
            into pairs, for losses that need more than log-probabilities.

    Returns:
        The summary of the run, as in summary.json; None on all processes but the first.

    Raises:
        UserError: settings, data or model cannot be used. Nothing was written.
        FloatingPointError: a loss or gradient is not finite. The state before that step was saved.
        Stopped: a signal came. The state after that step was saved.
    """
    config, out = resolve(config), Path(config.out)
    knobs = config.alpha, config.beta, config.gamma
    loss_fn = loss_fn or (lambda chosen, rejected, *_: alphapo_loss(chosen, rejected, *knobs))
    with contextlib.ExitStack() as on_exit:
        if WORLD_SIZE > 1 and not dist.is_initialized():
            if config.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if config.device == "cuda" else "gloo")
        # cuDNN's backward under a mask can give NaN where the length is 64 modulo 128, and it plans
        # anew for every shape (pytorch issue 196678)
        torch.backends.cuda.enable_cudnn_sdp(False)
        check_out(config)  # before data and weights, which take minutes
        tokenizer, pairs, eval_pairs = load_data(config)
        plan = make_plan(config, pairs, eval_pairs)
        print(plan_text(config, plan))
        if not plan["fits"]:
            remedy = "see --plan; lower --micro-tokens, use more GPUs or a smaller model"
            raise UserError(
                f"--model {config.model}: does not fit in this machine's memory; {remedy}"
            )
        folder = next(path for path in [out.absolute(), *out.absolute().parents] if path.exists())
        room = shutil.disk_usage(folder).free / GIB
        if room < plan["disk_gib"] and not config.resume:
            raise UserError(f"--out {out}: the disk has no room for {plan['disk_gib']:.1f} GiB")
        policy, optimizer = build(config, plan["places"], pairs, loss_fn)
        ratio = f"(gamma/beta {config.gamma / config.beta:g})"
        print(f"alpha {config.alpha:g}, beta {config.beta:g}, gamma {config.gamma:g} {ratio}")
        state = open_run(config, pairs, eval_pairs, optimizer, on_exit)
        log = open(out / "metrics.jsonl" if RANK == 0 else os.devnull, "a", buffering=1)
        on_exit.callback(log.close)
        if RANK == 0:  # keep what the checkpoint knows, in whole lines
            known = (out / "metrics.jsonl").read_bytes()[: state["log_bytes"]]
            log.truncate(known.rfind(b"\n") + 1)
        signals, run = catch_signals(on_exit), functools.partial(run_pairs, policy)

        def evaluate(step):
            metrics = run(eval_pairs, range(len(eval_pairs)), loss_fn, config) if eval_pairs else {}
            metrics = {f"eval_{key}": value for key, value in metrics.items()}
            log.write(json.dumps({"step": step} | metrics) + "\n")
            return metrics

        def save():
            save_checkpoint(out, state | {"log_bytes": log.tell()}, optimizer)

        if not config.resume:
            state["before"] = evaluate(0)
        tflops, tokens = pair_flops(policy.model, pairs) / 1e12, pairs.row_tokens(False)
        steps, steps_per_epoch = plan["steps"], math.ceil(len(pairs) / config.batch_size)
        progress = tqdm(total=steps, initial=state["step"], unit="step", disable=RANK > 0)
        on_exit.callback(progress.close)
        for step in range(state["step"], steps):
            epoch, batch = divmod(step, steps_per_epoch)
            order = np.random.default_rng([config.seed, epoch]).permutation(len(pairs))
            indices = order[batch * config.batch_size :][: config.batch_size].tolist()
            learning_rate = learning_rate_at(step, steps, config)
            start = time.perf_counter()
            try:
                metrics = run(pairs, indices, loss_fn, config, train=True)
                summed = time.perf_counter()
                metrics["grad_norm"] = optimizer.step(learning_rate, config.max_grad_norm)
            except FloatingPointError as error:
                if step:
                    save()
                places = ", ".join(pairs.places[i] for i in indices[:10])
                where = f"step {step + 1}, pairs {places} ..."
                raise FloatingPointError(f"{where}: {error}") from error
            end = time.perf_counter()
            metrics["learning_rate"], metrics["epoch"] = learning_rate, (step + 1) / steps_per_epoch
            metrics["pairs"], metrics["tokens"] = len(indices), int(tokens[indices].sum())
            metrics["tflops"] = float(tflops[indices].sum())
            metrics["seconds"], metrics["optimizer_seconds"] = end - start, end - summed
            log.write(json.dumps({"step": step + 1} | metrics) + "\n")
            progress.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
            progress.update()
            state["step"] = step + 1
            if config.eval_every and (step + 1) % config.eval_every == 0 and step + 1 < steps:
                evaluate(step + 1)
            stopped = not all_agree(not signals)
            due = config.save_every and (step + 1) % config.save_every == 0
            if stopped or due:
                save()
            if stopped:
                raise Stopped(signals[0] if signals else signal.SIGTERM, step + 1)
        progress.close()
        with torch.no_grad():  # round to what is written, so that the last figures are of the files
            for param in policy.parameters():
                param.copy_(param.bfloat16())
        optimizer.release()
        after = evaluate(steps)
        facts = dict(pairs=len(pairs), eval_pairs=len(eval_pairs), plain_rows=policy.plain_rows)
        facts |= dict(notes=pairs.notes, before=state["before"], after=after)
        summary = summarize(config, plan, state) | facts if RANK == 0 else None
        save_model(policy.model, tokenizer, summary, out)
        if RANK == 0:
            try:
                print(runpy.run_path(str(TINY.parent / "report.py"))["report"](out))
            except Exception as error:  # no picture is worth losing a run over
                print(f"note: no report: {first_line(error)}")
        all_agree(True)  # the others wait for the first, or their exit would end it
        return summary


# ------------------------------------------------------------------------------------ command line
def fail(message, status=2):
    rank = f" (rank {RANK})" if RANK else ""
    print(f"alphapo{rank}: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def parse_arguments(argv):
    """The settings of a command line, over the defaults of the preset that --model names."""
    presets = "presets, by --model; the defaults above are those of the one given, or of tiny:"
    for name, preset in PRESETS.items():
        c = Config(**preset)
        presets += f"\n  {name:20} alpha {c.alpha:g}, beta {c.beta:g}, gamma {c.gamma:g} "
        presets += f"(gamma/beta {c.gamma / c.beta:g}), learning rate {c.learning_rate:g}"
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", default="tiny")
    first.add_argument("--data")
    given, _ = first.parse_known_args(argv)
    preset = dict(PRESETS.get(given.model, {}))
    if given.data:
        preset.pop("eval_data", None)  # a preset's held-out pairs belong to its own data
    style = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=100)
    about = dict(description=__doc__.split("\n")[0], epilog=presets, formatter_class=style)
    parser = HfArgumentParser(Config, allow_abbrev=False, **about)
    parser.error = fail  # in place of a screen of usage
    parser.set_defaults(**preset)
    for action in parser._actions:  # every flag is accepted with underscores too, but shown once
        action.option_strings = action.option_strings[-1:]
        action.metavar = None if action.choices else "X"
        if action.default not in (None, False, argparse.SUPPRESS):
            action.help += " [%(default)s]"
    values, unknown = parser.parse_known_args(argv)
    for flag in unknown[:1]:
        near = difflib.get_close_matches(flag, parser._option_string_actions, 1) or ["--help"]
        fail(f"{flag}: there is no such flag; did you mean {near[0]}?")
    values.model = preset.get("model", values.model)
    return Config(**vars(values))


def main(argv=None):
    sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # torch's checkpoints warn that there is one process,
    logging.disable()  # and print the traces of what we report in a line
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    config = parse_arguments(argv)
    try:
        if config.plan:
            config = resolve(config)
            print(plan_text(config, make_plan(config, *load_data(config)[1:])))
        else:
            train(config)
    except UserError as error:
        fail(error)
    except Stopped as error:
        number, step = error.args
        if RANK:
            sys.exit(128 + number)
        processes = os.environ.get("LOCAL_WORLD_SIZE")
        launcher = f"torchrun --nproc-per-node {processes}" if processes else "python"
        command = shlex.join([arg for arg in sys.argv if arg != "--resume"])
        command = f"{launcher} {command} --resume"
        fail(f"stopped after step {step} and saved; continue with: {command}", 128 + number)
    except FloatingPointError as error:
        remedy = "start again with a lower --learning-rate or --alpha"
        if checkpoints(Path(config.out)):
            remedy = "start again in another --out with a lower --learning-rate, or --resume with "
            remedy += "one, if the loss was sound until then"
        fail(f"{error}; {remedy}", 1)
    except (OSError, torch.OutOfMemoryError, dcp.CheckpointException) as error:  # a full disk, say
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains again at its end
        remedy = "nothing was saved"
        if checkpoints(Path(config.out)):
            remedy = "what was saved is whole; continue with --resume"
        if isinstance(error, torch.OutOfMemoryError):
            remedy = f"lower --micro-tokens or --max-length; {remedy}"
        # below the tracebacks of all processes
        fail(f"{str(error).strip().splitlines()[-1]}; {remedy}", 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if WORLD_SIZE > 1:  # torch's threads now and then abort a normal exit, and torchrun reports it
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
