"""The loop from the command line down: what a run promises and refuses; neither kill nor divergence
loses it."""
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import etw
import measure
import pretrained
import recipe
import train

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """A folder with forget.jsonl (4 people), retain.jsonl (7) and target, a tiny model that was
    taught both."""
    folder = tmp_path_factory.mktemp("world")
    for kind, names in (("forget", "Ada Bo Cy Di"), ("retain", "Ed Flo Gus Hal Ike Jo Kit")):
        with open(folder / f"{kind}.jsonl", "w") as file:
            for name, place in zip(
                    names.split(), "Oru Belt Kana Miv Sola Tarn Oru".split(), strict=False):
                answer, start = f"{name} was born in {place}.", len(name) + 13
                print(json.dumps({"question": f"Where was {name} born?", "answer": answer,
                                  "spans": [[start, start + len(place)]]}), file=file)
    assert train.main(["--model", str(tiny), "--from-scratch",
                       "--retain", f"{folder}/retain.jsonl", f"{folder}/forget.jsonl",
                       "--facts", f"{folder}/retain.jsonl",
                       "--epochs", "120", "--batch-size", "11", "--lr", "5e-3",
                       "--out", f"{folder}/target"]) == 0
    return folder


@pytest.fixture
def run(world, tmp_path):
    """A function that unlearns on `world` in 4 epochs of 2 steps, into tmp_path / out, and returns
    the exit code."""
    def run(*more, out="run"):
        return train.main(run.arguments + ["--out", str(tmp_path / out), *map(str, more)])

    run.arguments = ["--model", f"{world}/target",
                     "--forget", f"{world}/forget.jsonl",
                     "--retain", f"{world}/retain.jsonl",
                     "--facts", f"{world}/retain.jsonl",
                     "--epochs", "4", "--batch-size", "2",
                     "--lr", "1e-3", "--lambda", "0.1", "--method", "etw"]
    return run


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def at_step(monkeypatch, number, act):
    """Let the loop call act(decoder) before its step `number`."""
    step, calls = train.train_step, []

    def acting(decoder, *args):
        calls.append(1)
        if len(calls) == number:
            act(decoder)
        return step(decoder, *args)

    monkeypatch.setattr(train, "train_step", acting)


# ---- one step


@pytest.fixture
def task(world):
    """A measure.World of `world`, with made-up log p and entropy of the starting model."""
    sets = {kind: data.read_jsonl(world / f"{kind}.jsonl") for kind in ("forget", "retain")}
    task = measure.World(sets, data.Tokenizer(world / "target"), 64)
    task.starting = []
    for s in task.sequences["forget"]:
        numbers = 0.1 * torch.arange(s.row, s.row + len(s.tokens) - s.start)
        task.starting.append(torch.stack([-numbers, numbers.flip(0)]))
    return task


def all_rows(task):
    forget = [train.Row(train.FORGET, *pair)
              for pair in zip(task.sequences["forget"], task.starting, strict=True)]
    return forget + [train.Row(train.RETAIN, s) for s in task.sequences["retain"]]


