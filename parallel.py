"""Several processes as one training, each with a GPU of its own: torchrun --nproc-per-node 8 train.py ...

Every process holds the whole policy and the same generator. So all draw the same prompts, the same noise and the same order, and
each does its share of the work (my_parts): it draws, judges and learns from its own rows. Then chains and gradients are added up
over the processes (add_up), and rewards are put in a row (gathered). All processes therefore compute the same statistics, advantages
and weights. Their number is a knob of speed: it cannot change the result but in rounding. (A reward that draws random numbers or
keeps a state is an exception: each process has one of its own.)

Without torchrun there is one process, which has all the work and exchanges nothing. Several machines are started by torchrun's own
flags; they must share the folder runs/.

A process that fails must not leave the others waiting. So every exchange begins with a word from each process on whether it is well.
"""
import contextlib
import functools
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

import process

LONGEST_WAIT = timedelta(hours=2)  # for the slowest process of an exchange: a reward may take long
BUCKET = 2**24  # numbers that are added up together, 64 MB
OF_TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
over = False  # whether a process has failed, and all know it


class OtherProcessFailed(Exception):
    """Another process failed; the message says which, and why."""


def start():
    """Join the processes that torchrun started beside this one. Only the first of them writes to the terminal. Raises ValueError."""
    count = os.environ.get("WORLD_SIZE", "1").strip()
    if count in ("", "0", "1") or dist.is_initialized():
        return
    missing = [name for name in OF_TORCHRUN if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is {count}, but {missing[0]} is not set: start several processes with torchrun "
                         "--nproc-per-node N train.py, or one with WORLD_SIZE=1")
    if torch.cuda.is_available() and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())  # what "cuda" means from now on
    handlers = [(one, signal.signal(one, signal.SIG_DFL)) for one in process.SIGNALS if signal.getsignal(one) != signal.SIG_IGN]
    try:  # it waits for the others, and no handler of Python would be called: a signal ends it
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=LONGEST_WAIT)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the {count} processes of torchrun do not find each other: {str(error).splitlines()[0]}") from error
    finally:
        for one, handler in handlers:
            signal.signal(one, handler)
    if not is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w")


def speak_of_a_bug():
    """Let this process write to the terminal, whichever it is: a traceback follows."""
    if not is_first():
        sys.stderr = sys.__stderr__


def size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first():
    """Whether this is the process that writes files and speaks to the user."""
    return not dist.is_initialized() or dist.get_rank() == 0


def local_rank():
    """This process's number on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


# ---- The work, shared out ----

def share(n):
    """The slice of n rows that are this process's."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return slice(n * rank // size(), n * (rank + 1) // size())


def my_parts(n, at_once):
    """This process's share of n rows, as slices of at most `at_once` rows."""
    mine = share(n)
    return [slice(start, min(start + at_once, mine.stop)) for start in range(mine.start, mine.stop, at_once)]


def add_up(tensors):
    """Add up each tensor over the processes, in place. A process's own rows are added to zeros of the others."""
    if size() > 1:
        with exchange():
            for bucket in buckets(tensors):
                joined = torch.cat([tensor.flatten() for tensor in bucket])
                dist.all_reduce(joined)
                for tensor, total in zip(bucket, joined.split([tensor.numel() for tensor in bucket])):
                    tensor.copy_(total.view_as(tensor))


def buckets(tensors):
    """The tensors in groups that travel together, since an exchange has a fixed cost, about that of a megabyte. A large one goes alone."""
    bucket, numbers = [], 0
    for tensor in tensors:
        if bucket and numbers + tensor.numel() > BUCKET:
            yield bucket
            bucket, numbers = [], 0
        bucket.append(tensor)
        numbers += tensor.numel()
    if bucket:
        yield bucket


def gathered(values):
    """The values of all processes in a row, in the order of their shares. values: a list, or a tensor (n, ...), of this process."""
    if size() == 1:
        return values
    is_tensor = isinstance(values, torch.Tensor)
    with exchange(values.cpu() if is_tensor else values) as parts:
        return torch.cat(parts) if is_tensor else sum(parts, [])


# ---- What the first process does for all ----

def by_first(work):
    """The function as it is in the first process; in the others it does nothing and returns None."""
    @functools.wraps(work)
    def perhaps(*args, **options):
        return work(*args, **options) if is_first() else None

    return perhaps


def from_first(work):
    """The result of work(), which the first process does for all. Raises the ValueError or OSError that it raised there."""
    result = error = None
    if is_first():
        try:
            result = work()
        except (ValueError, OSError) as raised:
            error = raised
    with exchange((result, error)) as answers:
        result, error = answers[0]
    if error:
        raise error
    return result


# ---- Exchanges that no failure leaves waiting ----

@contextlib.contextmanager
def exchange(values=None, problem=None):
    """The context of an exchange between the processes. It yields a list of what each has brought: `values`.

    problem: why this process will not go on. Raises OtherProcessFailed if any process has a problem, or is gone. Signals wait until
    the exchange is over.
    """
    global over
    if size() == 1:
        yield [values]
        return
    with process.signals_held():
        brought = [None] * size()
        try:
            dist.all_gather_object(brought, (problem, values))
            failed = [(rank, told) for rank, (told, _) in enumerate(brought) if told]
            if failed:
                raise OtherProcessFailed("process {}: {}".format(*failed[0]))
            yield [value for _, value in brought]
        except BaseException as error:
            over = True  # this process leaves in the middle: the others find it gone
            if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
                raise
            raise OtherProcessFailed(f"another process is gone: {str(error).splitlines()[0][:200]}") from error


def leave(problem):
    """Tell the other processes why this one stops, unless they stop, too. From now on signals change nothing: torchrun sends them."""
    process.stopping = True
    if size() > 1 and not over:
        with contextlib.suppress(OtherProcessFailed), exchange(problem=str(problem)):
            pass


def meet():
    """Wait until every process is here, and well."""
    with exchange():
        pass


def finish():
    """Wait until every process has done its work, then leave the group."""
    meet()
    if size() > 1:
        dist.destroy_process_group()
