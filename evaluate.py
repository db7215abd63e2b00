"""Measure models as the unlearning benchmarks do: a row a model, a column a measurement.

    python evaluate.py runs/etw [MORE ...] [--reference weights/retain] [--json FILE] [--heatmap]

metrics.py defines the columns, measure.py reads the numbers off a model, screen.py draws tables and
what a weighting looks at; here are the models that are compared and the command line.
"""
import cli

if __name__ == "__main__":
    cli.on_interrupt("evaluate.py")  # before torch, which takes seconds to import

import os
import re
import sys
from pathlib import Path

import numpy as np
import torch

import data
import metrics
import pretrained
import screen
from cli import InputError, bundled
from measure import Scores, World, answers
from metrics import forget_quality, model_utility, rouge_l_recall, truth_ratio  # noqa: F401
from screen import show, tables

# ---- The command line


def parse_args(argv=None):
    p = cli.Parser(prog="evaluate.py", description="Measure models, a row each.")
    path = {"type": cli.text, "metavar": "FILE"}
    folder = {"type": cli.text, "metavar": "DIR"}
    p.add_argument("models", nargs="+", type=cli.text, metavar="MODEL",
                   help="model directories, e.g. runs/etw")
    p.add_argument("--target", **folder,
                   help="model that unlearning started from (default: the run's own --model)")
    p.add_argument("--reference", **folder, help="model retrained without the forget set (default: "
                   "the run's own; weights/retain if the target is weights/target)")
    p.add_argument("--forget", **path, help="forget set (default: the run's own, else the bundled; "
                   "so too the next two)")
    p.add_argument("--retain", **path, nargs="+", help="retain set: the first utility set")
    p.add_argument("--facts", **path, nargs="+",
                   help="further utility sets, one a file, with wrong answers as options")
    p.add_argument("--holdout", **path, help="rows like the forget set that were never taught "
                   "(default: as --forget, unless that is given)")
    p.add_argument("--template", choices=data.TEMPLATES,
                   help="how a question is put to the model (default: the run's own, else plain)")
    p.add_argument("--json", **path, help="write the measurements, with per-row values")
    p.add_argument("--heatmap", type=cli.text, metavar="FILE.svg", nargs="?", const="heatmap.svg",
                   help="draw token weights of the first MODEL on forget answers, print what its "
                   "entropy knows")
    p.add_argument("--bits", type=cli.number(int, least=2, most=16),
                   help="measure models rounded to so many bits")
    p.add_argument("--ask", type=cli.text, metavar="QUESTION",
                   help="only let every model answer this question")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                   help="bfloat16: autocast")
    return p.parse_args(argv)


def run(argv):
    args = parse_args(argv)
    device, dtype = cli.pick_device(args.device, args.dtype)
    complete(args)
    if args.ask is not None:
        for path in args.models:
            decoder, tokenizer = open_model(path, device, args.template)
            answer = answers(decoder, tokenizer, [data.Example(args.ask)], dtype)[0]
            print(cli.printable(f"{path}: {answer}"))
        return
    sets, options, files = read_sets(args)
    models = find_models(args)
    read = [*files, *(file for folder in models.values() for file in folder.iterdir())]
    check_outputs(args, read)
    worlds = make_worlds(models, sets, options, args.template, dtype)
    scores = measure_models(args, models, worlds, device)
    reference = scores.get(args.reference)
    before = metrics.summarise(scores[args.target], None, reference)
    summaries = {path: metrics.summarise(own, before, reference) for path, own in scores.items()}
    start = scores[args.target]["forget"]
    aucs = {path: metrics.weights_auc(own["forget"], start) for path, own in scores.items()}
    print(tables(summaries))
    if args.json:
        cli.write_json(args.json, {
            path: {"measurements": summaries[path], "weights AUC": aucs[path],
                   "rows": per_row(own, reference)} for path, own in scores.items()})
    if args.heatmap:
        first = args.models[0]
        draw(args.heatmap, first, scores[first]["forget"], worlds[first].tokenizer, aucs[first])