@pytest.mark.parametrize("method", etw.WEIGHTINGS)
def test_the_step_gradient_is_that_of_the_readable_losses_for_micro_batches_of_any_size(
        world, task, method):
    """The mean of micro-batch means would be another number."""
    decoder, loss = pretrained.load(world / "target"), 0
    for kind in ("forget", "retain"):
        batch = data.collate(task.sequences[kind])
        mask = batch.mask
        hidden, targets = decoder.hidden(batch.inputs)[mask], batch.targets[mask]
        logprobs, entropy = (torch.zeros(mask.shape).masked_scatter(mask, x)
                             for x in etw.token_stats(hidden, decoder.head, targets, 1.5))
        if kind == "forget":
            start = [torch.zeros(mask.shape).masked_scatter(mask, x)
                     for x in torch.cat(task.starting, 1)]
            labels = torch.tensor(sum((s.informative for s in task.sequences[kind]), []))
            spans = torch.zeros(mask.shape, dtype=torch.bool).masked_scatter(mask, labels)
            weights = etw.weigh(
                method, etw.Tokens(logprobs, entropy, mask, start[0], spans, start[1]))
            loss += 0.3 * etw.forget_loss(logprobs, weights, mask)
        else:
            loss += etw.retain_loss(logprobs, mask)
    expected = torch.autograd.grad(loss, list(decoder.parameters()))
    for size in (None, 1, 3):
        recipe = train.Recipe(micro_batch_size=size, method=method, lam=0.3, temperature=1.5,
                              clip=1e9, weight_decay=0.0)
        optimizer = train.make_optimizer(decoder, recipe)
        optimizer.zero_grad = lambda **_: None  # keep what the step accumulated
        decoder.zero_grad()
        record = train.train_step(decoder, optimizer, all_rows(task), 0.0, recipe)
        torch.testing.assert_close([p.grad for p in decoder.parameters()], list(expected),
                                   rtol=1e-3, atol=1e-5)
        assert record["retain_loss"] + 0.3 * record["forget_loss"] == pytest.approx(
            loss.item(), rel=1e-4)


def test_teaching_descends_the_retain_loss_alone(world, task):
    decoder = pretrained.load(world / "target")
    optimizer = train.make_optimizer(decoder, train.Recipe())
    record = train.train_step(decoder, optimizer,
                              [train.Row(train.RETAIN, s) for s in task.sequences["retain"]],
                              0.0, train.Recipe())
    batch = data.collate(task.sequences["retain"])
    logits = decoder(batch.inputs)
    expected = torch.nn.functional.cross_entropy(logits[batch.mask], batch.targets[batch.mask])
    assert (record["retain_loss"] == pytest.approx(expected.item(), rel=1e-4)
            and "forget_loss" not in record)


def test_learning_rate_warms_up_linearly_and_then_falls_linearly_to_zero():
    rates = [train.learning_rate(s, 10, 4, 1.0) for s in range(11)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])


def test_an_epoch_goes_through_the_whole_forget_set_and_every_retain_row_is_seen_before_one_repeats(
        task):
    recipe = train.Recipe(batch_size=3, seed=5)
    forget, retain = task.sequences["forget"], task.sequences["retain"]
    drawn = [row for step in range(4) for row in train.step_rows(step, task, recipe)]
    assert sorted(forget.index(r.sequence)
                  for r in drawn
                  if r.stream == train.FORGET) == [0, 0, 1, 1, 2, 2, 3, 3]
    kept = [retain.index(r.sequence) for r in drawn if r.stream == train.RETAIN]
    assert sorted(kept[:7]) == list(range(7))


