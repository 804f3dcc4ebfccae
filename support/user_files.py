"""A user's reward file: its function, and the hash by which a resumed run sees that it has changed."""
import functools
import hashlib
import importlib.util
import sys
from pathlib import Path

from support.networks import one_line_errors


def user_function(name, known):
    """The function of 'path/to/file.py:function'. known: the built-in rewards' names."""
    path, _, function_name = name.rpartition(":")
    if not path:
        raise ValueError(f"no reward {name!r}: choose {', '.join(known)} or path/to/file.py:function")
    if not Path(path).is_file():
        raise ValueError(f"no reward file {path!r}")
    function = getattr(module_of(Path(path).resolve()), function_name, None)
    if not callable(function):
        raise ValueError(f"the reward file {path!r} has no function {function_name!r}")
    return function


@functools.cache
def module_of(path):
    """The module of a Python file, run once for all its functions. It may import what lies beside it."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"{path.stem}_of_user", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    with one_line_errors("the reward file", path):
        spec.loader.exec_module(module)
    return module


def hashes_of(names):
    """file name -> sha256, of those of the names of rewards and prompts that are files."""
    paths = [Path(name.rpartition(":")[0] or name) for name in names]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}
