"""The process that the training runs in, and shares with a user's reward: signals, the terminal, random states, folders."""
import contextlib
import functools
import os
import random
import signal
import sys
import threading
import time

import numpy as np
import torch

# What stops the training: Ctrl-C, a kill, a closed terminal, a batch queue's warning.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
stopping = False  # whether it stops already: then a further signal changes nothing


def stop_on_signals():
    """Let all of SIGNALS interrupt the training as Ctrl-C does, except those that are ignored, as by nohup.

    A second one within a second counts as the same: it would cut short the way out of the first.
    """
    global stopping
    trainer, stopping, last = os.getpid(), False, float("-inf")

    def interrupt(number, frame):
        nonlocal last
        if os.getpid() != trainer:  # a process that a reward started ends as it would elsewhere
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if stopping or time.monotonic() - last < 1:
            return
        last = time.monotonic()
        signal.default_int_handler(number, frame)

    for one in SIGNALS:
        if signal.getsignal(one) != signal.SIG_IGN:
            signal.signal(one, interrupt)


@contextlib.contextmanager
def signals_held():
    """The context in which SIGNALS wait. The first of those that came is sent again at its end."""
    came = []
    before = [(one, signal.signal(one, lambda number, frame: came.append(number)))
              for one in SIGNALS if signal.getsignal(one) != signal.SIG_IGN]
    try:
        yield
    finally:
        for one, handler in before:
            signal.signal(one, handler)
        for number in came[:1]:
            signal.raise_signal(number)


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

MODULES = {}  # folder -> its modules that were imported, by name


@contextlib.contextmanager
def importable(folder):
    """The context in which a folder's modules and packages can be imported by name, as by a script in that folder.

    Outside, such a name is free for another folder's module, or for one of this project. So two folders may each have a helper.py.
    Modules of the folder that were imported before stay.
    """
    def is_here(module):
        return str(getattr(module, "__file__", None) or "").startswith(f"{folder}{os.sep}")

    names = {path.stem for path in folder.iterdir() if path.suffix == ".py" or os.path.isfile(path / "__init__.py")}  # of a folder that we may not read, False
    known = [name for name in sys.modules if name.split(".")[0] in names]
    stay = [name for name in known if is_here(sys.modules[name])]
    others = {name: sys.modules.pop(name) for name in known if not is_here(sys.modules.get(name.split(".")[0]))}
    sys.modules.update(MODULES.setdefault(folder, {}))
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        names |= {path.name for path in folder.iterdir()  # folders without __init__.py, too, if they were imported
                  if list(getattr(sys.modules.get(path.name), "__path__", ())) == [str(path)]}
        MODULES[folder] = {name: sys.modules.pop(name) for name in list(sys.modules)
                           if name.split(".")[0] in names and name not in stay}
        sys.modules.update(others)
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _global_states():
    """Pairs of a state of the process, and the function that sets it."""
    cudnn = torch.backends.cudnn
    yield torch.is_grad_enabled(), torch.set_grad_enabled
    yield torch.get_default_dtype(), torch.set_default_dtype
    yield torch.get_default_device(), torch.set_default_device
    yield torch.get_float32_matmul_precision(), torch.set_float32_matmul_precision
    yield torch.get_num_threads(), torch.set_num_threads
    yield torch.are_deterministic_algorithms_enabled(), torch.use_deterministic_algorithms
    yield torch.is_anomaly_enabled(), torch.set_anomaly_enabled
    for device in ("cpu", "cuda"):
        yield torch.is_autocast_enabled(device), functools.partial(torch.set_autocast_enabled, device)
        yield torch.get_autocast_dtype(device), functools.partial(torch.set_autocast_dtype, device)
    for name in ("enabled", "benchmark", "deterministic", "allow_tf32"):
        yield getattr(cudnn, name), functools.partial(setattr, cudnn, name)
    if threading.current_thread() is threading.main_thread():
        for one in SIGNALS:
            yield signal.getsignal(one), functools.partial(signal.signal, one)
    yield os.getcwd(), os.chdir


@contextlib.contextmanager
def process_unchanged():
    """The context of a user's code: what it changes of `_global_states` and of the random states is put back."""
    before, rngs = list(_global_states()), global_rng_states()
    try:
        yield
    finally:
        os.chdir(before[-1][0])  # first, since a working folder that was deleted has no name
        for (value, put_back), (now, _) in zip(before, _global_states()):
            if now != value:
                put_back(value)
        set_global_rng_states(rngs)


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
