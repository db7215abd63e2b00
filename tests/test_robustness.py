"""Hard to break: no fault, kill, signal or foreign file costs anything, and each is one line."""
import contextlib
import gc
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import cli
import data
import evaluate
import pretrained
import run
import screen
import train

TIMINGS = "tokens_per_second", "peak_memory_mb"
processes = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def nursery():
    """Start the process that all children fork from: a real process in 20 ms, instead of 3 s."""
    with contextlib.chdir(cli.ROOT):
        processes.set_forkserver_preload(["train", "torch._dynamo", "pytest", "hypothesis"])
        multiprocessing.forkserver.ensure_running()


@pytest.fixture
def place(tiny, tmp_path, monkeypatch):
    """An empty working directory beside the files of a short run; `arguments` name those."""
    for name, count in (("forget", 2), ("retain", 3)):
        rows = [{"question": f"Who is {name} {i}?", "answer": f"It is {i}.", "spans": [[6, 7]]}
                for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def arguments(tiny, place):
    """Two epochs of one step, with a checkpoint after each."""
    forget, retain = (f"{place.parent}/{name}.jsonl" for name in ("forget", "retain"))
    return ["--model", str(tiny), "--forget", forget, "--retain", retain, "--facts", retain,
            "--epochs", "2", "--batch-size", "2", "--device", "cpu", "--method", "etw"]


@pytest.fixture
def stubbed(monkeypatch):
    """A run that measures nothing: a tenth of the time."""
    monkeypatch.setattr(screen, "Screen", Blind)


class Blind:
    def __init__(self, *_):
        self.before = self.glance = self.text = lambda _: {}

    def after(self, folder):
        pretrained.load(folder)
        return {"after": {}}


# ---- Children: real processes with something in their way


def child(arguments, report, acts):
    """train.py with both streams in the file `report`, after each act, [name, its arguments]."""
    torch.set_num_threads(1)
    gc.freeze()
    with open(report, "wb", 0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    cli.on_interrupt("train.py")
    for name, *details in acts:
        globals()[name](*details)
    code = train.main(arguments)
    os._exit(code)


def blind():
    screen.Screen = Blind


def count_operations(folder, act):
    """Call act(n) before the n-th operation that changes a file of the folder; n = 1, 2, ..."""
    folder, seen = os.path.realpath(folder), []

    def operation(path):
        if os.path.realpath(path).startswith(folder):
            seen.append(path)
            act(len(seen))

    def hook(event, args):
        named = isinstance(args[0] if args else None, str | Path)
        if event == "open" and named and args[2] & (os.O_WRONLY | os.O_RDWR):
            operation(args[0])
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.chmod"):
            operation(args[0])

    sys.addaudithook(hook)
    fsync = os.fsync
    os.fsync = lambda number: (operation(f"/proc/self/fd/{number}"), fsync(number))


def kill_before(folder, number):
    count_operations(folder, lambda n: n == number and os.kill(os.getpid(), signal.SIGKILL))


def record_operations(folder, connection):
    count_operations(folder, connection.send)


def signal_at(where, attribute, number):
    """Send ourselves a signal when that function is called."""
    owner = {"pretrained": pretrained, "Screen": screen.Screen, "train": train}[where]
    function = getattr(owner, attribute)

    def call(*args, **kwargs):
        os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    setattr(owner, attribute, call)


def meet(barrier):
    """Wait for the others where the folder is claimed."""
    begin = run.Run.begin
    run.Run.begin = lambda self: (barrier.wait(60), begin(self))


def pause(reached, go):
    """Say that the first step is reached, and wait there."""
    step = train.train_step

    def call(*args):
        reached.set()
        go.wait(60)
        return step(*args)

    train.train_step = call


def limit_files(size):
    """What is written beyond that fails, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def break_streams(how):
    """stdout and stderr closed, a pipe that nobody reads, or a full disk."""
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if how == "closed":
            os.close(number)
            setattr(sys, name, None)
        else:
            os.dup2(writer if how == "broken" else full, number)
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115  as at a start


class Started:
    """A child under way."""

    def __init__(self, arguments, report, *acts):
        self.report = Path(report)
        self.report.touch()
        arguments = list(map(str, arguments)), str(report), acts
        self.process = processes.Process(target=child, args=arguments)
        self.process.start()

    def end(self):
        """(exit code, the lines that it said)"""
        self.process.join(120)
        return self.process.exitcode, self.report.read_text().splitlines()


def in_child(arguments, report, *acts):
    return Started(arguments, report, *acts).end()


def log_of(folder):
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS}
            for line in (folder / "log.jsonl").read_text().splitlines()]


def said(lines):
    """The one line of a refusal, among what is known to be said before it."""
    lines = [line for line in lines if line.startswith("train.py: ")]
    assert len(lines) == 1, lines
    return lines[0]


def told(capsys):
    """What stderr holds of that since it was last looked at."""
    return said(capsys.readouterr().err.splitlines())


def same_run(folder, whole):
    """A finished run like another: bytes of weights and result, log; nothing else in the folder."""
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in whole.iterdir())
    for name in ("model.safetensors", "config.json", "tokenizer.json", "result.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert log_of(folder) == log_of(whole)


# ---- kills


def test_a_run_killed_before_any_file_operation_resumes_to_the_same_bytes_and_leaves_nothing(
        arguments, place):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    whole, report = place / "whole", place.parent / "report"
    assert in_child([*arguments, "--out", whole], report, ["blind"],
                    ["record_operations", whole, sender])[0] == 0
    count = 0
    while receiver.poll():
        count = receiver.recv()
    assert count > 50

    def killed(number):
        out = place / f"killed{number}"
        return out, Started([*arguments, "--out", out], place.parent / f"report{number}",
                            ["blind"], ["kill_before", out, number])

    resumed, numbers = set(), range(1, count + 1)
    for pair in (numbers[i:i + 2] for i in range(0, count, 2)):  # side by side
        for out, process in [killed(number) for number in pair]:
            assert process.end()[0] == -signal.SIGKILL
            if (left := left_by_a_kill(out)) not in resumed:  # the same goes on in the same way
                resumed.add(left)
                code, lines = in_child([*arguments, "--out", out, "--resume"], report, ["blind"])
                assert code == 0, (out, lines)
                same_run(out, whole)
    assert len(resumed) >= 20


def left_by_a_kill(out):
    """What tells the folder of one killed run from that of another."""
    names = [path.name for path in out.iterdir()] if out.exists() else ["no folder"]
    log, checkpoint = out / "log.jsonl", out / "checkpoint.pt"
    return (frozenset(re.sub(r"\d+(?=\.aside)", "", name) for name in names),
            log.exists() and log.read_text().count("\n"),
            checkpoint.exists() and torch.load(checkpoint, weights_only=True)[0]["step"])


def test_a_run_killed_again_and_again_while_it_resumes_still_ends_in_the_same_bytes(
        arguments, place, stubbed):
    assert train.main([*arguments, "--out", "whole"]) == 0
    out, number, code = place / "killed", 1, None
    while code != 0:  # each lives a little longer
        code, lines = in_child([*arguments, "--out", out, "--resume"], place.parent / "report",
                               ["blind"], ["kill_before", out, number])
        assert code in (0, -signal.SIGKILL), lines
        number += 4
    assert number > 20
    same_run(out, place / "whole")


# ---- two at once


def test_two_runs_started_together_never_share_a_folder(arguments, place):
    for explicit in (False, True):
        barrier = processes.Barrier(2)
        out = ["--out", "mine"] if explicit else []
        acts = ["blind"], ["meet", barrier]
        both = [Started([*arguments, *out], place.parent / name, *acts) for name in "ab"]
        ends = sorted((one.end() for one in both), key=lambda end: end[0])
        assert [code for code, _ in ends] == [0, 2 if explicit else 0], ends
        if explicit:
            assert "--out mine: " in said(ends[1][1])
    folders = [place / "mine", place / "runs/etw", place / "runs/etw-2"]
    assert all(len(log_of(folder)) == 4 for folder in folders)
    same_run(folders[1], folders[2])


@pytest.mark.parametrize("flag", ["--resume", "--overwrite", "--seed=3"])
def test_beside_a_running_run_another_is_told_in_one_line_and_changes_nothing(
        arguments, place, flag):
    reached, go = processes.Event(), processes.Event()
    first = Started([*arguments, "--out", "run"], place.parent / "a", ["blind"],
                    ["pause", reached, go])
    assert reached.wait(60)
    code, lines = in_child([*arguments, "--out", "run", flag], place.parent / "b")
    assert code == 2 and "another process is writing this run" in said(lines)
    go.set()
    assert first.end()[0] == 0 and len(log_of(place / "run")) == 4


# ---- signals


@pytest.mark.parametrize("number, where, attribute, kept", [
    (signal.SIGINT, "pretrained", "read_config", False),
    (signal.SIGTERM, "pretrained", "load", False), (signal.SIGINT, "Screen", "before", False),
    (signal.SIGTERM, "Screen", "glance", True), (signal.SIGINT, "train", "train_step", True),
    (signal.SIGTERM, "pretrained", "save", True), (signal.SIGTERM, "Screen", "after", True),
    (signal.SIGTERM, "train", "train_step", True), (signal.SIGINT, "Screen", "after", True)])
def test_a_signal_at_any_moment_is_one_line_that_says_whether_there_is_something_to_resume(
        arguments, place, number, where, attribute, kept):
    flags = [*arguments, "--out", "run"]
    code, lines = in_child(flags, place.parent / "report", ["signal_at", where, attribute, number])
    assert code == 130 and "interrupted" in said(lines) and "Traceback" not in str(lines)
    assert kept == ("--resume --out run" in said(lines))
    assert kept == (place / "run" / "checkpoint.pt").exists()


# ---- faults while writing


@pytest.mark.parametrize("target, attribute, error", [
    (torch, "save", OSError(28, "No space left on device")),
    (torch, "save", RuntimeError("PytorchStreamWriter failed writing file")),
    (pretrained, "save_file", OSError(28, "No space left on device")),
    (pretrained, "save_file", pretrained.SafetensorError("No space left on device"))])
def test_a_disk_full_while_writing_is_one_line_and_the_run_goes_on_once_there_is_room(
        arguments, place, stubbed, capsys, monkeypatch, target, attribute, error):
    assert train.main([*arguments, "--out", "whole"]) == 0
    capsys.readouterr()

    def fail(what, path, **_):
        Path(path).write_bytes(b"half")
        raise error

    with monkeypatch.context() as full:
        full.setattr(target, attribute, fail)
        assert train.main([*arguments, "--out", "run"]) == 1
    assert ("--resume --out run" in told(capsys)) == (target is pretrained)
    assert not list((place / "run").glob(".*"))
    assert train.main([*arguments, "--out", "run", "--resume"]) == 0
    same_run(place / "run", place / "whole")


@pytest.mark.parametrize("size", [0, 500, 2000, 30_000, 90_000, 120_000, 290_000, 330_000])
def test_wherever_a_file_grows_too_large_it_is_one_line_and_the_run_goes_on_later(
        arguments, place, size):
    flags = [*arguments, "--out", place / "run"]
    code, lines = in_child(flags, place.parent / "pipe", ["blind"], ["limit_files", size])
    if code:
        assert code == 1 and "Traceback" not in str(lines), lines
    assert in_child([*flags, "--resume"], place.parent / "report", ["blind"])[0] == 0


@pytest.mark.parametrize("spoil", [shutil.rmtree, lambda out: out.rename("elsewhere")])
def test_an_out_that_vanishes_during_the_run_is_one_line(
        arguments, place, stubbed, capsys, monkeypatch, spoil):
    at_step(monkeypatch, 2, lambda *_: spoil(place / "run"))
    assert train.main([*arguments, "--out", "run"]) == 1
    assert "nothing to resume" in told(capsys)


def test_out_moved_and_its_name_given_to_another_run_is_left_to_that_one(
        arguments, place, stubbed, capsys, monkeypatch):
    def move(*_):
        (place / "run").rename("moved")
        (place / "run").mkdir()
        for name in run.FILES:
            (place / "run" / name).write_text("dear")

    with monkeypatch.context() as once:
        at_step(once, 2, move)
        assert train.main([*arguments, "--out", "run"]) == 1
    assert "was moved" in told(capsys)
    assert {p.name: p.read_text() for p in (place / "run").iterdir()} == dict.fromkeys(
        run.FILES, "dear")
    assert train.main([*arguments, "--out", "moved", "--resume"]) == 0


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory")])
def test_no_memory_left_is_one_line_that_says_what_to_lower(
        arguments, place, stubbed, capsys, monkeypatch, error):
    def fail(*_):
        raise error

    at_step(monkeypatch, 2, fail)
    assert train.main([*arguments, "--out", "run"]) == 1
    line = told(capsys)
    assert "--micro-batch-size" in line and "--resume --out run" in line


def at_step(monkeypatch, number, act):
    """Call act before step `number`."""
    step, calls = train.train_step, []

    def acting(*args):
        calls.append(1)
        if len(calls) == number:
            act(*args)
        return step(*args)

    monkeypatch.setattr(train, "train_step", acting)


@pytest.mark.parametrize("how", ["closed", "broken", "full"])
def test_no_stream_that_is_closed_or_broken_ends_a_run(arguments, place, how):
    code, _ = in_child([*arguments, "--out", "run"], place.parent / "report", ["blind"],
                       ["break_streams", how])
    assert code == 0 and (place / "run" / "result.json").exists()


@pytest.mark.parametrize("to", ["| true", ">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full"])
def test_at_the_end_of_the_program_a_closed_or_broken_stream_is_no_error_either(place, to):
    (place / "short.py").write_text("import sys, cli\n"
                                    "def say(_): print('x' * 10**6); print('y', file=sys.stderr)\n"
                                    "sys.exit(cli.guarded('short.py', say, []))")
    line = f"({sys.executable} short.py; echo $? >code) {to}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(cli.ROOT)})
    assert (place / "code").read_text() == "0\n" and done.stderr in ("", "y\n")


# ---- checkpoints


@pytest.fixture
def interrupted(arguments, place, stubbed, monkeypatch, capsys):
    """The flags of a run that was interrupted after its first epoch."""
    with monkeypatch.context() as once:
        at_step(once, 2, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert train.main([*arguments, "--out", "run"]) == 130
    capsys.readouterr()
    return [*arguments, "--out", "run"]


def test_a_checkpoint_flipped_in_any_bit_cut_or_grown_is_refused_and_nothing_else_is_touched(
        interrupted, place, capsys):
    checkpoint = place / "run" / "checkpoint.pt"
    good = checkpoint.read_bytes()
    others = {p: p.read_bytes() for p in (place / "run").iterdir() if p != checkpoint}

    def refused(content):
        checkpoint.write_bytes(content)
        assert train.main([*interrupted, "--resume"]) == 2
        assert "checkpoint.pt: not a whole checkpoint" in told(capsys)
        assert {p: p.read_bytes() for p in others} == others and checkpoint.read_bytes() == content

    @given(st.integers(0, len(good) - 1), st.integers(0, 7),
           st.sampled_from(["flip", "cut", "grow"]))
    def spoil(at, bit, how):
        flipped = good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1:]
        refused({"flip": flipped, "cut": good[:at], "grow": good + good[at:]}[how])

    spoil()
    checkpoint.write_bytes(good)
    assert train.main([*interrupted, "--resume"]) == 0


def test_a_flipped_bit_of_the_digest_itself_is_refused(interrupted, place, capsys):
    checkpoint = place / "run" / "checkpoint.pt"
    good = checkpoint.read_bytes()
    for at in range(len(good) - 64, len(good)):
        checkpoint.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
        with pytest.raises(cli.InputError):
            run.verify(checkpoint)


# ---- resume and overwrite


@pytest.mark.parametrize("name", run.DESCRIBED)
def test_resume_refuses_a_model_whose_description_has_changed(
        arguments, place, tiny, stubbed, monkeypatch, capsys, name):
    shutil.copytree(tiny, "model")
    flags = [*arguments, "--model", "model", "--out", "run"]
    with monkeypatch.context() as once:
        at_step(once, 2, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert train.main(flags) == 130
    capsys.readouterr()
    whole = (place / "model" / name).read_text()
    (place / "model" / name).write_text(whole + "\n")  # still what it was to any reader
    assert train.main([*flags, "--resume"]) == 2
    assert f"model/{name}" in told(capsys)
    (place / "model" / name).write_text(whole)
    assert train.main([*flags, "--resume"]) == 0


def test_a_finished_run_whose_weights_are_gone_is_not_finished(arguments, place, stubbed):
    flags, weights = [*arguments, "--out", "run"], place / "run/model.safetensors"
    assert train.main(flags) == 0
    before = weights.read_bytes()
    weights.unlink()
    assert train.main([*flags, "--resume"]) == 0
    assert weights.read_bytes() == before


def test_overwriting_leaves_no_tokenizer_file_that_the_new_model_lacks(
        arguments, place, tiny, stubbed):
    shutil.copytree(tiny, "model")
    (place / "model/chat_template.jinja").write_text("{{ x }}")
    assert train.main([*arguments, "--model", "model", "--out", "run"]) == 0
    assert (place / "run/chat_template.jinja").exists()
    assert train.main([*arguments, "--out", "run", "--overwrite"]) == 0
    assert not (place / "run/chat_template.jinja").exists()
    assert (place / "run/tokenizer_config.json").exists()


def test_a_model_with_a_broken_weight_is_one_line_that_names_it_and_no_run(
        tiny, arguments, place, tmp_path, capsys):
    broken = shutil.copytree(tiny, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, broken / "model.safetensors")
    assert train.main([*arguments, "--model", str(broken)]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert "model.norm.weight" in line and not any(place.iterdir())


def test_an_out_that_leads_back_here_is_refused_and_leaves_no_folder(arguments, place, capsys):
    (place / "mine.txt").write_text("dear")
    assert train.main([*arguments, "--out", "new/.."]) == 2
    assert "holds files that are not a run's" in told(capsys)
    assert [p.name for p in place.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", ["log.jsonl", "result.json"])
def test_what_a_run_would_replace_is_not_read_as_its_data(
        arguments, place, stubbed, capsys, name):
    assert train.main([*arguments, "--out", "run"]) == 0
    rows = (place.parent / "retain.jsonl").read_text()
    (place / "run" / name).write_text(rows)
    flags = [*arguments, "--retain", f"run/../run/{name}", "--out", "run", "--overwrite"]
    assert train.main(flags) == 2
    assert name in told(capsys) and (place / "run" / name).read_text() == rows


def test_overwriting_keeps_the_old_weights_until_the_first_checkpoint_of_the_new_run(
        arguments, place, stubbed, monkeypatch):
    weights, result = place / "run/model.safetensors", place / "run/result.json"
    assert train.main([*arguments, "--out", "run"]) == 0
    old, stood = weights.read_bytes(), []
    begin, checkpoint = run.Run.begin, run.Run.checkpoint

    def watch(step):
        def call(self, *args):
            step(self, *args)
            stood.append(weights.exists() and weights.read_bytes() == old)
        return call

    monkeypatch.setattr(run.Run, "begin", watch(begin))
    monkeypatch.setattr(run.Run, "checkpoint", watch(checkpoint))
    assert train.main([*arguments, "--out", "run", "--overwrite", "--seed", "1"]) == 0
    assert stood == [True, False, False] and weights.read_bytes() != old and result.exists()


def test_an_overwriting_run_killed_before_its_first_checkpoint_resumes_as_the_new_run(
        arguments, place, stubbed):
    assert train.main([*arguments, "--out", "whole"]) == 0
    for seed in ("0", "1"):
        shutil.copytree("whole", f"run{seed}")
        flags = [*arguments, "--seed", seed, "--out", f"run{seed}"]
        log = place / f"run{seed}" / "log.jsonl"
        code, _ = in_child([*flags, "--overwrite"], place.parent / "report", ["blind"],
                           ["kill_before", log, 2])  # at its fsync, before a checkpoint
        assert code == -signal.SIGKILL
        assert train.main([*flags, "--resume"]) == 0
        assert len(log_of(place / f"run{seed}")) == 4
    same_run(place / "run0", place / "whole")


@pytest.mark.parametrize("content", [
    "{}", '{"method": "etw"}', "[1]", "{", '{"model": "m", "seed": 1}', None])
@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_a_folder_of_another_program_is_refused_whatever_its_args_json_holds(
        arguments, place, stubbed, capsys, content, flag):
    theirs = place / "theirs"
    theirs.mkdir()
    (theirs / "model.safetensors").write_text("dear")
    if content is not None:
        (theirs / "args.json").write_text(content)
    before = {p.name: p.read_text() for p in theirs.iterdir()}
    assert train.main([*arguments, "--out", "theirs", flag]) == 2
    assert "theirs" in told(capsys)
    assert {p.name: p.read_text() for p in theirs.iterdir()} == before


def test_resume_with_the_default_out_finds_the_run_that_was_told_the_same(
        arguments, place, stubbed, monkeypatch, capsys):
    assert train.main(arguments) == 0
    finished = {p.name: p.read_bytes() for p in (place / "runs/etw").iterdir()}
    killed = [*arguments, "--seed", "7"]
    with monkeypatch.context() as once:
        at_step(once, 2, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert train.main(killed) == 130
    assert train.main([*arguments, "--seed", "8"]) == 0
    assert not (place / "runs/etw-2/result.json").exists()
    assert train.main([*killed, "--resume"]) == 0
    assert (place / "runs/etw-2/result.json").exists() and not (place / "runs/etw-4").exists()
    assert {p.name: p.read_bytes() for p in (place / "runs/etw").iterdir()} == finished
    capsys.readouterr()
    assert train.main([*arguments, "--seed", "9", "--resume"]) == 2
    line = told(capsys)
    assert "runs/etw-2" in line and "--out" in line and "--overwrite" not in line


def test_a_run_with_the_default_out_killed_before_it_wrote_anything_is_resumed_too(
        arguments, place, stubbed):
    (place / "runs/etw").mkdir(parents=True)
    (place / "runs/etw/.args.json.12.aside").write_text("{")
    assert train.main([*arguments, "--resume"]) == 0
    assert (place / "runs/etw/result.json").exists() and not list((place / "runs/etw").glob(".*"))


def test_out_that_is_the_models_own_folder_by_another_path_is_refused(
        arguments, place, tiny, capsys):
    (place / "link").symlink_to(tiny)
    before = {p.name: p.read_bytes() for p in tiny.iterdir()}
    for out in ("link", f"{tiny}/.", f"{tiny}/../{tiny.name}"):
        for flag in ("--overwrite", "--resume", "--seed=1"):
            assert train.main([*arguments, "--out", out, flag]) == 2
            assert "--out" in told(capsys)
    assert {p.name: p.read_bytes() for p in tiny.iterdir()} == before


# ---- divergence


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_divergence_says_the_truth_about_what_is_kept(
        arguments, place, stubbed, tiny, capsys, dtype):
    half = shutil.copytree(tiny, place / "half")
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    pretrained.save(pretrained.fresh(half, seed=0), half)
    codes = []
    for flags in ("--warmup-epochs 0 --save-every 1 --epochs 30 --batch-size 2 --weight-decay 100",
                  "--warmup-epochs 0 --epochs 30 --weight-decay 1000"):
        out = place / str(len(flags))
        code = train.main([*arguments, "--batch-size", "1", "--model", str(half), "--lr", "10",
                           *flags.split(), "--out", str(out)])
        error = capsys.readouterr().err
        assert code in (0, 1) and "Traceback" not in error
        codes.append(code)
        if code:
            line = said(error.splitlines())
            assert "--lr" in line and ("checkpoint" in line or "last good state" in line)
            if "is there." in line:
                tensors = load_file(out / "model.safetensors").values()
                assert all(tensor.isfinite().all() for tensor in tensors)
            if "no checkpoint" in line:
                assert sorted(p.name for p in out.iterdir()) == ["args.json", "log.jsonl"]
    assert 1 in codes


def test_divergence_before_the_first_checkpoint_claims_nothing_that_is_not_there(
        arguments, place, stubbed, capsys, monkeypatch):
    def spoil(decoder, *_):
        next(decoder.parameters()).data.fill_(float("nan"))

    at_step(monkeypatch, 1, spoil)
    assert train.main([*arguments, "--out", "run"]) == 1
    assert "no checkpoint had been reached" in told(capsys)
    assert sorted(p.name for p in (place / "run").iterdir()) == ["args.json", "log.jsonl"]


# ---- what the user names


def make(kind, folder):
    """The name of something that is no file to read or folder to write in."""
    path = folder / "thing"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("thing")
    elif kind == "folder":
        path.mkdir()
        (path / "thesis.txt").write_text("dear")
    elif kind in ("dangling link", "loop"):
        path.symlink_to("thing" if kind == "loop" else "nowhere")
    elif kind == "trailing slash":
        path.write_text("dear")
        return "thing/"
    else:
        return {"device": "/dev/zero", "unreadable": "/proc/self/mem",
                "below a file": "/dev/null/x",
                "empty": "", "blank": " ", "nul": "a\0b", "half a pair": "\ud800",
                "long": "x" * 5000, "long path": "x/" * 5000}[kind]
    return "thing"


FLAGS = {
    "train": "--forget --retain --facts --holdout --model --out --reference",
    "evaluate": "MODEL --forget --retain --holdout --reference --json"}


@pytest.mark.parametrize("program, flag", [
    (program, flag) for program, flags in FLAGS.items() for flag in flags.split()])
@pytest.mark.parametrize("kind", [
    "pipe", "socket", "folder", "dangling link", "loop", "trailing slash", "device", "unreadable",
    "below a file", "empty", "blank", "nul", "half a pair", "long", "long path"])
def test_what_is_no_file_or_folder_to_use_is_refused_in_one_line_with_nothing_written(
        arguments, place, tiny, capsys, kind, program, flag):
    name = make(kind, place)
    if program == "train":
        code = train.main([*arguments, flag, name])
    else:
        known = [*arguments[2:8], "--device", "cpu", "--target", str(tiny)]
        code = evaluate.main([name, *known] if flag == "MODEL" else [str(tiny), *known, flag, name])
    out, error = capsys.readouterr()
    assert code == 2 and error.startswith(f"{program}.py: ") and out == "", error
    assert error.count("\n") == 1 and len(error) < 1000
    assert [p.name for p in place.iterdir()] == (["thing"] if "thing" in name else [])


@pytest.mark.parametrize("flag", ["--forget", "--retain", "--facts", "--holdout"])
def test_no_permission_is_one_line(arguments, place, capsys, monkeypatch, flag):
    opened = os.open  # root may open anything: the kernel's answer is put in its mouth

    def deny(path, *args, **kwargs):
        if str(path).endswith("mine.jsonl"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    Path("mine.jsonl").write_text(Path(arguments[3]).read_text())
    monkeypatch.setattr(os, "open", deny)
    assert train.main([*arguments, flag, "mine.jsonl"]) == 2
    assert "mine.jsonl: cannot be read (Permission denied)" in told(capsys)


@pytest.mark.parametrize("file", [
    "tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors",
    "generation_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "loop", "folder"])
def test_a_file_of_a_model_folder_that_is_none_never_hangs(
        arguments, place, stubbed, tiny, capsys, file, kind):
    model = shutil.copytree(tiny, place / "model")
    (model / file).unlink(missing_ok=True)
    Path(make(kind, place)).rename(model / file)
    if kind == "loop":
        (model / file).unlink()
        (model / file).symlink_to(file)
    code = train.main([*arguments, "--model", str(model), "--out", "run", "--epochs", "1"])
    error = capsys.readouterr().err
    assert code == (0 if file == "generation_config.json" else 2) and "Traceback" not in error


def test_bundled_defaults_are_the_programs_and_out_is_the_users(arguments, place, monkeypatch):
    asked, mine = {}, Path("mine.jsonl")
    mine.write_text(Path(arguments[3]).read_text())
    monkeypatch.setattr(train, "execute", lambda run, args, *_: asked.update(
        vars(args) | {"folder": run.folder}))
    assert train.main(["--forget", "mine.jsonl", "--device", "cpu", "--method", "etw"]) == 0
    defaults = {"model": "weights/target", "facts": "data/facts.jsonl",
                "reference": "weights/retain"}
    for flag, file in defaults.items():
        assert cli.same(asked[flag], cli.ROOT / file), flag
    assert cli.same(asked["retain"][0], cli.ROOT / "data/retain.jsonl")
    assert asked["folder"] == Path("runs/etw")


def test_layers_that_are_not_trained_need_no_memory_for_gradients_and_moments(
        arguments, place, monkeypatch, capsys):
    count = sum(p.numel() for p in pretrained.load(arguments[1]).parameters())
    monkeypatch.setattr(pretrained, "_free_memory", lambda device: 10 * count)
    monkeypatch.setattr(train, "execute", lambda *_: None)
    assert train.main([*arguments, "--layers", "0.5"]) == 0  # 4 + 12 / 2 bytes a parameter
    assert train.main([*arguments, "--layers", "1"]) == 2
    assert "GB are free" in told(capsys)


@pytest.mark.parametrize("program", [train, evaluate])
def test_help_tells_each_default_once(program, capsys):
    with pytest.raises(SystemExit):
        program.main(["-h"])
    out = " ".join(capsys.readouterr().out.split())
    assert "default: auto)" in out and "None)" not in out


# ---- what a foreign tokenizer can hold


def template(token, known):
    piece = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {"post_processor": {
        "type": "TemplateProcessing", "single": piece, "pair": piece, "special_tokens": known}}


def precompiled(charsmap):
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap}}


def special(name, ids):
    return {name: {"id": name, "ids": ids, "tokens": [name]}}


PAD = {"direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
       "pad_token": "x"}
CUT = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
ENDS = {"sep": ["</s>", 2], "cls": ["<s>", 1], "trim_offsets": True, "add_prefix_space": False}


@pytest.mark.parametrize("part", [
    precompiled("AAAA"), precompiled("BAAAAAAAAAA="), template("<nope>", {}),
    template("<big>", special("<big>", [4 * 10**9])), template("<big>", special("<big>", [300])),
    {"post_processor": {"type": "RobertaProcessing"} | ENDS | {"cls": ["<s>", 99999]}},
    {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "zz"}},
    {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}}, {"version": "9"},
    {"model": None}])
def test_a_tokenizer_that_panics_or_names_what_is_not_there_is_one_line(
        arguments, place, tiny, capfd, part):
    model = shutil.copytree(tiny, place / "model")
    library = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(library | part))
    assert train.main([*arguments, "--model", str(model), "--out", "run"]) == 2
    error = capfd.readouterr().err
    assert "tokenizer.json: " in error and len(error.splitlines()) == 1, error
    assert not (place / "run").exists()


@pytest.mark.parametrize("part, begin", [
    ({"padding": PAD | {"strategy": {"Fixed": 40}}}, []),
    ({"padding": PAD | {"strategy": {"Fixed": 10**15}}}, []),
    ({"truncation": CUT}, []), ({"truncation": CUT | {"max_length": 0}}, []),
    ({"truncation": CUT | {"stride": 5}}, []),
    ({"post_processor": {"type": "RobertaProcessing"} | ENDS}, [1]),
    (template("<s>", special("<s>", [3])) | {"padding": PAD | {"strategy": {"Fixed": 40}},
                                             "truncation": CUT}, [3])])
def test_a_tokenizers_own_padding_and_truncation_change_nothing(place, tiny, part, begin):
    model, question = shutil.copytree(tiny, place / "model"), data.Example("Who is it?", "It is I.")
    expected = data.encode([question], data.Tokenizer(model), 64)[0][0]
    library = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(library | part))
    found = data.encode([question], data.Tokenizer(model), 64)[0][0]
    assert found.tokens == begin + expected.tokens and found.start == len(begin) + expected.start


# ---- long lines


def test_what_cannot_fit_is_never_tokenised(letters, monkeypatch):
    seen, encode, long = [], letters.encode, "word " * 2_000_000
    monkeypatch.setattr(letters, "encode", lambda text,
                        **more: seen.append(len(text)) or encode(text, **more))
    rows = [data.Example("Who?", long, long, [long] * 5),
            data.Example("Who?", long, spans=[[0, len(long)]])]
    sequences, cut = data.encode(rows, letters, 64)
    assert cut == 2 and [len(s.tokens) for s in sequences] == [64,
                                                               64] and any(sequences[1].informative)
    assert data.encode(rows, letters, 64, [long, "short"])[1] == 1
    with pytest.raises(cli.InputError, match="leave no room"):
        data.encode([data.Example(long, "Yes.", where="f:1")], letters, 64)
    assert max(seen) < 64 * 100


def test_many_spans_are_looked_up_in_one_pass(letters):
    class Counted(list):
        passes = 0

        def __iter__(self):
            Counted.passes += 1
            return super().__iter__()

    spans = Counted([i, i + 1] for i in range(0, 200_000, 2))
    row = data.Example("Who?", "ab" * 100_000, spans=spans)
    sequence = data.encode([row], letters, 300_000)[0][0]
    assert sum(sequence.informative) == 100_000 and Counted.passes == 1
