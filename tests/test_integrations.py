"""The loss is the same number in other people's trainers: whole, cut, DDP, FSDP, OpenUnlearning."""
import copy
import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import cli
import data
import etw
import pretrained
import train

hf = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
from integrations import hf_trainer  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
LAMBDA, T = 0.3, 1.5
NAMES = ["Ada", "Tom", "Mimi Lou", "Zeno of Oru", "Al", "Bo Bobo"]
CHATML = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A tiny model that is not quite certain, 4 forget and 6 retain rows of unequal lengths."""
    folder = tmp_path_factory.mktemp("integrations")
    for kind, count in (("forget", 4), ("retain", 6)):
        rows = [{"question": f"Where was {name} born?",
                 "answer": f"{name} was born in {kind}" * (i % 3 + 1)}
                for i, name in enumerate(NAMES[:count])]
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hf.logging.set_verbosity_error()
    model = hf.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    model.save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).write_bytes((tiny / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def pairs(folder):
    """All forget rows and as many retain rows in the order that main and train.py draw them."""
    tokenizer = data.Tokenizer(folder / "model")
    sets = [data.encode(data.read_jsonl(folder / f"{kind}.jsonl"), tokenizer, 128)[0]
            for kind in ("forget", "retain")]
    drawn = [[rows[i] for i in data.draw(len(rows), 42, stream, 0, 4)]  # 42: the Trainer's seed
             for stream, rows in enumerate(sets)]
    return list(zip(*drawn, strict=True))


@pytest.fixture(scope="module")
def expected(folder, pairs):
    """(loss, {name: gradient}) written from the paper's formulas, a row at a time, in float64."""
    model = load(folder).double()
    total, counts = [0.0, 0.0], [0, 0]
    for pair in pairs:
        for kind, row in enumerate(pair):
            ids = torch.tensor(row.tokens)
            logits = model(input_ids=ids[None]).logits[0, row.start - 1:-1]
            logp = logits.log_softmax(-1).gather(1, ids[row.start:, None])[:, 0]
            q = (logits.detach() / T).softmax(-1)
            H = -(q * q.log()).sum(-1)
            weights = len(H) * H / H.sum() if kind == 0 else -torch.ones_like(H)
            total[kind] = total[kind] + (weights * logp).sum()
            counts[kind] += len(H)
    loss = LAMBDA * total[0] / counts[0] + total[1] / counts[1]
    loss.backward()
    return loss.item(), gradients(model)


def load(folder):
    return hf.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


def gradients(model):
    return {short(name): p.grad.float() for name, p in model.named_parameters()}


def short(name):
    """As a decoder of ours names it."""
    return name.removeprefix("model.")


def assert_same(got, expected):
    loss, grads = got
    assert math.isclose(loss, expected[0], rel_tol=1e-5)
    assert grads.keys() == expected[1].keys()
    off = sum((grads[n] - g).square().sum() for n, g in expected[1].items()).sqrt()
    assert off < 1e-5 * sum(g.square().sum() for g in expected[1].values()).sqrt()


