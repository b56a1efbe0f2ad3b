"""Times of functions. Here the GPU is simulated, because the CPU has no CUDA events."""

from __future__ import annotations

import json
import logging
import types
import weakref

import pytest
import torch

from sdar_lm_eval.engines.native.forward import timings as timings_module
from sdar_lm_eval.engines.native.forward.timings import Timings

NUMBERS = (4, 8, 16)


class Device:
    """A GPU that has memory for graphs of up to so many rows. A replay of n rows takes n seconds."""

    def __init__(self, monkeypatch, memory):
        self.memory, self.now, self.captured, self.ran = memory, 0.0, [], []
        monkeypatch.setattr(timings_module, "_event", self.event)
        monkeypatch.setattr(timings_module.Graphs, "capture", self.capture)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def event(self):
        event = types.SimpleNamespace(elapsed_time=lambda end: 1000 * (end.at - event.at))
        event.record = lambda: setattr(event, "at", self.now)
        return event

    def capture(self, key):
        _, rows = key
        if rows > self.memory:
            raise torch.OutOfMemoryError
        self.captured.append(key)
        return types.SimpleNamespace(replay=lambda: setattr(self, "now", self.now + rows))

    def run(self, *key):
        self.ran.append(key)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU's name; the folder of its files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return tmp_path / "cache" / "sdar_lm_eval" / "times"


@pytest.fixture
def machine(gpu, monkeypatch):
    """A GPU on which each function takes n seconds for n rows; `asked` has the rows of each measurement."""
    asked = []

    def measure(self, run, rows):
        asked.append(rows)
        return {name: {number: float(run(name, number)) for number in numbers} for name, numbers in rows.items()}

    monkeypatch.setattr(Timings, "_measured", measure)
    return types.SimpleNamespace(asked=asked, folder=gpu)


def timings(about="a model"):
    return Timings({"about": about}, torch.device("cuda"))


def ask(times, numbers=NUMBERS, name="layers"):
    return times(name, {name: numbers}, lambda: lambda _, rows: rows).get(name)


def seconds(*numbers):
    return {number: number for number in numbers}


def test_functions_take_turns_and_the_largest_graph_is_captured_first(gpu, monkeypatch):
    """Each graph before a larger one would keep memory that the larger one cannot use: gigabytes in all."""
    device = Device(monkeypatch, memory=16)
    found = timings()("kernels", {"a": (4, 16), "b": (8,)}, lambda: device.run)
    assert found == {"a": seconds(4, 16), "b": seconds(8)}
    assert device.captured == device.ran == [("a", 16), ("b", 8), ("a", 4)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("CUDA error: out of memory")], ids=repr)
def test_without_memory_there_are_no_times(gpu, error, caplog):
    def make():
        raise error

    with caplog.at_level(logging.INFO):
        assert timings()("kernels", {"a": NUMBERS}, make) == {}
    assert "No memory is left to measure kernels" in caplog.text
    assert not gpu.exists()


def test_memory_of_a_measurement_is_free_when_it_fails(gpu, monkeypatch):
    """The error's traceback holds the frame, and so the tensors, of the measurement."""
    held, freed = [], []

    def make():
        tensor = torch.zeros(1)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(held[0]() is None))
    timings()("kernels", {"a": NUMBERS}, make)
    assert freed == [True]


def test_a_time_without_a_graph_is_not_kept(gpu, monkeypatch):
    device = Device(monkeypatch, memory=10)
    assert timings()("layers", {"layers": NUMBERS}, lambda: device.run) == {}
    assert device.ran == [("layers", 16)]
    assert not gpu.exists()


def test_another_error_is_not_hidden(gpu):
    with pytest.raises(ZeroDivisionError):
        timings()("layers", {"layers": NUMBERS}, lambda: 1 / 0)


def test_times_are_measured_once_on_a_machine(machine, caplog):
    with caplog.at_level(logging.INFO):
        assert ask(timings()) == seconds(*NUMBERS)
    assert "Measured layers in" in caplog.text and "3 durations" in caplog.text
    again = timings()
    assert ask(again, NUMBERS[:2]) == seconds(*NUMBERS)
    assert ask(again, (4, 8), "drawing") == seconds(4, 8)
    # Times of different minutes are not comparable, so more numbers of rows are measured as a whole.
    assert ask(again, (*NUMBERS, 32)) == seconds(*NUMBERS, 32)
    assert machine.asked == [{"layers": NUMBERS}, {"drawing": (4, 8)}, {"layers": (*NUMBERS, 32)}]
    # So are functions of which one has no time yet.
    assert again("all", {"layers": NUMBERS, "new": (4,)}, lambda: lambda _, rows: rows)["new"] == seconds(4)
    assert machine.asked[3:] == [{"layers": NUMBERS, "new": (4,)}]
    assert len(list(machine.folder.iterdir())) == 1


@pytest.mark.parametrize("change", ["about", "gpu", "torch"])
def test_times_of_another_model_or_machine_are_not_read(machine, monkeypatch, change):
    ask(timings())
    if change == "gpu":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    if change == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    ask(timings("another model" if change == "about" else "a model"))
    assert len(machine.asked) == 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"layers": 3}',
        '{"layers": {"x": 1}}',
        '{"layers": {"4": null}}',
        '{"layers": {}}',
        '{"layers": {"4": NaN, "8": 8}}',
        '{"layers": {"4": 4, "8": -8}}',
        '{"layers": {"4": 4, "8": 1e999}}',
        f'{{"layers": {{"4": 4, "8": {10**400}}}}}',
        '{"layers": {"4": 4, "9": 9}}',  # other numbers of rows
    ],
)
def test_the_times_of_a_broken_file_are_measured_again(machine, content):
    ask(timings(), (4, 8))
    (path,) = machine.folder.iterdir()
    path.write_text(content)
    assert ask(timings(), (4, 8)) == seconds(4, 8)
    assert len(machine.asked) == 2
    assert json.loads(path.read_text()) == {"layers": {"4": 4.0, "8": 8.0}}


def test_without_a_folder_to_write_to_the_times_are_measured_but_not_kept(machine, caplog):
    machine.folder.parent.parent.write_text("a file in the folder's place")
    with caplog.at_level(logging.INFO):
        assert ask(timings()) == seconds(*NUMBERS)
    assert "cannot be written" in caplog.text
