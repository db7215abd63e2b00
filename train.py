"""Make a model forget some rows and keep the rest, or teach it: the hand-written loop.

    python train.py --forget data/forget.jsonl          unlearn: L = L_r + λ L_f, see etw.py
    python train.py --retain FILE ... --from-scratch    teach: L = L_r alone

One step: --batch-size forget rows and as many retain rows go through the model; lean_loss turns the
hidden states of their answer tokens into step_loss and its gradients; AdamW takes them.
"""
import cli  # first, so that an interrupt is one line from here on: torch takes seconds to load

if __name__ == "__main__":
    cli.on_interrupt("train.py")

import gc
import math
import sys
import time
from contextlib import closing
from dataclasses import fields
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import etw
import measure
import pretrained
import screen
from cli import InputError, Stopped
from lean import lean_loss
from recipe import Recipe, check_flags, parse_args, read_sets
from run import Run, catch_signals

FORGET, RETAIN = 0, 1  # the two streams of rows


class Row(NamedTuple):
    """A row of a step; starting: (2, n) log p and entropy of the starting model, where needed."""
    stream: int
    sequence: data.Sequence
    starting: torch.Tensor | None = None

    @property
    def count(self):
        """Answer tokens, with the end token."""
        return len(self.sequence.tokens) - self.sequence.start


# ---- One step


def step_loss(tokens, forget, counts, recipe):
    """The paper's loss, on some whole sequences of a step: (L, L_r, L_f, ω).

    tokens: etw.Tokens, all (b, t); forget (b,) bool: which sequences are to be forgotten.
    counts: forget and retain answer tokens of the whole step, so that any cut of it adds up to the
    mean over all (the mean of means would be another number).
    """
    forget_mask, retain_mask = tokens.mask & forget[:, None], tokens.mask & ~forget[:, None]
    L_r = etw.retain_loss(tokens.logprobs, retain_mask, counts[RETAIN])
    if not forget_mask.any():  # no forget row here, or the model is taught
        return L_r, L_r, torch.zeros_like(L_r), torch.zeros_like(tokens.logprobs)
    weights = etw.weigh(recipe.method, tokens._replace(mask=forget_mask), *recipe.beta)
    L_f = etw.forget_loss(tokens.logprobs, weights, forget_mask, counts[FORGET])
    return L_r + recipe.lam * L_f, L_r, L_f, weights


def accumulate(decoder, rows, counts, recipe):
    """Add the gradients of step_loss over some rows; returns, of each chunk, what the log needs."""
    device = decoder.head.device
    batch = data.collate([row.sequence for row in rows], device)
    forget = torch.tensor([row.stream == FORGET for row in rows], device=device)
    # What is known of the answer tokens beforehand, (B, T) each.
    known = {"spans": _padded([row.sequence.informative for row in rows], rows, device).bool()}
    if any(row.starting is not None for row in rows):
        for i, field in enumerate(("reference", "reference_entropy")):
            numbers = [None if row.starting is None else row.starting[i] for row in rows]
            known[field] = _padded(numbers, rows, device)
    parts = []

    def loss_of(chunk, logprobs, entropy, mask):
        some = {field: x[chunk, :mask.shape[1]] for field, x in known.items()}
        tokens = etw.Tokens(logprobs, entropy, mask, **some)
        loss, L_r, L_f, weights = step_loss(tokens, forget[chunk], counts, recipe)
        own = mask & forget[chunk, None]
        parts.append([x.detach() for x in (L_r, L_f, weights[own], logprobs[own], entropy[own])])
        return loss

    with cli.precision(device, recipe.dtype):
        hidden = batch.answers(decoder.hidden(batch.inputs, batch.lengths))  # (N, D)
        loss = lean_loss(
            hidden, decoder.head, batch.targets[batch.mask], [row.count for row in rows], loss_of,
            recipe.temperature, chunk=256 if device.type == "cpu" else 2048)
    loss.backward()  # the loss has called loss_of, and so step_loss, on each chunk: see lean.py
    return parts


def _padded(values, rows, device):
    """What is known of each row's answer tokens, as (B, T) float32; zeros for None."""
    values = [[0.0] * row.count if v is None else v for v, row in zip(values, rows, strict=True)]
    values = [torch.as_tensor(v, dtype=torch.float32) for v in values]
    return pad_sequence(values, batch_first=True).to(device)


