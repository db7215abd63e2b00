"""ETW inside transformers' Trainer: on accelerate, with DDP or FSDP, for what outgrows one GPU.

    accelerate launch integrations/hf_trainer.py --model org/name --forget F --retain R --out DIR
    python -m torch.distributed.run --nproc-per-node 2 integrations/hf_trainer.py ... --use_cpu

(the second on CPUs). Other flags of TrainingArguments work too, but for its epochs, order of rows
and output folder. The loss is train.py's: means over the answer tokens of a step, its processes and
micro-batches. The optimiser is the Trainer's: --warmup_steps N --adam_beta2 0.95 make it
train.py's. (transformers 5.24, accelerate 1.15)
"""
import sys
from pathlib import Path

import torch
import transformers as hf
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cli  # noqa: E402
import data  # noqa: E402
import etw  # noqa: E402

METHODS = [m for m in etw.WEIGHTINGS if not (etw.needs_start(m) or etw.needs(m, "spans"))]


class ETWTrainer(hf.Trainer):
    """L = L_r + λ L_f on batches with labels (B, T), −100 outside answers, and is_forget (B,) bool.
    Not keep, tnpo, npo, spans, which read a starting model or labels: train.py has those."""

    def __init__(self, *args, lam=0.03, temperature=1.0, method="etw", beta=(), **kwargs):
        super().__init__(*args, **kwargs)
        self.lam, self.temperature, self.method, self.beta = lam, temperature, method, beta
        self.model_accepts_loss_kwargs = True  # else each micro-batch's loss is divided once more

    def _get_num_items_in_batch(self, batch_samples, device):
        """Answer tokens of a step / processes, (2,): forget, retain. Each process divides its sum
        by this, their gradients are averaged: together, the mean over all tokens."""
        tokens = torch.cat([(b["labels"][:, 1:] != -100).sum(1) for b in batch_samples]).to(device)
        forget = torch.cat([b["is_forget"] for b in batch_samples]).to(device)
        counts = torch.stack([tokens[forget].sum(), tokens[~forget].sum()]).float()
        return self.accelerator.reduce(counts, "mean").clamp_min(1e-6)  # no such row: 0 / 1e-6

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, is_forget = inputs.pop("labels"), inputs.pop("is_forget")[:, None]
        outputs = model(**inputs)  # without labels, or the model computes a loss of its own as well
        logprobs, entropy, mask = etw.label_stats(outputs.logits, labels, self.temperature)
        # ω is per sequence: that retain rows get weights too, which nobody reads, changes nothing.
        weights = etw.weigh(self.method, etw.Tokens(logprobs, entropy, mask), *self.beta)
        forget, retain = (None, None) if num_items_in_batch is None else num_items_in_batch
        loss = etw.retain_loss(logprobs, mask & ~is_forget, retain)
        loss = loss + self.lam * etw.forget_loss(logprobs, weights, mask & is_forget, forget)
        return (loss, outputs) if return_outputs else loss


class ChatEncoder:
    """What data.encode asks of a tokenizer, from any of transformers': with the chat template of
    that name in data.TEMPLATES, or with its own, or, if it has none, `plain`."""
    def __init__(self, tokenizer, template=None):
        self.tokenizer, self.longest = tokenizer, max(map(len, tokenizer.get_vocab()))
        bos = tokenizer.bos_token_id
        self.begin = [bos] if tokenizer("a")["input_ids"][0] == bos else []
        self.template = data.TEMPLATES[template or "plain"]
        end = self.template.end or tokenizer.eos_token
        if tokenizer.chat_template and not template:
            chat = [{"role": role, "content": "<<>>"} for role in ("user", "assistant")]
            before, after, tail = tokenizer.apply_chat_template(chat, tokenize=False).split("<<>>")
            bare = after.rstrip(" ")  # a space belongs to the answer's first token
            self.template = data.Template(before, bare, after[len(bare):])
            end = tail.strip() or end
        self.end_id = self.encode(end)[0][0]  # a template's tail begins with its end token

    def encode(self, string, begin=False):
        ids = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        ids = self.begin + ids if begin and ids[:1] != self.begin else ids
        return ids, [(0, 0)] * len(ids)  # offsets are for spans


def collate(pairs):
    """(forget, retain) Sequences -> a batch, all forget rows first. Padding is on the right, where
    a causal model never looks: no attention mask is needed."""
    rows = [row for kind in zip(*pairs, strict=True) for row in kind]
    ids = [torch.tensor(row.tokens) for row in rows]
    labels = [torch.tensor([-100] * row.start + row.tokens[row.start:]) for row in rows]
    return {"input_ids": pad_sequence(ids, True), "labels": pad_sequence(labels, True, -100),
            "is_forget": torch.arange(len(rows)) < len(pairs)}


def main(argv=None):
    p = cli.Parser(description=__doc__.splitlines()[0])
    for flag in ("--model", "--forget", "--retain", "--out"):
        p.add_argument(flag, required=True)
    p.add_argument("--method", choices=METHODS, default="etw")
    p.add_argument("--beta", type=float, nargs="+", default=[], help="β's of the method")
    p.add_argument("--template", choices=data.TEMPLATES, help="instead of the tokenizer's own")
    for flag, usual, kind, what in (("--lambda", 0.03, cli.number(least=0), "λ"),
                                    ("--temperature", 1.0, cli.number(above=0), "T of the entropy"),
                                    ("--epochs", 10, cli.number(int, least=1), "passes"),
                                    ("--max-length", 512, cli.number(int, 2), "tokens a row")):
        p.add_argument(flag, type=kind, default=usual, help=what)
    own, rest = p.parse_known_args(argv)
    # The data set holds every pass in train.py's order: to the Trainer it is one epoch.
    usual = "--learning_rate 1e-5 --weight_decay 0.01 --save_strategy no --logging_steps 1".split()
    fixed = "--train_sampling_strategy sequential --num_train_epochs 1 --output_dir".split()
    parser = hf.HfArgumentParser(hf.TrainingArguments)
    try:
        etw.weigh(own.method, etw.ONE, *own.beta)
    except ValueError as e:
        p.error(f"--beta: {e}")
    try:
        args, = parser.parse_args_into_dataclasses([*usual, *rest, *fixed, own.out])
    except ValueError as e:  # a flag that nobody knows, or a value
        p.error(str(e))
    tokenizer = hf.AutoTokenizer.from_pretrained(own.model)
    encoder, drawn = ChatEncoder(tokenizer, own.template), []
    for stream, path in enumerate((own.forget, own.retain)):
        rows, _ = data.encode(data.read_jsonl(path), encoder, own.max_length)
        count = len(drawn[0]) if drawn else own.epochs * len(rows)
        drawn.append([rows[i] for i in data.draw(len(rows), args.seed, stream, 0, count)])
    model = hf.AutoModelForCausalLM.from_pretrained(own.model, dtype=torch.float32)
    trainer = ETWTrainer(model, args, collate, list(zip(*drawn, strict=True)),
                         lam=getattr(own, "lambda"), temperature=own.temperature,
                         method=own.method, beta=own.beta, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    trainer.save_state()  # trainer_state.json: the losses


if __name__ == "__main__":
    sys.exit(cli.guarded("hf_trainer.py", main, None))
