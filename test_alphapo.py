# SPDX-License-Identifier: MIT
"""The tests of alphapo.py: pytest test_alphapo.py (offline, on a CPU; some need a GPU).

The mathematics is checked against closed forms in 400 digits, finite differences and the
models' own forward pass; the behaviour by running the script. CI=1 adds the slow cases.
"""

import copy
import csv
import fcntl
import functools
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from decimal import Decimal, localcontext
from pathlib import Path
from unittest import mock

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from tokenizers import Tokenizer, models, processors
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers import AutoModelForCausalLM as AutoModel

import alphapo
from alphapo import UserError

ROOT = Path(__file__).resolve().parent
TINY, EVAL = ROOT / "data" / "tiny", str(ROOT / "data" / "tiny" / "eval.jsonl")
SLOW = bool(os.environ.get("CI") or os.environ.get("ALPHAPO_SLOW"))
DTYPES = [torch.float32, torch.bfloat16]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
cases, raises, assert_close = pytest.mark.parametrize, pytest.raises, torch.testing.assert_close


@pytest.fixture(autouse=True)
def cpu_without_a_network(request, monkeypatch, tmp_path):
    """Also on a machine that has a GPU, unless the test is marked as one for a GPU."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # not on import, because forks would inherit a dead pool
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if not request.node.get_closest_marker("skipif"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# ------------------------------------------------------------------------------------ the loss
ALPHAS = [-50.0, -4.0, -1.0, -0.25, -1e-4, -1e-8, -1e-12, -1e-300, 0.0]
ALPHAS += [1e-300, 1e-12, 1e-8, 1e-6, 1e-4, 1e-2, 0.25, 1.0, 4.0, 50.0]
LOGPS = [-1e-6, -0.01, -0.9, -1.1, -1.30, -1.31, -5.0, -30.0, -75.0, -110.0, -200.0]


def exact(chosen, rejected, alpha, beta, gamma):
    """Loss, rewards and the loss's gradients from the closed form, in 400 digits."""
    with localcontext(prec=400):
        c, r, a, b, g = map(Decimal, (chosen, rejected, alpha, beta, gamma))
        rewards = [b * ((1 - (-a * x).exp()) / a if a else x) for x in (c, r)]
        margin = rewards[0] - rewards[1] - g
        capped = min(max(margin, Decimal(-2000)), Decimal(2000))  # exp(-2000) is 0 in any float
        loss, push = max(-margin, 0) + (1 + (-abs(capped)).exp()).ln(), 1 / (1 + capped.exp())
        return [loss, *rewards, -push * b * (-a * c).exp(), push * b * (-a * r).exp()]


@cases("dtype", [torch.float32, torch.float64])
@cases("alpha", ALPHAS)
def test_loss_rewards_and_gradients_equal_the_closed_form(alpha, dtype):
    """Gradients have the absolute precision of 1: the derivative of expm1 is expm1 + 1."""
    logps = [pair for pair in itertools.product(LOGPS, LOGPS) if abs(alpha * min(pair)) < 700]
    logps = torch.tensor(logps, dtype=dtype).T.clone().requires_grad_()
    losses, *rewards = alphapo.alphapo_loss(*logps, alpha, 2.5, 0.1)
    assert losses.dtype == dtype and not any(x.requires_grad for x in rewards)
    (grads,) = torch.autograd.grad(losses.sum(), logps)
    true = [[float(x) for x in exact(*pair, alpha, 2.5, 0.1)] for pair in logps.T.tolist()]
    true = torch.tensor(true, dtype=torch.float64).T.to(dtype)
    single, tiny = torch.finfo(dtype).eps * (dtype == torch.float32), torch.finfo(dtype).tiny
    assert_close(torch.stack(rewards), true[1:3], rtol=1e-12 + single, atol=tiny)
    assert_close(losses, true[0], rtol=1e-11 + single, atol=tiny)
    assert_close(grads, true[3:], rtol=1e-11 + single, atol=1e-14)


@cases("alpha", [-1.0, 0.0, 1e-6, 0.25, 2.0])
def test_gradcheck_alpha_0_is_simpo_and_shapes_that_would_broadcast(alpha):
    logps = (-3 * torch.rand(2, 6, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: alphapo.alphapo_loss(*x, alpha, 2.5, 0.1)[0], logps)
    simpo = -torch.nn.functional.logsigmoid(2.5 * (logps[0] - logps[1]) - 0.1)
    assert_close(alphapo.alphapo_loss(*logps, 0.0, 2.5, 0.1)[0], simpo)
    with raises(ValueError, match="differ"):
        alphapo.alphapo_loss(torch.zeros(3), torch.zeros(3, 1), alpha, 2.5, 0.1)


def test_the_loss_runs_when_cut_out_of_the_file():
    sections = (ROOT / "alphapo.py").read_text().split("# ----")
    (block,) = (part for part in sections if part.partition("\n")[0].endswith("- the loss"))
    exec("import torch\n" + block.partition("\n")[2], alone := {})
    logps = torch.tensor([-0.9, -1.2]), torch.tensor([-1.1, -1.0])
    cut, whole = (x["alphapo_loss"](*logps, 0.25, 2.5, 0.1) for x in (alone, vars(alphapo)))
    assert_close(cut, whole, rtol=0, atol=0)


# ------------------------------------------------------------------------------------ settings
PAPER = {"mistral-7b-instruct": (0.25, 2.5, 0.1, 7e-7), "gemma-2-9b-it": (0.1, 10.0, 0.5, 8e-7)}
PAPER["llama-3-8b-instruct"] = (0.25, 10.0, 0.3, 1.1e-6)


def test_presets_are_those_of_the_paper_and_a_presets_held_out_pairs_belong_to_its_data():
    assert set(alphapo.PRESETS) == {"tiny", *PAPER}
    for name, (alpha, beta, ratio, learning_rate) in PAPER.items():
        want = dict(alpha=alpha, beta=beta, gamma=beta * ratio, learning_rate=learning_rate)
        found = vars(alphapo.parse_arguments(["--model", name]))
        assert {key: found[key] for key in want} == pytest.approx(want, rel=1e-12)
    config = alphapo.parse_arguments("--alpha 0.5 --max_steps 3".split())
    assert (config.model, config.alpha, config.max_steps) == (str(TINY), 0.5, 3)
    assert config.eval_data == EVAL
    assert alphapo.parse_arguments(["--data", "mine.jsonl"]).eval_data is None


# -------------------------------------------------------------------- rows and log-probabilities
# fmt: off
SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
    eos_token_id=2)
DROPOUT = dict(attention_dropout=0.1, resid_pdrop=0.1, embd_pdrop=0.1)
SSM = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
MODELS = {
    "llama": {}, "tied llama": dict(tie_word_embeddings=True), "qwen2": {}, "phi3": DROPOUT,
    "mistral": dict(sliding_window=None), "window of 5, mistral": dict(sliding_window=5),
    "windows of 5, qwen2": dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "gemma2": dict(head_dim=8, sliding_window=5, final_logit_softcapping=2.0),
    "gemma3_text": dict(head_dim=8, sliding_window=5), "qwen3": dict(head_dim=8),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=256),
}
PLAIN_MODELS = {  # scales its logits, has a bias in its projection, carries a state (two of them)
    "granite": dict(logits_scaling=3.0), "phi": {}, "falcon_h1": SSM, "mamba": dict(state_size=4),
}
# fmt: on


