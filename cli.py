"""What both command lines share: one-line refusals, typed flags, careful files, signals, device.

Imports nothing of ours, and torch only where it is used: an interrupt while it loads is one line.
"""
import argparse
import contextlib
import ctypes
import json
import math
import os
import re
import resource
import signal
import stat
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


class InputError(ValueError):
    """The user's input is wrong. One line: which file or flag, what is wrong, what to do."""


class Stopped(Exception):
    """The run ended before its time: (message, exit code)."""


# ---- Flags


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the defaults, but for those that it tells in words."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose refusals are one line like all others, and whose help shows the defaults."""

    def __init__(self, formatter_class=Help, **kwargs):
        super().__init__(formatter_class=formatter_class, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise InputError(" ".join(message.split()))


def number(kind=float, least=-math.inf, most=math.inf, above=-math.inf):
    """An argparse type: a finite number of `kind` within bounds, else a refusal that says them."""
    bounds = {"above": above, "at least": least, "at most": most}
    known = [f"{words} {bound}" for words, bound in bounds.items() if math.isfinite(bound)]

    def parse(string):
        try:
            value = kind(string)
            fits = math.isfinite(value) and above < value and least <= value <= most
        except (ValueError, OverflowError):
            why = f"{string!r:.40} is not a number ({kind.__name__})"
            raise argparse.ArgumentTypeError(why) from None
        if not fits:
            wanted = " and ".join(known) or "that is finite"
            why = f"{string:.40} is out of range: give a number {wanted}"
            raise argparse.ArgumentTypeError(why)
        return value

    return parse


def text(string):
    """An argparse type: a name or a question, unless it is blank, has a NUL or is not Unicode."""
    if not string.strip() or "\0" in string or not encodable(string):
        why = "must be text: not blank, no NUL, in the terminal's encoding"
        raise argparse.ArgumentTypeError(why)
    return string


def encodable(string):
    """Whether a string is Unicode that can be written: no half of a surrogate pair."""
    return not any("\ud800" <= c <= "\udfff" for c in string)


def printable(string):
    """Nothing from a data file or a model steers the terminal or breaks XML: · instead."""
    return "".join(c if c.isprintable() else "·" for c in string)


def bundled(name):
    """A file or folder of the program's own, wherever it is called from."""
    return name if Path.cwd() == ROOT else str(ROOT / name)


# ---- Files


def same(path, other):
    """Whether two paths are one file or folder: by inode where both exist, whatever the links."""
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):
        return os.path.realpath(path) == os.path.realpath(other)


def read_bytes(path, advice):
    """The content of a file that the user named; InputError, with advice, if it is none."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would block
        with open(number, "rb") as file:
            regular = stat.S_ISREG(os.fstat(number).st_mode)
            content = file.read() if regular else b""
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or e
        raise InputError(f"{str(path):.300}: cannot be read ({why}): {advice}") from None
    if not regular:
        raise InputError(f"{path}: not a regular file: {advice}")
    return content


def read_json(path, advice="copy the model's own file again"):
    """The JSON object in a file, {} without the file; InputError, with advice, if it is none."""
    if not os.path.lexists(path):
        return {}
    content = read_bytes(path, advice)
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON: {advice}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object but a {type(value).__name__}: {advice}")
    return value


def check_output(flag, path, inputs, head):
    """Refuse a file that a flag is to write, if it is the user's: nothing of theirs is overwritten.

    inputs: what this command reads; head: a pattern of how the files begin that this flag writes.
    """
    path, another = Path(path), "name another file"
    folder = path.absolute().parent
    if len(os.fsencode(path.name)) > 255:
        raise InputError(f"{flag} {path.name:.40}…: the name is too long: {another}")
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{flag} {path}: cannot be written there: {another}")
    if any(same(path, other) for other in inputs if other):
        raise InputError(f"{flag} {path}: this command reads it: {another}")
    if any((folder / name).exists() for name in ("config.json", "args.json")):
        raise InputError(f"{flag} {path}: is in the folder of a model or run: name another place")
    if os.path.lexists(path) and not re.match(head.encode(), read_bytes(path, another)):
        raise InputError(f"{flag} {path}: exists and is not what {flag} writes: {another}")


def write_aside(path, write):
    """Let write(aside) make a file, flush and rename it: path is the old file or the new one."""
    path = Path(path)
    aside = path.with_name(f".{path.name[:50]}.{os.getpid()}.aside")
    try:
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        aside.chmod(0o644)
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone
            aside.unlink(missing_ok=True)


def write_text(path, string):
    """A text file, whole or not at all."""
    write_aside(path, lambda aside: aside.write_text(string, "utf-8"))


def write_json(path, value):
    """JSON, whole or not at all; numbers that are not finite become null."""
    write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n")


def plain(value):
    """JSON-ready: numpy numbers to Python's, what is not finite to null."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- The program from its first moment to its last


