"""The MLP of a block beside two products and a GELU between them."""


def test_gelu_mlp(measured, case, way):
    measured(case, way)
