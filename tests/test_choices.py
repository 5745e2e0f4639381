"""What decides between implementations: a measurement, once, and whoever may overrule it."""

import json
from collections.abc import Callable

import pytest
import torch

from pipeline.checkpoint import Checkpoint
from pipeline.choices import Choices, cache_file, fastest, machine_facts
from pipeline.config import ConfigError
from pipeline.resume import differences, layout
from tests.players import CFG, tiny_players, write
from tests.ranks import run_ranks

CPU = torch.device("cpu")
MACHINE = {"device": "cpu", "cpu": "abacus", "threads": 2, "torch": "2.15"}


class Watch:
    """A clock that the candidates themselves move."""

    def __init__(self, **seconds: float) -> None:
        self.now = 0.0
        self.calls = dict.fromkeys(seconds, 0)
        self.seconds = seconds

    def __call__(self) -> float:
        return self.now

    def candidates(self, *names: str) -> dict[str, Callable[[], None]]:
        def call(name: str) -> None:
            self.now += self.seconds[name]
            self.calls[name] += 1

        return {name: lambda name=name: call(name) for name in names or self.seconds}  # type: ignore[misc]

    @property
    def idle(self) -> bool:
        return not any(self.calls.values())


@pytest.fixture
def opened(tmp_path):
    """Opens the choices of a run with a clock; what it said is in `.said`."""

    def open_(watch: Watch, machine=MACHINE, **options) -> Choices:
        said: list[str] = []
        places = {"cache": tmp_path / "cache", "run": tmp_path / "run"} | options
        made = Choices(CPU, clock=watch, machine=machine, say=said.append, **places)
        made.said = said  # type: ignore[attr-defined]
        return made

    return open_


def test_the_faster_candidate_is_chosen_and_its_figures_are_told(opened):
    watch = Watch(torch=0.003, triton=0.002)
    made = opened(watch)
    assert made.pick("batchnorm", "8x8", watch.candidates()) == "triton"
    (line,) = made.said
    assert line.startswith("batchnorm 8x8: triton (torch 3 ms, triton 2 ms; measured 20")
    assert made.lines() == [line]


def test_the_plain_one_stays_where_another_is_hardly_faster():
    assert fastest({"torch": 1.0, "triton": 0.99}) == "torch"
    assert fastest({"torch": 1.0, "triton": 0.97}) == "triton"
    assert fastest({"torch": 1.0}) == "torch"


def test_a_disturbance_of_one_block_decides_nothing(opened):
    watch = Watch(torch=0.03, triton=0.02)
    candidates = watch.candidates()
    calm = candidates["triton"]

    def disturbed() -> None:
        calm()
        watch.now += 5.0 if watch.calls["triton"] == 4 else 0.0

    assert opened(watch).pick("batchnorm", "8x8", candidates | {"triton": disturbed}) == "triton"


@pytest.mark.parametrize(
    ("seconds", "calls"),
    [
        ({"torch": 1.25, "native": 1.0}, 2),
        ({"torch": 1.15, "native": 1.0}, 5),
        ({"torch": 0.75, "native": 0.25}, 2),
        ({"torch": 0.3125, "native": 0.25}, 8),
    ],
)
def test_what_takes_long_is_timed_once_where_that_is_clear(opened, seconds, calls):
    watch = Watch(**seconds)
    made = opened(watch)
    assert made.pick("networks", "8x8", watch.candidates()) == "native"
    assert watch.calls == dict.fromkeys(seconds, calls)
    told = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in seconds.items())
    assert made.said[0].startswith(f"networks 8x8: native ({told}; measured ")


def test_a_candidate_for_which_the_memory_does_not_suffice_beside_the_plain_one_is_left_out(opened):
    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    watch = Watch(eager=0.03, compile=0.02)
    candidates = {"eager": watch.candidates()["eager"], "graph": too_large, "compile": watch.candidates()["compile"]}
    made = opened(watch)
    assert made.pick("mode", "8x8", candidates) == "compile"
    assert made.said[0].startswith("mode 8x8: compile (eager 30 ms, compile 20 ms; measured ")
    assert made.said[0].endswith("; no memory for graph beside the others)")
    assert made.pick("mode", "16x16", {"eager": too_large, "graph": too_large}) == "eager"
    assert made.said[1].startswith("mode 16x16: eager (measured ")


