# SPDX-License-Identifier: MIT
"""The tests of alphapo.py: first what is true of the method, then in the order of the file."""

import contextlib
import json
import math
import multiprocessing.forkserver
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PYTHONPATH=os.path.dirname(__file__))

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers, processors
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import alphapo
from alphapo import TINY, UserError, alphapo_loss, alphapo_reward

ROOT = Path(__file__).resolve().parent
FORKS = multiprocessing.get_context("forkserver")  # each begins with alphapo imported
FORKS.set_forkserver_preload(["alphapo"])
multiprocessing.forkserver.ensure_running()  # now, or the import would take the time of a run


@pytest.fixture(autouse=True)
def an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------ the loss
BETA, GAMMA = 2.5, 0.25
CHOSEN = torch.tensor([-0.9, -1.2, -0.3, -2.0, -0.1], dtype=torch.float64)  # mean logps
REJECTED = torch.tensor([-1.1, -1.0, -1.6, -2.0, -3.0], dtype=torch.float64)


@pytest.mark.parametrize("alpha", [0.0, 1e-12, 1e-6, -1e-6, 1e-4, 1e-2, -1e-2])
def test_alpha_to_zero_is_simpo_and_the_distance_is_linear(alpha):
    """(1 - exp(-alpha x)) / alpha is x - alpha x²/2 + ..., and a loss has the slope exp(-loss) - 1.
    With exp in place of expm1, only four digits of a reward would be left at 1e-12."""
    simpo = -torch.log(torch.sigmoid(BETA * (CHOSEN - REJECTED) - GAMMA))
    losses, chosen_rewards, _ = alphapo_loss(CHOSEN, REJECTED, alpha, BETA, GAMMA)
    slopes = (torch.exp(-simpo) - 1) * BETA * (REJECTED**2 - CHOSEN**2) / 2
    near = dict(rtol=8 * abs(alpha), atol=2e-15)
    assert_close(losses - simpo, alpha * slopes, **near)
    assert_close(chosen_rewards - BETA * CHOSEN, -alpha * BETA * CHOSEN**2 / 2, **near)


@pytest.mark.parametrize("alpha", [-2.0, -0.25, 0.0, 1e-6, 0.25, 2.0])
def test_gradients_are_the_closed_form_and_equal_responses_have_the_loss_log_2(alpha):
    """Of a pair, alpha > 0 pushes the less likely response harder, alpha < 0 the likelier one."""
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    losses, chosen_rewards, rejected_rewards = alphapo_loss(chosen, rejected, alpha, BETA, GAMMA)
    losses.sum().backward()
    push = BETA * torch.sigmoid(rejected_rewards - chosen_rewards + GAMMA)
    assert not push.requires_grad
    assert_close(chosen.grad, -push * torch.exp(-alpha * CHOSEN))
    assert_close(rejected.grad, push * torch.exp(-alpha * REJECTED))
    assert_close(rejected.grad / -chosen.grad, torch.exp(alpha * (CHOSEN - REJECTED)))
    losses, _, _ = alphapo_loss(CHOSEN.float(), CHOSEN.float(), alpha, BETA, gamma=0.0)
    assert_close(losses, torch.full((5,), math.log(2)))


@pytest.mark.parametrize("alpha", [-1.0, -0.25, 0.25, 1.0])
def test_alpha_below_zero_bounds_the_reward_and_above_zero_it_falls_exponentially(alpha):
    rewards = alphapo_reward(torch.linspace(0, -9, 10), alpha)  # in float64, whatever the logps
    falls = rewards[:-1] - rewards[1:]  # from nat to nat
    assert rewards[0] == 0 and (falls > 0).all() and (alpha > 0 or rewards.min() > 1 / alpha)
    assert_close(falls[1:] / falls[:-1], torch.tensor(alpha).double().exp().expand(8))


def test_a_response_said_twice_has_the_same_reward():
    """By a model in which a token's probability depends on that token alone: a sum would double."""
    said, output = np.array([3, 8, 5]), SimpleNamespace(logits=torch.arange(9.0).expand(3 + 6, 9))
    pair = alphapo.Pair(np.array([1, 2]), said, np.append(said, said))
    once, twice = alphapo.pair_logps(lambda *_, **inputs: output, [pair], plain_rows=True)
    assert_close(once, output.logits[0].log_softmax(0)[said].mean()[None])
    assert_close(alphapo_reward(once, 0.25), alphapo_reward(twice, 0.25))


def test_shapes_that_would_broadcast_and_integers_are_refused():
    for chosen in (CHOSEN[:, None], CHOSEN[:1], CHOSEN[0], CHOSEN.long()):
        with pytest.raises(ValueError, match="one shape in floating point"):
            alphapo_loss(chosen, CHOSEN, 0.25, BETA, GAMMA)


@pytest.mark.parametrize("name", ["alphapo.py", "README.md"])
def test_the_loss_runs_with_torch_alone_when_it_is_copied(name):
    part = r"(?:- the loss|```python)\n(.*?)\n(?:# ---|```)"  # a section, or a block of code
    parts = re.findall(part, (ROOT / name).read_text(), re.S)
    exec(next(part for part in parts if "def alphapo_loss(" in part), copied := {"torch": torch})
    arguments = CHOSEN, REJECTED, 0.25, BETA, GAMMA
    assert_close(copied["alphapo_loss"](*arguments), alphapo_loss(*arguments), rtol=1e-14, atol=0)


