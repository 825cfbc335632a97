# SPDX-License-Identifier: MIT
"""AlphaPO in one file: align a language model from pairs of a chosen and a rejected response.

    logp   = (1/|y|) * sum_t log pi(y_t | x, y_<t)       mean log-probability per token
    reward = (1 - exp(-alpha * logp)) / alpha            alpha -> 0 gives logp, which is SimPO
    loss   = -log sigmoid(beta * (reward(chosen) - reward(rejected)) - gamma)

    python alphapo.py                                            # the tiny model, on any CPU
    python alphapo.py --model mistral-7b-instruct --alpha 0.25   # a preset: model, data, settings
    python alphapo.py --model FOLDER --data PAIRS.jsonl --learning-rate 1e-6
    torchrun --nproc-per-node 8 alphapo.py --model mistral-7b-instruct

Left out: reference model, LoRA. Never loaded: remote code, pickles. Sections use earlier ones only.

AlphaPO: Gupta et al. 2025, arXiv 2501.03884. SimPO: Meng et al. 2024, arXiv 2405.14734.
"""

import contextlib
import csv
import ctypes
import difflib
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
import time
from collections import Counter, namedtuple
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the slow imports without a traceback

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch.optim.adamw import adamw
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.hf_argparser import HfArg


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

    Args:
        chosen_logps, rejected_logps: mean log-probability per token (nats), (pairs,) each.
        alpha, beta: shape and scale of the reward; alpha 0 is SimPO.
        gamma: target margin, not divided by beta; SimPO's settings give gamma / beta instead.
    Returns (losses, chosen_rewards, rejected_rewards), (pairs,) each, in the dtype of chosen_logps.
    Rewards are multiplied by beta and carry no gradient. Raises ValueError where the shapes differ,
    because broadcasting would compare the wrong responses."""
    if chosen_logps.shape != rejected_logps.shape:
        raise ValueError(f"shapes differ: {chosen_logps.shape} and {rejected_logps.shape}")
    chosen_rewards = beta * alphapo_reward(chosen_logps, alpha)
    rejected_rewards = beta * alphapo_reward(rejected_logps, alpha)
    losses = -torch.nn.functional.logsigmoid(chosen_rewards - rejected_rewards - gamma)
    dtype = chosen_logps.dtype
    return losses.to(dtype), chosen_rewards.detach().to(dtype), rejected_rewards.detach().to(dtype)


# ------------------------------------------------------------------------------------ settings
class UserError(Exception):
    """A mistake that the user can correct: printed without a traceback, exit status 2."""


RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun
TINY = Path(__file__).resolve().parent / "data" / "tiny"
# fmt: off
PRESETS = {
    "tiny": dict(
        model=str(TINY), data=str(TINY / "train.jsonl"), eval_data=str(TINY / "eval.jsonl"),
        alpha=0.25, beta=2.5, gamma=0.1, learning_rate=2e-4, batch_size=32, epochs=2,
        eval_every=16),
    # AlphaPO's Table 3 (gamma / beta: 0.1, 0.3, 0.5), as TRL's index and a public note quote it
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
    """Every setting of a run, each also a flag. In Python, a preset is Config(**PRESETS[name])."""

    model: str = HfArg(default="tiny", help="a preset, a model folder or a hub id")
    data: str | None = HfArg(default=None, help="pairs: a file or OWNER/NAME[:SPLIT] of the hub")
    eval_data: str | None = HfArg(default=None, help="held-out pairs, named likewise")
    eval_split: float = HfArg(default=0.02, help="share of pairs to hold out without --eval-data")
    out: str = HfArg(default="out", help="folder for the aligned model and the run's figures")
    alpha: float = HfArg(default=0.25, help="shape of the reward; 0 is SimPO")
    beta: float = HfArg(default=2.5, help="scale of the reward")
    gamma: float = HfArg(default=0.25, help="target margin; SimPO's settings divide it by beta")
    learning_rate: float = HfArg(default=7e-7, help="peak: a warm-up before it, a cosine after it")
    batch_size: int = HfArg(default=128, help="pairs per optimizer step")
    epochs: int = HfArg(default=1, help="passes over the pairs")
    max_steps: int | None = HfArg(default=None, help="end the run and its cosine at this step")
    warmup_ratio: float = HfArg(default=0.1, help="share of the steps that warm up")
    max_grad_norm: float = HfArg(default=1.0, help="clip the gradient to this norm")
    max_length: int = HfArg(default=2048, help="tokens of prompt and response together")
    max_prompt_length: int | None = HfArg(default=None, help="what cut prompts keep (length - 248)")
    micro_tokens: int | None = HfArg(default=None, help="tokens at a time (cuda 16384, cpu 512)")
    gradient_checkpointing: bool | None = HfArg(default=None, help="recompute layers (cuda: true)")
    plain_rows: bool = HfArg(default=False, help="compute each prompt twice, as other trainers do")
    device: Device = HfArg(default="auto", help="where the model computes")
    dtype: Literal["auto", "bfloat16", "float32"] = HfArg(default="auto", help="what to compute in")
    master_device: Device = HfArg(default="auto", help="where AdamW's weights and moments live")
    compile: bool = HfArg(default=False, help="compile the layers: slow to start, then faster")
    plan: bool = HfArg(default=False, help="say what the run needs, load no weights, and stop")
    eval_every: int | None = HfArg(default=None, help="also evaluate every so many steps")
    save_every: int | None = HfArg(default=None, help="write a checkpoint every so many steps")
    resume: bool = HfArg(default=False, help="continue from the newest checkpoint in --out")
    seed: int = HfArg(default=42, help="decides the order of the pairs and which are held out")
# fmt: on


def resolve(config: Config) -> Config:
    """Fill in the settings that depend on the machine or on others; UserError for a wrong one."""
    limits = dict(alpha=(-1e6, 1e6), gamma=(0, 1e6), seed=(0, 1e99))
    limits.update(eval_split=(0, 0.99), warmup_ratio=(0, 0.99))  # the others are positive
    for name, value in asdict(config).items():
        low, high = limits.get(name, (1 if type(value) is int else 1e-12, 1e12))
        if type(value) in (int, float) and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from {low:g} to {high:g}")
    if config.data is None:
        raise UserError("--data is missing: name a file of pairs, or a preset as --model (--help)")
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    if "cuda" in (config.device, config.master_device) and not on_gpu:
        raise UserError("--device, --master-device: cuda, but torch sees no GPU or --device is cpu")
    config = replace(config, device="cuda" if on_gpu else "cpu")
    config.dtype = config.dtype.replace("auto", "bfloat16" if on_gpu else "float32")
    config.micro_tokens = config.micro_tokens or (16384 if on_gpu else 512)
    if config.gradient_checkpointing is None:
        config.gradient_checkpointing = on_gpu
    room = min(248, config.max_length // 2)  # what a cut prompt leaves to its responses
    config.max_prompt_length = config.max_prompt_length or config.max_length - room
    if config.max_prompt_length >= config.max_length:
        raise UserError("--max-prompt-length: must be below --max-length")
    return config


def beside(module, function, *args):
    """Call a function of data/MODULE.py (plan, report, hub); None where this file stands alone."""
    path = TINY.parent / f"{module}.py"
    sys.modules.setdefault("alphapo", sys.modules[__name__])  # those files import alphapo
    return runpy.run_path(str(path))[function](*args) if path.exists() else None


@contextlib.contextmanager
def user_error(what, remedy):
    """Turn whatever a library raises inside into one line: what failed, why, and the remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of any kind; the first line of what it says is enough
        why = getattr(error, "strerror", None) or str(error).strip().split("\n")[0] or repr(error)
        raise UserError(f"{what}: {why} ({remedy})") from error


