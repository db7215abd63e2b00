"""Make a model forget some rows and keep the rest, or teach it: the hand-written loop.

    python train.py --forget data/forget.jsonl          unlearn: L = L_r + λ L_f, see etw.py
    python train.py --retain FILE ... --from-scratch    teach: L = L_r alone

One step: --batch-size forget rows and as many retain rows go through the model in one forward pass; lean_loss turns the
hidden states of the answer tokens into both losses and their gradients; AdamW follows a linear warm-up and a linear decay.
A run folder is a model directory (config.json, weights, tokenizer) with args.json and log.jsonl beside it.
"""
import gc
import hashlib
import json
import math
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import etw
import evaluate
import model
from model import InputError

FORGET, RETAIN = 0, 1  # the two streams of rows
DAMAGE = 0.5  # nats per token by which the retain loss may rise above its start before we say so


def parse_args(argv=None):
    number = evaluate.number
    p = evaluate.Parser(prog="train.py", description="Unlearn a forget set with entropy-guided token weighting, or teach.")
    g = p.add_argument_group("data")
    g.add_argument("--forget", metavar="FILE", help="JSONL rows to forget; without it the model is taught the retain rows")
    g.add_argument("--retain", metavar="FILE", nargs="+", default=["data/retain.jsonl"], help="JSONL rows to keep, or to teach")
    g.add_argument("--facts", metavar="FILE", default="data/facts.jsonl", help="measured, never trained on while unlearning")
    g.add_argument("--template", choices=data.TEMPLATES, default="plain", help="how a question is put to the model")
    g.add_argument("--max-length", type=number(int, least=2), help="tokens of a row, prompt included; the model's context, at "
                   "most 1024, unless given")
    g = p.add_argument_group("model")
    g.add_argument("--model", metavar="DIR", default="weights/target", help="model directory, or org/name on the hub")
    g.add_argument("--reference", metavar="DIR", help="model retrained without the forget set, for forget quality; "
                   "weights/retain if the model is weights/target")
    g.add_argument("--from-scratch", action="store_true", help="fresh weights; only configuration and tokenizer of --model")
    g.add_argument("--out", metavar="DIR", help="run folder; the next free one of runs/METHOD, runs/METHOD-2, ... unless given")
    g = p.add_argument_group("method")
    g.add_argument("--method", choices=etw.WEIGHTINGS, default="etw", help="how forget tokens are weighed, see etw.py")
    g.add_argument("--lambda", dest="lam", type=number(least=0), default=0.03, help="λ, weight of the forget loss")
    g.add_argument("--temperature", type=number(above=0), default=1.0, help="T of the entropy's softmax(z/T)")
    g.add_argument("--beta", type=number(least=0), nargs="+", help="β of wga, tnpo, npo, imp (one), satimp (two numbers)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=number(int, least=1, most=10**6), default=20, help="passes through the forget set (or, "
                   "teaching, the retain set)")
    g.add_argument("--batch-size", type=number(int, least=1, most=2**16), default=16, help="forget rows a step, and as many "
                   "retain rows")
    g.add_argument("--micro-batch-size", type=number(int, least=1), help="rows of both kinds in memory at once; all unless given")
    g.add_argument("--lr", type=number(above=0, most=10), default=3e-4, help="peak learning rate")
    g.add_argument("--weight-decay", type=number(least=0, most=1e3), default=0.01, help="AdamW's, on matrices only")
    g.add_argument("--warmup-epochs", type=number(least=0, most=1e6), default=1.0, help="epochs of linear warm-up before the "
                   "linear decay")
    g.add_argument("--clip", type=number(above=0), default=1.0, help="largest gradient norm")
    g.add_argument("--seed", type=number(int, least=0, most=2**32 - 1), default=0, help="of the row order and of fresh weights")
    g = p.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="bfloat16: autocast over float32 "
                   "weights, the default on a GPU that has it")
    g.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, a third more time")
    g = p.add_argument_group("run")
    g.add_argument("--save-every", type=number(int, least=1), help="steps between checkpoints; each epoch unless given")
    g.add_argument("--measure-rows", type=number(int, least=1), default=400, help="rows of each set measured before and after")
    g.add_argument("--resume", action="store_true", help="go on where a killed run stopped; the command otherwise unchanged")
    g.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    return p.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# One step


