"""Runs a ComfyUI core's main.py: launch.py COMFYUI_FOLDER [arguments of main.py]."""

import os
import runpy
import sys

import shims

if __name__ == "__main__":
    folder = os.path.abspath(sys.argv[1])
    shims.install()
    sys.path.insert(0, folder)
    os.chdir(folder)
    sys.argv = [os.path.join(folder, "main.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
