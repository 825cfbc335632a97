# SPDX-License-Identifier: MIT
"""The tests of alphapo.py: pytest test_alphapo.py (offline, on a CPU; some need a GPU).

The mathematics is checked against closed forms in 400 digits, finite differences and the
models' own forward pass; the behaviour by running the script. CI=1 adds the slow cases.
"""

import copy
import fcntl
import itertools
import json
import math
import multiprocessing
import os
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
from safetensors.torch import load_file, save
from tokenizers import Tokenizer, models, processors
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers import AutoModelForCausalLM as AutoModel

import alphapo
from alphapo import UserError

ROOT = Path(__file__).resolve().parent
TINY, EVAL = ROOT / "data" / "tiny", str(ROOT / "data" / "tiny" / "eval.jsonl")
SLOW = bool(os.environ.get("CI") or os.environ.get("ALPHAPO_SLOW"))
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
def test_gradcheck_and_shapes_that_would_broadcast(alpha):
    logps = (-3 * torch.rand(2, 6, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: alphapo.alphapo_loss(*x, alpha, 2.5, 0.1)[0], logps)
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


def test_flags_and_presets_are_those_of_help_and_of_the_paper(capsys):
    with raises(SystemExit):
        alphapo.main(["--help"])
    text = capsys.readouterr().out
    names = [name.replace("_", "-") for name in vars(alphapo.Config())]
    assert re.findall(r"\n  --([\w-]+)", text) == ["help", *names]
    assert set(alphapo.PRESETS) == {"tiny", *PAPER}
    for name, (alpha, beta, ratio, learning_rate) in PAPER.items():
        want = dict(alpha=alpha, beta=beta, gamma=beta * ratio, learning_rate=learning_rate)
        found = vars(alphapo.parse_arguments(["--model", name]))
        assert {key: found[key] for key in want} == pytest.approx(want, rel=1e-12)
        line = f"{name}: alpha {alpha}, beta {beta:g}, gamma {beta * ratio:g}, learning_rate"
        assert line in " ".join(text.split())
    config = alphapo.parse_arguments("--alpha 0.5 --max_steps 3".split())
    assert config == alphapo.Config(**alphapo.PRESETS["tiny"] | dict(alpha=0.5, max_steps=3))
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
    triples = [[rng.integers(3, 97, n).astype(np.int32) for n in row] for row in sizes]
    return [alphapo.Pair(*triple, f"pairs:{i + 1}") for i, triple in enumerate(triples)]


def own_logps(model, pair):
    """Mean log-probabilities from the model's own forward pass, unpadded."""
    means, prompt = [], pair.prompt
    for response in pair[1:3]:
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
    want = torch.stack([own_logps(exact, pair) for pair in pairs])
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


@cases("name", ["llama", "window of 5, mistral", "gemma2", "phi3"])
def test_dropout_is_off_and_a_micro_batch_in_bf16_runs_on_the_meta_device(name):
    """A stand-in for a GPU: what mixes devices, or would wait for one, raises there. A sparse
    gradient does wait, once a micro-batch at the end of its backward pass."""
    small_model(name).save_pretrained("model")
    model, rows = alphapo.load_model("model", checkpointing=True), alphapo.make_rows(random_pairs())
    assert model.training and torch.equal(*(alphapo.pair_logps(model, rows)[0] for _ in range(2)))
    assert not any(getattr(model.config, key, 0) for key in DROPOUT)
    model.to("meta", torch.bfloat16).get_input_embeddings().sparse = False
    tensors = {key: x.to("meta") for key, x in vars(rows).items() if isinstance(x, torch.Tensor)}
    logps = alphapo.pair_logps(model, alphapo.replace(rows, **tensors))
    alphapo.alphapo_loss(*logps, 0.25, 2.5, 0.1)[0].sum().backward()
    assert all(param.grad.dtype == torch.bfloat16 for param in model.parameters())


# ------------------------------------------------------------------------------------ gradients
def LOSS(chosen_logps, rejected_logps, *_):
    return alphapo.alphapo_loss(chosen_logps, rejected_logps, 0.25, 2.5, 0.1)


METRICS = "loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies "
METRICS = (METRICS + "logps/chosen logps/rejected").split()


def run_small(model, pairs, micro_tokens, plain=False, train=False):
    config = alphapo.Config(device="cpu", micro_tokens=micro_tokens, plain_rows=plain)
    return alphapo.run_pairs(model, pairs, range(len(pairs)), LOSS, config, train)


@cases("name", ["llama", "tied llama", "gemma2"])
def test_a_step_is_that_of_the_models_own_forward_pass(name):
    """However it is split, laid out, recomputed or compiled (which is slow), or its gradients are
    made: the embedding's is sparse where it is tied."""
    small_model(name, num_hidden_layers=2).save_pretrained("model")
    model, pairs, sparse = alphapo.load_model("model"), random_pairs(9), name != "llama"
    assert model.get_input_embeddings().sparse == sparse
    others = [(model, 10**6), (model, 1), (model, 90), (model, 90, True)]
    others += [(alphapo.load_model("model", checkpointing=True), 90)]
    if name == "llama":
        compiled = alphapo.load_model("model")
        for layer in compiled.model.layers:
            layer.compile(dynamic=True, backend="inductor" if SLOW else "aot_eager")
        others += [(compiled, 90)]
    model.get_input_embeddings().sparse = False
    chosen, rejected = torch.stack([own_logps(model, pair) for pair in pairs], 1)
    losses, *rewards = LOSS(chosen, rejected)
    losses.mean().backward()
    margins = rewards[0] - rewards[1]
    values = losses, *rewards, margins, margins > 0, chosen, rejected
    metrics = dict(zip(METRICS, [value.double().mean().item() for value in values]))
    gradients = [param.grad.clone() for param in model.parameters()]
    for other, micro_tokens, *plain in others:
        other.get_input_embeddings().sparse = sparse
        other.zero_grad()
        found = run_small(other, pairs, micro_tokens, *plain, train=True)
        assert found == pytest.approx(metrics, rel=1e-5, abs=1e-5)
        assert_close([p.grad for p in other.parameters()], gradients, rtol=1e-4, atol=1e-5)
    found, other.get_input_embeddings().sparse = [p.grad for p in other.parameters()], False
    other.zero_grad()
    run_small(other, pairs, 90, train=True)
    assert_close([p.grad for p in other.parameters()], found, rtol=1e-6, atol=1e-7)


@cases("plain", [False, True])
def test_micro_batches_hold_every_index_once_and_keep_to_the_budget(plain):
    pairs = random_pairs(40)
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


# ------------------------------------------------------------------------------------ weights
@cases("places", [*itertools.product(("cpu", "cpu:0"), repeat=2)])
@cases("learning_rate", [1e-3, 7e-7])
@cases("dtype", [torch.float32, torch.bfloat16])
def test_masters_are_plain_adamw_to_the_bit(dtype, learning_rate, places, monkeypatch):
    """Twenty clipped steps, in two micro-batches each, the second so small that a sum in bf16 would
    lose it. cpu:0 is the CPU under another name, which takes the code that a GPU's host takes."""
    empty = torch.empty  # without a GPU there is no pinned memory
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=0, **more: empty(*args, **more))
    torch.manual_seed(0)
    model, push = torch.nn.Linear(64, 64), torch.randn(64, 64).to(dtype)
    weight = copy.deepcopy(model.weight)
    optimizer = alphapo.MasterAdamW(model, "cpu", dtype, *places)
    adamw = torch.optim.AdamW([weight], lr=learning_rate, weight_decay=0.0, fused=True)
    (model.weight * math.inf).sum().backward()
    with raises(FloatingPointError):  # and nothing changes
        optimizer.step(learning_rate, 1.0)
    torch._foreach_zero_(list(optimizer.sums.values()))
    for _ in range(20):
        for scale in (1, 2**-9):
            (model.weight * (scale * push)).sum().backward()
        norm = optimizer.step(learning_rate, 1.0)
        weight.grad = (1 + 2**-9) * push.float()
        assert norm == torch.nn.utils.clip_grad_norm_([weight], 1.0).item()
        adamw.step()
    master = optimizer.states["weight"]["master"]
    assert torch.equal(master, weight) and torch.equal(model.weight, weight.to(dtype))


