"""Measure models as the unlearning benchmarks do, in one table; and show what a weighting looks at.

    python evaluate.py runs/etw [MORE ...] [--reference weights/retain] [--json FILE] [--heatmap FILE.svg]

Four parts: the metrics, pure functions of numbers; reading those numbers off a model; pictures; the command line.
Per-token means are in nats and include the end token unless said otherwise.
"""
import argparse
import contextlib
import ctypes
import html
import json
import math
import os
import re
import sys
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from scipy.stats import ks_2samp, rankdata
from tqdm import tqdm

import data
import etw
import model
from model import InputError

MAX_NEW_TOKENS = 200  # of a greedy answer

# ---------------------------------------------------------------------------------------------------------------------
# Metrics: float64 numpy in, float64 numpy out


def probability(nll, wrong_nll=None):
    """exp(−nll), (n,); with options, wrong_nll (n, k), its share among the answers: p / (p + Σ p_wrong) (TOFU)."""
    p = np.exp(-np.asarray(nll, np.float64))
    return p if wrong_nll is None else p / (p + np.exp(-np.asarray(wrong_nll, np.float64)).sum(-1))


def truth_ratio(paraphrased_nll, perturbed_nll):
    """Wrong over correct, (n,): exp(nll of the correct answer − mean over the k wrong ones of theirs), a geometric mean.

    paraphrased_nll (n,), perturbed_nll (n, k), nats per token (TOFU, arXiv 2401.06121, equation 1)."""
    with np.errstate(over="ignore"):  # a model that fell apart: infinity says so
        return np.exp(np.asarray(paraphrased_nll, np.float64) - np.asarray(perturbed_nll, np.float64).mean(-1))


def forget_quality(ratios, reference_ratios):
    """p-value of the two-sample Kolmogorov-Smirnov test between truth ratios of a model and of the retain model (TOFU)."""
    return np.float64(ks_2samp(np.asarray(ratios, np.float64), np.asarray(reference_ratios, np.float64)).pvalue)


def model_utility(values):
    """Harmonic mean of probability, ROUGE and truth ratio over all utility sets (TOFU); 0 if one of them is 0."""
    values = np.asarray(values, np.float64)
    return np.float64(0) if (values <= 0).any() else len(values) / (1 / values).sum()


def rouge_l_recall(prediction, reference):
    """Longest common subsequence of words over the reference's words; \\w+ in lower case, no stemming (TOFU stems)."""
    predicted, words = (re.findall(r"\w+", s.lower()) for s in (prediction, reference))
    best = [0] * (len(predicted) + 1)  # best[j]: common subsequence of the words so far and predicted[:j]
    for word in words:
        diagonal = 0
        for j, other in enumerate(predicted, 1):
            diagonal, best[j] = best[j], diagonal + 1 if word == other else max(best[j], best[j - 1])
    return np.float64(best[-1] / len(words) if words else 0)


def extraction_strength(hits):
    """1 − k/n, k the first of the n tokens from which greedy argmax gets the whole suffix right; 0 if it misses the last."""
    wrong = np.flatnonzero(~np.asarray(hits, bool))
    return np.float64(1 - (wrong[-1] + 1) / len(hits) if len(wrong) else 1)


def min_k(logprobs, share=0.4):
    """Min-K membership score: − mean of the lowest max(1, ⌊share · n⌋) log-probabilities of n tokens, without end token."""
    return -np.sort(np.asarray(logprobs, np.float64))[:max(1, int(share * len(logprobs)))].mean()


def roc_auc(positive, negative):
    """Probability that a positive's score is above a negative's, ties counting half; NaN if one of them is empty."""
    n, m = len(positive), len(negative)
    if not n * m:
        return np.float64(np.nan)
    ranks = rankdata(np.concatenate([positive, negative]).astype(np.float64))
    return (ranks[:n].sum() - n * (n + 1) / 2) / (n * m)


def priv_leak(auc, reference_auc):
    """((1 − AUC) − (1 − AUC_ref)) / (1 − AUC_ref) · 100 (MUSE, arXiv 2407.06460); 0: forget rows look as if never seen."""
    return 100 * (reference_auc - auc) / (1 - reference_auc) if reference_auc < 1 else np.float64(np.nan)