def small_model(name, **settings):
    """A random model, its weights large enough that soft caps, windows and biases show."""
    torch.manual_seed(0)
    settings = SMALL | (MODELS | PLAIN_MODELS).get(name, {}) | settings
    config = AutoConfig.for_model(name.split()[-1], **settings)
    model = AutoModel.from_config(config, dtype=torch.float32).eval()
    for param in model.parameters():
        param.data += 0.1 * torch.randn_like(param)
    return model


def random_pairs(count=5):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 25, (count, 3))
    return [tuple(rng.integers(3, 97, n).astype(np.int32) for n in row) for row in sizes]


def own_logps(model, prompt, *responses):
    """Mean log-probabilities from the model's own forward pass, unpadded."""
    means = []
    for response in responses:
        ids = torch.tensor(np.append(prompt, response), dtype=torch.long)[None]
        logps = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(1)
        means.append(logps[:-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :].mean())
    return torch.stack(means)


@cases("name", [*MODELS, *PLAIN_MODELS])
@torch.no_grad()
def test_rows_give_the_models_own_logps_and_the_check_says_where_shared_ones_would_not(name):
    """Against float64. Shared rows run in float64 too, where only our logits are float32."""
    model, pairs = small_model(name), random_pairs()
    exact = copy.deepcopy(model).double()
    want = torch.stack([own_logps(exact, *pair) for pair in pairs])
    for plain in (True, False) if name in MODELS else (True,):
        rows = alphapo.make_rows(pairs, plain)
        assert rows.input_ids.shape[1] % 8 == 0 and (rows.segments == -1).any()
        logps = torch.stack(alphapo.pair_logps(model if plain else exact, rows), 1).double()
        assert_close(logps, want, rtol=2e-6, atol=2e-5 if plain else 2e-6)
    reason, found = alphapo.check_model(model, pairs[0])
    assert_close(found.double(), want[0], rtol=1e-5, atol=1e-5)
    assert (reason is None) == (name in MODELS)


def test_the_check_tells_a_leak_from_a_broken_model_and_from_an_error_of_ours(monkeypatch):
    model, pair, own_masks = small_model("llama"), random_pairs()[0], alphapo.attention_masks
    for name in ("bert", "roberta"):
        with raises(UserError, match="see later ones"):
            alphapo.check_model(small_model(name), pair)
    # without the mask's part below the diagonal, the rejected response sees the chosen one
    monkeypatch.setattr(alphapo, "attention_masks", lambda *args: own_masks(*args).triu(1))
    assert "off by" in alphapo.check_model(model, pair)[0]
    monkeypatch.setattr(alphapo, "attention_masks", lambda *args: torch.empty(2**60))
    with raises(RuntimeError):  # to be out of memory is no reason to fall back
        alphapo.check_model(model, pair)
    model.lm_head.weight.data[5] = math.nan
    with raises(UserError, match="--model.*not finite"):
        alphapo.check_model(model, pair)


@cases("softcap", [None, 1.5])
@cases("chunk", [1, 97 * 7, 2**24])
def test_projection_in_chunks_has_the_plain_values_and_gradients(monkeypatch, chunk, softcap):
    monkeypatch.setitem(alphapo.ProjectedLogps.chunk, "cpu", chunk)
    hidden, weight = (torch.randn(size, 16, requires_grad=True) for size in (40, 97))
    targets, push = torch.randint(97, (40,)), torch.randn(40)
    logits = (hidden @ weight.T).double()
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    plain = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    logps = alphapo.ProjectedLogps.apply(hidden, weight, targets, softcap)
    assert_close(logps.double(), plain, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad((x * push).sum(), (hidden, weight)) for x in (logps, plain)]
    assert_close(*grads, rtol=1e-5, atol=1e-5)


@cases("name", ["llama", "window of 5, mistral", "gemma2"])
def test_a_micro_batch_in_bf16_runs_on_the_meta_device(name):
    """A stand-in for a GPU: what mixes devices, or would wait for one, raises there. A sparse
    gradient does wait, once a micro-batch at the end of its backward pass."""
    small_model(name).save_pretrained("model")
    model = alphapo.load_model("model", checkpointing=True).to("meta", torch.bfloat16)
    model.get_input_embeddings().sparse = False
    rows = alphapo.make_rows(random_pairs())
    tensors = {key: x.to("meta") for key, x in vars(rows).items() if isinstance(x, torch.Tensor)}
    logps = alphapo.pair_logps(model, alphapo.replace(rows, **tensors))
    alphapo.alphapo_loss(*logps, 0.25, 2.5, 0.1)[0].sum().backward()
    assert all(param.grad.dtype == torch.bfloat16 for param in model.parameters())


# ------------------------------------------------------------------------------------ gradients
def as_pairs(triples):
    return [alphapo.Pair(*triple, f"pairs:{i + 1}") for i, triple in enumerate(triples)]


def LOSS(chosen_logps, rejected_logps, *_):
    return alphapo.alphapo_loss(chosen_logps, rejected_logps, 0.25, 2.5, 0.1)


def run_small(model, pairs, micro_tokens, plain=False, train=False, device="cpu"):
    config = alphapo.Config(device=device, micro_tokens=micro_tokens, plain_rows=plain)
    return alphapo.run_pairs(model, pairs, range(len(pairs)), LOSS, config, train)


def one_step(model, micro_tokens=90, plain=False):
    """Metrics and gradients of nine pairs."""
    model.zero_grad()
    metrics = run_small(model, as_pairs(random_pairs(9)), micro_tokens, plain, train=True)
    return metrics, [param.grad.clone() for param in model.parameters()]


def assert_same_step(ours, want, rtol=1e-3, atol=1e-5):
    assert ours[0] == pytest.approx(want[0], rel=1e-4, abs=1e-5)
    assert_close(ours[1], want[1], rtol=rtol, atol=atol)


@cases("name", ["llama", "tied llama", "gemma2"])
def test_neither_split_nor_rows_nor_how_gradients_are_made_changes_a_step(name):
    """Checkpointing; layers compiled (traced alone but in the slow run); a sparse embedding."""
    small_model(name, num_hidden_layers=2).save_pretrained("model")
    model = alphapo.load_model("model")
    embedding, whole = model.get_input_embeddings(), one_step(model, 10**6)
    for micro_tokens, plain in ((1, False), (90, False), (90, True)):
        assert_same_step(one_step(model, micro_tokens, plain), whole)
    if name != "llama":
        sparse, sparse_is_on, embedding.sparse = one_step(model), embedding.sparse, False
        assert sparse_is_on and embedding.weight.grad.layout == torch.strided
        assert_same_step(sparse, one_step(model), 1e-6, 1e-7)
    assert_same_step(one_step(alphapo.load_model("model", checkpointing=True)), whole)
    if name == "llama":
        for layer in alphapo.load_model("model").model.layers:
            layer.compile(dynamic=True, backend="inductor" if SLOW else "aot_eager")
        assert_same_step(one_step(model), whole)