SHORT = "--max-steps 6 --batch-size 4 --save-every 1 --device cpu --dtype float32".split()
SHORT += ["--data", EVAL]


def resolved(**settings):
    """Settings for the tiny model and 294 of its pairs, with 6 held out."""
    settings = alphapo.PRESETS["tiny"] | dict(data=EVAL, eval_data=None) | settings
    return alphapo.resolve(alphapo.Config(**settings))


# ------------------------------------------------------------------------------------ pairs
TOKENIZER = AutoTokenizer.from_pretrained(TINY)


def write_rows(rows, name="pairs.jsonl"):
    """Rows as lines of JSON; bytes go as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    Path(name).write_bytes(b"\n".join(lines) + b"\n")


def load(rows, tokenizer=TOKENIZER, max_length=256, max_prompt_length=128, name="pairs.jsonl"):
    """(pairs, notes) of a file, which holds these rows if any are given."""
    if rows:
        write_rows(rows, name)
    config = alphapo.Config(max_length=max_length, max_prompt_length=max_prompt_length)
    return alphapo.load_pairs(name, tokenizer, config)


def texts(pairs):
    return [tuple(TOKENIZER.decode(ids) for ids in pair[:3]) for pair in pairs]


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
    "conversational": (dict(prompt=LONG, **sides()), LONG_CHAT),
    "conversational, implicit": (sides(*LONG), LONG_CHAT),
    "prompt repeated by the conversations": (dict(prompt=LONG, **sides(*LONG)), LONG_CHAT),
    "UltraFeedback": (dict(prompt="Say", **sides(user("Say fox."))), CHAT),
    "UltraFeedback, the assistant's turn alone": (
        dict(prompt="Say fox.", **sides(chosen="fox ", rejected="owl\n")),
        (SAY, "fox " + END, "owl\n" + END)),
    "with columns that are ignored": (TEXT | {"score": 3.5, "messages": [user("Hi.")]}, TEXTS),
    "with an integer of 5,000 digits": (DIGITS, TEXTS),
    "after a byte order mark": (b"\xef\xbb\xbf" + json.dumps(TEXT).encode(), TEXTS),
}
BOS = dict(adds_bos=True)
CHATS = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
CD = dict(prompt=[user("cd")], **sides(chosen="e", rejected="f"))
ENCODED = {  # (tokenizer, row, tokens of its parts, a note), 12 tokens, 5 of a cut prompt
    "merges across the boundary": ({}, ("cda", "bc", "dc"), "cd abc</s> adc</s>", ""),
    "no end of turn": (dict(eos_token=None), ("c", "d", "e"), "c d e", "no EOS"),
    "BOS by the tokenizer": (BOS, ("cd", "e", "f"), "<s>cd e</s> f</s>", ""),
    "BOS twice": (BOS, ("<s>cd", "e", "f"), "<s>cd e</s> f</s>", ""),
    "BOS by a template": (BOS | dict(chat_template="<s>" + CHATS), CD, "<s>cd</s> e</s> f</s>", ""),
    "more after a turn": (dict(chat_template=CHATS + " <s> "), CD, "cd</s> e</s> f</s>", ""),
    "EOS is UNK": (dict(chat_template=CHATS, unk_token="</s>"), CD, "cd</s> e</s> f</s>", ""),
    "fits exactly": (BOS, ("cdefgh", "cccc", "ddd"), "<s>cdefgh cccc</s> ddd</s>", ""),
    "a cut prompt": (BOS, ("cdefgh", "c" * 8, "ddd"), "<s>efgh ccccccc ddd</s>", "prompts trunc"),
    "cut responses": (BOS, ("cde", "c" * 9, "d" * 9), "<s>cde cccccccc dddddddd", "response"),
}
# fmt: on


@cases("shape", SHAPES)
def test_every_shape_of_row(shape):
    row, want = SHAPES[shape]
    assert texts(load([row])[0]) == [want]


def test_files_and_hub_hold_every_pair_in_order(monkeypatch):
    rows = [TEXT | {"prompt": f"Say {i}:", "chosen": " fox" * (i + 1)} for i in range(7)]
    want = [(f"Say {i}:", " fox" * (i + 1) + END, TEXTS[2]) for i in range(7)]
    pairs, calls, stand_in = load(rows)[0], [], type(sys)("datasets")
    assert texts(pairs) == want and pairs[0].prompt.dtype == np.int32
    assert [pair.place for pair in pairs] == [f"pairs.jsonl:{i + 1}" for i in range(7)]
    Path("pairs.json").write_text("\ufeff" + json.dumps(rows, indent=1), "utf-8")
    lines = [",".join(row) for row in (TEXT, *(row.values() for row in rows))]
    Path("pairs.csv").write_text("\n".join(lines))
    stand_in.load_dataset = lambda *args, **options: calls.append((*args, options)) or rows
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    for name in ("pairs.json", "pairs.csv", "pairs.parquet", "someone/pairs", "someone/pairs:test"):
        pairs, _ = load(None, name=name)
        assert texts(pairs) == want and pairs[1].place == f"{name}: row 2"
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


@cases("name", ENCODED)
def test_tokens_of_a_pair(name):
    options, row, want, note = ENCODED[name]
    row = row if isinstance(row, dict) else dict(zip(TEXT, row))
    (pair,), notes = load([row], tokenizer := merging_tokenizer(**options), 12, 5)
    tokens = ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in pair[:3]]
    assert " ".join(tokens) == want and note in "".join(notes) and bool(note) == bool(notes)


def test_pairs_that_cannot_teach_are_dropped_and_counted_once(capsys):
    rows = [TEXT | {"chosen": ""}, TEXT | {"rejected": " \n"}, TEXT | {"rejected": " a fox"}]
    rows += [TEXT | {"rejected": " fox" * 99, "chosen": " fox" * 90}]  # equal where they are cut
    rows += [dict(prompt=[user("Hi.")], **sides(chosen=""))]
    pairs, notes = load([TEXT, *rows], TOKENIZER, 24, 12)
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
        load([TEXT, *[b"nonsense"] * 25])
    lines = str(error.value).split("\n")
    assert lines[9].startswith("pairs.jsonl:11: not a pair") and "25 bad rows" in lines[9]


# ------------------------------------------------------------------------------------ the model
MODEL = AutoConfig.from_pretrained(TINY).to_dict(), load_file(TINY / "model.safetensors")


def config(**changes):
    return {"config.json": json.dumps(MODEL[0] | changes)}


def weights(**changes):
    tensors = {name: x for name, x in (MODEL[1] | changes).items() if x is not None}
    return {"model.safetensors": save(tensors, {"format": "pt"})}


# fmt: off
TURNS = dict(prompt=[user("Hi.")], **sides())
GATE = "model.layers.1.mlp.gate_proj.weight"
GONE, SMALLER, NAN = (weights(**{GATE: x}) for x in (
    None, torch.ones(3), torch.full((384, 144), math.nan)))
OWN = dict(model_type="own", auto_map={"AutoConfig": "own.C", "AutoModel": "own.M"})
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2181632\n"
CALL = user("a") | {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
BAD_INPUT = {  # what the line says: bad cases
    # files of the model, or the name and settings of another
    "safetensors": [{"model.safetensors": None, "pytorch_model.bin": "0"}],
    "--model model: not loaded": [
        dict.fromkeys(os.listdir(TINY)), {"config.json": None}, {"config.json": "{"},
        {"tokenizer.json": None}, {"model.safetensors": "\0" * 100},
        config(model_type="abacus"), config(**OWN)],
    "--model model: ": [
        config(model_type="t5", is_encoder_decoder=True), config(model_type="llava"),
        config(model_type="clip"), config(num_key_value_heads=3), config(num_attention_heads=0),
        config(hidden_size="many"), config(vocab_size=-5), ("llama", dict(vocab_size=50))],
    "git lfs pull": [{"model.safetensors": LFS}],
    "chat_template": [{"chat_template.jinja": None}],
    "TemplateError('no system')": [{"chat_template.jinja": "{{ raise_exception('no system') }}"}],
    "missing": [config(num_hidden_layers=5), GONE],
    "unexpected": [config(num_hidden_layers=3), weights(new=torch.ones(3))],
    "mismatched": [config(intermediate_size=392), SMALLER],
    GATE: [GONE, SMALLER],
    "not finite": [NAN],
    "see later ones": [("bert", {})],
    "pass --max-length": [("gpt2", dict(n_positions=12, max_position_embeddings=12))],
    # what pairs.jsonl holds
    "it is empty": [[b""], [b"\n"]],
    "pairs.jsonl:1: not a pair": [
        [b'{"chosen": "\xff", "rejected": "b"}'], [b"\0" * 50], [json.dumps(TEXT).encode()[:-9]],
        [b'{"chosen":' * 10**5], [b"[1]", TEXT], [TEXT | {"rejected": 3}], [TEXT | {"prompt": 3}],
        [TEXT | {"rejected": [user("a")]}], [TURNS | {"chosen": []}],
        [TURNS | {"chosen": [{"role": "a"}]}], [TURNS | {"chosen": [user([{"text": "a"}])]}],
        [TEXT | {"chosen": "\ud800"}]],
    "pairs.jsonl:3: not a pair of texts or messages: KeyError": [[TEXT, b"", {"chosen": "a"}]],
    "tool_calls": [[TURNS | {"chosen": [CALL]}], [TURNS | {"prompt": [user("a"), CALL]}]],
    "must be a prompt up to the assistant's turn": [
        [dict.fromkeys(("chosen", "rejected"), [user("Hi.", "assistant"), user("a")])], [sides()],
        [TURNS | {"chosen": [user("fox")]}], [TURNS | {"prompt": [user("a", "assistant")]}],
        [TURNS | {"chosen": [user("a", "assistant"), user("b", "assistant")]}]],
    "for an empty prompt or response": [[TEXT | {"prompt": ""}]],
    # arguments
    "nowhere.jsonl: not loaded: No such": ["--data nowhere.jsonl", "--eval-data nowhere.jsonl"],
    "folder.jsonl: not loaded: Is a directory": ["--data folder.jsonl"],
    "not loaded: neither a .jsonl": ["--data pairs.txt", "--data pairs.jsonl.gz", "--data="],
    "--data is missing": [f"--model {TINY}"],
    "--gama: there is no such flag; did you mean --gamma?": ["--gama 1"],
    "did you mean mistral-7b-instruct?": ["--model mistral-7b-instuct --data pairs.jsonl"],
    "--model ./nowhere: not loaded": ["--model ./nowhere --data pairs.jsonl"],
    "invalid": ["--beta much", "--device abacus", "--dtype float8"],
    ": must be from": [
        "--beta 0", "--beta -2", "--batch-size 0", "--learning-rate inf", "--alpha nan",
        "--gamma -0.1", "--seed -1", "--eval-split 1"],
    ": must be below": ["--max-length 64 --max-prompt-length 64"],
    "torch sees no GPU": ["--device cuda", "--master-device cuda"],
    "rehearsal: ": ["--data pairs.jsonl --eval-split 0 --alpha 1e5"],
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


@cases("line, case", [(line, case) for line, row in BAD_INPUT.items() for case in row])
def test_bad_input_gets_one_line_and_status_2(line, case, capsys):
    shutil.copytree(TINY, "model", ignore=shutil.ignore_patterns("*.jsonl", "*.py", "__*"))
    if isinstance(case, tuple):
        small_model(case[0], **dict(vocab_size=640) | case[1]).save_pretrained("model")
    for name, content in case.items() if isinstance(case, dict) else ():
        path = Path("model", name)
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for name in ("pairs.jsonl", "pairs.txt", "pairs.jsonl.gz"):
        write_rows(case if isinstance(case, list) else [TURNS], name)
    Path("folder.jsonl/.partial-x").mkdir(parents=True)
    Path("link").symlink_to("dangling")
    args = "--model model --data pairs.jsonl --eval-split 0 --max-steps 1".split()
    error = ends_in_one_line(case.split() if isinstance(case, str) else args, line, capsys)
    if remedy := re.search(r"(--max-length) (\d+)", error):
        alphapo.main([*args, *remedy.groups()])
        assert Path("out/summary.json").exists()


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


def test_the_rehearsal_runs_the_largest_micro_batches_and_leaves_no_trace(monkeypatch):
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
    *rehearsal, before, step, after = calls
    assert before[0] is after[0] is False and step == (True, order)
    first, tokens = sum((x for _, x in rehearsal), []), alphapo.row_tokens(pairs, False)
    copies = np.clip(512 // tokens, 1, 8)
    sizes = np.stack([tokens, copies * tokens, copies * tokens**2])  # the last: of masks
    assert (sizes[:, first].max(1) == sizes.max(1)).all()
    assert all(first.count(i) == copies[i] for i in first)
    optimizer = alphapo.MasterAdamW(model, "cpu", torch.float32, "cpu", "cpu")
    run(model, pairs, order, LOSS, config, train=True)
    optimizer.step(config.learning_rate / 2, 1.0)
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
    alphapo.train(resolved(out="host_bf16", resume=True, **settings))  # after step 2
    assert metrics_of("first") == metrics_of("second") != metrics_of("seed")
    assert weights_of("first") == weights_of("second")
    tolerances = dict(plain=1e-4, split=1e-4, bf16=3e-2, host=2e-3, gpu=2e-3, host_bf16=3e-2)
    for name, tolerance in tolerances.items():
        assert_same_log(name, "first", tolerance)


def test_a_loss_of_your_own_decides_where_the_weights_go():
    def loss_fn(chosen, rejected, pairs, batch):
        assert len(batch) == len(chosen) and max(batch) < len(pairs)
        return chosen - rejected, chosen.detach(), rejected.detach()

    summary = alphapo.train(resolved(max_steps=4, batch_size=16), loss_fn)
    before, after = (summary[x]["eval_rewards/margins"] for x in ("before", "after"))
    assert after < before - 0.01


# ------------------------------------------------------------------------------------ the script
def run(args, code=0, launcher=(), umask=-1, **environment):
    """Run alphapo.py in a process of its own, without a network or a GPU."""
    command = [sys.executable, *launcher, ROOT / "alphapo.py", *args]
    quiet = dict(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1") | environment
    options = dict(env=os.environ | quiet, capture_output=True, text=True, umask=umask)
    done = subprocess.run(command, **options)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


def test_the_script_trains_improves_and_writes_what_it_says():
    args = "--max-steps 12 --dtype float32 --eval-every 6 --save-every 12".split()
    printed, out = run(args, umask=0o027).stdout, Path("out")
    log, summary = metrics_of(out), json.loads((out / "summary.json").read_text())
    evaluations = [metrics for metrics in log if "eval_loss" in metrics]
    steps = [metrics for metrics in log if "loss" in metrics]
    assert [metrics["step"] for metrics in evaluations] == [0, 6, 12] and len(steps) == 12
    rates = [1 / 3, 2 / 3, *((1 + math.cos(math.pi * i / 10)) / 2 for i in range(10))]
    assert [metrics["learning_rate"] / 2e-4 for metrics in steps] == pytest.approx(rates)
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


# -------------------------------------------------------------------------------- nothing is lost
def in_child(folder, args):
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open(f"{stream}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell ignores for what it runs with &
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
    """SIGKILL at twenty moments, every second one while a checkpoint is being written."""
    args = [*SHORT, "--max-steps", 24]
    assert exit_code(fork(*args, "--out", "whole")) == 0
    out, partial, inside = Path("killed"), Path("killed/.partial"), 0
    for kill in [*range(20), None]:
        child = fork(*args, "--out", out, *["--resume"] * bool(checkpoints(out)))
        if kill is not None:
            if kill % 2:
                wait_for(partial.exists)
            else:
                time.sleep(0.2 + kill / 20)
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


def test_what_ends_a_run_is_one_line_and_under_torchrun_names_torchrun(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["alphapo.py", "--data", "my pairs.jsonl"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    stopped, full = alphapo.Stopped(signal.SIGTERM, 7), torch.OutOfMemoryError("CUDA out of memory")
    for error, code, line in (
        (stopped, 143, "node 2 alphapo.py --data 'my pairs.jsonl' --resume"),
        (FloatingPointError("the end"), 1, "the end; lower --learning-rate"),
        (OSError(), 1, "OSError(); no checkpoint was saved"),
        (full, 1, "lower --micro-tokens"),
    ):
        monkeypatch.setattr(alphapo, "train", mock.Mock(side_effect=error))
        ends_in_one_line([], line, capsys, code)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of SHORT before its last write, and what it had after it: (folder, weights, log)."""
    folder = tmp_path_factory.mktemp("whole")
    alphapo.main([*SHORT, "--out", str(folder)])
    end = weights_of(folder), metrics_of(folder)
    for path in folder.iterdir():
        if path.is_file() and path.name != "metrics.jsonl":
            path.unlink()
    return folder, *end


