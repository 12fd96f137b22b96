"""The configuration files for ``accelerate launch``: accelerate knows every key, and they mean what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_file_and_its_first_line_starts_it(path):
    found = load_config_from_file(str(path))  # refuses keys that it does not know
    assert found.mixed_precision == "bf16"
    assert found.num_processes == 8 * found.num_machines
    if found.distributed_type == DistributedType.FSDP:
        assert found.fsdp_config["fsdp_version"] == 2
        assert found.fsdp_config.get("fsdp_offload_params", False) == ("offload" in path.stem)
        assert not found.fsdp_config["fsdp_cpu_ram_efficient_loading"]
    if found.distributed_type == DistributedType.DEEPSPEED:
        assert found.deepspeed_config["zero_stage"] == 3
        assert not found.deepspeed_config["zero3_init_flag"]  # moeft loads models whole, and checks them
        for part in ("param", "optimizer"):
            assert (found.deepspeed_config[f"offload_{part}_device"] == "cpu") == ("offload" in path.stem)
    command = f"# accelerate launch --config_file configs/{path.name} -m moeft.cli sft RECIPE"
    assert path.read_text().splitlines()[0] == command


def test_every_file_is_documented():
    page = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    assert len(CONFIGS) == 7
    assert all(f"`{path.name}`" in page for path in CONFIGS)