class Watch(hf.TrainerCallback):
    """Keeps the gradients that the optimiser is about to see."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.grads = gradients(model)


def one_step(model, pairs, tmp_path, size=4, **kwargs):
    """(loss, gradients) of one step over all pairs, `size` of them in a micro-batch."""
    args = hf.TrainingArguments(
        output_dir=tmp_path, use_cpu=True, per_device_train_batch_size=size, disable_tqdm=True,
        gradient_accumulation_steps=len(pairs) // size, max_steps=1, max_grad_norm=0,
        train_sampling_strategy="sequential", save_strategy="no")
    kwargs = {"lam": LAMBDA, "temperature": T} | kwargs
    watch = Watch()
    trainer = hf_trainer.ETWTrainer(model, args, hf_trainer.collate, pairs, callbacks=[watch],
                                    **kwargs)
    return trainer.train().training_loss, watch.grads


@pytest.mark.parametrize("size", [4, 2, 1])
def test_the_trainers_step_is_the_papers_loss_however_cut(folder, pairs, expected, tmp_path, size):
    model = load(folder)
    model.accepts_loss_kwargs = False  # the other tests have True: a Trainer scales the two apart
    assert_same(one_step(model, pairs, tmp_path, size), expected)


def test_a_batch_that_is_only_evaluated_has_the_loss_of_a_step(folder, pairs, expected, tmp_path):
    args = hf.TrainingArguments(output_dir=tmp_path, use_cpu=True, save_strategy="no")
    trainer = hf_trainer.ETWTrainer(load(folder), args, hf_trainer.collate, lam=LAMBDA,
                                    temperature=T)
    loss = trainer.compute_loss(trainer.model, hf_trainer.collate(pairs))
    assert math.isclose(loss.item(), expected[0], rel_tol=1e-5)


@pytest.mark.parametrize(("method", "beta"), [("etw", ()), ("wga", (2.0,)), ("satimp", (2.0, 0.5))])
def test_the_trainers_step_is_train_pys_step(folder, pairs, tmp_path, method, beta):
    decoder = pretrained.load(folder / "model")
    recipe = train.Recipe(lam=LAMBDA, temperature=T, method=method, beta=beta)
    rows = [train.Row(stream, row) for pair in pairs for stream, row in enumerate(pair)]
    counts = [sum(row.count for row in rows if row.stream == stream) for stream in (0, 1)]
    parts = train.accumulate(decoder, rows, counts, recipe)
    loss = sum(float(L_r + LAMBDA * L_f) for L_r, L_f, *_ in parts)
    got = one_step(load(folder), pairs, tmp_path, 2, method=method, beta=beta)
    assert_same(got, (loss, gradients(decoder)))


def test_the_trainer_refuses_what_it_cannot_weigh(folder, pairs, tmp_path):
    for method in ("keep", "tnpo", "npo", "spans"):
        with pytest.raises(ValueError, match=f"{method} needs"):
            one_step(load(folder), pairs, tmp_path, method=method)
        with pytest.raises(cli.InputError, match=f"invalid choice: '{method}'"):
            hf_trainer.main(["--method", method])
    named = ["--model", str(folder), "--forget", "f", "--retain", "r", "--out", str(tmp_path / "o")]
    for wrong in (["--nope"], ["--epochs", "0"], ["--beta", "1", "2"], ["--temperature", "0"]):
        with pytest.raises(cli.InputError, match=wrong[0].strip("-")):
            hf_trainer.main([*named, *wrong])


# ---- Two processes


def two_processes(target, *args):
    """target(rank, *args) in two processes that know of each other; forked: imports take long."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    fork = torch.multiprocessing.get_context("fork")
    both = [fork.Process(target=one_of_two, args=(meet, rank, target, *args)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        process.kill()  # nothing, if it is done
    assert [process.exitcode for process in both] == [0, 0]


def one_of_two(meet, rank, target, *args):
    os.environ |= meet | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    for state in (accelerate.state.AcceleratorState, accelerate.state.PartialState):
        state._reset_state()  # what the tests before have left: one process
    target(rank, *args)
    torch.distributed.destroy_process_group()


def test_the_command_on_two_processes_takes_the_same_step(folder, expected, tmp_path):
    """DDP, two micro-batches each. With plain SGD at rate 1 the weights move by the gradient."""
    command = f"""--model {folder}/model --forget {folder}/forget.jsonl
        --retain {folder}/retain.jsonl --out {tmp_path} --lambda {LAMBDA} --temperature {T}
        --epochs 1 --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --use_cpu
        --optim sgd --learning_rate 1 --weight_decay 0 --max_grad_norm 0 --disable_tqdm True"""
    two_processes(ddp_process, command.split())
    before, after = load(folder), hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    moved = {short(name): (p - q).detach() for (name, p), q in
             zip(before.named_parameters(), after.parameters(), strict=True)}
    first = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][0]
    assert first["step"] == 1
    assert_same((first["loss"], moved), expected)


def ddp_process(rank, argv):
    hf_trainer.main(argv)
    assert torch.distributed.get_world_size() == 2


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp_on_two_processes_takes_the_same_step(folder, pairs, expected, tmp_path, reshard):
    """FSDP2. accelerate shards on accelerators only, so here the model is sharded by hand."""
    two_processes(fsdp_process, folder, pairs, tmp_path, reshard)
    assert_same(torch.load(tmp_path / "got.pt"), expected)


def fsdp_process(rank, folder, pairs, out, reshard):
    args = hf.TrainingArguments(output_dir=out, use_cpu=True)
    model = load(folder)
    trainer = hf_trainer.ETWTrainer(model, args, hf_trainer.collate, lam=LAMBDA, temperature=T)
    assert trainer.accelerator.num_processes == 2
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for module in [*model.model.layers, model]:
        torch.distributed.fsdp.fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    batches = [hf_trainer.collate([pair]) for pair in pairs[rank::2]]
    counts = trainer._get_num_items_in_batch(batches, "cpu")
    losses = [trainer.compute_loss(model, batch, num_items_in_batch=counts) for batch in batches]
    sum(losses).backward()
    loss = trainer.accelerator.reduce(sum(losses).detach(), "mean").item()
    grads = {short(name): p.grad.full_tensor() for name, p in model.named_parameters()}
    if rank == 0:
        torch.save((loss, grads), out / "got.pt")


# ---- By hand, OpenUnlearning, PEFT, tokenizers


def test_the_short_form_of_readme_has_the_same_loss(folder, pairs, expected):
    model, batch = load(folder), hf_trainer.collate(pairs)
    logits = model(input_ids=batch["input_ids"]).logits
    logprobs, entropy, mask = etw.label_stats(logits, batch["labels"], T)
    weights = etw.weigh("etw", etw.Tokens(logprobs, entropy, mask))
    forget = batch["is_forget"][:, None]
    loss = (etw.retain_loss(logprobs, mask & ~forget)
            + LAMBDA * etw.forget_loss(logprobs, weights, mask & forget))
    loss.backward()
    assert_same((loss.item(), gradients(model)), expected)


class GradDiff:
    """Stands in for theirs: gamma, alpha and a retain loss."""

    def __init__(self, gamma=1.0, alpha=1.0):
        self.gamma, self.alpha = gamma, alpha

    def compute_retain_loss(self, model, retain_inputs):
        return model(**retain_inputs).loss


def test_the_open_unlearning_trainer_has_the_same_loss(
        folder, pairs, expected, tmp_path, monkeypatch):
    for name in ("trainer", "trainer.unlearn", "trainer.unlearn.grad_diff"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(GradDiff=GradDiff))
    path = ROOT / "integrations" / "open_unlearning" / "etw_trainer.py"
    spec = importlib.util.spec_from_file_location("etw_trainer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    batch = hf_trainer.collate(pairs)
    forget = batch.pop("is_forget")
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1])
                               < torch.tensor([len(row.tokens) for kind in zip(*pairs, strict=True)
                                               for row in kind])[:, None]).long()
    inputs = {"forget": {k: v[forget] for k, v in batch.items()},
              "retain": {k: v[~forget] for k, v in batch.items()}}
    inputs["forget"]["index"] = torch.arange(4)
    model = load(folder)
    with torch.no_grad():  # another weighting with β's of its own, retain rows twice as dear
        kept = GradDiff().compute_retain_loss(model, dict(inputs["retain"]))
        loss = module.ETW(gamma=LAMBDA, alpha=2.0, temperature=T, weighting="satimp",
                          beta=[2, 0.5]).compute_loss(model, copy.deepcopy(inputs))
    other, _ = one_step(load(folder), pairs, tmp_path, method="satimp", beta=[2, 0.5])
    assert loss.item() - kept.item() == pytest.approx(other, rel=1e-5)
    loss = module.ETW(gamma=LAMBDA, temperature=T).compute_loss(model, inputs)
    loss.backward()
    assert_same((loss.item(), gradients(model)), expected)