def test_metrics_and_gradients_are_those_of_the_models_own_forward_pass():
    model, triples = small_model("llama"), random_pairs(6)
    metrics = run_small(model, as_pairs(triples), 60, train=True)
    grads = [param.grad.clone() for param in model.parameters()]
    model.zero_grad()
    chosen, rejected = torch.stack([own_logps(model, *triple) for triple in triples], 1)
    losses, chosen_rewards, rejected_rewards = LOSS(chosen, rejected)
    losses.mean().backward()
    assert_close(grads, [param.grad for param in model.parameters()], rtol=1e-3, atol=1e-5)
    margins = chosen_rewards - rejected_rewards
    values = losses, chosen_rewards, rejected_rewards, margins, margins > 0, chosen, rejected
    keys = "loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies "
    keys = (keys + "logps/chosen logps/rejected").split()
    want = {key: value.double().mean().item() for key, value in zip(keys, values)}
    assert metrics == pytest.approx(want, rel=1e-4)


@cases("plain", [False, True])
def test_micro_batches_hold_every_index_once_and_keep_to_the_budget(plain):
    pairs = as_pairs(random_pairs(40))
    sizes = alphapo.row_tokens(pairs, plain)
    for i in range(40):  # counted in rows of one pair: the tokens, and what pads plain rows
        rows = alphapo.make_rows([pairs[i]], plain)
        assert sizes[i] == int((rows.segments >= 0).sum(1).max()) * len(rows.input_ids)
    batches = alphapo.micro_batches(sizes, sorted(range(40), key=lambda i: -sizes[i]), 150)
    assert sorted(sum(batches, [])) == list(range(40)) and 3 < len(batches) < 40
    for batch in batches:
        rows = alphapo.make_rows([pairs[i] for i in batch], plain)
        rounding = 7 * len(rows.input_ids)  # widths go up to a multiple of 8
        assert rows.input_ids.numel() <= 150 + rounding or len(batch) == 1


def test_learning_rate_rises_and_falls_and_no_step_is_lost():
    config = alphapo.Config(learning_rate=1.0, warmup_ratio=0.1)
    rates = [alphapo.learning_rate_at(step, 100, config) for step in range(100)]
    assert rates.index(max(rates)) == 10 and max(rates) == 1.0 and 0 < rates[0] < 0.1
    assert rates[55] == pytest.approx(0.5) and 0 < rates[-1] < 1e-3
    assert alphapo.learning_rate_at(0, 1, config) > 0


# ------------------------------------------------------------------------------------ weights
def masters_of(model, dtype=torch.float32, master_device="cpu", sum_device="cpu"):
    return alphapo.MasterAdamW(model, "cpu", dtype, master_device, sum_device)


@cases("learning_rate", [1e-3, 7e-7])
@cases("dtype", DTYPES)
def test_masters_are_plain_adamw_to_the_bit_and_move_where_bf16_would_not(dtype, learning_rate):
    """Twenty steps of a constant gradient, in two micro-batches each, clipped."""
    torch.manual_seed(0)
    model, push = torch.nn.Linear(64, 64), torch.randn(64, 64).to(dtype)
    before, weight = model.weight.detach().clone(), copy.deepcopy(model.weight)
    optimizer = masters_of(model, dtype)
    settings = dict(lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    adamw = torch.optim.AdamW([weight], fused=True, **settings)
    for _ in range(20):
        for _ in range(2):
            (model.weight * push).sum().backward()
        optimizer.step(learning_rate, 1.0)
        weight.grad = 2 * push.float()
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        adamw.step()
    master = optimizer.states["weight"]["master"]
    assert torch.equal(master, weight) and torch.equal(model.weight, weight.to(dtype))
    assert ((master - before).abs() > 7 * learning_rate).float().mean() > 0.9
    pure = before.bfloat16() - 7e-7  # the largest step of AdamW, on the bf16 weight itself
    assert (pure == before.bfloat16()).float().mean() > 0.9


def movement(dtype, places=("cpu", "cpu")):
    """How far twelve steps move the masters of a whole model, and the weights that come out."""
    model, as_vector = small_model("llama"), torch.nn.utils.parameters_to_vector
    start, optimizer = as_vector(model.parameters()).detach(), masters_of(model, dtype, *places)
    for _ in range(12):
        run_small(model, as_pairs(random_pairs(8)), 200, train=True)
        optimizer.step(1e-4, 1.0)
    masters = [state["master"] for state in optimizer.states.values()]
    return as_vector(masters).detach() - start, as_vector(model.parameters())


def test_bf16_follows_float32_and_it_does_not_matter_where_masters_and_sums_lie(monkeypatch):
    """cpu:0 is the CPU under another name, which takes the code that a GPU's host takes."""
    empty = torch.empty  # without a GPU there is no pinned memory
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=0, **more: empty(*args, **more))
    together = [movement(dtype) for dtype in DTYPES]
    exact, rounded = together[0][0], together[1][0]
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()
    for places in (("cpu", "cpu:0"), ("cpu:0", "cpu"), ("cpu:0", "cpu:0")):
        for dtype, want in zip(DTYPES, together):
            assert all(map(torch.equal, movement(dtype, places), want)), (dtype, places)


@cases("dtype", DTYPES)
def test_sums_are_float32_and_can_be_cleared_and_what_is_not_finite_changes_nothing(dtype):
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = masters_of(model, dtype)
    before = copy.deepcopy((model.weight, optimizer.states["weight"]["master"]))
    (model.weight * math.inf).sum().backward()
    with raises(FloatingPointError):
        optimizer.step(1e-3, 1.0)
    optimizer.sums.clear()
    for _ in range(1000):  # in bf16 the sum would stop at 256
        model.weight.sum().backward()
    assert optimizer.step(0.0, 1.0) == 1000.0
    assert all(map(torch.equal, before, (model.weight, optimizer.states["weight"]["master"])))


SHORT = "--max-steps 6 --batch-size 4 --save-every 1 --device cpu --dtype float32".split()
SHORT += ["--data", EVAL]


def resolved(**settings):
    """Settings for the tiny model and 294 of its pairs, with 6 held out."""
    settings = alphapo.PRESETS["tiny"] | dict(data=EVAL, eval_data=None) | settings
    return alphapo.resolve(alphapo.Config(**settings))