# --------------------------------------------------------------- what several sections below use
# fmt: off
SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
WINDOWS = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"] * 2)
SHARED = {  # models for which shared rows are exact
    "llama": {}, "tied llama": dict(tie_word_embeddings=True), "qwen2": {}, "phi": {}, "phi3": {},
    "mistral": dict(sliding_window=None), "windows of 5, mistral": dict(sliding_window=5),
    "windows of 600, mistral": dict(sliding_window=600), "qwen3": dict(head_dim=8), "stablelm": {},
    "windows of 5, qwen2": WINDOWS | dict(use_sliding_window=True), "mixtral": EXPERTS,
    "gemma2": WINDOWS | dict(head_dim=8, final_logit_softcapping=2.0),
    "gemma3_text": WINDOWS | dict(head_dim=8), "gpt_oss": EXPERTS | WINDOWS | dict(head_dim=8),
    "granite": dict(logits_scaling=3.0), "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=256), "cohere": dict(logit_scale=0.25)}
PLAIN = {  # models whose layers carry a state, attend in chunks, or know distance otherwise
    "mamba": dict(state_size=4), "bloom": dict(n_head=4, n_layer=2), "falcon_h1": dict(
        mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1),
    "llama4_text": EXPERTS | dict(head_dim=8, intermediate_size_mlp=48, attention_chunk_size=8)}
# fmt: on


def small_model(name):
    """A random model, its weights large enough that soft caps, windows and biases show."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split()[-1], **SMALL | (SHARED | PLAIN).get(name, {}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for param in model.parameters():
        param.data += 0.1 * torch.randn_like(param)
    return model


def random_pairs(count=5):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 25, (count, 3))
    return [alphapo.Pair(*(rng.integers(3, 97, n, np.int32) for n in row)) for row in sizes]


def own_logps(model, pair):
    """Mean log-probability of each response: minus the model's own loss, with -100 as no label."""
    means = []
    for response in (pair.chosen, pair.rejected):
        ids = torch.tensor(np.append(pair.prompt, response))[None].long()
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(pair.prompt), -100)
        means.append(-model(input_ids=ids, labels=labels, use_cache=False).loss)
    return torch.stack(means)


EVAL = list(map(json.loads, (TINY / "eval.jsonl").read_text().splitlines()))
FLAGS = ["--data", f"{TINY}/eval.jsonl", *"--max-steps 4 --batch-size 5 --device cpu".split()]


def tiny_config(**settings):
    """Four steps of the tiny model on 294 pairs, with 6 held out."""
    return alphapo.resolve(alphapo.Config(**vars(alphapo.parse_arguments(FLAGS)) | settings))


def write_rows(rows, name="pairs.jsonl"):
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return name


def results(run):
    """What was logged, {(line, name): number} without times, generation settings and weights."""
    lines = enumerate(map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines()))
    log = {(i, name): x for i, line in lines for name, x in line.items() if "seconds" not in name}
    generation = Path(run, "generation_config.json").read_text()
    return log, generation, Path(run, "model.safetensors").read_bytes()


# -------------------------------------------------------------------- rows and log-probabilities
def test_a_pair_is_one_row_in_which_the_last_token_of_the_prompt_stands_twice():
    pair = alphapo.Pair(*map(np.array, ([11, 12, 13], [21, 22], [31, 32, 33])))
    input_ids, position_ids, segments, targets = alphapo.make_rows([pair])
    assert input_ids.tolist() == [[11, 12, 13, 21, 13, 31, 32, 0]]  # padded to a multiple of 8
    assert position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4, 0]]
    assert segments.tolist() == [[0, 0, 1, 1, 2, 2, 2, 0]]
    assert targets.tolist() == [21, 22, 31, 32, 33]  # what segments 1 and 2 predict
    assert [alphapo.pair_tokens(pair, plain_rows) for plain_rows in (False, True)] == [7, 2 * 5]
    masks = alphapo.attention_masks(SimpleNamespace(), position_ids, segments, torch.float32)
    seen = "1....... 11...... 111..... 1111.... 11..1... 11..11.. 11..111.".split()
    assert ["".join(".1"[int(x == 0)] for x in row) for row in masks[0, 0, :7]] == seen
    input_ids = alphapo.make_rows([pair], plain_rows=True)[0]
    assert input_ids.tolist() == [[11, 12, 13, 21, 0, 0, 0, 0], [11, 12, 13, 31, 32, 0, 0, 0]]


@pytest.mark.parametrize("name", [*SHARED, *PLAIN])
def test_rows_give_the_models_own_log_probabilities_and_where_not_the_check_finds_it(name):
    model, pairs = small_model(name), random_pairs()
    own = torch.stack([own_logps(model, pair) for pair in pairs])
    for plain_rows in (True, False) if name in SHARED else (True,):
        found = torch.stack(alphapo.pair_logps(model, pairs, plain_rows), 1)
        assert_close(found, own, rtol=2e-6, atol=0)
    reason, short, logps = alphapo.check_model(model, pairs)
    assert (reason is None) == (name in SHARED)
    assert_close(logps, own_logps(model, short), rtol=2e-6, atol=0)


