# SPDX-License-Identifier: MIT
"""What alpha does: the tiny model, trained over a grid of settings and judged by a program.

    python data/study/study.py                                # all, resumable: 90 minutes
    python data/study/study.py --quick                        # a few short runs: a minute
    python data/study/study.py figures                        # draw and tabulate the kept runs
    python data/study/study.py plot RUN... --out curves.png   # curves of runs of your own
    python data/study/study.py real MODEL PAIRS.jsonl         # alpha on a real model, without judge

The map trains every method at every cell of a grid. The tuned comparison takes each method's best
cell by the score on validation prompts, trains fresh seeds there, and judges them on held-out
prompts, which take no part in that choice. What came out is in README.md beside this file.
"""

import argparse
import os
import re
import signal
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

# Python looks for modules beside the script that it runs, and nothing of this project is installed:
# judge.py and report.py are one folder up, and alphapo.py two.
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[0]), str(HERE.parents[1])]
from draw import draw_all  # noqa: E402
from report import plot_curves  # noqa: E402
from runs import find, missing, read_jsonl, run_all, run_real, run_tiny  # noqa: E402

import alphapo  # noqa: E402

TINY = HERE.parent / "tiny"
BETA = 2.5
SIMPO = "α 0 (SimPO)"
REAL_HELD_OUT, REAL_TRAIN = 128, 256  # pairs; the file's first are held out


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


def map_jobs(study):
    """The whole grid for one seed after the other, so that a part of the runs is a map too."""
    cells = sum(study.cells().values(), [])
    return [dict(kind="map", **cell, seed=seed) for seed in study.seeds for cell in cells]


def tuned_jobs(study, results):
    """Fresh seeds at the best cell of each method, and the model before training with the same."""
    jobs = [dict(kind="start", seed=seed) for seed in study.fresh_seeds]
    for cells in study.cells().values():
        cell, _ = best_cell(results, cells)
        jobs += [dict(kind="tuned", **cell, seed=seed) for seed in study.fresh_seeds]
    return jobs


def write_lines(work, name, lines):
    Path(work, name).write_text("".join(lines))


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


def run_real_study(args, path):
    """Train each alpha with each seed on the pairs behind the file's first, which are held out."""
    lines = args.pairs.read_text().splitlines(keepends=True)
    if len(lines) < REAL_HELD_OUT + REAL_TRAIN:
        fail(f"{args.pairs}: has {len(lines)} pairs, and {REAL_HELD_OUT} + {REAL_TRAIN} are needed")
    names = dict(model=Path(args.model).name, pairs=args.pairs.name)
    setting = dict(beta=BETA, gamma_beta=args.gamma_beta, learning_rate=args.learning_rate)
    jobs = [
        dict(kind="real", method="AlphaPO", **names, alpha=alpha, **setting, seed=seed)
        for seed in args.seeds
        for alpha in args.alphas
    ]
    with tempfile.TemporaryDirectory() as work:
        write_lines(work, "eval.jsonl", lines[:REAL_HELD_OUT])
        write_lines(work, "train.jsonl", lines[REAL_HELD_OUT:][:REAL_TRAIN])
        run_all(partial(run_real, work=work, model=args.model), jobs, path, args.workers)


# ------------------------------------------------------------------------------------ statistics


def best_cell(results, cells):
    """The cell with the best mean validation score over the seeds of the map, and that score."""
    scores = [np.mean([r["validation"] for r in find(results, kind="map", **c)]) for c in cells]
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


def place(method, cell):
    return [method, f"{cell['learning_rate']:g}", f"{cell.get('gamma_beta', cell['beta']):g}"]


def map_table(study, results):
    """Means over the seeds of every cell."""
    rows = []
    for method, cells in study.cells().items():
        for cell in cells:
            runs = find(results, kind="map", **cell)
            keys = ["validation", "score", *MEASURES.values()]
            rows.append(place(method, cell) + [student([run[key] for run in runs]) for key in keys])
    return markdown([*PLACE, "score", *MEASURES], rows)


def tuned_table(study, results):
    """The fresh seeds of every method, with differences to SimPO by seed and prompt."""

    def scores(**fields):  # (seeds, prompts)
        return np.array([run["scores"] for run in find(results, **fields)])

    simpo, _ = best_cell(results, study.cells()[SIMPO])
    simpo_scores = scores(kind="tuned", **simpo)
    start_scores = scores(kind="start")
    start_row = ["before training", "", "", "", bootstrap(start_scores)]
    rows = [[*start_row, bootstrap(start_scores - simpo_scores), "", "", "", ""]]
    for method, cells in study.cells().items():
        cell, validation = best_cell(results, cells)
        own_scores = scores(kind="tuned", **cell)
        difference = "" if cell == simpo else bootstrap(own_scores - simpo_scores)
        row = [*place(method, cell), f"{validation:.3f}", bootstrap(own_scores), difference]
        runs = find(results, kind="tuned", **cell)
        rows.append(row + [student([run[key] for run in runs]) for key in MEASURES.values()])
    return markdown([*PLACE, "score", "score − SimPO's", *MEASURES], rows)


def real_table(results):
    """The held-out pairs of the real model: each measure has a value for each seed and pair."""
    rows = []
    runs = find(results, kind="real")
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


def report(study, path):
    """Print the tables, put them into README.md where that has places for them, and draw."""
    results = read_jsonl(path)
    found = {}
    if not missing(map_jobs(study), results) and not missing(tuned_jobs(study, results), results):
        found["map"] = map_table(study, results)
        found["tuned"] = tuned_table(study, results)
        draw_all(study, results, path.parent / "figures")
    if find(results, kind="real"):
        found["real"] = real_table(results)
    if not found:
        fail(f"{path}: runs are missing; finish them with: python data/study/study.py")
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
    real = actions.add_parser("real", help="alpha on a real model")
    real.add_argument("model", help="a model folder")
    real.add_argument("pairs", type=Path, help="a .jsonl file of pairs")
    real.add_argument("--alphas", type=float, nargs="+", default=[-1.0, 0.0, 0.25, 1.0])
    real.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    real.add_argument("--learning-rate", type=float, default=3e-4)
    real.add_argument("--gamma-beta", type=float, default=0.5)
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
        run_real_study(args, path)
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
