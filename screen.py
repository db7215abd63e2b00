"""What is shown: tables, the weights on the tokens of an answer, and what a run did.

scores: measure.Scores of a set, its `sequences` and for each of them its `tokens`, an array whose
first rows are log p and entropy of the answer tokens.
"""
import html
import math
import sys

import numpy as np

import cli
import pretrained
from cli import InputError, printable
from measure import answers
from metrics import summarise, token_weights
from recipe import TUNED, Recipe

# ---- Tables

SHORT = {"probability": "prob", "truth_ratio": "TR", "memorised": "EM", "extraction": "ES",
         "rouge": "ROUGE", "informative NLL": "informative", "other NLL": "other"}
INSIDE = "talk", "endless", "distance"  # the second table, with all NLL
DAMAGE = 0.5  # nats a token by which the retain loss may rise above its start before we say so


def show(value, digits=3):
    """A number for a table: – where there is none, exponents only where needed."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.1e}" if 0 < abs(value) < 10 ** -digits else f"{value:.{digits}f}"


def tables(rows):
    """Text tables of {row name: {column: number or None}}: the benchmarks', inside the answers."""
    names = list(dict.fromkeys(column for row in rows.values() for column in row))
    inner = [name for name in names if name.endswith(" NLL") or name.split()[0] in INSIDE]
    blocks = [name for name in names if name not in inner], inner
    return "\n\n".join(table(rows, block) for block in blocks if block)


def table(rows, names):
    """A text table of some columns; those that share their first word stand under it."""
    columns, group = [["", "", *map(printable, rows)]], None
    for name in names:
        top, _, bottom = name.partition(" ") if " " in name else ("", "", name)
        cells = [show(row.get(name)) for row in rows.values()]
        columns.append(["" if top == group else top, SHORT.get(bottom, bottom), *cells])
        group = top
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for first, *cells in zip(*columns, strict=True):
        cells = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]))
    return "\n".join(lines)


# ---- What a weighting looks at: its weights on the tokens of an answer

SVG_HEAD = '<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" viewBox="0 0 '
STYLE = ("text{font:12px ui-monospace,Menlo,Consolas,monospace;fill:#1f2328;white-space:pre}"
         ".name{fill:#59636e}rect{fill:#ffa726}"
         "@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.name{fill:#9198a1}"
         "rect{fill:#b85c00}}")
ADVANCE, LINE, LEFT = 7.2, 22, 64  # pixels: a character, a line, the column of names
BARS = "▁▂▃▄▅▆▇█"


def pieces(tokenizer, ids):
    """The text of each token; of tokens that share a character, the last one has it whole."""
    texts, done = [], ""
    for i in range(len(ids)):
        text = tokenizer.backend.decode(ids[:i + 1], skip_special_tokens=False)
        whole = not text.endswith("\ufffd")
        texts.append(text[len(done):] if whole else "")
        done = text if whole else done
    if ids and ids[-1] == tokenizer.end_id:
        texts[-1] = " ∎"
    return texts


def terminal_heat(texts, weights, colour):
    """One answer for a terminal: shades behind the text, or without colour bars under it."""
    shades = np.clip(weights, 0, None) / max(np.max(weights), 1e-30)  # keep: below 0 is no push
    pairs = [(printable(text), shade) for text, shade in zip(texts, shades, strict=True)]
    if not colour:
        bars = "".join(BARS[min(7, int(8 * shade))] * len(text) for text, shade in pairs)
        return "".join(text for text, _ in pairs) + "\n" + bars
    line = ""
    for text, shade in pairs:
        red, green = int(255 * shade), int(150 * shade)
        line += f"\x1b[48;2;{red};{green};0m{text}\x1b[0m" if shade > 0.04 else text
    return line


def heat_blocks(scores, tokenizer, count=3, methods=("etw", "wga", "imp", "satimp", "spans")):
    """For svg_heat: the shortest answers with the weights of each method that their rows allow."""
    pairs, blocks = zip(scores.sequences, scores.tokens, strict=True), []
    for sequence, tokens in sorted(pairs, key=lambda pair: pair[1].shape[1])[:count]:
        allowed = [m for m in methods if m != "spans" or sequence.informative is not None]
        texts = pieces(tokenizer, sequence.tokens[sequence.start:][:60])
        weights = {method: token_weights(method, sequence, tokens)[:60] for method in allowed}
        blocks.append((texts, weights))
    return blocks