# ------------------------------------------------------------------------------------ a step
@pytest.mark.parametrize("name", ["llama", "tied llama", "gemma2", "phi3", "gpt_oss"])
def test_a_step_is_autograd_of_the_models_own_forward_pass(name):
    """Every metric, by TRL's name, and every gradient; split, laid out or recomputed in any way."""

    def loss_fn(chosen_logps, rejected_logps, *_):
        return alphapo_loss(chosen_logps, rejected_logps, 0.25, BETA, GAMMA)

    assert alphapo.micro_batches([2, 0, 1, 3], [8, 6, 9, 5], 16) == [[2], [0, 1], [3]]
    model, pairs = small_model(name), random_pairs(9)
    logps = torch.stack([own_logps(model, pair) for pair in pairs], 1)
    losses, *rewards = loss_fn(*logps)
    losses.mean().backward()
    grads = {key: param.grad.clone() for key, param in model.named_parameters()}
    values = losses, *rewards, rewards[0] - rewards[1], rewards[0] > rewards[1], *logps
    names = "loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen"
    metrics = dict(zip([*names.split(), "logps/rejected"], torch.stack(values).mean(1).tolist()))
    alphapo.layers_of(model)[0].mlp.register_forward_pre_hook(lambda *_: runs.append(change))
    changes, runs = [{}, dict(plain_rows=True), dict(micro_tokens=1)], []
    for change in [*changes, again := dict(gradient_checkpointing=True)]:
        config = tiny_config(**dict(micro_tokens=90, offload="false") | change)
        model = alphapo.shard(model, None, config, pin_memory=False)
        model.zero_grad()
        with contextlib.ExitStack() as on_exit:
            alphapo.start_processes(config, on_exit)
            found = alphapo.run_pairs(model, pairs, range(9), loss_fn, config, training=True)
        assert found == pytest.approx(metrics, rel=1e-5, abs=1e-5)
        found = {key: param.grad for key, param in model.named_parameters()}
        assert_close(found, grads, rtol=1e-4, atol=1e-5)
    assert runs.count(again) == 2 * runs.count({})  # forward, and again before the backward pass


# ------------------------------------------------------------------------------------ settings
def test_flags_and_presets_are_those_of_help_and_of_the_paper(capsys):
    with pytest.raises(SystemExit, match="0"):
        alphapo.main(["--help"])
    flags = re.findall(r"\n  --([\w-]+)", capsys.readouterr().out)
    assert flags == [name.replace("_", "-") for name in vars(alphapo.Config())]
    paper = {"mistral-7b-instruct": (0.25, 2.5, 0.1, 7e-7), "gemma-2-9b-it": (0.1, 10, 0.5, 8e-7)}
    paper["llama-3-8b-instruct"] = (0.25, 10, 0.3, 1.1e-6)
    for name, knobs in paper.items():  # alpha, beta, gamma / beta and learning rate
        ours = alphapo.parse_arguments(["--model", name])
        assert (ours.alpha, ours.beta, ours.gamma / ours.beta, ours.learning_rate) == knobs
    assert alphapo.parse_arguments(["--data", "mine.jsonl"]).eval_data is None
    config = alphapo.resolve(alphapo.parse_arguments("--alpha 0.5 --max_steps 3 --plan".split()))
    changes = dict(alpha=0.5, max_steps=np.int64(3), plan="true", model=TINY)  # are converted
    assert config == alphapo.resolve(alphapo.Config(**alphapo.PRESETS["tiny"] | changes))


# ------------------------------------------------------------------------------------ pairs
BRIEF, USER = dict(role="system", content="Be brief."), dict(role="user", content="Say fox.")
FOX, OWL = ([dict(role="assistant", content=text)] for text in ("fox", "owl"))
BOTH = {"chosen": [USER, *FOX], "rejected": [USER, *OWL]}
SAY = "<|im_start|>user\nSay fox.<|im_end|>\n<|im_start|>assistant\n"
TEXT = {"prompt": SAY, "chosen": "fox", "rejected": "owl"}
SAME = (SAY, "fox<|im_end|>", "owl<|im_end|>")
SHAPES = [  # of rows that say the same
    BOTH,
    BOTH | {"prompt": [USER], "score": 3.5, "images": [], "messages": [USER]},
    BOTH | {"prompt": "Say fox."},  # as in UltraFeedback
    {"prompt": [USER], "chosen": FOX, "rejected": OWL},
    {"prompt": "Say fox.", "chosen": FOX, "rejected": OWL},
    {"prompt": SAY, "chosen": SAY + "fox", "rejected": SAY + "owl"},
    {"chosen": SAY + "fox<|im_end|>", "rejected": SAY + "owl<|im_end|>\n"},
]


def load(name, **settings):
    config = tiny_config(data=name, eval_split=0, **settings)
    tokenizer, pairs, _, notes, _ = alphapo.load_data(config)
    pairs = sorted(pairs, key=lambda pair: int(re.findall(r"\d+", pair.place)[-1]))
    return [tuple(tokenizer.decode(ids) for ids in pair[:3]) for pair in pairs], notes


def test_every_shape_of_row_and_every_kind_of_file_gives_the_same_tokens():
    assert load(write_rows(SHAPES)) == ([SAME] * len(SHAPES), {})
    write_rows([TEXT] * 3, "lines.json")
    Path("list.json").write_text("\ufeff" + json.dumps([TEXT] * 3, indent=1), "utf-8")
    datasets.Dataset.from_list([TEXT] * 3).to_parquet("pairs.parquet")
    for name in ("lines.json", "list.json", "pairs.parquet"):
        assert load(name) == ([SAME] * 3, {})
    write_rows([{"prompt": "Is <|im_end|> a token?", "chosen": FOX, "rejected": OWL}])
    (pair,) = alphapo.load_data(tiny_config(data="pairs.jsonl"))[1]
    assert pair.prompt.tolist().count(2) == 2  # it is, as at inference