def train_step(decoder, optimizer, rows, lr, recipe):
    """One optimiser step; returns what log.jsonl keeps of it.

    FloatingPointError, before the weights are touched, if the loss or the gradient is not finite.
    """
    counts = [max(1, sum(r.count for r in rows if r.stream == s)) for s in (FORGET, RETAIN)]
    rows = sorted(rows, key=lambda row: len(row.sequence.tokens))  # micro-batches of similar length
    size = recipe.micro_batch_size or len(rows)
    parts = []
    for start in range(0, len(rows), size):
        parts += accumulate(decoder, rows[start:start + size], counts, recipe)
    tokens = sum(len(row.sequence.tokens) - 1 for row in rows)
    record = describe(parts) | {"lr": lr, "tokens": tokens}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    record["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters, recipe.clip))
    losses = [record["retain_loss"], record.get("forget_loss", 0), record["grad_norm"]]
    if not all(map(math.isfinite, losses)):
        optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError("retain loss {:.3g}, forget loss {:.3g}, gradient norm {:.3g}"
                                 .format(*losses))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return record


def describe(parts):
    """A step's numbers for the log: losses and, of its forget tokens, entropy, nll and weights."""
    retain_loss, forget_loss, *tokens = zip(*parts, strict=True)
    record = {"retain_loss": float(sum(retain_loss))}
    weights, logprobs, entropy = map(torch.cat, tokens)
    if len(weights):
        pushed = weights.clamp_min(0).sort(descending=True).values
        top = pushed[:math.ceil(len(pushed) / 5)].sum() / pushed.sum().clamp_min(1e-30)
        record |= {"forget_loss": float(sum(forget_loss)), "forget_nll": float(-logprobs.mean()),
                   "entropy": float(entropy.mean()), "mean_weight": float(weights.mean()),
                   "top_fifth": float(top)}
    return record


# ---- The loop


def make_optimizer(decoder, recipe):
    """AdamW on the weights that recipe.layers leaves to train; weight decay on matrices alone."""
    decoder.requires_grad_(recipe.layers == 1)
    decoder.layers[:math.ceil(recipe.layers * len(decoder.layers))].requires_grad_()
    trained = [p for p in decoder.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.weight_decay},
              {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0}]
    fused = decoder.head.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=fused)