def complete(args):
    """Fill in what the flags leave open: by args.json where train.py made the first model, by the
    bundled world."""
    made = cli.read_json(Path(args.models[0]) / "args.json", "it tells what run this is")
    args.template = args.template or made.get("template", "plain")
    if not isinstance(args.template, str) or args.template not in data.TEMPLATES:
        raise InputError(f"{args.models[0]}/args.json: unknown template {args.template!r:.40}: "
                         "give --template")
    complete_sets(args, made)
    ours = cli.same(args.forget, bundled("data/forget.jsonl"))
    began, taught = made.get("model"), "forget" in made and made["forget"] is None
    if args.target is None and isinstance(began, str) and began and not taught:
        # Only what the user names is looked for on the hub, never what a file in a folder names.
        found = here(began, os.path.isdir)
        args.target = found or args.models[0]
        if not found:
            warn(f"{args.models[0]} was made from {began}, which is no folder here: what is lost "
                 f"is measured against {args.target}, unless --target names it")
    args.target = args.target or (bundled("weights/target") if ours else args.models[0])
    retrained = made.get("reference")
    if args.reference is None and isinstance(retrained, str):
        args.reference = here(retrained, os.path.isdir)
    elif args.reference is None and cli.same(args.target, bundled("weights/target")):
        args.reference = bundled("weights/retain")
    if args.holdout is None and ours:
        args.holdout = bundled("data/holdout.jsonl")


def complete_sets(args, made):
    """The data files: those that an unlearning run was made with, else the bundled ones."""
    names = [name for name in ("forget", "retain", "facts") if getattr(args, name) is None]
    if "forget" in names and args.holdout is None:  # it goes with its forget set
        names.append("holdout")
    for name in names if isinstance(made.get("forget"), str) else ():
        told = made.get(name)
        told = [told] if isinstance(told, str) else told if isinstance(told, list) else []
        files = [here(file, os.path.exists) for file in told if isinstance(file, str)]
        if None in files:
            raise InputError(f"{args.models[0]}: was made with --{name} {told!s:.200}, not all of "
                             f"which is here: give --{name}")
        if files:
            setattr(args, name, files if name in ("retain", "facts") else files[0])
    args.forget = args.forget or bundled("data/forget.jsonl")
    args.retain = args.retain or [bundled("data/retain.jsonl")]
    args.facts = args.facts or [bundled("data/facts.jsonl")]


def here(path, exists):
    """Where a path of args.json leads today, from here or from the program; None if nowhere."""
    return next((p for p in (path, bundled(path)) if exists(p)), None)


def read_sets(args):
    """({name: [Example]}, the names of the sets with options, the files they came from)."""
    options = [Path(file).stem for file in args.facts]
    if len({"forget", "retain", "holdout", *options}) < 3 + len(options):
        raise InputError(f"--facts: {', '.join(options)}: each utility set needs a file name of "
                         "its own: rename one")
    files = {"forget": [args.forget], "retain": args.retain}
    files |= {name: [file] for name, file in zip(options, args.facts, strict=True)}
    if args.holdout:
        files["holdout"] = [args.holdout]
    sets = {name: [row for file in own for row in data.read_jsonl(file)]
            for name, own in files.items()}
    return sets, options, [file for own in files.values() for file in own]


def find_models(args):
    """{name: folder} of each model once, the target first, the reference last.

    What is wrong with any of them is said now. args.target, args.models and args.reference become
    names among these.
    """
    names, folders = {}, {}
    for path in filter(None, [args.target, *args.models, args.reference]):
        folders[path] = pretrained.check(path).resolve()
        names.setdefault(folders[path], path)
    args.target, *args.models = (names[folders[path]] for path in (args.target, *args.models))
    args.reference = args.reference and names[folders[args.reference]]
    order = sorted(names, key=lambda folder: names[folder] == args.reference)
    return {names[folder]: folder for folder in order}


