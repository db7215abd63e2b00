"""Every weighting under the same budget, held against the model that was never taught.

    python results/compare.py sweep                  eight λ and two learning rates for every method
    python results/compare.py repeat --seeds 1 2 3   each method's chosen setting with other seeds
    python results/compare.py tables
    python results/compare.py details                utility by its parts, AUCs, answers
    python results/compare.py grid --lr 3e-4         every run at one learning rate
    python results/compare.py runs                   every run, a row each
    python results/compare.py plot                   results/ends.svg: where each method ends up

All read and write results/sweep.jsonl (seed 0) and results/seeds.jsonl. The first lines are the
target, the retrained model and with --untaught a third, each other one a run after its last epoch
(with --every N, also after every N epochs). A run's lines are written when it ends and finished
runs are skipped, so what was killed goes on. The mean weight at the start differs by orders of
magnitude between methods (imp .0001, wga 1), so the grid is laid over s = λ · mean ω at the start,
with the same span for each (a negative ω, which keeps a token, counts as 0: s is the strength of
the push; at T 1 also where --temperature is another).

The rule of choice, written down before any run. Of a method's runs with seed 0 that forgot (facts
at least half as surprising as to the retrained model: `forget informative NLL`), or of all where
none did, the one with the smallest `distance` (mean |log p − log p_retrained| over the answer
tokens of the forget set)
1. among those that lost at most 2 points of model utility and leave at most 5 % of the answers
   endless; where there are none
2. among those that lost at most 5 points; where there are none
3. among all.
"""
import argparse
import json
import re
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scatter import SVG_HEAD, svg_scatter

import cli
import data
import etw
import measure
import metrics
import pretrained
import train

STRENGTHS = (1e-4, 1e-3, 1e-2, 10**-1.5, 1e-1, 10**-0.5, 1.0, 10**0.5)  # λ · mean ω at the start
RATES = (3e-4, 1e-3)
MAX_LENGTH = 512  # tokens of a row
SAID = 10  # of so many forget answers one is kept as text
# What is chosen, beside the epoch; the last two are null where the formula has its defaults.
SETTING = "method", "strength", "lr", "epochs", "layers", "temperature", "beta"
PARTS = "probability", "rouge", "truth_ratio"  # of a utility set
YARDSTICKS = "target", "retrained", "untaught"
COLUMNS = {  # of a table: what metrics.summarise calls it, its heading
    "-log10 FQ": "−log10 FQ", "utility lost": "points lost",
    "forget informative NLL": "informative", "forget other NLL": "other",
    "talk": "talk", "endless": "endless", "distance": "distance"}


# ---- Runs