def load_pretrained(kind, name, **options):
    """Load a config, tokenizer or model from a folder, the hub or its cache, or raise UserError."""
    near = difflib.get_close_matches(name, PRESETS, 1)
    if os.path.isdir(name):
        remedy = "a model folder holds config.json, a tokenizer and safetensors; try: git lfs pull"
    elif near and "/" not in name:
        remedy = f"did you mean {near[0]}? In Python: Config(**PRESETS[{near[0]!r}])"
    else:
        remedy = "no such folder; a hub id needs a network, a gated one a licence and hf auth login"
    with user_error(f"--model {name}: not loaded", remedy):
        return kind.from_pretrained(name, **options)


# ------------------------------------------------------------------------------------ pairs
Pair = namedtuple("Pair", "prompt chosen rejected place")  # token ids (int32 arrays), and file:line


def token_counts(pairs):
    """Tokens of prompt, chosen and rejected of each pair, (pairs, 3)."""
    return np.array([[len(ids) for ids in pair[:3]] for pair in pairs])


def read_rows(name):
    """Yield (place, row) from a file or hub data set. JSON lines are bytes for parse_row."""
    kind, place = Path(name).suffix[1:], f"{name}: row "
    if kind == "jsonl":
        rows, place = Path(name).read_bytes().split(b"\n"), f"{name}:"
    elif kind == "json":
        rows = json.loads(Path(name).read_bytes().decode("utf-8-sig"), parse_int=float)
    elif kind == "csv":
        rows = csv.DictReader(open(name, newline="", encoding="utf-8-sig"))
    else:
        import datasets  # here, because it takes seconds

        if kind == "parquet":
            rows = datasets.load_dataset(kind, data_files=name, split="train")
        elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name):
            repository, _, split = name.partition(":")
            rows = datasets.load_dataset(repository, split=split or "train")
        else:
            raise ValueError("neither a .jsonl, .json, .parquet or .csv file nor a hub id")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, bytes) or row.strip():  # an empty line is no row
            yield f"{place}{number}", row


def parse_row(row):
    """(prompt, chosen, rejected) of a row in one of TRL's preference formats: three texts or three
    lists of messages, where chosen and rejected begin with the prompt. A prompt of None stands for
    what the two texts have in common. Raises an error of any kind for any other row."""
    if isinstance(row, bytes):  # as float, because Python refuses integers of 5,000 digits
        row = json.loads(row.decode("utf-8-sig"), parse_int=float)
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if all(isinstance(text, str) for text in (prompt or "", chosen, rejected)):
        # {"prompt": "2+2=", "chosen": "4", "rejected": "5"}, or the same without a prompt
        return prompt, (prompt or "") + chosen, (prompt or "") + rejected
    if isinstance(prompt, str) and chosen[0]["role"] == "assistant":
        # {"prompt": "Hi", "chosen": [assistant], "rejected": [assistant]}
        prompt = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, str | None):
        # {"chosen": [user, assistant], "rejected": [user, assistant]}; UltraFeedback has a text too
        prompt = chosen[:-1]
    # or else {"prompt": [user], "chosen": [assistant], "rejected": [assistant]}
    sides = [x if x[: len(prompt)] == prompt else prompt + x for x in (chosen, rejected)]
    for message in sides[0] + sides[1]:
        if not isinstance(message["content"], str) or message.get("tool_calls"):
            raise ValueError('the "content" of a message must be a text, without tool_calls')
    roles = [[message["role"] for message in side[len(prompt) :]] for side in sides]
    if not prompt or prompt[-1]["role"] == "assistant" or roles != [["assistant"], ["assistant"]]:
        raise ValueError("must be a prompt up to the assistant's turn, then one assistant message")
    return prompt, *sides