# ---------------------------------------------------------------------------------------------------------------------
# Reading the numbers off a model


def precision(device, dtype):
    """Autocast to bfloat16, or nothing: the context of every forward pass of train.py and evaluate.py."""
    return torch.autocast(torch.device(device).type, dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()


def answer_tokens(decoder, sequences, dtype=torch.float32, hits=False, temperature=1.0, budget=None, bar=None):
    """For each Sequence a float64 array (2 or 3, n) over its answer tokens: log p, entropy and, with hits, argmax correct.

    Batches are of similar length and of at most `budget` padded tokens, logits of an eighth of that exist at a time."""
    device = decoder.head.device
    budget = budget or (2048 if device.type == "cpu" else 32768)
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i].tokens))
    batches, results = [[]], [None] * len(sequences)
    for i in by_length:
        if batches[-1] and (len(batches[-1]) + 1) * len(sequences[i].tokens) > budget:
            batches.append([])
        batches[-1].append(i)
    progress = tqdm(total=len(sequences), desc=bar, disable=None if bar else True, leave=False)
    with torch.inference_mode(), precision(device, dtype), progress:
        for indices in filter(None, batches):
            batch = data.collate([sequences[i] for i in indices], device)
            hidden = batch.answers(decoder.hidden(batch.inputs, batch.lengths))
            columns, chunk = [], max(1, budget // 8)
            for h, t in zip(hidden.split(chunk), batch.targets[batch.mask].split(chunk), strict=True):
                numbers = etw.token_stats(h, decoder.head, t, temperature)
                columns.append(torch.stack([*numbers, (h @ decoder.head.T).argmax(-1) == t] if hits else numbers))
            columns = torch.cat(columns, 1).double().cpu().numpy()
            ends = np.cumsum([len(sequences[i].tokens) - sequences[i].start for i in indices])[:-1]
            for i, numbers in zip(indices, np.split(columns, ends, axis=1), strict=True):
                results[i] = numbers
            progress.update(len(indices))
    return results


def answers(decoder, tokenizer, examples, dtype=torch.float32, bar=None, batch=64):
    """The greedy answer of a model to each Example's question, as text; None for a `text` row."""
    asked = [(data.prompt_ids(e, tokenizer), i) for i, e in enumerate(examples) if e.text is None]
    asked.sort(key=lambda item: len(item[0]))
    texts = [None] * len(examples)
    for first in tqdm(range(0, len(asked), batch), desc=bar, disable=None if bar else True, leave=False):
        prompts, rows = zip(*asked[first:first + batch], strict=True)
        with precision(decoder.head.device, dtype):
            found = model.generate(decoder, prompts, MAX_NEW_TOKENS, tokenizer.end_id)
        for row, ids in zip(rows, found, strict=True):
            texts[row] = tokenizer.decode(ids).strip()
    return texts


def score(decoder, tokenizer, examples, max_length=None, dtype=torch.float32, options=False, wrong=True, text=True,
          temperature=1.0, bar=None):
    """Every per-row number of one data set: a dict of lists, one entry a row, None where the row does not allow it.

    nll, memorised, extraction, min_k; probability (with `options`, among the wrong answers); truth_ratio (if `wrong`);
    answer and rouge (if `text`: the model generates). Beside them `tokens`: (Sequence, array of answer_tokens) for each
    answer, several for a text row in windows; and `cut`: how many answers did not fit.
    """
    n, max_length = len(examples), max_length or decoder.config.max_position_embeddings
    spellings = [[e.answer for e in examples]]  # kind 0: the answer (or text), 1: its paraphrase, 2 and up: the wrong ones
    if wrong:
        spellings += [[e.paraphrased_answer for e in examples], *zip_longest(*(e.perturbed_answer for e in examples))]
    sequences, kinds, cut = [], [], 0
    for kind, strings in enumerate(spellings):
        rows = [i for i in range(n) if strings[i] is not None]
        given = [strings[i] for i in rows] if kind else None
        encoded, some = data.encode([examples[i] for i in rows], tokenizer, max_length, given)
        sequences += [s._replace(row=rows[s.row]) for s in encoded]
        kinds += [kind] * len(encoded)
        cut += some
    own = kinds.count(0)
    numbers = answer_tokens(decoder, sequences[:own], dtype, hits=True, temperature=temperature, bar=bar)
    numbers += answer_tokens(decoder, sequences[own:], dtype, bar=bar)

    whole, content, paraphrased, wrongs = ([[] for _ in range(n)] for _ in range(4))
    for kind, s, found in zip(kinds, sequences, numbers, strict=True):
        if kind == 0:
            whole[s.row].append(found)
            content[s.row].append(found[:, :-1] if s.ended else found)  # without the end token
        else:
            (paraphrased if kind == 1 else wrongs)[s.row].append(-found[0].mean())
    nll = [-np.concatenate(t, 1)[0].mean() for t in whole]
    content = [np.concatenate(t, 1) for t in content]
    correct = [p[0] if p else own for p, own in zip(paraphrased, nll, strict=True)]
    result = {
        "nll": nll,
        "probability": [probability(a, w if options and w else None) for a, w in zip(nll, wrongs, strict=True)],
        "truth_ratio": [truth_ratio(c, w) if w else None for c, w in zip(correct, wrongs, strict=True)],
        "memorised": [c[2].mean() if c.size else None for c in content],
        "extraction": [extraction_strength(c[2]) if c.size else None for c in content],
        "min_k": [min_k(c[0]) if c.size else None for c in content],
        "tokens": list(zip(sequences[:own], numbers[:own], strict=True)), "cut": cut,
    }
    if text:
        result["answer"] = answers(decoder, tokenizer, examples, dtype, bar)
        result["rouge"] = [None if a is None else rouge_l_recall(a, e.answer)
                           for a, e in zip(result["answer"], examples, strict=True)]
    return result


def average(values):
    """Mean of what is there, as a float; None if nothing is."""
    values = [v for v in values if v is not None]
    return float(np.mean(values)) if values else None


def weights_auc(scores, start=None, names=tuple(etw.WEIGHTINGS)):
    """ROC-AUC with which each weighting tells informative from structural tokens, {name: AUC or None}.

    scores: of a set with spans; start: scores of the starting model on it (for tnpo and npo), by default the same."""
    if start is None or [s for s, _ in start["tokens"]] != [s for s, _ in scores["tokens"]]:  # or another tokenizer
        start = scores
    rows = [(*own, t) for own, (_, t) in zip(scores["tokens"], start["tokens"], strict=True) if own[0].informative is not None]
    informative = np.concatenate([np.zeros(0, bool), *(s.informative for s, _, _ in rows)])
    aucs = {}
    for name in names:
        weights = np.concatenate([np.zeros(0), *(weigh(name, *row) for row in rows)])
        aucs[name] = float(roc_auc(weights[informative], weights[~informative]))
    return {name: None if math.isnan(auc) else auc for name, auc in aucs.items()}


def weigh(name, sequence, tokens, reference=None, beta=None):
    """The weights (n,) that a method of etw.WEIGHTINGS gives the answer tokens of one Sequence."""
    logprobs, entropy = torch.from_numpy(tokens[:2])[:, None]
    known = {"reference": None if reference is None else torch.from_numpy(reference[:1]),
             "spans": None if sequence.informative is None else torch.tensor([sequence.informative])}
    return etw.WEIGHTINGS[name](logprobs, entropy, torch.ones_like(logprobs, dtype=torch.bool), beta=beta, **known)[0].numpy()


def summarise(scores, target=None, reference=None):
    """The measurements of one model, {column: float or None}, from {set name: scores}.

    Sets: `forget`, `holdout` (never taught), and any others, which are the utility sets. target: the measurements of the
    model that unlearning started from, for the utility lost. reference: scores of the retain model."""
    result, utility = {}, []
    for name, s in scores.items():
        if name == "holdout":
            continue
        ratios = [r for r in s["truth_ratio"] if r is not None]
        fold = (lambda r: min(r, 1 / r) if r else 0.0) if name == "forget" else (lambda r: max(0.0, 1 - r))
        triple = {"probability": average(s["probability"]), "rouge": average(s.get("rouge", [])),
                  "truth_ratio": average(map(fold, ratios))}
        result |= {f"{name} {key}": value for key, value in triple.items()}
        if name == "forget":
            result |= {f"forget {key}": average(s[key]) for key in ("memorised", "extraction")}
        else:
            utility += triple.values()
    known = [v for v in utility if v is not None]
    result["model utility"] = float(model_utility(known)) if known else None
    if target and known:
        result["utility lost"] = 100 * (target["model utility"] - result["model utility"])
    forget = scores.get("forget")
    if forget and reference:
        ratios, expected = ([r for r in s["truth_ratio"] if r is not None] for s in (forget, reference["forget"]))
        if ratios and expected:
            result["forget quality"] = float(forget_quality(ratios, expected))
            result["-log10 FQ"] = -math.log10(max(result["forget quality"], 5e-324)) + 0.0
    if forget and "holdout" in scores:
        result["Min-K AUC"] = membership_auc(scores)
        if reference and "holdout" in reference:
            result["PrivLeak"] = float(priv_leak(result["Min-K AUC"], membership_auc(reference)))
    if forget:
        result["weights AUC"] = weights_auc(forget, names=["etw"])["etw"]
    return result


def membership_auc(scores):
    """ROC-AUC of Min-K between the forget set (label 0) and the holdout (label 1): 1 if every forget row is better known."""
    known, unknown = ([v for v in scores[name]["min_k"] if v is not None] for name in ("forget", "holdout"))
    return float(roc_auc(unknown, known))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: what a weighting looks at


def pieces(tokenizer, ids):
    """The text of each token; a token that ends inside a character is empty and the next one has it whole."""
    texts, done = [], ""
    for i in range(len(ids)):
        text = tokenizer.backend.decode(ids[:i + 1], skip_special_tokens=False)
        whole = not text.endswith("\ufffd")
        texts.append(text[len(done):] if whole else "")
        done = text if whole else done
    if ids and ids[-1] == tokenizer.end_id:
        texts[-1] = " ∎"
    return texts


def printable(text):
    """Nothing from a data file or a model steers the terminal (or breaks XML): one · for each character of that kind."""
    return "".join(c if c.isprintable() else "·" for c in text)


def terminal_heat(texts, weights, colour):
    """One answer for a terminal: background shades, or without colour a second line of bars under the characters."""
    shades = np.asarray(weights) / max(np.max(weights), 1e-30)
    texts = [printable(t) for t in texts]
    if colour:
        return "".join(f"\x1b[48;2;{int(255 * s)};{int(150 * s)};0m{t}\x1b[0m" if s > 0.04 else t
                       for t, s in zip(texts, shades, strict=True))
    return "".join(texts) + "\n" + "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * s))] * len(t) for t, s in zip(texts, shades, strict=True))


def svg_heat(blocks):
    """An SVG of token weights. blocks: a list of (texts, {method: weights}); a line a method, shaded relative to the
    largest weight of that line. Legible on light and dark pages; everything shown is escaped."""
    advance, line, left = 7.2, 22, 64
    width = left + advance * max(sum(map(len, texts)) for texts, _ in blocks) + 8
    parts, y = [], 8
    for texts, methods in blocks:
        for name, weights in methods.items():
            parts.append(f'<text x="8" y="{y + 15}" class="name">{html.escape(name)}</text>')
            x, peak = left, max(np.max(weights), 1e-30)
            for text, weight in zip(texts, weights, strict=True):
                shown = printable(text)
                wide = advance * len(shown)
                if shown:
                    parts.append(f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{line - 2}" opacity="{weight / peak:.2f}">'
                                 f'<title>{html.escape(name)} {weight:.3g}</title></rect>'
                                 f'<text x="{x:.1f}" y="{y + 15}" textLength="{wide:.1f}">{html.escape(shown)}</text>')
                x += wide
            y += line
        y += 12
    style = ("text{font:12px ui-monospace,Menlo,Consolas,monospace;fill:#1f2328;white-space:pre}.name{fill:#59636e}"
             "rect{fill:#ffa726}@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.name{fill:#9198a1}rect{fill:#b85c00}}")
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" viewBox="0 0 {width:.0f} {y}" '
            f'width="{width:.0f}" height="{y}">'
            f"<style>{style}</style>{''.join(parts)}</svg>\n")