# ------------------------------------------------------------------------------------ pairs
@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def write_rows(rows, name="pairs.jsonl"):
    """Rows as lines of JSON; bytes go as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    Path(name).write_bytes(b"\n".join(lines) + b"\n")


def load(rows, tokenizer, max_length=256, max_prompt_length=128, name="pairs.jsonl"):
    """(pairs, notes) of a file, which holds these rows if any are given."""
    if rows:
        write_rows(rows, name)
    config = alphapo.Config(max_length=max_length, max_prompt_length=max_prompt_length)
    return alphapo.load_pairs(name, tokenizer, config)


def texts(pairs, tokenizer):
    return [tuple(tokenizer.decode(ids) for ids in pair[:3]) for pair in pairs]


def user(text, role="user"):
    return {"role": role, "content": text}


def sides(*before, chosen="fox", rejected="an owl"):
    """Two conversations that go on with the assistant."""
    ends = dict(chosen=chosen, rejected=rejected)
    return {key: [*before, user(text, "assistant")] for key, text in ends.items()}


# fmt: off
LONG, END = [user("Hi."), user("Hello.", "assistant"), user("Say fox.")], "<|im_end|>"
SAY = "<|im_start|>user\nSay fox.<|im_end|>\n<|im_start|>assistant\n"
CHAT = (SAY, "fox" + END, "an owl" + END)
HI = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
LONG_CHAT = (HI + SAY, *CHAT[1:])
TEXT = {"prompt": "Say fox:", "chosen": " a fox", "rejected": " owl"}
TEXTS = ("Say fox:", " a fox" + END, " owl" + END)
DIGITS = json.dumps(TEXT).replace("{", '{"id": ' + "9" * 5000 + ", ").encode()
SHAPES = {
    "standard": (TEXT, TEXTS),
    "texts that part between tokens": (
        {"chosen": "It is blue", "rejected": "It is bad"}, ("It is b", "lue" + END, "ad" + END)),
    "a text that begins the other": (
        {"chosen": "Q? Yes", "rejected": "Q? Yes, no"}, ("Q? Y", "es" + END, "es, no" + END)),
    "conversational": (dict(prompt=[user("Say fox.")], **sides()), CHAT),
    "conversational, several turns": (dict(prompt=LONG, **sides()), LONG_CHAT),
    "conversational, implicit": (sides(*LONG), LONG_CHAT),
    "prompt repeated by the conversations": (dict(prompt=LONG, **sides(*LONG)), LONG_CHAT),
    "UltraFeedback": (dict(prompt="Say", **sides(user("Say fox."))), CHAT),
    "UltraFeedback, the assistant's turn alone": (dict(prompt="Say fox.", **sides()), CHAT),
    "with columns that are ignored": (TEXT | {"score": 3.5, "messages": [user("Hi.")]}, TEXTS),
    "with an integer of 5,000 digits": (DIGITS, TEXTS),
    "after a byte order mark": (b"\xef\xbb\xbf" + json.dumps(TEXT).encode(), TEXTS),
}
# fmt: on


@cases("shape", SHAPES)
def test_every_shape_of_row(shape, tokenizer):
    row, want = SHAPES[shape]
    assert texts(load([row], tokenizer)[0], tokenizer) == [want]


def test_files_and_hub_hold_every_pair_in_order(tokenizer, monkeypatch):
    rows = [TEXT | {"prompt": f"Say {i}:", "chosen": " fox" * (i + 1)} for i in range(7)]
    want = [(f"Say {i}:", " fox" * (i + 1) + END, TEXTS[2]) for i in range(7)]
    pairs, calls, stand_in = load(rows, tokenizer)[0], [], type(sys)("datasets")
    assert texts(pairs, tokenizer) == want and pairs[0].prompt.dtype == np.int32
    assert [pair.place for pair in pairs] == [f"pairs.jsonl:{i + 1}" for i in range(7)]
    Path("pairs.json").write_text("\ufeff" + json.dumps(rows, indent=1), "utf-8")
    Path("pairs.parquet").touch()
    with open("pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([TEXT, *(row.values() for row in rows)])
    stand_in.load_dataset = lambda *args, **options: calls.append((*args, options)) or rows
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    for name in ("pairs.json", "pairs.csv", "pairs.parquet", "someone/pairs", "someone/pairs:test"):
        pairs, _ = load(None, tokenizer, name=name)
        assert texts(pairs, tokenizer) == want and pairs[1].place == f"{name}: row 2"
    assert calls[0] == ("parquet", {"data_files": "pairs.parquet", "split": "train"})
    assert calls[1:] == [("someone/pairs", {"split": split}) for split in ("train", "test")]


def merging_tokenizer(adds_bos=False, **options):
    """Letters, and one merge: "a" before "b" becomes one token, across any boundary."""
    letters = ["<s>", "</s>", *"abcdefgh :", "ab"]
    inner = Tokenizer(models.BPE({x: i for i, x in enumerate(letters)}, [("a", "b")]))
    if adds_bos:
        template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        inner.post_processor = template
    options = dict(tokenizer_object=inner, bos_token="<s>", eos_token="</s>") | options
    return PreTrainedTokenizerFast(**options)


# fmt: off
BOS = dict(adds_bos=True)
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
CD = dict(prompt=[user("cd")], **sides(chosen="e", rejected="f"))
ENCODED = {  # (tokenizer, row, ids or texts of its parts, notes), 12 tokens, 5 of a cut prompt
    "merges across the boundary": ({}, ("cda", "bc", "dc"), [[4, 5], [12, 4, 1], [2, 5, 4, 1]], ""),
    "no end of turn": (dict(eos_token=None), ("c", "d", "e"), [[4], [5], [6]], "no EOS"),
    "BOS by the tokenizer": (BOS, ("cd", "e", "f"), [[0, 4, 5], [6, 1], [7, 1]], ""),
    "BOS twice": (BOS, ("<s>cd", "e", "f"), [[0, 4, 5], [6, 1], [7, 1]], ""),
    "BOS by the template": (
        BOS | dict(chat_template="<s>" + TEMPLATE), CD, [[0, 4, 5, 1], [6, 1], [7, 1]], ""),
    "fits exactly": (BOS, ("cdefgh", "cccc", "ddd"), ["<s>cdefgh", "cccc</s>", "ddd</s>"], ""),
    "a cut prompt": (
        BOS, ("cdefgh", "c" * 8, "ddd"), ["<s>efgh", "c" * 7, "ddd</s>"], "prompts truncated"),
    "cut responses": (BOS, ("cde", "c" * 9, "d" * 9), ["<s>cde", "c" * 8, "d" * 8], "response"),
}
# fmt: on


@cases("name", ENCODED)
def test_tokens_of_a_pair(name):
    options, row, want, note = ENCODED[name]
    row = row if isinstance(row, dict) else dict(zip(("prompt", "chosen", "rejected"), row))
    (pair,), notes = load([row], tokenizer := merging_tokenizer(**options), 12, 5)
    found = [ids.tolist() for ids in pair[:3]]
    if isinstance(want[0], str):
        found = [tokenizer.decode(ids).replace(" ", "") for ids in found]
    assert found == want and note in "".join(notes) and bool(note) == bool(notes)


@cases("tail", ["", "\\n", "\\n<|endoftext|>", "<|im_end|>"])
def test_one_end_of_turn_and_nothing_after_it(tail, tokenizer):
    other = AutoTokenizer.from_pretrained(TINY)
    other.chat_template = tokenizer.chat_template.replace(END + "\\n", END + tail)
    row = dict(prompt=[user("Say fox.")], **sides(chosen="fox ", rejected="an owl.\n"))
    assert texts(load([row], other)[0], other)[0][1:] == ("fox " + END, "an owl.\n" + END)


def test_pairs_that_cannot_teach_are_dropped_and_counted_once(tokenizer, capsys):
    rows = [TEXT | {"chosen": ""}, TEXT | {"rejected": " \n"}, TEXT | {"rejected": " a fox"}]
    rows += [TEXT | {"rejected": " fox" * 99, "chosen": " fox" * 90}]  # equal where they are cut
    rows += [dict(prompt=[user("Hi.")], **sides(chosen=""))]
    pairs, notes = load([TEXT, *rows], tokenizer, 24, 12)
    kinds = "an empty prompt or response", "equal responses"
    assert len(pairs) == 1 and [notes[f"pairs dropped for {x}"] for x in kinds] == [3, 2]
    write_rows([*[TEXT] * 20, rows[2]])
    _, pairs, held_out, _ = alphapo.load_data(resolved(data="pairs.jsonl", eval_split=0.2))
    places = {pair.place for pair in pairs + held_out}
    assert (len(pairs), len(held_out), len(places)) == (16, 4, 20)
    assert "note: 1 pairs dropped for equal" in capsys.readouterr().out
    config = resolved(data="pairs.jsonl", eval_data="pairs.jsonl")
    assert alphapo.load_data(config)[3] == {"pairs dropped for equal responses": 2}
    with raises(UserError) as error:
        load([TEXT, *[b"nonsense"] * 25], tokenizer)
    lines = str(error.value).split("\n")
    assert lines[9].startswith("pairs.jsonl:11: not a pair") and "25 bad rows" in lines[9]


# ------------------------------------------------------------------------------------ the model
def test_dropout_is_off_in_modules_and_numbers():
    small_model("phi3").save_pretrained("model")
    model, rows = alphapo.load_model("model", True), alphapo.make_rows(random_pairs())
    assert model.training and {getattr(model.config, key) for key in DROPOUT} == {0.0}
    assert torch.equal(*(alphapo.pair_logps(model, rows)[0] for _ in range(2)))


MODEL = AutoConfig.from_pretrained(TINY).to_dict(), load_file(TINY / "model.safetensors")


def config(**changes):
    return {"config.json": json.dumps(MODEL[0] | changes)}


def weights(**changes):
    tensors = MODEL[1] | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return {"model.safetensors": save(tensors, {"format": "pt"})}


# fmt: off
TURNS = dict(prompt=[user("Hi.")], **sides())
GATE = "model.layers.1.mlp.gate_proj.weight"
GONE, SMALLER, NAN = (weights(**{GATE: x}) for x in (
    None, torch.ones(3), torch.full((384, 144), math.nan)))
OWN = dict(model_type="own", auto_map={"AutoConfig": "own.C", "AutoModel": "own.M"})
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2181632\n"
NO_SYSTEM = "{{ raise_exception('no system') }}"
other = functools.partial(functools.partial, small_model, vocab_size=640)
BAD_MODELS = {  # what the line says: what the model's files hold, or a model in its place
    "safetensors": [{"model.safetensors": None, "pytorch_model.bin": "0"}],
    "--model model: not loaded": [
        dict.fromkeys(os.listdir(TINY)), {"config.json": None}, {"config.json": "{"},
        {"tokenizer.json": None}, {"model.safetensors": "\0" * 100},
        config(model_type="abacus"), config(**OWN)],
    "--model model: ": [
        config(model_type="t5", is_encoder_decoder=True), config(model_type="llava"),
        config(model_type="clip"), config(num_key_value_heads=3), config(num_attention_heads=0),
        config(hidden_size="many"), config(vocab_size=-5), other("llama", vocab_size=50)],
    "git lfs pull": [{"model.safetensors": LFS}],
    "chat_template": [{"chat_template.jinja": None}],
    "messages: TemplateError('no system')": [{"chat_template.jinja": NO_SYSTEM}],
    "missing": [config(num_hidden_layers=5), GONE],
    "unexpected": [config(num_hidden_layers=3), weights(new=torch.ones(3))],
    "mismatched": [config(intermediate_size=392), SMALLER],
    GATE: [GONE, SMALLER],
    "not finite": [NAN],
    "see later ones": [other("bert")],
    "pass --max-length": [other("gpt2", n_positions=12, max_position_embeddings=12)],
}
CALL = user("a") | {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
BAD_FILES = {  # what the line says: what pairs.jsonl holds
    "it is empty": [[b""], [b"\n"]],
    "pairs.jsonl:1: not a pair": [
        [b'{"chosen": "\xff", "rejected": "b"}'], [b"\0" * 50], [json.dumps(TEXT).encode()[:-9]],
        [b'{"chosen":' * 10**5], [b"[1]", TEXT], [TEXT | {"rejected": 3}], [TEXT | {"prompt": 3}],
        [TEXT | {"rejected": [user("a")]}], [TURNS | {"chosen": []}],
        [TURNS | {"chosen": [{"role": "a"}]}], [TURNS | {"chosen": [user([{"text": "a"}])]}],
        [TEXT | {"chosen": "\ud800"}]],
    "pairs.jsonl:3: not a pair of texts or messages: KeyError('rejected')": [
        [TEXT, b"", {"chosen": "a"}]],
    "tool_calls": [[TURNS | {"chosen": [CALL]}], [TURNS | {"prompt": [user("a"), CALL]}]],
    "must be a prompt that ends with the user": [
        [dict.fromkeys(("chosen", "rejected"), [user("Hi.", "assistant"), user("a")])], [sides()],
        [TURNS | {"chosen": [user("fox")]}], [TURNS | {"prompt": [user("a", "assistant")]}],
        [TURNS | {"chosen": [user("a", "assistant"), user("b", "assistant")]}]],
    "for an empty prompt or response": [
        [TEXT | {"prompt": ""}], [TEXT | {"chosen": "", "rejected": ""}],
        [TEXT | {"chosen": "  \n"}]],
    "for equal responses": [[TEXT | {"rejected": " a fox"}]],
}
BAD_COMMANDS = {  # what the line says: arguments
    "nowhere.jsonl: not loaded: No such file": [
        "--data nowhere.jsonl", "--data pairs.jsonl --eval-data nowhere.jsonl"],
    "folder.jsonl: not loaded: Is a directory": ["--data folder.jsonl"],
    "not loaded: neither a .jsonl": ["--data pairs.txt", "--data pairs.jsonl.gz", "--data="],
    "--data is missing": [f"--model {TINY}"],
    "--gama: there is no such flag; did you mean --gamma?": ["--gama 1"],
    "did you mean mistral-7b-instruct?": ["--model mistral-7b-instuct --data pairs.jsonl"],
    "--model ./nowhere: not loaded": ["--model ./nowhere --data pairs.jsonl"],
    "invalid": ["--beta much", "--device abacus", "--dtype float8"],
    ": must be from 1": ["--beta 0", "--beta -2", "--batch-size 0", "--learning-rate inf"],
    ": must be from": ["--alpha nan", "--gamma -0.1", "--seed -1", "--eval-split 1"],
    ": must be below": ["--max-length 64 --max-prompt-length 64"],
    "torch sees no GPU": ["--device cuda", "--master-device cuda"],
    "rehearsal of the longest pair": ["--data pairs.jsonl --eval-split 0 --alpha 1e5"],
    "is not empty": ["--out folder.jsonl"],
    "--out ": ["--out link", f"--out {'x' * 300}", "--out pairs.txt", "--out pairs.txt/out"],
    "--resume: there is no checkpoint in": ["--resume", "--resume --out folder.jsonl"],
}
# fmt: on


def ends_in_one_line(args, line, capsys, code=2):
    """The script ends with this line alone, and leaves the folder as it was."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    with raises(SystemExit) as exit:
        alphapo.main(list(map(str, args)))
    error = capsys.readouterr().err
    assert exit.value.code == code and line in error, error[-500:]
    assert len(error.strip().splitlines()) == 1, error[-2000:]
    assert sorted(Path().rglob("*")) == before
    return error


