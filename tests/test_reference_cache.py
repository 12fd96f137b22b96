"""The cache of log-probabilities under the reference: what it keeps, what it refuses, what it survives."""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeft.errors import DataError
from moeft.training.preference.reference_cache import HEADER_BYTES, RECORD_BYTES, ReferenceCache
from moeft.training.preference.reference_context import reference_context
from moeft.training.preference.starting_policy import StartingPolicy
from tests.tiny_models import randomise_lora, tiny_model
from tests.tiny_preferences import dpo_trainer, pairs, policy

CONTEXT = "0f" * 16


def records(count, start=0):
    return [((start + i).to_bytes(16, "little"), -1.5 * (start + i) - 1, i + 1) for i in range(count)]


def context(model):
    return reference_context(model, StartingPolicy(model), "no")


def test_a_second_start_computes_nothing(tmp_path):
    cold = dpo_trainer(policy(), tmp_path / "a", pairs(6), pairs(2), reference_cache=str(tmp_path / "cache"))
    cold.prepare_reference()
    assert (cold.reference.cached, cold.reference.computed) == (4, 12)  # the held-out pairs are two of the others
    warm = dpo_trainer(
        policy(seed=5), tmp_path / "b", pairs(6), pairs(2), reference_cache=str(tmp_path / "cache"), reference_verify=0
    )

    def forbidden(*_):
        raise AssertionError("a pass through the model")

    warm.model.get_base_model().model.register_forward_pre_hook(forbidden)
    warm.prepare_reference()
    assert (warm.reference.cached, warm.reference.computed) == (16, 0)
    np.testing.assert_array_equal(warm.train_pairs.pairs.reference, cold.train_pairs.pairs.reference)


def test_cached_values_are_verified_and_wrong_ones_computed_anew(tmp_path, caplog):
    first = dpo_trainer(policy(), tmp_path / "a", pairs(4), reference_cache=str(tmp_path / "cache"))
    first.prepare_reference()
    right = first.train_pairs.pairs.reference
    (file,) = (tmp_path / "cache").glob("*.ref")
    content = bytearray(file.read_bytes())
    for start in range(HEADER_BYTES, len(content), RECORD_BYTES):
        content[start + 16 : start + 24] = struct.pack("<d", -1.0)
        content[start + 28 : start + 32] = struct.pack("<I", zlib.crc32(content[start : start + 28]))
    file.write_bytes(content)
    second = dpo_trainer(policy(), tmp_path / "b", pairs(4), reference_cache=str(tmp_path / "cache"))
    second.prepare_reference()
    assert "not those of this reference" in caplog.text
    assert second.reference.computed == 8
    np.testing.assert_array_equal(second.train_pairs.pairs.reference, right)


def test_another_base_adapter_or_quantisation_is_another_reference():
    fresh = context(policy())
    assert context(policy(seed=7)) == fresh  # a fresh adapter changes nothing
    other_base = policy()
    with torch.no_grad():
        next(other_base.get_base_model().parameters()).view(-1)[1000] += 1e-6
    trained = policy()
    randomise_lora(trained)
    scaled = policy()
    randomise_lora(scaled)
    scaled.peft_config["default"].lora_alpha = 99
    capped = policy()
    capped.get_base_model().config.final_logit_softcapping = 30.0
    found = [context(model) for model in (other_base, trained, scaled, capped, policy().to(torch.bfloat16))]
    assert len({fresh, *found}) == 6


def test_a_cache_is_read_back_to_the_bit(tmp_path):
    ReferenceCache(tmp_path, CONTEXT).put(records(5))
    read = ReferenceCache(tmp_path, CONTEXT)
    assert [read.get(key, count) for key, _, count in records(5)] == [total for _, total, _ in records(5)]
    assert read.get(records(5)[0][0], 99) is None  # other compared tokens
    assert len(read) == 5


@pytest.mark.parametrize("cut", [1, RECORD_BYTES - 1, RECORD_BYTES + 3])
def test_a_torn_record_is_lost_alone_and_the_next_one_is_whole(tmp_path, cut):
    cache = ReferenceCache(tmp_path, CONTEXT)
    cache.put(records(4))
    os.truncate(cache.path, cache.path.stat().st_size - cut)
    again = ReferenceCache(tmp_path, CONTEXT)
    kept = len(again)
    again.put(records(1, start=50))
    read = ReferenceCache(tmp_path, CONTEXT)
    assert len(read) == kept + 1
    assert read.get(records(1, start=50)[0][0], 1) == records(1, start=50)[0][1]
    assert read.num_damaged == 0