def test_a_candidate_that_runs_out_of_memory_while_it_is_timed_is_left_out_as_well(opened):
    watch = Watch(eager=0.03, graph=0.01)
    candidates = watch.candidates()
    fits = candidates["graph"]

    def later() -> None:
        fits()
        if watch.calls["graph"] == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")

    made = opened(watch)
    assert made.pick("mode", "8x8", candidates | {"graph": later}) == "eager"
    assert "no memory for graph" in made.said[0]


def test_a_resumed_run_times_nothing_even_where_the_cache_is_gone(opened, tmp_path):
    first = Watch(torch=0.003, triton=0.002)
    opened(first).pick("batchnorm", "8x8", first.candidates())
    for other in (tmp_path / "cache", tmp_path / "elsewhere"):
        again = Watch(torch=0.001, triton=0.002)
        made = opened(again, cache=other)
        written = (tmp_path / "run/choices.json").stat()
        assert made.pick("batchnorm", "8x8", again.candidates()) == "triton"
        assert (tmp_path / "run/choices.json").stat() == written
        assert again.idle
        assert made.said == []
        assert made.layout() == {"kernels.batchnorm 8x8": "triton"}


def test_another_run_on_the_same_machine_times_nothing_and_another_size_is_timed(opened, tmp_path):
    first = Watch(torch=0.003, triton=0.002)
    opened(first).pick("batchnorm", "8x8", first.candidates())
    again = Watch(torch=0.001, triton=0.002)
    made = opened(again, run=tmp_path / "run2")
    assert made.pick("batchnorm", "8x8", again.candidates()) == "triton"
    assert again.idle
    assert made.pick("batchnorm", "16x16", again.candidates()) == "torch"
    written = json.loads((tmp_path / "run2/choices.json").read_text())["choices"]
    assert {name: entry["choice"] for name, entry in written.items()} == {
        "batchnorm 16x16": "torch",
        "batchnorm 8x8": "triton",
    }


@pytest.mark.parametrize("changed", [{"cpu": "slide rule"}, {"threads": 4}, {"torch": "2.16"}, {"device": "H200"}])
def test_another_machine_measures_anew_and_a_run_that_moved_there_says_so(opened, changed):
    first = Watch(torch=0.003, triton=0.002)
    opened(first).pick("batchnorm", "8x8", first.candidates())
    again = Watch(torch=0.001, triton=0.002)
    made = opened(again, machine=MACHINE | changed)
    assert made.pick("batchnorm", "8x8", again.candidates()) == "torch"
    assert not again.idle
    ((key, value),) = changed.items()
    assert f"was made elsewhere ({key} {MACHINE[key]} -> {value}): what it chose is not used" in made.said[0]


def test_a_candidate_that_was_not_there_before_is_measured_and_one_that_is_gone_is_not_chosen(opened, tmp_path):
    first = Watch(torch=0.003, triton=0.002)
    opened(first).pick("batchnorm", "8x8", first.candidates())
    more = Watch(torch=0.003, triton=0.002, native=0.001)
    assert opened(more, run=tmp_path / "run2").pick("batchnorm", "8x8", more.candidates()) == "native"
    fewer = Watch(torch=0.003, triton=0.002)
    assert opened(fewer, run=tmp_path / "run2").pick("batchnorm", "8x8", fewer.candidates()) == "triton"
    assert not fewer.idle


@pytest.mark.parametrize(
    "garbage", ["", "no JSON", "[]", '{"format": 2, "choices": {}}', '{"format": 1, "choices": {"batchnorm 8x8": 3}}',
                '{"format": 1, "choices": {"batchnorm 8x8": {"choice": 3}}}']
)  # fmt: skip
def test_a_garbled_file_is_measured_anew_with_a_line_and_mended(opened, tmp_path, garbage):
    path = cache_file(tmp_path / "cache", MACHINE)
    for broken in (path, tmp_path / "run/choices.json"):
        broken.parent.mkdir(parents=True)
        broken.write_text(garbage)
    watch = Watch(torch=0.003, triton=0.002)
    made = opened(watch)
    assert made.pick("batchnorm", "8x8", watch.candidates()) == "triton"
    assert [line.endswith(": measured anew") for line in made.said].count(True) >= 2
    assert {str(path), str(tmp_path / "run/choices.json")} == {line.split()[0] for line in made.said if "anew" in line}
    calm = Watch(torch=0.003, triton=0.002)
    assert opened(calm).pick("batchnorm", "8x8", calm.candidates()) == "triton"
    assert calm.idle


