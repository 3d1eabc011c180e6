"""Starts a scheduler and both sides on this host, without mpirun: `python launch.py [ATTENTION] [FFN] [--rust]`.

With `--rust` the FFN side is the example in Rust: `cargo run -p stepmesh-embed --example ffn`. On several hosts, start each
side there with the scheduler's address; anything that starts processes does.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import stepmesh

HERE = Path(__file__).parent
RUST = ["cargo", "run", "--quiet", "--release", "-p", "stepmesh-embed", "--example", "ffn", "--"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("attention", type=int, nargs="?", default=1)
    parser.add_argument("ffn", type=int, nargs="?", default=1)
    parser.add_argument("--rust", action="store_true")
    parser.add_argument("--steps", default="10")
    given = parser.parse_args()
    with stepmesh.Scheduler(given.attention, given.ffn) as scheduler:
        ffn = RUST if given.rust else [sys.executable, str(HERE / "ffn.py")]
        attention = [sys.executable, str(HERE / ("attention_plain.py" if given.rust else "attention.py"))]
        processes = [subprocess.Popen([*ffn, scheduler.url], cwd=HERE) for _ in range(given.ffn)]
        processes += [
            subprocess.Popen([*attention, scheduler.url, given.steps], cwd=HERE) for _ in range(given.attention)
        ]
        return max(process.wait() for process in processes)


if __name__ == "__main__":
    sys.exit(main())