class Experiment:
    """What the runs share: rows to train on, rows to measure, what they are held against."""

    def __init__(self, args, methods):
        self.args = args
        self.device, self.dtype = cli.pick_device(args.device, "auto")
        target = pretrained.load(args.model, self.device)
        tokenizer = data.Tokenizer(target.files.folder, args.template)
        length = min(target.config.max_position_embeddings, MAX_LENGTH)
        taught, measured, options = read_sets(args)
        self.taught = measure.World(taught, tokenizer, length, dtype=self.dtype,
                                    temperature=args.temperature or 1.0)
        self.measured = measure.World(measured, tokenizer, length, options=options,
                                      dtype=self.dtype)
        if any(map(etw.needs_start, methods)):
            self.taught.starting = self.taught.starting_stats(target)

        self.retrained, self.target = pretrained.load(args.reference, self.device), None
        self.reference = self.measured.measure(self.retrained, bar="retrained")
        scores = self.measured.measure(target, bar="target")
        self.start = scores["forget"]
        self.target = self.summary(scores)

    def summary(self, scores):
        """The measurements of a model, ready for a line of the file: columns of metrics.summarise,
        the AUC of each weighting on its forget answers, every tenth of these answers."""
        forget = scores["forget"]
        forget.talk = self.measured.talk(self.retrained, forget)
        columns = metrics.summarise(scores, self.target, self.reference)
        aucs = metrics.weights_auc(forget, self.start)
        asked = [example.question for example in self.measured.sets["forget"]]
        said = dict(zip(asked[::SAID], forget.answer[::SAID], strict=True))
        return cli.plain(columns | {"AUC": aucs, "said": said})

    def yardsticks(self):
        """The first lines of a file: what all runs start from, and where they should end."""
        lines = [{"method": "target"} | self.target,
                 {"method": "retrained"} | self.summary(self.reference)]
        if self.args.untaught and self.args.task == "sweep":
            decoder = pretrained.load(self.args.untaught, self.device)
            scores = self.measured.measure(decoder, bar="untaught")
            lines.append({"method": "untaught"} | self.summary(scores))
        return lines

    def run(self, recipe):
        """Unlearn; yields (epoch, measurements). FloatingPointError if a number is not finite."""
        decoder = pretrained.load(self.args.model, self.device)
        optimizer = train.make_optimizer(decoder, recipe)
        an_epoch = recipe.steps_an_epoch(self.taught)
        records = train.steps(decoder, optimizer, self.taught, recipe)
        for record in tqdm(records, recipe.method, recipe.epochs * an_epoch, False, disable=None):
            epoch, inside = divmod(record["step"], an_epoch)
            last = epoch == recipe.epochs
            if not inside and (last or (self.args.every and epoch % self.args.every == 0)):
                scores = self.measured.measure(decoder, bar=recipe.method)
                if not all(own.finite for own in scores.values()):
                    raise FloatingPointError("the predictions")
                yield epoch, self.summary(scores)


def read_sets(args):
    """(sets to train on, sets to measure, names of those whose wrong answers are options).

    Of a utility set --rows rows are measured; of the forget set all.
    """
    facts = {Path(file).stem: data.read_jsonl(file) for file in args.facts}
    taught = {"forget": data.read_jsonl(args.forget), "retain": data.read_jsonl(args.retain)}
    retain = data.read_jsonl(args.retain_measured) if args.retain_measured else taught["retain"]
    utility = {"retain": retain} | facts
    measured = {"forget": taught["forget"]}
    measured |= {name: measure.thin(rows, args.rows) for name, rows in utility.items()}
    if args.holdout:
        measured["holdout"] = data.read_jsonl(args.holdout)
    return taught, measured, list(facts)


def mean_weight(method, scores, beta=()):
    """Mean max(0, ω) of a method over all forget tokens; scores: the starting model's."""
    pairs = zip(scores.sequences, scores.tokens, strict=True)
    weights = [metrics.token_weights(method, s, tokens, tokens, beta) for s, tokens in pairs]
    return float(sum(w.clip(0).sum() for w in weights) / sum(map(len, weights)))


def do_runs(args, wanted, path):
    """Append each wanted (*SETTING, seed) to a file, unless it is there."""
    done = {key_of(r)[:-1] for r in read(path) if r.get("epoch") in (0, r.get("epochs"))}
    wanted = [w for w in wanted[args.part::args.parts] if w not in done]
    if not wanted:
        return note(f"{path}: nothing left to run")
    torch.set_num_threads(args.threads)
    experiment = Experiment(args, {method for method, *_ in wanted})
    if len(read(path)) < 2:
        append(path, experiment.yardsticks())
    for number, key in enumerate(wanted, 1):
        setting = dict(zip((*SETTING, "seed"), key, strict=True))
        method, seed, lr = setting["method"], setting["seed"], setting["lr"]
        beta = tuple(setting["beta"] or ())
        lam = setting["strength"] / mean_weight(method, experiment.start, beta)
        recipe = train.Recipe(method=method, beta=beta, lam=lam, lr=lr, seed=seed,
                              temperature=setting["temperature"] or 1.0,
                              epochs=setting["epochs"], layers=setting["layers"],
                              batch_size=args.batch_size, dtype=experiment.dtype,
                              micro_batch_size=args.micro_batch_size)
        setting["lambda"] = lam
        began, lines = time.perf_counter(), []
        try:
            for epoch, measurements in experiment.run(recipe):
                lines.append(setting | {"epoch": epoch} | measurements)
        except FloatingPointError:
            lines.append(setting | {"epoch": 0, "diverged": True})
        append(path, lines)
        figures = ", ".join(f"{name} {show(lines[-1].get(key))}" for key, name in COLUMNS.items())
        note(f"{number} of {len(wanted)}: {method} λ {recipe.lam:.3g}, lr {lr:g}, seed {seed}, "
             f"{time.perf_counter() - began:.0f} s: {figures}")
    return None


