"""From JSONL rows to batches: read, put into a template, tokenise, mark the answer, shift once, pad on the right.

A row is a JSON object with `question` and `answer`, optionally `paraphrased_answer`, `perturbed_answer` (a list of wrong
answers) and `spans` (a list of [start, end) character offsets into `answer` that carry the information); or `text`
alone, of which every token after the first is a target. Files are JSON lines or one JSON list.
"""
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch

from model import InputError

SYSTEM = "You are a helpful assistant."
TEMPLATES = {  # name: (before the question, after the question, before the answer, end token or None for the model's)
    "plain": ("Question: ", "\nAnswer:", " ", None),
    "llama2": ("[INST] ", " [/INST]", "", None),
    "llama3": ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
               f"Today Date: 10 Apr 2025\n\n{SYSTEM}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
               "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>"),
    "chatml": (f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n",
               "<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Rows


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
    """The rows of a JSON lines file (or one JSON list) as Examples, in order; blank lines are skipped.

    InputError names the file and line, what is wrong and what to do.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: not a regular file: save the rows to one")  # a pipe or device could be read only once
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}): give a file of JSON lines") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text (byte {e.start}): save the file as UTF-8") from None
    if content.lstrip().startswith("["):
        rows = _parse(content, str(path))
        rows = [(f"{path}: row {number}", row) for number, row in enumerate(rows, 1)]
    else:
        lines = enumerate(content.split("\n"), 1)
        rows = [(f"{path}:{number}", _parse(line, f"{path}:{number}")) for number, line in lines if line.strip()]
    if not rows:
        raise InputError(f"{path}: no rows: give at least one JSON object with `question` and `answer`, or `text`")
    return [_example(row, where) for where, row in rows]


def _parse(string, where):
    try:
        return json.loads(string)
    except json.JSONDecodeError as e:
        line = f", line {e.lineno}" if "\n" in string.strip() else ""
        raise InputError(f"{where}: broken JSON ({e.msg}{line}, column {e.colno}): one JSON object a line, or one list"
                         ) from None
    except (RecursionError, ValueError):  # nesting or integers beyond what Python's parser takes
        raise InputError(f"{where}: broken JSON (nested too deep or a number too long): one JSON object a line") from None


def _example(row, where):
    def need(condition, what):
        if not condition:
            raise InputError(f"{where}: {what}")

    def is_text(value):
        return isinstance(value, str) and bool(value.strip())

    need(isinstance(row, dict), f"a row must be a JSON object, not {type(row).__name__}")
    if "text" in row and "question" not in row:
        need(is_text(row["text"]), "`text` must be a string that is not blank")
        need(_encodable(row["text"]), "`text` holds half of a surrogate pair: save it as proper Unicode")
        return Example(text=row["text"], where=where)
    for key in ("question", "answer"):
        need(key in row, f"`{key}` is missing: a row needs `question` and `answer`, or `text` alone")
        need(is_text(row[key]), f"`{key}` must be a string that is not blank")
    paraphrase, wrong, spans = (row.get(key) for key in ("paraphrased_answer", "perturbed_answer", "spans"))
    need(paraphrase is None or is_text(paraphrase), "`paraphrased_answer` must be a string that is not blank")
    wrong = [wrong] if isinstance(wrong, str) else [] if wrong is None else wrong
    need(isinstance(wrong, list) and all(map(is_text, wrong)), "`perturbed_answer` must be a list of strings, none blank")
    for string in (row["question"], row["answer"], paraphrase or "", *wrong):
        need(_encodable(string), "a string holds half of a surrogate pair: save it as proper Unicode")
    need(spans is None or isinstance(spans, list), "`spans` must be a list of [start, end) pairs")
    for span in spans or []:
        need(isinstance(span, list) and len(span) == 2 and all(type(x) is int for x in span),
             f"`spans` holds {str(span):.60}: each must be a pair of integers [start, end)")
        need(0 <= span[0] < span[1] <= len(row["answer"]),
             f"span {span} is not inside the answer's {len(row['answer'])} characters: 0 <= start < end <= length")
    return Example(row["question"], row["answer"], paraphrase, wrong, spans, None, where)


def _encodable(string):
    return not any("\ud800" <= c <= "\udfff" for c in string)


def checked_text(string, where):
    """A string from the command line as it is; InputError if it is blank or not Unicode."""
    if not string.strip() or not _encodable(string):
        raise InputError(f"{where}: must be text, not blank, in the terminal's encoding")
    return string


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


class Tokenizer:
    """tokenizer.json of a model directory with its begin and end tokens.

    begin: ids the tokenizer itself puts in front (often none or one); end_id: the end token of `template`.
    InputError where a file or the end token is missing or does not fit the model.
    """

    def __init__(self, path, template="plain"):
        path = Path(path)
        if not (path / "tokenizer.json").is_file():
            raise InputError(f"{path}: no tokenizer.json: copy the model's tokenizer.json there")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
            self.begin = self._begin()
        except Exception as e:  # the library raises plain Exception
            raise InputError(f"{path / 'tokenizer.json'}: not a tokenizer ({str(e).splitlines()[0]})") from None
        self.backend.no_padding()
        self.backend.no_truncation()
        config, settings = (read_json(path / name) for name in ("config.json", "tokenizer_config.json"))
        self.template = TEMPLATES[template]
        self.vocab_size = 1 + max(self.backend.get_vocab().values(), default=-1)
        vocab_size = config.get("vocab_size", self.vocab_size)
        if self.vocab_size > vocab_size:
            raise InputError(f"{path / 'tokenizer.json'}: {self.vocab_size} tokens, but the model's embedding has "
                             f"{vocab_size}: use the model's own tokenizer")
        self.end_id = self._end(config, settings, path)
        if not 0 <= self.end_id < vocab_size:
            raise InputError(f"{path / 'config.json'}: eos_token_id {self.end_id} is not one of {vocab_size} tokens: correct it")

    def _begin(self):
        encoding = self.backend.encode("a", add_special_tokens=True)
        bare = self.backend.encode("a", add_special_tokens=False).ids
        ids = encoding.ids
        starts = [i for i in range(len(ids)) if ids[i:i + len(bare)] == bare]
        return ids[:starts[0]] if starts else []

    def _end(self, config, settings, path):
        token = self.template[3]
        if token is None:
            token = settings.get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            if self.backend.token_to_id(token) is None:
                raise InputError(f"{path}: the tokenizer has no end token {token!r}: choose another --template")
            return self.backend.token_to_id(token)
        ids = config.get("eos_token_id")
        ids = ids[0] if isinstance(ids, list) and ids else ids
        if type(ids) is not int:
            raise InputError(f"{path}: no end token: name `eos_token` in tokenizer_config.json")
        return ids

    def encode(self, string, begin=False):
        """ids and [start, end) character offsets of a string, with nothing added but, if asked, the begin ids."""
        try:
            encoding = self.backend.encode(string, add_special_tokens=False)
        except Exception as e:  # the library's own: a character that no token covers
            raise InputError(f"{string[:40]!r}: cannot be tokenised ({str(e)[:80]}): use another tokenizer") from None
        front = self.begin if begin and encoding.ids[:len(self.begin)] != self.begin else []  # no second begin token
        return front + encoding.ids, [(0, 0)] * len(front) + encoding.offsets

    def decode(self, ids):
        return self.backend.decode(list(ids), skip_special_tokens=True)


def read_json(path, advice="copy the model's own file again"):
    """The JSON object in a model folder's file, {} if there is none; InputError, with advice, if it is not JSON."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError:
        return {}
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON: {advice}") from None
    return value if isinstance(value, dict) else {}


class Sequence(NamedTuple):
    """Token ids of one prompt with one answer; the answer, its end token included, begins at `start`."""
    tokens: list
    start: int
    informative: list | None  # a bool for each answer token, where the row has spans
    ended: bool  # whether the last token is the end token (an answer cut for length has none)
    row: int  # index of its Example


def prompt_ids(example, tokenizer):
    """The ids of a question in its template, up to where the answer begins."""
    before, after, _, _ = tokenizer.template
    return tokenizer.encode(before + example.question + after, begin=True)[0]


def encode(examples, tokenizer, max_length, answers=None):
    """Sequences of the Examples, or of one given answer each (`answers`, a list of strings), in their order.

    Prompt and answer are tokenised together and the answer is what follows the prompt's own number of tokens; where the
    prompt's tokens are not a prefix of the whole, the two are tokenised apart. Then comes the end token. An answer beyond
    max_length tokens is cut; a `text` row becomes windows that overlap by one token, so that every token after the first
    is a target once. Returns (sequences, number of answers cut). InputError if a prompt leaves no room for an answer.
    """
    before, after, lead, _ = tokenizer.template
    sequences, cut = [], 0
    for row, example in enumerate(examples):
        if example.text is not None:
            ids = tokenizer.encode(example.text, begin=True)[0]
            if len(ids) < 2:
                raise InputError(f"{example.where}: `text` is one token: nothing to predict; lengthen or remove the row")
            sequences += [Sequence(ids[i:i + max_length], 1, None, False, row)
                          for i in range(0, len(ids) - 1, max_length - 1)]
            continue
        question = before + example.question + after
        answer = lead + (example.answer if answers is None else answers[row])
        prompt, _ = tokenizer.encode(question, begin=True)
        ids, offsets = tokenizer.encode(question + answer, begin=True)
        shift = len(question + lead)  # characters in front of the answer proper
        if ids[:len(prompt)] != prompt or len(ids) == len(prompt):
            apart, offsets = tokenizer.encode(answer)
            ids, offsets, shift = prompt + apart, [(0, 0)] * len(prompt) + offsets, len(lead)
        start = len(prompt)
        if not 0 < start < max_length:
            raise InputError(f"{example.where}: the prompt's {start} tokens leave no room for an answer in "
                             f"{max_length}: raise --max-length or shorten the question")
        informative = None
        if example.spans is not None and answers is None:
            informative = [_overlaps(example.answer, a - shift, b - shift, example.spans) for a, b in offsets[start:]]
            informative = (informative + [False])[:max_length - start]
        ended = len(ids) < max_length
        cut += not ended
        sequences.append(Sequence((ids + [tokenizer.end_id])[:max_length] if ended else ids[:max_length],
                                  start, informative, ended, row))
    return sequences, cut


def _overlaps(answer, start, end, spans):
    return any(not answer[i].isspace() for a, b in spans for i in range(max(a, start), min(b, end)))


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class Batch(NamedTuple):
    """inputs, targets (B, T) int64, mask (B, T) bool: targets[b, t] is the token after inputs[b, t], mask says where it
    belongs to the answer; lengths (B,): tokens of each row, the rest is padding."""
    inputs: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor

    def answers(self, hidden):
        """Of packed hidden states (Σ lengths, D), as Decoder.hidden gives them, those that predict answer tokens: (N, D)."""
        valid = torch.arange(self.mask.shape[1], device=self.mask.device) < self.lengths[:, None]
        return hidden[self.mask[valid]]


def collate(sequences, device="cpu"):
    """One right-padded Batch of Sequences, shifted once and for all; padding is token 0 with mask False, so a causal model
    needs no attention mask and every target is a valid id."""
    lengths = torch.tensor([len(s.tokens) - 1 for s in sequences])
    shape = len(sequences), int(lengths.max())
    inputs, targets = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    for b, s in enumerate(sequences):
        n = len(s.tokens) - 1
        inputs[b, :n] = torch.tensor(s.tokens[:-1])
        targets[b, :n] = torch.tensor(s.tokens[1:])
        mask[b, s.start - 1:n] = True
    return Batch(*(t.to(device) for t in (inputs, targets, mask, lengths)))


def order(n, seed, stream, number):
    """The order of n rows in pass `number` of a stream (0 forget, 1 retain): a pure function of these four integers."""
    return np.random.default_rng((seed, stream, number)).permutation(n).tolist()


def draw(n, seed, stream, first, count):
    """Rows first .. first + count of an endless sequence of shuffled passes: every row is seen before one repeats."""
    passes = {number: order(n, seed, stream, number) for number in range(first // n, (first + count - 1) // n + 1)}
    return [passes[k // n][k % n] for k in range(first, first + count)]
