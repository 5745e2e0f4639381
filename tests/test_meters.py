import io
import json
import math
from typing import ClassVar

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from pipeline import meters as measuring
from pipeline.errors import StorageError
from pipeline.loop import Maintenance
from pipeline.meters import Log, Meters, Progress, Timing, keep_lines_up_to, rows_up_to
from pipeline.step import METERS

ROW = {
    "step": 1,
    "epoch": 0.5,
    "loss_d": 1.25,
    "loss_g": math.nan,
    "d_real": 0.75,
    "d_fake_before": 0.25,
    "d_fake_after": 0.125,
    "diversity": 0.5,
    "skipped_steps": 0,
    "images_per_s": 100.0,
    "images_per_s_rank": 100.0,
    "data_wait_percent": 1.0,
    "learning_rate": 2e-4,
    "memory_gib": 1.0,
    "tflop_per_s": 0.5,
    "peak_fraction": 0.3,
}


@pytest.fixture(autouse=True)
def _a_process_of_its_own(monkeypatch):
    """TensorBoard reads files by name, second and then number within the process: as text, a tenth before a ninth."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def log_some(run, seen, total=400, images_seen=0, stream=None, **changes):
    stream = stream or io.StringIO()
    log = Log(run, Progress(images_seen, total, 100), stream)
    for count in seen:
        log.advance(8)
        log.write(ROW | changes | {"images_seen": count}, Progress(count, total, 100))
    log.close()
    return stream.getvalue()


def points(run, tag):
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def test_plain_lines_hold_what_a_person_wants_to_know(tmp_path):
    text = log_some(tmp_path, [200])
    for part in ("200/400", "Loss_D 1.250", "D(x) 0.75", "D(G(z)) 0.25/0.12", "100 images/s", "ETA 0:02"):
        assert part in text, text


def test_a_terminal_gets_a_bar_with_rate_losses_and_remaining_time(tmp_path):
    text = log_some(tmp_path, [200, 208], stream=Terminal())
    for part in ("\r", "400", "Loss_D 1.250", "D(G(z)) 0.25/0.12", "images/s"):
        assert part in text, text


def test_numbers_that_json_has_not_become_null(tmp_path):
    log_some(tmp_path, [8])
    row = json.loads((tmp_path / "stats.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row["loss_g"] is None
    assert row["images_seen"] == 8


def test_tensorboard_gets_every_curve_by_its_name(tmp_path):
    log_some(tmp_path, [8, 16], loss_g=2.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"Loss/D", "Loss/G", "D(x)", "D(G(z))/before", "D(G(z))/after"} <= tags
    assert {"Timing/images_per_s", "Timing/images_per_s_rank", "Timing/data_wait_percent"} <= tags
    assert {"Resources/memory_gib", "Resources/tflop_per_s", "Resources/fraction_of_measured_peak"} <= tags
    assert {"Progress/epoch", "Progress/images", "Progress/learning_rate"} <= tags
    assert {"Progress/diversity", "Progress/skipped_steps"} <= tags
    assert points(tmp_path, "Loss/D") == [(8, 1.25), (16, 1.25)]


def test_a_number_that_is_none_leaves_a_gap_in_its_curve(tmp_path):
    log_some(tmp_path, [8], loss_g=2.0)
    log_some(tmp_path, [16], images_seen=8)
    assert points(tmp_path, "Loss/G") == [(8, 2.0)]


def test_an_event_is_a_line_and_a_text_in_tensorboard(tmp_path):
    stream = io.StringIO()
    log = Log(tmp_path, Progress(0, 8, 8), stream)
    log.event("collapse: D has won", 8)
    log.close()
    assert stream.getvalue() == "collapse: D has won\n"
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("Events/text_summary")
    assert (event.step, event.tensor_proto.string_val) == (8, [b"collapse: D has won"])


@pytest.mark.parametrize("resumed_at", [16, 0])
def test_a_resumed_run_stands_once_in_its_curves_and_lines(tmp_path, resumed_at):
    log_some(tmp_path, [8, 16, 24, 32])
    with (tmp_path / "stats.jsonl").open("a") as file:
        file.write('{"images_seen": 40, "los')  # killed while writing
    log_some(tmp_path, [resumed_at + 8, resumed_at + 16], images_seen=resumed_at)
    expected = [n for n in (8, 16, 24, 32) if n <= resumed_at + 16]
    assert [json.loads(line)["images_seen"] for line in (tmp_path / "stats.jsonl").open()] == expected
    assert [step for step, _ in points(tmp_path, "Loss/D")] == expected


def measure(run, seen, swd=12.5, images_seen=0, tracker=None):
    stream = io.StringIO()
    log = Log(run, Progress(images_seen, 400, 100), stream, tracker)
    for count in seen:
        row = {"images_seen": count, "num_images": 50, "seconds": 2.0, "swd": swd, "best": True}
        log.measured(row, {"Metrics/swd": swd, "Timing/evaluation_s": 2.0}, f"metrics: swd {swd}")
    log.close()
    return stream.getvalue()


def test_an_evaluation_is_a_line_of_its_own_file_a_point_of_its_curves_and_a_line_for_a_person(tmp_path):
    assert measure(tmp_path, [8]) == "metrics: swd 12.5\n"
    (row,) = rows_up_to(tmp_path / "metrics.jsonl")
    assert row == {"images_seen": 8, "num_images": 50, "seconds": 2.0, "swd": 12.5, "best": True}
    assert points(tmp_path, "Metrics/swd") == [(8, 12.5)]
    assert not (tmp_path / "stats.jsonl").exists()


def test_what_was_measured_after_a_checkpoint_is_taken_back_with_the_rest(tmp_path):
    measure(tmp_path, [8, 16, 24])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"images_seen": 32, "sw')  # killed while writing
    measure(tmp_path, [24], swd=7.0, images_seen=16)
    assert [(row["images_seen"], row["swd"]) for row in rows_up_to(tmp_path / "metrics.jsonl")] == [
        (8, 12.5), (16, 12.5), (24, 7.0),
    ]  # fmt: skip
    assert points(tmp_path, "Metrics/swd") == [(8, 12.5), (16, 12.5), (24, 7.0)]


def test_a_figure_that_is_no_number_is_null_in_the_file_and_a_gap_for_tensorboard_and_the_tracker(tmp_path):
    class Tracker:
        sent: ClassVar[list[tuple[dict[str, float], int]]] = []

        def log(self, values, images_seen):
            self.sent.append((values, images_seen))

        def news(self):
            return ["from afar"]

        def close(self):
            return []

    said = measure(tmp_path, [8], swd=math.nan, tracker=Tracker())
    assert rows_up_to(tmp_path / "metrics.jsonl")[0]["swd"] is None
    assert Tracker.sent == [({"Timing/evaluation_s": 2.0}, 8)]
    assert "from afar" in said
    measure(tmp_path, [16], images_seen=8)
    assert points(tmp_path, "Metrics/swd") == [(16, 12.5)]


@pytest.mark.parametrize("garbage", ["[1]", "null", '{"swd": 3}', '{"images_seen": "many"}', "{"])
def test_rows_end_where_a_line_is_none(tmp_path, garbage):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"images_seen": 8}\n' + garbage + '\n{"images_seen": 16}\n')
    assert rows_up_to(path) == [{"images_seen": 8}]
    assert rows_up_to(path, 7) == rows_up_to(tmp_path / "none.jsonl") == []


def test_what_is_no_training_lowers_no_rate_but_counts_as_time(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])

    class Feed:
        wait_s = 0.0

    timing = Timing(Feed(), elapsed_before=5.0)
    clock[0] += 3
    with timing.paused():
        clock[0] += 60
    clock[0] += 1
    Feed.wait_s = 2.0
    rates = timing.read(80, 2)
    assert (rates["images_per_s"], rates["images_per_s_rank"], rates["data_wait_percent"]) == (20, 10, 50)
    assert rates["elapsed_s"] == 69
    clock[0] += 2
    assert timing.read(80, 2)["images_per_s"] == 40, "the next row begins where this one ended"


def test_pictures_reach_tensorboard(tmp_path):
    log = Log(tmp_path, Progress(0, 8, 8), io.StringIO())
    log.picture("fakes", Image.new("RGB", (5, 4)), 8)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (image,) = events.Images("fakes")
    assert (image.step, image.width, image.height) == (8, 5, 4)


def test_a_disk_that_refuses_is_told_in_one_line(tmp_path):
    log = Log(tmp_path, Progress(0, 8, 8), io.StringIO())
    (tmp_path / "stats.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*stats\.jsonl"):
        log.write(ROW | {"images_seen": 8}, Progress(8, 8, 8))
    log.close()


def test_cutting_a_file_that_is_not_there_is_nothing(tmp_path):
    keep_lines_up_to(tmp_path / "stats.jsonl", 5)
    assert list(tmp_path.iterdir()) == []


def test_means_are_over_the_steps_since_the_last_read():
    meters = Meters(torch.device("cpu"), 1)
    for value in (1.0, 2.0):
        meters.add(torch.full((7,), value))
    means, own_ms = meters.read(own_ms=12.0)
    assert {means[name] for name in METERS} == {1.5}
    assert (means["diversity"], means["skipped_steps"], own_ms) == (1.0, 0, [12.0])
    meters.add(torch.full((7,), 7.0))
    means, _ = meters.read()
    assert {means[name] for name in METERS} == {7.0}


def test_diversity_is_the_fakes_spread_as_a_share_of_the_reals():
    meters = Meters(torch.device("cpu"), 1)
    for spread_fake in (0.1, 0.3):
        meters.add(torch.tensor([1, 1, 0.5, 0.5, 0.5, 0.8, spread_fake]))
    assert meters.read()[0]["diversity"] == pytest.approx(0.25)


def test_steps_that_are_not_finite_count_apart_and_spoil_no_mean():
    meters = Meters(torch.device("cpu"), 1)
    meters.add(torch.full((7,), 3.0), torch.tensor([0.0, 0.0]))
    meters.add(torch.tensor([math.nan, *[1.0] * 6]), torch.tensor([1.0, 1.0]))
    meters.add(torch.full((7,), 5.0), torch.tensor([0.0, 1.0]))
    means, _ = meters.read()
    assert {means[name] for name in METERS} == {4.0}
    assert means["skipped_steps"] == 2
    meters.add(torch.full((7,), math.inf), torch.ones(2))
    means, _ = meters.read()
    assert all(math.isnan(means[name]) for name in (*METERS, "diversity"))
    assert means["skipped_steps"] == 1


def test_a_saved_sum_is_not_touched_by_the_steps_that_follow():
    meters = Meters(torch.device("cpu"), 1)
    meters.add(torch.ones(7))
    state = meters.state()
    meters.add(torch.ones(7))
    other = Meters(torch.device("cpu"), 1)
    other.restore([state], 0)
    other.add(torch.full((7,), 3.0))
    assert other.read()[0]["loss_d"] == 2.0


def test_at_another_world_size_each_rank_goes_on_with_the_mean():
    saved = []
    for value in (1.0, 3.0):
        meters = Meters(torch.device("cpu"), 2)
        meters.add(torch.full((7,), value))
        saved.append(meters.state())
    alone = Meters(torch.device("cpu"), 1)
    alone.restore(saved, 0)
    assert alone.read()[0]["loss_d"] == 2.0


def test_sums_of_an_older_version_are_left_alone():
    meters = Meters(torch.device("cpu"), 1)
    meters.restore([{"sums": torch.ones(6), "steps": 3}], 0)
    assert (meters.steps, meters.sums.sum()) == (0, 0)


@pytest.mark.parametrize(
    ("every", "before", "now", "last", "due"),
    [
        (10, 8, 16, False, True),
        (10, 10, 18, False, False),
        (10, 0, 8, False, False),
        (0, 0, 8, False, False),
        (0, 0, 8, True, True),
        (10, 0, 8, True, True),
        (3, 8, 16, False, True),
    ],
)
def test_maintenance_is_due_when_a_multiple_is_passed_and_at_the_end(every, before, now, last, due):
    assert Maintenance(every, lambda _: None).due(before, now, last) is due


def test_what_d_pays_for_its_slope_is_the_mean_over_the_steps_in_which_it_pays():
    meters, paid = Meters(torch.device("cpu"), 1), torch.tensor([3.0, 1.0])
    for step, penalty in enumerate((paid, torch.zeros(2), 2 * paid - torch.tensor([0.0, 1.0]), paid)):
        losses = torch.full((7,), torch.nan if step == 3 else 1.0)
        meters.add(losses, torch.zeros(2), penalty)
        meters.restore([meters.state()], 0)  # as a resumed run does
    assert meters.read()[0]["penalty_d"] == pytest.approx(4.5)
    meters.add(torch.ones(7), torch.zeros(2), torch.zeros(2))
    assert "penalty_d" not in meters.read()[0]