def check_outputs(args, inputs):
    """Refuse --json and --heatmap over files that are not theirs."""
    if args.json:
        cli.check_output("--json", args.json, inputs, r'{\n ".*": {\n  "measurements": {')
    if args.heatmap:
        cli.check_output("--heatmap", args.heatmap, [*inputs, args.json],
                         re.escape(screen.SVG_HEAD))


def make_worlds(models, sets, options, template, dtype):
    """{model: World}: models of one tokenizer and context share theirs. What cannot be encoded is
    refused here."""
    worlds, shared = {}, {}
    for path, folder in models.items():
        tokenizer = data.Tokenizer(folder, template)
        context = pretrained.read_config(folder)[0].max_position_embeddings
        key = tokenizer.key, context
        if key not in shared:
            shared[key] = world = World(sets, tokenizer, context, options=options, dtype=dtype)
            if cut := sum(world.cut.values()) + world.cut_others:
                warn(f"{path}: {cut} answers are longer than its context and were cut")
        worlds[path] = shared[key]
    return worlds


def measure_models(args, models, worlds, device):
    """{model: {set: Scores}}, one model in memory at a time; one that predicts NaN is refused."""
    # The yardstick comes last: it is still in memory when all have answered and it hears them talk.
    yardstick = args.reference or args.target
    scores = dict.fromkeys(models)
    for path in sorted(models, key=lambda path: path == yardstick):
        decoder = None  # two need not fit
        decoder = pretrained.load(models[path], device)
        if args.bits:
            round_weights(decoder, args.bits)
        scores[path] = worlds[path].measure(decoder, bar=path)
        if not all(own.finite for own in scores[path].values()):
            raise InputError(f"{path}: its predictions are not finite: train or fetch it again")
    for path, own in scores.items():
        if worlds[path] is worlds[yardstick]:  # else it reads other tokens
            own["forget"].talk = worlds[path].talk(decoder, own["forget"], bar=f"{path} talk")
    return scores


def open_model(path, device, template):
    """(Decoder, Tokenizer) of a model directory or hub name."""
    decoder = pretrained.load(path, device)
    return decoder, data.Tokenizer(decoder.files.folder, template)


def round_weights(decoder, bits):
    """Round the blocks' linear layers to `bits` bits: to nearest, symmetric, a scale a row."""
    for module in decoder.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not decoder.head:
            weight = module.weight.data
            scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / (2 ** (bits - 1) - 1)
            module.weight.data = torch.round(weight / scale) * scale


def per_row(scores, reference):
    """For --json: {set: {column: [a value or None for each row]}}."""
    result = {name: {column: getattr(own, column) for column in Scores.ROWS}
              for name, own in scores.items()}
    forget = scores["forget"]
    result["forget"]["talk"] = [None if t is None else -t.mean() for t in forget.talk]
    gaps = metrics.distances(forget, reference["forget"]) if reference else None
    if gaps:
        result["forget"]["distance"] = [np.concatenate([gaps[k] for k in places]).mean()
                                        for places in forget.places]
    return result


def draw(file, path, scores, tokenizer, aucs):
    """The heat map of a model's forget answers, and as text what its entropy knows."""
    cli.write_text(file, screen.svg_heat(screen.heat_blocks(scores, tokenizer)))
    known = "  ".join(f"{name} {show(auc)}" for name, auc in aucs.items())
    print(f"\n{cli.printable(path)}, forget set\n"
            f"Weights against the labelled spans, ROC-AUC: {known}")
    for text in (screen.entropy_report(scores), screen.confidence_pairs(scores, tokenizer)):
        if text:
            print(f"\n{text}")
    print(f"\nToken weights drawn in {cli.printable(file)}")


def warn(line):
    print(cli.printable(line), file=sys.stderr)


def main(argv=None):
    """Run the command line; returns the exit code, 2 if the input is wrong."""
    return cli.guarded("evaluate.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