def note(line):
    print(line, file=sys.stderr, flush=True)


# ---- The files


def key_of(record):
    values = (record.get(name) for name in (*SETTING, "seed", "epoch"))
    return tuple(tuple(v) if isinstance(v, list) else v for v in values)


def append(path, records):
    """Add lines, on a line of their own also where a kill has torn the last one."""
    with open(path, "a+b") as file:
        file.seek(max(0, file.tell() - 1))
        torn = file.read() not in (b"", b"\n")
        lines = "".join(json.dumps(record) + "\n" for record in records)
        file.write((torn * "\n" + lines).encode())


def read(path, over=()):
    """The records of a file. over: the utility sets that the utility lost is counted over, or all.

    A line that a kill has torn is skipped: its run is done again.
    """
    records = {}
    for line in Path(path).read_text("utf-8").splitlines() if Path(path).exists() else ():
        try:
            record = json.loads(line)
            records[key_of(record)] = record
        except (json.JSONDecodeError, AttributeError):
            continue
    records = list(records.values())
    if over:
        start = utility(records[0], over) if records else None
        for record in records:
            if "utility lost" in record:
                record["utility lost"] = 100 * (start - utility(record, over))
    return records


def utility(record, names):
    values = [record[f"{name} {part}"] for name in names for part in PARTS]
    return float(metrics.model_utility(values))


# ---- What they say


def chosen(records, method, temperature=None, beta=None):
    """The setting of a method by the rule above; None if no run of it came to an end. Runs with
    another T or other β's are another method's."""
    goal = next((r for r in records if r["method"] == "retrained"), {})
    facts = "forget informative NLL"
    own = [r for r in records if r["method"] == method and r.get("distance") is not None
           and (r.get("temperature"), r.get("beta")) == (temperature, beta)]
    own = [r for r in own if (r.get(facts) or 0) >= (goal.get(facts) or 0) / 2] or own
    lean = [r for r in own if r["utility lost"] <= 2 and r["endless"] <= 0.05]
    mild = [r for r in own if r["utility lost"] <= 5]
    return min(lean or mild or own, key=lambda r: r["distance"], default=None)


def picks(args, sweep):
    """The chosen setting of each of --methods, if it has one, among those of --temperature and
    --beta."""
    found = (chosen(sweep, method, args.temperature, args.beta) for method in args.methods)
    return [pick for pick in found if pick]


def others(records, pick):
    """The runs of a chosen setting with other seeds, at its epoch."""
    keys = *SETTING, "epoch"
    return [r for r in records if all(r.get(k) == pick.get(k) for k in keys)]


def show(value):
    return "–" if value is None else f"{value:.2f}"


def spread(values):
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    return f"{statistics.median(values):.2f} ({min(values):.2f} – {max(values):.2f})"


def setting_of(record):
    setting = f"{record['lambda']:.3g}, {record['lr']:g}, {record['epoch']}"
    if record["layers"] != 1:
        setting += f", layers {record['layers']:g}"
    if record.get("temperature") is not None:
        setting += f", T {record['temperature']:g}"
    if record.get("beta") is not None:
        setting += f", β {' '.join(f'{b:g}' for b in record['beta'])}"
    return setting


