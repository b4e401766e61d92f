"""The command line: run, serve, status, stop, doctor, workflow, keys, convert, train, bench, demo."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from .client import launcher
from .client.asking import own_hello
from .client.backend import Backend
from .client.cards import choose_ranks, seen
from .client.connection import Connection
from .client.ending import end
from .client.names import DEFAULT, backend_name, meant
from .client.places import ThisMachine
from .command_line import command_line
from .config import DEFAULT_IDLE_SECONDS, BackendSpec, Hosts, ServeSpec, gpu_numbers
from .demo.trained import add_choice, chosen
from .errors import BackendError, ConfigError, StartError
from .rpc import runtime_dir
from .rpc.messages import Adjust, BackendState, Progress
from .run import command as run_command
from .version import __version__
from .workflow_files import command as workflow_command

CLEAR = "\x1b[2J\x1b[H"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a BackendError, printed with its remedy."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except BackendError as error:
        print(f"parallel-mmdit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="parallel-mmdit", description="One SD3.5 or SDXL image on many GPUs.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    draw = commands.add_parser("run", help="draw a prompt with a checkpoint")
    _named(draw)
    _ranks(draw)
    run_command.add_arguments(draw)

    serve = commands.add_parser("serve", help="start a backend and keep it in the foreground")
    _named(serve)
    _ranks(serve)
    _serve_arguments(serve)
    serve.set_defaults(run=_serve)

    keys = commands.add_parser("keys", help="make the keys that clients on other machines need")
    keys.add_argument("folder", type=Path)
    keys.set_defaults(run=_keys)

    status = commands.add_parser("status", help="ranks, devices, memory, models, jobs of a running backend")
    _named(status)
    status.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")
    status.add_argument("--json", action="store_true")
    status.set_defaults(run=_status)

    doctor = commands.add_parser("doctor", help="what is wrong with this installation, and what to do")
    doctor.add_argument("--links", action="store_true", help="only time messages of each kind between ranks")
    doctor.set_defaults(run=_doctor)

    flow = commands.add_parser(
        "workflow", help="a parallel copy of a workflow's JSON file, and what in it would be refused"
    )
    workflow_command.add_arguments(flow)

    stop = commands.add_parser("stop", help="end a running backend")
    _named(stop)
    stop.set_defaults(run=_stop)

    convert = commands.add_parser("convert", help="a from-scratch SD3 model (model_ema_*.pkl) to safetensors")
    convert.add_argument("pickle", type=Path, help="with model_params_*.json beside it")
    convert.add_argument("output", type=Path)
    convert.set_defaults(run=_convert)

    train = commands.add_parser("train", help="train the demo's small checkpoints (pip install '.[train]')")
    _train_arguments(train)

    bench = commands.add_parser("bench", help="figures about this machine and the methods")
    _bench_arguments(bench)

    _small_checkpoint(commands)
    return parser


def _serve_arguments(serve: argparse.ArgumentParser) -> None:
    serve.add_argument(
        "--idle-seconds",
        type=float,
        help="let the models go after so long without a job, and end after 8 times as long or 4 hours; half an hour",
    )
    serve.add_argument("--memory-budget-mib", type=int, help="for models, per rank; 0, or left out, is no limit")
    serve.add_argument("--detach", action="store_true", help="return as soon as it is ready")
    serve.add_argument("--models", action="append", default=[], help="open only files below this folder; repeatable")
    serve.add_argument("--listen", default="", help="also serve clients of other machines, at tcp://0.0.0.0:PORT")
    serve.add_argument("--keys", default="", help="folder of `parallel-mmdit keys`, for --listen")
    serve.add_argument("--metrics-port", type=int, default=0, help="Prometheus page on loopback")
    serve.add_argument("--hosts", type=int, default=1, help="machines that share the backend; run serve on each")
    serve.add_argument("--host-index", type=int, default=0, help="of this machine; 0 has the socket")
    serve.add_argument("--rendezvous", default="", help="host 0's address and a free port, the same on each")
    serve.add_argument("--interface", default="", help="network interface between the hosts, such as eth0")


def _small_checkpoint(commands: Any) -> None:
    """What is done with a checkpoint that this pack brings, or with one of an own run."""
    demo = commands.add_parser("demo", help="draw on two CPU ranks with a small checkpoint of this pack")
    add_choice(demo)
    demo.add_argument("--output", default="demo-output", help="folder for the contact sheet")
    demo.add_argument("--prompt", action="append", default=[], help="a caption; may be given several times")
    demo.add_argument("--size", type=int, default=128, help="pixels")
    demo.set_defaults(run=_demo)

    score = commands.add_parser("score", help="what a small checkpoint's pictures show, of held-out captions")
    add_choice(score)
    score.add_argument("--count", type=int, default=100, help="captions")
    score.add_argument("--size", type=int, default=128, help="pixels")
    score.set_defaults(run=_score)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    from parallel_training import command

    command.add_arguments(parser)
    parser.set_defaults(run=command.run)


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    from .bench import command

    command.add_arguments(parser)


def _named(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="the backend's name; left out, that of the GPUs seen here")


def _ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--world-size", type=int, help="ranks; all GPUs of one kind, or 2 on a CPU, where it is left out"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--devices", default="", help="CUDA ordinals, one per rank, separated by commas")


def _serve(args: argparse.Namespace) -> int:
    here = seen(args.device)
    ranks = choose_ranks(here, args.device, args.world_size, gpu_numbers(args.devices))
    name = backend_name(args.name or DEFAULT, ranks.device, here)
    if ranks.note:
        print(ranks.note, file=sys.stderr)
    budget = None if args.memory_budget_mib is None else args.memory_budget_mib * 2**20
    idle = DEFAULT_IDLE_SECONDS if args.idle_seconds is None else args.idle_seconds
    spec = BackendSpec(name, ranks.count, ranks.device, ranks.devices, idle, budget or 0)
    hosts = Hosts(args.hosts, args.host_index, args.rendezvous, args.interface)
    models, keys = tuple(map(_whole, args.models)), _whole(args.keys) if args.keys else ""
    serve = ServeSpec(models, args.listen, keys, args.metrics_port, hosts)
    if args.detach and hosts.count > 1:
        raise ConfigError("--detach is for one host.", "Leave it out, and run serve below nohup or a service manager.")
    runs = launcher.find(spec, serve, _to_stderr) if hosts.count == 1 else runtime_dir.read_record(spec.name)
    if runs is not None:
        if hosts.count == 1:
            if serve not in (launcher.LOCAL, runs.serve):
                raise ConfigError(
                    f"Backend {name!r} runs already, without these --models, --listen, --keys or --metrics-port.",
                    f"End it first with `{command_line('stop', '--name', name)}`, or give another --name.",
                )
            running = Connection(spec, ThisMachine(spec, Adjust(args.idle_seconds, budget), found=runs), runs)
            if notes := running.taken_notes():
                print(notes)
            running.close()
        print(f"Backend {name!r} runs already.")
        return 0
    if args.detach:
        record = launcher.attach_or_start(spec, serve=serve, tell=_to_stderr)
        print(f"Backend {name!r} is ready: {record.world_size} ranks on {record.device}, process {record.agent_pid}.")
        return 0
    if hosts.count > 1:
        return launcher.supervise(spec, serve)
    return launcher.run(spec, serve)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _whole(path: str) -> str:
    """Ranks may have another working directory."""
    return str(Path(path).expanduser().absolute())


def _keys(args: argparse.Namespace) -> int:
    from .rpc.keys import Keys

    folder = Keys.make(args.folder).folder
    print(f"Keep {folder}/server.key_secret on the backend's hosts, with server.key and client.key.")
    print(f"Copy {folder}/client.key_secret and {folder}/server.key to those who may use it.")
    return 0


def _status(args: argparse.Namespace) -> int:
    while True:
        try:
            page = _page(args.name, args.json)
        except BackendError as error:
            if not args.watch:
                raise
            page = str(error)  # ranks that are being restarted are worth watching
        print(f"{CLEAR if args.watch and sys.stdout.isatty() else ''}{page}", flush=True)
        if not args.watch:
            return 0
        time.sleep(1.0)


def _page(name: str | None, as_json: bool) -> str:
    backend = Backend.attach(name)
    try:
        state = backend.status()
    finally:
        backend.close()
    others = [client for client in state.clients if client != own_hello().client]
    state = msgspec.structs.replace(state, clients=others)
    return msgspec.json.encode(state).decode() if as_json else describe(state)


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import as_text, examine, print_links

    if args.links:
        print_links()
        return 0
    found = examine()
    print(as_text(found))
    return int(any(finding.verdict == "wrong" for finding in found))


def _stop(args: argparse.Namespace) -> int:
    name = meant(args.name)
    if not end(name):
        raise StartError(f"No backend {name!r} runs.", "There is nothing to stop.")
    print(f"Backend {name!r} has stopped.")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from .models.from_scratch_file import convert  # torch models, which the other commands do without

    convert(args.pickle, args.output)
    print(f"{args.output} ({args.output.stat().st_size / 2**20:.0f} MiB)")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from .demo.command import run_demo  # torch models and diffusers, which the other commands do without

    run_demo(chosen(args), args.output, prompts=args.prompt, size=args.size)
    return 0


def _score(args: argparse.Namespace) -> int:
    from .demo.yardsticks import run_score

    run_score(chosen(args), count=args.count, size=args.size)
    return 0


def describe(state: BackendState) -> str:
    """A page that a person reads."""
    lines = [
        f"backend {state.name}: version {state.version}, generation {state.generation}, up {state.uptime:.0f} s",
        f"jobs: {_running(state)}, {state.queued} queued, {state.jobs_done} done, {state.jobs_failed} of them failed or cancelled; "
        f"{state.cached_tensors} prompts' tensors kept ({state.cached_bytes / 2**20:.1f} MiB)",
        *_last(state),
        f"since the start: {state.restarts} restarts, {state.refused} messages refused",
        f"clients: {', '.join(state.clients) or 'none'}; models leave after {state.idle_seconds / 60:.3g} min without work; "
        f"memory budget: {f'{state.memory_budget / 2**20:.0f} MiB a rank' if state.memory_budget else 'none'}",
        f"{'rank':>4}  {'host':<16} {'pid':>8}  {'device':<8} {'used MiB':>9} {'free MiB':>9} {'all MiB':>9}  name",
    ]
    for r in state.ranks:
        used, free, total = (n / 2**20 for n in (r.used_bytes, r.free_bytes, r.total_bytes))
        lines.append(
            f"{r.rank:>4}  {r.host:<16} {r.pid:>8}  {r.device:<8} {used:>9.0f} {free:>9.0f} {total:>9.0f}  {r.device_name}"
        )
    lines.append("models, least recently used first:" if state.models else "no models resident")
    for m in state.models:
        patched = f", patches on {m.patched} weights" if m.patched else ""
        lines.append(f"  {m.name}: {m.family}, {m.mesh}, {m.dtype}, {m.rank_bytes / 2**20:.1f} MiB a rank{patched}")
    return "\n".join(lines)


def _running(state: BackendState) -> str:
    """The job that runs, and how far it is."""
    job = state.job
    if job is None:
        return "idle"
    reached = f", step {job.done} of {job.total}" if job.total else ""
    if job.what:
        reached = f", {Progress(job.what, job.done, job.total, job.unit).text}"
    step = "" if job.step_seconds is None else f", {job.step_seconds:.3f} s a step"
    of = f" of {job.client}" if job.client else ""
    return f"runs {job.kind} {job.model}".rstrip() + f"{of} for {job.seconds:.0f} s{reached}{step}"


def _last(state: BackendState) -> list[str]:
    """What the last sampling cost, if there was any."""
    cost = state.last
    if cost is None:
        return []
    waited = "" if cost.waited is None else f", {cost.waited / cost.seconds:.0%} of it waiting for other ranks"
    sent = f"{cost.sent_bytes / 2**20:.1f} MiB sent"
    return [f"last {cost.kind}: {cost.model}, {cost.steps} steps in {cost.seconds:.2f} s{waited}, {sent}"]


if __name__ == "__main__":
    sys.exit(main())
