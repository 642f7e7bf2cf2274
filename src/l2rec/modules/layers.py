"""Cut a Hugging Face model between two of its layers, and run either part of it alone.

The lowest K layers read each item's text by itself, the layers above them read whatever a view is
made of. Nothing of the model is copied: the forwards of its layers are led for the length of a
pass, so that what the model does around its layers (embeddings, rotary tables, last norm) stays its
own. The lower part ends where layer K is called; in the upper one the layers below K return the
states that layer K is to be given.
"""

from __future__ import annotations

__all__ = ["LayerCut", "layers_of"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from l2rec.errors import BackboneError


class _Reached(Exception):
    """Layer K was called: the lower part is done."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def layers_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the layers of a transformer: their full name and the list of them.

    Raises:
        BackboneError: there is no list of as many modules as the configuration has layers.
    """
    config: Any = model.config
    count = getattr(config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise BackboneError(
        f"the backbone ({config.model_type}) has no list of {count} layers, so that they cannot be "
        "told apart; set item_layers=0 if you set it"
    )


class LayerCut:
    """A model in two parts: the lowest ``below`` layers, and those above them.

    Args:
        model: a Hugging Face transformer.
        below: K, or how many layers less than all of them: -1 is all but the topmost.
        words: the module that makes the first layer's input, where it makes nothing else; the upper
            part then does without it.

    Raises:
        BackboneError: one of the parts would have no layer.
    """

    def __init__(self, model: nn.Module, below: int, *, words: nn.Module | None = None) -> None:
        self.name, layers = layers_of(model)
        self._words = words
        self.below = below if below > 0 else len(layers) + below
        if not 0 < self.below < len(layers):
            most = len(layers) - 1
            raise BackboneError(
                f"item_layers={below}: the backbone has {len(layers)} layers; choose 0 to {most}, "
                f"or -1 to -{most} for as many less than all"
            )
        self._lower, self._first = list(layers)[: self.below], layers[self.below]
        self._outputs: int | None = None
        """Length of the tuple that a layer returns, 0 if it returns its states alone."""

    def is_below(self, name: str) -> bool:
        """Return True for the full name of a module in one of the lowest layers."""
        rest = name.removeprefix(f"{self.name}.")
        return rest != name and int(rest.partition(".")[0]) < self.below

    def lower(self, run: Callable[[], object]) -> Tensor:
        """Return what layer K is given, [1, N, D], in a pass that ``run`` starts."""

        def reached(plain: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                raise _Reached(args[0] if args else kwargs["hidden_states"])

            return forward

        def seen(plain: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                output = plain(*args, **kwargs)
                self._outputs = len(output) if isinstance(output, tuple) else 0
                return output

            return forward

        with _led([self._lower[0]], seen), _led([self._first], reached):
            try:
                run()
            except _Reached as end:
                return end.states
        raise BackboneError("the backbone does not run its layers in order; set item_layers=0")

    def upper(self, states: Tensor, run: Callable[[], Any]) -> Any:
        """Return the result of a pass that ``run`` starts, with states [1, N, D] given to layer K.

        `lower` was called before, at least once.
        """
        assert self._outputs is not None
        given = (states, *(None,) * (self._outputs - 1)) if self._outputs else states

        def skipped(plain: Any) -> Any:
            return lambda *args, **kwargs: given

        def made(plain: Any) -> Any:
            return lambda *args, **kwargs: states

        words = [] if self._words is None else [self._words]
        with _led(self._lower, skipped), _led(words, made):
            return run()


@contextmanager
def _led(modules: list[nn.Module], lead: Callable[[Any], Any]) -> Iterator[None]:
    """Replace the forwards of modules within this context."""
    plain = [module.forward for module in modules]
    for module, forward in zip(modules, plain, strict=True):
        module.forward = lead(forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, plain, strict=True):
            module.forward = forward
