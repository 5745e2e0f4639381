"""A short training killed again and again at random times: `python -m tests.soak --kills 200` (make soak).

Each trial trains into a new folder and is killed, at a random moment of its life, one to four times: all ranks at once,
or one of them, whose loss the others must notice.  Each time the same command goes on; at the end the weights,
moments, averages and statistics must be those of a run that nobody touched, to the bit.

The ranks are real processes that run the real command and die of SIGKILL.  They are forked from a server that has
imported the trainer already, which saves the seconds that torchrun and the imports take.  As torchrun would, it sends
the survivors of a killed rank SIGTERM and, where they do not end, SIGKILL.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.commands import assert_bit_equal, free_port, make_workspace, state_of, trainer_words

RANKS = 2
MAX_IMAGES = 800
GRACE_S = 30
"""What torchrun grants the survivors of a dead rank between SIGTERM and SIGKILL."""


def rank_body(rank: int, port: int, words: list[str], log: Path) -> None:
    """One rank, as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from pipeline.cli.train import main

    sys.exit(main(words))


class Soak:
    """Trials one after another, all from one seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.workspace = make_workspace(folder)
        self.random = random.Random(seed)
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["pipeline.cli.train", "pipeline.trainer", "pipeline.decode.pillow"])

    def start(self, run: str) -> list[Any]:
        words = trainer_words(self.workspace, run, "--train.max_images", str(MAX_IMAGES), "--log.report", "false")
        port, log = free_port(), self.workspace / f"{run}.log"
        ranks = [self.context.Process(target=rank_body, args=(r, port, words[1:], log)) for r in range(RANKS)]
        for rank in ranks:
            rank.start()
        return ranks

    def finish(self, run: str, ranks: list[Any]) -> float:
        """Seconds until all ranks have ended; they must end well."""
        start = time.monotonic()
        for rank in ranks:
            rank.join(200)
        codes = [rank.exitcode for rank in ranks]
        assert codes == [0] * RANKS, f"{run} ended with {codes}:\n{(self.workspace / f'{run}.log').read_text()[-3000:]}"
        return time.monotonic() - start

    def kill(self, run: str, ranks: list[Any], after_s: float) -> bool:
        """SIGKILL all ranks, or one; False: they had finished before."""
        deadline = time.monotonic() + after_s
        while time.monotonic() < deadline and all(rank.is_alive() for rank in ranks):
            ranks[0].join(min(0.01, max(0.0, deadline - time.monotonic())))
        victims = ranks if self.random.random() < 0.5 else [self.random.choice(ranks)]
        if not all(rank.is_alive() for rank in ranks):
            self.finish(run, ranks)
            return False
        for victim in victims:
            os.kill(victim.pid, signal.SIGKILL)
        for sent in (signal.SIGTERM, signal.SIGKILL):  # what torchrun does with the others
            for rank in ranks:
                if rank.is_alive():
                    os.kill(rank.pid, sent)
            deadline = time.monotonic() + GRACE_S
            for rank in ranks:
                rank.join(max(0.0, deadline - time.monotonic()))
        return True

    def run(self, kills: int) -> None:
        """Trials until so many kills are done."""
        usual_s = self.finish("clean", self.start("clean"))
        expected = state_of(self.workspace / "clean", MAX_IMAGES)
        done = trial = 0
        while done < kills:
            trial += 1
            run, wanted, struck = f"trial-{trial:03d}", self.random.randint(1, 4), 0
            for _ in range(wanted):
                struck += self.kill(run, ranks := self.start(run), self.random.uniform(0.0, 1.1 * usual_s))
                assert all(rank.exitcode is not None for rank in ranks)
                if done + struck == kills:
                    break
            self.finish(run, self.start(run))
            assert_bit_equal(state_of(self.workspace / run, MAX_IMAGES), expected)
            done += struck
            print(f"{run}: {struck} kill(s), weights equal to the untouched run's; {done} of {kills}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        start = time.monotonic()
        Soak(Path(folder), options.seed).run(options.kills)
        print(f"{options.kills} kills, seed {options.seed}, {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
