"""The fault table, run: what a user sees of each fault, and that the next picture is the expected one."""

from __future__ import annotations

import re
import subprocess

import pytest

from parallel_backend.bench.faults import FAULTS, Fault, Row, run_faults
from parallel_backend.errors import ConfigError

# Those in which every rank fails alike, or none does: the model must not have been read again.
IN_PLACE = ("out of memory on all ranks", "client killed", "socket removed", "runtime folder removed")


@pytest.fixture(scope="module")
def rows(ran_beside: list[Row]) -> dict[str, Row]:
    return {row.fault: row for row in ran_beside}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_named_in_time_and_the_next_prompt_works(fault: Fault, rows: dict[str, Row]) -> None:
    if fault.name not in rows:
        pytest.skip("needs a disk of its own, which this user can't mount")
    row = rows[fault.name]
    assert row.equal, row.error
    if not fault.error:
        assert row.detected is None, row.error
        return
    assert row.detected is not None and re.search(fault.error, row.error), row.error
    # The promise that README makes, not a measurement: 10 seconds, 30 where a rank is stopped, 60 where one sleeps.
    assert row.detected < next(
        (seconds for word, seconds in (("stopped", 30), ("asleep", 60)) if word in fault.name), 10
    )
    assert row.code in (
        "backend_lost",
        "rank",
        "out_of_memory",
        "checkpoint",
        *["cancelled"] * ("asleep, " in fault.name),
    )


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_can_be_survived_in_place_restarts_nothing(name: str, rows: dict[str, Row]) -> None:
    assert not rows[name].restarted


def test_no_process_is_left(rows: dict[str, Row]) -> None:
    left = subprocess.run(
        ["pgrep", "-f", "parallel_backend.rank.server --name faults"], capture_output=True, check=False
    )
    assert left.stdout == b""


def test_an_unknown_fault_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no fault 'fire'.*rank 1 killed"):
        run_faults(["fire"])
