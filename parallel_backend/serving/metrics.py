"""A Prometheus text endpoint on loopback: what `status` tells, as numbers (pip install '.[metrics]')."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import ConfigError
from .state_board import StateBoard
from .turns import Turns

_PREFIX = "parallel_mmdit_"


class StateCollector:
    """Reads the board at each scrape; nothing is counted here."""

    def __init__(self, board: StateBoard, jobs: Turns) -> None:
        self._board, self._jobs = board, jobs

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        state = self._board.snapshot(len(self._jobs))
        counters: dict[str, tuple[str, float]] = {
            "jobs": ("Jobs that have ended.", state.jobs_done),
            "jobs_failed": ("Of these, those that ended in an error or a cancel.", state.jobs_failed),
            "restarts": ("How often the ranks were started anew.", state.restarts),
            "refused_messages": ("Messages that could not be read.", state.refused),
        }
        gauges: dict[str, tuple[str, float]] = {
            "uptime_seconds": ("Since the ranks were started.", state.uptime),
            "queued_jobs": ("Jobs that wait.", state.queued),
            "running": ("1 while a job runs.", int(bool(state.running))),
            "resident_models": ("Models held.", len(state.models)),
            "cached_tensors": ("Tensors of prompts held.", state.cached_tensors),
            "cached_bytes": ("Their bytes, on each rank.", state.cached_bytes),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(_PREFIX + name, text, value=value)
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(_PREFIX + name, text, value=value)
        labels = ["rank", "host", "device"]
        for name, text in (("used", "Taken by"), ("free", "Free on the device of"), ("total", "Of the device of")):
            family = GaugeMetricFamily(f"{_PREFIX}{name}_bytes", f"{text} a rank, after its last job.", labels=labels)
            for rank in state.ranks:
                family.add_metric([str(rank.rank), rank.host, rank.device], getattr(rank, f"{name}_bytes"))
            yield family


def serve_metrics(port: int, board: StateBoard, jobs: Turns) -> None:
    """Serves http://127.0.0.1:port/metrics from a thread.

    Raises: ConfigError: prometheus-client is not installed, or the port is taken.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError:
        raise ConfigError("--metrics-port needs prometheus-client.", "pip install '.[metrics]'.") from None
    registry = CollectorRegistry()
    registry.register(StateCollector(board, jobs))
    try:
        start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise ConfigError(f"Port {port} can't be listened on: {error}.", "Give another --metrics-port.") from None