def learning_rate(step, total, warmup, peak):
    """Of step 0 .. total − 1: linear up to `peak` over `warmup` steps, then linear down to zero at `total`."""
    return peak * ((step + 1) / warmup if step < warmup else (total - step) / max(1, total - warmup))


def step_rows(step, forget, retain, args):
    """The (stream, index) pairs of one step: a pure function of step, sizes, batch size and seed."""
    size, stream = (len(forget), FORGET) if forget else (len(retain), RETAIN)
    epoch, place = divmod(step, -(-size // args.batch_size))
    rows = data.order(size, args.seed, stream, epoch)[place * args.batch_size:][:args.batch_size]
    kept = data.draw(len(retain), args.seed, RETAIN, step * args.batch_size, args.batch_size) if forget else []
    return [(stream, i) for i in rows] + [(RETAIN, i) for i in kept]


def accumulate(decoder, rows, counts, args, dtype):
    """Add the gradients of L_r + λ L_f over some rows of a step, divided by the token counts of the whole step, so that any
    cut into micro-batches gives the same sum.

    rows: (stream, Sequence, log p under the starting model or None). Returns log p (N,), entropy (N,), ω (N,), forget (N,) bool.
    """
    device = decoder.head.device
    batch = data.collate([s for _, s, _ in rows], device)
    forget = torch.tensor([stream == FORGET for stream, _, _ in rows], device=device)
    lengths = [len(s.tokens) - s.start for _, s, _ in rows]
    given = {"spans": of_tokens([s.informative for _, s, _ in rows], lengths, torch.bool, device)}
    if args.method in etw.NEED_REFERENCE:
        given["reference"] = of_tokens([known for *_, known in rows], lengths, torch.float32, device)
    weights = []

    def coefficients(chunk, logprobs, entropy, mask):
        some = {name: t[chunk, :mask.shape[1]] for name, t in given.items()}
        w = etw.WEIGHTINGS[args.method](logprobs, entropy, mask, beta=beta_of(args), **some)
        weights.append(w[mask])
        return torch.where(forget[chunk, None], args.lam * w / max(1, counts[FORGET]), -1 / max(1, counts[RETAIN]))

    with evaluate.precision(device, dtype):
        hidden = decoder.hidden(batch.inputs, batch.lengths)  # packed: (Σ lengths, D)
        hidden = batch.answers(hidden)  # nothing else reaches the head
        loss, logprobs, entropy = etw.lean_loss(hidden, decoder.head, batch.targets[batch.mask], lengths, coefficients,
                                                args.temperature, chunk=256 if device.type == "cpu" else 2048)
    loss.backward()
    return logprobs, entropy, torch.cat(weights), forget.repeat_interleave(torch.tensor(lengths, device=device))


def of_tokens(known, lengths, dtype, device):
    """What is known of the answer tokens of some rows, a list or tensor each, as (B, T); zeros where there is None."""
    known = [torch.zeros(n) if values is None else torch.as_tensor(values) for values, n in zip(known, lengths, strict=True)]
    return pad_sequence([values.to(dtype) for values in known], batch_first=True).to(device)


def train_step(decoder, optimizer, rows, lr, args, dtype):
    """One optimiser step; returns what log.jsonl keeps of it. Raises FloatingPointError before the weights are touched if
    the loss or the gradient is not finite."""
    counts = [sum(len(s.tokens) - s.start for stream, s, _ in rows if stream == kind) for kind in (FORGET, RETAIN)]
    rows = sorted(rows, key=lambda row: len(row[1].tokens))  # micro-batches of similar length
    size = args.micro_batch_size or len(rows)
    parts = [accumulate(decoder, rows[i:i + size], counts, args, dtype) for i in range(0, len(rows), size)]
    logprobs, entropy, weights, forget = map(torch.cat, zip(*parts, strict=True))
    record = {"retain_loss": float(-logprobs[~forget].mean()), "lr": lr}
    if counts[FORGET]:
        w = weights[forget].sort(descending=True).values
        record |= {"forget_loss": float((weights * logprobs)[forget].mean()), "entropy": float(entropy[forget].mean()),
                   "forget_nll": float(-logprobs[forget].mean()), "mean_weight": float(w.mean()),
                   "top_fifth": float(w[:-(-len(w) // 5)].sum() / w.sum().clamp_min(1e-30))}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, args.clip))
    if not all(map(math.isfinite, (record["retain_loss"], record.get("forget_loss", 0), norm))):
        optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(f"retain loss {record['retain_loss']:.3g}, gradient norm {norm:.3g}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return record | {"grad_norm": norm, "tokens": sum(len(s.tokens) - 1 for _, s, _ in rows)}


def make_optimizer(decoder, args):
    """AdamW; weight decay on matrices, not on norms and biases."""
    matrices = [p for p in decoder.parameters() if p.dim() > 1]
    vectors = [p for p in decoder.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=decoder.head.device.type in ("cpu", "cuda"))


# ---------------------------------------------------------------------------------------------------------------------
# The loop


class Stopped(Exception):
    """The run ended before its time: (message, exit code)."""


def train(decoder, sequences, starting, out, args, dtype, measure):
    """Train `decoder` in place from the checkpoint in `out`, if there is one, to the last step.

    sequences: {"forget": [...], "retain": [...]}; starting: log p of the starting model for each forget sequence, or None;
    measure(decoder) -> a dict for log.jsonl after each epoch. Writes log.jsonl and checkpoint.pt. Raises Stopped on
    divergence (1) and on SIGINT or SIGTERM (130), each time with the last good state written.
    """
    forget, retain = sequences["forget"], sequences["retain"]
    steps = -(-len(forget or retain) // args.batch_size)  # of an epoch
    total, warmup = args.epochs * steps, round(args.warmup_epochs * steps)
    optimizer = make_optimizer(decoder, args)
    state = {"step": 0, "log": 0, "retain_start": None, "damage": 0.0}
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, decoder, optimizer)
    with open(out / "log.jsonl", "ab") as log, catch_signals() as caught, \
            tqdm(total=total, initial=state["step"], desc=out.name, unit="step", disable=None) as bar:
        log.truncate(min(state["log"], os.path.getsize(out / "log.jsonl")))
        log.seek(0, os.SEEK_END)

        def note(record):
            log.write((json.dumps(evaluate.plain(record)) + "\n").encode())
            log.flush()

        def save():
            os.fsync(log.fileno())
            state["log"] = log.tell()
            parts = state, decoder.state_dict(), optimizer.state_dict()
            if not all(p.isfinite().all() for p in decoder.parameters()):
                raise FloatingPointError("the weights")
            model.write_aside(checkpoint, lambda aside: torch.save(parts, aside))

        def diverged(step, error):
            kept = "nothing but the log was written there: no checkpoint had been reached"
            if checkpoint.exists():
                kept = f"the last good state, of step {load_checkpoint(checkpoint, decoder, optimizer)['step']}, is there"
                model.save(decoder, out)
            return Stopped(f"{out}: not finite at step {step}: {error}; {kept}. "
                           "Start again with a lower --lr or --lambda", 1)

        while state["step"] < total:
            step, began = state["step"], time.perf_counter()
            rows = [(stream, forget[i], starting[i]) if stream == FORGET else (stream, retain[i], None)
                    for stream, i in step_rows(step, forget, retain, args)]
            try:
                record = train_step(decoder, optimizer, rows, learning_rate(step, total, warmup, args.lr), args, dtype)
            except FloatingPointError as e:
                raise diverged(step + 1, e) from None
            state["step"] = step = step + 1
            seconds = time.perf_counter() - began
            note({"step": step, "epoch": step / steps} | record
                 | {"tokens_per_second": record["tokens"] / seconds, "peak_memory_mb": peak_memory(decoder)})
            if state["retain_start"] is None:
                state["retain_start"] = record["retain_loss"]
            rise = record["retain_loss"] - state["retain_start"]
            if forget and rise > DAMAGE and not state["damage"]:
                bar.write(f"step {step}: retain loss {record['retain_loss']:.2f}, {rise:.2f} nats a token above its start: "
                          "the model is losing what it should keep; lower --lambda or --lr", file=sys.stderr)
            state["damage"] = max(state["damage"], rise if rise > DAMAGE else 0.0)
            bar.set_postfix({k: f"{record[k]:.3f}" for k in ("retain_loss", "forget_loss") if k in record})
            bar.update()
            if step % steps == 0:
                note({"epoch": step // steps} | measure(decoder))
            if step == total or caught or step % (args.save_every or steps) == 0:
                try:
                    save()
                except FloatingPointError as e:
                    raise diverged(step, e) from None
            if caught:
                raise Stopped(f"interrupted after step {step} of {total}; a checkpoint is in {out}. "
                              "To go on, run the same command with --resume" + ("" if args.out else f" --out {out}"), 130)
    return state["damage"]


def load_checkpoint(path, decoder, optimizer):
    """Put a checkpoint's weights and moments in place; returns its state: the step, the length of the log, the retain losses.

    It holds no generator state: the row order is a pure function of seed and step, and nothing else is random."""
    try:
        state, weights, moments = torch.load(path, map_location="cpu", weights_only=True)  # no code is run
        decoder.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        return {key: state[key] for key in ("step", "log", "retain_start", "damage")}
    except Exception as e:  # the unpickler raises anything
        raise InputError(f"{path}: not a checkpoint of this run ({type(e).__name__}): start again with --overwrite") from None


class catch_signals:
    """Within the block SIGINT and SIGTERM are noted, not raised: the list it yields is then not empty."""

    def __enter__(self):
        self.caught = []
        if threading.current_thread() is threading.main_thread():
            self.old = {s: signal.signal(s, lambda number, _: self.caught.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
        return self.caught

    def __exit__(self, *_):
        for number, handler in getattr(self, "old", {}).items():
            signal.signal(number, handler)


def peak_memory(decoder):
    """Most memory held so far, in MB: of the GPU if the model is there, else of this process."""
    if decoder.head.is_cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------------------------------------------------------------
# A run: check everything, measure, train, write, measure what was written, show it


def run(args):
    check_flags(args)
    sets, files = read_sets(args)
    forget = sets.get("forget", [])
    device, dtype = evaluate.pick_device(args.device, args.dtype)
    source = model.resolve(args.model)
    reference = args.reference
    if reference is None and forget and not args.from_scratch and evaluate.same(args.model, "weights/target"):
        reference = "weights/retain"
    identity, out = describe(args, [*files, *sorted(source.glob("*.safetensors"))]), choose_out(args)
    if claim(out, identity, args, reference) == "finished":
        print(f"{model.check(out)}: this run is finished; there is nothing to resume")
        return
    decoder = model.fresh(source, args.seed, device) if args.from_scratch else model.load(source, device)
    tokenizer = data.Tokenizer(decoder.source, args.template)
    decoder.checkpointing = args.gradient_checkpointing
    context = decoder.config.max_position_embeddings
    max_length = args.max_length or min(context, 1024)
    if not 2 <= max_length <= context:
        raise InputError(f"--max-length {max_length}: the model's context is {context} tokens: give at most that, at least 2")
    sample = {name: thin(rows, args.measure_rows) for name, rows in sets.items()}
    encoded = {name: data.encode(sets.get(name, []), tokenizer, max_length) for name in ("forget", "retain")}
    data.encode(sample["facts"], tokenizer, max_length)
    sequences = {name: found for name, (found, _) in encoded.items()}
    retrained = reference and evaluate.open_model(reference, device, args.template)
    for line in remarks(sets, {name: cut for name, (_, cut) in encoded.items()}, max_length):
        print(line, file=sys.stderr)  # not before everything that can be refused has been

    shown = {name: [rows[i * len(rows) // min(3, len(rows))] for i in range(min(3, len(rows)))]
             for name, rows in sample.items() if name != "facts"}
    ratios = []  # truth ratios of the retrained model on the forget set
    if reference:
        found = evaluate.score(*retrained, sample["forget"], max_length, dtype, text=False, bar="reference")
        ratios = [r for r in found["truth_ratio"] if r is not None]
        retrained = None

    def measure(decoder, most=None):
        """({column: number}, scores of the forget set); of the utility sets at most so many rows."""
        scores = {}
        for name, rows in sample.items():
            rows = thin(rows, most) if most and name != "forget" else rows
            scores[name] = evaluate.score(decoder, tokenizer, rows, max_length, dtype, options=name == "facts", text=False,
                                          temperature=args.temperature,
                                          wrong=name == "facts" or (name == "forget" and bool(ratios)))
        numbers = {f"{name} probability": evaluate.average(s["probability"]) for name, s in scores.items()}
        own = [r for r in scores["forget"]["truth_ratio"] if r is not None] if ratios else []
        if own:
            numbers["forget quality"] = float(evaluate.forget_quality(own, ratios))
        return numbers, scores.get("forget")

    before, looked = measure(decoder)
    if not all(value is None or math.isfinite(value) for value in before.values()):
        raise InputError(f"{args.model}: its predictions are not finite: its weights are broken; fetch the model again")
    answered = {name: evaluate.answers(decoder, tokenizer, rows, dtype) for name, rows in shown.items()}
    starting = [None] * len(sequences["forget"])
    if args.method in etw.NEED_REFERENCE:  # computed once: no reference model stays in memory
        found = evaluate.answer_tokens(decoder, sequences["forget"], dtype, bar="starting log p")
        starting = [torch.from_numpy(numbers[0]).float() for numbers in found]

    begin(out, identity, args)
    damage = train(decoder, sequences, starting, out, args, dtype, lambda decoder: measure(decoder, most=50)[0])
    try:
        model.save(decoder, out)
    except FloatingPointError as e:  # finite in float32 only
        raise Stopped(f"{out}: {e}; checkpoint.pt has the last state. Start again with a lower --lr or --lambda", 1) from None
    decoder = None  # two models need not fit
    gc.collect()
    decoder = model.load(out, device)  # as it was written
    after, _ = measure(decoder)
    evaluate.write(out / "result.json", json.dumps(evaluate.plain({"before": before, "after": after}), indent=1) + "\n")
    print(report(before, after, damage))
    for name, rows in shown.items():
        for example, was, new in zip(rows, answered[name], evaluate.answers(decoder, tokenizer, rows, dtype), strict=True):
            if example.text is None:
                new = new if len(new) <= 120 else new[:120] + " …"
                lines = f"{name}: {example.question}", f"  before  {was}", f"  after   {new}"
                print("", *map(evaluate.printable, lines), sep="\n")
    if forget:
        print(f"\nWhat --method {args.method} looks at in two forget answers, before the first step:")
        for s, tokens in looked["tokens"][:2]:
            weights = evaluate.weigh(args.method, s, tokens, tokens, beta_of(args))
            print(evaluate.terminal_heat(evaluate.pieces(tokenizer, s.tokens[s.start:]), weights, sys.stdout.isatty()))
    print(f"\nWritten to {out}; ask it: python evaluate.py {out} --ask 'QUESTION'")
    (out / "checkpoint.pt").unlink(missing_ok=True)  # weights without a checkpoint beside them: the run is finished


def read_sets(args):
    """({"forget", "retain", "facts": Examples}, the files they came from)."""
    files = {"forget": [args.forget] if args.forget else [], "retain": args.retain, "facts": [args.facts]}
    sets = {name: [row for path in some for row in data.read_jsonl(path)] for name, some in files.items() if some}
    for example in sets.get("forget", []) if args.method == "spans" else []:
        if not example.spans:
            raise InputError(f"{example.where}: --method spans needs `spans` in every forget row: add them")
    return sets, [path for some in files.values() for path in some]


def remarks(sets, cut, max_length):
    """What is not wrong but should be known, a line each."""
    for name, count in cut.items():
        if count:
            yield f"{count} {name} answers are cut at {max_length} tokens (--max-length)"
    kept = {(e.question, e.answer, e.text) for e in sets["retain"]}
    shared = [e.where for e in sets.get("forget", []) if (e.question, e.answer, e.text) in kept]
    if shared:
        yield (f"{len(shared)} forget rows also stand in the retain set, which pulls them both ways: {', '.join(shared[:5])}"
               + " ..." * (len(shared) > 5))


def thin(rows, most):
    """At most so many of the rows, evenly spaced."""
    return rows[::-(-len(rows) // most)]


def beta_of(args):
    """--beta as the weightings take it: None, a number, or the two of satimp."""
    return args.beta[0] if args.beta and len(args.beta) == 1 else args.beta


def report(before, after, damage):
    """The comparison a run ends with, as text."""
    lines = [f"{'':20} {'before':>9}    {'after':>9}"]
    for name, was in before.items():
        lines.append(f"{name:20} {evaluate.show(was, 4):>9} -> {evaluate.show(after[name], 4):>9}")
    if damage:
        lines.append(f"retain loss rose by up to {damage:.2f} nats a token during the run: what should be kept is damaged")
    return "\n".join(lines)


def check_flags(args):
    """Refuse flags that contradict each other."""
    if args.beta and (len(args.beta) != (2 if args.method == "satimp" else 1) or args.method in ("etw", "uniform", "spans")):
        raise InputError(f"--beta: {args.method} takes " + {"satimp": "two numbers", "etw": "none", "uniform": "none",
                                                            "spans": "none"}.get(args.method, "one number"))
    if args.resume and args.overwrite:
        raise InputError("--resume and --overwrite: give one of them")
    if args.reference and not args.forget:
        raise InputError("--reference: forget quality needs --forget: add it or leave --reference out")


def describe(args, files):
    """What args.json holds: the flags, versions, the data's SHA-256 and the git commit of the code."""
    flags = {"lambda" if k == "lam" else k: v for k, v in vars(args).items() if k not in ("resume", "overwrite", "out")}
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        commit = git.stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        commit = None
    return flags | {
        "command": shlex.join(sys.argv),
        "data_sha256": {str(path): sha256(path) for path in files},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "git_commit": commit,
    }


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def choose_out(args):
    """--out, or the next free of runs/METHOD, runs/METHOD-2, ...; with --resume the last one taken."""
    if args.out:
        return Path(args.out)
    name = Path("runs") / (args.method if args.forget else "teach")
    names = [name if n == 1 else name.with_name(f"{name.name}-{n}") for n in range(1, 10_000)]
    free = next(i for i, path in enumerate(names) if not path.exists())
    return names[max(0, free - 1) if args.resume or args.overwrite else free]


def claim(out, identity, args, reference):
    """Check that a run may be written to `out`; writes nothing. Returns "finished" for a run that needs no resuming."""
    for place in (args.model, reference):
        if place and evaluate.same(place, out):
            raise InputError(f"--out {out}: is the folder of --model or --reference: choose another")
    try:
        str(out).encode()
        parent = next(p for p in (out, *out.absolute().parents) if p.exists() or p.is_symlink())
        writable = parent.is_dir() and os.access(parent, os.W_OK)
    except (OSError, ValueError):  # too long, a NUL, not Unicode
        parent, writable = out, False
    if not writable:
        raise InputError(f"--out {out}: {parent} is not a folder one can write to: choose another")
    if not out.exists() or not any(out.iterdir()):
        return None
    if not (out / "args.json").is_file():
        raise InputError(f"--out {out}: holds files that are not a run's: choose another")
    if args.overwrite:
        return None
    if not args.resume:
        raise InputError(f"--out {out}: already holds a run: go on with --resume, replace it with --overwrite, or choose another")
    old = data.read_json(out / "args.json", "it tells what run this is: start again with --overwrite")
    for key, value in identity.items():
        if key == "data_sha256" and value != old.get(key):
            changed = [path for path in value if not isinstance(old.get(key), dict) or old[key].get(path) != value[path]]
            raise InputError(f"--resume: the data changed since {out} began: {', '.join(changed)}: restore it, or --overwrite")
        if key not in ("command", "versions", "git_commit", "save_every", "measure_rows") and value != old.get(key):
            raise InputError(f"--resume: {key} was {old.get(key)!r} in {out}, now {value!r}: give the same, or --overwrite")
    return "finished" if (out / "model.safetensors").exists() and not (out / "checkpoint.pt").exists() else None


def begin(out, identity, args):
    """Make the run folder, empty of an older run unless that is resumed."""
    out.mkdir(parents=True, exist_ok=True)
    if args.overwrite:
        for name in ("model.safetensors", "checkpoint.pt", "log.jsonl", "result.json"):
            (out / name).unlink(missing_ok=True)
    evaluate.write(out / "args.json", json.dumps(identity, indent=1) + "\n")


def main(argv=None):
    """Run the command line; returns the exit code: 0 done, 1 stopped by itself, 2 wrong input, 130 interrupted."""
    evaluate.forgiving_streams()
    try:
        run(parse_args(argv))
    except InputError as e:
        print(evaluate.printable(f"train.py: {e}"), file=sys.stderr)
        return 2
    except Stopped as e:
        print(evaluate.printable(f"train.py: {e.args[0]}"), file=sys.stderr)
        return e.args[1]
    except torch.OutOfMemoryError:
        print("train.py: out of GPU memory; lower --micro-batch-size or add --gradient-checkpointing", file=sys.stderr)
        return 1
    except OSError as e:
        print(evaluate.printable(f"train.py: {e}; if a checkpoint was reached, --resume goes on from it"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train.py: interrupted; --resume goes on from the last checkpoint, if there was one", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # outside the loop, too, it is an interrupt
    sys.exit(main())