def entropy_report(scores, auc):
    """What the entropy knows, as text: the AUC of every weighting, and the entropy of informative and structural tokens."""
    labelled = [(s, t) for s, t in scores["tokens"] if s.informative is not None]
    lines = ["Weights against the labelled spans, ROC-AUC: "
             + "  ".join(f"{name} {show(value)}" for name, value in auc.items())]
    if labelled:
        informative = np.concatenate([s.informative for s, _ in labelled])
        entropy = np.concatenate([t[1] for _, t in labelled])
        lines += ["", f"{'entropy, nats':>22} {'tokens':>8} {'5 %':>9} {'25 %':>9} {'median':>9} {'75 %':>9} {'95 %':>9}"]
        for name, some in (("informative", entropy[informative]), ("structural", entropy[~informative])):
            quantiles = np.quantile(some, [0.05, 0.25, 0.5, 0.75, 0.95]) if len(some) else [math.nan] * 5
            lines.append(f"{name:>22} {len(some):8} " + " ".join(f"{q:9.2g}" for q in quantiles))
    return "\n".join(lines)


def confidence_pairs(scores, tokenizer, count=5, window=0.02):
    """Tokens of the same confidence and very different entropy, which no weight made of p alone can tell apart, as text: the
    most extreme pair, with 1 − p within `window` (relative), of each of `count` decades of 1 − p."""
    places = [(s, i) for s, _ in scores["tokens"] for i in range(len(s.tokens) - s.start)]
    logprobs, entropy = np.concatenate([t[:2] for _, t in scores["tokens"]], 1)
    doubt = -np.expm1(logprobs)
    order = [i for i in np.argsort(doubt) if doubt[i] > 1e-6 and entropy[i] > 0]
    doubt, logs = doubt[order], np.log(entropy[order])
    best = {}
    for high, low in enumerate(np.searchsorted(doubt, doubt * (1 - window))):
        other = low + np.abs(logs[low:high + 1] - logs[high]).argmax()
        gap, decade = abs(logs[other] - logs[high]), math.floor(math.log10(doubt[high]))
        best[decade] = max(best.get(decade, (-1.0,)), (gap, *sorted((high, other), key=lambda i: logs[i])))
    lines = ["The same confidence, the most different entropy:", f"{'p':>10} {'H, nats':>9}  token in [ ]"]
    for _, *pair in sorted(best.values(), reverse=True)[:count]:
        for i in pair:
            s, at = places[order[i]]
            texts = pieces(tokenizer, s.tokens[s.start:][:at + 1])
            context = printable("".join(texts[-7:-1])) + f"[{printable(texts[-1])}]"
            lines.append(f"{1 - doubt[i]:10.6f} {math.exp(logs[i]):9.2g}  …{context}")
        lines.append("")
    return "\n".join(lines[:-1])