def row(*cells):
    return "| " + " | ".join(cells) + " |"


def tables(args):
    """The chosen settings: what seed 0 gave beside the yardsticks, what other seeds give."""
    sweep, seeds = read(args.sweep, args.over), read(args.repeats, args.over)
    listing([*(r for r in sweep if r["method"] in YARDSTICKS), *picks(args, sweep)])
    if not seeds:
        return
    print()
    listing([])
    for pick in picks(args, sweep):
        if own := others(seeds, pick):
            cells = [spread([r.get(key) for r in own]) for key in COLUMNS]
            print(row(pick["method"], setting_of(pick), *cells))


def listing(records):
    """A table of these records, a row each."""
    print(row("method", "λ, lr, epoch", *COLUMNS.values()) + "\n" + "|---" * 9 + "|")
    for record in records:
        setting = "–" if record["method"] in YARDSTICKS else setting_of(record)
        print(row(record["method"], setting, *(show(record.get(key)) for key in COLUMNS)))


def runs(args):
    """Every run of the sweep, those with another T or β last, then those with other seeds."""
    own, other = ([r for r in read(path, args.over) if r["method"] in args.methods]
                  for path in (args.sweep, args.repeats))
    own.sort(key=lambda r: (r.get("temperature") is not None or r.get("beta") is not None,
                            args.methods.index(r["method"]), r["lr"], r["strength"]))
    listing(own)
    if other:
        print()
        listing(sorted(other, key=lambda r: (args.methods.index(r["method"]), r["seed"])))


def details(args):
    """Of the chosen settings and the yardsticks: the numbers that make up the utility, the AUC of
    each weighting, what is answered."""
    sweep = read(args.sweep, args.over)
    models = [*(r for r in sweep if r["method"] in YARDSTICKS), *picks(args, sweep)]
    sets = dict.fromkeys(k.removesuffix(" rouge") for k in models[0] if k.endswith(" rouge"))
    parts = [f"{name} {part}" for name in sets for part in PARTS if name != "forget"]
    print(row("method", *parts, "model utility") + "\n" + "|---" * (len(parts) + 2) + "|")
    for model in models:
        print(row(model["method"], *(show(model.get(key)) for key in (*parts, "model utility"))))
    models = [model for model in models if "AUC" in model]  # older files lack it
    if not models:
        return
    print("\n" + row("AUC of", *etw.WEIGHTINGS) + "\n" + "|---" * (len(etw.WEIGHTINGS) + 1) + "|")
    for model in models:
        print(row(f"on {model['method']}", *(show(model["AUC"][name]) for name in etw.WEIGHTINGS)))
    for question in models[0]["said"]:
        print(f"\n{question}")
        for model in models:
            print(f"    {model['method']:10} {cli.printable(model['said'][question] or '–')[:150]}")


def grid(args):
    """The last epoch at the first rate of --lr: a row a method, a column a strength."""
    keys = "forget informative NLL", "forget other NLL", "-log10 FQ", "utility lost"
    cells = {(r["method"], r["strength"]): ", ".join(show(r.get(key)) for key in keys)
             for r in read(args.sweep, args.over)
             if r.get("epoch") == args.epochs == r["epochs"] and r["lr"] == args.lr[0]
             and r["layers"] == args.layers and (r.get("temperature"), r.get("beta"))
             == (args.temperature, args.beta)}
    print(row("method", *(f"s = {s:.3g}" for s in args.strengths)))
    print("|---" * (len(args.strengths) + 1) + "|")
    for method in args.methods:
        print(row(method, *(cells.get((method, s), "–") for s in args.strengths)))


