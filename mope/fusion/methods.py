"""The fusion methods: one object says all that differs between them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One way to classify from the features of several encoders.

    Args:
        name: in `MoPEConfig(method=...)`.
        complementary: whether there are complementary encoders.
        main: the modality of the main encoder, where the method sets it.
        static_length: static prompts in each layer of the main encoder, where the configuration does not say.
        maps: whether psi becomes a prompt: "never", "asked" (`use_mapped`), or "always".
        routes: whether experts are routed.
        head: what is classified: "main", the feature of the main encoder; "concat", all features side by side; "mean", each by a
            head of its own, of which the logits are averaged.
    """

    name: str
    complementary: bool = True
    main: str | None = None
    static_length: int = 0
    maps: str = "never"
    routes: bool = False
    head: str = "main"

    @property
    def prompts(self) -> bool:
        """Whether the main encoder has prompts in any case."""
        return self.routes or self.maps == "always"


_METHODS = (
    Method("mope", static_length=4, maps="asked", routes=True),
    Method("static_mapped", static_length=4, maps="always"),
    Method("late_concat", head="concat"),
    Method("ensemble", head="mean"),
    Method("image_only", complementary=False, main="vision"),
    Method("text_only", complementary=False, main="text"),
    Method("main_only", complementary=False),
)
METHODS = {method.name: method for method in _METHODS}