def each(table):
    return cases("line, case", [(line, case) for line, row in table.items() for case in row])


@each(BAD_MODELS)
def test_a_bad_model_gets_one_line_and_status_2(line, case, capsys):
    shutil.copytree(TINY, "model", ignore=shutil.ignore_patterns("*.jsonl", "*.py", "__*"))
    write_rows([TURNS])
    for name, content in {} if callable(case) else case.items():
        path = Path("model", name)
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if callable(case):
        case().save_pretrained("model")
    args = "--model model --data pairs.jsonl --eval-split 0 --max-steps 1".split()
    error = ends_in_one_line(args, line, capsys)
    if remedy := re.search(r"(--max-length) (\d+)", error):
        alphapo.main([*args, *remedy.groups()])
        assert Path("out/summary.json").exists()


@each(BAD_FILES | BAD_COMMANDS)
def test_bad_files_and_commands_get_one_line_and_status_2(line, case, capsys):
    Path("folder.jsonl/.partial-x").mkdir(parents=True)
    Path("link").symlink_to("dangling")
    rows, command = ([TEXT], case) if isinstance(case, str) else (case, "--data pairs.jsonl")
    for name in ("pairs.jsonl", "pairs.txt", "pairs.jsonl.gz"):
        write_rows(rows, name)
    ends_in_one_line(command.split(), line, capsys)