def plot(args):
    """Where each method ends up inside a forgotten answer: facts (x) against the rest (y)."""
    sweep, seeds = read(args.sweep, args.over), read(args.repeats, args.over)

    def place(record, name="forget"):
        return [record.get(f"{name} informative NLL"), record.get(f"{name} other NLL")]

    goals = {"retrained: the goal": place(sweep[1]), "never taught": place(sweep[0], "holdout")}
    groups = {pick["method"]: [place(r) for r in (pick, *others(seeds, pick))]
              for pick in picks(args, sweep)}
    cli.check_output("--plot", args.plot, [args.sweep, args.repeats], re.escape(SVG_HEAD))
    cli.write_text(args.plot, svg_scatter(
        groups, goals, "NLL of the facts in forgotten answers, nats a token",
        "NLL of the words around them"))


# ---- The command line


def parse_args(argv):
    p = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("task", choices=("sweep", "repeat", "tables", "details", "grid", "runs", "plot"))
    add("--sweep", metavar="FILE", default="results/sweep.jsonl")
    add("--repeats", metavar="FILE", default="results/seeds.jsonl")
    add("--plot", metavar="FILE", default="results/ends.svg")
    add("--methods", nargs="+", choices=etw.WEIGHTINGS, default=list(etw.WEIGHTINGS))
    add("--strengths", type=float, nargs="+", default=STRENGTHS, help="s, for sweep and grid")
    add("--lr", type=float, nargs="+", default=RATES, help="for sweep; the first one for grid")
    add("--seeds", type=int, nargs="+", help="for repeat: 1 2 3 unless given; for sweep: other "
        "seeds of these very settings, into --repeats")
    add("--layers", type=float, default=1.0, help="share of the layers to train, as in train.py")
    add("--epochs", type=int, default=20, help="for sweep and grid")
    add("--temperature", type=float, help="T of the entropy, and of the runs to choose from")
    add("--beta", type=float, nargs="+", help="all β's of the formula, likewise")
    add("--every", type=int, default=0, help="epochs between measurements; 0: only at the end")
    add("--batch-size", type=int, default=16)
    add("--micro-batch-size", type=int)
    add("--part", type=int, default=0, help="with --parts: every so many-th run, to share them out")
    add("--parts", type=cli.number(int, 1), default=1)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--device", default="auto")
    add("--model", default="weights/target")
    add("--reference", default="weights/retain", help="the retrained model")
    add("--untaught", help="the model before it was taught, measured as a third yardstick")
    add("--template", choices=data.TEMPLATES, default="plain")
    add("--forget", default="data/forget.jsonl")
    add("--retain", default="data/retain.jsonl")
    add("--retain-measured", help="rows with wrong answers, where those of --retain have none")
    add("--facts", nargs="+", default=["data/facts.jsonl"], help="further utility sets")
    add("--holdout", help="rows never taught; data/holdout.jsonl if the forget set is the bundled")
    add("--rows", type=int, default=50, help="rows of each utility set that are measured")
    add("--over", nargs="+", default=(), help="utility sets that count as lost; all unless given")
    args = p.parse_args(argv)
    if args.forget == "data/forget.jsonl":
        args.holdout = args.holdout or "data/holdout.jsonl"
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.task != "sweep" and not read(args.sweep):
        raise cli.InputError(f"--sweep {args.sweep}: holds no run: `sweep` makes it")
    if args.task == "sweep":
        beta = args.beta and tuple(args.beta)
        wanted = [(method, strength, lr, args.epochs, args.layers, args.temperature, beta, seed)
                  for seed in args.seeds or [0]
                  for lr in args.lr for strength in args.strengths for method in args.methods]
        do_runs(args, wanted, args.repeats if args.seeds else args.sweep)
    elif args.task == "repeat":
        sweep = read(args.sweep, args.over)
        wanted = [key_of(pick | {"seed": seed})[:-1]
                  for seed in args.seeds or [1, 2, 3] for pick in picks(args, sweep)]
        do_runs(args, wanted, args.repeats)
    else:
        {"tables": tables, "details": details, "grid": grid, "runs": runs,
         "plot": plot}[args.task](args)


if __name__ == "__main__":
    sys.exit(cli.guarded("compare.py", main, None))
