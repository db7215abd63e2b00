"""What a run shows at its end: numbers and answers before, after and never taught, side by side.

"Never taught" is the model retrained without the forget set (--reference), or, where there is none,
what the starting model says of rows it never saw (--holdout): where a forgotten answer should end.
"""
import resource
import sys

import torch
from tqdm import tqdm

import heatmap
import pretrained
from cli import InputError, printable
from evaluate import show
from measure import answers
from metrics import summarise, token_weights

COLUMNS = (  # of metrics.summarise, in the order of the screen
    "forget probability", "forget NLL", "forget informative NLL", "forget other NLL", "talk",
    "endless", "distance", "forget quality", "retain probability", "facts probability")
ANSWERS = 3  # of each set
WIDTH = 110  # characters of an answer


class Progress:
    """A tqdm bar; where stderr is no terminal, a line an epoch instead."""

    def __init__(self, name, first, total):
        self.bar = tqdm(total=total, initial=first, desc=name, unit="step", disable=None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def step(self, record):
        losses = {k: f"{v:.3f}" for k, v in record.items() if k in ("retain_loss", "forget_loss")}
        self.bar.set_postfix(losses)
        self.bar.update()

    def epoch(self, numbers):
        if self.bar.disable:
            self.warn("  ".join(f"{name} {show(value, 4)}" for name, value in numbers.items()))

    def warn(self, line):
        self.bar.write(line, file=sys.stderr)


def peak_memory(decoder):
    """Most memory held so far, in MB: of the GPU if the model is there, else of this process."""
    if decoder.head.is_cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class Screen:
    """Measures a run's models, one in memory at a time, and lays them side by side."""

    def __init__(self, args, world, device):
        """Measure the retrained model, if any. InputError if its numbers are not finite."""
        self.args, self.world, self.device = args, world, device
        self.scores, self.said = {}, {}  # of each column: {set: Scores}, {set: answers}
        if args.reference:
            decoder = pretrained.load(args.reference, device)
            self._look("never taught", decoder, "--reference " + args.reference)
            forget = self.scores["never taught"]["forget"]
            forget.talk = world.talk(decoder, forget)
            world.reference = self.scores["never taught"]

    def before(self, decoder):
        """Measure the starting model. InputError if its numbers are not finite."""
        self._look("before", decoder, "--model " + self.args.model)

    def glance(self, decoder):
        """A few rows, for the log after an epoch: {column: number}."""
        names = [name for name in ("forget", "retain") if name in self.world.sets]
        scores = {name: self.world.score(decoder, name, wrong=False, text=False, most=25)
                  for name in names}
        summary = summarise(scores)
        return {name: summary[name] for name in COLUMNS if summary.get(name) is not None}

    def after(self, folder):
        """Measure the model as it was written; returns what result.json holds."""
        self._look("after", pretrained.load(folder, self.device), "the model as written")
        if "forget" in self.world.sets:
            yardstick = pretrained.load(self.args.reference or self.args.model, self.device)
            for name in ("before", "after"):
                forget = self.scores[name]["forget"]
                forget.talk = self.world.talk(yardstick, forget)
        self.columns = {name: summarise(scores, reference=self.world.reference)
                        for name, scores in self.scores.items()}
        if "holdout" in self.world.sets and not self.args.reference:
            known = self.columns["before"]
            self.columns["never taught"] = {
                name.replace("holdout", "forget"): value for name, value in known.items()
                if name.startswith("holdout")}
        return {name: {key: value for key, value in self.columns[name].items() if key in COLUMNS}
                for name in self.columns}

    def _look(self, name, decoder, named):
        world = self.world
        wrong = ("facts", "forget") if self.args.reference else ("facts",)
        text = ("forget",) if "forget" in world.sets else ()
        scores = self.scores[name] = world.measure(decoder, wrong, text, bar=f"measuring: {name}")
        if not all(s.finite for s in scores.values()):
            raise InputError(f"{named}: its predictions are not finite: its weights are broken; "
                             "fetch the model again")
        self.said[name] = {
            kind: answers(decoder, world.tokenizer, self._rows(kind), world.dtype)
            for kind in ("forget", "retain") if kind in world.sets}

    def _rows(self, kind):
        """The rows whose answers are shown: evenly spaced."""
        rows = self.world.measured[kind]
        few = min(ANSWERS, len(rows))
        return [rows[i * len(rows) // few] for i in range(few)]

    def text(self, damage):
        """The screen: the table, what the run damaged, answers, what the method looked at."""
        order = [name for name in ("before", "after", "never taught") if name in self.columns]
        lines = [" " * 24 + "".join(f"{name:>14}" for name in order)]
        for key in COLUMNS:
            values = [self.columns[name].get(key) for name in order]
            if values[0] is not None:
                lines.append(f"{key:24}" + "".join(f"{show(value, 4):>14}" for value in values))
        if damage:
            lines.append(f"retain loss rose by up to {damage:.2f} nats a token during the run: "
                         "what should be kept is damaged")
        for kind in self.said["before"]:
            for i, example in enumerate(self._rows(kind)):
                if example.text is None:
                    lines += ["", printable(f"{kind}: {example.question}")]
                    lines += [f"  {name:13} {_short(self.said[name][kind][i])}" for name in order
                              if name in self.said and (name != "never taught" or kind == "forget")]
        if "forget" in self.scores["before"]:
            lines += ["", f"What --method {self.args.method} looks at in two forget answers, "
                      "before the first step:"]
            lines += self._heat(self.scores["before"]["forget"])
        return "\n".join(lines)

    def _heat(self, forget):
        colour = sys.stdout is not None and sys.stdout.isatty()
        for sequence, tokens in list(zip(forget.sequences, forget.tokens, strict=True))[:2]:
            beta = self.args.beta or ()
            weights = token_weights(self.args.method, sequence, tokens, tokens, beta)
            answer = sequence.tokens[sequence.start:]
            pieces = heatmap.pieces(self.world.tokenizer, answer)
            yield heatmap.terminal_heat(pieces, weights, colour)


def _short(answer):
    return printable(answer if len(answer) <= WIDTH else answer[:WIDTH] + " …")


def remarks(world):
    """What is not wrong but should be known, a line each."""
    for name, cut in world.cut.items():
        if cut and name in ("forget", "retain"):
            yield f"{cut} {name} answers are cut at {world.max_length} tokens (--max-length)"
    def said(example):
        return example.question, example.answer, example.text

    kept = set(map(said, world.sets["retain"]))
    shared = [e.where for e in world.sets.get("forget", []) if said(e) in kept]
    if shared:
        more = " ..." if len(shared) > 5 else ""
        yield (f"{len(shared)} forget rows also stand in the retain set, which pulls them both "
               f"ways: {', '.join(shared[:5])}{more}")
