# SPDX-License-Identifier: MIT
"""The tests of data/: the tiny pairs and their judge, DPO, and the study. CI=1 adds a slow one."""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import huggingface_hub
import pytest
import torch

DATA = Path(__file__).resolve().parent
TINY, STUDY = DATA / "tiny", DATA / "study"
sys.path[:0] = [str(TINY), str(STUDY), str(DATA.parent)]  # nothing of this is installed

import dpo  # noqa: E402
import judge  # noqa: E402
import real  # noqa: E402
import runs  # noqa: E402
import study  # noqa: E402

import alphapo  # noqa: E402


@pytest.fixture(autouse=True)
def on_a_cpu_without_a_network(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------ tiny
def test_the_tiny_pairs_are_what_their_judge_says():
    for name, count in (("train.jsonl", 2000), ("eval.jsonl", 300)):
        rows = runs.read_jsonl(TINY / name)
        assert len(rows) == count
        for row in rows:
            answers = (row[key][0]["content"] for key in ("chosen", "rejected"))
            best, worst = (judge.judge(row["kind"], row["reference"], answer) for answer in answers)
            assert [round(best, 3), round(worst, 3)] == row["scores"] and best > worst


def test_dpo_is_its_closed_form_and_starts_at_log_2():
    logps = -9 * torch.rand(4, 8, dtype=torch.float64)
    logps.requires_grad_()
    losses, chosen_rewards, rejected_rewards = dpo.dpo_loss(*logps, 0.1)
    margin = 0.1 * ((logps[0] - logps[2]) - (logps[1] - logps[3])).detach()
    torch.testing.assert_close(losses, (1 + (-margin).exp()).log())
    torch.testing.assert_close(chosen_rewards - rejected_rewards, margin)
    push = 0.1 / (1 + margin.exp())
    found = torch.autograd.grad(losses.sum(), logps)[0][:2]
    torch.testing.assert_close(found, torch.stack([-push, push]))
    for name in ("train", "eval"):
        lines = (TINY / f"{name}.jsonl").read_text().splitlines(keepends=True)
        Path(f"{name}.jsonl").write_text("".join(lines[:64]))
    job = dict(method="DPO", beta=0.1, learning_rate=1e-3, seed=1)
    summary, logps = runs.train(job, ".", model=str(TINY), out="out", batch_size=16)
    before, after = summary["before"], summary["after"]
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert after["eval_loss"] < before["eval_loss"] and logps.shape == (64, 2, 2)
    assert logps[:, 1, 0].mean() == pytest.approx(after["eval_logps/chosen"])


# ------------------------------------------------------------------------------------ the study
def test_the_tables_of_the_study_are_computed_from_its_results():
    text = (STUDY / "README.md").read_text()
    tables = study.tables(study.Study(), runs.read_jsonl(STUDY / "results.jsonl"))
    assert {"map", "tuned", "displacement"} <= tables.keys()
    for name, table in tables.items():
        assert f"<!-- table:{name} -->\n{table}\n<!-- end -->" in text


def call_study(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["study.py", *map(str, words)])
    study.main()


def test_curves_are_drawn_and_a_folder_without_a_run_is_named(monkeypatch, capsys):
    for run in ("a", "b"):
        Path(run).mkdir()
        metrics = dict.fromkeys([*alphapo.METRICS, "grad_norm"], 1.0)
        held_out = {f"eval_{key}": value for key, value in metrics.items()}
        lines = [dict(step=0) | held_out, dict(step=1) | metrics, dict(step=2) | metrics]
        Path(run, "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for given in (["a"], ["a", "b"]):
        call_study(monkeypatch, "plot", *given, "--out", f"{len(given)}.svg")
    assert Path("2.svg").stat().st_size > 10_000 < Path("1.svg").stat().st_size
    with pytest.raises(SystemExit, match="2"):
        call_study(monkeypatch, "plot", "nowhere")
    assert capsys.readouterr().err.startswith("study: nowhere: not a folder")


@pytest.mark.skipif(not os.environ.get("CI"), reason="takes a minute; CI=1 runs it")
def test_the_quick_study_runs_whole_in_worker_processes():
    command = [sys.executable, STUDY / "study.py", "--quick", "--out", "quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "score − SimPO's" in done.stdout and len(list(Path("quick/figures").glob("*.svg"))) == 4


# ------------------------------------------------------------------------------------ a real model
def test_prompts_come_from_the_seed_and_their_parts_share_no_content():
    counts = dict(train=120, validation=60, held_out=60)
    parts = real.make_prompts(counts, seed=3)
    assert parts == real.make_prompts(counts, seed=3) != real.make_prompts(counts, seed=4)
    assert {name: len(prompts) for name, prompts in parts.items()} == counts
    contents = []
    for prompts in parts.values():
        checks = [check for prompt in prompts for check in prompt["checks"]]
        values = {
            value for kind, *values in checks if kind in ("with", "order") for value in values
        }
        contents.append(values)
        assert len({kind for kind, *_ in checks}) == 10  # all kinds of instruction
    assert all(not a & b for a in contents for b in contents if a is not b)


VERIFIED = [
    (["sentences", 2], "It is old. Is it?", "It is old. Is it"),
    (["sentences", 1], 'He says "no."', "One. Two."),
    (["words", 2, 3], "two words", "these are too many"),
    (["lines", 2], "- a\n- b\n", "- a\nb"),
    (["with", "bridges"], "A bridge's end", "An abridged end"),
    (["without", "the"], "Then others", "Say it to The cat"),
    (["order", "old", "green"], "An old and green hat", "A green and old hat"),
    (["letter", "B"], '"bees"', "The bees"),
    (["end", "?"], "Why? \n", "Why? So."),
    (["case", "capital"], "ALL 5", "ALL five"),
    (["case", "small"], "all", "All"),
    (["language", "French"], "Les chats sont dans la maison.", "The cats are in the house, la la."),
    (["language", "German"], "Der Hund ist nicht müde.", "El perro es un animal."),
]


@pytest.mark.parametrize("check, right, wrong", VERIFIED)
def test_instructions_are_verified(check, right, wrong):
    assert real.holds(check, right) and not real.holds(check, wrong)


def test_scores_are_shares_and_loops_empty_and_cut_answers_score_less():
    checks = [["with", "cats"], ["words", 1, 20], ["letter", "D"]]
    assert real.score(checks, "A cat.") == pytest.approx(2 / 3)
    assert real.score(checks, "A cat.", ended=False) == pytest.approx(1 / 3)
    for bad in ("", " .\n", "a cat is a cat is a cat is a cat", "Dcat " + "ha" * 8):
        assert real.score(checks, bad) == 0
    prompt = dict(prompt="Cats?", checks=[["with", "cats"], ["letter", "D"]])
    answers = [["Do cats", 64, False], ["Dogs", 1, True], ["", 0, True], ["A fox", 2, True]]
    (pair,) = real.make_pairs([prompt], {"Cats?": answers}, 9)
    sides = [pair[side][0]["content"] for side in ("chosen", "rejected")]
    assert sides == ["Dogs", "A fox"] and pair["scores"] == [0.5, 0.0]


class InThisProcess:
    """In place of a pool of workers, each of which would import torch first."""

    def __init__(self, *args):
        pass

    def submit(self, run, job):
        future = Future()
        future.set_result(run(job))
        return future

    def shutdown(self, cancel_futures):
        pass


def test_the_real_study_runs_whole_and_a_lost_line_comes_again(monkeypatch, capsys):
    monkeypatch.setattr(runs, "ProcessPoolExecutor", InThisProcess)
    words = ["--quick", "--out", "quick", "real", str(TINY)]
    call_study(monkeypatch, *words)
    answers, results = Path("quick/answers.jsonl"), Path("quick/quick.jsonl")
    lines, kept = results.read_text().splitlines(), answers.read_text()
    kinds = sorted(json.loads(line)["kind"] for line in lines)
    assert kinds == ["real-map"] * 2 + ["real-start"] + ["real-tuned"] * 2
    tables = capsys.readouterr().out.partition("\nreal\n")[2]
    assert "before training" in tables and "α 0 (SimPO)" in tables and "DPO" in tables
    results.write_text("\n".join(lines[1:]) + "\n")
    answers.unlink()
    call_study(monkeypatch, *words)
    assert results.read_text().splitlines() == [*lines[1:], lines[0]]
    assert answers.read_text() == kept and capsys.readouterr().out.endswith(tables)
