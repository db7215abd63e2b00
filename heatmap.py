"""What a weighting looks at: its weights on the tokens of an answer, as pictures and as text.

scores: measure.Scores of a set, its `sequences` and for each of them its `tokens`, an array whose
first rows are log p and entropy of the answer tokens.
"""
import html
import math

import numpy as np

from cli import printable
from metrics import token_weights

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