# ------------------------------------------------------------------------------------ training
def metrics_of(folder):
    """The log, without how long things took."""
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if "seconds" not in k} for x in lines]


def weights_of(folder):
    return Path(folder, "model.safetensors").read_bytes()


def assert_same_log(ours, want, tolerance):
    for a, b in zip(metrics_of(ours), metrics_of(want), strict=True):
        a["tokens"] = b["tokens"] = 0  # that plain rows take more of them is their point
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance), ours


def test_the_rehearsal_runs_the_longest_pair_first_and_leaves_no_trace(monkeypatch):
    """The first step's weights are those of a step made by hand, without a rehearsal."""
    config, calls, run = resolved(max_steps=1, batch_size=8), [], alphapo.run_pairs

    def watched(model, pairs, indices, loss_fn, config, train=False):
        assert not torch.backends.cuda.cudnn_sdp_enabled()  # its backward pass can give NaN
        calls.append((train, list(indices)))
        return run(model, pairs, indices, loss_fn, config, train)

    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr(alphapo, "run_pairs", watched)
    alphapo.train(config)
    pairs, model = alphapo.load_data(config)[1], alphapo.load_model(str(TINY))
    order = np.random.default_rng([42, 0]).permutation(len(pairs))[:8].tolist()
    assert [train for train, _ in calls] == [True, False, True, False] and calls[2][1] == order
    assert set(calls[0][1]) == {int(alphapo.row_tokens(pairs, False).argmax())}
    optimizer = masters_of(model)
    run(model, pairs, order, LOSS, config, train=True)
    optimizer.step(alphapo.learning_rate_at(0, 1, config), 1.0)
    written = AutoModel.from_pretrained("out").state_dict()
    assert all(torch.equal(written[k], x.bfloat16()) for k, x in model.state_dict().items())


def test_a_rehearsal_that_goes_wrong_ends_the_run(monkeypatch):
    settings, own = resolved(max_steps=1, batch_size=4, dtype="bfloat16"), alphapo.pair_logps

    def wrong_in_bf16(model, rows):
        wrong = model.get_input_embeddings().weight.dtype == torch.bfloat16
        return tuple(x * (1.3 if wrong else 1) for x in own(model, rows))

    with raises(UserError, match="rehearsal.*gradient norm"):  # the slope of a root is endless
        alphapo.train(settings, lambda c, r, *_: ((c - c.detach()).sqrt(), c.detach(), r.detach()))
    monkeypatch.setattr(alphapo, "pair_logps", wrong_in_bf16)
    with raises(UserError, match="rehearsal.*float32"):
        alphapo.train(settings)
    assert not Path("out").exists()


