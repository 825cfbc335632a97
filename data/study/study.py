# SPDX-License-Identifier: MIT
"""What alpha does: models trained over a grid of settings and judged by a program.

    python data/study/study.py                                # the tiny model, 90 minutes
    python data/study/study.py --quick                        # a few short runs: a minute
    python data/study/study.py figures                        # draw and tabulate the kept runs
    python data/study/study.py plot RUN... --out curves.png   # curves of runs of your own
    python data/study/study.py real MODEL                     # a real model, 3 hours
    python data/study/study.py displacement MODEL PAIRS.jsonl # a real model on given pairs

The map trains every method at every cell of a grid. The tuned comparison takes each method's best
cell by the score on validation prompts, trains fresh seeds there, and judges them on held-out
prompts, which take no part in that choice. A command that was stopped goes on when it is given
again. What came out is in README.md beside this file.
"""

import argparse
import json
import os
import re
import signal
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

# Python looks for modules beside the script that it runs, and nothing of this project is installed:
# judge.py is in data/tiny, and alphapo.py two folders up.
HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "tiny"
sys.path[:0] = [str(HERE), str(TINY), str(HERE.parents[1])]
import real  # noqa: E402
from draw import draw_all, plot_curves  # noqa: E402
from runs import find, missing, read_jsonl, run_all, run_displacement, run_tiny  # noqa: E402

import alphapo  # noqa: E402

BETA = 2.5
SIMPO = "α 0 (SimPO)"
GIVEN_HELD_OUT, GIVEN_TRAIN = 128, 256  # of given pairs; the file's first are held out


@dataclass(frozen=True)
class Study:
    """The grid. Each method has as many cells as the others: the same budget for tuning."""

    alphas: tuple = (-1.0, -0.25, 0.0, 0.25, 1.0)
    learning_rates: tuple = (3e-4, 1e-3, 3e-3)
    gamma_betas: tuple = (0.04, 0.5, 1.0)
    dpo_betas: tuple = (0.01, 0.1, 0.5)
    seeds: tuple = (1, 2, 3)
    fresh_seeds: tuple = (11, 12, 13, 14, 15)
    validation: int = 200  # prompts: those of the first pairs of train.jsonl
    train: int = 1800  # pairs behind these, for two epochs in batches of 32
    held_out: int = 300  # prompts and pairs of eval.jsonl
    model: str = ""  # the name of a real model, which makes its pairs from prompts of its own
    train_prompts: int = 0

    def job(self, stage, **fields):
        """What identifies runs of a stage, which is "map", "tuned" or "start"."""
        if self.model:
            return dict(kind=f"real-{stage}", model=self.model) | fields
        return dict(kind=stage) | fields

    def cells(self):
        """{method: its cells}. A cell with a seed defines a run."""
        cells = {}
        for alpha in self.alphas:
            cells[SIMPO if alpha == 0 else f"α {alpha:g}"] = [
                dict(method="AlphaPO", alpha=alpha, beta=BETA, gamma_beta=ratio, learning_rate=rate)
                for ratio in self.gamma_betas
                for rate in self.learning_rates
            ]
        cells["DPO"] = [
            dict(method="DPO", beta=beta, learning_rate=rate)
            for beta in self.dpo_betas
            for rate in self.learning_rates
        ]
        return cells


QUICK = Study(
    alphas=(-1.0, 0.0),
    learning_rates=(1e-3,),
    gamma_betas=(1.0,),
    dpo_betas=(0.5,),
    seeds=(1,),
    fresh_seeds=(11,),
    validation=20,
    train=128,
    held_out=40,
)


# A real model: γ/β is the middle one of the paper's three, and only learning rates are tuned.
REAL = Study(
    alphas=(-1.0, 0.0, 0.25, 1.0),
    learning_rates=(1e-4, 3e-4),
    gamma_betas=(0.3,),
    dpo_betas=(0.1,),
    seeds=(1,),
    fresh_seeds=(11, 12, 13),
    train_prompts=400,
    train=80,
    validation=80,
    held_out=160,
)
QUICK_REAL = replace(
    REAL,
    alphas=(0.0,),
    learning_rates=(1e-4,),
    fresh_seeds=(11,),
    train_prompts=10,
    train=4,
    validation=2,
    held_out=8,
)


def map_jobs(study):
    """The whole grid for one seed after the other, so that a part of the runs is a map too."""
    cells = sum(study.cells().values(), [])
    return [study.job("map", **cell, seed=seed) for seed in study.seeds for cell in cells]