def render(prompt, chosen, rejected, tokenizer):
    """Token ids of prompt, prompt + chosen and prompt + rejected, with one BOS at most.
    Prompt and response are tokenized together, because tokenizers merge across the boundary."""
    texts = [chosen if prompt is None else prompt, chosen, rejected]
    is_chat = isinstance(chosen, list)
    if is_chat:
        template = functools.partial(tokenizer.apply_chat_template, tokenize=False)
        texts = [template(prompt, add_generation_prompt=True), *map(template, texts[1:])]
    # a template writes BOS itself or wants none
    encoded = tokenizer(texts, add_special_tokens=not is_chat)["input_ids"]
    bos = tokenizer.bos_token_id
    return [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in encoded]


def end_turn(ids, tokenizer, special):
    """Cut what follows a response's end of turn, or add EOS: (ids, whether it has content).
    Templates write white space (ChatML) or a second special token (Phi-3) after the end of a turn,
    and the mean over the response's tokens must not count those."""
    end, end_of_turn = len(ids), None  # walk back to the last token that has text
    while end and (ids[end - 1] in special or not tokenizer.decode(ids[end - 1]).strip()):
        end -= 1
        end_of_turn = end if ids[end] in special else end_of_turn
    if end_of_turn is not None:
        return ids[: end_of_turn + 1], end > 0
    eos = tokenizer.eos_token_id
    return ids if eos is None else [*ids, eos], end > 0


def encode_row(row, tokenizer, special, config, notes):
    """Token ids (prompt, chosen, rejected) of a data row, or None, noted, where it cannot teach.
    Where a pair is too long, the prompt loses its beginning, then the responses lose their ends."""
    prompt, chosen, rejected = parse_row(row)
    encoded = render(prompt, chosen, rejected, tokenizer)
    shared = len(os.path.commonprefix(encoded))  # not of paths alone
    if prompt is None:  # each response keeps one token at least
        shared = min(shared, len(encoded[1]) - 1, len(encoded[2]) - 1)
    prompt = encoded[0][:shared]
    chosen, chosen_speaks = end_turn(encoded[1][shared:], tokenizer, special)
    rejected, rejected_speaks = end_turn(encoded[2][shared:], tokenizer, special)
    if not (prompt and chosen_speaks and rejected_speaks):
        notes["pairs dropped for an empty prompt or response"] += 1
        return None
    if not {chosen[-1], rejected[-1]} <= special:
        notes["pairs without an end of turn, because the tokenizer has no EOS token"] += 1
    longest, prompt_limit = max(len(chosen), len(rejected)), config.max_prompt_length
    if len(prompt) + longest > config.max_length and len(prompt) > prompt_limit:
        notes["prompts truncated"] += 1
        bos = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
        prompt = bos + prompt[len(prompt) - prompt_limit + len(bos) :]
    room = config.max_length - len(prompt)
    if longest > room:
        notes["pairs with a response truncated"] += 1
    if chosen[:room] == rejected[:room]:
        notes["pairs dropped for equal responses"] += 1
        return None
    return [np.array(ids, np.int32) for ids in (prompt, chosen[:room], rejected[:room])]


def load_pairs(name, tokenizer, config):
    """(list of Pair, Counter of what was dropped or truncated), or UserError with the bad rows."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)  # what may end a turn
    special -= {tokenizer.unk_token_id} - {tokenizer.eos_token_id}  # unknown words are text
    pairs, notes, errors = [], Counter(), []
    with user_error(f"{name}: not loaded", "name a file of pairs, or a hub data set within reach"):
        rows = tqdm(read_rows(name), f"reading {name}", leave=False, disable=RANK > 0 or None)
        for place, row in rows:
            try:
                if ids := encode_row(row, tokenizer, special, config, notes):
                    pairs.append(Pair(*ids, place))
            except Exception as error:  # JSON, templates and tokenizers raise kinds of their own
                errors.append(f"{place}: not a pair of texts or messages: {error!r:.200}")
    if errors:
        raise UserError("\n".join(errors[:10]) + f" ({len(errors)} bad rows; see README.md)")
    if not pairs:
        raise UserError(f"{name}: has no usable pair: {dict(notes) or 'it is empty'}")
    return pairs, notes


def load_data(config):
    """(tokenizer, pairs to train on, held-out pairs, notes); UserError where none is left."""
    beside("hub", "ask_hub", config)
    tokenizer = load_pretrained(AutoTokenizer, config.model)
    pairs, notes = load_pairs(config.data, tokenizer, config)
    print("the first pair as the model sees it:")
    for part, ids in zip(Pair._fields, pairs[0][:3]):
        text = repr(tokenizer.decode(ids))
        print(f"  {part:9}{text if len(text) < 87 else f'{text[:41]} ... {text[-41:]}'}")
    pairs = [pairs[i] for i in np.random.default_rng(config.seed).permutation(len(pairs))]
    held_out = 0 if config.eval_data else math.ceil(config.eval_split * (len(pairs) - 1))
    eval_pairs, pairs = pairs[:held_out], pairs[held_out:]
    if config.eval_data:
        eval_pairs, eval_notes = load_pairs(config.eval_data, tokenizer, config)
        notes += eval_notes
    print(f"{len(pairs)} pairs to train on, {len(eval_pairs)} held out")
    for what, count in notes.items():
        print(f"note: {count} {what}")
    return tokenizer, pairs, eval_pairs, notes


# ------------------------------------------------------------------------------------ the model
def load_model(name, checkpointing=False):
    """A causal language model in float32 on the CPU, with every dropout off. UserError where files
    and config disagree, because transformers would make up the weights that are missing."""
    config = load_pretrained(AutoConfig, name)
    for part in (config, config.get_text_config()):
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    options = dict(config=config, dtype=torch.float32, use_safetensors=True)
    options.update(ignore_mismatched_sizes=True, output_loading_info=True)  # refused below
    model, report = load_pretrained(AutoModelForCausalLM, name, **options)
    for kind, keys in report.items():
        if keys:
            what = f"{len(keys)} {kind.replace('_', ' ')}, such as {min(map(str, keys))}"
            raise UserError(f"--model {name}: {what}; download config and weights again")
    embedding = model.get_input_embeddings()
    # a tied weight's gradient is dense, from the projection; the lookup adds a few rows, sparse
    embedding.sparse = model.get_output_embeddings().weight is embedding.weight
    if checkpointing:
        old = model.gradient_checkpointing_enable  # renamed in transformers 5.18
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    return model.train(checkpointing)  # layers are recomputed in training mode only


# -------------------------------------------------------------------- rows and log-probabilities
@dataclass
class Rows:
    """A micro-batch of pairs as padded token rows, and where their response tokens are."""

    input_ids: torch.Tensor  # (rows, time)
    position_ids: torch.Tensor  # (rows, time): rejected starts again where chosen started
    segments: torch.Tensor  # (rows, time): 0 prompt, 1 chosen, 2 rejected, -1 padding
    sources: torch.Tensor  # (tokens,): row * width + time of what predicts each response token
    targets: torch.Tensor  # (tokens,): response tokens, pair by pair, chosen before rejected
    lengths: list[int]  # (2 * pairs,): tokens of each response
    plain: bool  # two rows [prompt | chosen] and [prompt | rejected] per pair instead of one


def row_tokens(pairs, plain):
    """Tokens that the rows of each pair take before padding to a micro-batch's width, (pairs,)."""
    prompt, chosen, rejected = token_counts(pairs).T
    return 2 * (prompt + np.maximum(chosen, rejected)) if plain else prompt + chosen + rejected