def show(value, digits=3):
    """A number for a table: – where there is none, exponents only where needed."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.1e}" if 0 < abs(value) < 10 ** -digits else f"{value:.{digits}f}"


def table(rows):
    """A text table from {row name: {column: number or None}}: columns that share all but their last word stand under it."""
    short = {"probability": "prob", "truth_ratio": "TR", "memorised": "EM", "extraction": "ES", "rouge": "ROUGE"}
    columns, group = [["", "", *rows]], None
    for name in dict.fromkeys(c for row in rows.values() for c in row):
        top, _, bottom = name.rpartition(" ")
        columns.append(["" if top == group else top, short.get(bottom, bottom), *(show(row.get(name)) for row in rows.values())])
        group = top
    widths = [max(map(len, column)) for column in columns]
    lines = [[f"{cell:>{w}}" if i else f"{cell:<{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
             for line in zip(*columns, strict=True)]
    return "\n".join("  ".join(line) for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    """argparse whose refusals are one line like all others, and whose help shows the defaults."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise InputError(" ".join(message.split()))


def number(kind=float, above=None, least=None, most=None):
    """An argparse type: a finite number of `kind` within bounds, else a refusal that says them."""
    bounds = [f"above {above}" * (above is not None), f"at least {least}" * (least is not None),
              f"at most {most}" * (most is not None)]
    wanted = " and ".join(filter(None, bounds)) or "finite"

    def parse(string):
        try:
            value = kind(string)
            math.isfinite(value)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{string!r:.40} is not a number ({kind.__name__})") from None
        if not math.isfinite(value) or (above is not None and value <= above) or (least is not None and value < least) \
                or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{string} is out of range: give a number {wanted}")
        return value
    return parse


