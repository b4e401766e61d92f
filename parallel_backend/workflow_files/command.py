"""`parallel-mmdit workflow`: files and folders of workflows made parallel, or only looked at."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError
from .make_parallel import make_parallel
from .reading import read_workflow

RUNS, REFUSED, BAD_INPUT = 0, 1, 2
SUFFIX = "-parallel"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of the editor or the API; a folder's too")
    parser.add_argument("--check", action="store_true", help="tell what would be done and refused; write nothing")
    parser.add_argument(
        "--swap", action="store_true", help="CheckpointLoaderSimple gives way to LoadParallelCheckpoint, in its place"
    )
    parser.add_argument(
        "-o", "--output", type=Path, help=f"of one FILE; left out, FILE with {SUFFIX} before its ending"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 all run, 1 something would be refused or can't be reached by a node, 2 a file that is no workflow."""
    try:
        files = list(_files(args.files))
        if args.output is not None and len(files) != 1:
            raise InputError(f"-o names one file, and there are {len(files)}.", "Leave it out, or give one FILE.")
    except InputError as error:
        print(f"parallel-mmdit: {error}", file=sys.stderr)
        return BAD_INPUT
    seen = Counter[str]()
    for path, named in files:
        try:
            seen[_one(path, args)] += 1
        except InputError as error:
            if named:
                print(f"parallel-mmdit: {error}", file=sys.stderr)
                seen["bad"] += 1
    if len(files) > 1:
        parts = [f"{seen['runs']} of {seen['runs'] + seen['hidden'] + seen['refused']} run"]
        parts += [f"{seen['hidden']} more with the setting"] if seen["hidden"] else []
        parts += [f"files without a model of SD3 or SDXL: {seen['others']}"] if seen["others"] else []
        print("; ".join(parts) + ".")
    return BAD_INPUT if seen["bad"] else REFUSED if seen["refused"] or seen["hidden"] else RUNS


def _files(paths: list[Path]) -> Iterator[tuple[Path, bool]]:
    """Each file, and whether it was named itself: what lies in a folder beside workflows is passed over.

    Raises: InputError: nothing lies there.
    """
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} is not there.", "Give a workflow's JSON file, or a folder of such.")
        if path.is_dir():
            yield from ((file, False) for file in sorted(path.rglob("*.json")))
        else:
            yield path, True


def _one(path: Path, args: argparse.Namespace) -> str:
    """Prints what was found in the file, and writes its parallel copy if there is one to write.

    Returns: "runs", "hidden", "refused" or "others".
    Raises: InputError: not a workflow, or the copy would take its place.
    """
    workflow, over_lines = read_workflow(path)
    report = make_parallel(workflow, swapped=args.swap, only_check=args.check)
    print(f"{path}:")
    for line in report.lines():
        print(f"  {line}")
    if report.changed and not args.check:
        target = args.output or path.with_name(path.stem + SUFFIX + path.suffix)
        if target.exists() and target.samefile(path):
            raise InputError(f"{target} is the workflow itself.", "Give -o another name.")
        text = json.dumps(workflow.content, ensure_ascii=False, indent=2 if over_lines else None)
        try:
            target.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{target} can't be written: {error}.", "Give -o a place that can.") from error
        print(f"  Written: {target}")
    if not report.found.concerns_us:
        return "others"
    return "runs" if report.found.runs else "hidden" if report.found.runs_with_setting else "refused"
