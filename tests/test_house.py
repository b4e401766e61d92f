"""Rules of the house that no other test would notice: imports, requirements, versions."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from parallel_backend.client.requirements import COMFYUI_NEEDED, COMMANDS_NEED, EDITOR_NEEDED, FILES_NEED, RANKS_NEED

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]

# What each part may import of the others.
ALLOWED = {
    "errors": set(),
    "version": set(),
    "command_line": set(),
    "config": {"command_line", "errors"},
    "mesh_choice": {"config", "errors"},
    "checkpoint_files": {"errors"},
    "workflow_files": {"errors"},
    "rpc": {"command_line", "config", "errors", "version"},
    "fused": {"errors"},
    "distributed": {"fused", "config", "errors"},
    "sampling": {"config", "errors"},
    "quantized": {"checkpoint_files", "errors"},
    "models": {"quantized", "distributed", "fused", "checkpoint_files", "config", "errors"},
    # In the client's process alone.
    "text_encoders": {"checkpoint_files", "errors"},
    "client": {
        *(
            "text_encoders",
            "sampling",
            "rpc",
            "checkpoint_files",
            "command_line",
            "config",
            "errors",
            "version",
        ),
    },
    "extras": {"models", "quantized", "distributed", "checkpoint_files", "rpc", "errors"},
    "serving": {"rpc", "command_line", "errors", "version"},
    "rank": {
        *("extras", "serving", "sampling", "models", "distributed", "fused", "mesh_choice"),
        *("rpc", "checkpoint_files", "config", "errors", "version"),
    },
    "small_checkpoints": {"models", "distributed.mesh", "checkpoint_files", "config"},
    "demo": {"rank.one_process", "client", "rpc.conditioning", "checkpoint_files", "config", "errors", "version"},
    "bench": {
        "checkpoint_files",
        "demo",
        "small_checkpoints",
        "client",
        "rpc",
        "distributed",
        "models",
        # The predictor plays a rank: its model in its mesh, and a job as ranks run it.
        "rank.one_process",
        *("rank.sample", "rank.jobs", "rank.control_nets", "rank.residents", "rank.allowed_files", "extras.reading"),
        "mesh_choice",
        "sampling",
        "config",
        "errors",
    },
    "run": {"client", "demo", "rpc.messages", "checkpoint_files", "config", "errors", "version"},
    "__init__": {"client", "text_encoders.protocol", "rpc.conditioning", "config", "version"},
    "doctor": {"client", "command_line", "config", "distributed.device_memory", "rpc", "errors", "version"},
    "__main__": {
        *(
            "bench",
            "demo",
            "doctor",
            "run",
            "client",
            "models.from_scratch_file",
            "rpc",
            "command_line",
            "config",
            "errors",
            "version",
        ),
        "workflow_files",
    },
}
# Inside the ranks' room, from the bottom up: a file imports only those before it.
RANK_ORDER = (
    *(
        "lean_imports",
        "jobs",
        "meter",
        "room",
        "allowed_files",
        "pulse",
        "watch",
        "world",
        "place",
        "residents",
        "meshes",
    ),
    *(
        "kept_tensors",
        "shared_tensors",
        "branches",
        "control_nets",
        "vaes",
        "step_messages",
        "sample",
        "forward",
        "engine",
        "one_process",
        "server",
    ),
)
KNOWN_TO_NODES = {
    "mesh_choice",
    "config",
    "errors",
    "client",
    "rpc",
    "checkpoint_files",
    "demo",
    "doctor",
    "version",
    "workflow_files",
    "quantized",
}


def imported_parts(file: Path, package: Path) -> set[str]:
    """Dotted names below `package` that the file imports, relatively."""
    found = set()
    depth = len(file.relative_to(package).parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = file.relative_to(package).parts[: depth - node.level]
            module = [*base, *(node.module.split(".") if node.module else [])]
            whole_modules = package.joinpath(*module).is_dir()
            found |= {".".join([*module, alias.name] if whole_modules else module) for alias in node.names}
    return found


@pytest.mark.parametrize(
    "file", sorted((ROOT / "parallel_backend").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_parts_import_only_what_lies_below_them(file: Path) -> None:
    package = ROOT / "parallel_backend"
    part = file.relative_to(package).parts[0].removesuffix(".py")
    for name in imported_parts(file, package):
        top = name.split(".")[0]
        allowed = ALLOWED[part] | {part}
        assert top in allowed or any(name == a or name.startswith(a + ".") for a in allowed), f"{part} imports {name}"


def test_in_the_ranks_room_nothing_imports_what_comes_after_it() -> None:
    room = ROOT / "parallel_backend" / "rank"
    assert {file.stem for file in room.glob("*.py")} == {"__init__", *RANK_ORDER}
    for number, name in enumerate(RANK_ORDER):
        others = {
            found.split(".")[1] for found in imported_parts(room / f"{name}.py", room.parent) if found[:5] == "rank."
        }
        assert others <= set(RANK_ORDER[:number]), name


def test_no_file_lies_loose_beside_the_rooms() -> None:
    loose = {file.stem for file in (ROOT / "parallel_backend").glob("*.py")}
    assert loose == {"__init__", "__main__", "command_line", "errors", "version"}


def test_only_nodes_import_comfy_and_they_keep_to_the_client() -> None:
    for file in (ROOT / "parallel_backend").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) (comfy|nodes|server|folder_paths)\b", file.read_text(), re.M), file
    for file in (ROOT / "nodes").rglob("*.py"):
        assert "torch.distributed" not in file.read_text(), file
        for name in re.findall(r"from \.{2,3}parallel_backend(\.[\w.]+)? import", file.read_text()):
            assert name == "" or name.split(".")[1] in KNOWN_TO_NODES, (file, name)


def test_a_rank_starts_without_what_most_ranks_never_use() -> None:
    """They are seconds and 100 MB of each rank; what asks for them later gets them."""
    code = """if True:
        import sys, parallel_backend.rank.server
        late = ("scipy", "torch._dynamo", "bitsandbytes")
        print([name for name in (*late, "transformers", "torchvision") if sys.modules.get(name)])
        import bitsandbytes.functional, scipy.stats, torch
        print(torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1)).item())
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["[]", "1.0"]


