"""A run folder: who may write it, what it remembers, how a killed run goes on.

A model directory (config.json, weights, tokenizer) with, beside it,
    args.json       what makes it this run: what it was told, SHA-256 of data and weights, versions
    log.jsonl       one object a step and one an epoch
    checkpoint.pt   weights, AdamW moments and step, a digest at its end; gone once all is done
    result.json     the measurements, with a digest of what args.json tells that a run hangs on
The log grows in place; every other file is written aside and renamed: a kill at any moment leaves
the old one or the new one.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import torch

import cli
import pretrained
from cli import InputError, Stopped

FILES = "log.jsonl", "checkpoint.pt", "result.json", "model.safetensors"
DESCRIBED = "config.json", "tokenizer.json", "tokenizer_config.json"  # a model, beside its weights
MARKS = {"method", "data_sha256", "versions", "git_commit"}  # an args.json with these keys is ours
MAY_CHANGE = {"command", "versions", "git_commit", "save_every", "measure_rows"}  # at --resume
ASIDE = re.compile(r"\..+\.\d+\.aside")  # what a killed writer leaves


class Run:
    """The folder of one run. InputError, with nothing written, if it is not this run's to write."""

    def __init__(self, args, files, models):
        """args: the parsed flags; files: data and weights, whose content makes the run what it is;
        models: the folders that are read, the one to start from first."""
        self.source = models[0]
        described = (path for name in DESCRIBED if (path := self.source / name).is_file())
        self.identity, self.lock = identity(args, [*files, *described]), None
        self.base = None if args.out else Path("runs") / (args.method if args.forget else "teach")
        self.folder = Path(args.out) if args.out else self._default(args.resume)
        if ".." in self.folder.parts:  # new/.. would leave `new` behind
            self.folder = self.folder.resolve()
        self.replaces = False  # an older run, whose weights stay until our first checkpoint
        self.state = {"step": 0, "log": 0, "damage": 0.0}
        if args.overwrite and not args.out:
            raise InputError("--overwrite: name the run to replace with --out")
        if any(cli.same(self.folder, model) for model in models):
            raise InputError(f"--out {self.folder}: is the folder of --model or --reference: "
                             "choose another")
        for file in files:
            if any(cli.same(file, self.folder / name) for name in FILES):
                raise InputError(f"--out {self.folder}: this command reads {file}, which a run "
                                 "would replace: choose another")
        self._check_place()
        cli.resumable = None
        if (args.out or args.resume) and self.folder.exists():
            self._lock()
            try:
                self._check(args)
            except BaseException:
                self.close()
                raise

    def _default(self, resume):
        """The next free of runs/METHOD, runs/METHOD-2, ...; to resume, the one told the same."""
        paths = [self.base]
        while os.path.lexists(paths[-1]):
            paths.append(self.base.with_name(f"{self.base.name}-{len(paths) + 1}"))
        *taken, free = paths
        if not resume or not taken:
            return free
        alike = ([path for path in taken if not self._difference(path)]
                 or [path for path in taken if _is_blank(path)])
        if not alike:
            raise InputError(f"--resume: none of {', '.join(map(str, taken[:5]))} was begun with "
                             "these arguments: name its folder with --out")
        return min(alike, key=self._is_finished)

    def _check_place(self):
        try:
            places = self.folder, *self.folder.absolute().parents
            parent = next(p for p in places if p.exists() or p.is_symlink())
            writable = parent.is_dir() and os.access(parent, os.R_OK | os.W_OK | os.X_OK)
        except OSError:  # its name is too long
            parent, writable = "it", False
        if not writable:
            raise InputError(f"--out {str(self.folder):.200}: {str(parent):.200} is not a folder "
                             "one can write to: choose another")

    def _lock(self):
        """Until close or the end of this process, however it ends. InputError if another has it."""
        self.lock = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)  # leaves no file
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise InputError(f"--out {self.folder}: another process is writing this run: "
                             "wait for it, or choose another") from None

    def close(self):
        """Let others write the folder."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def _check(self, args):
        """What may be done to a folder that exists."""
        if _is_blank(self.folder):
            return
        old = cli.read_json(self.folder / "args.json", "choose another --out")
        ours = [self.folder / name for name in FILES if os.path.lexists(self.folder / name)]
        if not MARKS <= old.keys() or not all(path.is_file() for path in ours):
            raise InputError(f"--out {self.folder}: holds files that are not a run's: "
                             "choose another")
        difference = self._difference(self.folder)
        if args.resume and difference:
            raise InputError(f"--resume: {difference}: give the same, or another --out")
        if not args.resume and not args.overwrite:
            raise InputError(f"--out {self.folder}: already holds a run: go on with --resume, "
                             "replace it with --overwrite, or choose another")
        self.replaces = args.overwrite
        if args.resume and (self.folder / "checkpoint.pt").exists():
            verify(self.folder / "checkpoint.pt")
            cli.resumable = self.folder

    def _difference(self, folder):
        """What the run in a folder was told otherwise than this one, in words; None if nothing."""
        old = cli.read_json(folder / "args.json", "choose another --out")
        for key, value in json.loads(json.dumps(self.identity)).items():
            if key in MAY_CHANGE or value == old.get(key):
                continue
            if key == "data_sha256" and isinstance(old.get(key), dict):
                changed = [path for path in value if old[key].get(path) != value[path]]
                changed = ", ".join(changed or ["fewer files"])
                return f"the data changed since {folder} began ({changed})"
            return f"{key} was {old.get(key)!r:.80} in {folder}, now {value!r:.80}"
        return None

    def _is_finished(self, folder):
        result = cli.read_json(folder / "result.json")
        return (result.get("args_sha256") == self.digest and not (folder / "checkpoint.pt").exists()
                and (folder / "model.safetensors").exists())

    @property
    def finished(self):
        """Whether there is nothing left to do."""
        return not self.replaces and self._is_finished(self.folder)

    @property
    def digest(self):
        told = {key: value for key, value in self.identity.items() if key not in MAY_CHANGE}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    # ---- Writing

    def begin(self):
        """Claim the folder, clear what killed writers left, write args.json unless resuming."""
        while self.lock is None:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.folder.mkdir()  # atomic: of two runs that start together one gets the name
                self._lock()
            except FileExistsError:
                if self.base is None:
                    raise InputError(f"--out {self.folder}: was taken meanwhile: "
                                     "choose another") from None
                self.folder = self._default(resume=False)
        for path in self.folder.iterdir():
            if ASIDE.fullmatch(path.name):
                path.unlink()
        if self.replaces:
            others = [c for c in pretrained.COMPANIONS if not (self.source / c).exists()]
            for name in ("checkpoint.pt", "result.json", *others):
                (self.folder / name).unlink(missing_ok=True)
        if self.replaces or not (self.folder / "args.json").exists():
            cli.write_json(self.folder / "args.json", self.identity)

    def _still_here(self):
        """Stopped if the name of the folder no longer leads to the one that is locked."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self.lock), os.stat(self.folder)):
                return
        raise Stopped(f"{self.folder}: was moved or removed while this run was writing it; nothing "
                      "to resume there, go on with --resume --out where it is now", 1)

    @contextlib.contextmanager
    def log(self):
        """A function that appends to log.jsonl, which forgets what the checkpoint does not know."""
        with open(self.folder / "log.jsonl", "ab") as file:
            file.truncate(min(self.state["log"], os.path.getsize(file.name)))
            file.seek(0, os.SEEK_END)
            self.file = file

            def note(record):
                file.write((json.dumps(cli.plain(record)) + "\n").encode())
                file.flush()

            yield note

    def restore(self, decoder, optimizer):
        """Put the checkpoint's weights, moments and state in place, if there is one.

        It holds no generator: the row order is a function of seed and step, and nothing else is
        random.
        """
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        try:
            self.state, weights, moments = torch.load(path, map_location="cpu", weights_only=True)
            decoder.load_state_dict(weights)
            optimizer.load_state_dict(moments)
        except Exception as e:  # the unpickler, which runs no code, raises anything
            raise _no_checkpoint(path, type(e).__name__) from None

    def checkpoint(self, decoder, optimizer):
        """Write weights, moments and state. FloatingPointError if a weight is not finite."""
        if not all(p.isfinite().all() for p in decoder.parameters()):
            raise FloatingPointError(f"the weights after step {self.state['step']}")
        self._still_here()
        os.fsync(self.file.fileno())
        self.state["log"] = self.file.tell()

        def write(aside):
            try:
                torch.save((self.state, decoder.state_dict(), optimizer.state_dict()), aside)
            except (OSError, RuntimeError) as e:  # its words for a full disk
                why = f"{self.folder}: no checkpoint can be written ({str(e):.80})"
                raise OSError(why) from None
            digest = sha256(aside)
            with open(aside, "a") as file:
                file.write(digest)

        cli.write_aside(self.folder / "checkpoint.pt", write)
        cli.resumable = self.folder
        (self.folder / "model.safetensors").unlink(missing_ok=True)  # an older run's

    def diverged(self, decoder, optimizer, step, error):
        """What to raise at a number that is not finite; the last good state becomes the model."""
        kept = "nothing but the log was written there: no checkpoint had been reached"
        self._still_here()
        if cli.resumable:
            self.restore(decoder, optimizer)
            kept = f"the last good state, of step {self.state['step']}, is there"
            try:
                pretrained.save(decoder, self.folder)
            except FloatingPointError:  # finite in float32 only
                kept += " in checkpoint.pt"
        return Stopped(f"{self.folder}: not finite at step {step}: {error}; {kept}. "
                       "Start again with a lower --lr or --lambda", 1)

    def save(self, decoder):
        """Write the model; Stopped if a weight is not finite in the precision of its file."""
        self._still_here()
        try:
            pretrained.save(decoder, self.folder)
        except FloatingPointError as e:
            raise Stopped(f"{self.folder}: {e}; checkpoint.pt has the last state. "
                          "Start again with a lower --lr or --lambda", 1) from None

    def finish(self, result):
        """Write result.json; weights with it and no checkpoint: the run is finished."""
        self._still_here()
        cli.write_json(self.folder / "result.json", result | {"args_sha256": self.digest})
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        cli.resumable = None


