"""ComfyUI entry of the pack; silent where ComfyUI's core is not importable, so that tests can import this folder."""

from importlib.util import find_spec

if find_spec("comfy") is not None and find_spec("comfy_api") is not None:
    from .nodes.extension import comfy_entrypoint

    WEB_DIRECTORY = "./nodes/web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