def tuned_jobs(study, results):
    """Fresh seeds at the best cell of each method, and the model before training with the same: one
    seed after the other, so that a part of the runs compares all methods."""
    cells = [best_cell(study, results, cells)[0] for cells in study.cells().values()]
    jobs = []
    for seed in study.fresh_seeds:
        jobs += [study.job("start", seed=seed)]
        jobs += [study.job("tuned", **cell, seed=seed) for cell in cells]
    return jobs


def is_complete(study, results):
    jobs = map_jobs(study)
    return not missing(jobs, results) and not missing(tuned_jobs(study, results), results)


def write_lines(work, name, lines):
    Path(work, name).write_text("".join(lines))


def write_rows(work, name, rows):
    write_lines(work, name, [json.dumps(row) + "\n" for row in rows])


def run_study(study, path, workers):
    train_lines = (TINY / "train.jsonl").read_text().splitlines(keepends=True)
    eval_lines = (TINY / "eval.jsonl").read_text().splitlines(keepends=True)
    with tempfile.TemporaryDirectory() as work:
        write_lines(work, "validation.jsonl", train_lines[: study.validation])
        write_lines(work, "train.jsonl", train_lines[study.validation :][: study.train])
        write_lines(work, "eval.jsonl", eval_lines[: study.held_out])
        run = partial(run_tiny, work=work, model=str(TINY))
        run_all(run, map_jobs(study), path, workers)
        run_all(run, tuned_jobs(study, read_jsonl(path)), path, workers)


def run_real_study(study, args, path):
    """Make prompts, let the model answer them, make pairs of its answers, train and judge."""
    counts = dict(train=study.train_prompts, validation=study.validation)
    prompts = real.make_prompts(counts | {"held out": study.held_out}, real.SEED)
    args.work.mkdir(parents=True, exist_ok=True)
    kept, jobs = args.work / "answers.jsonl", real.sampling_jobs(study.model, prompts)
    run_all(partial(real.run_sampling, folder=args.model), jobs, kept, args.workers)
    lines = [find(read_jsonl(kept), **job)[0] for job in jobs]
    answers = {p: own for line in lines for p, own in zip(line["prompts"], line["answers"])}
    with tempfile.TemporaryDirectory() as work:
        for name, part, count in ("train", "train", study.train), ("eval", "held out", real.EVAL):
            pairs = real.make_pairs(prompts[part], answers, count)
            print(f"{len(pairs)} pairs from the {len(prompts[part])} prompts {part}")
            write_rows(work, f"{name}.jsonl", pairs)
        write_rows(work, "validation.jsonl", prompts["validation"])
        write_rows(work, "eval_prompts.jsonl", prompts["held out"])
        run = partial(real.run_real, work=work, folder=args.model)
        run_all(run, map_jobs(study), path, args.workers)
        run_all(run, tuned_jobs(study, read_jsonl(path)), path, args.workers)


def run_given_pairs(args, path):
    """Train each alpha with each seed on the pairs behind the file's first, which are held out."""
    lines = args.pairs.read_text().splitlines(keepends=True)
    if len(lines) < GIVEN_HELD_OUT + GIVEN_TRAIN:
        need = f"{GIVEN_HELD_OUT} + {GIVEN_TRAIN} are needed"
        fail(f"{args.pairs}: has {len(lines)} pairs, and {need}")
    names = dict(model=Path(args.model).resolve().name, pairs=args.pairs.name)
    setting = dict(beta=BETA, gamma_beta=args.gamma_beta, learning_rate=args.learning_rate)
    jobs = [
        dict(kind="displacement", method="AlphaPO", **names, alpha=alpha, **setting, seed=seed)
        for seed in args.seeds
        for alpha in args.alphas
    ]
    with tempfile.TemporaryDirectory() as work:
        write_lines(work, "eval.jsonl", lines[:GIVEN_HELD_OUT])
        write_lines(work, "train.jsonl", lines[GIVEN_HELD_OUT:][:GIVEN_TRAIN])
        run_all(partial(run_displacement, work=work, model=args.model), jobs, path, args.workers)


# ------------------------------------------------------------------------------------ statistics


def best_cell(study, results, cells):
    """The cell with the best mean validation score over the seeds of the map, and that score."""
    runs = [find(results, **study.job("map", **cell)) for cell in cells]
    scores = [np.mean([run["validation"] for run in own]) for own in runs]
    best = int(np.argmax(scores))
    return cells[best], scores[best]