@cases("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_rows_splits_types_and_devices_differ_by_rounding_alone(device):
    """From a run in float32 on the CPU; and on a CPU, the same settings give the same bits."""
    host = dict(device=device, master_device="cpu", save_every=2)
    kinds = dict(first={}, second={}, seed=dict(seed=2**64), plain=dict(plain_rows=True))
    kinds |= dict(split=dict(micro_tokens=64), bf16=dict(dtype="bfloat16"), host=host)
    kinds |= dict(gpu=dict(device=device), host_bf16=host | dict(dtype="bfloat16"))
    for name, settings in kinds.items():
        settings = dict(device="cpu", dtype="float32", max_steps=3, batch_size=8) | settings
        summary = alphapo.train(resolved(out=name, **settings))
        assert name != "gpu" or summary["plan"]["places"] == (device, device)
    unfinish(Path("host_bf16"))
    alphapo.train(resolved(out="host_bf16", resume=True, **settings))  # after step 2
    assert metrics_of("first") == metrics_of("second") != metrics_of("seed")
    assert weights_of("first") == weights_of("second")
    tolerances = dict(plain=1e-4, split=1e-4, bf16=5e-2, host=2e-3, gpu=2e-3, host_bf16=5e-2)
    for name, tolerance in tolerances.items():
        assert_same_log(name, "first", tolerance)


@cases("sign", [1, -1])
def test_a_loss_of_your_own_decides_where_the_weights_go(sign):
    def loss_fn(chosen, rejected, pairs, batch):
        assert len(batch) == len(chosen) and max(batch) < len(pairs)
        return sign * (rejected - chosen), chosen.detach(), rejected.detach()

    summary = alphapo.train(resolved(max_steps=4, batch_size=16), loss_fn)
    before, after = (summary[x]["eval_rewards/margins"] for x in ("before", "after"))
    assert sign * (after - before) > 0.01


# ------------------------------------------------------------------------------------ the script
def run(args, code=0, launcher=(), umask=-1, **environment):
    """Run alphapo.py in a process of its own, without a network or a GPU."""
    command = [sys.executable, *launcher, ROOT / "alphapo.py", *args]
    quiet = dict(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1") | environment
    options = dict(env=os.environ | quiet, capture_output=True, text=True, umask=umask)
    done = subprocess.run(command, **options)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


def test_the_script_trains_improves_and_writes_what_it_says(capsys):
    args = "--max-steps 12 --dtype float32 --eval-every 6 --save-every 12".split()
    printed, out = run(args, umask=0o027).stdout, Path("out")
    log, summary = metrics_of(out), json.loads((out / "summary.json").read_text())
    evaluations = [metrics for metrics in log if "eval_loss" in metrics]
    steps = [metrics for metrics in log if "loss" in metrics]
    assert [metrics["step"] for metrics in evaluations] == [0, 6, 12] and len(steps) == 12
    assert {"logps/chosen", "grad_norm", "learning_rate", "epoch"} <= steps[0].keys()
    before, after = summary["before"], summary["after"]
    assert before.items() <= evaluations[0].items() and after.items() <= evaluations[-1].items()
    assert after["eval_loss"] < before["eval_loss"] and f"{after['eval_loss']:.4f}" in printed
    assert after["eval_rewards/accuracies"] > before["eval_rewards/accuracies"]
    assert "<|im_start|>assistant" in printed and max(map(len, printed.splitlines())) <= 100
    assert "AlphaPO" in (out / "README.md").read_text()
    modes = {oct(path.stat().st_mode)[-3:] for path in out.rglob("*") if path.is_file()}
    assert modes == {"640"}  # the umask decides who can read them
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    # the result loads, in bf16, and has the figures of the last evaluation
    model, tokenizer = (x.from_pretrained(out) for x in (AutoModel, AutoTokenizer))
    assert model.dtype == torch.bfloat16 and tokenizer.chat_template
    pairs, _ = load(None, tokenizer, name=EVAL)
    again = run_small(model.float(), pairs, 4096, plain=True)
    want = {key.removeprefix("eval_"): value for key, value in after.items()}
    assert again == pytest.approx(want, rel=1e-4)
    ends_in_one_line(args, "is not empty", capsys)


def test_help_shows_each_flag_once_and_every_preset(capsys):
    with raises(SystemExit):
        alphapo.main(["--help"])
    text = capsys.readouterr().out
    names = [name.replace("_", "-") for name in vars(alphapo.Config())]
    assert re.findall(r"\n  --([\w-]+)", text) == ["help", *names]
    for preset, settings in alphapo.PRESETS.items():
        rest = " ".join(text.split()).partition(f" {preset}: ")[2]
        assert f"gamma {settings['gamma']:g}" in rest.partition("learning rate")[0]


# -------------------------------------------------------------------------------- nothing is lost
def in_child(folder, args):
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open(f"{stream}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = ["alphapo.py", *args]
    alphapo.main(args)


def fork(*args):
    """Start a run in a fork of a process that has imported all of this and runs one thread."""
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["test_alphapo"])
    process = server.Process(target=in_child, args=(os.getcwd(), [*map(str, args)]))
    process.start()
    return process


def exit_code(process):
    process.join(250)
    return process.exitcode


def checkpoints(folder):
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))


def wait_for(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.0005)


def test_twenty_kills_and_the_weights_are_those_of_an_uninterrupted_run():
    """SIGKILL at random moments, every second one while a checkpoint is being written."""
    args = [*SHORT, "--max-steps", 24]
    assert exit_code(fork(*args, "--out", "whole")) == 0
    rng, out, inside = np.random.default_rng(0), Path("killed"), 0
    partial = out / ".partial"
    for kill in [*range(20), None]:
        child = fork(*args, "--out", out, *["--resume"] * bool(checkpoints(out)))
        if kill is not None:
            if kill % 2:
                wait_for(partial.exists)
            else:
                time.sleep(rng.uniform(0.2, 1.2))
            inside += partial.exists()
            child.kill()
        code = exit_code(child)
        assert code in (-9, 0) if kill is not None else code == 0, Path("2.txt").read_text()
        if code == 0:  # it may have ended before the blow
            assert weights_of(out) == weights_of("whole") and metrics_of(out) == metrics_of("whole")
            assert checkpoints(out) == ["checkpoint-000023", "checkpoint-000024"]
            assert not partial.exists()
            shutil.rmtree(out)
    assert inside >= 5


@cases("signals", ["SIGINT", "SIGTERM", "SIGHUP", "SIGINT SIGINT"])
def test_a_signal_finishes_the_step_and_saves_and_a_second_one_ends_the_run_at_once(signals):
    long = "--max-steps 99 --epochs 99 --batch-size 288 --save-every 99".split()
    child, log = fork(*SHORT, *long), Path("out/metrics.jsonl")
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 1)
    for name in signals.split():
        os.kill(child.pid, signal.Signals[name])
        wait_for(lambda: "finishing this step" in Path("2.txt").read_text())
    code, number = exit_code(child), signal.Signals[name]
    if signals == "SIGINT SIGINT":  # a step of 288 pairs was not over yet
        assert code == -number and not checkpoints("out")
    else:
        last, step = Path("2.txt").read_text().splitlines()[-1], metrics_of("out")[-1]["step"]
        assert code == 128 + number and f"stopped after step {step} and saved" in last
        assert "python alphapo.py --max-steps 6" in last and last.endswith("--resume")
        assert checkpoints("out") == [f"checkpoint-{step:06}"]


ENDS = {  # what the line says: status, what ends a run of two processes
    "2 alphapo.py --data 'my pairs.jsonl' --resume": (143, alphapo.Stopped(signal.SIGTERM, 7)),
    "the end; lower --learning-rate": (1, FloatingPointError("the end")),
    "disk; nothing was saved": (1, OSError("disk")),
    "lower --micro-tokens": (1, torch.OutOfMemoryError("CUDA out of memory")),
}


