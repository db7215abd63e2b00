"""Speed and memory of one unlearning step: ours against what a transformers user would write.

    python results/bench.py --shape small          bundled, small or llama-3.2-1b; or --model DIR
    python results/bench.py --shape small --dtype bfloat16
    python results/bench.py --read --model weights/target          answers and log p, same rows
    python results/bench.py --loss-memory          of the loss alone at V = 128,256, by tokens

Same weights, rows (lengths like TOFU's), precision and AdamW on both sides. The plain side runs
forget and retain batch apart, takes full logits and a float32 cross-entropy, and weighs by wga, so
that it does not pay for entropies; ours is train.train_step with etw. Rounds alternate; peak memory
is that of separate processes, above weights, gradients and optimizer state. Useful FLOPs count no
padding, no recomputation and the head on answer tokens only.
Needs transformers (pip install transformers), which the program itself does not.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cli
import data
import etw
import lean
import measure
import model
import pretrained
import train
from evaluate import open_model

RATE = 1e-5  # learning rate
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "eos_token_id": 0,
         "tie_word_embeddings": True, "max_position_embeddings": 2048, "dtype": "float32"}
SHAPES = {
    "bundled": LLAMA | {
        "vocab_size": 2000, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 6},
    "small": LLAMA | {
        "vocab_size": 32000, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
        "num_attention_heads": 6, "num_key_value_heads": 6},
    "llama-3.2-1b": LLAMA | {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "rope_theta": 500000.0},
}


def make_rows(batch, vocab_size, seed=0):
    """`batch` forget and `batch` retain Rows as long as TOFU's: 21 ± 6 and 43 ± 20 tokens."""
    dice = np.random.default_rng(seed)
    rows = []
    for stream in (train.FORGET, train.RETAIN):
        for _ in range(batch):
            prompt = int(np.clip(dice.normal(21, 6), 8, 45))
            answer = int(np.clip(dice.normal(43, 20), 5, 110))
            tokens = dice.integers(1, vocab_size, prompt + answer).tolist()
            rows.append(train.Row(stream, data.Sequence(tokens, prompt, None, True, len(rows))))
    return rows


# ---- The sides


class Ours:
    def __init__(self, path, device, dtype, micro=None, method="etw"):
        cli.pick_device(device, "auto")  # for what it tells the allocator
        self.decoder = pretrained.load(path, device)
        self.recipe = train.Recipe(method=method, lr=RATE, micro_batch_size=micro, dtype=dtype)
        self.optimizer = train.make_optimizer(self.decoder, self.recipe)

    def step(self, rows):
        train.train_step(self.decoder, self.optimizer, rows, RATE, self.recipe)


class Uniform(Ours):
    """Our step with uniform weights and no entropy computed: what ETW costs."""

    def __init__(self, *args):
        super().__init__(*args, method="uniform")
        lean.entropy_of = lambda all_logprobs, *_: all_logprobs.new_zeros(len(all_logprobs))


class Plain:
    """The formulas with transformers: two forwards, labels of −100, all logits in float32."""

    def __init__(self, path, device, dtype, micro=None):
        import transformers
        network = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.model = network.to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.01,
                                           fused=True)
        self.device, self.dtype = device, dtype

    def logprobs(self, rows):
        width = max(len(s.tokens) for s in rows)
        ids, labels, attention = (torch.full((len(rows), width), fill) for fill in (0, -100, 0))
        for b, s in enumerate(rows):
            ids[b, :len(s.tokens)] = torch.tensor(s.tokens)
            labels[b, s.start:len(s.tokens)] = torch.tensor(s.tokens[s.start:])
            attention[b, :len(s.tokens)] = 1
        ids, labels, attention = (t.to(self.device) for t in (ids, labels, attention))
        logits = self.model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        targets = labels[:, 1:]
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none",
            ignore_index=-100)
        return -nll.view(len(rows), -1), targets != -100

    def step(self, rows):
        with cli.precision(self.device, self.dtype):
            forget, mask = self.logprobs([r.sequence for r in rows if r.stream == train.FORGET])
            retain, kept = self.logprobs([r.sequence for r in rows if r.stream == train.RETAIN])
            loss = 0.03 * (forget.exp().detach() * forget)[mask].mean() - retain[kept].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


SIDES = {"ours": Ours, "uniform, no entropy": Uniform, "plain": Plain}


