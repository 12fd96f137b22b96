"""Choices between launches, with a clock in the place of a GPU."""

from __future__ import annotations

import json

import pytest
import torch

from moeft.kernels import tuning

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def card(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEFT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA RTX 3090")
    monkeypatch.setattr(tuning, "_tables", {})
    monkeypatch.setattr(tuning, "_known", {})
    return tmp_path / "tuning" / "nvidia-rtx-3090.json"


def run_that_takes(monkeypatch, costs):
    """A function whose time depends on its choice; None stands for a launch that does not fit."""
    chosen = []

    def run():
        chosen.append(tuning.lookup("product", DEVICE, tuple(costs)))

    def seconds(run, device, repeats):
        run()
        return costs[chosen[-1]]

    monkeypatch.setattr(tuning, "_seconds", seconds)
    return run


def test_the_fastest_launch_is_kept_for_the_gpu(monkeypatch, card):
    costs = {(1, 1): 3.0, (2, 2): 1.0, (3, 3): None}
    measured = tuning.tune(DEVICE, run_that_takes(monkeypatch, costs))
    assert measured == {"product": {(1, 1): 3.0, (2, 2): 1.0}}
    assert json.loads(card.read_text()) == {"product": [2, 2]}
    tuning._tables.clear()  # another process
    tuning._known.clear()
    assert tuning.lookup("product", DEVICE, tuple(costs)) == (2, 2)


def test_unknown_and_outdated_entries_give_the_first_candidate(card):
    card.parent.mkdir()
    card.write_text('{"product": [9, 9], "other": "text"}')
    assert tuning.lookup("product", DEVICE, ((1, 1), (2, 2))) == (1, 1)
    assert tuning.lookup("other", DEVICE, ((1, 1), (2, 2))) == (1, 1)


def test_damaged_file_is_said_and_passed_over(card, caplog):
    card.parent.mkdir()
    card.write_text("{")
    assert tuning.lookup("product", DEVICE, ((1, 1),)) == (1, 1)
    assert "defaults are used, delete it to measure again" in caplog.text


def test_folder_that_cannot_be_written_keeps_the_choice_in_memory(monkeypatch, card, caplog):
    card.parent.write_text("a file where the folder would be")
    tuning.tune(DEVICE, run_that_takes(monkeypatch, {(1, 1): 2.0, (2, 2): 1.0}))
    assert "cannot be written" in caplog.text
    assert tuning.lookup("product", DEVICE, ((1, 1), (2, 2))) == (2, 2)