def chat(begin, turn, start, answer, end=""):
    """A chat template: begin, a turn for each message, but start and answer for the assistant's."""
    turn = f"{{% if m.role == 'assistant' %}}{start}{answer}{{% else %}}{turn}{{% endif %}}"
    last = f"{{% if add_generation_prompt %}}{start}{{% else %}}{end}{{% endif %}}"
    template = f"{begin}{{% for m in messages %}}{turn}{{% endfor %}}{last}"
    return template.replace("ROLE", "{{ m.role }}").replace("TEXT", "{{ m.content }}")


# fmt: off
CHATML = "<|im_start|>ROLE\nTEXT<|im_end|>\n", "<|im_start|>assistant\n", "TEXT<|im_end|>\n"
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>ROLE<|end_header_id|>\n\nTEXT<|eot_id|>",
         "<|start_header_id|>assistant<|end_header_id|>\n\n", "{{ m.content | trim }}<|eot_id|>")
GEMMA = ("<bos>", "<start_of_turn>user\nTEXT<end_of_turn>\n", "<start_of_turn>model\n",
         "TEXT<end_of_turn>\n")
SYSTEM = "<start_of_turn>user\n{{ messages[0].content }}\n\nTEXT<end_of_turn>\n"
THOUGHT = "<think>\nA fox.\n</think>\n\n"
QWEN3 = chat("", CHATML[0], "<|im_start|>assistant\n{{ no_think if enable_thinking is false }}",
             "{{ m.content | replace('.</', '.\n</') }}<|im_end|>\n")