def bootstrap(values, resamples=10_000):
    """Mean and 95 % interval of values (seeds, prompts), as text.

    Each resample draws seeds, and prompts, with replacement. A prompt is drawn for all seeds at
    once, since all seeds answer the same prompts: drawn for each seed apart, the luck of having
    these prompts would average out over seeds, and the interval would be too narrow.
    """
    values = np.asarray(values)
    seeds, prompts = values.shape
    rng = np.random.default_rng(0)
    seed_counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples)
    prompt_counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), resamples)
    means = ((seed_counts @ values) * prompt_counts).sum(1) / values.size  # (resamples,)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def student(values, digits=3):
    """Mean over seeds and half width of its 95 % interval by Student's t, as text."""
    if len(values) < 2:
        return f"{np.mean(values):.{digits}f}"
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}[len(values)]  # by number of seeds
    half = t * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.{digits}f} ± {half:.{digits}f}"


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


PLACE = ["method", "learning rate", "γ/β (DPO: β)", "validation"]
CHANGES = {"change of chosen": "chosen_change", "change of rejected": "rejected_change"}
MEASURES = {"tokens": "length", "accuracy": "accuracy"} | CHANGES
REAL_MEASURES = {"tokens": "lengths", "loops": "loops"} | CHANGES


def place(method, cell):
    return [method, f"{cell['learning_rate']:g}", f"{cell.get('gamma_beta', cell['beta']):g}"]


def map_table(study, results):
    """Means over the seeds of every cell."""
    rows = []
    for method, cells in study.cells().items():
        for cell in cells:
            runs = find(results, **study.job("map", **cell))
            keys = ["validation", "score", *MEASURES.values()]
            rows.append(place(method, cell) + [student([run[key] for run in runs]) for key in keys])
    return markdown([*PLACE, "score", *MEASURES], rows)


def tuned_table(study, results):
    """The fresh seeds of every method, with differences to SimPO by seed and prompt, or pair."""
    measures = REAL_MEASURES if study.model else MEASURES
    simpo, _ = best_cell(study, results, study.cells()[SIMPO])
    simpo_runs = find(results, **study.job("tuned", **simpo))

    def figure(runs, key, minus_simpo=False):
        if key not in runs[0] or (minus_simpo and runs == simpo_runs):
            return ""
        values = np.array([run[key] for run in runs])  # (seeds,) or (seeds, prompts)
        if minus_simpo:
            values = values - [run[key] for run in simpo_runs]
        return bootstrap(values) if values.ndim == 2 else student(values)

    def figures(runs):
        row = [figure(runs, "scores"), figure(runs, "scores", minus_simpo=True)]
        row += [figure(runs, key) for key in measures.values()]
        return row + [figure(runs, "chosen_change", minus_simpo=True)] * bool(study.model)

    rows = [["before training", "", "", "", *figures(find(results, **study.job("start")))]]
    for method, cells in study.cells().items():
        cell, validation = best_cell(study, results, cells)
        runs = find(results, **study.job("tuned", **cell))
        rows.append([*place(method, cell), f"{validation:.3f}", *figures(runs)])
    header = [*PLACE, "score", "score − SimPO's", *measures]
    return markdown(header + ["change of chosen − SimPO's"] * bool(study.model), rows)


def displacement_table(results):
    """The held-out pairs of the real model: each measure has a value for each seed and pair."""
    rows = []
    runs = find(results, kind="displacement")
    settings = {(run["learning_rate"], run["gamma_beta"], run["alpha"]) for run in runs}
    for rate, ratio, alpha in sorted(settings):
        setting = dict(learning_rate=rate, gamma_beta=ratio)
        own = find(runs, **setting, alpha=alpha)
        simpo = find(runs, **setting, alpha=0.0)
        margin = np.array([run["margin"] for run in own])  # (seeds, pairs)
        chosen = np.array([run["chosen_change"] for run in own])
        rejected = np.array([run["rejected_change"] for run in own])
        row = [f"α {alpha:g}", f"{rate:g}", f"{ratio:g}", bootstrap(margin > 0), bootstrap(margin)]
        row += [bootstrap(chosen), bootstrap(rejected), ""]
        if alpha != 0 and [run["seed"] for run in own] == [run["seed"] for run in simpo]:
            row[-1] = bootstrap(chosen - [run["chosen_change"] for run in simpo])
        rows.append(row)
    header = ["method", "learning rate", "γ/β", "accuracy", "margin of logps", *CHANGES]
    return markdown([*header, "change of chosen − SimPO's"], rows)