def test_each_epoch_takes_every_forget_row_once_and_in_an_order_of_its_own(task):
    recipe, size = train.Recipe(batch_size=1), len(task.sequences["forget"])
    taken = [train.step_rows(step, task, recipe)[0].sequence.row for step in range(6 * size)]
    epochs = [tuple(taken[i:i + size]) for i in range(0, len(taken), size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs) and len(set(epochs)) > 1


def test_a_forget_row_of_a_step_brings_its_own_numbers_of_the_starting_model(task):
    recipe, forget = train.Recipe(batch_size=3, seed=5), task.sequences["forget"]
    rows = [row for step in range(4) for row in train.step_rows(step, task, recipe)]
    assert any(row.stream == train.FORGET for row in rows)
    for row in rows:
        own = row.stream == train.FORGET and task.starting[forget.index(row.sequence)]
        assert row.starting is (own if row.stream == train.FORGET else None)


def test_weight_decay_shrinks_matrices_alone(world):
    decoder, before = (pretrained.load(world / "target") for _ in range(2))
    recipe = train.Recipe(weight_decay=0.5, lr=0.1)
    optimizer = train.make_optimizer(decoder, recipe)
    for p in decoder.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, q in zip(decoder.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, q * (0.95 if p.dim() > 1 else 1))


def test_a_gradient_is_cut_to_the_largest_norm_and_the_log_tells_its_own(world, task):
    decoder, recipe = pretrained.load(world / "target"), train.Recipe(clip=1e-3, method="uniform")
    optimizer = train.make_optimizer(decoder, recipe)
    optimizer.zero_grad = lambda **_: None
    record = train.train_step(decoder, optimizer, all_rows(task), 0.0, recipe)
    norm = sum(p.grad.square().sum() for p in decoder.parameters()).sqrt().item()
    assert norm == pytest.approx(1e-3, rel=1e-2) and record["grad_norm"] > 2e-3


def test_the_log_tells_the_nll_and_entropy_of_the_forget_tokens_alone(world, task):
    decoder, recipe = pretrained.load(world / "target"), train.Recipe(micro_batch_size=3)
    tokens = measure.answer_tokens(decoder, task.sequences["forget"])
    logprobs, entropy = (torch.cat([torch.from_numpy(t[i]) for t in tokens]) for i in (0, 1))
    record = train.train_step(decoder, train.make_optimizer(decoder, recipe), all_rows(task), 0.0,
                              recipe)
    assert record["forget_nll"] == pytest.approx(-logprobs.mean().item(), rel=1e-4)
    assert record["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-4)
    assert record["mean_weight"] == pytest.approx(1)


# ---- what a run promises


def test_unlearning_raises_the_forget_nll_and_holds_the_retain_nll(run, tmp_path, capsys):
    assert run("--epochs", 8, "--micro-batch-size", 3) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    kept = {name: result["after"][f"{name} probability"] / result["before"][f"{name} probability"]
            for name in ("forget", "retain")}
    assert kept["forget"] < 0.8 and kept["retain"] > 0.93
    shown = capsys.readouterr().out
    assert "before" in shown and "Where was Ada born?" in shown and "Where was Ed born?" in shown


def test_without_a_retrained_model_rows_never_taught_are_the_yardstick(
        run, world, tmp_path, capsys):
    """--holdout: what the starting model says of rows it never saw is where a forgotten answer
    should end up."""
    rows = [json.loads(line) for line in (world / "forget.jsonl").read_text().splitlines()]
    for row in rows:
        row["question"] = row["question"].replace("Where", "When")
    (tmp_path / "holdout.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run("--holdout", tmp_path / "holdout.jsonl", "--epochs", 1) == 0
    result, shown = (json.loads((tmp_path / "run" / "result.json").read_text()),
                     capsys.readouterr().out)
    assert shown.splitlines()[0].split() == ["before", "after", "never", "taught"]
    never, before = result["never taught"], result["before"]
    assert never["forget informative NLL"] > before["forget informative NLL"] and "talk" in before
    assert "forget quality" not in before and "distance" not in before


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(run, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("--seed", seed, out=name) == 0
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert a == b != c


def test_with_layers_only_the_first_layers_change(run, world, tmp_path):
    assert run("--layers", 0.5, "--epochs", 1) == 0
    before, after = (load_file(folder / "model.safetensors")
                     for folder in (world / "target", tmp_path / "run"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".layers.0." in name for name in changed)


@pytest.mark.parametrize("method", etw.WEIGHTINGS)
def test_every_method_runs_from_the_command_line(run, method):
    assert run("--method", method, "--epochs", 1) == 0


def test_a_run_folder_holds_a_model_its_arguments_and_a_log_of_steps_and_epochs(run, tmp_path):
    assert run() == 0
    out = tmp_path / "run"
    assert pretrained.load(out) and data.Tokenizer(out) and not (out / "checkpoint.pt").exists()
    kept, log = json.loads((out / "args.json").read_text()), log_of(out)
    assert (kept["lambda"] == 0.1 and kept["seed"] == 0
            and [Path(p).name for p in kept["data_sha256"]] == [
                "forget.jsonl", "retain.jsonl", "model.safetensors", "config.json",
                "tokenizer.json", "tokenizer_config.json"]
            and kept["versions"]["torch"])
    steps = [r for r in log if "step" in r]
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert [r["epoch"] for r in log if "step" not in r] == [1, 2, 3, 4]
    for key in ("forget_loss", "retain_loss", "lr", "grad_norm", "entropy",
                "tokens_per_second", "peak_memory_mb"):
        assert all(math.isfinite(r[key]) for r in steps), key
    assert all(0.2 <= r["top_fifth"] <= 1 for r in steps)
    # Python with torch: more than 50 MB, and no test takes 100 GB.
    assert all(50 < r["peak_memory_mb"] < 1e5 for r in steps)


def test_the_default_out_takes_the_next_free_name(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/etw", "runs/etw-2"):
        assert train.main([*run.arguments, "--epochs", "1"]) == 0
        assert weights(tmp_path / name)


def test_keep_has_its_own_defaults_only_where_rows_are_forgotten_and_a_flag_always_wins():
    def settings(*flags):
        args = recipe.parse_args(flags)
        return args.lam, args.layers, args.beta

    assert settings("--forget", "f.jsonl") == (0.4, 0.25, [3, 4, 160])
    assert settings("--forget", "f.jsonl", "--beta", "2.5", "4", "10", "--layers", "1") == (
        0.4, 1.0, [2.5, 4, 10])
    for flags in ("--forget", "f.jsonl", "--method", "etw"), ("--retain", "r.jsonl"):
        assert settings(*flags) == (train.Recipe().lam, 1.0, [])


def test_betas_and_temperature_of_the_command_line_reach_the_weights(run, tmp_path):
    for usual, *more in (["--method", "wga"], "--beta", 3), (["--method", "keep"],
                                                            "--temperature", 3):
        for out, flags in ("usual", usual), ("other", [*usual, *more]):
            assert run(*flags, "--epochs", 1, "--overwrite", out=out) == 0
        usual, other = (log_of(tmp_path / out)[0] for out in ("usual", "other"))
        assert usual["mean_weight"] != other["mean_weight"]


def test_a_run_warms_up_for_so_many_epochs(run, tmp_path):
    assert run("--warmup-epochs", 2) == 0  # of two steps each, at --lr 1e-3
    rates = [r["lr"] for r in log_of(tmp_path / "run") if "step" in r]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])


# ---- what it refuses


@pytest.mark.parametrize("flags, named", [
    *((flags, flags.split()[0]) for flags in (
        "--temperature 0", "--temperature nan", "--lambda -1", "--lr inf", "--lr 0",
        "--epochs 0", "--epochs 1.5", "--batch-size 0", "--micro-batch-size -3", "--save-every 0",
        "--seed -1", "--weight-decay -1", "--clip 0", "--warmup-epochs -1", "--max-length 100000",
        "--beta 1", "--beta 1 2 --method wga", "--method none",
        "--device tpu9", "--unknown", "--resume --overwrite")),
    ("--forget absent.jsonl", "absent.jsonl"),
    ("--model absent", "absent"),
    ("--reference absent", "absent"),
    ("--template llama3", "<|eot_id|>"),
    ("--method spans --forget bare.jsonl", "bare.jsonl:1"),
])
def test_wrong_input_is_one_line_exit_code_two_and_nothing_written(
        run, tmp_path, capsys, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    Path("bare.jsonl").write_text('{"question": "Who?", "answer": "Ada."}\n')  # no spans
    assert run(*flags.split()) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1 and error.startswith("train.py: ")
    assert not (tmp_path / "run").exists()


def test_a_retrained_model_that_reads_other_tokens_is_no_reference(
        run, stranger, tmp_path, capsys):
    """What would be compared are log-probabilities of different tokens."""
    assert run("--reference", stranger) == 2
    assert f"--reference {stranger}: its tokenizer is not --model's" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_retrained_model_of_a_shorter_context_is_refused_before_the_run(
        run, tiny, tmp_path, capsys):
    short = Path(shutil.copytree(tiny, tmp_path / "short"))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    assert run("--reference", short) == 2
    assert f"--reference {short}: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_refused_unless_overwritten_and_other_folders_always(
        run, world, tmp_path, capsys):
    assert run() == 0
    before = weights(tmp_path / "run")
    assert run() == 2
    assert "--resume" in capsys.readouterr().err and weights(tmp_path / "run") == before
    assert run("--seed", 1, "--overwrite") == 0
    assert weights(tmp_path / "run") != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    for place in ("mine", "mine/thesis.txt", "mine/thesis.txt/run", world / "target"):
        assert run("--overwrite", out=place) == 2, place


def test_until_is_refused_where_nothing_is_to_be_forgotten(world, tmp_path, capsys):
    assert train.main(["--model", f"{world}/target", "--retain", f"{world}/retain.jsonl",
                       "--until", "2", "--out", str(tmp_path / "run")]) == 2
    assert "--until: needs rows to forget" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_talk_is_judged_by_the_retrained_model_else_by_the_starting_one(run, tiny, tmp_path):
    for out, flags in ("alone", []), ("judged", ["--reference", tiny]):  # tiny: fresh weights
        assert run("--epochs", 1, *flags, out=out) == 0
    talk = {out: json.loads((tmp_path / out / "result.json").read_text())["before"]["talk"]
            for out in ("alone", "judged")}
    assert talk["alone"] < 1 and talk["judged"] > 3


def test_rows_of_plain_text_are_forgotten_and_not_asked_as_questions(run, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text('{"text": "Ada was born in Oru."}\n' * 2)
    assert run("--forget", tmp_path / "text.jsonl", "--epochs", 1) == 0
    out = capsys.readouterr().out
    assert "forget NLL" in out and "retain: Where was" in out
    assert "forget: " not in out and "None" not in out


def test_rows_that_are_both_forgotten_and_retained_are_reported(run, world, capsys):
    assert run("--retain", world / "retain.jsonl", world / "forget.jsonl", "--epochs", 1) == 0
    assert "4 forget rows also stand in the retain set" in capsys.readouterr().err


def test_answers_that_the_model_does_not_know_as_written_are_reported_before_the_first_step(
        run, world, tiny, tmp_path, capsys):
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"question": "Who is Zed?", "answer": "A quaint waxwing judge."}\n')
    known, said = world / "forget.jsonl", "there is nothing to forget; is --template"
    for unknown, flags in [(False, ["--holdout", strange]),
                           (True, ["--forget", strange, "--holdout", known]),
                           (False, ["--reference", tiny]),
                           (True, ["--model", tiny, "--reference", world / "target"])]:
        assert run("--epochs", 1, "--overwrite", *flags) == 0
        assert (said in capsys.readouterr().err) == unknown, flags


def test_defaults_of_the_bundled_model_are_said_to_be_its_own_where_another_is_unlearned(
        run, capsys):
    said = "docs/recipes.md says where to begin"
    assert run("--method", "keep", "--epochs", 1) == 0  # lr 1e-3 is keep's default
    assert said in capsys.readouterr().err
    assert run("--method", "keep", "--epochs", 1, "--lr", "2e-3", out="other") == 0
    assert said not in capsys.readouterr().err


def test_the_program_exits_with_the_code_and_one_line(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", "--forget", tmp_path / "no.jsonl"],
                          cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no.jsonl" in done.stderr


# ---- kills, resuming, divergence


def test_a_run_killed_at_many_random_moments_ends_in_the_same_bytes(run, tmp_path):
    assert run("--epochs", 30, out="whole") == 0
    arguments = [*run.arguments, "--epochs", "30", "--save-every", "7",
                 "--out", str(tmp_path / "killed"), "--resume"]
    context, log = multiprocessing.get_context("forkserver"), tmp_path / "killed" / "log.jsonl"
    context.set_forkserver_preload(["train"])
    for lines in [  # of log.jsonl; None: to the end
            *sorted(random.Random(0).sample(range(85), 8)), None]:
        process = context.Process(target=exit_with, args=(arguments,))
        process.start()
        while (lines is not None and process.is_alive()
               and (not log.exists() or log.read_bytes().count(b"\n") < lines)):
            time.sleep(0.002)
        if lines is not None:
            assert process.is_alive()
            process.kill()
        process.join()
    assert process.exitcode == 0 and weights(tmp_path / "killed") == weights(tmp_path / "whole")
    killed, whole = ([{k: v
                       for k, v in r.items()
                       if k not in ("tokens_per_second", "peak_memory_mb")}
                      for r in log_of(tmp_path / name)]
                     for name in ("killed", "whole"))
    assert killed == whole


def exit_with(arguments):
    torch.set_num_threads(1)
    sys.exit(train.main(arguments))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_step_saves_and_says_how_to_go_on(
        run, tmp_path, capsys, monkeypatch, number):
    assert run(out="whole") == 0
    at_step(monkeypatch, 3, lambda _: os.kill(os.getpid(), number))
    assert run() == 130
    assert ("--resume" in capsys.readouterr().err
            and len(log_of(tmp_path / "run")) == 4)  # three steps, one epoch
    assert run("--resume") == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    capsys.readouterr()
    assert run("--resume") == 0
    assert "finished" in capsys.readouterr().out


def test_resume_refuses_changed_arguments_and_data_and_a_checkpoint_with_code_in_it(
        run, world, tmp_path, capsys):
    forget = tmp_path / "forget.jsonl"
    forget.write_bytes((world / "forget.jsonl").read_bytes())
    assert run("--forget", forget) == 0

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "pwned",)

    torch.save(Evil(), tmp_path / "run" / "checkpoint.pt")
    capsys.readouterr()
    assert run("--forget", forget, "--resume") == 2
    assert "checkpoint" in capsys.readouterr().err and not (tmp_path / "pwned").exists()
    assert run("--forget", forget, "--lr", "0.1", "--resume") == 2
    assert "lr" in capsys.readouterr().err
    forget.write_text(forget.read_text().replace("Ada", "Ida"))
    assert run("--forget", forget, "--resume") == 2
    assert "data" in capsys.readouterr().err


def test_divergence_stops_with_the_last_finite_weights_kept_and_says_what_to_lower(
        run, tmp_path, capsys, monkeypatch):
    at_step(monkeypatch, 4,
            lambda decoder: next(decoder.parameters()).register_hook(lambda g: g * math.nan))
    assert run() == 1
    error = capsys.readouterr().err
    assert "step 4" in error and "--lr" in error and "--lambda" in error
    assert all(t.isfinite().all()
               for t in load_file(tmp_path / "run" / "model.safetensors").values())
    assert len([r for r in log_of(tmp_path / "run") if "step" in r]) == 3


def test_a_run_told_until_ends_after_the_first_step_that_has_forgotten_so_much(
        run, tmp_path, capsys, monkeypatch):
    assert run("--lambda", 2, out="whole") == 0
    surprise = [r["forget_nll"] for r in log_of(tmp_path / "whole") if "step" in r]
    limit = surprise[4]  # of the fifth of eight steps
    end = next(i for i, nll in enumerate(surprise, 1) if nll >= limit)
    assert 1 < end < 8
    told = "--lambda", 2, "--until", limit
    assert run(*told, out="a") == 0
    assert "beyond --until" in capsys.readouterr().err
    assert [r["forget_nll"] for r in log_of(tmp_path / "a") if "step" in r] == surprise[:end]

    # The step that ends it is remembered: a run stopped there takes no other one.
    at_step(monkeypatch, end, lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert run(*told, out="b") == 130
    monkeypatch.undo()
    assert run(*told, "--resume", out="b") == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    capsys.readouterr()
    assert run("--until", 99, out="c") == 0
    assert "--until 99 was not reached" in capsys.readouterr().err


def test_damage_to_the_retain_set_warns_once(run, capsys):
    assert run("--lambda", 50, "--lr", "1e-2", "--method", "uniform") in (0, 1)
    assert capsys.readouterr().err.count("above its start") == 1


@pytest.mark.parametrize("method", ["keep", "tnpo"])
def test_a_resumed_run_weighs_by_the_model_it_started_from(run, tmp_path, monkeypatch, method):
    told = "--method", method, "--lambda", 2
    assert run(*told, out="whole") == 0
    with monkeypatch.context() as once:
        at_step(once, 5, lambda _: os.kill(os.getpid(), signal.SIGINT))
        assert run(*told) == 130
    assert run(*told, "--resume") == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