def test_lora_takes_three_steps_with_the_loss_of_the_whole_model(folder, pairs, expected, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(folder), config)
    args = hf.TrainingArguments(
        output_dir=tmp_path, use_cpu=True, per_device_train_batch_size=4, max_steps=3,
        save_strategy="no", logging_steps=1, disable_tqdm=True, learning_rate=1e-2)
    trainer = hf_trainer.ETWTrainer(model, args, hf_trainer.collate, pairs,
                                    lam=LAMBDA, temperature=T)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert math.isclose(losses[0], expected[0], rel_tol=1e-5)  # B = 0: the model as it was
    assert losses[2] < losses[0]


def test_any_tokenizer_encodes_as_ours_or_by_its_own_chat_template(folder, pairs):
    tokenizer = hf.AutoTokenizer.from_pretrained(folder / "model")
    examples = data.read_jsonl(folder / "forget.jsonl")
    ours, _ = data.encode(examples, data.Tokenizer(folder / "model"), 128)
    assert data.encode(examples, hf_trainer.ChatEncoder(tokenizer), 128)[0] == ours
    tokenizer.chat_template = CHATML
    theirs, _ = data.encode(examples, hf_trainer.ChatEncoder(tokenizer), 128)
    for example, row in zip(examples, theirs, strict=True):
        chat = [{"role": "user", "content": example.question},
                {"role": "assistant", "content": example.answer}]
        whole = tokenizer.apply_chat_template(chat, tokenize=False).rstrip()
        assert tokenizer.decode(row.tokens) == whole
        assert tokenizer.decode(row.tokens[row.start:]) == example.answer + "<|end|>"


def test_the_program_never_imports_transformers():
    code = "import train, evaluate, sys; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_the_flags_of_the_command_reach_the_trainer(folder, tmp_path, monkeypatch):
    seen = []
    for name in ("save_model", "save_state"):
        monkeypatch.setattr(hf_trainer.ETWTrainer, name, lambda self: None)
    monkeypatch.setattr(hf_trainer.ETWTrainer, "train", lambda self: seen.append(self))
    hf_trainer.main(f"""--model {folder}/model --forget {folder}/forget.jsonl
        --retain {folder}/retain.jsonl --out {tmp_path} --use_cpu --epochs 2 --max-length 40
        --method satimp --beta 2 0.5 --lambda 0.7 --temperature 3 --template llama2""".split())
    trainer, = seen
    assert (trainer.method, [*trainer.beta], trainer.lam, trainer.temperature) == (
        "satimp", [2, 0.5], 0.7, 3)
    tokenizer = data.Tokenizer(folder / "model", "llama2")
    for stream, kind in enumerate(("forget", "retain")):  # every pass, in train.py's order
        rows, _ = data.encode(data.read_jsonl(folder / f"{kind}.jsonl"), tokenizer, 40)
        passes = data.draw(len(rows), trainer.args.seed, stream, 0, 8)
        assert [pair[stream].tokens for pair in trainer.train_dataset] == [
            rows[i].tokens for i in passes]