# ------------------------------------------------------------------------------------ command line


def tables(study, results):
    """{name: table} of all that is complete in the results."""
    found = {}
    if is_complete(study, results):
        found.update(map=map_table(study, results), tuned=tuned_table(study, results))
    if find(results, kind="displacement"):
        found["displacement"] = displacement_table(results)
    for model in sorted({run["model"] for run in results if run["kind"] == "real-start"}):
        of_model = replace(QUICK_REAL if study == QUICK else REAL, model=model)
        if is_complete(of_model, results):
            found["real"] = tuned_table(of_model, results)  # of the last where there are several
    return found


def report(study, path):
    """Print the tables, put them into README.md where that has places for them, and draw."""
    results = read_jsonl(path)
    found = tables(study, results)
    if not found:
        fail(f"{path}: runs are missing; finish them with: python data/study/study.py")
    if "map" in found:
        draw_all(study, results, path.parent / "figures")
    readme = path.parent / "README.md"
    text = readme.read_text() if readme.exists() else ""
    for name, table in found.items():
        begin = f"<!-- table:{name} -->\n"
        text = re.sub(f"{begin}.*?<!-- end -->", f"{begin}{table}\n<!-- end -->", text, flags=re.S)
    if text:
        readme.write_text(text)
    for name, table in found.items():
        print(f"\n{name}\n{table}")


def fail(message):
    print(f"study: {message}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)  # one line instead of the usage


def parse_arguments():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few short runs, kept elsewhere")
    parser.add_argument("--out", type=Path, dest="folder", help="where results and figures go")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    actions = parser.add_subparsers(dest="action")
    actions.add_parser("figures", help="figures and tables from the kept results")
    plot = actions.add_parser("plot", help="curves of runs of yours")
    plot.add_argument("runs", nargs="+", type=Path, help="folders that alphapo.py wrote")
    plot.add_argument("--out", type=Path, dest="picture", default=Path("curves.png"))
    judged = actions.add_parser("real", help="a real model on answers of its own, judged")
    judged.add_argument("model", help="a folder with a chat model")
    judged.add_argument("--work", type=Path, help="where its answers are kept (default: out-real)")
    given = actions.add_parser("displacement", help="a real model on given pairs, without a judge")
    given.add_argument("model", help="a model folder")
    given.add_argument("pairs", type=Path, help="a .jsonl file of pairs")
    given.add_argument("--alphas", type=float, nargs="+", default=[-1.0, 0.0, 0.25, 1.0])
    given.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    given.add_argument("--learning-rate", type=float, default=3e-4)
    given.add_argument("--gamma-beta", type=float, default=0.5)
    return parser.parse_args()


def act(args):
    if args.workers < 1:
        fail(f"--workers {args.workers}: must be 1 or more")
    if args.action == "plot":
        for run in args.runs:
            if not (run / "metrics.jsonl").is_file():
                fail(f"{run}: not a folder that alphapo.py wrote, because it has no metrics.jsonl")
        try:
            plot_curves(args.runs, args.picture)
        except ValueError as error:  # a kind of picture that cannot be written, or a torn log
            fail(f"{args.picture}: {error}")
        print(f"wrote {args.picture}")
        return
    study = QUICK if args.quick else Study()
    folder = args.folder or (Path(tempfile.mkdtemp(prefix="study-")) if args.quick else HERE)
    if args.quick and folder.resolve() == HERE:
        fail(f"--out {folder}: holds the kept results, which quick runs must not join")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("quick.jsonl" if args.quick else "results.jsonl")
    if args.action == "real":
        args.work = args.work or (folder if args.quick else Path("out-real"))
        of_model = QUICK_REAL if args.quick else REAL
        run_real_study(replace(of_model, model=Path(args.model).resolve().name), args, path)
    elif args.action == "displacement":
        run_given_pairs(args, path)
    elif args.action is None:
        run_study(study, path, args.workers)
    report(study, path)


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it stops the workers, too
    try:
        act(parse_arguments())
    except KeyboardInterrupt:
        print("study: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except (alphapo.UserError, OSError) as error:
        fail(str(error))


if __name__ == "__main__":
    main()
