"""The process that the training runs in, and shares with a user's reward: signals, the terminal, random states, folders."""
import contextlib
import os
import random
import signal
import sys

import numpy as np
import torch

# What saves the state and stops: Ctrl-C, a kill, a closed terminal, a batch queue's warning.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


def save_on_signals():
    """Let all of SIGNALS interrupt the training as Ctrl-C does, except those that are ignored, as by nohup."""
    trainer = os.getpid()

    def interrupt(number, frame):
        if os.getpid() != trainer:  # a process that a reward started ends as it would elsewhere
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        signal.default_int_handler(number, frame)

    for one in SIGNALS:
        if signal.getsignal(one) != signal.SIG_IGN:
            signal.signal(one, interrupt)


def refuse_several_processes():
    """Raise ValueError under torchrun and the like, which would start the same training several times."""
    if os.environ.get("WORLD_SIZE", "1").strip() not in ("", "0", "1"):
        raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: training on several GPUs is not supported yet; start one "
                         "process, with python train.py")


def say(text):
    """Print results. A reader that is gone (as head is) must not end a run."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # tqdm would try to flush the old one again


def notify(line):
    """Print a line for the user beside the results. A terminal that is gone must not end a run."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


# ---- What a user's code may change ----

@contextlib.contextmanager
def importable(folder):
    """The context in which the modules of a folder can be imported, as they can for a script in it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


@contextlib.contextmanager
def process_unchanged(folder=None):
    """The context of a user's code: what it changes of the process is put back. With a folder, its modules can be imported."""
    grad, dtype, device = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    states, here = global_rng_states(), os.getcwd()
    try:
        with importable(folder) if folder else contextlib.nullcontext():
            yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        os.chdir(here)
        set_global_rng_states(states)


def global_rng_states():
    """The states of the libraries' own generators. We do not draw from them, but a user's reward may."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state(), "cuda": cuda}


def set_global_rng_states(states):
    """Restore the states that global_rng_states returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():  # a run may go on where there are other GPUs
        torch.cuda.set_rng_state_all(states["cuda"])
