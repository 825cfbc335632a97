# SPDX-License-Identifier: MIT
"""AlphaPO in one file: align a language model from preference pairs.

    reward   r(y|x) = (1 - p^-alpha) / alpha      with log p = (1/|y|) sum_t log pi(y_t | x, y_<t)
    loss     -log sigmoid(beta * (r(chosen) - r(rejected)) - gamma)

alpha = 0 is SimPO, where r = log p. A larger alpha presses harder on responses that are already unlikely, and
so decides how far training lets the probability of the chosen response fall (likelihood displacement).

    python alphapo.py                                            # the model and pairs in data/, on any CPU
    python alphapo.py --model mistral-7b-instruct --alpha 0.25   # a preset: model, data and settings
    python alphapo.py --model FOLDER --data PAIRS.jsonl --learning-rate 1e-6 --save-every 50
    torchrun --nproc-per-node 8 alphapo.py --model mistral-7b-instruct
    python alphapo.py --help

From top to bottom: the loss, log-probabilities, data, model, optimizer, training loop, command line. Each
part uses only what stands above it, and the loss needs nothing but torch: copy it.

AlphaPO: arXiv 2501.03884 (Gupta et al., 2025). SimPO: arXiv 2405.14734 (Meng et al., 2024).
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import resource
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm  # comes with transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

# -------------------------------------------------------------------------------- the loss


def alphapo_reward(logps: torch.Tensor, alpha: float) -> torch.Tensor:
    """The reward of AlphaPO before it is scaled by beta: (1 - p^-alpha) / alpha (arXiv 2501.03884).

    Args:
        logps: mean log-probability per token (nats) of each response, any shape.
        alpha: shape of the reward; 0 gives log p itself, SimPO's reward and the limit from both sides.

    Returns:
        Rewards in float64, same shape. Where -alpha * logps > 709, beyond float64, they are -inf without a
        gradient: a pair with its rejected response there is done (loss 0), any other gives inf or nan.
    """
    logps = logps.double()
    if alpha == 0:
        return logps
    exponent = -alpha * logps
    # near 0 exp(x) - 1 loses the value, far below 0 expm1 loses the gradient: each where it is exact
    power = torch.expm1(exponent.clamp(max=709.0)).masked_fill(exponent > 709.0, torch.inf)
    return -torch.where(exponent < -1.0, exponent.clamp(max=0.0).exp() - 1.0, power) / alpha


def alphapo_loss(
    chosen_logps: torch.Tensor, rejected_logps: torch.Tensor, alpha: float, beta: float, gamma: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The AlphaPO loss, -log sigmoid(m) with m = beta * (r(chosen) - r(rejected)) - gamma (arXiv 2501.03884).

    Its gradient is -sigmoid(-m) * beta * exp(-alpha * chosen_logps) with respect to chosen_logps, and
    sigmoid(-m) * beta * exp(-alpha * rejected_logps) with respect to rejected_logps. Hence, for logps < 0:
    alpha -> -inf drives both to zero; so does alpha -> +inf where the chosen response is the likelier, for
    sigmoid(-m) vanishes faster than the power grows. Where it is not, sigmoid(-m) is sigmoid(gamma) or more,
    and both grow without bound, as exp(alpha * |logps|): this is why alpha is small in practice.

    Args:
        chosen_logps, rejected_logps: mean log-probability per token (nats) of the responses, (pairs,) each.
        alpha: shape of the reward; 0 is SimPO.
        beta: scale of the reward.
        gamma: target margin between the scaled rewards: the margin itself, not SimPO's ratio gamma/beta.

    Returns:
        (losses, chosen_rewards, rejected_rewards), one value a pair, in the dtype of chosen_logps; rewards are
        multiplied by beta and carry no gradient.

    Raises:
        ValueError: the shapes differ, and would broadcast to a loss over pairs that are none.
    """
    if chosen_logps.shape != rejected_logps.shape:
        raise ValueError(
            f"chosen_logps {chosen_logps.shape} and rejected_logps {rejected_logps.shape} differ"
        )
    # float64: the two rewards often agree to three digits, and so few numbers cost nothing
    chosen_rewards = beta * alphapo_reward(chosen_logps, alpha)
    rejected_rewards = beta * alphapo_reward(rejected_logps, alpha)
    losses = -torch.nn.functional.logsigmoid(chosen_rewards - rejected_rewards - gamma)
    dtype = chosen_logps.dtype
    return losses.to(dtype), chosen_rewards.detach().to(dtype), rejected_rewards.detach().to(dtype)


# -------------------------------------------------------------------------------- log-probabilities


@dataclass
class Rows:
    """A micro-batch of pairs as padded token rows, and the positions that predict its response tokens."""

    input_ids: torch.Tensor  # (rows, time)
    position_ids: torch.Tensor  # (rows, time): the rejected response starts again where the chosen one did
    segments: torch.Tensor  # (rows, time): 0 prompt, 1 chosen, 2 rejected, -1 padding
    sources: torch.Tensor  # (tokens,): the position, in the flattened rows, that predicts each response token
    targets: torch.Tensor  # (tokens,): the response tokens, pair by pair, chosen before rejected
    lengths: list[int]  # (2 * pairs,): tokens of each response
    plain: bool  # two rows a pair, [prompt | chosen] and [prompt | rejected], in place of one


def make_rows(pairs, plain=False, device="cpu") -> Rows:
    """Lay out (prompt, chosen, rejected) token arrays as rows [prompt | chosen | rejected], or plain rows."""
    layouts = []  # of each row: its prompt, and the responses that follow, by segment
    for prompt, chosen, rejected in pairs:
        both = (prompt, {1: chosen, 2: rejected})
        layouts += [(prompt, {1: chosen}), (prompt, {2: rejected})] if plain else [both]
    width = max(len(prompt) + sum(map(len, responses.values())) for prompt, responses in layouts)
    input_ids, position_ids = np.zeros((2, len(layouts), width), np.int64)
    segments = np.full((len(layouts), width), -1)
    sources, targets = [], []
    for row, (prompt, responses) in enumerate(layouts):
        end = len(prompt)
        input_ids[row, :end], position_ids[row, :end], segments[row, :end] = prompt, np.arange(end), 0
        for segment, response in responses.items():
            start, end = end, end + len(response)
            input_ids[row, start:end], segments[row, start:end] = response, segment
            position_ids[row, start:end] = len(prompt) + np.arange(len(response))
            # the last token of the prompt predicts the first of both responses
            sources.append(row * width + np.r_[len(prompt) - 1, start : end - 1])
            targets.append(response.astype(np.int64))
    flat = (input_ids, position_ids, segments, np.concatenate(sources), np.concatenate(targets))
    return Rows(*(torch.from_numpy(x).to(device) for x in flat), [len(x) for x in targets], plain)


def attention_masks(config, rows: Rows, dtype):
    """The mask of shared rows, (rows, 1, time, time), or a dict of masks by kind of layer if there are kinds.

    A token sees the prompt and its own response, up to itself and no further back than the window.

    Raises:
        NotImplementedError: the model has layers that are not attention over a row.
    """

    def mask(window):
        query, key = rows.segments[:, :, None], rows.segments[:, None, :]
        allowed = ((key == query) | (key == 0)).tril_()
        if window is not None:
            allowed &= rows.position_ids[:, :, None] - rows.position_ids[:, None, :] < window
        # additive, for eager attention adds whatever it is given: a bool mask would be wrong without a word
        zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return zeros.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]

    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return mask(window)
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"it has layers of kind {', '.join(sorted(kinds))}")
    return {kind: mask(window if kind == "sliding_attention" else None) for kind in kinds}