def pick(device, dtype):
    """train.py's choice; its allocator setting is ours alone, the plain side runs as it would."""
    keep, cli.keep_freed_memory = cli.keep_freed_memory, lambda: None
    try:
        return cli.pick_device(device, dtype)
    finally:
        cli.keep_freed_memory = keep


# ---- What is measured


def clock(function, device):
    started = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def useful_flops(config, rows):
    """Forward and backward: 6 a weight and token, causal attention; head on answer tokens."""
    c = {"head_dim": config["hidden_size"] // config["num_attention_heads"]} | config
    d, heads = c["hidden_size"], c["num_attention_heads"] * c["head_dim"]
    kv_heads = c["num_key_value_heads"] * c["head_dim"]
    layer = d * (2 * heads + 2 * kv_heads + 3 * c["intermediate_size"])
    inputs = [len(r.sequence.tokens) - 1 for r in rows]
    answers = sum(r.count for r in rows)
    attention = c["num_hidden_layers"] * sum(2 * 2 * heads * n * (n + 1) // 2 for n in inputs)
    blocks = 6 * layer * c["num_hidden_layers"] * sum(inputs)
    return blocks + 3 * attention + 6 * d * c["vocab_size"] * answers


def matrix_rate(device, dtype):
    """FLOP/s of a large square product in the precision of the step: median of 9."""
    n = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = [clock(lambda: a @ b, device) for _ in range(11)][2:]
    return 2 * n**3 / statistics.median(times)


def status_mb(key):
    """A line of /proc/self/status in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def serve(side, args, rows, device, dtype):
    """One side in a process of its own: for each line on stdin a step; prints seconds, peak MB."""
    user = side(args.model, device, dtype, args.micro_batch_size)
    parameters = list((user.model if side is Plain else user.decoder).parameters())
    gradients = sum(p.numel() * p.element_size() for p in parameters) / 2**20
    user.step([rows[0], rows[-1]])  # makes the optimizer's state
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated() / 2**20
        peak = lambda: torch.cuda.max_memory_allocated() / 2**20  # noqa: E731
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak so far
        base = status_mb("VmRSS")
        peak = partial(status_mb, "VmHWM")
    for _ in sys.stdin:
        seconds = clock(lambda: user.step(rows), device)
        print(json.dumps([seconds, peak() - base - gradients]), flush=True)


def loss_memory(device, vocab=128_256, width=256):
    """Peak MB of lean_loss, forward and backward, by number of answer tokens, in rows of 64."""
    for n in (256, 1024, 4096):
        hidden, head = (torch.randn(size, width, device=device, requires_grad=True)
                        for size in (n, vocab))

        def loss_of(rows, logprobs, entropy, mask, n=n):
            return etw.forget_loss(logprobs, etw.etw_weights(entropy, mask), mask, count=n)

        Path("/proc/self/clear_refs").write_text("5")
        base = status_mb("VmRSS")
        targets = torch.zeros(n, dtype=torch.long, device=device)
        lean.lean_loss(hidden, head, targets, [64] * (n // 64), loss_of).backward()
        print(f"{n:6} tokens: {status_mb('VmHWM') - base:8.0f} MB above hidden states and head "
              f"(gradient of the head {vocab * width * 4 / 2**20:.0f}, "
              f"all logits would be {n * vocab * 4 / 2**20:.0f})")
        hidden = head = None


def read_speed(path, device, rounds):
    """Seconds, ours and transformers', for 64 greedy answers and for log p of 1,000 answers."""
    import transformers
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    theirs = theirs.to(device).eval()
    ours, tokenizer = open_model(path, device, "plain")
    examples = data.read_jsonl(cli.bundled("data/retain.jsonl"))
    prompts = [data.prompt_ids(e, tokenizer) for e in examples[:64]]
    sequences = data.encode(examples, tokenizer, 256)[0]
    width, end = max(map(len, prompts)), tokenizer.end_id
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)

    @torch.inference_mode()
    def read():
        for i in range(0, len(sequences), 64):
            batch = data.collate(sequences[i:i + 64], device)
            places = torch.arange(batch.mask.shape[1], device=device)
            known = (places < batch.lengths[:, None]).long()
            logits = theirs(input_ids=batch.inputs, attention_mask=known, use_cache=False).logits
            torch.log_softmax(logits.float(), -1).gather(2, batch.targets[..., None])

    jobs = {
        "generate": (
            lambda: model.generate(ours, prompts, 64, end),
            lambda: theirs.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False,
                                    eos_token_id=end, pad_token_id=0)),
        "log p of the answers": (lambda: measure.answer_tokens(ours, sequences), read)}
    for name, pair in jobs.items():
        times = [[clock(job, device) for job in pair] for _ in range(rounds + 1)][1:]
        mine, other = (statistics.median(t) for t in zip(*times, strict=True))
        print(f"{name}: ours {mine:.3f} s, transformers {other:.3f} s, "
              f"{other / mine:.2f} times as fast")