TEMPLATES = {  # small likenesses, and what is learnt of an answer: to the end of its turn
    "ChatML": (chat("", *CHATML), "fox<|im_end|>"),
    "Llama-3": (chat(*LLAMA), "fox<|eot_id|>"),
    "Llama-3, which first wrote a header at the end": (chat(*LLAMA, LLAMA[2]), "fox<|eot_id|>"),
    "Mistral v0.2": (chat("<s>", "[INST] TEXT [/INST]", "", "TEXT</s>"), "fox</s>"),
    "Gemma-2": (chat(*GEMMA), "fox<end_of_turn>"),
    "Gemma-3": (chat("<bos>", "{% if loop.index > 1 %}" + SYSTEM + "{% endif %}", *GEMMA[2:]),
                "fox<end_of_turn>"),
    "Phi-3": (chat("", "<|ROLE|>\nTEXT<|end|>\n", "<|assistant|>\n", "TEXT<|end|>\n",
                   "<|endoftext|>"), "fox<|end|>"),
    "Qwen2.5": (chat("<|im_start|>system\nYou are Qwen.<|im_end|>\n", *CHATML), "fox<|im_end|>"),
    "Qwen3": (QWEN3, THOUGHT + "fox<|im_end|>"),
    "Qwen3, not thinking": (QWEN3, "fox<|im_end|>"),
    "Zephyr": (chat("", "<|ROLE|>\nTEXT</s>\n", "<|assistant|>\n", "TEXT</s>\n"), "fox</s>"),
    "a tab where an answer is asked for": (chat("", "<|ROLE|>TEXT<|end|>",
        "<|assistant|>{{ '\t' if not loop }}", "TEXT<|end|>"), "fox<|end|>"),
    "gpt-oss": (chat("", "<|start|>ROLE<|message|>TEXT<|end|>", "<|start|>assistant",
        "<|channel|>final<|message|>TEXT<|return|>"), "<|channel|>final<|message|>fox<|return|>"),
    "Command-R7B": (chat("{{ tools }}", "<|START|><|ROLE|>TEXT<|STOP|>", "<|START|><|assistant|>",
        "<|RESPONSE|>TEXT<|END|><|STOP|>"), "<|RESPONSE|>fox<|END|><|STOP|>"),
}
# fmt: on


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_of_a_template(name):
    template, learnt = TEMPLATES[name]
    tokens = re.findall(r"<\|\w+\|>|<\w+_of_turn>|<bos>|</?s>", template)
    tokenizer = AutoTokenizer.from_pretrained(TINY, additional_special_tokens=tokens)
    tokenizer.chat_template = template
    tokenizer.save_pretrained("model")
    stops = [0, tokenizer.convert_tokens_to_ids(re.findall(r"<[^<]*>", learnt)[-1])]
    stops = stops[: 1 if name == "Zephyr" else 2]  # then a special token is where a turn ends
    Path("model/generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    prompt = [USER] if name in ("Mistral v0.2", "Qwen2.5") else [BRIEF, USER]
    answer = [FOX[0] | {"content": "<think>\nA fox.</think>\n\nfox"}] if name == "Qwen3" else FOX
    options = {"enable_thinking": "not" not in name, "no_think": "<think>\n\n</think>\n\n"}
    tools = [{"name": "hunt"}] if "tools" in template else None
    row = {"prompt": prompt, "chosen": answer, "rejected": OWL, "chat_template_kwargs": options}
    row["tools"] = json.dumps(tools)
    [(prompt_text, chosen, rejected)], _ = load(write_rows([row]), model="model")
    assert chosen == learnt and rejected == learnt.replace(THOUGHT, "").replace("fox", "owl")
    options |= {"tokenize": False, "add_generation_prompt": True, "tools": tools}
    assert prompt_text == tokenizer.apply_chat_template(prompt, **options).removesuffix("\t")


def test_a_response_and_what_follows_it_are_tokenized_together():
    """Some tokenizers put a prefix before all that they are given, as here a tilde."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("~")
    text, after = "<|im_start|>A fox. <|im_end|>\n", " <|im_end|>\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = alphapo.tokenize(tokenizer, alphapo.Endings({2}, {0, 1, 2}), text, after)
    assert found == ids[: ids.index(2) + 1] and "~" in tokenizer.decode(found)


def test_texts_are_tokenized_whole_begin_with_one_bos_end_with_eos_and_are_cut_where_too_long():
    """Each digit is a token, and " fox" is. Of twelve at most, a prompt that is cut keeps six."""
    bos, end = "<|im_start|>", "<|im_end|>"
    tokenizer = AutoTokenizer.from_pretrained(TINY, bos_token=bos)
    begin = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, 1)])
    tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.save_pretrained("model")
    cases = {
        ("Say f", "ox", "er"): (bos + "Say", " fox" + end, " fer" + end),
        (bos + "12", "3", "34"): (bos + "12", "3" + end, "34" + end),
        ("12345678", "9", "0"): (bos + "12345678", "9" + end, "0" + end),
        ("12345678", "44444", "5"): (bos + "45678", "44444" + end, "5" + end),
        ("12", "3" * 12, "4" * 12): (bos + "12", "3" * 9, "4" * 9),
    }
    rows = write_rows(dict(zip(TEXT, texts)) for texts in cases)
    texts, notes = load(rows, model="model", max_length=12)
    assert texts == list(cases.values()) and sorted(notes.values()) == [1, 1]  # both are counted


def test_pairs_that_cannot_teach_are_dropped_and_counted_and_some_are_held_out():
    text = {"prompt": "Write a word: un", "chosen": "happy", "rejected": "done"}
    changes = {"chosen": ""}, {"chosen": " \n"}, {"rejected": ""}, {"rejected": "<|im_end|>"}
    rows = [text | change for change in (*changes, {"rejected": "happy"}, {"prompt": ""})]
    rows.append({"chosen": "Say: ", "rejected": "Say: a"})
    config = tiny_config(data=write_rows(rows + [text] * 21), eval_split=0.2)
    _, pairs, held_out, notes, _ = alphapo.load_data(config)
    assert len(pairs) == 17 and len({pair.place for pair in pairs + held_out}) == 21
    empty, equal = sorted(notes)
    assert "empty" in empty and "equal" in equal and notes == {empty: 6, equal: 1}


# ------------------------------------------------------------------------------------ the model
def test_the_check_refuses_what_is_not_causal_or_not_finite_and_finds_another_window(monkeypatch):
    broken = small_model("llama")
    broken.lm_head.weight.data[7] = math.inf
    models = {small_model("bert"): "causal", small_model("roberta"): "causal", broken: "not finite"}
    for model, words in models.items():
        with pytest.raises(UserError, match=words):
            alphapo.check_model(model, random_pairs())
    model = small_model("windows of 600, mistral")
    long = random_pairs()[0]._replace(prompt=np.arange(900) % 97)  # longer than the window
    reason, pair, logps = alphapo.check_model(model, [long])
    assert reason is None and pair is long
    assert_close(logps, own_logps(model, long), rtol=2e-6, atol=0)
    own, no_window = alphapo.attention_masks, SimpleNamespace()
    monkeypatch.setattr(alphapo, "attention_masks", lambda _, *args: own(no_window, *args))
    assert "off by" in alphapo.check_model(model, [long])[0]
    assert len(alphapo.check_model(small_model("llama"), [long])[1].prompt) == 256  # a short one


# ------------------------------------------------------------------------------------ the plan
def test_weights_live_in_the_first_place_that_has_room(monkeypatch):
    with torch.device("meta"):
        mistral = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral"))  # of 7B
    config = alphapo.Config(device="cuda", dtype="bfloat16", gradient_checkpointing=True)
    for gpu, host, offload in (160, 64, "false"), (80, 128, "keep"), (24, 128, "layers"):  # GiB
        monkeypatch.setattr(alphapo, "free_memory", dict(cuda=gpu, cpu=host).get)
        place = alphapo.find_settings(config, mistral, random_pairs())
        assert place["settings"]["offload"] == offload and place["fits"]


def test_a_soft_cap_keeps_the_scores_of_every_head():
    """9.4 bytes of each were counted in a layer of Gemma-2; without them 9B seemed to fit 80 GB."""
    pair = alphapo.Pair(*[np.zeros(512, np.int32)] * 3)
    run = alphapo.Config(dtype="bfloat16", gradient_checkpointing=False, micro_tokens=2048)
    gemma, plain = (AutoConfig.for_model("gemma2", attn_logit_softcapping=x) for x in (50.0, None))
    models = SimpleNamespace(config=gemma), SimpleNamespace(config=plain)
    capped, uncapped = (alphapo.activation_memory(model, run, [pair]) for model in models)
    scores = 2048 * alphapo.pair_tokens(pair, False) * gemma.num_attention_heads
    found = (capped - uncapped) * alphapo.GIB / scores / gemma.num_hidden_layers
    assert 9.4 < found < 15


def test_a_plan_is_printed_and_writes_nothing(capsys):
    assert alphapo.train(tiny_config(plan=True)) is None
    assert "294 pairs" in (said := capsys.readouterr().out) and "--offload false" in said
    assert not os.listdir()


def test_a_run_without_room_is_refused_and_so_is_one_that_computes_with_other_weights(monkeypatch):
    full, own = SimpleNamespace(free=1), alphapo.shard

    def lose_a_weight(whole, *args):
        torch.nn.init.zeros_(whole.get_input_embeddings().weight)
        return own(whole, *args)

    faults = {
        "in memory": (alphapo, "free_memory", lambda _: 0.1),
        "log-probabilities": (alphapo, "shard", lose_a_weight),
        "disk": (shutil, "disk_usage", lambda _: full),
    }
    for words, fault in faults.items():
        with monkeypatch.context() as patch, pytest.raises(UserError, match=words):
            patch.setattr(*fault)
            alphapo.train(tiny_config())
        assert not os.listdir()


# ------------------------------------------------------------------------------------ checkpoints
LAST, BEFORE = Path("out/checkpoint-000004"), Path("out/checkpoint-000003")


@pytest.fixture
def stopped(tmp_path_factory):
    """Settings that resume a copy of a run which saved every step, and its results."""
    folder = tmp_path_factory.getbasetemp() / "whole"  # which the first test that asks fills
    settings = vars(tiny_config(model=folder / "model", out=folder / "out", save_every=1))
    if not folder.exists():
        shutil.copytree(TINY, folder / "model")
        template = "{{ strftime_now('%d %B') }}" + (TINY / "chat_template.jinja").read_text()
        (folder / "model/chat_template.jinja").write_text(template)
        alphapo.train(alphapo.Config(**settings))
        os.remove(folder / "out/summary.json")  # as if it had been killed before it wrote this
    shutil.copytree(folder / "out", "out")
    return settings | dict(out="out", resume=True), results(folder / "out")


@pytest.mark.parametrize("accident", ["older", "reshaped"])
@pytest.mark.parametrize("tensor", ["proj.weight", "exp_avg", ".step"])
def test_a_checkpoint_with_a_file_that_is_not_its_own_is_refused(accident, tensor, stopped):
    files = {name: path for path in LAST.glob("*.safetensors") for name in load_file(path)}
    path = files[min(name for name in files if name.endswith(tensor))]
    if accident == "older":
        shutil.copy(BEFORE / path.name, path)
    else:
        save_file({name: tensor[None] for name, tensor in load_file(path).items()}, path)
    with pytest.raises(UserError, match=f"{LAST}.*({tensor}|[Ss]ize|shape)") as error:
        alphapo.train(alphapo.Config(**stopped[0]))
    assert "ranks" not in str(error.value)  # but the reason


def test_another_run_is_not_the_continuation_of_this_one_but_another_day_is(stopped, monkeypatch):
    def refused(words, **changes):
        with pytest.raises(UserError, match=words):
            alphapo.train(alphapo.Config(**stopped[0] | changes))

    refused("rows", data=write_rows(EVAL[::-1]))
    refused("alpha", alpha=0.5)
    other = alphapo.make_skeleton(stopped[0]["model"])
    other.config.rms_norm_eps = 1e-5
    with monkeypatch.context() as patch:
        patch.setattr(alphapo, "make_skeleton", lambda name: other)
        refused("rms_norm_eps is 1e-05, and was 1e-06")
    refused("not empty", resume=False)
    with contextlib.ExitStack() as on_exit:
        alphapo.claim(tiny_config(resume=True), on_exit)  # as another run does that is at work
        refused("another run")
    state = json.loads((LAST / "state.json").read_text())
    (LAST / "state.json").write_text(json.dumps(state | dict(step=3)))
    refused(str(LAST))
    LAST.rename("out/.partial")  # as a kill amid a save leaves it
    day = SimpleNamespace(now=lambda: SimpleNamespace(strftime=lambda form: "29 February"))
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", day)
    summary = alphapo.train(alphapo.Config(**stopped[0] | dict(learning_rate=1e-3)))  # may change
    assert summary["config"]["learning_rate"] == 1e-3
    assert alphapo.checkpoints("out") == [LAST, BEFORE] and not os.path.exists("out/.partial")
    refused("finished run")


# ------------------------------------------------------------------------------------ training
def test_the_file_alone_in_an_empty_folder_makes_the_tiny_model_better_in_ten_steps():
    """Also with RANK set but no torchrun, and on a terminal that knows ASCII alone."""
    shutil.copy(ROOT / "alphapo.py", ".")
    shutil.copytree(TINY, "model")
    flags = "--model model --data model/train.jsonl --learning-rate 2e-4 --gamma 0.1 --eval-every 5"
    flags += " --max-steps 10 --batch-size 32 --device cpu --eval-data"
    command = [sys.executable, "alphapo.py", *flags.split(), write_rows(EVAL[:60])]
    environment = os.environ | dict(RANK="1", WORLD_SIZE="2", PYTHONIOENCODING="ascii")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("model is in out\n"), done.stderr
    before, after = map(json.loads(Path("out/summary.json").read_text()).get, ("before", "after"))
    assert after["eval_loss"] < before["eval_loss"] - 0.01
    assert f"{after['eval_loss']:.4f}" in done.stdout and Path("out/curves.png").exists()
    assert [evaluation["step"] for evaluation in alphapo.read_log("out")[1]] == [0, 5, 10]
    again = tiny_config(model="out", eval_data="pairs.jsonl", out="again", max_steps=1)
    assert alphapo.train(again)["before"] == pytest.approx(after, rel=1e-5)  # of what was written


def test_steps_are_clipped_adamw_along_the_gradients_of_their_pairs_epoch_by_epoch():
    shutil.copytree(TINY, "model", ignore=shutil.ignore_patterns("*.safetensors"))
    few = dict(data=write_rows(EVAL[:8]), eval_split=0, max_steps=3, save_every=3)
    config = tiny_config(model="model", **few, learning_rate=1e-3, max_grad_norm=0.5)
    alphapo.train(config, model=alphapo.load_model(TINY))
    pairs, model = alphapo.load_data(config)[1], alphapo.load_model(TINY)
    first, second = (np.random.default_rng([config.seed, epoch]).permutation(8) for epoch in (0, 1))
    optimizer, (log, *_) = torch.optim.AdamW(model.parameters(), weight_decay=0.0), results("out")
    steps = (first[:5], 5e-4), (first[5:], 1e-3), (second[:5], 5e-4)  # a warm-up, then a cosine
    for step, (batch, rate) in enumerate(steps, 1):
        logps = torch.stack([own_logps(model, pairs[i]) for i in batch], 1)
        alphapo_loss(*logps, config.alpha, config.beta, config.gamma)[0].mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        logged = [log[step, name] for name in ("pairs", "learning_rate", "grad_norm")]
        assert logged == pytest.approx([len(batch), rate, norm.item()], rel=1e-4)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    files = Path("out/checkpoint-000003").glob("*.safetensors")
    saved = {name: x for path in files for name, x in load_file(path).items()}
    for name, param in model.named_parameters():
        error = (saved[f"3.{name}"] - param).abs()  # largest where a gradient is near 0
        assert error.mean() < 1e-7


def test_sharded_weights_are_plain_to_the_bit_and_those_of_two_processes_to_rounding():
    """The fourth batch has one pair, and an evaluation three: too few for two processes."""
    few = dict(data=write_rows(EVAL[:16]), eval_data=write_rows(EVAL[16:19], "eval.jsonl"))
    shutil.copytree(TINY, "model")
    stops = dict(do_sample=True, top_p=0.9, eos_token_id=[2, 3])  # which config.json does not know
    Path("model/generation_config.json").write_text(json.dumps(stops))
    few |= dict(model="model", eval_every=1, save_every=2, micro_tokens=200)
    half = few | dict(dtype="bfloat16", max_steps=2)
    jobs = {name: few | dict(offload=name) for name in ("false", "keep", "layers")}
    jobs |= {f"half {name}": half | dict(offload=name) for name in ("keep", "layers")}
    jobs["resumed"] = few | dict(offload="keep", resume=True)
    write_rows([vars(tiny_config(out=name, **job)) for name, job in jobs.items()], "jobs.jsonl")
    Path("jobs.py").write_text("""if True:
        import alphapo, contextlib, json, os, shutil, signal
        def terminate_one(step, *_):
            os.kill(os.getpid(), signal.SIGTERM if alphapo.RANK and step == 1 else 0)
            return 1e-5
        alphapo.dist.init_process_group("gloo")  # for all, as a second would meet the first's keys
        for job in map(json.loads, open("jobs.jsonl")):
            for name in ("resumed", "by one") * (job["resume"] and alphapo.RANK == 0):
                shutil.copytree("keep/checkpoint-000002", f"{name}/checkpoint-000002")
                shutil.copy("keep/metrics.jsonl", name)
            alphapo.dist.barrier()
            alphapo.train(alphapo.Config(**job))
        alphapo.learning_rate_at = terminate_one
        with contextlib.suppress(alphapo.UserError):
            alphapo.train(alphapo.Config(**job | dict(out="ended", resume=False)))
        alphapo.main("--device cpu --data nowhere.jsonl".split())
    """)
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 jobs.py"
    two = subprocess.Popen(torchrun.split(), stderr=subprocess.PIPE, text=True)
    alphapo.train(tiny_config(out="one half", **half))
    for name, offload in ("one", "false"), ("one keep", "keep"), ("one layers", "layers"):
        alphapo.train(tiny_config(out=name, offload=offload, **few))
    assert results("one keep") == results("one layers") == results("one")
    error = two.communicate()[1]
    assert error.count("alphapo: nowhere.jsonl: not loaded") == 1, error  # one process speaks
    assert 'alphapo.py", line' not in error  # and none ends in a traceback
    alphapo.train(tiny_config(out="by one", resume=True, **few))
    assert results("resumed") == results("keep")
    assert alphapo.checkpoints("ended") == [Path("ended/checkpoint-000002")]  # and not 4
    for name in (*jobs, "by one"):
        one, tolerance = ("one half", 3e-2) if "half" in name else ("one", 1e-5)
        (ours, generation, _), (wanted, own, _) = results(name), results(one)
        assert generation == own and "top_p" in own
        assert ours == pytest.approx(wanted, rel=tolerance, abs=tolerance), name


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(stopped):
    out, kills = Path("killed").absolute(), 20 if os.environ.get("ALPHAPO_SLOW") else 6
    resumed = False
    for kill in range(kills + 1):
        if not alphapo.checkpoints(out):
            shutil.rmtree(out, ignore_errors=True)
        config = alphapo.Config(**stopped[0] | dict(out=out, resume=out.exists()))
        run = FORKS.Process(target=alphapo.train, args=(config,))
        run.start()
        before, partial = alphapo.checkpoints(out), out / ".partial"
        while run.is_alive():  # until a new checkpoint, every second time amid the save behind it
            if kill < kills and alphapo.checkpoints(out) != before:
                if kill % 2 == 0 or partial.exists():
                    break
            time.sleep(0.001)
        run.kill()
        run.join()
        if run.exitcode == 0:  # the last one, or one that ended before the blow
            assert results(out) == stopped[1]
            resumed |= config.resume
            shutil.rmtree(out)
    assert run.exitcode == 0 and resumed


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(name, monkeypatch, capsys):
    number, own = signal.Signals[name], alphapo.learning_rate_at

    def in_step_2(step, *args):
        os.kill(os.getpid(), number if step == 1 else 0)
        return own(step, *args)

    monkeypatch.setattr(alphapo, "learning_rate_at", in_step_2)
    monkeypatch.setattr(sys, "argv", ["alphapo.py", *FLAGS, "--out", "my out", "--plan", "false"])
    before = signal.signal(number, signal.SIG_DFL)  # which nohup ignores
    with pytest.raises(SystemExit, match=str(128 + number)):
        alphapo.main()
    assert signal.signal(number, before) == signal.SIG_DFL
    line = capsys.readouterr().err.splitlines()[-1]
    assert "after step 2 and saved" in line and "--resume" in line
    assert os.path.exists("my out/checkpoint-000002/state.json")


def test_a_loss_of_your_own_that_is_not_finite_names_its_step_and_its_pair():
    def loss_fn(chosen_logps, rejected_logps, pairs, batch):
        losses = chosen_logps - rejected_logps
        if fails():
            losses[-1] *= math.nan
            places.append(pairs[batch[-1]].place)
        return losses, chosen_logps.detach(), rejected_logps.detach()

    places, fails = [], lambda: not torch.is_grad_enabled()  # on held-out pairs, before any step
    with pytest.raises(FloatingPointError, match="not finite"):
        alphapo.train(tiny_config(), loss_fn)
    assert not os.listdir()  # so that the same command may be given again
    places, fails = [], Path("out/checkpoint-000002").exists
    with pytest.raises(FloatingPointError, match="step 3: ") as error:
        alphapo.train(tiny_config(save_every=1), loss_fn)
    assert str(sorted(places)) in str(error.value) and len(alphapo.checkpoints("out")) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", ["false", "keep", "layers"])
def test_gpu_runs_in_bfloat16_do_what_the_cpu_does_in_float32(offload):
    alphapo.train(tiny_config(out="cpu", eval_every=1))
    settings = dict(device="cuda", dtype="bfloat16", offload=offload, eval_every=1, save_every=2)
    for resume in (False, True):
        alphapo.train(tiny_config(out="gpu", resume=resume, **settings))
        assert results("gpu")[0] == pytest.approx(results("cpu")[0], rel=3e-2, abs=3e-2)
        shutil.rmtree("gpu/checkpoint-000004")
        os.remove("gpu/summary.json")


# ------------------------------------------------------------------------------------ command line
CONFIG = json.loads((TINY / "config.json").read_text())
# fmt: off
BAD_INPUT = [  # words of the line; bad flags, config, row, or template, which loses these words
    ("nowhere.jsonl", "--data nowhere.jsonl --out link"), ("rehearsal", "--alpha 1e5"),
    ("mistral-7b-instruct", "--model mistral-7b-instuct"), ("--epochs 1.5", "--epochs 1.5"),
    ("--gama", "--gama 1"), ("--beta -2", "--beta -2"), ("adapter", "--model adapter"),
    ("safetensors", "--model pointer"), ("--out model: is not empty", "--out model"),
    ("--out pairs.jsonl: ", "--out pairs.jsonl"),
    ("--resume: out has no", "--resume"), ("'history'", [BOTH | {"history": [BRIEF]}]),
    ("missing", dict(num_hidden_layers=5)), ("unexpected", dict(num_hidden_layers=3)),
    ("mismatched", dict(intermediate_size=392)), ("-length 16", dict(max_position_embeddings=16)),
    ("beyond the embedding", dict(vocab_size=9)),
    ("quantized", dict(quantization_config=dict(quant_method="fp8"))),
    ("'Be brief.", chat("", "{{ m.content if m.role == 'user' }}", "", "TEXT")),
    ("'Be brief.", chat("", "[INST] {{ messages[0].content if loop.last }}TEXT", "", "TEXT")),
    ("'<think>", chat("", "TEXT", "{{ '<think>' if not loop }}", "TEXT")),
    ("A fox.", chat("", "TEXT", "", "{{ m.content.split('</think>')[-1] }}")),
    ("pairs.jsonl:1: 'question'", [{"question": "Q?", "chosen": "a", "rejected": "b"}]),
    ("'system'", [{"prompt": "a", "chosen": "b", "rejected": "c", "system": "Be brief."}]),
    ("'images'", [BOTH | {"images": ["fox.png"]}]), ("tools", [BOTH | {"tools": [{"name": "f"}]}]),
    ("messages as text", [{"chosen": "[{'role': 'user', 'content': 'a'}]", "rejected": "b"}]),
    ("'from'", [{side: [{"from": "human", "value": "a"}] for side in BOTH}]),
    ("one assistant", [BOTH | {"chosen": [USER]}]), ("'label'", [{"prompt": "a", "label": True}]),
]
# fmt: on


@pytest.mark.parametrize("words, bad", BAD_INPUT)
def test_bad_input_is_one_line_and_status_2_and_nothing_is_written(words, bad, capsys):
    for name in ("model", "adapter", "pointer"):
        shutil.copytree(TINY, name)
    Path("adapter/adapter_config.json").write_text("{}")
    Path("empty").mkdir()
    Path("link").symlink_to("empty")
    Path("pointer/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    thinks = {"chosen": [FOX[0] | {"content": THOUGHT + "fox"}], "rejected": OWL}
    write_rows(bad if isinstance(bad, list) else [{"prompt": [BRIEF, USER]} | thinks])
    flags = "--model model --data pairs.jsonl --eval-split 0 --device cpu".split()
    if isinstance(bad, dict):
        Path("model/config.json").write_text(json.dumps(CONFIG | bad))
    elif "{%" in bad:
        Path("model/chat_template.jinja").write_text(bad)
    elif isinstance(bad, str):
        flags += bad.split()
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        alphapo.main(flags)
    _, line = capsys.readouterr().err.strip().split("alphapo: ")  # behind what tqdm has erased
    assert words in line and "\n" not in line
    assert sorted(Path().rglob("*")) == before
