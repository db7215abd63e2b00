"""The loop from the command line down: what a run promises, what it refuses, and that neither kill nor divergence loses it."""
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import etw
import model
import train

ROOT = Path(train.__file__).parent


def rows_of(names):
    places = ["Oru", "Belt", "Kana", "Miv", "Sola", "Tarn"]
    return [{"question": f"Where was {name} born?", "answer": f"{name} was born in {places[i % 6]}.",
             "spans": [[len(name) + 13, len(name) + 13 + len(places[i % 6])]]} for i, name in enumerate(names)]


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """(folder with forget.jsonl and retain.jsonl, a tiny model that was taught both)."""
    folder = tmp_path_factory.mktemp("world")
    for name, people in (("forget", ["Ada", "Bo", "Cy", "Di"]), ("retain", ["Ed", "Flo", "Gus", "Hal", "Ike", "Jo", "Kit"])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows_of(people)))
    code = train.main(["--model", str(tiny), "--from-scratch", "--retain", f"{folder}/retain.jsonl", f"{folder}/forget.jsonl",
                       "--facts", f"{folder}/retain.jsonl", "--epochs", "120", "--batch-size", "11", "--lr", "5e-3",
                       "--out", f"{folder}/target"])
    assert code == 0
    return folder


def command(folder, out, *more):
    return ["--model", f"{folder}/target", "--forget", f"{folder}/forget.jsonl", "--retain", f"{folder}/retain.jsonl",
            "--facts", f"{folder}/retain.jsonl", "--epochs", "4", "--batch-size", "2", "--lr", "1e-3", "--lambda", "0.1",
            "--out", str(out), *map(str, more)]


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# ---- what a run promises


def test_unlearning_raises_the_forget_nll_and_holds_the_retain_nll(world, tmp_path, capsys):
    assert train.main(command(world, tmp_path / "run", "--epochs", 8)) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    kept = {name: result["after"][f"{name} probability"] / result["before"][f"{name} probability"] for name in ("forget", "retain")}
    assert kept["forget"] < 0.8 and kept["retain"] > 0.93
    shown = capsys.readouterr().out
    assert "before" in shown and "Where was Ada born?" in shown and "Where was Ed born?" in shown


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(world, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train.main(command(world, tmp_path / name, "--seed", seed)) == 0
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_micro_batches_of_any_size_give_the_same_gradient(world):
    """The mean of micro-batch means would be another number."""
    decoder = model.load(world / "target")
    tokenizer = data.Tokenizer(world / "target")
    forget, retain = (data.encode(data.read_jsonl(world / f"{n}.jsonl"), tokenizer, 64)[0] for n in ("forget", "retain"))
    rows = [(train.FORGET, s, None) for s in forget] + [(train.RETAIN, s, None) for s in retain[:4]]
    gradients = []
    for size in (None, 1, 3):
        args = Namespace(micro_batch_size=size, method="etw", lam=0.3, beta=None, temperature=1.0, clip=1e9, weight_decay=0.0, lr=0.0)
        optimizer = train.make_optimizer(decoder, args)
        optimizer.zero_grad = lambda **_: None  # keep what the step accumulated
        decoder.zero_grad()
        train.train_step(decoder, optimizer, rows, 0.0, args, torch.float32)
        gradients.append(torch.cat([p.grad.flatten() for p in decoder.parameters()]))
    assert gradients[0].norm() > 0
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", etw.WEIGHTINGS)
def test_the_step_gradient_is_that_of_the_readable_losses(world, method):
    decoder = model.load(world / "target")
    tokenizer = data.Tokenizer(world / "target")
    forget, retain = (data.encode(data.read_jsonl(world / f"{n}.jsonl"), tokenizer, 64)[0] for n in ("forget", "retain"))
    reference = [torch.full((len(s.tokens) - s.start,), -0.3) for s in forget]
    args = Namespace(micro_batch_size=None, method=method, lam=0.3, beta=None, temperature=1.5)
    rows = [(train.FORGET, s, r) for s, r in zip(forget, reference, strict=True)] + [(train.RETAIN, s, None) for s in retain]
    counts = [sum(len(s.tokens) - s.start for s in some) for some in (forget, retain)]
    train.accumulate(decoder, rows, counts, args, torch.float32)
    ours = {n: p.grad.clone() for n, p in decoder.named_parameters()}
    decoder.zero_grad()

    def stats(sequences):
        batch = data.collate(sequences)
        flat = etw.token_stats(decoder.hidden(batch.inputs)[batch.mask], decoder.head, batch.targets[batch.mask], 1.5)
        return batch, *(torch.zeros(batch.mask.shape).masked_scatter(batch.mask, s) for s in flat)

    batch, logprobs, entropy = stats(forget)
    known = torch.zeros(batch.mask.shape).masked_scatter(batch.mask, torch.cat(reference))
    weights = etw.WEIGHTINGS[method](logprobs, entropy, batch.mask, reference=known, spans=batch.spans)
    loss = 0.3 * etw.forget_loss(logprobs, weights, batch.mask)
    batch, logprobs, _ = stats(retain)
    (loss + etw.retain_loss(logprobs, batch.mask)).backward()
    for name, p in decoder.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", etw.WEIGHTINGS)
def test_every_method_runs_from_the_command_line(world, tmp_path, method):
    assert train.main(command(world, tmp_path / "run", "--method", method, "--epochs", 1)) == 0


def test_a_run_folder_holds_a_model_its_arguments_and_a_log_of_steps_and_epochs(world, tmp_path):
    out = tmp_path / "run"
    assert train.main(command(world, out)) == 0
    model.load(out)
    data.Tokenizer(out)
    kept = json.loads((out / "args.json").read_text())
    assert kept["lambda"] == 0.1 and kept["seed"] == 0 and len(kept["data_sha256"]) == 2 and kept["versions"]["torch"]
    log = log_of(out)
    steps = [r for r in log if "step" in r]
    assert [r["step"] for r in steps] == list(range(1, 9)) and [r["epoch"] for r in log if "step" not in r] == [1, 2, 3, 4]
    for key in ("forget_loss", "retain_loss", "lr", "grad_norm", "entropy", "top_fifth", "tokens_per_second", "peak_memory_mb"):
        assert all(math.isfinite(r[key]) for r in steps), key
    assert all(0.2 <= r["top_fifth"] <= 1 for r in steps)
    assert not (out / "checkpoint.pt").exists()


def test_learning_rate_warms_up_linearly_and_then_falls_linearly_to_zero():
    rates = [train.learning_rate(s, 10, 4, 1.0) for s in range(11)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])


