"""Hooks that others have set on a model's modules: whether there are some, and calls without them.

`model/patch.py` goes around no module that has one; the self-check of `model/gated.py` is heard by
none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module runs more than its class's forward, at it or inside."""
    if torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    return any(
        "forward" in m.__dict__ or any(getattr(m, name) for name in _HOOKS)
        for m in module.modules()
    )


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Within it, a module and what is in it run no hook, not even those set for all modules."""
    held: list[tuple[dict[str, Any], str, Any]] = []
    everywhere = vars(torch.nn.modules.module)
    for name in _HOOKS:
        held.append((everywhere, f"_global{name}", everywhere[f"_global{name}"]))
        held += [(m.__dict__, name, m.__dict__[name]) for m in module.modules()]
    try:
        for where, name, _ in held:
            where[name] = OrderedDict()
        yield
    finally:
        for where, name, hooks in held:
            where[name] = hooks