def pick_device(name, dtype):
    """(device, autocast dtype) for --device and --dtype: `auto` takes a GPU if there is one and bfloat16 if that has it."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name):
        raise InputError(f"--device {name}: unknown; use auto, cpu, cuda, cuda:1 or mps")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"--device {name}: not available on this machine; use cpu or auto") from None
    if name == "cpu":
        keep_freed_memory()
    native = name.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return name, torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and native) else torch.float32


def keep_freed_memory():
    """glibc gives every large block back to the kernel and pays page faults to have it again: a tenth of a step on a CPU."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: of which up to 2 GB stay


def open_model(path, device, template):
    """(Decoder, Tokenizer) of a model directory or hub name."""
    decoder = model.load(path, device)
    return decoder, data.Tokenizer(decoder.source, template)


def round_weights(decoder, bits):
    """Round every linear layer inside the blocks to `bits` bits: to nearest, symmetric, one scale for each output row."""
    for module in decoder.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not decoder.head:
            scale = module.weight.data.abs().amax(1, keepdim=True).clamp_min(1e-30) / (2 ** (bits - 1) - 1)
            module.weight.data = torch.round(module.weight.data / scale) * scale


def write(path, text):
    """Write a text file whole or not at all."""
    model.write_aside(Path(path), lambda aside: aside.write_text(text, "utf-8"))


