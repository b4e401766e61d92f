"""How a backend that a service starts outlives the service."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

_TRIAL_SECONDS = 5.0


def service_of(cgroups: Path = Path("/proc/self/cgroup")) -> str:
    """The systemd service that this process is part of, e.g. "comfyui.service"; "" in a login, a container or a scope.

    When a service is stopped or restarted, systemd ends every process of its control group, detached ones too.
    """
    if not cgroups.is_file():
        return ""
    for line in cgroups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        units = [part for part in path.split("/") if part.endswith((".service", ".scope"))]
        if controllers in ("", "name=systemd") and units and units[-1].endswith(".service"):
            return units[-1]
    return ""


def scope_command() -> list[str]:
    """What stands before a command so that it runs in a unit of its own; empty where systemd gives this user none.

    systemd-run becomes the command itself: its process number, its session and its files stay.
    """
    if shutil.which("systemd-run") is None:
        return []
    user = [] if os.geteuid() == 0 else ["--user"]
    command = ["systemd-run", *user, "--scope", "--quiet", "--collect", "--no-ask-password", "--"]
    try:
        tried = subprocess.run([*command, "true"], capture_output=True, timeout=_TRIAL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return []
    return command if tried.returncode == 0 else []
