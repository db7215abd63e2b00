"""Reading numbers off a model: log p and entropy of given answers, its own answers, whole sets.

Per-token means are in nats and include the end token unless said otherwise.
"""
import math
import sys
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import etw
import metrics
import model
from cli import precision, printable

MAX_NEW_TOKENS = 200  # of a greedy answer


def progress(bar, total):
    """A progress bar of that label on a terminal; none where bar is None."""
    return tqdm(total=total, desc=bar, disable=None if bar else True, leave=False)


def answer_tokens(decoder, sequences, dtype=torch.float32, temperature=1.0, full=True, budget=None,
                  bar=None):
    """For each Sequence a float64 array of its answer tokens: log p, entropy, whether it is argmax.

    (3, n); with full=False, in less time, (1, n), log p alone. Batches are of similar length and of
    at most `budget` padded tokens; logits of an eighth of that exist at a time.
    """
    def numbers(hidden, targets):
        logits = hidden @ decoder.head.T
        if not full:
            return -F.cross_entropy(logits.float(), targets, reduction="none")[None]
        stats = etw.logit_stats(logits, targets, temperature)
        return torch.stack([*stats, logits.argmax(-1) == targets])

    device = decoder.head.device
    budget = budget or (2048 if device.type == "cpu" else 32768)
    results = [None] * len(sequences)
    with torch.inference_mode(), precision(device, dtype), progress(bar, len(sequences)) as done:
        for batch_rows in by_length([len(s.tokens) for s in sequences], budget):
            some = [sequences[i] for i in batch_rows]
            batch = data.collate(some, device)
            hidden = batch.answers(decoder.hidden(batch.inputs, batch.lengths))
            chunks = (t.split(max(1, budget // 8)) for t in (hidden, batch.targets[batch.mask]))
            columns = torch.cat([numbers(*chunk) for chunk in zip(*chunks, strict=True)], 1)
            ends = np.cumsum([len(s.tokens) - s.start for s in some])[:-1]
            parts = np.split(columns.cpu().double().numpy(), ends, axis=1)
            for i, part in zip(batch_rows, parts, strict=True):
                results[i] = part
            done.update(len(some))
    return results


def by_length(lengths, budget):
    """Batches of indices: of similar length, of at most `budget` padded tokens or of one row."""
    batches = [[]]
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches[-1] and (len(batches[-1]) + 1) * lengths[i] > budget:
            batches.append([])
        batches[-1].append(i)
    return [batch for batch in batches if batch]


def greedy(decoder, prompts, end_id, dtype=torch.float32, bar=None, size=64):
    """The ids of the greedy answer to each prompt, a list of ids, without the end token."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results = [None] * len(prompts)
    with precision(decoder.head.device, dtype), progress(bar, len(prompts)) as done:
        for first in range(0, len(order), size):
            rows = order[first:first + size]
            ids = model.generate(decoder, [prompts[i] for i in rows], MAX_NEW_TOKENS, end_id)
            for i, answer in zip(rows, ids, strict=True):
                results[i] = answer
            done.update(len(rows))
    return results


def answers(decoder, tokenizer, examples, dtype=torch.float32):
    """The greedy answer to the question of each Example, as text."""
    prompts = [data.prompt_ids(example, tokenizer) for example in examples]
    said = greedy(decoder, prompts, tokenizer.end_id, dtype)
    return [tokenizer.decode(ids).strip() for ids in said]


class Scores:
    """One set under one model: lists with an entry a row, None where the row does not allow it.

    sequences, tokens: the answers, several of a `text` row, and for each what answer_tokens gives.
    prompts, said: ids before the answer and of the greedy one; talk: the log p of `said` under a
    yardstick model, set by the caller.
    """

    ROWS = """nll informative_nll other_nll probability correct_nll wrong_nll truth_ratio memorised
        extraction min_k answer rouge endless""".split()

    def __init__(self, sequences, tokens):
        self.sequences, self.tokens = sequences, tokens
        by_row = groupby(range(len(sequences)), key=lambda k: sequences[k].row)
        self.places = [list(places) for _, places in by_row]  # of each row's sequences
        firsts = (sequences[places[0]] for places in self.places)
        self.prompts = [first.tokens[:first.start] for first in firsts]
        for name in (*self.ROWS, "said", "talk"):
            setattr(self, name, [None] * len(self.places))
        for i, places in enumerate(self.places):
            whole = np.concatenate([tokens[k] for k in places], axis=1)
            content = whole[:, :-1] if sequences[places[-1]].ended else whole  # no end token
            nll = [-tokens[k][0] for k in places]
            parts = metrics.token_means([sequences[k] for k in places], nll)
            self.nll[i], self.informative_nll[i], self.other_nll[i] = parts
            self.probability[i] = metrics.probability(self.nll[i])
            if content.size:
                self.memorised[i] = content[2].mean()
                self.extraction[i] = metrics.extraction_strength(content[2])
                self.min_k[i] = metrics.min_k(content[0])

    @property
    def finite(self):
        """Whether every log p is a number: weights with NaN give none."""
        return all(np.isfinite(t[0]).all() for t in self.tokens)

    def compare(self, i, paraphrased_nll, wrong_nll, options):
        """Row i beside its paraphrase, or None, and k wrong answers; options: p is among these."""
        correct = self.nll[i] if paraphrased_nll is None else paraphrased_nll
        self.correct_nll[i], self.wrong_nll[i] = correct, np.mean(wrong_nll)
        self.truth_ratio[i] = metrics.truth_ratio(correct, wrong_nll)
        if options:
            self.probability[i] = metrics.probability(self.nll[i], wrong_nll)

    def matched(self, other):
        """`tokens` of another model for the same Sequences; None if it lacks one of them."""
        keys = [(s.start, *s.tokens) for s in other.sequences]
        theirs = dict(zip(keys, other.tokens, strict=True))
        found = [theirs.get((s.start, *s.tokens)) for s in self.sequences]
        return None if any(tokens is None for tokens in found) else found


class World:
    """The data sets of one experiment as one tokenizer sees them, and what models are held against.

    sets {name: [Example]}: "forget", "holdout" (never taught, for comparison) and any utility sets.
    All is encoded here: what cannot be (InputError) is refused before anything is measured.
    options: the sets whose probability is taken among their wrong answers.
    most: at most so many rows of a set are measured, evenly spaced.
    """

    def __init__(self, sets, tokenizer, max_length, *, options=("facts",), dtype=torch.float32,
                 temperature=1.0, most=None):
        self.sets, self.tokenizer, self.max_length = sets, tokenizer, max_length
        self.options, self.dtype, self.temperature = options, dtype, temperature
        self.starting = None  # starting_stats, set by whoever trains with a method that reads them
        self.sequences, self.cut = {}, {}  # answers of all rows; how many of them did not fit
        self.cut_others = 0  # paraphrases and wrong answers that did not
        self.rows = {name: thin(range(len(examples)), most) for name, examples in sets.items()}
        self.measured = {name: [sets[name][i] for i in rows] for name, rows in self.rows.items()}
        self.others = {}  # (name, row): its paraphrase, if there is one, and its wrong answers
        for name, examples in sets.items():
            self.sequences[name], self.cut[name] = data.encode(examples, tokenizer, max_length)
            for row in self.rows[name]:
                example = examples[row]
                if example.perturbed_answer and name != "holdout":
                    texts = [example.paraphrased_answer, *example.perturbed_answer]
                    texts = [text for text in texts if text is not None]
                    same = [example] * len(texts)
                    self.others[name, row], cut = data.encode(same, tokenizer, max_length, texts)
                    self.cut_others += cut

    def score(self, decoder, name, wrong=True, text=True, most=None, bar=None):
        """Scores of the measured rows of a set, at most `most` of them, evenly spaced.

        wrong: truth ratios, too; text: greedy answers, too; bar: the label of a progress bar.
        """
        rows = thin(self.rows[name], most)
        wanted = set(rows)
        sequences = [s for s in self.sequences[name] if s.row in wanted]
        tokens = answer_tokens(decoder, sequences, self.dtype, self.temperature, bar=bar)
        scores = Scores(sequences, tokens)
        if wrong:
            self._compare(decoder, name, rows, scores, bar)
        if text:
            self._ask(decoder, name, rows, scores, bar)
        return scores

    def _compare(self, decoder, name, rows, scores, bar):
        others = [self.others.get((name, row), []) for row in rows]
        flat = [s for row in others for s in row]
        tokens = answer_tokens(decoder, flat, self.dtype, full=False, bar=bar)
        nll = iter([-t.mean() for t in tokens])
        for i, row in enumerate(rows):
            if others[i]:
                own = [next(nll) for _ in others[i]]
                k = len(self.sets[name][row].perturbed_answer)
                scores.compare(i, own[0] if len(own) > k else None, own[-k:], name in self.options)

    def _ask(self, decoder, name, rows, scores, bar):
        examples = [self.sets[name][row] for row in rows]
        asked = [i for i, example in enumerate(examples) if example.text is None]
        prompts, context = scores.prompts, decoder.config.max_position_embeddings
        questions = [prompts[i] for i in asked]
        said = greedy(decoder, questions, self.tokenizer.end_id, self.dtype, bar)
        for i, ids in zip(asked, said, strict=True):
            scores.said[i], scores.answer[i] = ids, self.tokenizer.decode(ids).strip()
            scores.rouge[i] = metrics.rouge_l_recall(scores.answer[i], examples[i].answer)
            scores.endless[i] = len(ids) == min(MAX_NEW_TOKENS, context - len(prompts[i]))

    def measure(self, decoder, wrong=None, text=None, most=None, bar=None):
        """{name: Scores} of all sets. wrong, text: the sets to look at these in; None: all; bar:
        what is measured, for its progress bars or, off a terminal, a line on stderr."""
        if bar and not (sys.stderr and sys.stderr.isatty()):
            print(printable(f"measuring {bar}"), file=sys.stderr)
        taught = [name for name in self.sets if name != "holdout"]
        wrong = taught if wrong is None else wrong
        text = taught if text is None else text
        scores = {}
        for name in self.sets:
            label = bar and f"{bar} {name}"
            scores[name] = self.score(decoder, name, name in wrong, name in text, most, label)
        return scores

    def talk(self, yardstick, scores, bar=None):
        """log p under a yardstick model of each greedy answer and its end token: arrays or None."""
        spoken, talk = [], [None] * len(scores.said)
        for i, ids in enumerate(scores.said):
            if ids is not None:
                prompt, ended = scores.prompts[i], not scores.endless[i]
                tokens = prompt + ids + ([self.tokenizer.end_id] if ended else [])
                spoken.append(data.Sequence(tokens, len(prompt), None, ended, i))
        numbers = answer_tokens(yardstick, spoken, self.dtype, full=False, bar=bar)
        for sequence, (logprobs,) in zip(spoken, numbers, strict=True):
            talk[sequence.row] = logprobs
        return talk

    def starting_stats(self, decoder, bar=None):
        """log p and entropy (2, n) float32 of each forget answer under the starting model."""
        sequences = self.sequences["forget"]
        tokens = answer_tokens(decoder, sequences, self.dtype, self.temperature, bar=bar)
        return [torch.from_numpy(t[:2]).float() for t in tokens]


def thin(rows, most):
    """At most so many of the rows, evenly spaced; all of them where most is None."""
    return rows if most is None or not rows else rows[::math.ceil(len(rows) / most)]