def make_rows(pairs, plain=False, device="cpu") -> Rows:
    """Lay out pairs (prompt, chosen, rejected: arrays of token ids) as rows on a device: a shared
    row [prompt | chosen | rejected] each, or two plain rows that repeat the prompt."""
    layouts = []  # per row: its parts as (segment, token ids), the prompt first
    for prompt, chosen, rejected, *_ in pairs:
        parts = [(0, prompt), (1, chosen), (2, rejected)]
        layouts += [[parts[0], parts[1]], [parts[0], parts[2]]] if plain else [parts]
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
    if device == "cuda":  # out of pinned memory, the copy does not wait
        tensors = (tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
    return Rows(*tensors, [len(ids) for ids in targets], plain)


def attention_masks(config, rows, dtype):
    """Mask of shared rows, (rows, 1, time, time), or one for each kind of layer that config names.
    A token sees the prompt and its own response, up to itself and within the layer's window. Raises
    KeyError where a layer is not attention over the row."""
    query, key = rows.segments[:, :, None], rows.segments[:, None, :]
    seen = ((key == query) | (key == 0)).tril()
    distance = rows.position_ids[:, :, None] - rows.position_ids[:, None, :]

    def additive(window):
        # eager attention adds the mask to the scores, so a bool mask would be silently wrong
        masked = ~seen if window is None else ~(seen & (distance < window))
        mask = torch.zeros(masked.shape, dtype=dtype, device=masked.device)
        return mask.masked_fill_(masked, torch.finfo(dtype).min)[:, None]

    windows = {"full_attention": None, "sliding_attention": getattr(config, "sliding_window", None)}
    masks = {kind: additive(windows[kind]) for kind in getattr(config, "layer_types", None) or ()}
    return masks or additive(windows["sliding_attention"])


class ProjectedLogps(torch.autograd.Function):
    """Log-probabilities of target tokens from hidden states, a chunk of logits at a time. The last
    is kept for backward(), which computes the rest again. tied: the lookup has the same weight."""

    # logits per chunk; larger on CUDA, where reading the projection again for each costs more
    chunk = {"cpu": 2**24, "cuda": 2**28, "meta": 2**28}

    @staticmethod
    def project(hidden, weight, softcap):
        logits = (hidden @ weight.T).float()
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, tied=False):
        """hidden (tokens, width), weight (vocabulary, width), targets (tokens,) -> (tokens,)."""
        ctx.softcap, ctx.leaf = softcap, weight if tied else None
        ctx.tokens = tokens = max(1, ProjectedLogps.chunk[hidden.device.type] // len(weight))
        normalizers, logps = [], []
        for h, t in zip(hidden.split(tokens), targets.split(tokens)):
            logits = None  # frees the chunk before
            logits = ProjectedLogps.project(h, weight, softcap)
            normalizers.append(logits.logsumexp(1))
            logps.append(logits.gather(1, t[:, None])[:, 0] - normalizers[-1])
        ctx.save_for_backward(hidden, weight, targets, torch.cat(normalizers), logits)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, normalizers, logits = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        chunks = [x.split(ctx.tokens) for x in (hidden, grad_hidden, targets, normalizers, grad)]
        for h, grad_h, t, normalizer, g in reversed(list(zip(*chunks))):
            if logits is None:
                logits = ProjectedLogps.project(h, weight, ctx.softcap)
            slope = 1.0 if ctx.softcap is None else 1.0 - (logits / ctx.softcap) ** 2
            # d logp / d logits = onehot(target) - softmax(logits)
            grad_logits = logits.sub_(normalizer[:, None]).exp_().mul_(-g[:, None])
            grad_logits.scatter_add_(1, t[:, None], g[:, None])
            grad_logits = grad_logits.mul_(slope).to(h.dtype)
            torch.mm(grad_logits, weight, out=grad_h)
            logits = None
            product = (grad_logits.T @ h).float()  # float32, because the chunks are summed
            grad_weight = product if grad_weight is None else grad_weight.add_(product)
        grad_weight = grad_weight.to(weight.dtype)
        if ctx.leaf is not None and ctx.leaf.grad is None:  # torch would copy what is returned
            ctx.leaf.grad, grad_weight = grad_weight, None  # to add the few rows of the lookup
        return grad_hidden, grad_weight, None, None, None


def pair_logps(model, rows: Rows):
    """Mean log-probability per token (nats) in float32: (chosen_logps, rejected_logps), (pairs,).
    Shared rows run through the decoder under attention_masks, and only response tokens are
    projected onto the vocabulary. Plain rows run through the model's own forward pass. Raises
    NotImplementedError where shared rows do not cover a part of the model."""
    inputs = dict(input_ids=rows.input_ids, use_cache=False)
    if rows.plain:
        logits = model(**inputs, attention_mask=(rows.segments >= 0).long()).logits
        logits = logits.flatten(0, 1)[rows.sources].float()
        logps = logits.gather(1, rows.targets[:, None])[:, 0] - logits.logsumexp(1)
    else:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        config = model.config.get_text_config()
        if getattr(head, "bias", None) is not None:
            raise NotImplementedError("its projection has a bias")
        masks = attention_masks(config, rows, embedding.weight.dtype)
        output = model.base_model(**inputs, position_ids=rows.position_ids, attention_mask=masks)
        hidden = output[0].flatten(0, 1)[rows.sources]
        softcap = getattr(config, "final_logit_softcapping", None)
        logps = ProjectedLogps.apply(hidden, head.weight, rows.targets, softcap, embedding.sparse)
    means = [response.mean() for response in logps.split(rows.lengths)]
    return torch.stack(means[0::2]), torch.stack(means[1::2])


@torch.no_grad()
def check_model(model, pair):
    """Compare shared rows with the model's own forward pass, on one pair and in float32.
    Returns (None or why shared rows are wrong here, plain log-probabilities (2,)). They differ by
    5e-7 if right, 1e-3 if layers recur or it scales logits. UserError: not causal or not finite."""
    tokens = torch.from_numpy(np.append(*pair[:2]).astype(np.int64))[None]
    whole = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    cut = model(input_ids=tokens[:, :-1], use_cache=False).logits[0]
    plain = torch.stack(pair_logps(model, make_rows([pair], plain=True)))[:, 0]
    if not plain.isfinite().all():
        raise UserError("--model: its log-probabilities are not finite; download the weights again")
    if (whole - cut).abs().max() > 1e-3 * cut.abs().max():
        raise UserError("--model: its tokens see later ones; choose a causal language model")
    try:
        shared = torch.stack(pair_logps(model, make_rows([pair])))[:, 0]
    except (NotImplementedError, AttributeError, KeyError, TypeError, ValueError) as error:
        return repr(error), plain
    difference, bound = (shared - plain).abs().max().item(), 1e-4 * max(1.0, plain.abs().max())
    return (None if difference <= bound else f"they are off by {difference:.1e}"), plain


# ------------------------------------------------------------------------------------ gradients
METRICS = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
METRICS += ["logps/chosen", "logps/rejected"]


def micro_batches(tokens, order, micro_tokens):
    """Split indices, which come longest first, into lists that take at most micro_tokens tokens
    when padded (a longer row is a list by itself). tokens: maps an index to its row's tokens."""
    batches = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * tokens[batches[-1][0]] <= micro_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def run_pairs(model, pairs, indices, loss_fn, config, train=False):
    """Mean metrics over the pairs at these indices; to train, add up gradients of their mean loss.
    Every loss is divided by the number of all pairs, so the size of micro-batches and the number of
    processes do not matter. FloatingPointError names pairs whose loss is not finite."""
    tokens = dict(zip(indices, row_tokens([pairs[i] for i in indices], config.plain_rows)))
    order = sorted(indices, key=lambda i: -tokens[i])
    share = order[RANK::WORLD_SIZE]
    figures = [torch.zeros(len(METRICS), 0, dtype=torch.float64, device=config.device)]
    for batch in micro_batches(tokens, share, config.micro_tokens):
        rows = make_rows([pairs[i] for i in batch], config.plain_rows, config.device)
        with torch.set_grad_enabled(train):
            chosen, rejected = pair_logps(model, rows)
            losses, chosen_rewards, rejected_rewards = loss_fn(chosen, rejected, pairs, batch)
        if train:
            (losses.sum() / len(order)).backward()
        margins = chosen_rewards - rejected_rewards
        values = losses, chosen_rewards, rejected_rewards, margins, margins > 0, chosen, rejected
        figures.append(torch.stack([value.detach().double() for value in values]))
    figures = torch.cat(figures, 1)  # (metrics, pairs of this process, which may be none)
    sums = figures.sum(1)
    if WORLD_SIZE > 1:
        dist.all_reduce(sums)
    means = dict(zip(METRICS, (sums / len(order)).tolist()))  # the only wait for the device
    if not math.isfinite(means["loss"]):
        bad = [pairs[i].place for i, loss in zip(share, figures[0]) if not loss.isfinite()]
        where = ", ".join(bad[:10]) or "pairs of another process"
        raise FloatingPointError(f"the loss is not finite, at {where}")
    return means


def learning_rate_at(step, steps, config):
    """Linear warm-up, then a cosine to zero; no step of the run has a rate of zero."""
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    return config.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


# ------------------------------------------------------------------------------------ weights
ADAMW = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
ADAMW.update(amsgrad=False, maximize=False, fused=True)


class MasterAdamW:
    """AdamW on float32 master weights, whatever the model computes in and wherever masters live.
    At a learning rate of 1e-6 an update is about 1e-6, and bfloat16 numbers near 0.02 lie 1e-4
    apart: on bfloat16 weights nearly every update rounds to nothing. So the model computes with
    copies of the masters, and gradients are summed in float32. Bytes per parameter: 4 for the sums,
    on sum_device; 12 for master and two moments, on master_device, where each process keeps those
    of its share of the parameters (ZeRO stage 1, arXiv 1910.02054)."""

    def __init__(self, model, device, dtype, master_device, sum_device):
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.owners = {name: i % WORLD_SIZE for i, name in enumerate(self.params)}
        self.states, self.sums = {}, {}
        for name, param in self.params.items():
            param.register_post_accumulate_grad_hook(functools.partial(self.add_gradient, name))
            self.sums[name] = torch.zeros_like(param, dtype=torch.float32, device=sum_device)
            master = param.detach().to(master_device)
            param.data = master.to(device, dtype)  # the master itself if neither differs
            if self.owners[name] == RANK:
                moments = {key: torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")}
                self.states[name] = dict(master=master, **moments, step=master.new_zeros(()))
        model.to(device)
        self.buffer = None
        if master_device != device:  # pinned: from pageable memory it takes 15 times as long
            largest = max(param.numel() for param in self.params.values())
            self.buffer = torch.empty(largest, dtype=dtype, pin_memory=True)

    def add_gradient(self, name, param):  # a hook, called when param.grad is complete
        self.sums[name].add_(param.grad.to(self.sums[name].device))  # in float32, whatever grad is
        param.grad = None

    def reduce(self):
        """Add up each gradient sum on the process that owns its master; elsewhere it is spoiled.
        Returns the norm of the whole gradient. FloatingPointError where it is not finite."""
        for name, owner in self.owners.items() if WORLD_SIZE > 1 else ():
            dist.reduce(self.sums[name], owner)
        norm = torch.nn.utils.get_total_norm([self.sums[name] for name in self.states])
        if WORLD_SIZE > 1:
            dist.all_reduce(norm.square_())
            norm.sqrt_()
        if not norm.isfinite():
            raise FloatingPointError(f"the gradient norm is {norm.item()}")
        return norm

    @torch.no_grad()
    def step(self, learning_rate, max_norm):
        """Clip the gradients, update masters and model, zero the sums; return the gradient's norm.
        FloatingPointError, before any weight changes, where the norm is not finite."""
        norm = self.reduce()
        clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for name, state in self.states.items():
            master, exp_avg, exp_avg_sq, count = state.values()
            grad = self.sums[name].mul_(clip).to(master.device)
            adamw([master], [grad], [exp_avg], [exp_avg_sq], [], [count], lr=learning_rate, **ADAMW)
        torch._foreach_zero_(list(self.sums.values()))  # those too that this process does not own
        self.update_model()
        return norm.item()

    @torch.no_grad()
    def update_model(self):
        """Copy the masters into the model, on all processes."""
        for name, param in self.params.items():
            if name in self.states:
                master = self.states[name]["master"]
                if self.buffer is not None:
                    master = self.buffer[: master.numel()].view_as(master).copy_(master)
                param.data.copy_(master)
            if WORLD_SIZE > 1:
                dist.broadcast(param.data, self.owners[name])


# ------------------------------------------------------------------------------------ checkpoints
# What a resumed run may change; changes are recorded. Data may be renamed, but its hash must match
MAY_CHANGE = "data eval_data out learning_rate device micro_tokens gradient_checkpointing compile "
MAY_CHANGE = (MAY_CHANGE + "master_device eval_every save_every").split()


def all_agree(flag):
    """Whether the flag is true on every process; none goes on before all have asked."""
    flags = torch.tensor(int(flag))
    if WORLD_SIZE > 1:
        dist.all_reduce(flags, dist.ReduceOp.MIN)
    return bool(flags)


def checkpoints(out):
    """The folders checkpoint-STEP in out, newest first. Folders of other names are not ours."""
    folders = [path for path in out.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name[11:]), reverse=True)


def check_out(config):
    """UserError where --out is not empty, or holds no checkpoint to resume from."""
    out = Path(config.out)
    with user_error(f"--out {out}", "choose another folder"):
        names = os.listdir(out) if out.is_symlink() or out.exists() else []  # links to nothing too
    if config.resume and not checkpoints(out):
        raise UserError(f"--resume: there is no checkpoint in {out}; start without --resume")
    if not config.resume and not {"metrics.jsonl", ".partial"}.issuperset(names):
        raise UserError(f"--out {out}: is not empty; choose another, or --resume its run")


def open_run(config, pairs, eval_pairs, optimizer, on_exit):
    """Lock --out until on_exit ends, and return the state of its run. With --resume it comes from
    the newest checkpoint, as do optimizer and model. UserError where that cannot be."""
    out, settings = Path(config.out), asdict(replace(config, resume=False))
    data = [ids.tobytes() for pair in [*pairs, *eval_pairs] for ids in pair[:3]]
    settings["pairs_sha256"] = hashlib.sha256(b" ".join(data)).hexdigest()
    if RANK == 0:
        with user_error(f"--out {out}", "another run may be writing there; choose another folder"):
            out.mkdir(parents=True, exist_ok=True)
            lock = os.open(out, os.O_RDONLY)
            on_exit.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            check_out(config)  # again, since another run may have been here meanwhile
    all_agree(True)
    if not config.resume:
        return dict(step=0, log_bytes=0, config=settings, changes=[])
    folder = checkpoints(out)[0]
    with user_error(f"{folder} is damaged", "delete it, to resume from the one before"):
        state = json.loads((folder / "state.json").read_text())
        for name, value in settings.items():
            old = state["config"][name]
            if old != value and name not in MAY_CHANGE:
                raise UserError(f"--resume: {name} is {value}, and was {old} in that run")
            if old != value:
                state["changes"] += [f"{name} from {old} to {value} after step {state['step']}"]
        for name, tensors in optimizer.states.items():
            loaded = load_file(folder / f"{name}.safetensors")
            for key, tensor in tensors.items():
                tensor.copy_(loaded[key].view_as(tensor))
    optimizer.update_model()
    print(f"resumed after step {state['step']}")
    return state | dict(config=settings)


def save_checkpoint(out, state, optimizer):
    """Write checkpoint-STEP, a file per parameter, and keep only it and the one before it.
    The folder gets its name when all of it is on the disk, so a folder of that name is whole."""
    folder, partial = out / f"checkpoint-{state['step']:06}", out / ".partial"
    if RANK == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir()
    all_agree(True)
    for name, tensors in optimizer.states.items():
        (partial / f"{name}.safetensors").write_bytes(save(tensors))
    all_agree(True)
    if RANK == 0:
        (partial / "state.json").write_text(json.dumps(state))
        os.sync()
        partial.rename(folder)
        os.sync()
        found = checkpoints(out)
        for older in found[found.index(folder) + 2 :]:
            shutil.rmtree(older.rename(partial))  # renamed first, for the same reason
    all_agree(True)  # torchrun ends the process that writes when another one has ended


# ------------------------------------------------------------------------------------ training
class Stopped(Exception):
    """A signal ended the run after a step that was saved: Stopped(signal number, step)."""


def catch_signals(on_exit):
    """A list that grows by each signal from now on; the run ends after the step of the first."""
    received = []

    def receive(number, frame):
        if RANK == 0 and not received:
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nfinishing this step and saving (without torchrun, again to quit)\n")
        received.append(number)
        if WORLD_SIZE == 1:  # under torchrun, one Ctrl-C arrives twice
            signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            on_exit.callback(signal.signal, number, signal.signal(number, receive))
    return received


def build(config, devices, pairs, loss_fn):
    """(model, optimizer), after a rehearsal: the micro-batches with the most tokens, the largest
    masks and the longest pair run, so that what would fail hours later fails now. Turns
    config.plain_rows on where shared rows are wrong. UserError where figures are not finite."""
    model = load_model(config.model, config.gradient_checkpointing)
    prompt, chosen, rejected, _ = pairs[row_tokens(pairs, plain=False).argmax()]
    pair = prompt[-256:], chosen[:128], rejected[:128]  # short, so that 7B takes seconds on a CPU
    reason, exact = check_model(model, pair)
    if not all_agree(config.plain_rows or reason is None):
        print(f"note: plain rows, which are slower, because shared rows are wrong here: {reason}")
        config.plain_rows = True
    if config.compile:
        # a layer is compiled anew for each kind of mask, with gradients and without
        torch._dynamo.config.recompile_limit = 64
        lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
        for layer in max(lists, key=len, default=[]):  # the decoder's
            layer.compile(dynamic=True)
    optimizer = MasterAdamW(model, config.device, getattr(torch, config.dtype), *devices)
    tokens = row_tokens(pairs, config.plain_rows)
    copies = np.clip(config.micro_tokens // tokens, 1, min(config.batch_size, len(pairs)))
    sizes = copies * tokens, copies * tokens**2, tokens  # the most memory first, which is reused
    bound = 0.05 if config.dtype == "bfloat16" else 1e-3  # ten times what rounding was seen to do
    try:
        rows = make_rows([pair], config.plain_rows, config.device)
        rounded = torch.cat(pair_logps(model, rows)).detach().cpu()
        if (rounded - exact).abs().max() > bound * max(1.0, exact.abs().max()):
            raise FloatingPointError(f"log-probabilities {rounded.tolist()}, not {exact.tolist()}")
        for i in dict.fromkeys(int(size.argmax()) for size in sizes):
            run_pairs(model, pairs, [i] * int(copies[i]) * WORLD_SIZE, loss_fn, config, train=True)
        optimizer.reduce()
    except FloatingPointError as error:
        raise UserError(f"rehearsal: {error} (try a lower --alpha or --dtype float32)") from error
    torch._foreach_zero_(list(optimizer.sums.values()))
    beside("plan", "print_peak", config.device)  # of memory
    return model, optimizer


def save_model(model, tokenizer, summary, out):
    """Write model (bfloat16) and tokenizer, then summary.json: where that is, all is there."""
    folder = out / ".partial"
    shutil.rmtree(folder, ignore_errors=True)  # of a save that was killed
    model.config = load_pretrained(AutoConfig, summary["config"]["model"])  # dropouts back on
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    mode = (folder / "summary.json").stat().st_mode
    os.sync()
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "summary.json"):
        if path.is_file():
            path.chmod(mode)  # safetensors makes files that only their owner can read
        shutil.rmtree(out / path.name, ignore_errors=True)  # a folder is not replaced
        path.replace(out / path.name)
    folder.rmdir()


def train(config: Config, loss_fn=None) -> dict | None:
    """Align a model, write it and its figures to config.out, and return what summary.json holds, or
    None on all processes but the first.
    loss_fn: a loss in place of alphapo_loss, (chosen_logps, rejected_logps, pairs, batch) ->
    (losses, chosen_rewards, rejected_rewards), one value per pair. batch: indices into pairs.
    Raises UserError, before anything is written, where settings, data or model cannot be used, and
    FloatingPointError (a loss or gradient is not finite) or Stopped (a signal, after a save)."""
    config, out = resolve(config), Path(config.out)
    knobs = config.alpha, config.beta, config.gamma
    loss_fn = loss_fn or (lambda chosen, rejected, *_: alphapo_loss(chosen, rejected, *knobs))
    with contextlib.ExitStack() as on_exit:
        if WORLD_SIZE > 1 and not dist.is_initialized():
            if config.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group()  # gloo for what is on the CPU, nccl for what is on a GPU
        # cuDNN's backward under a mask can give NaN (pytorch issue 196678)
        torch.backends.cuda.enable_cudnn_sdp(False)
        check_out(config)  # before data and weights, which take minutes
        tokenizer, pairs, eval_pairs, notes = load_data(config)
        plan = beside("plan", "make_plan", config, pairs, eval_pairs)
        master_device = config.master_device.replace("auto", config.device)
        devices = plan["places"] if plan else (master_device, config.device)  # masters, sums
        model, optimizer = build(config, devices, pairs, loss_fn)
        state = open_run(config, pairs, eval_pairs, optimizer, on_exit)
        log = open(out / "metrics.jsonl" if RANK == 0 else os.devnull, "a", buffering=1)
        on_exit.enter_context(log)
        if RANK == 0:  # keep what the checkpoint knows, in whole lines
            known = (out / "metrics.jsonl").read_bytes()[: state["log_bytes"]]
            log.truncate(known.rfind(b"\n") + 1)

        def evaluate():
            everything = range(len(eval_pairs))
            means = run_pairs(model, eval_pairs, everything, loss_fn, config) if eval_pairs else {}
            means = {f"eval_{key}": value for key, value in means.items()}
            log.write(json.dumps({"step": state["step"]} | means) + "\n")
            return means

        if not config.resume:
            state["before"] = evaluate()
        steps_per_epoch = math.ceil(len(pairs) / config.batch_size)
        steps = min(config.max_steps or math.inf, steps_per_epoch * config.epochs)
        signals, tokens = catch_signals(on_exit), token_counts(pairs).sum(1)
        progress = tqdm(total=steps, initial=state["step"], unit="step", disable=RANK > 0)
        on_exit.enter_context(progress)
        for step in range(state["step"] + 1, steps + 1):
            epoch, batch = divmod(step - 1, steps_per_epoch)
            order = np.random.default_rng([config.seed, epoch]).permutation(len(pairs))
            indices = order[batch * config.batch_size :][: config.batch_size].tolist()
            learning_rate = learning_rate_at(step - 1, steps, config)
            start = time.perf_counter()
            try:
                metrics = run_pairs(model, pairs, indices, loss_fn, config, train=True)
                summed_up = time.perf_counter()
                metrics["grad_norm"] = optimizer.step(learning_rate, config.max_grad_norm)
            except FloatingPointError as error:
                raise FloatingPointError(f"step {step}: {error}") from error
            end, state["step"] = time.perf_counter(), step
            metrics.update(learning_rate=learning_rate, epoch=step / steps_per_epoch)
            metrics.update(pairs=len(indices), tokens=int(tokens[indices].sum()))
            metrics.update(seconds=end - start, optimizer_seconds=end - summed_up)
            log.write(json.dumps({"step": step} | metrics) + "\n")
            progress.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
            progress.update()
            if config.eval_every and step % config.eval_every == 0 and step < steps:
                evaluate()
            stopped = not all_agree(not signals)
            if stopped or (config.save_every and step % config.save_every == 0):
                state["log_bytes"] = log.tell()
                save_checkpoint(out, state, optimizer)
            if stopped:
                raise Stopped(signals[0] if signals else signal.SIGTERM, step)  # another's signal
        optimizer.states.clear()  # so that writing the model takes no more memory than training it
        for param in model.parameters():  # the last figures are then those of what is written
            param.data.copy_(param.data.bfloat16())
        state.update(after=evaluate(), plan=plan, notes=notes, processes=WORLD_SIZE)
        state.update(pairs=len(pairs), eval_pairs=len(eval_pairs))
        state.update(torch=torch.__version__, transformers=transformers.__version__)
        state.update(peak_memory_gib=beside("plan", "peak_memory", config.device))
        if RANK == 0:
            save_model(model, tokenizer, state, out)
        all_agree(True)  # the others wait for the first, or their exit would end it
        return None if RANK else state


# ------------------------------------------------------------------------------------ command line
def fail(message, status=2):
    print(f"alphapo: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def parse_arguments(argv):
    """The settings of a command line, over the defaults of the preset that --model names."""
    presets = "Presets for --model. Defaults above: of the preset given, or tiny without --model."
    for name, preset in PRESETS.items():
        numbers = [f"{key} {value:g}" for key, value in preset.items() if type(value) is not str]
        presets += f" {name}: {', '.join(numbers)}."
    about = __doc__.split("\n")[0]
    parser = HfArgumentParser(Config, description=about, epilog=presets, allow_abbrev=False)
    parser.error = fail  # in place of a screen of usage
    for action in parser._actions:  # every flag is accepted with underscores too, but shown once
        action.option_strings = action.option_strings[-1:]
    # once for the model alone, whose preset gives the defaults
    values, _ = parser.parse_known_args([arg for arg in argv if arg not in ("-h", "--help")])
    preset = dict(PRESETS.get(values.model, {}))
    if values.data:
        preset.pop("eval_data", None)  # a preset's held-out pairs belong to its own data
    parser.set_defaults(**preset)
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
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc: new pages took a tenth of a step
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: blocks up to 32 MiB come from the heap,
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: which keeps what is freed
    config = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        if config.plan:
            config = resolve(config)
            beside("plan", "make_plan", config, *load_data(config)[1:3]) or fail("no data/plan.py")
        elif train(config):
            print(beside("report", "report", config.out) or f"saved in {config.out}")
    except UserError as error:
        fail(error)
    except Stopped as error:
        number, step = error.args
        processes = os.environ.get("LOCAL_WORLD_SIZE")
        launcher = f"torchrun --nproc-per-node {processes}" if processes else "python"
        command = shlex.join(sys.argv if config.resume else [*sys.argv, "--resume"])
        fail(f"stopped after step {step} and saved; go on with: {launcher} {command}", 128 + number)
    except (FloatingPointError, OSError, torch.OutOfMemoryError, SafetensorError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains again at its end
        remedy = "lower --micro-tokens; " if isinstance(error, torch.OutOfMemoryError) else ""
        if isinstance(error, FloatingPointError):
            remedy = "lower --learning-rate or --alpha, from the start if --resume ends here too; "
        saved = checkpoints(Path(config.out))
        remedy += "what was saved is whole: --resume" if saved else "no checkpoint was saved"
        fail(f"{(str(error).strip() or repr(error)).splitlines()[-1]}; {remedy}", 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if WORLD_SIZE > 1:  # torch's threads now and then abort a normal exit, and torchrun reports it
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
