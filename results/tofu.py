"""A small world out of TOFU's files: a tokenizer, a configuration, rows of few authors, labels.

    python results/tofu.py TOFU_DIR runs/tofu

reads forget10.jsonl and retain90.jsonl (github.com/locuslab/tofu) and writes runs/tofu/start,
runs/tofu/retain.jsonl (60 authors of 20 rows, in TOFU's order) and runs/tofu/forget.jsonl: forget10
with `spans`, which TOFU does not have. results/README.md has the commands that teach, retrain and
unlearn from there.
"""
import json
import re
import sys
from pathlib import Path

import tokenizers

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


def main(source, out, authors=60):
    source, start = Path(source), Path(out) / "start"
    start.mkdir(parents=True, exist_ok=True)
    names = "forget10", "retain90"
    rows = [(source / f"{name}.jsonl").read_text("utf-8").splitlines() for name in names]
    (Path(out) / "retain.jsonl").write_text("\n".join(rows[1][:20 * authors]) + "\n", "utf-8")
    labelled = [row | {"spans": informative(row)} for row in map(json.loads, rows[0])]
    lines = "".join(json.dumps(row) + "\n" for row in labelled)
    (Path(out) / "forget.jsonl").write_text(lines, "utf-8")
    everything = [json.loads(line) for lines in rows for line in lines]
    texts = [f"{row['question']} {row['answer']}" for row in everything]
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())))
    library.save(str(start / "tokenizer.json"))
    (start / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    (start / "tokenizer_config.json").write_text(json.dumps(SETTINGS) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