def test_a_setting_stands_above_measurements_and_a_file_above_settings(opened, tmp_path):
    watch = Watch(torch=0.003, triton=0.002)
    made = opened(watch)
    assert made.pick("batchnorm", "8x8", watch.candidates(), "torch") == "torch"
    assert watch.idle
    assert made.lines() == ["batchnorm 8x8: torch (by kernels.batchnorm)"]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"format": 1, "choices": {"batchnorm 8x8": {"choice": "triton"}}}))
    made = opened(watch, overrides=str(file))
    assert made.pick("batchnorm", "8x8", watch.candidates(), "torch") == "triton"
    assert watch.idle
    assert made.lines() == ["batchnorm 8x8: triton (by kernels.choices)"]


def test_what_there_is_not_is_a_mistake_in_one_line(opened, tmp_path):
    watch = Watch(torch=0.003, triton=0.002)
    with pytest.raises(
        ConfigError, match=r"kernels.batchnorm must be of torch, triton for batchnorm 8x8 here, got 'x'"
    ):
        opened(watch).pick("batchnorm", "8x8", watch.candidates(), "x")
    with pytest.raises(ConfigError, match=r"kernels.choices must be a file, got .*absent.json, which is not there"):
        opened(watch, overrides=str(tmp_path / "absent.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match=r"kernels.choices: .*bad.json is no JSON"):
        opened(watch, overrides=str(tmp_path / "bad.json"))


def test_what_is_remembered_can_be_asked_for_without_measuring(opened, tmp_path):
    watch = Watch(torch=0.003, triton=0.002)
    question = "batchnorm", "8x8", ["torch", "triton"], "nobody knows"
    first = opened(watch)
    assert first.recall(*question) == "torch"
    assert first.lines() == ["batchnorm 8x8: torch (nobody knows)"]
    assert watch.idle
    opened(watch, run=tmp_path / "run2").pick("batchnorm", "8x8", watch.candidates())
    made = opened(watch, run=tmp_path / "run3")
    assert made.recall(*question) == "triton"
    assert made.layout() == {"kernels.batchnorm 8x8": "triton"}
    assert opened(watch).recall(*question) == "torch", "a run stays with what its first start used"


def test_a_cache_that_cannot_be_written_is_told_and_no_obstacle(opened, tmp_path):
    (tmp_path / "file").write_text("")
    watch = Watch(torch=0.003, triton=0.002)
    made = opened(watch, cache=tmp_path / "file")
    assert made.pick("batchnorm", "8x8", watch.candidates()) == "triton"
    assert any(line.startswith("what was measured is kept for this run only") for line in made.said)


def test_the_machine_is_named_by_all_that_moves_a_measurement(tmp_path):
    facts = machine_facts(CPU, threads=3)
    assert facts["threads"] == 3
    assert facts.keys() == {
        "device", "cpu", "cpu_capability", "onednn_max_cpu_isa", "threads", "torch", "kernels"
    }  # fmt: skip
    assert cache_file(tmp_path, facts) != cache_file(tmp_path, facts | {"kernels": "changed"})


def test_choices_that_differ_from_the_checkpoints_are_said_in_the_layout_line(tmp_path):
    facts = {"world_size": 1, "threads": 1, "precision": "fp32", "mode": "eager", "decoder": "pillow", "cache": "none"}
    facts |= {"device": "cpu"}
    folder = write(tmp_path, tiny_players(), 4)
    then = layout(CFG, **facts, choices={"kernels.gather 8": "triton"})
    now = layout(CFG, **facts, choices={"kernels.gather 8": "torch", "kernels.batchnorm 8": "torch"})
    found = Checkpoint(folder, {"layout": then})
    (line,) = list(differences(CFG, now, found))
    assert line.startswith("the layout differs (kernels.gather 8 triton -> torch):")


def ranks_choose_together(ranks):
    watch = Watch(torch=0.003, triton=0.002, native=0.001)
    mine = ("torch", "triton", "native") if ranks.leads else ("torch", "triton")
    made = Choices(CPU, clock=watch, machine=MACHINE, leads=ranks.leads)
    assert made.pick("batchnorm", "8x8", watch.candidates(*mine)) == "triton"
    assert watch.idle is not ranks.leads
    assert made.layout() == {"kernels.batchnorm 8x8": "triton"}
    with pytest.raises(ConfigError) as caught:
        made.pick("batchnorm", "8x8", watch.candidates(*mine), "native")
    assert caught.value.shared


def test_rank_0_measures_for_all_among_what_every_rank_has():
    run_ranks(ranks_choose_together, 2)
