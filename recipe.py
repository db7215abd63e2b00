"""What a run is told: the recipe of its steps, every flag with its default, the files it reads."""
import math
from argparse import SUPPRESS
from dataclasses import dataclass, field, fields

import torch

import cli
import data
import etw
from cli import InputError, bundled, number, text


def flag(default, type, help):
    """A field of the Recipe and the flag of its name."""
    return field(default=default, metadata={"type": type, "help": help})


@dataclass(frozen=True)
class Recipe:
    """What the steps depend on beside model and data. The defaults are the paper's method's; TUNED
    replaces them where train.py forgets with `keep`, its default. Those of the β's are in etw.py.
    """
    lam: float = flag(0.03, number(least=0), "λ, weight of the forget loss")
    temperature: float = flag(1.0, number(above=0), "T of the entropy's softmax(z/T)")
    epochs: int = flag(20, number(int, 1, 10**6), "passes through the forget (or taught) set")
    until: float = flag(None, number(above=0), "end after the first step whose forget rows have "
                        "this mean NLL, nats a token: what a model never taught them has")
    batch_size: int = flag(16, number(int, 1, 2**16), "forget rows a step, and as many retain rows")
    micro_batch_size: int = flag(None, number(int, 1),
                                 "rows of both kinds in memory at once; all unless given")
    lr: float = flag(3e-4, number(above=0, most=10), "peak learning rate")
    weight_decay: float = flag(0.01, number(least=0, most=1e3), "AdamW's, on matrices only")
    warmup_epochs: float = flag(1.0, number(least=0, most=1e6),
                                "epochs of linear warm-up before the linear decay")
    clip: float = flag(1.0, number(above=0), "largest gradient norm")
    layers: float = flag(1.0, number(above=0, most=1),
                         "share of the layers to train, from the first; 1: all weights")
    seed: int = flag(0, number(int, 0, 2**32 - 1), "of the row order and of fresh weights")
    method: str = "etw"
    beta: tuple = ()  # the formula's own defaults
    dtype: torch.dtype = torch.float32

    def steps_an_epoch(self, world):
        """An epoch is a pass through the forget set, or, teaching, through the retain set."""
        rows = world.sequences.get("forget") or world.sequences["retain"]
        return math.ceil(len(rows) / self.batch_size)

    def reached(self, record):
        """Whether a step, as train_step describes it, is the last one for `until`."""
        return self.until is not None and record.get("forget_nll", 0) >= self.until


# The defaults of flags where the method is not the paper's (see results/README.md).
TUNED = {"keep": {"lam": 0.4, "lr": 1e-3, "epochs": 14, "layers": 0.25,
                  "beta": [3, 4, 160]}}


def parse_args(argv=None):
    p = cli.Parser(prog="train.py", description="Unlearn a forget set, or teach.")
    file, folder = ({"type": text, "metavar": name} for name in ("FILE", "DIR"))
    add = p.add_argument_group("data").add_argument
    add("--forget", **file, help="JSONL rows to forget; without it the retain rows are taught")
    add("--retain", **file, nargs="+", default=[bundled("data/retain.jsonl")],
        help="JSONL rows to keep, or to teach")
    add("--facts", **file, default=bundled("data/facts.jsonl"),
        help="measured, never trained on while unlearning")
    add("--holdout", **file, help="rows like the forget set that were never taught: a yardstick "
        "where there is no --reference; data/holdout.jsonl for the bundled forget set")
    add("--template", choices=data.TEMPLATES, default="plain",
        help="how a question is put to the model")
    add("--max-length", type=number(int, 2),
        help="tokens of a row; the model's context, at most 1024, unless given")
    add = p.add_argument_group("model").add_argument
    add("--model", **folder, default=bundled("weights/target"),
        help="folder, or org/name on the hub")
    add("--reference", **folder,
        help="model retrained without the forget set; weights/retain if --model is weights/target")
    add("--from-scratch", action="store_true",
        help="fresh weights; only configuration and tokenizer of --model")
    add("--out", **folder, help="run folder; the next free one of runs/METHOD, ... unless given")
    add = p.add_argument_group("method and optimisation").add_argument
    add("--method", choices=etw.WEIGHTINGS, default="keep",
        help="how forget tokens are weighed, see etw.py")
    betas = (f"{method}: {' '.join(map(str, own['beta']))}" for method, own in TUNED.items())
    add("--beta", type=number(least=0), nargs="+", default=SUPPRESS,
        help=f"all β's of the method's formula (default: those of etw.py; {'; '.join(betas)})")
    for f in fields(Recipe):
        if f.metadata:
            name = {"lam": "lambda"}.get(f.name, f.name.replace("_", "-"))
            given = [f"{method}: {own[f.name]:g}" for method, own in TUNED.items() if f.name in own]
            kind = {"type": f.metadata["type"], "default": SUPPRESS if given else f.default}
            words = f" (default: {'; '.join([f'{f.default:g}', *given])})" if given else ""
            add(f"--{name}", dest=f.name, help=f.metadata["help"] + words, **kind)
    add = p.add_argument_group("machine and run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="bfloat16: autocast over float32 weights, the default on a GPU that has it")
    add("--gradient-checkpointing", action="store_true", help="less memory for a third more time")
    add("--save-every", type=number(int, 1), help="steps between checkpoints; else an epoch")
    add("--measure-rows", type=number(int, 1), default=400,
        help="most rows of a set to measure, evenly spaced")
    add("--resume", action="store_true",
        help="go on where a killed run stopped; the command otherwise unchanged")
    add("--overwrite", action="store_true", help="replace the run in --out")
    args = p.parse_args(argv)
    tuned = TUNED.get(args.method, {}) if args.forget else {}
    args.beta = getattr(args, "beta", tuned.get("beta", []))
    for f in fields(Recipe):
        if f.metadata and getattr(args, f.name, None) is None:
            setattr(args, f.name, tuned.get(f.name, f.default))
    return args


def check_flags(args):
    """Refuse flags that contradict each other, and fill in what the bundled world implies."""
    try:
        etw.weigh(args.method, etw.ONE, *args.beta)
    except ValueError as e:
        raise InputError(f"--beta: {e}") from None
    if args.until and not args.forget:
        raise InputError("--until: needs rows to forget: add --forget or leave it out")
    if args.resume and args.overwrite:
        raise InputError("--resume and --overwrite: give one of them")
    if args.reference and not args.forget:
        raise InputError("--reference: forget quality needs --forget: add it or leave it out")
    own = args.forget and not args.from_scratch
    if own and not args.reference and cli.same(args.model, bundled("weights/target")):
        args.reference = bundled("weights/retain")
    bundled_rows = args.forget and cli.same(args.forget, bundled("data/forget.jsonl"))
    if bundled_rows and not args.reference and not args.holdout:
        args.holdout = bundled("data/holdout.jsonl")


def read_sets(args):
    """({"forget", "retain", "facts", "holdout": Examples}, the files they came from)."""
    files = {"forget": [args.forget], "retain": args.retain, "facts": [args.facts],
             "holdout": [args.holdout]}
    files = {name: [path for path in paths if path] for name, paths in files.items()}
    sets = {name: [row for path in paths for row in data.read_jsonl(path)]
            for name, paths in files.items() if paths}
    bare = [example.where for example in sets.get("forget", []) if not example.spans]
    if bare and etw.needs(args.method, "spans"):
        raise InputError(f"{bare[0]}: --method {args.method} needs `spans` in every forget row: "
                         "add them")
    return sets, [path for paths in files.values() for path in paths]