def plain(value):
    """JSON-ready: numpy numbers to float, what is not finite to null."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def parse_args(argv=None):
    p = Parser(prog="evaluate.py", description="Measure models: one table, a row a model, a column a measurement.")
    p.add_argument("models", nargs="+", metavar="MODEL", help="model directories, e.g. runs/etw")
    p.add_argument("--target", metavar="DIR", help="model that unlearning started from (default: the run's own --model)")
    p.add_argument("--reference", metavar="DIR", help="model retrained without the forget set; weights/retain if the target "
                   "is weights/target")
    p.add_argument("--forget", metavar="FILE", default="data/forget.jsonl", help="forget set")
    p.add_argument("--retain", metavar="FILE", default="data/retain.jsonl", help="retain set: the first utility set")
    p.add_argument("--facts", metavar="FILE", nargs="+", default=["data/facts.jsonl"],
                   help="further utility sets, with wrong answers as options")
    p.add_argument("--holdout", metavar="FILE", help="rows like the forget set that were never taught, for membership "
                   "inference; data/holdout.jsonl if the forget set is the bundled one")
    p.add_argument("--template", choices=data.TEMPLATES, help="how a question is put to the model (default: the run's own, "
                   "else plain)")
    p.add_argument("--json", metavar="FILE", help="write the measurements, with per-row values")
    p.add_argument("--heatmap", metavar="FILE.svg", nargs="?", const="heatmap.svg", help="draw the token weights of the first "
                   "MODEL on forget answers and print what its entropy knows")
    p.add_argument("--bits", type=number(int, least=2, most=16), help="measure models rounded to so many bits")
    p.add_argument("--ask", metavar="QUESTION", help="only let every model answer this question")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="bfloat16: autocast")
    return p.parse_args(argv)


def run(args):
    device, dtype = pick_device(args.device, args.dtype)
    made = data.read_json(Path(args.models[0]) / "args.json")  # what train.py was told, if it made this model
    made = {k: v for k, v in made.items() if isinstance(v, str) and v and k in ("model", "template")} | {
        "taught": made.get("forget") is None and "forget" in made}
    args.template = args.template or made.get("template", "plain")
    if args.template not in data.TEMPLATES:
        raise InputError(f"{args.models[0]}/args.json: unknown template {args.template!r}: give --template")
    if args.ask is not None:
        data.checked_text(args.ask, "--ask")
        for path in args.models:
            decoder, tokenizer = open_model(path, device, args.template)
            print(f"{path}: {printable(answers(decoder, tokenizer, [data.Example(args.ask)], dtype)[0])}")
        return
    bundled = same(args.forget, "data/forget.jsonl")
    target = args.target or (None if made["taught"] else made.get("model")) or ("weights/target" if bundled else args.models[0])
    reference = args.reference or ("weights/retain" if same(target, "weights/target") else None)
    holdout = args.holdout or ("data/holdout.jsonl" if bundled else None)
    options = [Path(f).stem for f in args.facts]
    if len({"forget", "retain", "holdout", *options}) < 3 + len(options):
        raise InputError(f"--facts: {', '.join(options)}: each utility set needs a file name of its own: rename one")
    files = {"forget": args.forget, "retain": args.retain, **dict(zip(options, args.facts, strict=True)), "holdout": holdout}
    sets = {name: data.read_jsonl(path) for name, path in files.items() if path}
    for flag in ("json", "heatmap"):
        path = getattr(args, flag)
        if path and (Path(path).is_dir() or not os.access(Path(path).resolve().parent, os.W_OK)):
            raise InputError(f"--{flag} {path}: cannot be written there: name another file")
    names, folders = {}, {}  # each model once, the target first, the reference last
    for path in [target, *args.models, *filter(None, [reference])]:
        folders[path] = model.resolve(path).resolve()
        names.setdefault(folders[path], path)
        model.check(folders[path])  # what is wrong with any of them is said before the first is measured
        data.Tokenizer(folders[path], args.template)
    target, first, reference = (path and names[folders[path]] for path in (target, args.models[0], reference))
    paths = [path for path in names.values() if path != reference] + [reference] * bool(reference)

    scores, spelling = {}, None
    for path in paths:
        decoder, tokenizer = open_model(path, device, args.template)
        spelling = tokenizer if path == first else spelling  # the one that heat map and pairs need
        if args.bits:
            round_weights(decoder, args.bits)
        scores[path] = {name: score(decoder, tokenizer, rows, dtype=dtype, options=name in options, wrong=name != "holdout",
                                    text=name != "holdout", bar=f"{path} {name}") for name, rows in sets.items()}
        if cut := sum(s["cut"] for s in scores[path].values()):
            print(f"{path}: {cut} answers are longer than its context and were cut", file=sys.stderr)
    before = summarise(scores[target], None, scores.get(reference))
    summaries = {path: summarise(s, before, scores.get(reference)) for path, s in scores.items()}
    print(table(summaries))
    aucs = {path: weights_auc(s["forget"], scores[target]["forget"]) for path, s in scores.items()}
    if args.json:
        found = {path: {"measurements": summaries[path], "weights AUC": aucs[path],
                        "rows": {name: {k: v for k, v in one.items() if isinstance(v, list) and k != "tokens"}
                                 for name, one in scores[path].items()}} for path in paths}
        write(args.json, json.dumps(plain(found), indent=1, ensure_ascii=False) + "\n")
    if args.heatmap:
        forget = scores[first]["forget"]
        print(f"\n{first}, forget set\n{entropy_report(forget, aucs[first])}\n\n{confidence_pairs(forget, spelling)}")
        write(args.heatmap, svg_heat(heat_blocks(forget, spelling)))
        print(f"\nToken weights drawn in {args.heatmap}")


def heat_blocks(scores, tokenizer, count=3, methods=("etw", "wga", "imp", "satimp", "spans")):
    """For svg_heat: the shortest answers of a set, with the weights of each method (spans only where labelled)."""
    rows = sorted(scores["tokens"], key=lambda row: len(row[0].tokens) - row[0].start)[:count]
    return [(pieces(tokenizer, s.tokens[s.start:])[:60],
             {name: weigh(name, s, t)[:60] for name in methods if name != "spans" or s.informative is not None}) for s, t in rows]


def forgiving_streams():
    """A terminal that lacks a character gets a question mark instead of an exception."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def same(path, other):
    return os.path.realpath(path) == os.path.realpath(other)


def main(argv=None):
    """Run the command line; returns the exit code: 0, or 2 with one line on stderr if the input is wrong."""
    forgiving_streams()
    try:
        run(parse_args(argv))
    except InputError as e:
        print(printable(f"evaluate.py: {e}"), file=sys.stderr)
        return 2
    except (OSError, torch.OutOfMemoryError) as e:
        print(printable(f"evaluate.py: {str(e).splitlines()[0]}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