def _is_blank(folder):
    """Whether a folder holds nothing but what a killed writer leaves."""
    return folder.is_dir() and all(ASIDE.fullmatch(path.name) for path in folder.iterdir())


def verify(path):
    """InputError unless the digest at the end of a checkpoint is that of the rest."""
    size = os.path.getsize(path) - 64
    with open(path, "rb") as file:
        file.seek(max(0, size))
        digest = file.read().decode("latin-1")
    if size < 0 or digest != sha256(path, size):
        raise _no_checkpoint(path, "its digest does not fit")


def _no_checkpoint(path, why):
    return InputError(f"{path}: not a whole checkpoint of this run ({why}): "
                      "begin anew in another --out")


def identity(args, files):
    """What args.json holds: flags, command, the data's SHA-256, versions, the code's git commit."""
    how = "resume", "overwrite", "out"
    flags = {key: value for key, value in vars(args).items() if key not in how}
    flags["lambda"] = flags.pop("lam")
    git = ["git", "-C", str(cli.ROOT), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        commit = None
    return flags | {
        "command": cli.printable(shlex.join(sys.argv)),
        "data_sha256": {str(path): sha256(path) for path in files},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "git_commit": commit}


def sha256(path, size=sys.maxsize):
    """Hex digest of a file's first `size` bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(min(size, 2**24)):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


@contextlib.contextmanager
def catch_signals():
    """SIGINT and SIGTERM within the block are noted, in the list that it yields, not obeyed."""
    caught, old = [], {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, lambda n, _: caught.append(n))
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
