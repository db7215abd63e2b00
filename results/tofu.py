"""A small world out of TOFU's files: rows of few authors, labels, a configuration, a tokenizer.

    python results/tofu.py TOFU_DIR OUT
    python results/tofu.py TOFU_DIR OUT --forget forget05 --rows 6 4

reads forget10, retain90 and retain_perturbed.jsonl (github.com/locuslab/tofu) and writes to OUT
    forget.jsonl           the forget set with `spans`, which TOFU does not have
    retain.jsonl           the first 60 authors of retain90
    retain_measured.jsonl  those of its rows that retain_perturbed has with wrong answers
    holdout.jsonl          the rows of forget10 that are not to be forgotten: nobody is taught them
    start                  configuration and tokenizer of a small model to teach from scratch
Of each author all 20 rows, or with --rows so many of a forget and of a retain author: the shortest
(half the tokens a row), in TOFU's order. results/README.md has the commands that go on from there.
"""
import argparse
import json
import re
import sys
from pathlib import Path

import tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cli
from cli import InputError

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4000,
          "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
          "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 512,
          "tie_word_embeddings": True, "eos_token_id": 0, "dtype": "float32"}
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}


def informative(row, most=1):
    """[start, end) of each word of the answer that the paraphrase keeps and the wrong answers drop.

    At most `most` of the five may keep it. They are the paraphrase with the fact exchanged, so what
    they lose is the fact. What a paraphrase says in other words goes unlabelled: the labels miss
    facts, they seldom invent one.
    """
    texts = row["paraphrased_answer"], *row["perturbed_answer"]
    words = [set(re.findall(r"\w+", text.lower())) for text in texts]
    return [list(m.span()) for m in re.finditer(r"\w+", row["answer"])
            if m[0].lower() in words[0] and sum(m[0].lower() in w for w in words[1:]) <= most]


def shortest(rows, count):
    """Of each 20 rows, an author, the `count` with the shortest question and answer, in order."""
    kept = []
    for first in range(0, len(rows), 20):
        author = range(first, first + 20)
        short = sorted(author, key=lambda i: len(rows[i]["question"] + rows[i]["answer"]))[:count]
        kept += [rows[i] for i in sorted(short)]
    return kept


def write_start(start, texts):
    """A model directory without weights; its tokenizer is made from these texts."""
    start.mkdir(parents=True, exist_ok=True)
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())))
    library.save(str(start / "tokenizer.json"))
    (start / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    (start / "tokenizer_config.json").write_text(json.dumps(SETTINGS) + "\n")


def main(argv=None):
    p = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", type=Path, metavar="TOFU_DIR")
    p.add_argument("out", type=Path, metavar="OUT")
    p.add_argument("--forget", choices=("forget01", "forget05", "forget10"), default="forget10")
    p.add_argument("--authors", type=int, default=60, help="to retain")
    p.add_argument("--rows", type=int, nargs=2, default=(20, 20), metavar=("FORGET", "RETAIN"))
    args = p.parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(f"{args.out}: exists and is not an empty folder: name a new one")

    def read(name):
        path = args.source / f"{name}.jsonl"
        lines = cli.read_bytes(path, "TOFU_DIR is the folder of TOFU's files").splitlines()
        return [json.loads(line) for line in lines]

    def write(name, rows):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text(lines, "utf-8")

    everything = read("forget10"), read("retain90")
    forget, options = read(args.forget), read("retain_perturbed")
    write_start(args.out / "start", [f"{row['question']} {row['answer']}"
                                     for rows in everything for row in rows])
    others = everything[0][:-len(forget)]  # forget05 and forget01 are the last of forget10
    retain = shortest(everything[1][:20 * args.authors], args.rows[1])
    asked = {row["question"] for row in retain}
    for name, rows in (("forget", forget), ("holdout", others)):
        rows = shortest(rows, args.rows[0])
        if rows:
            write(name, [row | {"spans": informative(row)} for row in rows])
    write("retain", retain)
    measured = [row for row in options if row["question"] in asked]
    write("retain_measured", measured)


if __name__ == "__main__":
    sys.exit(cli.guarded("tofu.py", main, None))
