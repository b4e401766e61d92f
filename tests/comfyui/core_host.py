"""A ComfyUI core that is imported once for many scripts: core_host.py COMFYUI SOCKET.

Over SOCKET, the number of an open one, come a script, its arguments, its environment and a folder. The script runs in a fork as it
would by itself, and prints to the files `out` and `err` of the folder; back go the number of its process, then its exit code.
"""

import gc
import os
import runpy
import sys
import traceback
from multiprocessing.connection import Connection

import shims
import torch


def main(comfy_folder, socket):
    torch.set_num_threads(1)  # whose other threads no fork would have
    shims.start_core(comfy_folder)
    import comfy.sample
    import comfy.samplers
    import comfy.sd
    import comfy.supported_models  # noqa: F401 - with the others what each script, or the pack in it, would import

    import nodes  # noqa: F401

    gc.collect()
    gc.freeze()  # no collection in a fork touches, and so copies, what all share
    with Connection(int(socket)) as line:
        while True:
            try:
                asked = line.recv()
            except EOFError:
                return
            process = os.fork()
            if process == 0:
                line.close()
                os._exit(run(*asked))
            line.send(process)
            line.send(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))


def run(script, arguments, environment, folder):
    """The exit code of the script, which runs in this process."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    here = sys.path.index(os.path.dirname(script))
    further = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[here + 1 : here + 1] = [path for path in further if path and path not in sys.path]
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except BaseException:  # noqa: BLE001 - as the interpreter tells of it
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    main(*sys.argv[1:])