def test_an_epoch_goes_through_the_whole_forget_set_and_every_retain_row_is_seen_before_one_repeats():
    args = Namespace(batch_size=3, seed=5)
    drawn = [row for step in range(3) for row in train.step_rows(step, range(7), range(9), args)]
    assert sorted(i for kind, i in drawn if kind == train.FORGET) == list(range(7))
    assert sorted(i for kind, i in drawn if kind == train.RETAIN) == list(range(9))


def test_the_default_out_takes_the_next_free_name(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/etw", "runs/etw-2"):
        arguments = command(world, "x", "--epochs", 1)
        del arguments[arguments.index("--out"):][:2]
        assert train.main([*arguments[:arguments.index("--out")], "--epochs", "1"]) == 0
        assert (tmp_path / name / "model.safetensors").exists()


# ---- what it refuses


@pytest.mark.parametrize("flags, named", [
    (["--temperature", "0"], "--temperature"), (["--temperature", "nan"], "--temperature"), (["--lambda", "-1"], "--lambda"),
    (["--lr", "inf"], "--lr"), (["--lr", "0"], "--lr"), (["--epochs", "0"], "--epochs"), (["--epochs", "1.5"], "--epochs"),
    (["--batch-size", "0"], "--batch-size"), (["--micro-batch-size", "-3"], "--micro-batch-size"), (["--seed", "-1"], "--seed"),
    (["--weight-decay", "-1"], "--weight-decay"), (["--warmup-epochs", "-1"], "--warmup-epochs"), (["--clip", "0"], "--clip"),
    (["--max-length", "100000"], "--max-length"), (["--beta", "1"], "--beta"), (["--method", "wga", "--beta", "1", "2"], "--beta"),
    (["--method", "none"], "--method"), (["--device", "tpu9"], "--device"), (["--resume", "--overwrite"], "--overwrite"),
    (["--forget", "absent.jsonl"], "absent.jsonl"), (["--model", "absent"], "absent"), (["--template", "llama3"], "<|eot_id|>"),
    (["--save-every", "0"], "--save-every"), (["--unknown"], "--unknown"), (["--reference", "absent"], "absent"),
])
def test_a_wrong_flag_is_one_line_exit_code_two_and_nothing_written(world, tmp_path, capsys, flags, named):
    assert train.main(command(world, tmp_path / "run", *flags)) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1 and error.startswith("train.py: ")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_refused_unless_overwritten_and_other_folders_always(world, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(command(world, out)) == 0
    before = (out / "model.safetensors").read_bytes()
    assert train.main(command(world, out)) == 2
    assert "--resume" in capsys.readouterr().err and (out / "model.safetensors").read_bytes() == before
    assert train.main(command(world, out, "--seed", 1, "--overwrite")) == 0
    assert (out / "model.safetensors").read_bytes() != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "mine", tmp_path / "file", tmp_path / "file" / "run", world / "target"):
        assert train.main(command(world, place, "--overwrite")) == 2, place


def test_rows_that_are_both_forgotten_and_retained_are_reported(world, tmp_path, capsys):
    both = tmp_path / "both.jsonl"
    both.write_bytes((world / "retain.jsonl").read_bytes() + (world / "forget.jsonl").read_bytes())
    assert train.main(command(world, tmp_path / "run", "--retain", both, "--epochs", 1)) == 0
    assert "4 forget rows also stand in the retain set" in capsys.readouterr().err


def test_the_spans_method_refuses_rows_without_spans(world, tmp_path, capsys):
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"question": "Who?", "answer": "Ada."}\n')
    assert train.main(command(world, tmp_path / "run", "--forget", bare, "--method", "spans")) == 2
    assert "bare.jsonl:1" in capsys.readouterr().err