def learning_rate(step, total, warmup, peak):
    """Of step 0 .. total − 1: linear up to `peak` over `warmup` steps, then down to 0 at total."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total - step) / max(1, total - warmup)


def step_rows(step, world, recipe):
    """The Rows of one step: a pure function of step, sizes, batch size and seed."""
    forget, retain = world.sequences.get("forget"), world.sequences["retain"]
    size, stream = (len(forget), FORGET) if forget else (len(retain), RETAIN)
    epoch, place = divmod(step, recipe.steps_an_epoch(world))
    start = place * recipe.batch_size
    rows = data.order(size, recipe.seed, stream, epoch)[start:start + recipe.batch_size]
    if stream == RETAIN:
        return [Row(RETAIN, retain[i]) for i in rows]
    kept = data.draw(len(retain), recipe.seed, RETAIN, step * recipe.batch_size, recipe.batch_size)
    starting = world.starting or [None] * size
    return ([Row(FORGET, forget[i], starting[i]) for i in rows]
            + [Row(RETAIN, retain[i]) for i in kept])


def steps(decoder, optimizer, world, recipe, first=0):
    """Train the decoder in place, from step `first` to the last: yields the record of each step."""
    an_epoch = recipe.steps_an_epoch(world)
    total, warmup = recipe.epochs * an_epoch, round(recipe.warmup_epochs * an_epoch)
    for step in range(first, total):
        began = time.perf_counter()
        lr = learning_rate(step, total, warmup, recipe.lr)
        record = train_step(decoder, optimizer, step_rows(step, world, recipe), lr, recipe)
        yield {"step": step + 1, "epoch": (step + 1) / an_epoch} | record | {
            "tokens_per_second": record["tokens"] / (time.perf_counter() - began),
            "peak_memory_mb": cli.peak_memory(decoder.head.device)}


def train(run, decoder, world, recipe, glance, save_every=None):
    """The steps of a run, from its checkpoint if it has one, and what goes on beside them.

    glance(decoder) -> a dict for the log after each epoch. Returns the retain loss's largest rise
    above its start; 0 if never above .5 nats a token. Stopped on divergence (1), on a signal (130).
    """
    an_epoch, optimizer = recipe.steps_an_epoch(world), make_optimizer(decoder, recipe)
    total = recipe.epochs * an_epoch
    run.restore(decoder, optimizer)
    state = run.state
    first = total if state.get("last") else state["step"]
    bar = tqdm(desc=run.folder.name, total=total, initial=state["step"], unit="step", disable=None)
    with run.log() as note, catch_signals() as caught, bar:
        try:
            for record in steps(decoder, optimizer, world, recipe, first):
                step = state["step"] = record["step"]
                note(record)
                bar.set_postfix({k: v for k, v in record.items() if k.endswith("_loss")})
                bar.update()
                for line in screen.events(record, state, recipe, total):
                    bar.write(line, sys.stderr)
                if step % an_epoch == 0:
                    numbers = {"epoch": step // an_epoch} | glance(decoder)
                    note(numbers)
                    if bar.disable:  # stderr is no terminal: a line an epoch instead
                        shown = (f"{key} {screen.show(value, 4)}" for key, value in numbers.items())
                        bar.write("  ".join(shown), sys.stderr)
                last = state["last"] = step == total or recipe.reached(record)
                if last or caught or step % (save_every or an_epoch) == 0:
                    run.checkpoint(decoder, optimizer)
                if caught:
                    raise Stopped(f"interrupted after step {step} of {total}; "
                                  f"{cli.how_to_go_on()}", 130)
                if last:
                    break
        except FloatingPointError as e:
            raise run.diverged(decoder, optimizer, state["step"] + 1, e) from None
    return state["damage"]


# ---- A run: check everything, measure, train, write, measure what was written, show it


def unlearn(argv):
    """One run, from its flags to its last screen. What can be refused is, before a file is made."""
    args = parse_args(argv)
    check_flags(args)
    device, dtype = cli.pick_device(args.device, args.dtype)
    source = pretrained.resolve(args.model)
    pretrained.check_memory(source, device, 4 + 12 * args.layers)  # weights; gradient, moments
    weights = [] if args.from_scratch else pretrained.weight_files(pretrained.check(source))
    models = [source, pretrained.check(args.reference)] if args.reference else [source]
    context, *other = (pretrained.read_config(m)[0].max_position_embeddings for m in models)
    length = args.max_length or min(context, 1024)
    if not 2 <= length <= context:
        raise InputError(f"--max-length {length}: the model's context is {context} tokens: "
                         "give at most that, at least 2")
    sets, files = read_sets(args)
    tokenizer = data.Tokenizer(source, args.template)
    if args.reference and (other[0] < context
                           or tokenizer.key != data.Tokenizer(models[-1], args.template).key):
        raise InputError(f"--reference {args.reference}: its tokenizer is not --model's, or its "
                         "context is shorter: give a model retrained from the same one")
    world = measure.World(sets, tokenizer, length, dtype=dtype, temperature=args.temperature,
                          most=args.measure_rows)
    with closing(Run(args, [*files, *weights], models)) as run:
        if run.finished:
            print(f"{run.folder}: this run is finished; there is nothing to resume")
        else:
            execute(run, args, source, world, device)


def execute(run, args, source, world, device):
    """Measure, train, write, measure what was written, show it."""
    settings = {f.name: getattr(args, f.name) for f in fields(Recipe) if f.metadata}
    recipe = Recipe(method=args.method, beta=tuple(args.beta), dtype=world.dtype, **settings)
    shown = screen.Screen(args, world, device)
    decoder = (pretrained.fresh(source, args.seed, device) if args.from_scratch
               else pretrained.load(source, device))
    decoder.checkpointing = args.gradient_checkpointing
    size = sum(p.numel() for p in decoder.parameters()) / 1e6
    print(f"{source}: {size:,.1f} million parameters on {device}", file=sys.stderr)
    doubts = shown.before(decoder)
    if args.forget and etw.needs_start(args.method):  # once: no second model stays in memory
        world.starting = world.starting_stats(decoder, bar="starting log p")
    for line in [*screen.remarks(args, world), *doubts]:  # nothing is refused after this
        print(line, file=sys.stderr)
    run.begin()
    damage = train(run, decoder, world, recipe, shown.glance, args.save_every)
    run.save(decoder)
    del decoder  # two models need not fit
    gc.collect()
    run.finish(shown.after(run.folder))
    print(shown.text(damage))
    print(f"\nWritten to {run.folder}; ask it: python evaluate.py {run.folder} --ask 'QUESTION'")


def main(argv=None):
    """Run the command line; returns its exit code: 0, 1 stopped, 2 wrong input, 130 interrupted."""
    return cli.guarded("train.py", unlearn, argv)


if __name__ == "__main__":
    sys.exit(main())