def test_a_rank_starts_where_diffusers_optional_packages_do_not_load(tmp_path: Path) -> None:
    """Seen on a machine with peft, which imports transformers, which ranks keep out: no rank started."""
    for name in ("peft", "accelerate", "torchao", "optimum", "transformers", "torchvision", "xformers", "gguf"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('made for another torch')")
        (tmp_path / f"{name}-99.0.dist-info").mkdir()
        (tmp_path / f"{name}-99.0.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 99.0\n")
    code = "import parallel_backend.rank.server"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)


def test_the_root_imports_silently_without_comfyui() -> None:
    spec = spec_from_file_location("pack", ROOT / "__init__.py")
    assert spec is not None and spec.loader is not None
    pack = module_from_spec(spec)
    spec.loader.exec_module(pack)
    assert not hasattr(pack, "comfy_entrypoint")


def test_requirements_txt_says_what_pyproject_says() -> None:
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = whole["project"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == project["dependencies"]
    assert [*RANKS_NEED, *COMMANDS_NEED, *FILES_NEED] == project["dependencies"]
    assert f"ComfyUI{whole['tool']['comfy']['requires-comfyui']}" == COMFYUI_NEEDED
    assert project["optional-dependencies"]["comfyui"] == [EDITOR_NEEDED]


def test_no_host_of_a_registry_and_no_path_of_one_machine_is_in_the_tree() -> None:
    words = re.compile("/" + "work/|/" + "root/|pypi" + r"\.org|files\.python" + "hosted")
    suffixes = {".py", ".md", ".toml", ".txt", ".json", ".sh", ""}
    for file in ROOT.rglob("*"):
        hidden = any(
            (part.startswith(".") and part != ".ci") or part == "venv" for part in file.relative_to(ROOT).parts
        )
        if file.is_file() and file.suffix in suffixes and not hidden:
            assert not words.search(file.read_text(errors="replace")), file


# The trainer stands beside the backend; of the project, only the command line knows it.
def test_nothing_of_the_sampling_path_knows_the_trainer() -> None:
    for folder in ("parallel_backend", "nodes"):
        for file in (ROOT / folder).rglob("*.py"):
            if file.name != "__main__.py":
                assert "parallel_training" not in file.read_text(), file
    for file in (ROOT / "parallel_training").rglob("*.py"):
        for name in re.findall(r"^\s*(?:from|import) (\w+)", file.read_text(), re.M):
            assert name not in ("nodes", "comfy"), file
