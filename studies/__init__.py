"""Questions asked of many runs, and costs. Results: results/README.md."""
import argparse
import signal
import sys
from pathlib import Path

from support.settings import parse, refuse


def command_line(description, work, argv, **options):
    """Call work(args) with the arguments of a script, and print its result. Returns the exit code.

    options: of argparse, by the name of a flag; "run" is a place. args.train: all other flags, which are
    train.py's: as words; args.flags: as a dict.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill interrupts as Ctrl-C does
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    for name, option in options.items():
        parser.add_argument(name if name == "run" else "--" + name.replace("_", "-"), **option)
    try:
        args, args.train = parser.parse_known_args(argv)
        args.flags = parse(args.train, "")
        if text := work(args):
            print(text)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