@cases("line", ENDS)
def test_what_ends_a_run_is_one_line_and_under_torchrun_names_torchrun(line, monkeypatch, capsys):
    code, error = ENDS[line]
    monkeypatch.setattr(alphapo, "train", mock.Mock(side_effect=error))
    monkeypatch.setattr(sys, "argv", ["alphapo.py", "--data", "my pairs.jsonl"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    ends_in_one_line([], line, capsys, code)


def unfinish(folder):
    """Back to the moment before the model is written."""
    for path in folder.iterdir():
        if path.is_file() and path.name != "metrics.jsonl":
            path.unlink()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of SHORT before its last write, and what it had after it: (folder, weights, log)."""
    folder = tmp_path_factory.mktemp("whole")
    alphapo.main([*SHORT, "--out", str(folder)])
    end = weights_of(folder), metrics_of(folder)
    unfinish(folder)
    return folder, *end


@pytest.fixture
def stopped(whole):
    """A copy of that run in out, with what it has at its end."""
    return Path(shutil.copytree(whole[0], "out")), *whole[1:]


# fmt: off
OTHER_RUNS = {  # flags: what the line says
    "": "is not empty", "--resume --batch-size 8": "batch_size is 8, and was 4 in that run",
    "--resume --alpha 0.5": "alpha", "--resume --beta 3": "beta", "--resume --seed 1": "seed",
    "--resume --gamma 0": "gamma", "--resume --warmup-ratio 0.2": "was 0.1 in that run",
    "--resume --data other.jsonl": "pairs_sha256", f"--resume --eval-data {EVAL}": "pairs_sha256",
}
# fmt: on


def test_another_run_is_not_the_continuation_of_this_one(stopped, capsys):
    out, *_ = stopped
    assert checkpoints(out) == ["checkpoint-000005", "checkpoint-000006"]
    rows = Path(EVAL).read_text().splitlines()
    Path("other.jsonl").write_text("\n".join(rows[::-1]))  # another order is another run
    for flags, line in OTHER_RUNS.items():
        ends_in_one_line([*SHORT, *flags.split()], line, capsys)
    lock = os.open(out, os.O_RDONLY)  # as a run at work in it does
    fcntl.flock(lock, fcntl.LOCK_EX)
    ends_in_one_line([*SHORT, "--resume"], "another run may be writing there", capsys)
    os.close(lock)


def test_the_learning_rate_may_change_and_the_same_data_have_many_names(stopped):
    out, final, log = stopped
    shutil.rmtree(out / NEWEST)
    shutil.copy(EVAL, "same.jsonl")
    alphapo.main([*SHORT, *"--resume --data same.jsonl --learning-rate 1e-3".split()])
    changes = json.loads((out / "summary.json").read_text())["changes"]
    (change,) = [change for change in changes if change.startswith("learning_rate")]
    assert "0.0002 to 0.001 after step 5" in change and change in (out / "README.md").read_text()
    assert metrics_of(out)[:6] == log[:6] and metrics_of(out)[6]["loss"] == log[6]["loss"]
    assert weights_of(out) != final


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def foreign(out):
    for name in "best 000006.bak x".split():
        (out / f"checkpoint-{name}").mkdir()
        (out / f"checkpoint-{name}" / "state.json").write_text("not ours")


NEWEST = "checkpoint-000006"
ACCIDENTS = {
    "nothing": lambda out: None,
    "a file is cut": lambda out: halve(next((out / NEWEST).glob("*.safetensors"))),
    "a file is missing": lambda out: next((out / NEWEST).glob("*.safetensors")).unlink(),
    "a file is of another model": lambda out: save_file(
        {"master": torch.ones(1)}, next((out / NEWEST).glob("*.safetensors"))
    ),
    "the state is cut": lambda out: halve(out / NEWEST / "state.json"),
    "the state is no object": lambda out: (out / NEWEST / "state.json").write_text("[]"),
    "the last checkpoint is gone": lambda out: shutil.rmtree(out / NEWEST),
    "folders of others": foreign,
    "a save was killed": lambda out: shutil.copytree(out / NEWEST, out / ".partial"),
    "the log is cut": lambda out: halve(out / "metrics.jsonl"),
    "the log is gone": lambda out: (out / "metrics.jsonl").unlink(),
}


@cases("accident", ACCIDENTS)
def test_a_run_reaches_the_same_end_whatever_happened(accident, stopped, monkeypatch, capsys):
    """Its picture fails, which no run is worth losing over, and every way to pickle is barred."""
    out, final, log = stopped
    ACCIDENTS[accident](out)
    there = {*checkpoints(out), "checkpoint-000005", NEWEST}
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # makes its import fail
    for module, names in ((torch, "load save"), (pickle, "load loads dump dumps")):
        for name in names.split():
            monkeypatch.setattr(module, name, None)
    if accident.startswith(("a file", "the state")):
        line = f"{out / NEWEST} is damaged"
        assert "delete it" in ends_in_one_line([*SHORT, "--resume"], line, capsys)
        shutil.rmtree(out / NEWEST)
    alphapo.main([*SHORT, "--resume"])
    assert weights_of(out) == final and (out / "summary.json").exists()
    assert not (out / "curves.png").exists() and set(checkpoints(out)) == there
    assert not (out / "state.json").exists() and not (out / ".partial").exists()
    found = metrics_of(out)[-1:] if "log" in accident else metrics_of(out)
    assert found == log[-len(found) :] and b"\0" not in (out / "metrics.jsonl").read_bytes()
    suffixes = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".jinja", ".md"}


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(whole, monkeypatch, capsys):
    """A limit on the size of files stands in for the disk, from the third checkpoint on."""
    limits, save = resource.getrlimit(resource.RLIMIT_FSIZE), alphapo.save_checkpoint

    def full(out, state, optimizer):
        limit = 10**6 if state["step"] == 3 else limits[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        save(out, state, optimizer)

    with monkeypatch.context() as context, raises(SystemExit) as exit:
        context.setattr(alphapo, "save_checkpoint", full)
        alphapo.main(SHORT)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 1 and "File too large" in error and "--resume" in error
    assert checkpoints("out") == ["checkpoint-000001", "checkpoint-000002"]
    alphapo.main([*SHORT, "--resume"])  # space was made
    assert weights_of("out") == whole[1] and not list(Path("out").glob(".partial"))


def test_a_loss_that_is_not_finite_names_its_pair_and_keeps_the_checkpoints():
    log, places = Path("out/metrics.jsonl"), []

    def diverging(chosen, rejected, pairs, batch):
        losses, *rewards = LOSS(chosen, rejected)
        if log.exists() and log.read_text().count("\n") == 3:  # in step 3
            losses[2] = math.inf
            places.append(pairs[batch[2]].place)
        return losses, *rewards

    config = resolved(max_steps=6, batch_size=4, micro_tokens=10**4, save_every=1)
    with raises(FloatingPointError, match="step 3, ") as error:
        alphapo.train(config, diverging)
    assert f"not finite, at {places[0]}" in str(error.value)
    assert checkpoints("out") == ["checkpoint-000001", "checkpoint-000002"]


# -------------------------------------------------------------------------- processes and a GPU
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2".split()


@cases("dtype, steps, tolerance", [("float32", 10, 1e-5), ("bfloat16", 4, 3e-2)])
def test_two_processes_are_one_and_one_resumes_what_two_saved(dtype, steps, tolerance):
    """Over gloo, of a batch that does not divide evenly."""
    args = f"--max-steps {steps} --batch-size 13 --save-every 2 --dtype {dtype}".split()
    args += ["--data", EVAL]
    run([*args, "--out", "two"], launcher=TORCHRUN)
    assert exit_code(fork(*args, "--out", "one")) == 0
    assert_same_log("two", "one", tolerance)
    unfinish(Path("two"))
    shutil.rmtree(f"two/checkpoint-{steps:06}")
    assert exit_code(fork(*args, "--out", "two", "--resume")) == 0, Path("2.txt").read_text()
    assert_same_log("two", "one", tolerance)