def svg_heat(blocks):
    """An SVG of (texts, {method: weights}) blocks: a line a method, shaded by its largest weight.

    Legible on light and dark pages; everything shown is escaped.
    """
    width = LEFT + ADVANCE * max(sum(map(len, texts)) for texts, _ in blocks) + 8
    parts, y = [], 8
    for texts, methods in blocks:
        for name, weights in methods.items():
            parts.append(f'<text x="8" y="{y + 15}" class="name">{html.escape(name)}</text>')
            x, peak = LEFT, max(np.max(weights), 1e-30)
            for text, weight in zip(map(printable, texts), np.clip(weights, 0, None), strict=True):
                wide = ADVANCE * len(text)
                if text:
                    parts.append(
                        f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{LINE - 2}" '
                        f'opacity="{weight / peak:.2f}">'
                        f"<title>{html.escape(name)} {weight:.3g}</title></rect>"
                        f'<text x="{x:.1f}" y="{y + 15}" textLength="{wide:.1f}">'
                        f"{html.escape(text)}</text>")
                x += wide
            y += LINE
        y += 12
    return (f'{SVG_HEAD}{width:.0f} {y}" width="{width:.0f}" height="{y}">'
            f"<style>{STYLE}</style>{''.join(parts)}</svg>\n")


def entropy_report(scores):
    """Quantiles of the entropy of informative and structural tokens, as text; "" without labels."""
    pairs = zip(scores.sequences, scores.tokens, strict=True)
    labelled = [(s, t) for s, t in pairs if s.informative is not None]
    if not labelled:
        return ""
    inside = np.concatenate([s.informative for s, _ in labelled])
    entropy = np.concatenate([t[1] for _, t in labelled])
    names = "".join(f" {name:>9}" for name in ("5 %", "25 %", "median", "75 %", "95 %"))
    lines = [f"{'entropy, nats':>22} {'tokens':>8}{names}"]
    for name, values in (("informative", entropy[inside]), ("structural", entropy[~inside])):
        levels = [0.05, 0.25, 0.5, 0.75, 0.95]
        quantiles = np.quantile(values, levels) if values.size else [math.nan] * 5
        lines.append(f"{name:>22} {values.size:8}" + "".join(f" {q:9.2g}" for q in quantiles))
    return "\n".join(lines)


def confidence_pairs(scores, tokenizer, count=5, window=0.02):
    """Tokens of equal confidence and very different entropy, which no weight made of p tells apart.

    Of `count` decades of 1 − p the most extreme pair whose 1 − p agree within `window` (relative).
    """
    places = [(s, i) for s in scores.sequences for i in range(len(s.tokens) - s.start)]
    logprobs, entropy = np.concatenate(scores.tokens, axis=1)[:2]
    doubt = -np.expm1(logprobs)
    usable = np.flatnonzero((doubt > 1e-6) & (entropy > 0))
    order = usable[np.argsort(doubt[usable])]
    doubt, log_entropy = doubt[order], np.log(entropy[order])
    extreme = {}  # decade -> (gap, the one of lower entropy, the other)
    for last, first in enumerate(np.searchsorted(doubt, doubt * (1 - window))):
        gaps = np.abs(log_entropy[first:last + 1] - log_entropy[last])
        pair = sorted((last, first + gaps.argmax()), key=lambda i: log_entropy[i])
        decade = math.floor(math.log10(doubt[last]))
        extreme[decade] = max(extreme.get(decade, (-1.0,)), (gaps.max(), *pair))
    lines = ["The same confidence, the most different entropy:",
             f"{'p':>10} {'H, nats':>9}  token in [ ]"]
    for _, *pair in sorted(extreme.values(), reverse=True)[:count]:
        for i in pair:
            sequence, at = places[order[i]]
            answer = sequence.tokens[sequence.start:]
            *context, token = map(printable, pieces(tokenizer, answer[max(0, at - 19):at + 1])[-7:])
            numbers = f"{1 - doubt[i]:10.6f} {math.exp(log_entropy[i]):9.2g}"
            lines.append(f"{numbers}  …{''.join(context)}[{token}]")
        lines.append("")
    return "\n".join(lines[:-1])


# ---- A run, at its end: numbers and answers before, after and never taught, side by side

COLUMNS = (  # of metrics.summarise, in the order of the screen
    "forget probability", "forget NLL", "forget informative NLL", "forget other NLL", "talk",
    "endless", "distance", "forget quality", "retain probability", "facts probability")
ANSWERS = 3  # of each set
WIDTH = 110  # characters of an answer


