"""What nodes change on the network itself: forwards, hooks, classes, settings and parameters of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

from comfy.model_base import BaseModel
from torch import Tensor
from torch.nn import Module

from .makers import maker_of, stands_around
from .patches import FORWARD
from .refusal import module_of

NAMED = 4
# What a layer holds its parts in, and what its output doesn't depend on.
_PARTS = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_NO_MATTER = frozenset(
    {
        *(
            *_PARTS,
            *_HOOKS,
            "_non_persistent_buffers_set",
            "training",
            "as_made",
            "worn",
            "told",
            "untried",
            "owner",
            "control_cost",
        ),
        *("extra_cost", "_is_torch_compile", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook"),
        *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
        *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    }
)
# Where ComfyUI's patcher notes how a layer's weights are to be cast and patched.
_CORES_OWN = ("comfy_", "prev_comfy")
_EMPTY_AT_FIRST = ("weight_function", "bias_function")


class AsMade:
    """A network's layers as they were, to be compared with what nodes have made of them.

    Copied with its network, it compares the copy.

    Args:
        is_known: whether that which is found as an attribute of this name may be there.
    """

    def __init__(self, network: Module, is_known: Callable[[str, Any], bool] = lambda *_: False) -> None:
        self.network, self.is_known = network, is_known
        self.layers = {name: (layer, type(layer), _state(layer)) for name, layer in network.named_modules()}
        self.classes = {kind: dict(functions_of(kind)) for _, kind, _ in self.layers.values()}
        self.put_before = {kind: put_in(kind) for kind in self.classes}
        self._compared: list[Any] | None = None
        self._places: list[tuple[dict[str, Any], Mapping[int, Any], Mapping[int, Any]]] = []

    def forwards(self) -> Iterator[tuple[str, Any]]:
        """What stands in place of layers' own forwards, the network's aside, by their names: evaluations ask for it."""
        for name, (layer, *_) in self.layers.items():
            if name and FORWARD in vars(layer):
                yield name, vars(layer)[FORWARD]

    def forget_comparison(self) -> None:
        """The next evaluation compares all layers, whatever was compared before."""
        self._places, self._compared = [], None

    def changes_since(self) -> Iterator[str]:
        """`changes`, unless none was found at this sampling's last evaluation, and no forward or hook has come or gone since."""
        # Looked up once a sampling: there are thousands of layers, and an evaluation waits.
        self._places = self._places or [
            (vars(layer), layer._forward_hooks, layer._forward_pre_hooks) for layer, *_ in self.layers.values()
        ]
        put = [kind.forward for kind in self.classes]
        for own, hooks, pre_hooks in self._places:
            if FORWARD in own or hooks or pre_hooks:
                put += [own.get(FORWARD), *hooks.values(), *pre_hooks.values()]
        if put != self._compared:
            found = list(self.changes())
            yield from found
            self._compared = None if found else put

    def changes(self) -> Iterator[str]:
        """What has been changed since, of its name: a few, how many others, and whose functions and objects they are."""
        found = list(self._changes())
        yield from (told for told, _ in found[:NAMED])
        if len(found) > NAMED:
            yield f"{len(found) - NAMED} more changes of its layers"
        if makers := sorted({maker for _, put in found if (maker := maker_of(put))}):
            yield f"put there by {', '.join(makers)}"

    def _changes(self) -> Iterator[tuple[str, Any]]:
        """Each with what has been put there."""
        for kind, functions in self.classes.items():
            now, put = dict(functions_of(kind)), put_in(kind)
            for name in sorted({*_differing(functions, now), *put}):
                value = put.get(name, now.get(name))
                # A class that got back its own was changed before the MODEL was made, and is as it should be.
                is_other = name in put or name not in self.put_before[kind]
                if is_other and not stands_around(value, functions.get(name), kind, name):
                    yield f"the replaced {name} of all {kind.__name__} layers, until ComfyUI restarts without it", value
        for name, (layer, kind, state) in self.layers.items():
            if type(layer) is not kind:
                yield f"the replaced class of {name or 'the network'} ({type(layer).__name__})", type(layer)
            now = _state(layer)
            changed = (name for name in _differing(state, now) if name not in now or not self.is_known(name, now[name]))
            for attribute in changed:
                yield _told(name, attribute, state.get(attribute, now.get(attribute))), now.get(attribute)


def network_changes(model: BaseModel) -> Iterator[str]:
    """What nodes have changed on a MODEL's network, or on what calls it."""
    as_made = model.as_made
    if model.diffusion_model is not as_made.network:
        yield f"the replaced diffusion_model ({type(model.diffusion_model).__name__})"
    for name in ("apply_model", "_apply_model"):
        if name in vars(model) and not is_own(model, name, vars(model)[name]):
            yield f"the replaced {name} of the model"
    yield from as_made.changes()


def put_in(kind: type) -> dict[str, Any]:
    """What a class calls that is a pack's, where neither it nor what it is of is that pack's: put there, maybe for all MODELs."""
    own = {module_of(ancestor).split(".")[0] for ancestor in kind.__mro__}
    return {
        name: value for name, value in _called_of(kind) if (maker := maker_of(value)) and maker.split(".")[0] not in own
    }


def _state(layer: Module) -> dict[str, Any]:
    """What a layer's output depends on beside its class; of lists, what they hold."""
    state = {}
    for name, value in vars(layer).items():
        if name in _NO_MATTER or name.startswith(_CORES_OWN) or (name in _EMPTY_AT_FIRST and not value):
            continue
        if type(value) is list:
            value = tuple(value)
        if type(value) is not MethodType or not is_own(layer, name, value):
            state[name] = value
    for part in _PARTS:
        state |= getattr(layer, part)
    for hooks in _HOOKS:
        state[hooks] = tuple(getattr(layer, hooks).values())
    return state


def functions_of(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """The functions of a class and of those that it is of, which come before it: only those below torch's base of all layers."""
    return ((name, value) for name, value in _called_of(kind) if isinstance(value, FunctionType))


def _called_of(kind: type) -> Iterator[tuple[str, Any]]:
    for ancestor in reversed(kind.__mro__):
        if ancestor not in (object, Module):
            yield from ((name, value) for name, value in vars(ancestor).items() if callable(value))


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in before.keys() | now.keys() if before.keys() != now.keys() else before:
        old, new = before.get(name), now.get(name)
        if old is not new and not _equal(old, new):
            yield name


def _equal(old: Any, new: Any) -> bool:
    """Of tensors and layers, only the very same are: those have no values to compare."""
    if type(old) is not type(new) or isinstance(old, Tensor | Module):
        return False
    return bool(old == new)


def is_own(owner: object, name: str, value: Any) -> bool:
    """Whether an attribute is its class's own method: ComfyUI leaves it so where an object patch was taken back."""
    own = getattr(type(owner), name, None)
    return isinstance(value, MethodType) and value.__self__ is owner and value.__func__ is own


def _told(layer: str, attribute: str, value: Any) -> str:
    of = layer or "the network"
    if attribute in _HOOKS:
        return f"a forward {'pre-' if 'pre' in attribute else ''}hook of {of}"
    if isinstance(value, Module):
        return f"the replaced layer {layer}.{attribute}".replace(" .", " ")
    what = "replaced" if callable(value) or isinstance(value, Tensor) else "changed"
    return f"the {what} {attribute} of {of}"
