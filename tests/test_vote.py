import pytest
import torch
import torch.distributed as dist

from pipeline import distributed
from pipeline.distributed import Ranks
from pipeline.vote import REASONS, Tally, Vote, reason_of
from tests.ranks import run_ranks

CPU = torch.device("cpu")
FINE, HOPELESS = torch.zeros(()), torch.ones(())


def test_a_vote_is_read_one_step_later_and_once():
    vote = Vote(CPU, 1)
    assert vote.tally() is None, "none is under way"
    vote.cast(8, "", FINE, 0)
    assert vote.tally() == Tally(8, "", 0, False, 0)
    assert vote.tally() is None
    vote.cast(16, "SIGTERM", HOPELESS, 3)
    assert vote.tally() == Tally(16, "SIGTERM", 1, True, 3)
    vote.cast(24, "", FINE, 3)
    assert vote.tally() == Tally(24, "", 0, False, 3), "nothing is left of the vote before"


def test_a_vote_that_was_not_read_is_not_lost_in_silence():
    vote = Vote(CPU, 1)
    vote.cast(8, "", FINE, 0)
    with pytest.raises(AssertionError):
        vote.cast(16, "", FINE, 0)


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_comes_back_under_its_name(reason):
    vote = Vote(CPU, 1)
    vote.cast(8, reason, FINE, 0)
    assert vote.tally().stop == reason


def test_signals_are_reasons():
    assert [reason_of(number) for number in (15, 2, 10, 1)] == list(REASONS[:4])


def test_many_bad_files_are_counted_exactly():
    vote = Vote(CPU, 1)
    vote.cast(8, "", FINE, (1 << 24) + 1)  # which float32 has not
    assert vote.tally().bad_samples == (1 << 24) + 1


def everyone_reads_the_same(ranks: Ranks) -> None:
    vote = Vote(ranks.device, ranks.world_size)

    def step(seen: int, stop: str = "", hopeless: torch.Tensor = FINE, bad: int = 0) -> Tally | None:
        """What a rank does between two steps."""
        before = vote.tally()
        vote.cast(seen, stop, hopeless, bad)
        return before

    second = ranks.rank == 1
    assert step(8) is None
    assert step(16, stop="SIGTERM" if second else "") == Tally(8, "", 0, False, 0), "not before it is one step old"
    assert step(24, hopeless=HOPELESS if second else FINE) == Tally(16, "SIGTERM", 1, False, 0)
    assert step(32, bad=2 + ranks.rank) == Tally(24, "", 0, True, 0)
    assert step(40, stop=("SIGUSR1", "train.max_minutes")[ranks.rank]) == Tally(32, "", 0, False, 5)
    last = vote.tally()
    assert (last.stop, last.num_wanting) == ("SIGUSR1", 2)
    assert distributed.gather(last) == [last, last]

    # A step's own all-reduces may go on while a vote is under way.
    vote.cast(48, "", FINE, ranks.rank)
    gradients = torch.full((1000,), 1.0 + ranks.rank)
    dist.all_reduce(gradients)
    assert gradients[0] == 3
    assert vote.tally() == Tally(48, "", 0, False, 1)


def test_two_ranks_read_the_same_sum_of_stops_skips_and_bad_files():
    run_ranks(everyone_reads_the_same, 2)
