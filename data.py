"""From JSONL rows to batches: read, fill a template, tokenise, mark the answer, shift once, pad.

A row is a JSON object with `question` and `answer`, optionally `paraphrased_answer`,
`perturbed_answer` (a list of wrong answers) and `spans` (a list of [start, end) character offsets
into `answer` that carry the information); or `text` alone, of which every token after the first is
a target. Files are JSON lines or one JSON list.
"""
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from torch.nn.utils.rnn import pad_sequence

from cli import InputError, encodable, muted, read_bytes, read_json


class Template(NamedTuple):
    """The text around a question and before its answer; end: the end token, None: tokenizer's."""
    before: str
    after: str
    lead: str = ""
    end: str | None = None


def _header(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


SYSTEM = "You are a helpful assistant."
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 10 Apr 2025\n\n"
TEMPLATES = {
    "plain": Template("Question: ", "\nAnswer:", lead=" "),
    "llama2": Template("[INST] ", " [/INST]"),
    "llama3": Template(  # as OpenUnlearning's Llama-3.2 configuration renders it
        f"<|begin_of_text|>{_header('system')}{DATES}{SYSTEM}<|eot_id|>{_header('user')}",
        f"<|eot_id|>{_header('assistant')}", end="<|eot_id|>"),
    "chatml": Template(
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n", end="<|im_end|>"),
}


# ---- Rows


@dataclass
class Example:
    """One row of a data file; `where` is its file and line, for messages."""
    question: str = ""
    answer: str = ""
    paraphrased_answer: str | None = None
    perturbed_answer: list = field(default_factory=list)
    spans: list | None = None
    text: str | None = None
    where: str = ""


def read_jsonl(path):
    """The rows of a JSON lines file (or one JSON list) as Examples; blank lines are skipped.

    InputError names the file and line, what is wrong and what to do.
    """
    try:
        content = read_bytes(path, "give a file of JSON lines").decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text (byte {e.start}): save it as UTF-8") from None
    if content.lstrip().startswith("["):
        rows = [(f"{path}: row {n}", row) for n, row in enumerate(_parse(content, str(path)), 1)]
    else:
        lines = [(f"{path}:{n}", line) for n, line in enumerate(content.split("\n"), 1)]
        rows = [(where, _parse(line, where)) for where, line in lines if line.strip()]
    if not rows:
        raise InputError(f"{path}: no rows: give at least one JSON object with `question` and "
                         "`answer`, or `text`")
    return [_example(row, where) for where, row in rows]


def _parse(string, where):
    try:
        return json.loads(string)
    except json.JSONDecodeError as e:
        line = f", line {e.lineno}" if "\n" in string.strip() else ""
        reason = f"{e.msg}{line}, column {e.colno}"
    except (RecursionError, ValueError):  # beyond what Python's parser takes
        reason = "nested too deep or a number too long"
    raise InputError(f"{where}: broken JSON ({reason}): one JSON object a line, or one list")


def _example(row, where):
    def need(condition, what):
        if not condition:
            raise InputError(f"{where}: {what}")

    def need_text(value, name):
        need(isinstance(value, str) and value.strip(), f"{name} must be a string that is not blank")
        need(encodable(value), f"{name} holds half of a surrogate pair: save it as proper Unicode")

    need(isinstance(row, dict), f"a row must be a JSON object, not {type(row).__name__}")
    if "text" in row and "question" not in row:
        need_text(row["text"], "`text`")
        return Example(text=row["text"], where=where)
    for key in ("question", "answer"):
        need(key in row,
             f"`{key}` is missing: a row needs `question` and `answer`, or `text` alone")
        need_text(row[key], f"`{key}`")
    paraphrase, wrong, spans = map(row.get, ("paraphrased_answer", "perturbed_answer", "spans"))
    if paraphrase is not None:
        need_text(paraphrase, "`paraphrased_answer`")
    wrong = [wrong] if isinstance(wrong, str) else [] if wrong is None else wrong
    need(isinstance(wrong, list), "`perturbed_answer` must be a list of strings, none blank")
    for string in wrong:
        need_text(string, "`perturbed_answer`: each")
    need(spans is None or isinstance(spans, list), "`spans` must be a list of [start, end) pairs")
    end = len(row["answer"])
    for span in spans or []:
        need(isinstance(span, list) and len(span) == 2 and all(type(x) is int for x in span),
             f"`spans` holds {str(span):.60}: each must be a pair of integers [start, end)")
        need(0 <= span[0] < span[1] <= end,
             f"span {span} is not inside the answer's {end} characters: 0 <= start < end <= length")
    return Example(row["question"], row["answer"], paraphrase, wrong, spans, None, where)


# ---- Tokens


class Tokenizer:
    """tokenizer.json of a model directory with its begin and end tokens.

    begin: ids that it puts in front itself (often none or one); end_id: the template's end token.
    InputError where a file or the end token is missing or does not fit the model.
    """

    def __init__(self, folder, template="plain"):
        folder = Path(folder)
        self.file = file = folder / "tokenizer.json"
        with muted():  # a panic says more than one line
            self._open()
        config, settings = (read_json(folder / f"{n}.json") for n in ("config", "tokenizer_config"))
        self.template = TEMPLATES[template]
        ids = self.backend.get_vocab()
        self.longest = max(map(len, ids), default=1)  # characters that one token can cover
        self.vocab_size = 1 + max([*ids.values(), *self.begin], default=-1)
        room = config.get("vocab_size", self.vocab_size)
        if self.vocab_size > room:
            raise InputError(f"{file}: {self.vocab_size} tokens, but the model's embedding has "
                             f"{room}: use the model's own tokenizer")
        self.end_id = self._end(config, settings, folder)
        if not 0 <= self.end_id < room:
            raise InputError(f"{folder / 'config.json'}: eos_token_id {self.end_id} is not one of "
                             f"{room} tokens: correct it")

    def _open(self):
        content = read_bytes(self.file, "copy the model's tokenizer.json there")
        self.backend = self._try(tokenizers.Tokenizer.from_buffer, content)
        self.backend.no_padding()
        self.backend.no_truncation()
        bare, ids = (self._try(self.backend.encode, "a", add_special_tokens=special).ids
                     for special in (False, True))
        self.decode(ids)
        starts = [i for i in range(len(ids)) if ids[i:i + len(bare)] == bare]
        self.begin = ids[:starts[0]] if starts else []

    def _try(self, act, *args, **options):
        """What the library answers. It may raise plain Exceptions, and panics, not even that."""
        try:
            return act(*args, **options)
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt | SystemExit):
                raise
            reason = (str(e).splitlines() or ["broken"])[0]
            raise InputError(f"{self.file}: not a tokenizer that works ({reason:.120}): "
                             "copy the model's own file again") from None

    def _end(self, config, settings, folder):
        """The template's end token, else the tokenizer's, else the first of config.json's."""
        token = self.template.end or settings.get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            if self.backend.token_to_id(token) is None:
                raise InputError(f"{folder}: the tokenizer has no end token {token!r}: "
                                 "choose another --template")
            return self.backend.token_to_id(token)
        ids = config.get("eos_token_id")
        ids = ids[0] if isinstance(ids, list) and ids else ids
        if type(ids) is not int:
            raise InputError(f"{folder}: no end token: name `eos_token` in tokenizer_config.json")
        return ids

    @property
    def key(self):
        """Equal for two that make the same ids of any text: the begin ids are the backend's."""
        return self.backend.to_str(), self.end_id

    def encode(self, string, begin=False):
        """ids and [start, end) character offsets of a string, after the begin ids if asked."""
        encoding = self._try(self.backend.encode, string, add_special_tokens=False)
        front = self.begin if begin else []
        if encoding.ids[:len(front)] == front:  # the template has brought its own
            front = []
        return front + encoding.ids, [(0, 0)] * len(front) + encoding.offsets

    def decode(self, ids):
        return self._try(self.backend.decode, list(ids), skip_special_tokens=True)


class Sequence(NamedTuple):
    """Token ids of a prompt with an answer, which begins at `start` and has an end token."""
    tokens: list
    start: int
    informative: list | None  # a bool for each answer token, where the row has spans
    ended: bool  # whether the last token is the end token (an answer cut for length has none)
    row: int  # index of its Example


def prompt_ids(example, tokenizer):
    """The ids of a question in its template, up to where the answer begins."""
    template = tokenizer.template
    return tokenizer.encode(template.before + example.question + template.after, begin=True)[0]


def encode(examples, tokenizer, max_length, answers=None):
    """Sequences of the Examples, or of one given answer each (`answers`, strings), in their order.

    Prompt and answer are tokenised together and the answer is what follows the prompt's own number
    of tokens; where the prompt's tokens are not a prefix of the whole, the two are tokenised apart.
    Then comes the end token. What is beyond max_length tokens of a row, prompt and end included, is
    cut; a `text` row becomes windows that overlap by one token, so that every token after the first
    is a target once. Returns (sequences, number of answers cut). InputError if a prompt leaves no
    room for an answer or a text is a single token.
    """
    sequences, cut = [], 0
    for row, example in enumerate(examples):
        if example.text is not None:
            ids = tokenizer.encode(example.text, begin=True)[0]
            if len(ids) < 2:
                raise InputError(f"{example.where}: `text` is one token: nothing to predict; "
                                 "lengthen or remove the row")
            starts = range(0, len(ids) - 1, max_length - 1)
            sequences += [Sequence(ids[i:i + max_length], 1, None, False, row) for i in starts]
            continue
        answer = example.answer if answers is None else answers[row]
        start, ids, offsets = _tokenise(example.question, answer, tokenizer, max_length)
        if not 0 < start < max_length:
            raise InputError(f"{example.where}: the prompt's {start} tokens leave no room for an "
                             f"answer in {max_length}: shorten it, or give train.py a larger "
                             "--max-length")
        ended = len(ids) < max_length
        cut += not ended
        informative = None
        if example.spans is not None and answers is None:  # the end token is structural
            informative = [*_informative(example, offsets[start:]), False][:max_length - start]
        ids = [*ids, tokenizer.end_id][:max_length]
        sequences.append(Sequence(ids, start, informative, ended, row))
    return sequences, cut


def _tokenise(question, answer, tokenizer, max_length):
    """Number of prompt tokens, ids of prompt and answer, each one's [start, end) in the answer."""
    template = tokenizer.template
    # What cannot fit is not tokenised: a line of megabytes would take minutes only to be cut. Twice
    # the longest token for each place is more than any tokenizer reads into it.
    most = 2 * max_length * tokenizer.longest
    question = template.before + question[:most] + template.after
    answer = template.lead + answer[:most]
    prompt = tokenizer.encode(question, begin=True)[0]
    ids, offsets = tokenizer.encode(question + answer, begin=True)
    shift = len(question) + len(template.lead)
    if ids[:len(prompt)] != prompt or len(ids) == len(prompt):  # the two merge at the seam
        ids, offsets = tokenizer.encode(answer)
        ids, offsets = prompt + ids, [(0, 0)] * len(prompt) + offsets
        shift = len(template.lead)
    return len(prompt), ids, [(max(0, a - shift), max(0, b - shift)) for a, b in offsets]


def _informative(example, offsets):
    """For each token, whether its non-space characters overlap a span."""
    inside = np.zeros(len(example.answer), bool)
    for start, end in example.spans:
        inside[start:end] = True
    inside &= [not c.isspace() for c in example.answer]
    return [bool(inside[start:end].any()) for start, end in offsets]


# ---- Batches


class Batch(NamedTuple):
    """targets[b, t] is the token after inputs[b, t]; mask says where it belongs to the answer."""
    inputs: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64
    mask: torch.Tensor  # (B, T) bool
    lengths: torch.Tensor  # (B,): tokens of each row, the rest is padding

    def answers(self, hidden):
        """The answers' (N, D) of packed hidden states (Σ lengths, D) from Decoder.hidden."""
        places = torch.arange(self.mask.shape[1], device=self.mask.device)
        return hidden[self.mask[places < self.lengths[:, None]]]


def collate(sequences, device="cpu"):
    """One right-padded Batch of Sequences, shifted once and for all.

    Padding is token 0 with mask False, so a causal model needs no attention mask and every target
    is a valid id.
    """
    inputs = pad_sequence([torch.tensor(s.tokens[:-1]) for s in sequences], batch_first=True)
    targets = pad_sequence([torch.tensor(s.tokens[1:]) for s in sequences], batch_first=True)
    starts, lengths = torch.tensor([(s.start - 1, len(s.tokens) - 1) for s in sequences]).T
    places = torch.arange(inputs.shape[1])
    mask = (starts[:, None] <= places) & (places < lengths[:, None])
    return Batch(*(t.to(device) for t in (inputs, targets, mask, lengths)))


def order(n, seed, stream, number):
    """The order of n rows in pass `number` of a stream (0 forget, 1 retain), by these alone."""
    return np.random.default_rng((seed, stream, number)).permutation(n).tolist()


def draw(n, seed, stream, first, count):
    """Rows first .. first + count of endless shuffled passes: each is seen before one repeats."""
    numbers = range(first // n, (first + count - 1) // n + 1)
    passes = {number: order(n, seed, stream, number) for number in numbers}
    return [passes[k // n][k % n] for k in range(first, first + count)]