def race(args, device, dtype):
    """Steps of all sides in turn: ({side: seconds}, {side: peak MB}, matrix rates)."""
    command = [sys.executable, __file__, "--model", args.model, "--device", device,
               "--batch-size", str(args.batch_size), "--dtype", str(dtype)[6:]]
    if args.micro_batch_size:
        command += ["--micro-batch-size", str(args.micro_batch_size)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    servers = {name: subprocess.Popen([*command, "--serve", name], **pipes, text=True)
               for name in SIDES}
    times, memory, rates = {name: [] for name in SIDES}, {}, []
    for _ in range(args.rounds + 1):
        for name, server in servers.items():
            server.stdin.write("step\n")
            server.stdin.flush()
            seconds, memory[name] = json.loads(server.stdout.readline())
            times[name].append(seconds)
        rates.append(matrix_rate(device, dtype))
    for server in servers.values():
        server.communicate()
    return {name: seconds[1:] for name, seconds in times.items()}, memory, rates  # the first warms


def report(args, rows, flops, times, memory, rates):
    """What the race says, ready for --json."""
    tokens, rate = sum(len(r.sequence.tokens) - 1 for r in rows), statistics.median(rates)
    rectangle = len(rows) * max(len(r.sequence.tokens) - 1 for r in rows)
    result = {"threads": torch.get_num_threads(), "tokens a step": tokens,
              "matrix rate, GFLOP/s": rate / 1e9,
              "padding of one rectangle": 1 - tokens / rectangle}
    for name, seconds in times.items():
        median = statistics.median(seconds)
        result[name] = {"seconds a step": median, "fastest": min(seconds), "slowest": max(seconds),
                        "tokens a second": tokens / median, "peak MB above state": memory[name],
                        "useful share of the matrix rate": flops / median / rate}
    ratios = sorted(b / a for a, b in zip(times["ours"], times["plain"], strict=True))
    costs = [a / b - 1 for a, b in zip(times["ours"], times["uniform, no entropy"], strict=True)]
    result["times as fast as plain"] = {"median": statistics.median(ratios), "least": ratios[0],
                                        "most": ratios[-1]}
    result["memory against plain"] = memory["ours"] / memory["plain"]
    result["cost of entropy weights"] = statistics.median(costs)
    return result


def main(argv=None):
    p = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=SHAPES, default="small")
    p.add_argument("--model", metavar="DIR", help="a Llama model directory instead of a shape")
    p.add_argument("--batch-size", type=int, default=16, help="forget rows, and as many retain")
    p.add_argument("--micro-batch-size", type=int)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--loss-memory", action="store_true")
    p.add_argument("--read", action="store_true")
    p.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    device, dtype = pick(args.device, args.dtype)
    if args.loss_memory:
        return loss_memory(device)
    if args.read:
        return read_speed(args.model or "weights/target", device, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        shape = args.model or args.shape
        if not args.model:
            args.model = folder
            (Path(folder) / "config.json").write_text(json.dumps(SHAPES[args.shape]))
            pretrained.save(pretrained.fresh(folder, seed=0), folder)
        config = cli.read_json(Path(args.model) / "config.json")
        rows = make_rows(args.batch_size, config["vocab_size"])
        if args.serve:
            return serve(SIDES[args.serve], args, rows, device, dtype)
        measured = race(args, device, dtype)
    result = {"shape": shape, "device": device, "dtype": str(dtype)[6:]}
    result |= report(args, rows, useful_flops(config, rows), *measured)
    print(json.dumps(result, indent=1))
    if args.json:
        cli.write_json(args.json, result)
    return None


if __name__ == "__main__":
    sys.exit(cli.guarded("bench.py", main, None))