@pytest.fixture
def stopped(whole):
    """A copy of that run in out, with what it has at its end."""
    return Path(shutil.copytree(whole[0], "out")), *whole[1:]


def test_another_run_is_not_the_continuation_of_this_one(stopped, capsys):
    out, *_ = stopped
    assert checkpoints(out) == ["checkpoint-000005", "checkpoint-000006"]
    rows = Path(EVAL).read_text().splitlines()
    Path("other.jsonl").write_text("\n".join(rows[::-1]))  # another order is another run
    changes = ["--batch-size 8", "--alpha 0.5", "--beta 3", "--gamma 0", "--seed 1"]
    changes += ["--warmup-ratio 0.2", "--data other.jsonl", f"--eval-data {EVAL}"]
    for flag, value in map(str.split, changes):
        name = "pairs_sha256" if "data" in flag else flag[2:].replace("-", "_")
        ends_in_one_line([*SHORT, "--resume", flag, value], f"--resume: {name} is ", capsys)
    ends_in_one_line(SHORT, "is not empty", capsys)
    lock = os.open(out, os.O_RDONLY)  # as a run at work in it does
    fcntl.flock(lock, fcntl.LOCK_EX)
    ends_in_one_line([*SHORT, "--resume"], "another run may be writing there", capsys)
    os.close(lock)


