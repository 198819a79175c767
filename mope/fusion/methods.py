"""Fusion methods, each described by one object."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """Method of classifying from the features of several encoders.

    Args:
        name: Value of `MoPEConfig(method=...)`.
        complementary: Whether there are complementary encoders.
        main: Modality of the main encoder, or None if the configuration chooses it.
        static_length: Default number of static prompts in each layer of the main encoder.
        maps: Whether psi is mapped to a prompt: "never", "asked" (if `use_mapped` is set) or "always".
        routes: Whether experts are routed.
        head: Input of the head: "main", the feature of the main encoder; "concat", all features concatenated; "mean", one head for
            each feature, with averaged logits.
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
        """Return whether the method always prompts the main encoder."""
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
