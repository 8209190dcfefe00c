"""What stands in a fit for data that were left out."""

from __future__ import annotations

from typing import Any, NoReturn

import jax

__all__ = ["Absent"]


@jax.tree_util.register_pytree_node_class
class Absent:
    """Stands for the arguments of a model: whatever looks into it raises ValueError, JAX too.

    Args:
        name: of the field that it stands in, args or kwargs.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name} left out>"

    def _refuse(self, *_: Any) -> NoReturn:
        how = "args=(x,)" if self.name == "args" else "kwargs={...}"
        raise ValueError(
            f"The fit has no {self.name}, as without_data() left the model's arguments out: give them again by "
            f"dataclasses.replace(fit, {how})."
        )

    __iter__ = __len__ = __getitem__ = keys = items = values = tree_flatten = _refuse

    @classmethod
    def tree_unflatten(cls, name: str, _: Any) -> Absent:
        """For JAX, which asks for it; there is nothing to put together."""
        return cls(name)