def test_the_learning_rate_may_change_and_the_same_data_have_many_names(stopped):
    out, final, log = stopped
    shutil.rmtree(out / NEWEST)
    shutil.copy(EVAL, "same.jsonl")
    alphapo.main([*SHORT, *"--resume --data same.jsonl --learning-rate 1e-3".split()])
    changes = " ".join(json.loads((out / "summary.json").read_text())["changes"])
    change = "learning_rate from 0.0002 to 0.001 after step 5"
    assert change in changes and change in (out / "README.md").read_text()
    assert metrics_of(out)[:6] == log[:6] and metrics_of(out)[6]["loss"] == log[6]["loss"]
    assert weights_of(out) != final


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


NEWEST, OTHER = "checkpoint-000006", save({"master": torch.ones(1)})
ACCIDENTS = {
    "nothing": lambda out, newest, file: None,
    "a file is cut": lambda out, newest, file: halve(file),
    "a file is missing": lambda out, newest, file: file.unlink(),
    "a file is another": lambda out, newest, file: file.write_bytes(OTHER),
    "the state is cut": lambda out, newest, file: halve(newest / "state.json"),
    "the state is no object": lambda out, newest, file: (newest / "state.json").write_text("[]"),
    "the last checkpoint is gone": lambda out, newest, file: shutil.rmtree(newest),
    "another's folder": lambda out, newest, file: (out / "checkpoint-000006.bak").mkdir(),
    "a save was killed": lambda out, newest, file: newest.rename(out / ".partial"),
    "the log is cut": lambda out, newest, file: halve(out / "metrics.jsonl"),
    "the log is gone": lambda out, newest, file: (out / "metrics.jsonl").unlink(),
}