class Screen:
    """Measures a run's models, one in memory at a time, and lays them side by side."""

    def __init__(self, args, world, device):
        """Measure the retrained model, if any. InputError if its numbers are not finite."""
        self.args, self.world, self.device = args, world, device
        self.scores, self.said = {}, {}  # of each column: {set: Scores}, {set: answers}
        self.asked = {}  # {set: {place among the measured rows: Example whose answer is shown}}
        for name in ("forget", "retain"):
            rows = world.measured.get(name, [])
            few = min(ANSWERS, len(rows))
            places = [i * len(rows) // few for i in range(few)]  # evenly spaced
            self.asked[name] = {i: rows[i] for i in places if rows[i].text is None}
        if args.reference:
            decoder = pretrained.load(args.reference, device)
            self._look("never taught", decoder, "--reference " + args.reference)

    def before(self, decoder):
        """Measure the starting model. InputError if its numbers are not finite.

        Returns what should be known of it, a list of lines.
        """
        self._look("before", decoder, "--model " + self.args.model)
        own = summarise(self.scores["before"])
        known, never = own.get("forget NLL"), own.get("holdout NLL")
        if self.args.reference:
            never = summarise(self.scores["never taught"]).get("forget NLL")
        if known is None or never is None or known < never:
            return []
        return [f"forget answers are at {known:.2f} nats a token before the first step, what was "
                f"never taught at {never:.2f}: as they are written the model does not know them, "
                "and there is nothing to forget; is --template the one it was taught with?"]

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
            for scores in self.scores.values():
                scores["forget"].talk = self.world.talk(yardstick, scores["forget"])
        self.columns = {name: summarise(scores, reference=self.scores.get("never taught"))
                        for name, scores in self.scores.items()}
        if "holdout" in self.world.sets and not self.args.reference:
            self.columns["never taught"] = {
                name.replace("holdout", "forget"): value
                for name, value in self.columns["before"].items() if name.startswith("holdout")}
        return {name: {key: value for key, value in column.items() if key in COLUMNS}
                for name, column in self.columns.items()}

    def _look(self, name, decoder, named):
        world = self.world
        wrong = ("facts", "forget") if self.args.reference else ("facts",)
        scores = world.measure(decoder, wrong, ("forget",), bar=name)
        if not all(own.finite for own in scores.values()):
            raise InputError(f"{named}: its predictions are not finite: its weights are broken; "
                             "fetch the model again")
        self.scores[name] = scores
        kept = self.asked["retain"].values()
        self.said[name] = {"forget": [scores["forget"].answer[i] for i in self.asked["forget"]],
                           "retain": answers(decoder, world.tokenizer, kept, world.dtype)}

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
        for kind, examples in self.asked.items():
            for i, example in enumerate(examples.values()):
                lines += ["", printable(f"{kind}: {example.question}")]
                lines += [f"  {name:13} {_short(self.said[name][kind][i])}" for name in order
                          if name in self.said and (name != "never taught" or kind == "forget")]
        if "forget" in self.scores["before"]:
            lines += ["", f"What --method {self.args.method} looks at in two forget answers, "
                      "before the first step:", *self._heat(self.scores["before"]["forget"])]
        return "\n".join(lines)

    def _heat(self, forget):
        colour = sys.stdout is not None and sys.stdout.isatty()
        for sequence, tokens in list(zip(forget.sequences, forget.tokens, strict=True))[:2]:
            weights = token_weights(self.args.method, sequence, tokens, tokens, self.args.beta)
            texts = pieces(self.world.tokenizer, sequence.tokens[sequence.start:])
            yield terminal_heat(texts, weights, colour)


def _short(answer):
    return printable(answer if len(answer) <= WIDTH else answer[:WIDTH] + " …")


def events(record, state, recipe, total):
    """What a user should know of a step while unlearning, a line each. state: the run's, which
    keeps by how much the retain loss rose above its start."""
    if "forget_loss" not in record:
        return
    rise = record["retain_loss"] - state.setdefault("retain_start", record["retain_loss"])
    if rise > DAMAGE:
        if not state["damage"]:
            yield (f"step {record['step']}: retain loss {record['retain_loss']:.2f}, more than "
                   f"{DAMAGE} nats a token above its start: the model is losing what it should "
                   "keep; lower --lambda or --lr")
        state["damage"] = max(state["damage"], rise)
    if recipe.reached(record):
        yield (f"step {record['step']} of {total}: the forget rows are at "
               f"{record['forget_nll']:.2f} nats a token, beyond --until: the run ends here")
    elif recipe.until and record["step"] == total:
        yield (f"--until {recipe.until:g} was not reached: {record['forget_nll']:.2f} nats a token "
               "at the last step")


def remarks(args, world):
    """What is not wrong but should be known, a line each."""
    def content(example):
        return example.question, example.answer, example.text

    for name in ("forget", "retain"):
        if cut := world.cut.get(name):
            yield f"{cut} {name} answers are cut at {world.max_length} tokens (--max-length)"
    kept = set(map(content, world.sets["retain"]))
    shared = [e.where for e in world.sets.get("forget", []) if content(e) in kept]
    if shared:
        more = " ..." if len(shared) > 5 else ""
        yield (f"{len(shared)} forget rows also stand in the retain set, which pulls them both "
               f"ways: {', '.join(shared[:5])}{more}")
    usual = TUNED.get(args.method, {}).get("lr", Recipe.lr)
    ours = args.from_scratch or cli.same(args.model, cli.bundled("weights/target"))
    if args.forget and args.lr == usual and not ours:
        yield (f"--lr {args.lr:g}, like the other defaults of --method {args.method}, was chosen "
               "for the bundled model: docs/recipes.md says where to begin with other weights")
