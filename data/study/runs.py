# SPDX-License-Identifier: MIT
"""The runs of the study: one job is one training, measured, and one line in the results.

A job is a dict: kind ("map", "tuned", "start", "displacement", or one of real.py), method, alpha,
beta, gamma_beta, learning_rate and seed. Its line is the job and what was measured.
"""

import contextlib
import io
import json
import multiprocessing
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
import transformers
from dpo import ReferenceDPO
from judge import judge_answers
from tqdm import tqdm

import alphapo

# The runs of this setting keep their curve: it is a hard one, where log-probabilities fall.
HARD = dict(kind="map", method="AlphaPO", learning_rate=1e-3, gamma_beta=1.0, seed=1)


def read_jsonl(path):
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise alphapo.UserError(f"{path}:{number}: not a whole line of JSON") from error
    return rows


def find(results, **fields):
    """The results with these fields, by seed: lines stand in the order in which the runs ended."""
    found = [result for result in results if fields.items() <= result.items()]
    return sorted(found, key=lambda result: result["seed"])


def missing(jobs, results):
    """The jobs that have no line in the results yet."""
    return [job for job in jobs if not find(results, **job)]


def make_loss(job, config):
    """The loss of a job in the form that alphapo.train takes."""
    if job["method"] == "DPO":
        return ReferenceDPO(config, job["beta"])
    knobs = config.alpha, config.beta, config.gamma
    return lambda chosen, rejected, pairs, batch: alphapo.alphapo_loss(chosen, rejected, *knobs)


def train(job, work, **settings):
    """Train what a job says on the pairs in the work folder.

    Returns (summary, logps): what alphapo.train returns, and the log-probabilities of each held-out
    pair at each evaluation, (pairs, evaluations, 2): chosen, rejected.
    """
    files = dict(data=f"{work}/train.jsonl", eval_data=f"{work}/eval.jsonl", device="cpu")
    config = alphapo.Config(
        alpha=job.get("alpha", 0.0),
        beta=job["beta"],
        gamma=job["beta"] * job.get("gamma_beta", 0.0),
        learning_rate=job["learning_rate"],
        seed=job["seed"],
        **files | settings,
    )
    logps = {}  # by "file:line"

    def loss_fn(chosen_logps, rejected_logps, pairs, batch):
        if not torch.is_grad_enabled():  # an evaluation, and no training step
            for i, both in zip(batch, torch.stack([chosen_logps, rejected_logps], 1).tolist()):
                logps.setdefault(pairs[i].place, []).append(both)
        return loss(chosen_logps, rejected_logps, pairs, batch)

    # The workers share one terminal, and only the parent writes to it.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        loss = make_loss(job, config)
        summary = alphapo.train(config, loss_fn)
    return summary, np.array([logps[place] for place in sorted(logps)])


def run_tiny(job, work, model):
    """Train the tiny model and judge it. A job of kind "start" only judges it."""
    result = dict(job)
    answers = 2 if job["kind"] == "map" else 4
    has_curve = HARD.items() <= job.items()
    with tempfile.TemporaryDirectory(dir=work) as folder:
        if job["kind"] != "start":
            settings = dict(batch_size=32, epochs=2, dtype="float32")
            settings["eval_every"] = 6 if has_curve else None
            summary, _ = train(job, work, model=model, out=f"{folder}/out", **settings)
            model = f"{folder}/out"
            before, after = summary["before"], summary["after"]
            chosen, rejected = after["eval_logps/chosen"], after["eval_logps/rejected"]
            result["chosen_change"] = round(chosen - before["eval_logps/chosen"], 5)
            result["rejected_change"] = round(rejected - before["eval_logps/rejected"], 5)
            result["margin"] = round(chosen - rejected, 5)
            result["accuracy"] = round(after["eval_rewards/accuracies"], 5)
        if has_curve:
            keys = ("step", "eval_logps/chosen", "eval_logps/rejected")
            log = read_jsonl(f"{model}/metrics.jsonl")
            result["curve"] = [[round(m[key], 5) for key in keys] for m in log if keys[1] in m]
        if job["kind"] == "map":
            validation = read_jsonl(f"{work}/validation.jsonl")
            scores, _ = judge_answers(model, validation, answers, job["seed"])
            result["validation"] = round(float(np.mean(scores)), 5)
        held_out = read_jsonl(f"{work}/eval.jsonl")
        scores, length = judge_answers(model, held_out, answers, job["seed"])
    result["score"] = round(float(np.mean(scores)), 5)
    result["length"] = round(length, 3)
    if job["kind"] != "map":  # these are compared prompt by prompt
        result["scores"] = [round(score, 4) for score in scores]
    return result


def run_displacement(job, work, model):
    """Train a model on given pairs, and measure every held-out pair, since there is no judge."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        settings = dict(batch_size=16, epochs=1, max_length=1024, dtype="float32")
        _, logps = train(job, work, model=model, out=f"{folder}/out", **settings)
    before, after = logps[:, 0], logps[:, -1]  # (pairs, 2): chosen, rejected
    chosen_change, rejected_change = (after - before).T
    measures = dict(chosen_change=chosen_change, rejected_change=rejected_change)
    measures["margin"] = after[:, 0] - after[:, 1]
    return job | {key: values.round(4).tolist() for key, values in measures.items()}


def start_worker():
    """Use one thread: the number of threads decides how sums are split, and so how they round."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore, which a killed worker leaks
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def run_all(run, jobs, path, workers):
    """Run the jobs that the results lack, and append the line of each as soon as it ends."""
    jobs = missing(jobs, read_jsonl(path) if path.exists() else [])
    start = time.monotonic()
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the state of torch's threads
    pool = ProcessPoolExecutor(workers, spawn, start_worker)
    try:
        futures = [pool.submit(run, job) for job in jobs]
        for count, future in enumerate(as_completed(futures), 1):
            result = future.result()
            with open(path, "a") as file:
                file.write(json.dumps(result) + "\n")
            left = (time.monotonic() - start) / count * (len(jobs) - count) / 60
            short = {key: value for key, value in result.items() if not isinstance(value, list)}
            print(f"{count}/{len(jobs)}, {left:.0f} minutes left: {short}", flush=True)
    except BaseException:  # Ctrl-C, too: what runs now runs again when the study is resumed
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