@cases("accident", ACCIDENTS)
def test_a_run_reaches_the_same_end_whatever_happened(accident, stopped, monkeypatch, capsys):
    """Its picture fails, which no run is worth losing over, and every way to pickle is barred."""
    out, final, log = stopped
    ACCIDENTS[accident](out, out / NEWEST, next((out / NEWEST).glob("*.safetensors")))
    there = {*checkpoints(out), "checkpoint-000005", NEWEST}
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # makes its import fail
    for name in "torch.load torch.save pickle.load pickle.loads pickle.dump pickle.dumps".split():
        monkeypatch.setattr(name, None)
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


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(stopped, capsys):
    """A limit on the size of files stands in for the disk."""
    out, final, _ = stopped
    shutil.rmtree(out / NEWEST)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    with raises(SystemExit) as exit:
        alphapo.main([*SHORT, "--resume"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 1 and "File too large" in error and "--resume" in error
    assert checkpoints(out) == ["checkpoint-000005"]
    alphapo.main([*SHORT, "--resume"])  # space was made
    assert weights_of(out) == final and not (out / ".partial").exists()


def test_a_loss_that_is_not_finite_names_its_pair_and_keeps_the_checkpoints():
    log, places = Path("out/metrics.jsonl"), []

    def diverging(chosen, rejected, pairs, batch):
        losses, *rewards = LOSS(chosen, rejected)
        if log.exists() and log.read_text().count("\n") == 3:  # in step 3
            losses[2] = math.inf
            places.append(pairs[batch[2]].place)
        return losses, *rewards

    config = resolved(max_steps=6, batch_size=4, micro_tokens=10**4, save_every=1)
    with raises(FloatingPointError, match="step 3: ") as error:
        alphapo.train(config, diverging)
    assert f"not finite, at {places[0]}" in str(error.value)
    assert checkpoints("out") == ["checkpoint-000001", "checkpoint-000002"]


# -------------------------------------------------------------------------- processes and a GPU
@cases("dtype, steps, tolerance", [("float32", 6, 1e-5), ("bfloat16", 2, 3e-2)])
def test_two_processes_are_one_and_one_resumes_what_two_saved(dtype, steps, tolerance):
    """Over gloo, of a batch that does not divide evenly."""
    args = f"--max-steps {steps} --batch-size 13 --save-every 1 --dtype {dtype}".split()
    args += ["--data", EVAL]
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    run([*args, "--out", "two"], launcher=torchrun)
    assert exit_code(fork(*args, "--out", "one")) == 0
    assert_same_log("two", "one", tolerance)
    shutil.rmtree(f"two/checkpoint-{steps:06}")
    assert exit_code(fork(*args, "--out", "two", "--resume")) == 0, Path("2.txt").read_text()
    assert_same_log("two", "one", tolerance)