class ProjectedLogps(torch.autograd.Function):
    """Log-probabilities of target tokens from hidden states, one chunk of logits at a time.

    The backward pass computes the logits again, so that no more than a chunk of them ever exists. Checkpoints
    of chunks would do it too, with nearly twice the memory: they hold a gradient of the weights for each chunk.
    """

    chunk = 2**24  # logits: 64 MiB; larger ones were no faster

    @staticmethod
    def logits(hidden, weight, softcap):
        logits = (hidden @ weight.T).float()
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap):
        """hidden (tokens, width), weight (vocabulary, width), targets (tokens,) -> (tokens,) in float32."""
        ctx.size, ctx.softcap = max(1, ProjectedLogps.chunk // len(weight)), softcap
        normalizers, logps = [], []
        for h, t in zip(hidden.split(ctx.size), targets.split(ctx.size)):
            logits = ProjectedLogps.logits(h, weight, softcap)
            normalizers.append(logits.logsumexp(1))
            logps.append(logits.gather(1, t[:, None])[:, 0] - normalizers[-1])
        ctx.save_for_backward(hidden, weight, targets, torch.cat(normalizers))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, normalizers = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for h, grad_h, t, normalizer, g in zip(
            *(x.split(ctx.size) for x in (hidden, grad_hidden, targets, normalizers, grad))
        ):
            logits = ProjectedLogps.logits(h, weight, ctx.softcap)
            slope = 1.0 if ctx.softcap is None else 1.0 - (logits / ctx.softcap) ** 2
            grad_logits = logits.sub_(normalizer[:, None]).exp_().mul_(-g[:, None])  # g * (onehot - softmax)
            grad_logits = grad_logits.scatter_add_(1, t[:, None], g[:, None]).mul_(slope).to(h.dtype)
            torch.mm(grad_logits, weight, out=grad_h)
            grad_weight += grad_logits.T @ h
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def pair_logps(model, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean log-probability per token (nats): (chosen_logps, rejected_logps), float32, (pairs,) each.

    Shared rows go through the decoder under masks of our own, and only the positions that predict a response
    token are projected onto the vocabulary. Plain rows go through the model's own forward pass.

    Raises:
        NotImplementedError: shared rows are not made for this model.
    """
    width = rows.input_ids.shape[1]
    if rows.plain:
        keep = width - int((rows.sources % width).min())  # columns of logits, from the first that is needed
        real = (rows.segments >= 0).long()
        output = model(rows.input_ids, attention_mask=real, use_cache=False, logits_to_keep=keep)
        logits = output.logits[rows.sources // width, rows.sources % width - width].float()
        token_logps = logits.gather(1, rows.targets[:, None])[:, 0] - logits.logsumexp(1)
    else:
        config, head = model.config.get_text_config(), model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise NotImplementedError("its projection has a bias")
        masks = attention_masks(config, rows, model.dtype)
        inputs = dict(input_ids=rows.input_ids, position_ids=rows.position_ids, attention_mask=masks)
        hidden = model.base_model(**inputs, use_cache=False)[0].flatten(0, 1)[rows.sources]
        softcap = getattr(config, "final_logit_softcapping", None)
        token_logps = ProjectedLogps.apply(hidden, head.weight, rows.targets, softcap)
    means = [response.mean() for response in token_logps.split(rows.lengths)]
    return torch.stack(means[0::2]), torch.stack(means[1::2])


class Policy(torch.nn.Module):
    """pair_logps as a module: FSDP makes embedding and projection whole tensors inside its forward pass."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, rows):
        return pair_logps(self.model, rows)


@torch.no_grad()
def why_plain(model, pair) -> str | None:
    """Compare shared with plain rows on one pair, in float32: None where they agree, else what is wrong.

    Where they agree, they do to 5e-7; a state that runs along the row, or logits scaled after the projection,
    show as 1e-3 and more.
    """
    plain = torch.stack(pair_logps(model, make_rows([pair], plain=True, device=model.device)))
    try:
        shared = torch.stack(pair_logps(model, make_rows([pair], device=model.device)))
    except Exception as error:  # what a model does not take, it refuses in a way of its own
        return first_line(error)
    difference = (shared - plain).abs().max().item()
    return (
        None if difference <= 1e-4 * max(1.0, plain.abs().max()) else f"it would be off by {difference:.1e}"
    )


def first_line(error):
    return str(error).strip().split("\n")[0] or type(error).__name__


# -------------------------------------------------------------------------------- data


class UserError(Exception):
    """A mistake that the user can mend: printed as it stands, without a traceback; exit status 2."""


@dataclass
class Pairs:
    """Tokenized pairs in flat arrays: a million of them with 1,000 tokens each take 4 GB."""

    tokens: np.ndarray  # int32: prompt, chosen, rejected, prompt, ...
    bounds: np.ndarray  # int64 (pairs, 4): where prompt, chosen and rejected begin, and where the pair ends
    places: list[str]  # file:line of each pair
    notes: Counter  # what was dropped or truncated, by reason

    def __len__(self):
        return len(self.bounds)

    def __getitem__(self, i):
        start, chosen, rejected, end = self.bounds[i]
        return self.tokens[start:chosen], self.tokens[chosen:rejected], self.tokens[rejected:end]

    def size(self, i, plain):
        """Tokens that pair i takes in a micro-batch."""
        prompt, chosen, rejected = np.diff(self.bounds[i])
        return int(2 * (prompt + max(chosen, rejected)) if plain else prompt + chosen + rejected)


def read_rows(name):
    """Yield (place, row) of a .jsonl or .json file, or of what the datasets library finds under that name.

    Lines are yielded as bytes, so that one that is no JSON is reported with the other bad rows.
    """
    try:
        if name.endswith((".jsonl", ".json")):
            with open(name, "rb") as file:
                for number, line in enumerate(file, 1):
                    if number == 1 and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
                        items = enumerate(json.loads(line + file.read()), 1)
                        yield from ((f"{name}: item {i}", item) for i, item in items)
                    elif line.strip():
                        yield f"{name}:{number}", line
            return
        import datasets

        repository, _, split = name.partition(":")
        if Path(name).is_file():
            rows = datasets.load_dataset(Path(name).suffix[1:], data_files=name, split="train")
        else:
            rows = datasets.load_dataset(repository, split=split or "train")
        yield from ((f"{name}: row {i}", row) for i, row in enumerate(rows, 1))
    except ImportError as error:
        raise UserError(f"{name}: anything but .json and .jsonl needs: pip install datasets") from error
    except Exception as error:  # the datasets library alone raises a dozen kinds
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{name}: not loaded: {reason}; give a file, or a hub id in reach") from error


def shared_length(*sequences):
    """How many items the sequences have in common at their beginning."""
    columns = enumerate(zip(*sequences))
    return next((i for i, column in columns if any(x != column[0] for x in column)), min(map(len, sequences)))


def messages_of(value, key):
    """The role and content of each message of a conversation."""
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        messages = [{"role": m.get("role"), "content": m.get("content")} for m in value]
        if messages and all(isinstance(text, str) for message in messages for text in message.values()):
            return messages
    raise ValueError(f'"{key}" must be a text like the others, or messages with "role" and "content"')


def parse_row(row):
    """A data row as (prompt, chosen, rejected), texts or messages, both responses beginning with the prompt.

    A prompt of None is what two texts have in common.

    Raises:
        ValueError: the row is none of TRL's preference formats.
    """
    if isinstance(row, bytes):
        try:
            row = json.loads(row.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
        raise ValueError('not an object with "chosen" and "rejected"')
    prompt, sides = row.get("prompt"), [row["chosen"], row["rejected"]]
    if isinstance(prompt, str | None) and all(isinstance(side, str) for side in sides):
        return (prompt, *((prompt or "") + side for side in sides))
    sides = [messages_of(row[key], key) for key in ("chosen", "rejected")]
    if isinstance(prompt, str) and all(side[0]["role"] == "assistant" for side in sides):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str | None):  # UltraFeedback's conversations repeat their prompt
        prompt = sides[0][: min(shared_length(*sides), *(len(side) - 1 for side in sides))]
    else:
        prompt = messages_of(prompt, "prompt")
        sides = [side if side[: len(prompt)] == prompt else prompt + side for side in sides]
    roles = [[message["role"] for message in side[len(prompt) :]] for side in sides]
    if not prompt or prompt[-1]["role"] == "assistant" or roles != [["assistant"], ["assistant"]]:
        raise ValueError("a conversation must be a prompt that ends with the user, and one assistant message")
    return prompt, *sides


def end_turn(ids, tokenizer, special):
    """Cut a response behind its end-of-turn token, or add one: (ids, whether anything is said before it).

    Behind it templates write white space (ChatML a newline) or a second one (Phi-3).
    """
    end, turn = len(ids), None
    while end and (ids[end - 1] in special or not tokenizer.decode(ids[end - 1]).strip()):
        end -= 1
        turn = end if ids[end] in special else turn
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return (ids + eos if turn is None else ids[: turn + 1]), end > 0


def encode_row(row, tokenizer, special, max_length, max_prompt_length, notes):
    """Token ids (prompt, chosen, rejected) of a data row, or None for a dropped pair; notes count the reasons.

    Prompt and response are tokenized together, for tokenizers merge across the boundary; the prompt is
    what the tokens of the rendered prompt and of both sequences have in common at their beginning.

    Raises:
        ValueError: the row is malformed, or the chat template refuses it.
    """
    prompt, *sides = parse_row(row)
    texts = [sides[0] if prompt is None else prompt, *sides]
    if chat := isinstance(prompt, list):
        if not tokenizer.chat_template:
            raise UserError(
                "conversations need a chat template, and this tokenizer has none: take a chat model"
            )
        try:
            render = partial(tokenizer.apply_chat_template, tokenize=False)
            texts = [render(prompt, add_generation_prompt=True), *map(render, sides)]
        except Exception as error:  # jinja's kinds, and Python's
            raise ValueError(f"the chat template refuses it: {first_line(error)}") from error
    # a template writes BOS itself or wants none; where tokenizer and text both wrote one, one goes
    try:
        encoded, bos = tokenizer(texts, add_special_tokens=not chat)["input_ids"], tokenizer.bos_token_id
    except TypeError as error:
        raise ValueError("it holds what is no text, such as half of a surrogate pair") from error
    encoded = [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in encoded]
    shared = shared_length(*encoded)
    if prompt is None:
        shared = min(shared, *(len(ids) - 1 for ids in encoded))
    prompt = encoded[0][:shared]
    (chosen, said), (rejected, said_too) = (end_turn(ids[shared:], tokenizer, special) for ids in encoded[1:])
    if len(prompt) + max(len(chosen), len(rejected)) > max_length:
        if len(prompt) > max_prompt_length:
            notes["prompts truncated"] += 1
            start = prompt[:1] if prompt[0] == bos else []
            prompt = start + prompt[len(prompt) - max_prompt_length + len(start) :]
        room = max_length - len(prompt)
        notes["pairs with a response truncated"] += max(len(chosen), len(rejected)) > room
        chosen, rejected = chosen[:room], rejected[:room]
    flaws = {"an empty prompt": not prompt, "an empty response": not (said and said_too)}
    for flaw, found in (flaws | {"equal responses": chosen == rejected}).items():
        if found:
            notes[f"pairs dropped for {flaw}"] += 1
            return None
    return prompt, chosen, rejected


def load_pairs(name, tokenizer, max_length, max_prompt_length) -> Pairs:
    """Read, check and tokenize a file or hub data set.

    Raises:
        UserError: it cannot be read, or rows are malformed; the first ten are named as file:line.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
    special.discard(tokenizer.unk_token_id)
    tokens, lengths, places, notes, errors = [], [], [], Counter(), []
    for place, row in tqdm(read_rows(name), desc=f"reading {name}", unit=" rows", leave=False, disable=None):
        try:
            if pair := encode_row(row, tokenizer, special, max_length, max_prompt_length, notes):
                tokens.append(np.concatenate(pair).astype(np.int32))
                lengths.append([len(part) for part in pair])
                places.append(place)
        except ValueError as error:
            errors.append(f"{place}: {error}")
    if errors:
        more = f"\n... and {len(errors) - 10} more bad rows" if len(errors) > 10 else ""
        raise UserError("\n".join(errors[:10]) + more)
    if not places:
        raise UserError(
            f"{name}: no usable pair: {', '.join(f'{n} {what}' for what, n in notes.items()) or 'empty'}"
        )
    ends = np.cumsum(lengths).reshape(-1, 3)
    return Pairs(np.concatenate(tokens), np.c_[np.r_[0, ends[:-1, 2]], ends], places, notes)


# -------------------------------------------------------------------------------- model

# fmt: off
DATA = Path(__file__).parent / "data"
PRESETS = {
    "tiny": dict(
        model=str(DATA / "tiny"), data=str(DATA / "train.jsonl"), eval_data=str(DATA / "eval.jsonl"),
        alpha=0.25, beta=2.5, gamma=0.1, learning_rate=2e-4, batch_size=32, epochs=2,
        dtype="float32"),  # for so small a model the faster, on CPUs that have bfloat16 too
    "mistral-7b-instruct": dict(  # AlphaPO's table 3, as quoted by TRL's paper index
        model="mistralai/Mistral-7B-Instruct-v0.2", data="princeton-nlp/mistral-instruct-ultrafeedback",
        alpha=0.25, beta=2.5, gamma=0.1, learning_rate=7e-7),
    "llama-3-8b-instruct": dict(  # SimPO's released v0.2 recipe, alpha carried over
        model="meta-llama/Meta-Llama-3-8B-Instruct", data="princeton-nlp/llama3-ultrafeedback-armorm",
        alpha=0.25, beta=10.0, gamma=3.0, learning_rate=1e-6),
    "gemma-2-9b-it": dict(  # SimPO's released recipe, alpha a starting point of ours
        model="google/gemma-2-9b-it", data="princeton-nlp/gemma2-ultrafeedback-armorm",
        alpha=0.1, beta=10.0, gamma=5.0, learning_rate=8e-7),
}
# fmt: on


def from_hub(load, name, **options):
    """Call a from_pretrained; what keeps it from loading is the user's to mend."""
    try:
        return load(name, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        remedy = "a model folder holds config.json, tokenizer files and safetensors weights"
        if not Path(name).is_dir():
            remedy = "it is no folder here, and as a hub id it needs the hub, or a cache filled before"
        raise UserError(f"--model {name}: not loaded: {first_line(error)} ({remedy})") from error


def model_config(name):
    """The config of a causal language model, with every dropout that attention reads as a number off.

    Raises:
        UserError: it cannot be loaded, or is no causal language model.
    """
    config = from_hub(AutoConfig.from_pretrained, name)
    if config.is_encoder_decoder:
        raise UserError(f"--model {name}: an encoder-decoder; AlphaPO here is for causal language models")
    for part in (config, config.get_text_config()):
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


def load_model(name, device, checkpointing):
    """A causal language model in float32 with every dropout off.

    Raises:
        UserError: it cannot be loaded, is no causal language model, or has no safetensors weights.
    """
    options = dict(config=model_config(name), dtype=torch.float32, use_safetensors=True)
    model = from_hub(AutoModelForCausalLM.from_pretrained, name, **options).to(device)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if checkpointing:  # renamed in transformers 5.18
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return model.train(checkpointing)  # layers are recomputed in training mode only


def decoder_layers(model):
    """The model's stack of layers: its longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len, default=[])


def has_bf16(device):
    """Whether the device computes in bfloat16 itself; emulation is slower than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


# -------------------------------------------------------------------------------- optimizer


class MasterAdamW:
    """AdamW on float32 master weights, whatever the model computes in and wherever the masters live.

    At a learning rate of 1e-6 an update is a few millionths of a weight, and bfloat16 keeps eight bits: on
    bfloat16 weights nearly every update rounds to nothing. So the model computes with copies of the masters,
    and the gradients of a step's micro-batches are summed in float32. Masters and moments, 12 bytes a
    parameter, may stay in host memory: of a 7B model that leaves 40 GiB on the GPU in place of 121.

    Args:
        model: its parameters, in float32 as loaded, become the masters; it gets copies of them in dtype.
        dtype: what the model computes in.
        weight_decay: of parameters with two dimensions and more.
        device: where masters and moments live; None is where the model is.
    """

    part = 2**28  # parameters updated at a time: a gibibyte of gradients on the host, not all of them

    def __init__(self, model, dtype, weight_decay, device=None):
        named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        self.names, self.params = zip(*named)
        self.device = torch.device(device or self.params[0].device)
        self.masters, self.sums = self.params, None
        if dtype != torch.float32 or self.device.type != self.params[0].device.type:
            self.masters, self.sums = [], [None] * len(self.params)
            for i, param in enumerate(self.params):
                self.masters.append(param.data.to(self.device))
                param.data = param.data.to(dtype)
                param.register_post_accumulate_grad_hook(partial(self.add_gradient, i))
        self.parts, size = [], math.inf
        for i, param in enumerate(self.params):
            if size + param.numel() > self.part:
                self.parts.append([])
                size = 0
            self.parts[-1].append(i)
            size += param.numel()
        decayed = dict(params=[m for m in self.masters if m.ndim > 1], weight_decay=weight_decay)
        others = dict(params=[m for m in self.masters if m.ndim <= 1], weight_decay=0.0)
        self.adamw = torch.optim.AdamW([decayed, others], betas=(0.9, 0.999), eps=1e-8, fused=True)

    def add_gradient(self, i, param):
        self.sums[i] = param.grad.float() if self.sums[i] is None else self.sums[i].add_(param.grad)
        param.grad = None

    @torch.no_grad()
    def step(self, learning_rate, max_norm):
        """Clip the summed gradients to max_norm, update the weights, clear the gradients: the norm as it was.

        Raises:
            FloatingPointError: the norm is not finite; no weight was changed.
        """
        grads = self.sums or [param.grad for param in self.params]
        norm = whole(torch.nn.utils.get_total_norm([grad for grad in grads if grad is not None]))
        if not norm.isfinite():
            raise FloatingPointError(f"the gradient norm is {norm.item()}")
        clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate

        def fetch(part):  # pinned by torch, and copied while the host updates the part before
            there = [i for i in part if grads[i] is not None]
            return {i: grads[i].mul_(clip).to(self.device, non_blocking=True) for i in there}

        coming = fetch(self.parts[0])
        for following in [*self.parts[1:], []]:
            if self.params[0].is_cuda:
                torch.cuda.synchronize()
            part, coming = coming, fetch(following)
            for i, grad in part.items():
                self.masters[i].grad = grad
            self.adamw.step()  # passes over masters without a gradient
            for i in part:
                self.masters[i].grad = None
                if self.sums:
                    self.params[i].data.copy_(self.masters[i])
                    self.sums[i] = None
        return norm.item()

    def state(self, part):
        """Masters and moments of a part as {name: tensor}, on the host; of FSDP's tensors this rank's shards."""
        values = {}
        for i in part:
            kept = self.adamw.state.get(self.masters[i], {})
            for key, value in {"master": self.masters[i].detach(), **kept}.items():
                values[f"{self.names[i]}:{key}"] = local(value).cpu().contiguous()
        return values

    @torch.no_grad()
    def load(self, values):
        """Take over what state returned."""
        for i, (name, master) in enumerate(zip(self.names, self.masters)):
            if f"{name}:master" in values:
                local(master).copy_(values[f"{name}:master"])
                self.params[i].data.copy_(master)
            if f"{name}:step" in values:
                kept = self.adamw.state[master]
                kept["step"] = values[f"{name}:step"].to(master.device)
                for key in ("exp_avg", "exp_avg_sq"):
                    kept[key] = torch.zeros_like(master)
                    local(kept[key]).copy_(values[f"{name}:{key}"])


def local(tensor):
    """This rank's shard of a tensor under FSDP, any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor):
    """A tensor under FSDP gathered from all ranks, any other tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# -------------------------------------------------------------------------------- training loop


def knob(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Every setting of a run; each is a command-line flag too."""

    # fmt: off
    model: str = knob("tiny", f"a preset ({', '.join(PRESETS)}), a model folder or a hub id")
    data: str | None = knob(None, "pairs: a .jsonl, .json, .parquet or .csv file, hub-id or hub-id:split")
    eval_data: str | None = knob(None, "held-out pairs, likewise")
    eval_split: float = knob(0.02, "share of pairs to hold out if there is no --eval-data")
    out: str = knob("out", "folder for the aligned model and the figures")
    alpha: float = knob(0.25, "shape of the reward; 0 is SimPO")
    beta: float = knob(2.5, "scale of the reward")
    gamma: float = knob(0.1, "target margin: the margin itself, not SimPO's gamma/beta")
    learning_rate: float = knob(7e-7, "the highest, after warm-up; a cosine takes it to zero")
    batch_size: int = knob(128, "pairs an optimizer step")
    epochs: int = knob(1, "passes over the pairs")
    max_steps: int | None = knob(None, "end after so many optimizer steps")
    warmup_ratio: float = knob(0.1, "share of steps in which the learning rate rises")
    weight_decay: float = knob(0.0, "of matrices")
    max_grad_norm: float = knob(1.0, "clip gradients to this norm")
    max_length: int = knob(2048, "tokens of a prompt and a response; the response loses its end")
    max_prompt_length: int | None = knob(None, "tokens left of a prompt if a pair is too long (max-length - 248)")
    micro_tokens: int | None = knob(None, "padded tokens a micro-batch (16384 on cuda, 1024 on cpu)")
    gradient_checkpointing: bool | None = knob(None, "recompute layers in the backward pass: true, false (cuda: true)")
    plain_rows: bool = knob(False, "run prompts twice and use the model's own logits, as other trainers do")
    device: str | None = knob(None, "cuda or cpu (cuda where there is one)")
    dtype: str = knob("auto", "compute in bfloat16 or float32 (auto: bfloat16 where the device has it)")
    master_device: str = knob("auto", "float32 masters and moments on cuda or cpu (auto: cuda where they fit)")
    compile: bool = knob(False, "compile the decoder layers: a minute once, then faster and smaller")
    plan: bool = knob(False, "say what the run takes, from config and data alone, and stop")
    eval_every: int | None = knob(None, "evaluate every so many steps too, not just first and last")
    save_every: int | None = knob(None, "write a checkpoint every so many steps (Ctrl-C and SIGTERM write one too)")
    keep: int = knob(2, "checkpoints to keep")
    resume: bool = knob(False, "go on from the newest whole checkpoint in --out")
    seed: int = knob(42, "of the order of the pairs and the held-out share")
    # fmt: on


def resolve(config: Config) -> Config:
    """Check the settings, and fill in those that depend on others or on the machine.

    Raises:
        UserError: one is out of range, or two contradict each other.
    """
    positive = "beta learning_rate batch_size epochs max_steps max_grad_norm max_length max_prompt_length"
    positive += " micro_tokens eval_every save_every keep"
    for name, value in asdict(config).items():
        flag = f"--{name.replace('_', '-')} {value}: must be"
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} a finite number")
        if name in positive.split() and value is not None and value <= 0:
            raise UserError(f"{flag} above 0")
        if name in ("gamma", "weight_decay", "seed", "eval_split", "warmup_ratio") and value < 0:
            raise UserError(f"{flag} 0 or more")
        if name in ("eval_split", "warmup_ratio") and value >= 1:
            raise UserError(f"{flag} below 1")
    if config.data is None:
        raise UserError("--data is needed: only presets bring their own")
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {device}: not on this machine; choose cpu, or cuda where torch sees a GPU")
    if config.master_device == "cpu" != device and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--master-device cpu: several GPUs have the masters sharded over them; leave it out")
    if config.dtype not in ("auto", "bfloat16", "float32"):
        raise UserError(f"--dtype {config.dtype}: choose auto, bfloat16 or float32")
    if config.master_device not in ("auto", "cpu", device):
        raise UserError(f"--master-device {config.master_device}: not on this machine; choose auto or cpu")
    if config.dtype == "bfloat16" and not has_bf16(device):
        print(f"note: this {device} only emulates bfloat16; --dtype float32 is exact and faster on it")
    prompt = config.max_prompt_length or config.max_length - min(248, config.max_length // 2)
    if prompt >= config.max_length:
        raise UserError(f"--max-prompt-length {prompt}: leaves nothing of --max-length {config.max_length}")
    cuda, recompute = device == "cuda", config.gradient_checkpointing
    return replace(
        config,
        device=device,
        dtype=("bfloat16" if has_bf16(device) else "float32") if config.dtype == "auto" else config.dtype,
        max_prompt_length=prompt,
        micro_tokens=config.micro_tokens or (16384 if cuda else 1024),
        gradient_checkpointing=cuda if recompute is None else recompute,
    )


def micro_batches(pairs, indices, micro_tokens, plain):
    """Split indices into lists of at most micro_tokens padded tokens: like lengths together, longest first."""
    batch = []
    for i in sorted(indices, key=lambda i: -pairs.size(i, plain)):
        if batch and (len(batch) + 1) * pairs.size(batch[0], plain) > micro_tokens:
            yield batch
            batch = []
        batch.append(i)
    yield batch


METRICS = ["loss", *(f"rewards/{key}" for key in ("chosen", "rejected", "margins", "accuracies"))]
METRICS += ["logps/chosen", "logps/rejected"]


def process():
    """(rank, number) of the processes that torchrun started; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def run_pairs(policy, pairs, indices, loss_fn, micro_tokens, plain, train=False):
    """Mean metrics over pairs, of all processes; to train, add the gradients of their mean loss to the model's.

    A micro-batch contributes its sum over the number of all pairs, so that no split changes anything: neither
    into micro-batches nor over processes.

    Raises:
        FloatingPointError: losses are not finite; it names the pairs.
    """
    (rank, size), device = process(), policy.model.device
    batches = list(micro_batches(pairs, indices, micro_tokens, plain))
    while len(batches) % size and len(batches) < len(indices):  # FSDP hangs where ranks run unequally many
        micro_tokens *= 0.9
        batches = list(micro_batches(pairs, indices, micro_tokens, plain))
    real, position = len(batches), {i: n for n, i in enumerate(indices)}
    batches += [batches[-1]] * (-real % size)  # and these count nothing
    figures = torch.zeros(len(METRICS), len(indices), dtype=torch.float64, device=device)
    for number in range(rank, len(batches), size):
        batch = batches[number]
        with torch.set_grad_enabled(train):
            chosen, rejected = policy(make_rows([pairs[i] for i in batch], plain, device))
            losses, chosen_rewards, rejected_rewards = loss_fn(chosen, rejected, pairs, batch)
        if train:  # FSDP takes the mean over ranks, hence times their number
            (losses.sum() * ((number < real) * size / len(indices))).backward()
        margins = chosen_rewards - rejected_rewards
        columns = (losses, chosen_rewards, rejected_rewards, margins, margins > 0, chosen, rejected)
        if number < real:
            columns = torch.stack([column.detach().double() for column in columns])
            figures[:, [position[i] for i in batch]] = columns
    if size > 1:
        dist.all_reduce(figures)
    figures = figures.cpu()  # the one time that the device is waited for
    bad = [pairs.places[i] for i, finite in zip(indices, figures[0].isfinite()) if not finite]
    if bad:
        raise FloatingPointError(f"the loss is not finite at {', '.join(bad[:10])}")
    return dict(zip(METRICS, figures.mean(1).tolist()))


def learning_rate_at(step, steps, config):
    """Linear warm-up, then a cosine that reaches zero one step after the last: no step has a rate of zero."""
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    return config.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def pair_flops(model, pairs) -> np.ndarray:
    """Floating-point operations to train on each pair, (pairs,): what is needed, not what a layout repeats.

    Six for each weight and token, the projection counting for response tokens only, and twelve for each layer,
    attention channel and (query, key) that attends. Recomputation is not counted. Source: PaLM, appendix B.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    body = model.num_parameters() - head.numel() * (1 if tied else 2)
    heads = config.num_attention_heads
    channels = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    prompt, chosen, rejected = np.diff(pairs.bounds).T.astype(float)
    said = chosen + rejected
    attended = (prompt**2 + chosen**2 + rejected**2) / 2 + prompt * said
    attention = 12 * config.num_hidden_layers * channels * attended
    return 6 * (body * (prompt + said) + head.numel() * said) + attention


# operations a second in bfloat16, without sparsity: data sheets
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def peak_flops(device, dtype) -> tuple[float, str]:
    """Floating-point operations a second that the device can do, and where the figure is from."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    for key, peak in PEAKS.items():
        if key in name and dtype == "bfloat16":
            return peak, f"{key} data sheet"
    size, best = (8192 if device == "cuda" else 1024), math.inf
    a = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, "plain matrix product measured here"


GIB = 2**30


def memory_needed(config, model, longest, plain) -> tuple[dict, dict]:
    """GiB by kind that a run takes at its peak on its device, and on the host beside a GPU.

    Activations are estimates: the values that a Llama layer keeps for its backward pass.
    """
    text, count = model.config.get_text_config(), model.num_parameters()
    item, tokens = (2 if config.dtype == "bfloat16" else 4), max(config.micro_tokens, longest)
    tokens = min(tokens, config.batch_size * longest)
    width, layers = text.hidden_size, text.num_hidden_layers
    hidden = getattr(text, "intermediate_size", None) or 4 * width
    layer = tokens * item * (16 * width + 4 * hidden)
    activations = tokens * item * width * layers + layer if config.gradient_checkpointing else layer * layers
    logits = 3 * 4 * min(tokens * text.vocab_size, math.inf if plain else ProjectedLogps.chunk)
    device = dict(weights=item * count, gradients=4 * count, activations=activations)
    device |= dict(masks=3 * tokens * longest * item, logits=logits + 12 * text.vocab_size * width)
    host = dict(python=GIB / 2)
    state = 8 * count + (4 * count if item == 2 or config.master_device != config.device else 0)
    (host if config.master_device == "cpu" else device)["masters and moments"] = state
    if config.master_device == "cpu" and config.device == "cuda":
        host["gradients in passing"] = 3 * 4 * MasterAdamW.part
    if config.device == "cpu":
        device, host = device | host, {}
    size = process()[1]
    for kind in ("weights", "gradients", "masters and moments"):
        if kind in device:  # FSDP's shards are float32; a layer at a time is whole
            device[kind] = (4 * count if kind == "weights" and size > 1 else device[kind]) / size
    return tuple({kind: bytes / GIB for kind, bytes in part.items()} for part in (device, host))


def memory_there(device):
    """GiB that are free on a device: of the host's memory, what a container may have."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / GIB
    limit, total = Path("/sys/fs/cgroup/memory.max"), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    written = limit.read_text().strip() if limit.exists() else ""
    return min(total, int(written) if written.isdigit() else total) / GIB


def make_plan(config, data) -> tuple[Config, dict]:
    """What a run takes, from the model's config and the data alone; a master_device of "auto" is decided.

    Raises:
        UserError: it cannot fit; the line says what would.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(config.model))
    pairs, train_on = data.pairs, data.train_on
    longest = max(pairs.size(i, config.plain_rows) // (2 if config.plain_rows else 1) for i in train_on)
    there = {device: memory_there(device) for device in {config.device, "cpu"}}

    def fits(config):
        device, host = memory_needed(config, model, longest, config.plain_rows)
        return sum(device.values()) <= there[config.device] and sum(host.values()) <= there["cpu"]

    if config.master_device == "auto":
        config = replace(config, master_device=config.device)
        if not fits(config):
            config = replace(config, master_device="cpu")
    device, host = memory_needed(config, model, longest, config.plain_rows)
    steps = math.ceil(len(train_on) / config.batch_size) * config.epochs
    steps = min(config.max_steps or steps, steps)
    share = min(1.0, steps * config.batch_size / (len(train_on) * config.epochs)) * config.epochs
    peak, source = peak_flops(config.device, config.dtype)
    peak *= process()[1]
    flops = pair_flops(model, pairs)[train_on].sum() * share
    plan = dict(parameters=model.num_parameters(), steps=steps)
    plan |= dict(tokens=int(np.diff(pairs.bounds)[train_on].sum() * share), device_gib=device, host_gib=host)
    plan |= dict(hours=flops / (0.4 * peak) / 3600, peak_flops=peak, peak_source=source)
    if not fits(config):
        ways = {
            "--master-device cpu": dict(master_device="cpu"),
            "--gradient-checkpointing true": dict(gradient_checkpointing=True),
            f"--micro-tokens {longest}": dict(micro_tokens=longest),
        }
        remedy, changed = [], config
        for flag, change in ways.items():
            if replace(changed, **change) != changed and not fits(changed):
                remedy, changed = [*remedy, flag], replace(changed, **change)
        remedy = " ".join(remedy) if fits(changed) else "more memory, more GPUs or a smaller model"
        needs = f"{sum(device.values()):.1f} GiB on {config.device}, of {there[config.device]:.1f}"
        if host:
            needs += f", and {sum(host.values()):.1f} GiB on the host, of {there['cpu']:.1f}"
        raise UserError(f"--model {config.model}: does not fit: it takes {needs}; what would: {remedy}")
    return config, plan


def plan_text(config, plan):
    lines = [f"{plan['parameters'] / 1e6:.1f} M parameters in {config.dtype} on {config.device}, "]
    lines[0] += f"{plan['tokens']} tokens in {plan['steps']} steps, about {plan['hours'] * 60:.1f} minutes "
    lines[0] += f"at 40 % of {plan['peak_flops'] / 1e12:.3g} TFLOP/s ({plan['peak_source']})"
    for place, sizes in ((config.device, plan["device_gib"]), ("host", plan["host_gib"])):
        if sizes:
            parts = ", ".join(f"{kind} {size:.2f}" for kind, size in sizes.items() if size >= 0.005)
            lines.append(f"memory on {place}: about {sum(sizes.values()):.1f} GiB ({parts})")
    return "\n".join(lines)


@dataclass
class Data:
    """The pairs of a run: to train on, and held out."""

    tokenizer: object
    pairs: Pairs
    eval_pairs: Pairs
    train_on: np.ndarray  # (pairs to train on,): indices into pairs
    eval_on: np.ndarray  # (held-out pairs,): indices into eval_pairs
    notes: list[str]  # what was dropped or truncated


def load_data(config) -> Data:
    """Read the pairs of a run, all of them, before any weight is loaded: a bad row shows at once."""
    tokenizer = from_hub(AutoTokenizer.from_pretrained, config.model)
    limits = config.max_length, config.max_prompt_length
    pairs = eval_pairs = load_pairs(config.data, tokenizer, *limits)
    held_out = 0 if config.eval_data else math.ceil(config.eval_split * len(pairs))
    eval_on, train_on = np.split(np.random.default_rng(config.seed).permutation(len(pairs)), [held_out])
    if config.eval_data:
        eval_pairs = load_pairs(config.eval_data, tokenizer, *limits)
        eval_on = np.arange(len(eval_pairs))
    if not len(train_on):
        raise UserError(f"{config.data}: one pair, and --eval-split holds it out: pass --eval-split 0")
    notes = [f"{count} {what}" for what, count in (pairs.notes + eval_pairs.notes).items()]
    print(f"{len(train_on)} pairs to train on, {len(eval_on)} held out", *notes, sep=", ")
    print("the first pair as the model sees it:")
    for part, ids in zip(("prompt", "chosen", "rejected"), pairs[0]):
        text = repr(tokenizer.decode(ids))
        print(f"  {part:9}{text if len(text) < 400 else f'{text[:195]} ... {text[-195:]}'}")
    return Data(tokenizer, pairs, eval_pairs, train_on, eval_on, notes)


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path):
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def all_agree(flag):
    """Whether the flag is true on every process."""
    if process()[1] == 1:
        return flag
    flags = torch.tensor(int(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flags, dist.ReduceOp.MIN)
    return bool(flags)


def claim(out, fresh, on_exit):
    """Make the output folder, or take it over to resume, and lock it until on_exit, an ExitStack, ends.

    Raises:
        UserError: it cannot be written, or another run is at work in it.
    """
    if process()[0]:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out, os.O_RDONLY)
        on_exit.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"--out {out}: another run is writing there; choose another folder") from error
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose another folder") from error
    if fresh and any(out.iterdir()):
        raise UserError(f"--out {out}: another run has written there meanwhile; choose another folder")
    for leftover in out.glob(".partial-*"):
        shutil.rmtree(leftover)


def save_checkpoint(out, state, optimizer, keep):
    """Write checkpoint-STEP: into a folder of another name, flushed to the disk, then renamed into place.

    It holds masters and moments as safetensors, a part at a time and one set a rank, and the rest as JSON.
    """
    rank, name = process()[0], f"checkpoint-{state['step']:06}"
    folder, digests = out / f".partial-{name}", {}

    def written(name):
        flush(folder / name)
        digests[name] = digest(folder / name)

    try:
        folder.mkdir(exist_ok=True)
        if rank == 0:
            (folder / "state.json").write_text(json.dumps(state))
            written("state.json")
        for number, part in enumerate(optimizer.parts):
            values = optimizer.state(part) | {"random": torch.get_rng_state()}
            save_file(values, folder / f"rank{rank}-{number:04}.safetensors")
            written(f"rank{rank}-{number:04}.safetensors")
        (folder / f"rank{rank}.json").write_text(json.dumps(digests))
        written(f"rank{rank}.json")
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if all_agree(True) and rank == 0:  # when the last rank has written its part
        flush(folder)
        shutil.rmtree(out / name, ignore_errors=True)  # a damaged one
        folder.rename(out / name)
        flush(out)
        for old in sorted(out.glob("checkpoint-*"))[:-keep]:
            shutil.rmtree(old)
    all_agree(True)


def newest_checkpoint(out):
    """The newest checkpoint that is whole on every process, as (folder, state), or (None, None) if there is none.

    Raises:
        UserError: it is of another number of processes, or there are some and all are damaged.
    """
    (rank, size), folders = process(), sorted(out.glob("checkpoint-*"), reverse=True)
    for folder in folders:
        try:
            state = json.loads((folder / "state.json").read_text())
            if state["processes"] != size:
                raise UserError(f"{folder}: of {state['processes']} processes, not {size}: resume with those")
            digests = json.loads((folder / f"rank{rank}.json").read_text())
            intact = all(digest(folder / name) == value for name, value in digests.items())
        except (OSError, ValueError, KeyError, TypeError):
            intact = False
        if all_agree(intact):
            return folder, state
        print(f"note: {folder} is damaged; going back to the one before")
    if folders:
        raise UserError(f"--resume: no checkpoint in {out} is whole; choose another --out to start again")
    return None, None


class Stopped(Exception):
    """SIGINT or SIGTERM: the step was finished and saved."""

    def __init__(self, number, step):
        again = shlex.join([*sys.argv, *["--resume"] * ("--resume" not in sys.argv)])
        super().__init__(f"stopped after step {step}, which is saved; go on with: python {again}")
        self.status = 128 + number


# what a resumed run cannot change without being another run
FIXED = "model data eval_data eval_split seed batch_size epochs max_steps max_length max_prompt_length dtype plain_rows"


def take_over(config, out, on_exit):
    """Whether the output folder holds a run to resume, and its newest checkpoint: (there, folder, state).

    Raises:
        UserError: it holds something else, or a run that is finished, at work, damaged or of other settings.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; choose another")
    there, folder, state = out.exists() and any(out.iterdir()), None, None
    if there and not config.resume:
        raise UserError(f"--out {out}: is not empty; choose another, or --resume the run in it")
    if (out / "summary.json").exists():
        raise UserError(f"--out {out}: the run in it is finished; choose another")
    if there and not (out / "metrics.jsonl").exists():
        raise UserError(f"--out {out}: holds no run of this script to resume; choose another")
    if there:
        claim(out, False, on_exit)
        folder, state = newest_checkpoint(out)
    for name, value in (state or {}).get("config", {}).items():
        if name in FIXED.split() and value != getattr(config, name):
            flag = f"--{name.replace('_', '-')} {getattr(config, name)}"
            raise UserError(f"{flag}: the run to resume has {value}")
    return there, folder, state


def train(config: Config, loss_fn=None) -> dict:
    """Align a model, write it and its figures to config.out, and return the summary.

    Args:
        config: the settings.
        loss_fn: another loss than alphapo_loss with the alpha, beta and gamma of config: (chosen_logps,
            rejected_logps, pairs, batch) -> (losses, chosen_rewards, rejected_rewards), one each a pair, where
            batch holds their indices in pairs, for losses that need more than the log-probabilities.

    Raises:
        UserError: settings, data or model are not usable; nothing was written.
        FloatingPointError: a loss or gradient is not finite; the state before that step was saved.
        Stopped: SIGINT or SIGTERM came; the state was saved.
    """
    config, out = resolve(config), Path(config.out)
    knobs = config.alpha, config.beta, config.gamma
    loss_fn = loss_fn or (
        lambda chosen_logps, rejected_logps, *_: alphapo_loss(chosen_logps, rejected_logps, *knobs)
    )
    with contextlib.ExitStack() as on_exit:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
            if config.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if config.device == "cuda" else "gloo")
        rank, size = process()
        there, folder, state = take_over(config, out, on_exit)

        data = load_data(config)
        pairs, eval_pairs, train_on, eval_on = data.pairs, data.eval_pairs, data.train_on, data.eval_on
        data_sha256 = hashlib.sha256(pairs.tokens.tobytes() + pairs.bounds.tobytes()).hexdigest()
        if state and state["data_sha256"] != data_sha256:
            raise UserError(f"--data {config.data}: not the pairs that the run to resume began with")
        config, plan = make_plan(config, data)
        print(plan_text(config, plan))

        torch.manual_seed(config.seed)
        model = load_model(config.model, config.device, config.gradient_checkpointing)
        if max(pairs.tokens.max(), eval_pairs.tokens.max()) >= model.get_input_embeddings().num_embeddings:
            raise UserError(f"--model {config.model}: the tokenizer has more tokens than the embedding rows")
        plain, longest = config.plain_rows, max(train_on, key=lambda i: pairs.size(i, False))
        if not plain and (reason := why_plain(model, pairs[longest])):
            plain = True
            print(f"note: falling back to plain rows, for with shared ones {reason}: slower, and right")
        pair_cost, dtype, policy = pair_flops(model, pairs), getattr(torch, config.dtype), Policy(model)
        for layer in decoder_layers(model) if config.compile else ():
            layer.compile(dynamic=True)
        if size > 1:
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            for module in [*decoder_layers(model), policy]:
                fully_shard(module, mp_policy=precision)
            dtype = torch.float32  # of the shards, which are the masters
        optimizer = MasterAdamW(model, dtype, config.weight_decay, config.master_device)
        run = partial(run_pairs, policy, loss_fn=loss_fn, micro_tokens=config.micro_tokens, plain=plain)
        epoch_steps, steps = math.ceil(len(train_on) / config.batch_size), plan["steps"]
        print("alpha {:g}, beta {:g}, gamma {:g}".format(*knobs), end="")
        print(f" (gamma/beta {config.gamma / config.beta:g}), {steps} steps of {config.batch_size} pairs")

        all_agree(True)  # no process looks at the folder any more before another makes it
        if not there:
            claim(out, True, on_exit)
        stop = []

        def on_signal(number, frame):
            if stop and time.monotonic() - stop[1] > 1:  # not the same Ctrl-C again, passed on by torchrun
                os._exit(128 + number)
            stop[:] = stop or [number, time.monotonic()]

        for number in (signal.SIGINT, signal.SIGTERM):
            on_exit.callback(signal.signal, number, signal.signal(number, on_signal))
        log = open(out / "metrics.jsonl" if rank == 0 else os.devnull, "a", buffering=1)
        if folder:
            for path in sorted(folder.glob(f"rank{rank}-*.safetensors")):
                values = load_file(path)
                torch.set_rng_state(values.pop("random"))
                optimizer.load(values)
            print(f"resumed after step {state['step']}")
        if rank == 0:
            log.truncate(state["log_bytes"] if state else 0)

        def evaluate(step):
            metrics = run(eval_pairs, eval_on) if len(eval_on) else {}
            metrics = {f"eval_{key}": value for key, value in metrics.items()}
            log.write(json.dumps({"step": step} | metrics) + "\n")
            return metrics

        if not state:
            totals = dict.fromkeys(("pairs", "tokens", "seconds", "updating", "flops"), 0.0)
            state = dict(step=0, processes=size, config=asdict(config), data_sha256=data_sha256)
            state |= dict(totals=totals, before=evaluate(0))
        totals = state["totals"]

        def checkpoint():
            save_checkpoint(out, state | dict(log_bytes=log.tell()), optimizer, config.keep)

        progress = tqdm(total=steps, initial=state["step"], unit="step", disable=rank > 0)
        on_exit.callback(progress.close)
        progress.mininterval = 0.1 if sys.stderr.isatty() else 10
        for step in range(state["step"], steps):
            epoch, batch = divmod(step, epoch_steps)
            order = np.random.default_rng([config.seed, epoch]).permutation(train_on)
            indices = order[batch * config.batch_size : (batch + 1) * config.batch_size]
            start, learning_rate = time.perf_counter(), learning_rate_at(step, steps, config)
            try:
                metrics = run(pairs, indices, train=True)
                middle = time.perf_counter()
                norm = optimizer.step(learning_rate, config.max_grad_norm)
            except FloatingPointError as error:
                checkpoint()
                places = ", ".join(pairs.places[i] for i in indices[:10])
                remedy = "--resume with a lower --learning-rate, or start again with a lower --alpha"
                message = f"step {step + 1}, pairs {places} ...: {error}; the {step} steps before are saved: {remedy}"
                raise FloatingPointError(message) from error
            end, tokens = time.perf_counter(), sum(pairs.size(i, plain) for i in indices)
            counts = len(indices), tokens, end - start, end - middle, pair_cost[indices].sum()
            for key, count in zip(totals, counts):
                totals[key] += float(count)
            metrics |= dict(grad_norm=norm, learning_rate=learning_rate, epoch=(step + 1) / epoch_steps)
            metrics |= dict(tokens_per_second=tokens / (end - start))
            log.write(json.dumps({"step": step + 1} | metrics) + "\n")
            shown = dict(loss="loss", accuracy="rewards/accuracies", margin="rewards/margins")
            line = ", ".join(f"{name} {metrics[key]:.3f}" for name, key in shown.items())
            progress.set_postfix_str(f"{line}, {tokens / (end - start):.0f} tokens/s", refresh=False)
            progress.update()
            state["step"] = step + 1
            if step + 1 < steps and config.eval_every and (step + 1) % config.eval_every == 0:
                evaluate(step + 1)
            stopped = not all_agree(not stop)
            if stopped or config.save_every and (step + 1) % config.save_every == 0:
                checkpoint()
            if stopped:
                raise Stopped(stop[0] if stop else signal.SIGTERM, step + 1)

        with torch.no_grad():
            for param in optimizer.params:  # to what is written: the last figures are those of the files
                param.copy_(param.bfloat16())
        after = evaluate(steps)
        log.close()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if config.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
        seconds, versions = totals["seconds"], dict(python=platform.python_version())
        versions |= dict(torch=torch.__version__, transformers=transformers.__version__)
        summary = dict(config=asdict(config), versions=versions, data_sha256=data_sha256, notes=data.notes)
        summary |= dict(plan=plan, processes=size, plain_rows=plain, steps=steps, seconds=seconds)
        summary |= dict(pairs=len(train_on), eval_pairs=len(eval_on), peak_memory_gib=peak / GIB)
        summary |= {f"{key}_per_second": totals[key] / seconds for key in ("pairs", "tokens", "flops")}
        summary |= dict(share_of_peak=totals["flops"] / seconds / plan["peak_flops"])
        summary |= dict(optimizer_share=totals["updating"] / seconds, before=state["before"], after=after)
        save(model, data.tokenizer, summary, out)
        return summary


def table(summary):
    """What the run did to the held-out pairs, where there are any, and how fast it was."""
    rows = {
        "loss": "loss",
        "accuracy of the rewards": "rewards/accuracies",
        "margin of the rewards": "rewards/margins",
    }
    rows |= {f"{side} log-probability a token": f"logps/{side}" for side in ("chosen", "rejected")}
    lines = [f"{summary['eval_pairs']:5} held-out pairs                   before     after    change"]
    for title, key in rows.items() if summary["eval_pairs"] else ():
        a, b = (summary[when][f"eval_{key}"] for when in ("before", "after"))
        lines.append(f"{title:36}{a:10.4f}{b:10.4f}{b - a:+10.4f}")
    speed = f"{summary['pairs_per_second']:.2f} pairs/s, {summary['tokens_per_second']:.0f} tokens/s, "
    speed += f"{summary['flops_per_second'] / 1e12:.3g} TFLOP/s, {summary['share_of_peak']:.0%} of the peak "
    speed += f"({summary['plan']['peak_source']}), optimizer {summary['optimizer_share']:.0%} of the time, "
    return "\n".join([*lines, speed + f"peak memory {summary['peak_memory_gib']:.2f} GiB"])


def plot_curves(runs, path):
    """Draw the curves of runs, folders with a metrics.jsonl: first the chosen log-probability against the margin.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("curves need: pip install matplotlib") from error
    figure = Figure(figsize=(20, 4), layout="constrained")
    axes = figure.subplots(1, 5)
    for color, run in enumerate(runs):
        log = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        curve = {key: np.array([m[key] for m in log if "loss" in m]) for key in ["step", *METRICS]}
        chosen, rejected, style = curve["logps/chosen"], curve["logps/rejected"], dict(color=f"C{color}")
        axes[0].plot(chosen - rejected, chosen, ".", alpha=0.6, label=Path(run).name, **style)
        axes[1].plot(curve["step"], chosen, **style)
        axes[1].plot(curve["step"], rejected, "--", **style)
        for axis, key in zip(axes[2:], ("rewards/margins", "rewards/accuracies", "loss")):
            axis.plot(curve["step"], curve[key], **style)
            axis.set(xlabel="step", ylabel=key)
    axes[0].set(xlabel="margin of log-probabilities (nats a token)", ylabel="chosen (nats a token)")
    axes[1].set(xlabel="step", ylabel="chosen, and dashed rejected (nats a token)")
    axes[0].legend()
    figure.savefig(path)


def save(model, tokenizer, summary, out):
    """Write the model in bfloat16 and the tokenizer, for from_pretrained, curves, a model card and the summary.

    All into a folder of another name first, and the summary is the last to be moved: it says that all is there.
    """
    written, state = {}, model.state_dict(keep_vars=True)
    for param in state.values():  # tied weights are one parameter under two names
        if id(param) not in written:
            full = whole(param.detach())
            written[id(param)] = full.to("cpu", torch.bfloat16 if full.is_floating_point() else full.dtype)
    if process()[0]:
        return
    state = {name: written[id(param)] for name, param in state.items()}
    with torch.device("meta"):  # the architecture alone, for the config to say bfloat16
        shell = type(model)(model.config).to(torch.bfloat16)
    shell.generation_config = model.generation_config
    partial_folder, config = out / ".partial-model", summary["config"]
    shell.save_pretrained(partial_folder, state_dict=state)
    tokenizer.save_pretrained(partial_folder)
    try:
        plot_curves([out], partial_folder / "curves.png")
    except UserError as error:
        print(f"note: no curves.png: {error}")
    (partial_folder / "README.md").write_text(
        f"---\nlibrary_name: transformers\ntags: [alphapo]\n---\n# {Path(config['model']).name}, AlphaPO\n\n"
        f"{config['model']}, aligned with AlphaPO (arXiv 2501.03884) on {summary['pairs']} preference pairs "
        f"of {config['data']}.\n\n```\n{table(summary)}\n```\n\n| setting | value |\n| --- | --- |\n"
        + "".join(f"| {key} | {value} |\n" for key, value in config.items())
    )
    (partial_folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for path in sorted(partial_folder.iterdir(), key=lambda path: path.name == "summary.json"):
        flush(path)
        path.replace(out / path.name)
    partial_folder.rmdir()
    flush(out)


# -------------------------------------------------------------------------------- command line


def fail(message, status=2):
    rank = f" (rank {os.environ['RANK']})" if int(os.environ.get("RANK", 0)) else ""
    print(f"alphapo{rank}: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def main(argv=None):
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0])
    parser.error = fail  # in place of three screens of usage
    preset = PRESETS.get(parser.parse_known_args(argv)[0].model, {})
    parser.set_defaults(**preset)
    config = Config(**vars(parser.parse_args(argv)))
    if preset:
        config.model = preset["model"]
        if config.data != preset["data"] and config.eval_data == preset.get("eval_data"):
            config.eval_data = None  # a preset's held-out pairs belong to its own data
    try:
        if config.plan:
            config = resolve(config)
            print(plan_text(*make_plan(config, load_data(config))))
        else:
            print(table(train(config)))
    except UserError as error:
        fail(error)
    except Stopped as error:
        fail(error, error.status)
    except FloatingPointError as error:
        fail(error, status=1)
    except torch.OutOfMemoryError as error:
        fail(f"out of memory: {first_line(error)}; lower --micro-tokens, or --master-device cpu", status=1)
    except (OSError, SafetensorError) as error:  # a full disk, say
        fail(
            f"{first_line(error)}; what was saved before is whole: mend that, and go on with --resume",
            status=1,
        )
    except KeyboardInterrupt:
        fail("interrupted before the first step", status=130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
