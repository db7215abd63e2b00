"""Every weighting under the same budget: a sweep, tables of it, and the trade-off curves.

    python results/compare.py sweep                      eight λ and two learning rates for every method
    python results/compare.py repeat --seeds 1 2 3       each method's best setting with other seeds
    python results/compare.py tables
    python results/compare.py grid --lr 3e-4             every run of one learning rate after its last epoch
    python results/compare.py plot                       results/tradeoff.svg; needs matplotlib

All read and write results/sweep.jsonl (seed 0) and results/seeds.jsonl: the first line is the target, each other one epoch
of one run; finished runs are skipped, so what was stopped goes on. The mean weight at the start differs by orders of
magnitude between methods (imp 0.0005, wga 1), so the grid is laid over s = λ · mean ω at the start, with the same span for
each.
"""
import argparse
import copy
import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import etw
import evaluate
import model
import train

STRENGTHS = (1e-4, 1e-3, 1e-2, 10**-1.5, 1e-1, 10**-0.5, 1.0, 10**0.5)  # s = λ · mean ω at the start
RATES = (3e-4, 1e-3)
ENOUGH = 0.05  # forget quality from which a model counts as one that forgot


class World:
    """The data sets, the target model and the retain model's yardsticks: all that a run shares with the others."""

    def __init__(self, args):
        self.target = model.load(args.model)
        self.tokenizer = data.Tokenizer(args.model, args.template)
        sets = {"forget": args.forget, "retain": args.retain} | {Path(f).stem: f for f in args.facts}
        self.sets = {name: data.read_jsonl(path) for name, path in sets.items()}
        self.options = [Path(f).stem for f in args.facts]
        measured = data.read_jsonl(args.retain_measured) if args.retain_measured else self.sets["retain"]
        self.measured = {name: rows[::-(-len(rows) // args.rows)] for name, rows in (self.sets | {"retain": measured}).items()
                         if name != "forget"} | {"forget": self.sets["forget"]}
        self.length = min(self.target.config.max_position_embeddings, 512)
        self.sequences = {k: data.encode(self.sets[k], self.tokenizer, self.length)[0] for k in ("forget", "retain")}
        self.starting = [torch.from_numpy(t[0]).float() for t in evaluate.answer_tokens(self.target, self.sequences["forget"])]
        retrained = model.load(args.reference)
        self.reference = {"forget": self.score(retrained, "forget", text=False)}
        self.start = self.measure(self.target)

    def score(self, decoder, name, text=True):
        return evaluate.score(decoder, self.tokenizer, self.measured[name], self.length, options=name in self.options, text=text)

    def measure(self, decoder):
        """Forget quality and probability on the whole forget set, model utility on a sample of each utility set."""
        found = evaluate.summarise({name: self.score(decoder, name, text=name != "forget") for name in self.measured},
                                   getattr(self, "start", None), self.reference)
        return {k: v for k, v in found.items() if not k.startswith("weights")}

    def mean_weight(self, method):
        """Mean ω of the target model over all forget tokens."""
        sequences = self.sequences["forget"]
        tokens = evaluate.answer_tokens(self.target, sequences)
        return float(np.concatenate([evaluate.weigh(method, s, t, t) for s, t in zip(sequences, tokens, strict=True)]).mean())

    def run(self, method, lam, lr, seed, epochs, batch_size, every):
        """Unlearn from the target with train.py's own step; yields (epoch, measurements)."""
        args = Namespace(method=method, lam=lam, beta=None, temperature=1.0, batch_size=batch_size, micro_batch_size=None, lr=lr,
                         weight_decay=train.parse_args([]).weight_decay, clip=train.parse_args([]).clip, seed=seed)
        decoder = copy.deepcopy(self.target)
        optimizer = train.make_optimizer(decoder, args)
        forget, retain = self.sequences["forget"], self.sequences["retain"]
        steps = -(-len(forget) // batch_size)
        for step in range(epochs * steps):
            rows = [(kind, forget[i], self.starting[i]) if kind == train.FORGET else (kind, retain[i], None)
                    for kind, i in train.step_rows(step, forget, retain, args)]
            rate = train.learning_rate(step, epochs * steps, steps, lr)
            try:
                train.train_step(decoder, optimizer, rows, rate, args, torch.float32)
            except FloatingPointError:
                return
            if (step + 1) % (every * steps) == 0:
                yield (step + 1) // steps, self.measure(decoder)


def do_runs(args, wanted, out):
    """Append the measured epochs of each wanted (method, strength, lr, seed) to a file, skipping the runs already there."""
    done = {(r["method"], r["strength"], r["lr"], r["seed"]) for r in read(out) if r["method"] != "target"}
    torch.set_num_threads(args.threads)
    world = World(args)
    means = {method: world.mean_weight(method) for method in etw.WEIGHTINGS}
    print(json.dumps({"mean weight at the start": means}), file=sys.stderr)
    if not Path(out).exists():
        append(out, [{"method": "target"} | world.start])
    wanted = [w for i, w in enumerate(wanted) if i % args.parts == args.part and tuple(w) not in done]
    for method, strength, lr, seed in tqdm(wanted, desc="runs"):
        lam = strength / means[method]
        setting = {"method": method, "strength": strength, "lambda": lam, "lr": lr, "seed": seed}
        runs = world.run(method, lam, lr, seed, args.epochs, args.batch_size, args.every)
        lines = [setting | {"epoch": epoch} | found for epoch, found in runs] or [setting | {"epoch": 0, "diverged": True}]
        append(out, lines)


def append(path, records):
    with open(path, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def read(path, over=()):
    """The records of a file; with the names of utility sets, the utility lost is that of those sets alone."""
    records = [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []
    if over and records:
        def utility(record):
            parts = ("probability", "rouge", "truth_ratio")
            return evaluate.model_utility([record[f"{name} {part}"] for name in over for part in parts])
        for r in records:
            if "forget quality" in r:
                r["utility lost"] = 100 * (utility(records[0]) - utility(r))
    return records


def loss_of(record):
    return record.get("utility lost", float("inf"))


def chosen(records, method, within=None):
    """The epoch of a run that forgot (quality >= ENOUGH) with the least utility lost, else the one of best forget quality;
    with a number of points, the one of best forget quality among those that lost no more, where there is one."""
    own = [r for r in records if r["method"] == method and "forget quality" in r]
    good = [r for r in own if r["forget quality"] >= ENOUGH and within is None]
    mild = [r for r in own if within is not None and loss_of(r) <= within]
    return min(good, key=loss_of) if good else min(mild or own, key=lambda r: r["-log10 FQ"])


def tables(args):
    sweep, seeds = read(args.sweep, args.over), read(args.repeats, args.over)
    print(f"| method | least utility lost with FQ ≥ {ENOUGH} | λ, lr, epoch | best −log10 FQ with ≤ 5 points lost "
          "| paper's product |")
    print("|---|---|---|---|---|")
    for method in etw.WEIGHTINGS:
        own = [r for r in sweep if r["method"] == method and "forget quality" in r]
        good = [r for r in own if r["forget quality"] >= ENOUGH]
        mild = [r["-log10 FQ"] for r in own if loss_of(r) <= 5]
        best = min(good, key=loss_of) if good else None
        product = min((r["-log10 FQ"] * max(0, loss_of(r)) for r in good), default=None)
        cells = [f"{loss_of(best):.2f}", setting_of(best)] if best else ["–", "–"]
        cells += [f"{min(mild):.2f}" if mild else "–", "–" if product is None else f"{product:.2f}"]
        print(f"| {method} | " + " | ".join(cells) + " |")
    print("\n| method | λ, lr, epoch | seed 0: −log10 FQ, points lost | other seeds: −log10 FQ, median (least – most) "
          f"| points lost | FQ ≥ {ENOUGH} |")
    print("|---|---|---|---|---|---|")
    for method in etw.WEIGHTINGS:
        pick = chosen(sweep, method, args.within)
        own = [r for r in seeds if all(r.get(k) == pick[k] for k in ("method", "strength", "lr", "epoch"))]
        spread = [f"{np.median(v):.2f} ({min(v):.2f} – {max(v):.2f})" for v in
                  ([r["-log10 FQ"] for r in own], [loss_of(r) for r in own]) if v] or ["–", "–"]
        print(f"| {method} | {setting_of(pick)} | {pick['-log10 FQ']:.2f}, {loss_of(pick):.2f} | {' | '.join(spread)} "
              f"| {sum(r['forget quality'] >= ENOUGH for r in own)} of {len(own)} |")


def setting_of(record):
    return f"{record['lambda']:.3g}, {record['lr']:g}, {record['epoch']}"


def grid(args):
    """A table of the last epoch: a row a method, a column a strength, at the first learning rate of --lr."""
    records = [r for r in read(args.sweep, args.over) if r.get("epoch") == args.epochs and r["lr"] == args.lr[0]]
    print("| method | " + " | ".join(f"s = {s:.3g}" for s in args.strengths) + " |")
    print("|---" * (len(args.strengths) + 1) + "|")
    for method in args.methods:
        found = {r["strength"]: f"{r['forget probability']:.2g}, {r['-log10 FQ']:.1f}, {loss_of(r):.1f}"
                 for r in records if r["method"] == method}
        print(f"| {method} | " + " | ".join(found.get(s, "–") for s in args.strengths) + " |")


def plot(args):
    """Forgetting against damage: for each method the best −log10 FQ reached within every bound on the utility lost."""
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "etw"
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    records = [r for r in read(args.sweep, args.over) if "forget quality" in r]
    for i, method in enumerate(etw.WEIGHTINGS):
        points = sorted((loss_of(r), r["-log10 FQ"]) for r in records if r["method"] == method)
        best = np.minimum.accumulate([fq for _, fq in points])
        axes.step([x for x, _ in points], best, where="post", label=method, color=f"C{i}", linewidth=3 if method == "etw" else 1.5)
    axes.axhline(-np.log10(ENOUGH), color="grey", linestyle=":", linewidth=1)
    axes.text(11, -np.log10(ENOUGH), "forgotten below this line: p ≥ 0.05", color="grey", va="top", ha="right", fontsize=8)
    axes.set(xlim=(-2, 12), ylim=(0, 10), xlabel="model utility lost, points", ylabel="best −log10 forget quality so far")
    axes.legend(fontsize=8)
    figure.savefig(args.plot, metadata={"Date": None})


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("task", choices=("sweep", "repeat", "tables", "grid", "plot"))
    p.add_argument("--sweep", default="results/sweep.jsonl")
    p.add_argument("--repeats", default="results/seeds.jsonl")
    p.add_argument("--plot", default="results/tradeoff.svg")
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    p.add_argument("--epochs", type=int, default=20)
    p.add_argument("--every", type=int, default=4, help="epochs between measurements")
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--rows", type=int, default=50, help="rows of each utility set that an epoch measures")
    p.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS, help="s = λ · mean ω at the start, for sweep and grid")
    p.add_argument("--lr", type=float, nargs="+", default=RATES, help="learning rates, for sweep; the first for grid")
    p.add_argument("--methods", nargs="+", default=list(etw.WEIGHTINGS))
    p.add_argument("--part", type=int, default=0, help="with --parts: run every so many-th setting, to share a sweep out")
    p.add_argument("--parts", type=int, default=1)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--model", default="weights/target")
    p.add_argument("--reference", default="weights/retain")
    p.add_argument("--forget", default="data/forget.jsonl")
    p.add_argument("--retain", default="data/retain.jsonl")
    p.add_argument("--retain-measured", help="rows with wrong answers to measure on, where --retain has none")
    p.add_argument("--facts", nargs="+", default=["data/facts.jsonl"])
    p.add_argument("--over", nargs="+", default=(), help="utility sets that the utility lost is taken over; all where not given")
    p.add_argument("--within", type=float, help="repeat and tabulate the best forget quality with at most so many points lost")
    p.add_argument("--template", default="plain")
    args = p.parse_args(argv)
    picks = [chosen(read(args.sweep, args.over), m, args.within) for m in args.methods] if args.task == "repeat" else []
    if args.task == "sweep":
        do_runs(args, [(method, s, lr, 0) for lr in args.lr for s in args.strengths for method in args.methods], args.sweep)
    elif args.task == "repeat":
        do_runs(args, [(r["method"], r["strength"], r["lr"], seed) for seed in args.seeds for r in picks], args.repeats)
    else:
        {"tables": tables, "grid": grid, "plot": plot}[args.task](args)


if __name__ == "__main__":
    main()