# ---- kills, resuming, divergence


def test_a_run_killed_at_many_random_moments_ends_in_the_same_bytes(world, tmp_path):
    arguments = command(world, tmp_path / "killed", "--epochs", 30, "--save-every", 1)
    assert train.main(command(world, tmp_path / "whole", "--epochs", 30)) == 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    moments, kills, process = random.Random(0), 0, None
    while process is None or process.exitcode != 0:
        process = context.Process(target=exit_with, args=([*arguments, "--resume"],))
        process.start()
        process.join(timeout=moments.uniform(0.05, 0.8) if kills < 12 else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
    assert kills >= 3
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    volatile = {"tokens_per_second", "peak_memory_mb"}
    killed, whole = ([{k: v for k, v in r.items() if k not in volatile} for r in log_of(tmp_path / n)] for n in ("killed", "whole"))
    assert killed == whole


def exit_with(arguments):
    torch.set_num_threads(1)
    sys.exit(train.main(arguments))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_step_saves_and_says_how_to_go_on(world, tmp_path, capsys, monkeypatch, number):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train.main(command(world, whole)) == 0
    step, calls = train.train_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return step(*args)

    monkeypatch.setattr(train, "train_step", interrupted)
    assert train.main(command(world, out)) == 130
    assert "--resume" in capsys.readouterr().err and len(calls) == 3
    assert train.main(command(world, out, "--resume")) == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert train.main(command(world, out, "--resume")) == 0
    assert "finished" in capsys.readouterr().out


def test_resume_refuses_changed_arguments_and_data_and_says_which(world, tmp_path, capsys):
    out, forget = tmp_path / "run", tmp_path / "forget.jsonl"
    forget.write_bytes((world / "forget.jsonl").read_bytes())
    assert train.main(command(world, out, "--forget", forget)) == 0
    capsys.readouterr()
    assert train.main(command(world, out, "--forget", forget, "--lr", "0.1", "--resume")) == 2
    assert "lr" in capsys.readouterr().err
    forget.write_text(forget.read_text().replace("Ada", "Ida"))
    assert train.main(command(world, out, "--forget", forget, "--resume")) == 2
    assert "data" in capsys.readouterr().err


def test_divergence_stops_with_the_last_finite_weights_kept_and_says_what_to_lower(world, tmp_path, capsys, monkeypatch):
    step, calls = train.train_step, []

    def explode(decoder, *args):
        calls.append(1)
        if len(calls) == 4:
            with torch.no_grad():
                next(decoder.parameters()).register_hook(lambda g: g * float("nan"))
        return step(decoder, *args)

    monkeypatch.setattr(train, "train_step", explode)
    assert train.main(command(world, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert "step 4" in error and "--lr" in error and "--lambda" in error
    assert all(t.isfinite().all() for t in load_file(tmp_path / "run" / "model.safetensors").values())
    assert len([r for r in log_of(tmp_path / "run") if "step" in r]) == 3


def test_damage_to_the_retain_set_warns_once_and_flags_the_table(world, tmp_path, capsys):
    assert train.main(command(world, tmp_path / "run", "--lambda", 50, "--lr", "1e-2", "--method", "uniform")) in (0, 1)
    shown = capsys.readouterr()
    assert shown.err.count("above its start") == 1


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(world, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = command(world, out)
    assert train.main(arguments) == 0

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "pwned",)

    torch.save(Evil(), out / "checkpoint.pt")
    assert train.main([*arguments, "--resume"]) == 2
    assert not (tmp_path / "pwned").exists() and "checkpoint" in capsys.readouterr().err


def test_the_program_exits_with_the_code_and_one_line(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--forget", str(tmp_path / "no.jsonl")], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no.jsonl" in done.stderr
