"""Compare `gelu_mlp` with two products and a GELU between them."""


def test_gelu_mlp(measured, case, way):
    measured(case, way)