resumable = None  # the run folder that --resume can go on from, once there is one


def how_to_go_on():
    """What a user whose run ends early can do."""
    if resumable and (resumable / "checkpoint.pt").exists():
        return f"run it again with --resume --out {resumable}"
    return "nothing to resume"


def on_interrupt(program):
    """From now on SIGINT and SIGTERM end the program at once, in one line; no file is torn."""

    def stop(*_):
        line = f"\n{program}: interrupted; {how_to_go_on()}\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode(errors="replace"))
        os._exit(130)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


class Stream:
    """stdout or stderr: where it is closed or broken, the run matters more than its report.

    A character that the terminal lacks becomes a question mark.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115  None: closed by the caller
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="replace")

    def write(self, string):
        try:
            self.stream.write(string)
            self.stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):  # what Python holds back goes there, too
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def flush(self):
        pass  # done

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def muted():
    """What a library's own code says on stderr meanwhile is not heard."""
    with open(os.devnull, "w") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def guarded(program, run, argv):
    """Run a command line; returns its exit code: 0, 1 stopped, 2 wrong input, 130 interrupted.

    What is not a bug is one line on stderr.
    """
    out, err = Stream(sys.stdout), Stream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code, line = ending(run, argv)
        if line:
            print(f"{program}: {printable(line)}", file=sys.stderr)
    return code


def ending(run, argv):
    """(exit code, line to say) of a command line."""
    try:
        run(argv)
        return 0, None
    except InputError as e:
        return 2, str(e)
    except Stopped as e:
        return e.args[::-1]
    except KeyboardInterrupt:
        return 130, f"interrupted; {how_to_go_on()}"
    except OSError as e:
        return 1, f"{e}; {how_to_go_on()}"
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not re.search("out of memory|t allocate memory", str(e)):
            raise
        return 1, f"out of memory: lower --micro-batch-size or --batch-size; {how_to_go_on()}"


# ---- Device and precision


def pick_device(name, dtype):
    """(device, autocast dtype): `auto` takes a GPU, and bfloat16 if it has that."""
    import torch

    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name):
        raise InputError(f"--device {name}: unknown; use auto, cpu, cuda, cuda:1 or mps")
    if name == "auto":
        found = torch.cuda.is_available(), torch.backends.mps.is_available()
        name = "cuda" if found[0] else "mps" if found[1] else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"--device {name}: not available here; use cpu or auto") from None
    if name == "cpu":
        keep_freed_memory()
    native = name.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    half = dtype == "bfloat16" or (dtype == "auto" and native)
    return name, torch.bfloat16 if half else torch.float32


def precision(device, dtype):
    """Autocast to bfloat16, or nothing: the context of every forward pass."""
    import torch

    if dtype != torch.bfloat16:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype)


def peak_memory(device):
    """Most memory held so far, in MB: of the GPU if that is the device, else of this process."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def keep_freed_memory():
    """glibc gives large blocks back and pays page faults to have them again: a tenth of a step."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: of which up to 2 GB stay