@pytest.mark.parametrize("spoil", ["version", "context", "short", "text"])
def test_a_foreign_file_is_set_aside(tmp_path, spoil, caplog):
    cache = ReferenceCache(tmp_path, CONTEXT)
    cache.put(records(2))
    content = bytearray(cache.path.read_bytes())
    spoiled = {
        "version": content[:8] + struct.pack("<I", 99) + content[12:],
        "context": content[:12] + bytes(16) + content[28:],
        "short": content[:7],
        "text": b"not a cache at all, but a text that is long enough for a header and more",
    }[spoil]
    cache.path.write_bytes(spoiled)
    read = ReferenceCache(tmp_path, CONTEXT)
    assert len(read) == 0
    assert "set aside" in caplog.text
    read.put(records(1))
    assert len(ReferenceCache(tmp_path, CONTEXT)) == 1


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, HEADER_BYTES + 3 * RECORD_BYTES - 1), bit=st.integers(0, 7))
def test_no_flipped_bit_is_believed(tmp_path_factory, place, bit):
    cache = ReferenceCache(tmp_path_factory.mktemp("flip"), CONTEXT)
    cache.put(records(3))
    content = bytearray(cache.path.read_bytes())
    content[place] ^= 1 << bit
    cache.path.write_bytes(content)
    read = ReferenceCache(cache.path.parent, CONTEXT)
    right = {key: total for key, total, _ in records(3)}
    for key, _, count in records(3):
        assert read.get(key, count) in (None, right[key])
    assert len(read) in (0, 2)


def test_values_that_are_not_finite_never_reach_the_file(tmp_path):
    cache = ReferenceCache(tmp_path, CONTEXT)
    with pytest.raises(ValueError, match="must not be kept"):
        cache.put([(bytes(16), float("nan"), 1)])
    assert not cache.path.exists()


def test_a_pair_without_a_finite_log_probability_is_left_out_and_not_cached(tmp_path):
    model = policy()
    trainer = dpo_trainer(model, tmp_path / "run", pairs(4), reference_cache=str(tmp_path / "cache"))
    bad = trainer.processing_class.convert_tokens_to_ids("3")  # stands in the first, second and third pair only
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = torch.nan
    trainer.prepare_reference()
    reasons = [reject.reason for reject in trainer.train_pairs.rejects]
    assert reasons
    assert all("under the reference is" in reason for reason in reasons)
    assert len(trainer.train_dataset) + len(reasons) == 4
    assert np.isfinite(trainer.train_pairs.pairs.reference).all()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(DataError, match="no pair has a finite log-probability"):
        dpo_trainer(model, tmp_path / "none", pairs(4)).prepare_reference()


def append(folder, start):
    ReferenceCache(folder, CONTEXT).put(records(200, start))


def test_processes_share_a_file(tmp_path):
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=append, args=(tmp_path, 1000 * i)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    read = ReferenceCache(tmp_path, CONTEXT)
    assert len(read) == 800
    assert read.num_damaged == 0


def test_a_kill_loses_no_finished_record(tmp_path):
    program = textwrap.dedent(
        f"""
        import itertools
        from moeft.training.preference.reference_cache import ReferenceCache
        cache = ReferenceCache({str(tmp_path)!r}, {CONTEXT!r})
        for i in itertools.count():
            cache.put([(i.to_bytes(16, "little"), -1.0 - i, 1)])
            print(i, flush=True)
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) >= 200:
                break
        time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
    finished = max([200, *(int(line) for line in rest if line)])
    read = ReferenceCache(Path(tmp_path), CONTEXT)
    assert all(read.get(i.to_bytes(16, "little"), 1) == -1.0 - i for i in range(finished + 1))
    assert read.num_damaged == 0


def test_a_model_without_adapters_is_its_own_reference(tmp_path):
    trainer = dpo_trainer(tiny_model("qwen3_moe"), tmp_path, pairs(2), reference_cache=str(tmp_path / "cache"))
    assert trainer.prepare_reference().computed == 4
